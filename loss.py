"""Every equation: advantages, ratios, surrogates, means, KL, and the objectives by name. Pure tensors.

Read OBJECTIVES, near the end, first: one row for each method, and what a row does not state is the paper's GRPO
(DeepSeekMath, arXiv 2402.03300; β is the tutorial's), which the defaults of `Objective` are. The choices that have an
equation are names in five small tables (ADVANTAGES, RATIO_LEVELS, SURROGATES, TOKEN_WEIGHTS, KL_ESTIMATORS), each with
one short function. A new method is a row, or a row and one function of what the others of its kind are given.

Shapes: Q questions, G completions of each, B sequences, C completion tokens. l = log π − log π_old of a token,
r = exp(l), A its advantage, d = log π − log π_ref. Where this departs from the papers:

- comparing a group of equal rewards gives exactly 0, and every standard deviation (unbiased) is guarded by 1e-4;
- each mean is one weight per token, computed once for the whole optimizer step, so the loss of a micro-batch is a
  plain weighted sum, and the gradients of micro-batches add up to that of the full batch;
- l is clamped to ±20 before the exponential, so that no input gives an infinity (as verl does in most of its
  policy terms; TRL in none).

On-policy, with a surrogate that has a ratio, the paper's mean and whole groups in the optimizer step, the loss is close
to 0 (plus the KL), since the advantages of a group add up to 0. Its gradient is not.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from errors import UserError, choose
from replay_buffer import Experience

LOG_RATIO_LIMIT = 20.0
KL_LIMIT = 10.0  # the most that k3 counts at a token; verl's
STD_EPS = 1e-4  # TRL's; with 1e-8, rounding noise in a group of equal rewards is blown up to a signal
ENTROPY_STEP = 0.005  # by which the adaptive entropy bonus moves, TRL's
DPPO_RATIO_LIMIT = 20.0  # arXiv 2602.04879, section 5.4


@dataclass(frozen=True)
class Objective:
    """One method: a choice for each column. Every column is a knob too, which replaces the row's choice."""

    # Advantages: what each completion is compared with, and what the difference is divided by
    advantage: str = "group"  # a name of ADVANTAGES
    advantage_std: str = "group"  # divide by the std of the rewards of the group, of the whole rollout (batch), or none
    multi_objective_aggregation: str = "sum_then_normalize"  # or normalize_then_sum: compare each reward, then add up
    relative_reward_weight: float = 1.0  # weight of the above ...
    baseline_reward_weight: float = 0.0  # ... and of the reward as it is, added to it
    whiten_advantages: bool = False  # then mean 0 and std 1 over the whole rollout
    # Policy term
    ratio_level: str = "token"  # a name of RATIO_LEVELS
    surrogate: str = "clip"  # a name of SURROGATES
    clip_eps: float = 0.2  # ε_low
    clip_eps_high: float | None = None  # ε_high; None: the same
    clip_ratio_c: float | None = None  # dual clip: a bad completion's ratio counts up to this
    # Mean over tokens
    loss_agg_mode: str = "seq-mean-token-mean"  # a name of TOKEN_WEIGHTS
    loss_scale_factor: float | None = None  # the constant of seq-mean-token-sum-norm; None: max_new_tokens
    # KL to the reference
    kl_weight: float = 0.01  # β; 0.04 in the paper, 0.01 in the tutorial
    kl_estimator: str = "k3"  # a name of KL_ESTIMATORS, also with +; or k3-ratio; or full
    kl_in_reward: bool = False  # subtracted from the reward of a completion, instead of added to the loss
    # Entropy
    entropy_weight: float = 0.0  # bonus for entropy, per nat
    entropy_target: float | None = None  # adaptive: the bonus grows while the entropy is below this, else shrinks
    top_entropy: float = 1.0  # only this share of the tokens, those of highest entropy, has a policy term
    # Which completions take part
    dynamic_sampling: int = 1  # rollouts that a step may make to replace groups without spread
    mask_truncated: bool = False  # completions cut off by max_new_tokens are compared, but not trained on
    # When the sampler's log-probabilities are not the trainer's
    sampler_correction: str = "none"  # token_ or sequence_, truncate or mask; as in token_truncate
    sampler_cap: float = 3.0  # C: the largest importance weight π_old / π_sampler

    @property
    def summary(self) -> str:
        """What differs from the row grpo, in a line; empty if nothing does."""
        other = {c: v for c, v in vars(self).items() if v != getattr(Objective, c)}
        return ", ".join(f"{c} {v}" for c, v in other.items())

    @property
    def has_own_ratio(self) -> bool:
        """Whether ratio, surrogate or clip differ from the row grpo."""
        columns = ("ratio_level", "surrogate", "clip_eps", "clip_eps_high", "clip_ratio_c")
        return any(getattr(self, c) != getattr(Objective, c) for c in columns)

    @property
    def spreads_gradient(self) -> bool:
        """Whether the loss of one token has a gradient at the others of its sequence, so that none can be left out."""
        return self.ratio_level == "sequence" or self.surrogate == "gmpo"

    @property
    def eps_high(self) -> float:
        """The upper side of the clip."""
        return self.clip_eps if self.clip_eps_high is None else self.clip_eps_high

    @property
    def kl_in_loss(self) -> bool:
        """Whether the loss has a KL term."""
        return self.kl_weight > 0 and not self.kl_in_reward

    @property
    def trains_everything(self) -> bool:
        """Whether a completion without advantage has a gradient too."""
        return self.kl_in_loss or self.entropy_weight > 0 or self.entropy_target is not None

    @property
    def needs_entropy_gradient(self) -> bool:
        """Whether the gradient goes through the entropies or the exact KL, not through the log-probabilities alone."""
        return self.entropy_weight > 0 or self.entropy_target is not None or self.kl_estimator == "full"


