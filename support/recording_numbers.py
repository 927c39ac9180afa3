"""What an update did to the tokens of one completion: the numbers that a recording keeps."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from support.recording_file import rounded


def cut_row(i: int, count: int, values: Tensor) -> Tensor:
    """Row i of (B,) or (B, C), without padding: (1,) or (1, count); of no graph, and no view.

    What is as long as a whole sequence is cut to nonsense, and not used.
    """
    row = values.detach()[i : i + 1]
    return (row if row.dim() == 1 else row[:, :count]).clone()


def keep_gradient(noted: dict[str, Any], cut: Callable[[Tensor], Tensor], gradient: Tensor) -> None:
    """In the backward pass: the gradient of the loss at log π, (B, C)."""
    noted["gradient"] = cut(gradient)


def numbers_of(
    loss: Any,
    row: Any,
    log_probs: Tensor,
    entropies: Tensor,
    exact_kl: list[Tensor],
    gradient: Tensor | None = None,
) -> dict[str, Any]:
    """What an update found at the tokens of one completion, as lists of numbers.

    Args:
        row: its Experience, a batch of one; the tensors are (1, C).
    """
    row = row.to(torch.device("cpu"))
    leaf = log_probs.cpu().requires_grad_()
    old = leaf.detach() if row.action_log_probs is None else row.action_log_probs
    with torch.enable_grad():
        (of_policy,) = torch.autograd.grad(loss.policy_term(leaf, old, row).sum(), leaf)
    now = leaf.detach()
    found = {
        "log_probs": now,
        "old": row.action_log_probs,
        "reference": row.log_probs_ref,
        "sampler": row.sampler_log_probs,
        "entropies": entropies.cpu(),
        "policy_gradient": of_policy,
        "gradient": None if gradient is None else gradient.cpu(),
    }
    if loss.kl_weight:
        found["kl"] = exact_kl[0].cpu() if exact_kl else loss.kl(now, old, row)
    lists = {name: rounded(t[0].tolist()) for name, t in found.items() if t is not None}
    clipped = loss.clipped_tokens(now, old, row)[0].nonzero().flatten().tolist()
    masked = [] if row.policy_mask is None else (~row.policy_mask[0]).nonzero().flatten().tolist()
    weight = rounded(row.token_weight.tolist())[0]
    return {"weight": weight, "clipped": clipped, "masked": masked, **lists}
