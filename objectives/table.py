"""The methods, one row each: where they differ from the paper's GRPO; and what is refused.

A row is an `Objective`; what it does not state is the paper's GRPO (DeepSeekMath, arXiv 2402.03300,
with the tutorial's β), which loss.py computes alone. Every column is an option of the command line
too, which replaces the row's choice. To add a method, add a row. If it needs a new equation: its
name to CHOICES, one short function to equations.py and to the dictionary of that column there; and,
if the combination with another column means nothing, a sentence to a check below. A new column is a
field of `Objective` and an option of the same name in support/config.py.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

from support.errors import UserError, check_choice

# The names that each column takes; equations.py has the equations (tests compare the two).
CHOICES: dict[str, tuple[str, ...]] = {
    "advantage": ("group", "leave-one-out", "pass-at-k", "raw"),
    "advantage_std": ("group", "batch", "none"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "ratio_level": ("token", "sequence", "sequence-token"),
    "surrogate": ("clip", "cispo", "sapo", "gmpo", "reinforce", "dppo"),
    "loss_agg_mode": (
        "seq-mean-token-mean",
        "token-mean",
        "seq-mean-token-sum",
        "seq-mean-token-sum-norm",
    ),
    "sampler_correction": (
        "none",
        "token_truncate",
        "token_mask",
        "sequence_truncate",
        "sequence_mask",
    ),
}
# verl's names stand beside the papers'; a `+` gives an estimator the gradient of k2.
SAMPLED_KL = ("k1", "abs", "k2", "k3", "kl", "mse", "low_var_kl")
CHOICES["kl_estimator"] = (*SAMPLED_KL, *(f"{name}+" for name in SAMPLED_KL), "k3-ratio", "full")


@dataclass(frozen=True)
class Objective:
    """One method: a choice for each column."""

    # Advantages: what a completion is compared with, and what the difference is divided by
    advantage: str = "group"
    advantage_std: str = "group"  # the std of the rewards of the group, of the rollout, or none
    multi_objective_aggregation: str = "sum_then_normalize"  # or compare each reward, then add up
    relative_reward_weight: float = 1.0  # weight of the above ...
    baseline_reward_weight: float = 0.0  # ... and of the reward as it is, added to it
    whiten_advantages: bool = False  # then mean 0 and std 1 over the whole rollout
    # Policy term
    ratio_level: str = "token"
    surrogate: str = "clip"
    clip_eps: float = 0.2  # ε, or its lower side
    clip_eps_high: float | None = None  # its upper side; None: the same
    clip_ratio_c: float | None = None  # dual clip: a bad completion's ratio counts up to this
    # Mean over tokens
    loss_agg_mode: str = "seq-mean-token-mean"
    loss_scale_factor: float | None = None  # of seq-mean-token-sum-norm; None: max_new_tokens
    # KL to the reference
    kl_weight: float = 0.01  # β; 0.04 in the paper, 0.01 in the tutorial
    kl_estimator: str = "k3"
    kl_in_reward: bool = False  # subtracted from the reward, instead of added to the loss
    # Entropy
    entropy_weight: float = 0.0  # bonus for entropy, per nat
    entropy_target: float | None = None  # adaptive: the bonus grows while the entropy is below it
    top_entropy: float = 1.0  # only this share of the tokens, of highest entropy, is trained
    # Which completions take part
    dynamic_sampling: int = 1  # rollouts of a step to replace groups whose rewards are all equal
    mask_truncated: bool = False  # truncated completions are compared, but not trained
    # When the sampler's log-probabilities are not the trainer's
    sampler_correction: str = "none"
    sampler_cap: float = 3.0  # the largest importance weight π_old / π_sampler

    @property
    def summary(self) -> str:
        """What differs from the row grpo, in a line; empty if nothing does."""
        other = {c: v for c, v in vars(self).items() if v != getattr(Objective, c)}
        return ", ".join(f"{c} {v}" for c, v in other.items())

    @property
    def is_paper(self) -> bool:
        """Whether loss.py is all of it: nothing differs but ε and β."""
        return self == Objective(clip_eps=self.clip_eps, kl_weight=self.kl_weight)

    @property
    def eps_high(self) -> float:
        """The upper side of the clip."""
        return self.clip_eps if self.clip_eps_high is None else self.clip_eps_high

    @property
    def couples_tokens(self) -> bool:
        """Whether the loss of a token has a gradient at the other tokens of its sequence."""
        return self.ratio_level == "sequence" or self.surrogate == "gmpo"

    @property
    def kl_in_loss(self) -> bool:
        """Whether the loss has a KL term."""
        return self.kl_weight > 0 and not self.kl_in_reward

    @property
    def subtracts_kl(self) -> bool:
        """Whether a KL is subtracted from the rewards."""
        return self.kl_weight > 0 and self.kl_in_reward

    @property
    def has_entropy_bonus(self) -> bool:
        """Whether the loss has an entropy bonus, now or later."""
        return self.entropy_weight > 0 or self.entropy_target is not None

    @property
    def needs_exact_kl(self) -> bool:
        """Whether the KL is computed over the whole vocabulary."""
        return self.kl_estimator == "full" and self.kl_in_loss

    @property
    def needs_policy_pass(self) -> bool:
        """Whether the policy is asked about a rollout before the update, even on-policy."""
        return self.subtracts_kl or self.top_entropy < 1

    @property
    def needs_reference_pass(self) -> bool:
        """Whether the reference is asked about a rollout before the update."""
        return self.subtracts_kl or (self.kl_in_loss and not self.needs_exact_kl)

    @property
    def policy_fields(self) -> list[str]:
        """The fields of Experience that the policy pass fills."""
        return ["action_log_probs", *(["entropies"] if self.top_entropy < 1 else [])]

    def describe(self, config: Any) -> str:
        """The objective of a Config in a line; and a second one if a part of it has no effect."""
        line = ": ".join(filter(None, [f"objective {config.objective}", self.summary]))
        columns = ("ratio_level", "surrogate", "clip_eps", "clip_eps_high", "clip_ratio_c")
        changes_ratio = any(getattr(self, c) != getattr(Objective, c) for c in columns)
        if config.optimizer_steps == 1 and changes_ratio:
            line += (
                "\none optimizer step per rollout: every ratio is 1, so ratio_level, surrogate and "
                "clip make no difference"
            )
        return line


OBJECTIVES: dict[str, Objective] = {
    # DeepSeekMath, arXiv 2402.03300
    "grpo": Objective(),
    # TRL's name for the paper's terms under a token mean
    "bnpo": Objective(loss_agg_mode="token-mean"),
    # 2503.20783
    "dr_grpo": Objective(
        advantage_std="none", loss_agg_mode="seq-mean-token-sum-norm", kl_weight=0.0
    ),
    # 2503.14476; its soft overlong penalty is a reward: --reward accuracy soft_overlong
    "dapo": Objective(
        clip_eps_high=0.28,
        loss_agg_mode="token-mean",
        kl_weight=0.0,
        dynamic_sampling=10,
        mask_truncated=True,
    ),
    # 2508.08221
    "lite_ppo": Objective(advantage_std="batch", loss_agg_mode="token-mean", kl_weight=0.0),
    # 2507.18071, equation 7, and equation 14
    "gspo": Objective(ratio_level="sequence", clip_eps=3e-4, clip_eps_high=4e-4, kl_weight=0.0),
    "gspo_token": Objective(
        ratio_level="sequence-token", clip_eps=3e-4, clip_eps_high=4e-4, kl_weight=0.0
    ),
    # 2602.05261
    "luspo": Objective(
        ratio_level="sequence",
        clip_eps=2e-3,
        clip_eps_high=2.5e-3,
        loss_agg_mode="seq-mean-token-sum",
        kl_weight=0.0,
    ),
    # 2507.20673
    "gmpo": Objective(surrogate="gmpo", clip_eps=0.4, clip_eps_high=0.4, kl_weight=0.0),
    # 2506.13585; no lower side, upper cap 5 (TRL's recipe)
    "cispo": Objective(
        surrogate="cispo",
        clip_eps=1.0,
        clip_eps_high=4.0,
        loss_agg_mode="token-mean",
        kl_weight=0.0,
    ),
    # 2511.20347
    "sapo": Objective(surrogate="sapo", kl_weight=0.0),
    # 2602.04879
    "dppo": Objective(surrogate="dppo", clip_eps=0.15, loss_agg_mode="token-mean", kl_weight=0.0),
    # 2402.14740
    "rloo": Objective(
        advantage="leave-one-out",
        advantage_std="none",
        surrogate="reinforce",
        loss_agg_mode="seq-mean-token-sum",
        kl_weight=0.05,
        kl_estimator="k1",
        kl_in_reward=True,
    ),
    # Williams, 1992: the reward as it is
    "reinforce": Objective(
        advantage="raw",
        advantage_std="none",
        surrogate="reinforce",
        loss_agg_mode="seq-mean-token-sum",
        kl_weight=0.0,
    ),
    # 2501.03262
    "reinforce_plus_plus_baseline": Objective(
        advantage_std="none", whiten_advantages=True, loss_agg_mode="token-mean", kl_estimator="k2"
    ),
    # 2601.05242
    "gdpo": Objective(multi_objective_aggregation="normalize_then_sum", whiten_advantages=True),
    # 2503.19595
    "pass_at_k": Objective(advantage="pass-at-k", advantage_std="none", kl_weight=0.0),
}

# What --help lists: the names that an option takes.
NAMES = {"objective": tuple(OBJECTIVES), **CHOICES}


def objective_of(config: Any) -> Objective:
    """The objective of a Config: its row, and the columns that it states.

    A server that samples rounds in its own way: that is corrected unless the config says otherwise.
    """
    columns = {field.name: getattr(config, field.name) for field in fields(Objective)}
    if config.rollout_url and config.sampler_correction is None:
        row = find_objective(config.objective, **columns | {"sampler_cap": None})
        level = "sequence" if row.couples_tokens else "token"
        columns["sampler_correction"] = f"{level}_truncate"
    return find_objective(config.objective, **columns)


def find_objective(name: str, **given: object) -> Objective:
    """The row `name`, with the columns that are given (not None) in place of its own.

    Raises:
        UserError: for an unknown name, and for a combination that means nothing.
    """
    given = {column: value for column, value in given.items() if value is not None}
    objective = replace(OBJECTIVES[check_choice(name, OBJECTIVES, "objective")], **given)
    for column, names in CHOICES.items():
        check_choice(getattr(objective, column), names, column)
    wrong = check_objective(objective, set(given))
    if wrong:
        raise UserError(wrong)
    return objective


def check_objective(objective: Objective, given: set[str]) -> str | None:
    """The sentence for a combination that means nothing, or None.

    Args:
        given: the columns that replace the row's own choice.
    """
    checks = (check_policy_term, check_advantages, check_kl, check_tokens)
    return next(filter(None, (check(objective, given) for check in checks)), None)


def check_policy_term(o: Objective, given: set[str]) -> str | None:
    """Ratio, surrogate, clip and mean."""
    uses_clip_eps = o.surrogate in ("clip", "cispo", "gmpo", "dppo")
    if {"clip_eps", "clip_eps_high"} & given and not uses_clip_eps:
        return f"--surrogate {o.surrogate} does not clip; leave out --clip_eps and --clip_eps_high."
    if o.clip_ratio_c is not None and o.surrogate != "clip":
        return f"--clip_ratio_c belongs to --surrogate clip, not to {o.surrogate}; leave it out."
    if o.clip_ratio_c is not None and o.clip_ratio_c <= 1 + o.eps_high:
        return (
            f"--clip_ratio_c is {o.clip_ratio_c:g}; it must be more than 1 + clip_eps_high = "
            f"{1 + o.eps_high:g}."
        )
    if o.ratio_level != "token" and o.surrogate in ("reinforce", "gmpo", "dppo"):
        return f"--surrogate {o.surrogate} has no use for --ratio_level {o.ratio_level}; use token."
    if "loss_scale_factor" in given and o.loss_agg_mode != "seq-mean-token-sum-norm":
        return (
            "--loss_scale_factor belongs to --loss_agg_mode seq-mean-token-sum-norm, not to "
            f"{o.loss_agg_mode}."
        )
    return None


def check_advantages(o: Objective, given: set[str]) -> str | None:
    """What a reward is compared with."""
    if o.advantage == "raw" and o.advantage_std != "none":
        return (
            "--advantage raw is not compared with anything, so it has no std to divide by; give "
            "--advantage_std none."
        )
    if o.advantage == "raw" and o.dynamic_sampling > 1:
        return (
            "--dynamic_sampling drops groups of equal rewards, from which --advantage raw does "
            "learn; leave one out."
        )
    if o.relative_reward_weight == 0 and o.baseline_reward_weight == 0:
        return (
            "--relative_reward_weight and --baseline_reward_weight are both 0, so nothing would be "
            "learned; raise one."
        )
    return None


def check_kl(o: Objective, given: set[str]) -> str | None:
    """The KL to the reference."""
    asks_for_kl = "kl_estimator" in given or ("kl_in_reward" in given and o.kl_in_reward)
    if o.kl_weight == 0 and asks_for_kl:
        return (
            "--kl_estimator and --kl_in_reward mean nothing without a KL; give --kl_weight too, or "
            "leave them out."
        )
    if o.kl_in_reward and o.kl_estimator not in SAMPLED_KL:
        return (
            f"A reward has no gradient, so --kl_estimator {o.kl_estimator} means nothing in it; "
            "use k1, k2, k3 or abs."
        )
    if o.kl_in_reward and o.multi_objective_aggregation == "normalize_then_sum":
        return (
            "--kl_in_reward is added to the sum of the rewards, which normalize_then_sum does not "
            "use; choose one."
        )
    return None


def check_tokens(o: Objective, given: set[str]) -> str | None:
    """Which tokens are trained, and with what importance weight."""
    if o.couples_tokens and o.top_entropy < 1:
        return (
            "--top_entropy chooses tokens, and here a token's loss reaches its whole sequence; use "
            "ratio_level token or sequence-token, and another surrogate than gmpo."
        )
    if o.couples_tokens and o.sampler_correction.startswith("token"):
        return (
            "--sampler_correction must be of the sequence, as the ratio is: sequence_truncate or "
            "sequence_mask."
        )
    if "sampler_cap" in given and o.sampler_correction == "none":
        return "--sampler_cap belongs to --sampler_correction; give that too."
    return None