# ---------------------------------------------------------------------------------------------------- advantages


def has_spread(returns: Tensor) -> Tensor:
    """Whether the returns (..., G) of a group differ: bool (...). NaN, a completion without a score, does not count."""
    highest = torch.where(returns.isnan(), -torch.inf, returns).amax(-1)
    return highest > torch.where(returns.isnan(), torch.inf, returns).amin(-1)


def minus_mean(returns: Tensor) -> Tensor:
    """R − mean of the group (section 4.1.2), exactly 0 where all are equal (× 0 keeps the NaNs).

    Rounding leaves the mean of twelve equal 0.01s a hair beside 0.01, and 1 / std makes a signal of that hair.
    """
    centred = returns - returns.nanmean(-1, keepdim=True)
    return torch.where(has_spread(returns)[..., None], centred, returns * 0)


def leave_one_out(returns: Tensor) -> Tensor:
    """R − mean of the others (RLOO, arXiv 2402.14740) = (R − mean) G / (G − 1)."""
    scored = (~returns.isnan()).sum(-1, keepdim=True)
    return minus_mean(returns) * scored / (scored - 1).clamp(min=1)


def best_minus_second(returns: Tensor) -> Tensor:
    """The best completion gets its lead over the second, the others nothing: the gain in max reward that each one
    brings to its group, leave-one-out (pass@k with k = G, arXiv 2503.19595). With rewards of 0 and 1 only a group
    with exactly one right completion teaches."""
    best = torch.where(returns.isnan(), -torch.inf, returns).topk(2, -1)
    lead = torch.where(has_spread(returns), best.values[..., 0] - best.values[..., 1], 0.0)
    return (returns * 0).scatter_add(-1, best.indices[..., :1], lead[..., None])


ADVANTAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "group": minus_mean,
    "leave-one-out": leave_one_out,
    "pass-at-k": best_minus_second,
    "raw": lambda returns: returns,
}


