"""`Experience`: a sampled completion and what the loss needs of it; the replay buffer, mini-batches, padding.

Shapes: B sequences; P prompt tokens, padded on the left; C completion tokens, padded on the right.

    sequences       <pad> <pad> prompt prompt | answer answer <end> <pad>      (B, P + C)
    attention_mask      0     0      1      1 |      1      1     1     0      (B, P + C)
    action_mask                                      1      1     1     0      (B, C)

All per-token quantities are (B, C) and aligned with the completion tokens themselves: the causal shift by one is
made in one place, log_probs.py. Masks come from lengths, never from comparing with the pad id:
pad and end may be the same token, and the end token may stand inside the prompt.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Experience:
    """One completion (1-D tensors, no padding) in the buffer; a padded batch (2-D) when it comes out."""

    sequences: Tensor  # int64, (B, P + C): prompt, then completion
    attention_mask: Tensor  # bool, (B, P + C): true for real tokens
    action_mask: Tensor  # bool, (B, C): true for sampled tokens, the end token included
    returns: Tensor  # float32, (B,): the reward of the completion
    advantages: Tensor  # float32, (B,): the return compared with its group
    action_log_probs: Tensor | None = None  # float32, (B, C): of the policy that sampled; None: it is the current one
    log_probs_ref: Tensor | None = None  # float32, (B, C): of the frozen reference; None: no KL
    sampler_log_probs: Tensor | None = None  # float32, (B, C): what the sampler drew each token with; None: unknown
    policy_mask: Tensor | None = None  # bool, (B, C): the tokens that have a policy term; None: all

    @classmethod
    def of(
        cls,
        prompt_ids: list[int],
        completion_ids: list[int],
        returns: float,
        advantage: float,
        sampler_log_probs: list[float] | None = None,
    ) -> "Experience":
        """One completion, from lists."""
        sequences = torch.tensor(prompt_ids + completion_ids, dtype=torch.long)
        return cls(
            sequences=sequences,
            attention_mask=torch.ones_like(sequences, dtype=torch.bool),
            action_mask=torch.ones(len(completion_ids), dtype=torch.bool),
            returns=torch.tensor(returns, dtype=torch.float32),
            advantages=torch.tensor(advantage, dtype=torch.float32),
            sampler_log_probs=None if sampler_log_probs is None else torch.tensor(sampler_log_probs),
        )

    @property
    def num_actions(self) -> int:
        """C: width of the completions."""
        return self.action_mask.shape[-1]

    def to(self, device: torch.device) -> "Experience":
        """The same on `device`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: t.to(device) for name, t in moved.items() if t is not None})


def pad_batch(experiences: list[Experience]) -> Experience:
    """Pad single experiences to one batch: prompts on the left, completions on the right, all with zeros.

    What stands in the padding does not matter, since every mask is made from lengths.
    """
    prompts = [len(e.sequences) - e.num_actions for e in experiences]
    width_p, width_c = max(prompts), max(e.num_actions for e in experiences)

    def padded(name: str) -> Tensor | None:
        rows = [getattr(e, name) for e in experiences]
        if rows[0] is None:
            return None
        if rows[0].dim() == 0:
            return torch.stack(rows)
        whole = name in ("sequences", "attention_mask")
        out = rows[0].new_zeros(len(rows), width_p + width_c if whole else width_c)
        for line, row, prompt in zip(out, rows, prompts, strict=True):
            start = width_p - prompt if whole else 0
            line[start : start + len(row)] = row
        return out

    return Experience(**{f.name: padded(f.name) for f in fields(Experience)})


def neighbours(experiences: list[Experience]) -> list[int]:
    """An order in which completions of one prompt stand together, and the tokens of a prompt grow slowly.

    So that micro-batches cut from it compute few prompts twice and hold little padding.
    """
    prompts = [tuple(e.sequences[: -e.num_actions].tolist()) for e in experiences]
    tokens = Counter({prompt: len(prompt) for prompt in prompts})
    for prompt, e in zip(prompts, experiences, strict=True):
        tokens[prompt] += e.num_actions
    return sorted(range(len(experiences)), key=lambda i: (tokens[prompts[i]], prompts[i], experiences[i].num_actions))


def batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    """Cut a list into pieces of `size`; the last one may be smaller, nothing is dropped."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


class ReplayBuffer:
    """The experiences of one rollout, single and without padding, on the CPU."""

    def __init__(self) -> None:
        self.items: list[Experience] = []

    def append(self, experience: Experience) -> None:
        """Add one completion."""
        assert experience.sequences.dim() == 1, "the buffer keeps single completions; pad_batch makes the batches"
        assert len(experience.sequences) > experience.num_actions > 0, "a prompt and at least one sampled token"
        self.items.append(experience)

    def clear(self) -> None:
        """Forget everything."""
        self.items.clear()

    def mini_batches(self, size: int, generator: torch.Generator) -> Iterator[list[Experience]]:
        """All items once, shuffled by `generator`, in lists of `size`: one list for each optimizer step."""
        order = torch.randperm(len(self.items), generator=generator).tolist()
        return batches([self.items[i] for i in order], size)
