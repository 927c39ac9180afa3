"""What other methods put in the place of parts of `GRPOLoss`: short equations, by name.

Each choice of table.py that has an equation is a name in one of five dictionaries (ADVANTAGES,
RATIO_LEVELS, SURROGATES, TOKEN_WEIGHTS, KL_ESTIMATORS). `ObjectiveLoss`, at the end, looks up the
choices of its row; its `forward` is that of loss.py.

Shapes are those of loss.py: (B, C) for tokens, (B, 1) for the advantages A. l = log π - log π_old,
r = exp(l), d = log π - log π_ref. To stop a gradient (sg): detach. What the papers call the
objective is here a loss: its sign is turned.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import loss
from loss import (
    LOWEST,
    STD_EPS,
    GRPOLoss,
    approx_kl_divergence,
    bounded_exp,
    center,
    completion_logits,
    rewards_differ,
)
from objectives.table import Objective
from replay_buffer import Experience
from support.adapters import adapters_off
from support.pieces import in_pieces
from support.statistics import unbiased_std

ENTROPY_STEP = 0.005  # by which the adaptive entropy bonus moves; TRL's
DPPO_RATIO_LIMIT = 20.0  # arXiv 2602.04879, section 5.4


# ------------------------------------------------------------------------------------- advantages


def leave_one_out(returns: Tensor) -> Tensor:
    """R - mean of the others (RLOO, arXiv 2402.14740) = (R - mean) G / (G - 1)."""
    scored = (~returns.isnan()).sum(dim=-1, keepdim=True)
    return center(returns) * scored / (scored - 1).clamp(min=1)


def pass_at_k_advantage(returns: Tensor) -> Tensor:
    """The best completion gets its lead over the second, the others nothing.

    That is the gain in the maximal reward which each one brings to its group, leave-one-out (pass@k
    with k = G, arXiv 2503.19595). With rewards of 0 and 1, only a group with exactly one right
    completion teaches.
    """
    best = torch.where(returns.isnan(), -torch.inf, returns).topk(2, dim=-1)
    lead = best.values[..., 0] - best.values[..., 1]
    lead = torch.where(rewards_differ(returns), lead, 0.0)
    return (returns * 0).scatter_add(-1, best.indices[..., :1], lead.unsqueeze(-1))


ADVANTAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "group": center,
    "leave-one-out": leave_one_out,
    "pass-at-k": pass_at_k_advantage,
    "raw": lambda returns: returns,
}


def normalize_rewards(returns: Tensor, objective: Objective) -> Tensor:
    """Returns (Q, G) compared inside their group and divided by a std; NaN stays NaN."""
    relative = ADVANTAGES[objective.advantage](returns)
    if objective.advantage_std == "group":
        return relative / (unbiased_std(returns) + STD_EPS)
    if objective.advantage_std == "batch":  # LitePPO, arXiv 2508.08221
        return relative / (unbiased_std(returns.flatten()) + STD_EPS)
    return relative


def objective_advantages(
    returns: Tensor, rewards: Tensor, reward_weights: list[float], objective: Objective
) -> Tensor:
    """How much better each completion is than its group, under any objective.

    Args:
        returns: float (Q, G); NaN marks a completion that could not be scored.
        rewards: float (K, Q, G), the K rewards that `returns` is the weighted sum of.
    Returns:
        float (Q, G), 0 where nothing could be scored.
    """
    exact = returns.double()  # the squares of rewards of 1e20 are too large for float32
    if objective.multi_objective_aggregation == "normalize_then_sum":  # GDPO, arXiv 2601.05242
        relative = sum(
            weight * normalize_rewards(reward, objective).nan_to_num()
            for weight, reward in zip(reward_weights, rewards.double(), strict=True)
        )
    else:
        relative = normalize_rewards(exact, objective)
    advantages = objective.relative_reward_weight * relative
    advantages = advantages + objective.baseline_reward_weight * exact
    if objective.whiten_advantages:
        flat = advantages.flatten()
        advantages = (advantages - flat.nanmean()) / (unbiased_std(flat) + STD_EPS)
    return advantages.nan_to_num().to(returns.dtype)


# ------------------------------------------------------------------------------- means over tokens

# Of the lengths (N,) of the completions of an optimizer step, how many of them are not empty, and
# the constant of seq-mean-token-sum-norm: the weight of a token of each sequence. verl's names.
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


def token_weights(lengths: list[int], mode: str, scale: float = 1.0) -> Tensor:
    """The weight of each token of each sequence, float32 (N,), for one of the means above."""
    counts = torch.tensor(lengths, dtype=torch.float32)
    return TOKEN_WEIGHTS[mode](counts, (counts > 0).sum().clamp(min=1), scale)


# ----------------------------------------------------------------------------------------- ratios


def sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of each sequence, (B, C), at each of its tokens."""
    total = torch.where(mask, values, 0.0).sum(dim=-1, keepdim=True)
    return (total / mask.sum(dim=-1, keepdim=True).clamp(min=1)).expand_as(values)