def spread(returns: Tensor) -> Tensor:
    """Unbiased standard deviation over the last dimension, kept; NaNs left out."""
    count = (~returns.isnan()).sum(-1, keepdim=True)
    squares = (returns - returns.nanmean(-1, keepdim=True)).square()
    return (squares.nansum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()


def normalized(returns: Tensor, objective: Objective) -> Tensor:
    """Returns (Q, G) compared inside their group and scaled; NaN stays NaN."""
    relative = ADVANTAGES[objective.advantage](returns)
    if objective.advantage_std == "group":
        return relative / (spread(returns) + STD_EPS)
    if objective.advantage_std == "batch":  # LitePPO, arXiv 2508.08221
        return relative / (spread(returns.flatten()) + STD_EPS)
    return relative


def group_advantages(
    returns: Tensor, objective: Objective, rewards: Tensor | None = None, weights: list[float] | None = None
) -> Tensor:
    """How much better each completion is than its group.

    Args:
        returns: float (Q, G). NaN marks a completion that could not be scored: it takes no part, its advantage is 0.
        rewards: float (K, Q, G), the K rewards that `returns` is the sum of, and their weights (K,); only
            normalize_then_sum (GDPO, arXiv 2601.05242) looks at them.
    Returns:
        float (Q, G).
    """
    dtype, returns = returns.dtype, returns.double()  # the squares of rewards of 1e20 are no float32
    if objective.multi_objective_aggregation == "normalize_then_sum":
        rewards = rewards.double()
        relative = sum(w * normalized(r, objective).nan_to_num() for w, r in zip(weights, rewards, strict=True))
    else:
        relative = normalized(returns, objective)
    advantages = objective.relative_reward_weight * relative + objective.baseline_reward_weight * returns
    if objective.whiten_advantages:
        flat = advantages.flatten()
        advantages = (advantages - flat.nanmean()) / (spread(flat) + STD_EPS)
    return advantages.nan_to_num().to(dtype)


# --------------------------------------------------------------------------------------- means: a weight per token

# Each one: the weight of a token of each sequence, given the lengths (N,) of all completions of the optimizer step, how
# many of them are not empty, and the constant of seq-mean-token-sum-norm. The names are verl's.
TOKEN_WEIGHTS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    # the paper's: every completion counts the same, so a token of a long one counts less
    "seq-mean-token-mean": lambda lengths, count, scale: 1 / (count * lengths.clamp(min=1)),
    # DAPO's, arXiv 2503.14476: every token counts the same
    "token-mean": lambda lengths, count, scale: 1 / lengths.sum().clamp(min=1).expand_as(lengths),
    # every token counts the same, and the sum grows with the length
    "seq-mean-token-sum": lambda lengths, count, scale: 1 / count.expand_as(lengths),
    # Dr. GRPO's, arXiv 2503.20783: a constant instead of the length
    "seq-mean-token-sum-norm": lambda lengths, count, scale: 1 / (count * scale).expand_as(lengths),
}


def token_weights(lengths: list[int], mode: str, loss_scale_factor: float = 1.0) -> Tensor:
    """The weight of each token of each sequence, float32 (N,): the mean `mode`, over the whole optimizer step."""
    counts = torch.tensor(lengths, dtype=torch.float32)
    return TOKEN_WEIGHTS[mode](counts, (counts > 0).sum().clamp(min=1), loss_scale_factor)


# ---------------------------------------------------------------------------------------- ratios and surrogates


