"""From logits to the loss: log-probabilities, advantages, ratio, clip, KL, mean. The paper's GRPO.

The paper is DeepSeekMath, arXiv 2402.03300. What other methods change is in objectives/.
Shapes: Q questions with G completions each; B sequences; P prompt and C completion tokens; V tokens
in the vocabulary. π is the policy, π_old the policy that sampled, π_ref the frozen reference; ε is
`clip_eps`, β is `kl_weight`.

    advantage of a completion   A = (R - mean(R)) / (std(R) + 1e-4)   in its group, section 4.1.2
    ratio of a token            r = π / π_old
    policy term                 -min(r A, clip(r, 1 - ε, 1 + ε) A)    equation 3, to be minimized
    KL estimate                 k3 = π_ref / π - log(π_ref / π) - 1   equation 4
    loss                        mean over sequences of (mean over tokens of (policy term + β k3))

While the policy is still the one that sampled, r is 1 and the policy term of a token is -A. The
advantages of a group add up to 0, so the mean over whole groups is 0; the gradient, -A ∇ log π, is
not. π_old is computed by this file before the first update (`action_log_probs`); what the sampler
computed (`sampler_log_probs`) is only compared with it.

Departures from the paper: a group of equal rewards has advantages of exactly 0; log r is clamped to
±20 and k3 to 10 (verl's limits), so that no input gives an infinity; and the mean is one weight for
each token, computed for the whole optimizer step, so that micro-batches add up to the full batch.
"""

import torch
from torch import Tensor, nn

from replay_buffer import Experience
from support.model import logits_at
from support.pieces import in_pieces
from support.statistics import unbiased_std

STD_EPS = 1e-4  # TRL's. With 1e-8, rounding noise in a group of equal rewards becomes a signal.
LOG_RATIO_LIMIT = 20.0
KL_LIMIT = 10.0
LOWEST = -1e30  # for a token that the model can never say: with -inf its entropy would be 0 × inf


def completion_logits(
    model: nn.Module, sequences: Tensor, attention_mask: Tensor, num_actions: int
) -> Tensor:
    """The logits (B, C, V) that predict the last C = `num_actions` tokens of each sequence.

    The causal shift is made here and nowhere else: the logits at position t predict the token at
    t + 1, so the completion in columns P ... P+C-1 is predicted by the logits at P-1 ... P+C-2.
    """
    width = sequences.shape[1]
    positions = torch.arange(width - num_actions - 1, width - 1, device=sequences.device)
    return logits_at(model, sequences, attention_mask, positions)