def sequence_token_ratio(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """The mean over the sequence as a value; the gradient of a token goes to that token alone."""
    return sequence_mean(log_ratio, mask).detach() + log_ratio - log_ratio.detach()


# What stands for l, (B, C), of l and the mask.
RATIO_LEVELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "token": lambda log_ratio, mask: log_ratio,
    "sequence": sequence_mean,  # GSPO, arXiv 2507.18071, eq. 7: the geometric mean of the ratios
    "sequence-token": sequence_token_ratio,  # GSPO-token, eq. 14
}


# ------------------------------------------------------------------------------------- surrogates
# The loss of each token, (B, C), of five arguments: what stands for l, float (B, C); log π, float
# (B, C); A, float (B, 1); the mask, bool (B, C); and the row. The padding may hold anything.


def clip(
    log_ratio: Tensor, log_probs: Tensor, advantages: Tensor, mask: Tensor, o: Objective
) -> Tensor:
    """-min(r A, clip(r, 1 - ε_low, 1 + ε_high) A); for A < 0 at most c |A|.

    ε_high > ε_low is clip-higher (DAPO); c is the dual clip (arXiv 1912.09729), which TRL calls
    delta and verl clip_ratio_c.
    """
    ratio = bounded_exp(log_ratio)
    clipped = ratio.clamp(1 - o.clip_eps, 1 + o.eps_high)
    losses = -torch.min(ratio * advantages, clipped * advantages)
    if o.clip_ratio_c is None:
        return losses
    return torch.where(advantages < 0, torch.min(losses, -o.clip_ratio_c * advantages), losses)


def cispo(
    log_ratio: Tensor, log_probs: Tensor, advantages: Tensor, mask: Tensor, o: Objective
) -> Tensor:
    """-sg(clip(r, 1 - ε_low, 1 + ε_high)) A log π: no token is lost (arXiv 2506.13585, eq. 4, 5).

    The paper's convention and verl's. TRL's epsilon_high is the cap itself, 1 + ε_high, and TRL has
    no lower side.
    """
    weights = bounded_exp(log_ratio).clamp(1 - o.clip_eps, 1 + o.eps_high)
    return -weights.detach() * advantages * log_probs


def sapo(
    log_ratio: Tensor, log_probs: Tensor, advantages: Tensor, mask: Tensor, o: Objective
) -> Tensor:
    """-σ(τ (r - 1)) 4/τ A, τ = 1 for A > 0, else 1.05: a gate that closes softly (2511.20347)."""
    tau = torch.where(advantages > 0, 1.0, 1.05).to(advantages)
    return -torch.sigmoid(tau * (bounded_exp(log_ratio) - 1)) * 4 / tau * advantages


def gmpo(
    log_ratio: Tensor, log_probs: Tensor, advantages: Tensor, mask: Tensor, o: Objective
) -> Tensor:
    """-A times the geometric mean of the ratios, each clipped to (e^-ε_low, e^ε_high) alone.

    On the pessimistic side (arXiv 2507.20673, eq. 4).
    """
    sign = advantages.sign()
    clipped = log_ratio.clamp(-o.clip_eps, o.eps_high)
    pessimistic = sign * torch.min(sign * log_ratio, sign * clipped)
    return -advantages * bounded_exp(sequence_mean(pessimistic, mask))


def reinforce(
    log_ratio: Tensor, log_probs: Tensor, advantages: Tensor, mask: Tensor, o: Objective
) -> Tensor:
    """-A log π: what every surrogate's gradient is while the policy is the one that sampled."""
    return -advantages * log_probs


def dppo(
    log_ratio: Tensor, log_probs: Tensor, advantages: Tensor, mask: Tensor, o: Objective
) -> Tensor:
    """-sg(min(r, 20)) A log π, but nothing for a token whose probability has moved too far.

    Further away from π_old than ε_high (A > 0) or ε_low (A < 0), in the direction of the advantage
    (DPPO with binary total variation, arXiv 2602.04879).
    """
    moved = (log_probs.exp() - (log_probs - log_ratio).exp()).detach()
    kept = torch.where(advantages > 0, moved <= o.eps_high, moved >= -o.clip_eps)
    weights = bounded_exp(log_ratio).clamp(max=DPPO_RATIO_LIMIT).detach()
    return torch.where(kept, -weights * advantages * log_probs, 0.0)


SURROGATES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Objective], Tensor]] = {
    "clip": clip,
    "cispo": cispo,
    "sapo": sapo,
    "gmpo": gmpo,
    "reinforce": reinforce,
    "dppo": dppo,
}