def bounded_exp(x: Tensor) -> Tensor:
    """exp(x), with x clamped to ±20: finite for every input, and without a gradient beyond."""
    return x.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def sequence_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x (B, C) over the tokens of each sequence, at each of its tokens."""
    return (torch.where(mask, x, 0.0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)).expand_as(x)


# Each one: what stands for l, given l and the mask, both (B, C).
RATIO_LEVELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "token": lambda log_ratio, mask: log_ratio,
    # GSPO, arXiv 2507.18071, eq. 7: the geometric mean of the ratios, one number for the sequence
    "sequence": sequence_mean,
    # GSPO-token, eq. 14: the same value, but each token's gradient goes to that token alone
    "sequence-token": lambda log_ratio, mask: sequence_mean(log_ratio, mask).detach() + log_ratio - log_ratio.detach(),
}


# Each one: the loss of each token, (B, C), given what stands for l (B, C), log π (B, C), A (B, 1), the mask (B, C) and
# the row. What stands at padding is dropped later. To stop a gradient: detach.


def clip(log_ratio: Tensor, log_probs: Tensor, advantages: Tensor, mask: Tensor, o: Objective) -> Tensor:
    """−min(r A, clip(r, 1 − ε_low, 1 + ε_high) A) (eq. 3, as a loss); A < 0: at most c |A| (dual clip, 1912.09729).

    With ε_high > ε_low: clip-higher (DAPO). c is TRL's delta, and verl's clip_ratio_c.
    """
    ratio = bounded_exp(log_ratio)
    loss = -torch.min(ratio * advantages, ratio.clamp(1 - o.clip_eps, 1 + o.eps_high) * advantages)
    if o.clip_ratio_c is None:
        return loss
    return torch.where(advantages < 0, torch.min(loss, -o.clip_ratio_c * advantages), loss)


def cispo(log_ratio: Tensor, log_probs: Tensor, advantages: Tensor, mask: Tensor, o: Objective) -> Tensor:
    """−sg(clip(r, 1 − ε_low, 1 + ε_high)) A log π (CISPO, arXiv 2506.13585, eq. 4–5): no token is lost.

    verl's convention and the paper's. TRL's epsilon_high is the cap itself, 1 + ε_high, and it has no lower side.
    """
    return -bounded_exp(log_ratio).clamp(1 - o.clip_eps, 1 + o.eps_high).detach() * advantages * log_probs


def sapo(log_ratio: Tensor, log_probs: Tensor, advantages: Tensor, mask: Tensor, o: Objective) -> Tensor:
    """−σ(τ (r − 1)) 4/τ A, τ = 1 for A > 0, else 1.05: a gate that closes softly (SAPO, arXiv 2511.20347)."""
    tau = torch.where(advantages > 0, 1.0, 1.05).to(advantages)
    return -torch.sigmoid(tau * (bounded_exp(log_ratio) - 1)) * 4 / tau * advantages


def gmpo(log_ratio: Tensor, log_probs: Tensor, advantages: Tensor, mask: Tensor, o: Objective) -> Tensor:
    """−A times the geometric mean of the ratios, each clipped to (e^−ε_low, e^ε_high) on its own, on the pessimistic
    side (GMPO, arXiv 2507.20673, eq. 4)."""
    sign = advantages.sign()
    pessimistic = sign * torch.min(sign * log_ratio, sign * log_ratio.clamp(-o.clip_eps, o.eps_high))
    return -advantages * bounded_exp(sequence_mean(pessimistic, mask))


def reinforce(log_ratio: Tensor, log_probs: Tensor, advantages: Tensor, mask: Tensor, o: Objective) -> Tensor:
    """−A log π: what every surrogate's gradient is while the policy is the one that sampled. No ratio, no clip."""
    return -advantages * log_probs


def dppo(log_ratio: Tensor, log_probs: Tensor, advantages: Tensor, mask: Tensor, o: Objective) -> Tensor:
    """−sg(min(r, 20)) A log π, and nothing for a token whose probability π has moved away from π_old by more than
    ε_high (A > 0) or ε_low (A < 0), in the advantage's direction (DPPO with binary TV, arXiv 2602.04879)."""
    moved = (log_probs.exp() - (log_probs - log_ratio).exp()).detach()
    kept = torch.where(advantages > 0, moved <= o.eps_high, moved >= -o.clip_eps)
    return torch.where(kept, -bounded_exp(log_ratio).clamp(max=DPPO_RATIO_LIMIT).detach() * advantages * log_probs, 0.0)


SURROGATES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Objective], Tensor]] = {
    "clip": clip, "cispo": cispo, "sapo": sapo, "gmpo": gmpo, "reinforce": reinforce, "dppo": dppo,
}  # fmt: skip


def policy_term(log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, o: Objective) -> Tensor:
    """Ratio and surrogate of one row: the loss of each token, (B, C)."""
    log_ratio = RATIO_LEVELS[o.ratio_level](log_probs - old, mask)
    return SURROGATES[o.surrogate](log_ratio, log_probs, advantages, mask, o)


def taught_nothing(log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, o: Objective) -> Tensor:
    """The tokens that have an advantage and, under this row's surrogate, no gradient: bool (B, C). The clipped ones."""
    with torch.enable_grad():
        leaf = log_probs.detach().requires_grad_()
        terms = torch.where(mask, policy_term(leaf, old, advantages, mask, o), 0.0)
        (gradient,) = torch.autograd.grad(terms.sum(), leaf)
    return mask & (gradient == 0) & (advantages != 0)


def sampler_weights(old: Tensor, sampler: Tensor, mask: Tensor, o: Objective) -> Tensor:
    """π_old / π_sampler, capped at C: of each token, or of the whole sequence, (B, C) or (B, 1).

    Truncated importance sampling; `mask` drops what is above the cap instead. A sequence's weight is a product over its
    tokens, so the longer it is, the further from 1.
    """
    level, _, action = o.sampler_correction.partition("_")
    gap = torch.where(mask, old - sampler, 0.0)
    gap = gap.sum(-1, keepdim=True) if level == "sequence" else gap
    weight = bounded_exp(gap)
    return weight.clamp(max=o.sampler_cap) if action == "truncate" else weight * (weight <= o.sampler_cap)


