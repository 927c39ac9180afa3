"""Every equation: advantages, ratio, clip, KL, and the objectives by name. Pure tensors.

Equation numbers are those of DeepSeekMath (arXiv 2402.03300). Shapes: Q questions, G completions of each, B
sequences, C completion tokens. Where this departs from the paper:

- a group of equal rewards gets advantages of exactly 0, and the standard deviation (unbiased) is guarded by 1e-4;
- each mean of the objective is one weight per token, computed once for the whole optimizer step, so the loss of a
  micro-batch is a plain weighted sum, and the gradients of micro-batches add up to that of the full batch;
- log-ratios are clamped to ±20 before the exponential, so that no input gives an infinity.

Under the paper's mean and on-policy the loss of a step is close to 0 (plus the KL), since the advantages of a group
add up to 0. Its gradient is not.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from replay_buffer import Experience

LOG_RATIO_LIMIT = 20.0


def group_advantages(returns: Tensor, normalize_std: bool = True, eps: float = 1e-4) -> Tensor:
    """How much better each completion is than its group.

    (R − mean) / (std + eps) inside each group (paper, section 4.1.2), or R − mean (Dr. GRPO, arXiv 2503.20783).

    Args:
        returns: float (Q, G). NaN marks a completion that could not be scored: it takes no part, its advantage is 0.
        normalize_std: divide by the group's standard deviation (unbiased, as TRL's and verl's).
        eps: keeps a tiny spread from being blown up; 1e-4 as in TRL.
    Returns:
        float (Q, G), exactly 0 wherever all returns of the group are equal.
    """
    scored = ~returns.isnan()
    count = scored.sum(-1, keepdim=True)
    values = torch.where(scored, returns, 0.0)
    centred = torch.where(scored, returns - values.sum(-1, keepdim=True) / count.clamp(min=1), 0.0)
    # Rounding leaves the mean of twelve equal 0.01s a hair beside 0.01, and 1 / std makes a signal of that hair.
    highest = torch.where(scored, returns, -torch.inf).amax(-1, keepdim=True)
    lowest = torch.where(scored, returns, torch.inf).amin(-1, keepdim=True)
    centred = torch.where(highest > lowest, centred, 0.0)
    if not normalize_std:
        return centred
    std = (centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return centred / (std + eps)


def approx_kl_divergence(log_probs: Tensor, log_probs_ref: Tensor) -> Tensor:
    """The k3 estimate of KL(policy ‖ reference) at each token: exp(d) − d − 1 ≥ 0, d = ref − policy (paper, eq. 4).

    Unbiased as a value; its gradient is that of the forward KL(reference ‖ policy).
    """
    d = (log_probs_ref - log_probs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return d.exp() - d - 1


def clipped_surrogate(ratio: Tensor, advantages: Tensor, eps_low: float, eps_high: float) -> Tensor:
    """−min(r A, clip(r, 1 − eps_low, 1 + eps_high) A) at each token (paper, eq. 3, as a loss)."""
    return -torch.min(ratio * advantages, ratio.clamp(1 - eps_low, 1 + eps_high) * advantages)


# Each mean as the weight of one token of a sequence, given the lengths (N,) of all N completions of the optimizer step.
TOKEN_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "seq-mean-token-mean": lambda lengths: 1 / (len(lengths) * lengths.clamp(min=1)),  # the paper's
    "token-mean": lambda lengths: torch.ones_like(lengths) / lengths.sum().clamp(min=1),  # DAPO's, arXiv 2503.14476
}


def token_weights(lengths: list[int], mode: str) -> Tensor:
    """The weight of each token of each sequence, float32 (N,): the mean `mode`, over the whole optimizer step."""
    return TOKEN_WEIGHTS[mode](torch.tensor(lengths, dtype=torch.float32))


@dataclass(frozen=True)
class Objective:
    """One method: a choice for each column. A new method is a row of OBJECTIVES, or a row and one function."""

    surrogate: Callable[[Tensor, Tensor, float, float], Tensor]
    loss_agg_mode: str
    normalize_std: bool


OBJECTIVES: dict[str, Objective] = {
    #                          policy term        mean                   ÷ std
    "grpo": Objective(clipped_surrogate, "seq-mean-token-mean", True),
    "bnpo": Objective(clipped_surrogate, "token-mean", True),  # TRL's name for the paper's terms under a token mean
}


class GRPOLoss(nn.Module):
    """The objective of one row, on one micro-batch."""

    def __init__(self, objective: Objective, clip_eps: float, clip_eps_high: float | None, kl_weight: float) -> None:
        super().__init__()
        self.objective = objective
        self.eps_low = clip_eps
        self.eps_high = clip_eps if clip_eps_high is None else clip_eps_high
        self.kl_weight = kl_weight

    def forward(
        self, log_probs: Tensor, experience: Experience, weights: Tensor
    ) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """The micro-batch's share of the loss of the optimizer step.

        Args:
            log_probs: float (B, C), of the policy now, with gradient.
            experience: the same micro-batch. Without `action_log_probs` the policy has not changed since sampling:
                the ratio is then 1 in value and the gradient is that of REINFORCE.
            weights: float (B,), from `token_weights` over the whole optimizer step.
        Returns:
            the loss, a scalar, to be added up over micro-batches; and metrics as (sum, count) over tokens.
        """
        mask, advantages = experience.action_mask, experience.advantages[:, None]
        old = log_probs.detach() if experience.action_log_probs is None else experience.action_log_probs
        ratio = (log_probs - old).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
        per_token = self.objective.surrogate(ratio, advantages, self.eps_low, self.eps_high)
        too_high = (ratio > 1 + self.eps_high) & (advantages > 0)
        too_low = (ratio < 1 - self.eps_low) & (advantages < 0)
        watched = {"train/ratio_mean": ratio, "train/clipped_share": (too_high | too_low).float()}
        if self.kl_weight > 0:
            kl = approx_kl_divergence(log_probs, experience.log_probs_ref)
            per_token = per_token + self.kl_weight * kl
            watched["train/kl_divergence"] = kl
        # where, not multiplication: padding may hold anything, and 0 × inf is NaN.
        loss = (weights[:, None] * torch.where(mask, per_token, 0.0)).sum()
        metrics = {k: (torch.where(mask, v.detach(), 0.0).sum(), mask.sum()) for k, v in watched.items()}
        return loss, metrics