# ------------------------------------------------------------------------------- sampler correction


def sampler_weights(old: Tensor, batch: Experience, objective: Objective) -> Tensor:
    """π_old / π_sampler, capped, of each token (B, C) or of the whole sequence (B, 1).

    Truncated importance sampling; `mask` drops what is above the cap instead. The weight of a
    sequence is a product over its tokens, so the longer it is, the further from 1.
    """
    level, _, action = objective.sampler_correction.partition("_")
    gap = torch.where(batch.action_mask, old - batch.sampler_log_probs, 0.0)
    gap = gap.sum(dim=-1, keepdim=True) if level == "sequence" else gap
    weights, cap = bounded_exp(gap), objective.sampler_cap
    return weights.clamp(max=cap) if action == "truncate" else weights * (weights <= cap)


# --------------------------------------------------------------------------------------------- KL

# Of d, at each sampled token. As a value, on-policy, each but `abs` and `k2` is unbiased for
# KL(π ‖ π_ref). What the gradient is in expectation, when the estimate stands in the loss and the
# policy is the one that sampled (closed forms in tests/test_objectives.py; arXiv 2510.01555): k1
# zero, so it is pure noise; k2 exactly that of KL(π ‖ π_ref); k3 that of the other direction,
# KL(π_ref ‖ π); abs neither.
KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "k1": lambda log_probs, ref: log_probs - ref,
    "abs": lambda log_probs, ref: (log_probs - ref).abs(),
    "k2": lambda log_probs, ref: (log_probs - ref).square() / 2,
    "k3": approx_kl_divergence,
}
# verl's names
KL_ESTIMATORS["kl"] = KL_ESTIMATORS["k1"]
KL_ESTIMATORS["mse"] = KL_ESTIMATORS["k2"]
KL_ESTIMATORS["low_var_kl"] = KL_ESTIMATORS["k3"]


def kl_divergence(
    log_probs: Tensor, log_probs_ref: Tensor, estimator: str = "k3", ratio: Tensor | None = None
) -> Tensor:
    """An estimate of KL(policy ‖ reference) at each token, from the sampled token alone.

    `k1+`, `abs+`, `k3+`: the value of one and the gradient of k2, which is the right one (verl's
    straight-through). `k3-ratio`: k3 times r = `ratio`, whose gradient is also the right one, and
    whose value stays unbiased off-policy.
    """
    if estimator == "k3-ratio":
        return approx_kl_divergence(log_probs, log_probs_ref) * ratio
    value = KL_ESTIMATORS[estimator.removesuffix("+")](log_probs, log_probs_ref)
    if not estimator.endswith("+"):
        return value
    k2 = KL_ESTIMATORS["k2"](log_probs, log_probs_ref)
    return k2 - k2.detach() + value.detach()


def token_log_probs(
    logits: Tensor, tokens: Tensor, temperature: float = 1.0, logits_ref: Tensor | None = None
) -> tuple[Tensor, ...]:
    """As in loss.py, but the entropies have a gradient, and there may be an exact KL.

    Args:
        logits, logits_ref: float (N, V); tokens: int64 (N,).
    Returns:
        log-probabilities, entropies and, with the reference's logits, KL(policy ‖ reference) over
        the whole vocabulary; each float32 (N,), in nats.
    """

    def log_softmax(logits: Tensor) -> Tensor:
        logits = logits.float() if temperature == 1 else logits.float() / temperature
        return torch.log_softmax(logits, dim=-1)

    log_probs = log_softmax(logits)
    finite = log_probs.clamp(min=LOWEST)
    probs = finite.exp()
    entropies = -(probs * finite).sum(dim=-1)
    found = log_probs.gather(dim=-1, index=tokens.unsqueeze(-1)).squeeze(-1), entropies
    if logits_ref is None:
        return found
    cross = (probs * log_softmax(logits_ref).clamp(min=LOWEST)).sum(dim=-1)
    return *found, -entropies - cross


def sequences_log_probs(
    model: nn.Module,
    sequences: Tensor,
    attention_mask: Tensor,
    num_actions: int,
    temperature: float = 1.0,
    reference: nn.Module | None = None,
) -> tuple[Tensor, ...]:
    """As in loss.py, with `token_log_probs` above; and the exact KL to a `reference`, if given."""
    tokens = sequences[:, -num_actions:].flatten()
    logits = [completion_logits(model, sequences, attention_mask, num_actions).flatten(0, 1)]
    if reference is not None:
        with torch.no_grad(), adapters_off(reference, reference is model):
            found = completion_logits(reference, sequences, attention_mask, num_actions)
        logits.append(found.flatten(0, 1))

    def piece(logits: Tensor, tokens: Tensor, *logits_ref: Tensor) -> tuple[Tensor, ...]:
        return token_log_probs(logits, tokens, temperature, *logits_ref)

    found = in_pieces(piece, logits[0], tokens, *logits[1:])
    return tuple(values.view(-1, num_actions) for values in found)