# ------------------------------------------------------------------------------------------------------------ KL


def k3(d: Tensor) -> Tensor:
    """exp(−d) + d − 1 ≥ 0 (eq. 4), clamped as in verl: −d to 20, the result to 10 (beyond it there is no gradient)."""
    d = d.clamp(min=-LOG_RATIO_LIMIT)
    return ((-d).exp() + d - 1).clamp(max=KL_LIMIT)


# Of d, at each sampled token. As a value, on-policy, each but `abs` and `k2` is unbiased for KL(π ‖ π_ref). What the
# gradient of each one is in expectation, when it stands in the loss and the policy is the one that sampled (closed
# forms in tests/test_objectives.py; arXiv 2510.01555): k1 zero, so it is pure noise; k2 exactly that of KL(π ‖ π_ref);
# k3 that of the other direction, KL(π_ref ‖ π); abs neither.
KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda d: d,
    "abs": lambda d: d.abs(),
    "k2": lambda d: d.square() / 2,
    "k3": k3,
}
KL_ESTIMATORS |= {"kl": KL_ESTIMATORS["k1"], "mse": KL_ESTIMATORS["k2"], "low_var_kl": k3}  # verl's names


def approx_kl_divergence(
    log_probs: Tensor, log_probs_ref: Tensor, estimator: str = "k3", ratio: Tensor | None = None
) -> Tensor:
    """An estimate of KL(policy ‖ reference) at each token, from the sampled token alone.

    `k1+`, `abs+`, `k3+`: the value of one and the gradient of k2, the right one (verl's straight-through). `k3-ratio`:
    k3 times r = `ratio`, whose gradient is also the right one, and whose value stays unbiased off-policy.
    """
    d = log_probs - log_probs_ref
    if estimator == "k3-ratio":
        return k3(d) * ratio
    value = KL_ESTIMATORS[estimator.removesuffix("+")](d)
    if not estimator.endswith("+"):
        return value
    k2 = KL_ESTIMATORS["k2"](d)
    return k2 - k2.detach() + value.detach()


# ------------------------------------------------------------------------------------------------------- methods

OBJECTIVES: dict[str, Objective] = {
    "grpo": Objective(),  # DeepSeekMath, arXiv 2402.03300
    "bnpo": Objective(loss_agg_mode="token-mean"),  # TRL's name for the paper's terms under a token mean
    "dr_grpo": Objective(advantage_std="none", loss_agg_mode="seq-mean-token-sum-norm", kl_weight=0.0),  # 2503.20783
    "dapo": Objective(  # 2503.14476; its soft overlong penalty is a reward: --reward accuracy soft_overlong
        clip_eps_high=0.28, loss_agg_mode="token-mean", kl_weight=0.0, dynamic_sampling=10, mask_truncated=True
    ),
    "lite_ppo": Objective(advantage_std="batch", loss_agg_mode="token-mean", kl_weight=0.0),  # 2508.08221
    "gspo": Objective(ratio_level="sequence", clip_eps=3e-4, clip_eps_high=4e-4, kl_weight=0.0),  # 2507.18071
    "gspo_token": Objective(ratio_level="sequence-token", clip_eps=3e-4, clip_eps_high=4e-4, kl_weight=0.0),
    "luspo": Objective(  # 2602.05261
        ratio_level="sequence", clip_eps=2e-3, clip_eps_high=2.5e-3, loss_agg_mode="seq-mean-token-sum", kl_weight=0.0
    ),
    "gmpo": Objective(surrogate="gmpo", clip_eps=0.4, clip_eps_high=0.4, kl_weight=0.0),  # 2507.20673
    "cispo": Objective(  # 2506.13585; no lower side, upper cap 5 (TRL's recipe)
        surrogate="cispo", clip_eps=1.0, clip_eps_high=4.0, loss_agg_mode="token-mean", kl_weight=0.0
    ),
    "sapo": Objective(surrogate="sapo", kl_weight=0.0),  # 2511.20347
    "dppo": Objective(surrogate="dppo", clip_eps=0.15, loss_agg_mode="token-mean", kl_weight=0.0),  # 2602.04879
    "rloo": Objective(  # 2402.14740
        advantage="leave-one-out", advantage_std="none", surrogate="reinforce", loss_agg_mode="seq-mean-token-sum",
        kl_weight=0.05, kl_estimator="k1", kl_in_reward=True,
    ),
    "reinforce": Objective(  # Williams, 1992: the reward as it is
        advantage="raw", advantage_std="none", surrogate="reinforce", loss_agg_mode="seq-mean-token-sum", kl_weight=0.0
    ),
    "reinforce_plus_plus_baseline": Objective(  # 2501.03262
        advantage_std="none", whiten_advantages=True, loss_agg_mode="token-mean", kl_estimator="k2"
    ),
    "gdpo": Objective(multi_objective_aggregation="normalize_then_sum", whiten_advantages=True),  # 2601.05242
    "pass_at_k": Objective(advantage="pass-at-k", advantage_std="none", kl_weight=0.0),  # 2503.19595
}  # fmt: skip

