"""`Experience`, a completion with all that the loss needs; padding; the replay buffer.

Shapes: B sequences; P prompt tokens, padded on the left; C completion tokens, padded on the right.

    sequences       <pad> <pad> prompt prompt | answer answer <end> <pad>      (B, P + C)
    attention_mask      0     0      1      1 |      1      1     1     0      (B, P + C)
    action_mask                                      1      1     1     0      (B, C)

What is said of tokens is (B, C) and stands where the token stands: the causal shift by one is made
in loss.py. Masks come from lengths, never from comparing with the pad token: pad and end may be the
same token, and the end token may stand inside the prompt.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Experience:
    """One completion (1-D tensors, no padding) in the buffer; a padded batch (2-D) out of it."""

    sequences: Tensor  # int64, (B, P + C): prompt, then completion
    attention_mask: Tensor  # bool, (B, P + C): true for real tokens
    action_mask: Tensor  # bool, (B, C): true for sampled tokens, the end token included
    returns: Tensor | None = None  # float32, (B,): the reward of the completion
    advantages: Tensor | None = None  # float32, (B,): the return compared with its group
    # Log-probabilities of the sampled tokens, float32 (B, C), as computed by ...
    action_log_probs: Tensor | None = None  # the policy before its update; None: not yet updated
    log_probs_ref: Tensor | None = None  # the frozen reference; None: no KL
    sampler_log_probs: Tensor | None = None  # the sampler, as it drew the token; None: unknown
    entropies: Tensor | None = None  # float32 (B, C), of the policy before its update
    policy_mask: Tensor | None = None  # bool, (B, C): tokens with a policy term; None: all
    token_weight: Tensor | None = None  # float32, (B,): of each of its tokens in the loss

    @classmethod
    def of(
        cls, prompt_ids: list[int], completion_ids: list[int], log_probs: list[float] | None = None
    ) -> "Experience":
        """One completion, from lists; `log_probs` are the sampler's."""
        assert prompt_ids and completion_ids, "a prompt and at least one sampled token"
        sequences = torch.tensor(prompt_ids + completion_ids, dtype=torch.long)
        return cls(
            sequences=sequences,
            attention_mask=torch.ones_like(sequences, dtype=torch.bool),
            action_mask=torch.ones(len(completion_ids), dtype=torch.bool),
            sampler_log_probs=None if log_probs is None else torch.tensor(log_probs),
        )

    @property
    def num_actions(self) -> int:
        """C: the width of the completions."""
        return self.action_mask.shape[-1]

    def to(self, device: torch.device) -> "Experience":
        """The same on `device`."""
        tensors = {name: t.to(device) for name, t in vars(self).items() if t is not None}
        return replace(self, **tensors)


def pad_batch(experiences: list[Experience]) -> Experience:
    """Pad single experiences to one batch: prompts on the left, completions on the right, with 0.

    What stands in the padding does not matter, since every mask is made from lengths.
    """
    prompts = [len(e.sequences) - e.num_actions for e in experiences]
    prompt_width, width = max(prompts), max(e.num_actions for e in experiences)

    def padded(name: str) -> Tensor | None:
        rows = [getattr(e, name) for e in experiences]
        if rows[0] is None:
            return None
        if rows[0].dim() == 0:
            return torch.stack(rows)
        with_prompt = name in ("sequences", "attention_mask")
        out = rows[0].new_zeros(len(rows), prompt_width + width if with_prompt else width)
        for line, row, prompt in zip(out, rows, prompts, strict=True):
            start = prompt_width - prompt if with_prompt else 0
            line[start : start + len(row)] = row
        return out

    return Experience(**{field.name: padded(field.name) for field in fields(Experience)})


def batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    """Cut a list into pieces of `size`; the last one may be smaller, nothing is dropped."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


class ReplayBuffer:
    """The experiences of one rollout, single and without padding, on the CPU."""

    def __init__(self) -> None:
        self.items: list[Experience] = []

    def fill(self, experiences: list[Experience], returns: Tensor, advantages: Tensor) -> None:
        """Forget everything, and keep N experiences with their returns and advantages, (N,)."""
        assert advantages.dim() == 1 and all(e.sequences.dim() == 1 for e in experiences), "(N,)"
        rows = zip(experiences, returns, advantages, strict=True)
        self.items = [replace(e, returns=r, advantages=a) for e, r, a in rows]

    def mini_batches(
        self, size: int, epochs: int, generator: torch.Generator
    ) -> Iterator[list[Experience]]:
        """All items, shuffled anew for each epoch, in lists of `size`: one for each update."""
        for _ in range(epochs):
            order = torch.randperm(len(self.items), generator=generator).tolist()
            yield from batches([self.items[i] for i in order], size)