def log_prob_functions(objective: Objective) -> tuple[Callable, Callable]:
    """The functions `sequences_log_probs` and `token_log_probs` that an objective needs.

    Those of loss.py, unless the entropies have a gradient or the KL is exact: that takes twice as
    long.
    """
    if objective.has_entropy_bonus or objective.needs_exact_kl:
        return sequences_log_probs, token_log_probs
    return loss.sequences_log_probs, loss.token_log_probs


# ------------------------------------------------------------------------------------------- loss


class ObjectiveLoss(GRPOLoss):
    """The objective of one row. Its state, saved in checkpoints, is the adaptive entropy bonus."""

    def __init__(self, objective: Objective) -> None:
        kl_weight = objective.kl_weight if objective.kl_in_loss else 0.0
        super().__init__(objective.clip_eps, kl_weight)
        self.objective = objective
        adaptive = objective.entropy_target is not None
        weight, never = torch.tensor(objective.entropy_weight), torch.tensor(torch.inf)
        self.register_buffer("entropy_weight", weight, persistent=adaptive)
        self.register_buffer("last_entropy", never, persistent=adaptive)

    @property
    def trains_zero_advantage(self) -> bool:
        """A KL or an entropy bonus trains every completion."""
        return self.kl_weight > 0 or self.objective.has_entropy_bonus

    def advantages(self, returns: Tensor, rewards: Tensor, reward_weights: list[float]) -> Tensor:
        """The row's comparison."""
        return objective_advantages(returns, rewards, reward_weights, self.objective)

    def token_weights(self, lengths: list[int], max_new_tokens: int) -> Tensor:
        """The row's mean."""
        scale = self.objective.loss_scale_factor or max_new_tokens
        return token_weights(lengths, self.objective.loss_agg_mode, scale)

    def surrogate(self, log_probs: Tensor, old: Tensor, batch: Experience) -> Tensor:
        """The row's ratio and surrogate."""
        o, mask = self.objective, batch.action_mask
        log_ratio = RATIO_LEVELS[o.ratio_level](log_probs - old, mask)
        return SURROGATES[o.surrogate](
            log_ratio, log_probs, batch.advantages.unsqueeze(-1), mask, o
        )

    def policy_term(self, log_probs: Tensor, old: Tensor, batch: Experience) -> Tensor:
        """The surrogate, corrected for the sampler, on the tokens that are trained."""
        losses = self.surrogate(log_probs, old, batch)
        if self.objective.sampler_correction != "none" and batch.sampler_log_probs is not None:
            losses = losses * sampler_weights(old, batch, self.objective)
        return losses if batch.policy_mask is None else losses * batch.policy_mask

    def clipped_tokens(self, log_probs: Tensor, old: Tensor, batch: Experience) -> Tensor:
        """The tokens that have an advantage and no gradient, whatever the surrogate is."""
        mask = batch.action_mask
        if batch.action_log_probs is None:  # on-policy every ratio is 1, and nothing is clipped
            return torch.zeros_like(mask)
        with torch.enable_grad():
            leaf = log_probs.detach().requires_grad_()
            losses = torch.where(mask, self.surrogate(leaf, old, batch), 0.0)
            (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        return mask & (gradient == 0) & (batch.advantages.unsqueeze(-1) != 0)

    def kl(self, log_probs: Tensor, old: Tensor, batch: Experience) -> Tensor:
        """The row's estimator."""
        reference = torch.where(batch.action_mask, batch.log_probs_ref, log_probs.detach())
        ratio = bounded_exp(log_probs - old)
        return kl_divergence(log_probs, reference, self.objective.kl_estimator, ratio)

    def adapt(self, entropy: float) -> None:
        """After an update: move the bonus towards its target (Skywork-OR1, arXiv 2505.22312)."""
        target = self.objective.entropy_target
        if target is not None:
            step = ENTROPY_STEP if entropy <= target else -ENTROPY_STEP
            highest = max(1.0, self.objective.entropy_weight)
            self.entropy_weight.add_(step).clamp_(0.0, highest)
            self.last_entropy.fill_(entropy)

    @property
    def entropy_bonus(self) -> float:
        """The weight of the entropy; an adaptive one is 0 while the entropy is above its target."""
        target = self.objective.entropy_target
        acts = target is None or self.last_entropy <= target
        return float(self.entropy_weight) if acts else 0.0


def build_loss(objective: Objective) -> GRPOLoss:
    """The loss of a row: loss.py's own where it is all of it."""
    if objective.is_paper:
        return GRPOLoss(objective.clip_eps, objective.kl_weight)
    return ObjectiveLoss(objective)