NAMES = {
    "advantage": ADVANTAGES, "advantage_std": ("group", "batch", "none"), "ratio_level": RATIO_LEVELS,
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"), "surrogate": SURROGATES,
    "loss_agg_mode": TOKEN_WEIGHTS, "sampler_correction": (
        "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    "kl_estimator": (*KL_ESTIMATORS, *(f"{name}+" for name in KL_ESTIMATORS), "k3-ratio", "full"),
}  # fmt: skip


def build_objective(name: str, **given: object) -> Objective:
    """The row `name`, with the columns that are given (not None) in place of its own.

    Raises:
        UserError: for an unknown name, and for a combination that means nothing.
    """
    given = {column: value for column, value in given.items() if value is not None}
    o = replace(OBJECTIVES[choose(name, OBJECTIVES, "objective")], **given)
    for column, names in NAMES.items():
        choose(getattr(o, column), names, column)
    wrong = contradiction(o, set(given))
    if wrong:
        raise UserError(wrong)
    return o


def contradiction(o: Objective, given: set[str]) -> str | None:
    """The sentence for a combination that means nothing, or None; `given` are the columns that replace the row's."""
    clips = o.surrogate in ("clip", "cispo", "gmpo", "dppo")
    if {"clip_eps", "clip_eps_high"} & given and not clips:
        return f"--surrogate {o.surrogate} does not clip; leave out --clip_eps and --clip_eps_high."
    if o.clip_ratio_c is not None and o.surrogate != "clip":
        return f"--clip_ratio_c belongs to --surrogate clip, not to {o.surrogate}; leave it out."
    if o.clip_ratio_c is not None and o.clip_ratio_c <= 1 + o.eps_high:
        return f"--clip_ratio_c is {o.clip_ratio_c:g}; it must be more than 1 + clip_eps_high = {1 + o.eps_high:g}."
    if o.ratio_level != "token" and o.surrogate in ("reinforce", "gmpo", "dppo"):
        return f"--surrogate {o.surrogate} has no use for --ratio_level {o.ratio_level}; use token."
    if "loss_scale_factor" in given and o.loss_agg_mode != "seq-mean-token-sum-norm":
        return f"--loss_scale_factor belongs to --loss_agg_mode seq-mean-token-sum-norm, not to {o.loss_agg_mode}."
    if o.kl_weight == 0 and ("kl_estimator" in given or ("kl_in_reward" in given and o.kl_in_reward)):
        return "--kl_estimator and --kl_in_reward mean nothing without a KL; give --kl_weight too, or leave them out."
    if o.kl_in_reward and o.kl_estimator not in KL_ESTIMATORS:
        return (
            f"A reward has no gradient, so --kl_estimator {o.kl_estimator} means nothing in it; use k1, k2, k3 or abs."
        )
    if o.kl_in_reward and o.multi_objective_aggregation == "normalize_then_sum":
        return "--kl_in_reward is added to the sum of the rewards, which normalize_then_sum does not use; choose one."
    if o.advantage == "raw" and o.advantage_std != "none":
        return (
            "--advantage raw is not compared with anything, so it has no std to divide by; give --advantage_std none."
        )
    if o.advantage == "raw" and o.dynamic_sampling > 1:
        return "--dynamic_sampling drops groups of equal rewards, from which --advantage raw does learn; leave one out."
    if o.spreads_gradient and o.top_entropy < 1:
        return (
            "--top_entropy chooses tokens, and here a token's loss reaches its whole sequence; use ratio_level token "
            "or sequence-token, and another surrogate than gmpo."
        )
    if o.spreads_gradient and o.sampler_correction.startswith("token"):
        return "--sampler_correction must be of the sequence, as the ratio is: sequence_truncate or sequence_mask."
    if o.relative_reward_weight == 0 and o.baseline_reward_weight == 0:
        return (
            "--relative_reward_weight and --baseline_reward_weight are both 0, so nothing would be learned; raise one."
        )
    if "sampler_cap" in given and o.sampler_correction == "none":
        return "--sampler_cap belongs to --sampler_correction; give that too."
    return None


# ---------------------------------------------------------------------------------------------------------- loss


class GRPOLoss(nn.Module):
    """The objective of one row, on one micro-batch. Its state, saved with checkpoints: the adaptive entropy bonus."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective
        adaptive = objective.entropy_target is not None
        self.register_buffer("entropy_weight", torch.tensor(objective.entropy_weight), persistent=adaptive)
        self.register_buffer("last_entropy", torch.tensor(torch.inf), persistent=adaptive)  # none yet

    def adapt(self, entropy: float) -> None:
        """After a step: move the bonus towards the target (Skywork-OR1, arXiv 2505.22312; as TRL does)."""
        if self.objective.entropy_target is not None:
            step = ENTROPY_STEP if entropy <= self.objective.entropy_target else -ENTROPY_STEP
            self.entropy_weight.add_(step).clamp_(0.0, max(1.0, self.objective.entropy_weight))
            self.last_entropy.fill_(entropy)

    @property
    def entropy_bonus(self) -> float:
        """The weight of the entropy now; an adaptive one acts only while the entropy is not above its target."""
        target = self.objective.entropy_target
        return float(self.entropy_weight) if target is None or self.last_entropy <= target else 0.0

    def forward(
        self, log_probs: Tensor, experience: Experience, weights: Tensor, entropies: Tensor | None = None,
        exact_kl: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:  # fmt: skip
        """The micro-batch's share of the loss of the optimizer step.

        Args:
            log_probs: float (B, C), of the policy now, with gradient; entropies: the same, for the entropy bonus;
            exact_kl: the same, for the estimator `full`.
            experience: the same micro-batch. Without `action_log_probs` the policy has not changed since sampling:
                the ratio is then 1 in value and the gradient is that of REINFORCE.
            weights: float (B,), from `token_weights` over the whole optimizer step.
        Returns:
            the loss, a scalar, to be added up over micro-batches; and metrics as (sum, count) over tokens.
        """
        o, mask, advantages = self.objective, experience.action_mask, experience.advantages[:, None]
        now = log_probs.detach()
        # Padding may hold anything; where, not multiplication, since 0 × inf is NaN.
        old = now if experience.action_log_probs is None else torch.where(mask, experience.action_log_probs, now)
        per_token = policy_term(log_probs, old, advantages, mask, o)
        ratio = bounded_exp(log_probs - old)
        clipped = torch.zeros_like(mask)  # on-policy every ratio is 1, and nothing is
        if experience.action_log_probs is not None:
            clipped = taught_nothing(now, old, advantages, mask, o)
        watched = {"train/ratio_mean": ratio, "train/clipped_share": clipped.float()}
        if experience.sampler_log_probs is not None:
            watched["train/sampler_gap"] = (old - experience.sampler_log_probs).abs()
            if o.sampler_correction != "none":
                per_token = per_token * sampler_weights(old, experience.sampler_log_probs, mask, o)
        if experience.policy_mask is not None:
            per_token = per_token * experience.policy_mask
        if o.kl_in_loss:
            kl = exact_kl
            if o.kl_estimator != "full":
                ref = torch.where(mask, experience.log_probs_ref, now)
                kl = approx_kl_divergence(log_probs, ref, o.kl_estimator, ratio)
            per_token = per_token + o.kl_weight * kl
            watched["train/kl_divergence"] = kl
        if self.entropy_bonus:
            per_token = per_token - self.entropy_bonus * entropies
        loss = (weights[:, None] * torch.where(mask, per_token, 0.0)).sum()
        metrics = {k: (torch.where(mask, v.detach(), 0.0).sum(), mask.sum()) for k, v in watched.items()}
        return loss, metrics