def token_log_probs(logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of each token, and the entropy of its distribution, which is only logged.

    Args:
        logits: float (N, V); tokens: int64 (N,); temperature: what the sampler divides logits by.
    Returns:
        two times float32 (N,), in nats; the entropy has no gradient (in objectives/ it has).
    """
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    log_probs = torch.log_softmax(logits, dim=-1)
    with torch.no_grad():
        finite = log_probs.clamp(min=LOWEST)
        entropies = -(finite.exp() * finite).sum(dim=-1)
    return log_probs.gather(dim=-1, index=tokens.unsqueeze(-1)).squeeze(-1), entropies


def sequences_log_probs(
    model: nn.Module,
    sequences: Tensor,
    attention_mask: Tensor,
    num_actions: int,
    temperature: float = 1.0,
) -> tuple[Tensor, ...]:
    """Log-probabilities and entropies of the last C = `num_actions` tokens of each sequence.

    Args:
        sequences: int64 (B, P + C); attention_mask: bool (B, P + C).
    Returns:
        two times float32 (B, C); where there is no token stands anything.
    """
    logits = completion_logits(model, sequences, attention_mask, num_actions).flatten(0, 1)
    tokens = sequences[:, -num_actions:].flatten()
    # The same as token_log_probs(logits, tokens, temperature), but it needs less memory.
    found = in_pieces(lambda *rows: token_log_probs(*rows, temperature), logits, tokens)
    return tuple(values.view(-1, num_actions) for values in found)


def group_advantages(returns: Tensor) -> Tensor:
    """How much better each completion is than its group: (R - mean) / (std + 1e-4).

    Args:
        returns: float (Q, G), one row for each group, or (G,). NaN marks a completion that no
            reward could score: it takes no part, and its advantage is 0.
    Raises:
        ValueError: for groups of one completion, as in a column (G, 1).
    """
    if returns.dim() == 0 or returns.shape[-1] < 2:
        raise ValueError(
            f"returns of shape {tuple(returns.shape)} hold groups of one completion, which cannot "
            "be compared; give (questions, group_size), one row for each question."
        )
    exact = returns.double()  # the squares of rewards of 1e20 are too large for float32
    return (center(exact) / (unbiased_std(exact) + STD_EPS)).nan_to_num().to(returns.dtype)


def rewards_differ(returns: Tensor) -> Tensor:
    """Whether the returns (..., G) of a group differ, bool (...); NaN does not count."""
    highest = torch.where(returns.isnan(), -torch.inf, returns).amax(dim=-1)
    return highest > torch.where(returns.isnan(), torch.inf, returns).amin(dim=-1)


def center(returns: Tensor) -> Tensor:
    """R - mean(R) inside each group (..., G); NaN stays NaN.

    Exactly 0 where all are equal: the mean of twelve rewards of 0.01 is not quite 0.01.
    """
    centered = returns - returns.nanmean(dim=-1, keepdim=True)
    return torch.where(rewards_differ(returns).unsqueeze(-1), centered, returns * 0)


def bounded_exp(x: Tensor) -> Tensor:
    """exp(x) with x clamped to ±20: finite for every input, and without a gradient beyond."""
    return x.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def approx_kl_divergence(log_probs: Tensor, log_probs_ref: Tensor) -> Tensor:
    """The k3 estimate of KL(policy ‖ reference) at each token, of the sampled token alone; >= 0."""
    difference = (log_probs - log_probs_ref).clamp(min=-LOG_RATIO_LIMIT)
    return ((-difference).exp() + difference - 1).clamp(max=KL_LIMIT)


class GRPOLoss(nn.Module):
    """The clipped objective with a KL penalty. Some arguments are there for objectives/ alone."""

    entropy_bonus = 0.0  # weight of the entropy, which the paper does not use

    def __init__(self, clip_eps: float = 0.2, kl_weight: float = 0.01) -> None:
        super().__init__()
        self.clip_eps = clip_eps
        self.kl_weight = kl_weight

    @property
    def trains_zero_advantage(self) -> bool:
        """Whether a completion with an advantage of 0 has a gradient all the same."""
        return self.kl_weight > 0

    def advantages(self, returns: Tensor, rewards: Tensor, reward_weights: list[float]) -> Tensor:
        """Advantages (Q, G) of returns (Q, G), the weighted sums of K rewards (K, Q, G)."""
        return group_advantages(returns)

    def token_weights(self, lengths: list[int], max_new_tokens: int) -> Tensor:
        """Mean over the tokens of a sequence, then over all N: the weight of a token of each, (N,).

        Args:
            lengths: of all completions of the optimizer step; an empty one does not count.
        """
        counts = torch.tensor(lengths, dtype=torch.float32)
        return 1 / ((counts > 0).sum().clamp(min=1) * counts.clamp(min=1))

    def policy_term(self, log_probs: Tensor, old: Tensor, batch: Experience) -> Tensor:
        """Equation 3 at each token, to be minimized: (B, C)."""
        advantages = batch.advantages.unsqueeze(-1)
        ratio = bounded_exp(log_probs - old)
        clipped = ratio.clamp(1 - self.clip_eps, 1 + self.clip_eps)
        return -torch.min(ratio * advantages, clipped * advantages)

    def clipped_tokens(self, log_probs: Tensor, old: Tensor, batch: Experience) -> Tensor:
        """The tokens that the clip leaves without a gradient, bool (B, C)."""
        advantages, log_ratio = batch.advantages.unsqueeze(-1), log_probs - old
        ratio = bounded_exp(log_ratio)
        too_high = (advantages > 0) & (ratio > 1 + self.clip_eps)
        too_low = (advantages < 0) & (ratio < 1 - self.clip_eps)
        return too_high | too_low | ((advantages != 0) & (log_ratio.abs() > LOG_RATIO_LIMIT))

    def kl(self, log_probs: Tensor, old: Tensor, batch: Experience) -> Tensor:
        """The KL to the reference at each token, (B, C)."""
        reference = torch.where(batch.action_mask, batch.log_probs_ref, log_probs.detach())
        return approx_kl_divergence(log_probs, reference)

    def forward(
        self,
        log_probs: Tensor,
        batch: Experience,
        weights: Tensor,
        entropies: Tensor | None = None,
        exact_kl: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """The micro-batch's share of the loss of the optimizer step.

        Args:
            log_probs: float (B, C), of the policy now, with gradient.
            batch: the same micro-batch; no action_log_probs: the policy has not changed since.
            weights: float (B,), from `token_weights` over the whole optimizer step.
            entropies, exact_kl: float (B, C), for the objectives that use them.
        Returns:
            the loss, a scalar to be added up over micro-batches; and metrics as (sum, count).
        """
        assert weights.dim() == batch.advantages.dim() == 1, "a number for each sequence: (B,)"
        mask, now = batch.action_mask, log_probs.detach()
        # Padding may hold anything: `where`, not a product with the mask, since 0 × inf is NaN.
        old = now if batch.action_log_probs is None else batch.action_log_probs
        old = torch.where(mask, old, now)
        losses = self.policy_term(log_probs, old, batch)
        logged = {
            "train/ratio_mean": bounded_exp(now - old),
            "train/clipped_share": self.clipped_tokens(now, old, batch),
        }
        if batch.sampler_log_probs is not None:
            logged["train/sampler_gap"] = (old - batch.sampler_log_probs).abs()
        if self.kl_weight:
            kl = self.kl(log_probs, old, batch) if exact_kl is None else exact_kl
            losses = losses + self.kl_weight * kl
            logged["train/kl_divergence"] = kl.detach()
        if self.entropy_bonus:
            losses = losses - self.entropy_bonus * entropies
        loss = (weights.unsqueeze(-1) * torch.where(mask, losses, 0.0)).sum()
        sums = {name: torch.where(mask, values, 0.0).sum() for name, values in logged.items()}
        return loss, {name: (total, mask.sum()) for name, total in sums.items()}
