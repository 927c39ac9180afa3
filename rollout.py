"""A group of completions for each question, through transformers' `generate` or a server.

The tokens are drawn from the distribution that loss.py computes, softmax(logits / temperature),
with no other filter unless --top_p asks for one: not by the model's own generation settings
(Qwen's: top_k 20 and a repetition penalty). The log-probability of each draw is kept.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from replay_buffer import Experience
from support import generation
from support.data import Question
from support.distributed import share_out
from support.generation import Sampling, Seed, with_seeds


@dataclass(frozen=True)
class Completion:
    """What the model answered to one prompt."""

    ids: list[int]  # at least one token; the last one is an end token, unless truncated
    text: str  # decoded, without end and padding tokens
    truncated: bool  # max_new_tokens were used up before an end token came
    log_probs: list[float] | None = None  # of each token, by the sampler; None: greedy


@dataclass(frozen=True)
class Group:
    """A question and its completions; and their rewards, once reward.py has given them."""

    question: Question
    completions: list[Completion]
    rewards: Tensor | None = None  # float32 (K, group_size): of each of K reward functions
    returns: Tensor | None = None  # float32 (group_size,): their weighted sum; NaN: not scored

    @property
    def experiences(self) -> list[Experience]:
        """The completions as the replay buffer keeps them."""
        prompt_ids = self.question.prompt_ids
        return [Experience.of(prompt_ids, c.ids, c.log_probs) for c in self.completions]


def rollout(
    model: nn.Module,
    tokenizer: Any,
    questions: list[Question],
    group_size: int,
    sampling: Sampling,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[Group]:
    """Sample `group_size` completions for each question: a group for each, in order.

    Args:
        model: a causal language model in eval mode. Randomness is torch's global generator.
        questions: with their prompt_ids.
        progress: wraps the loop over batches (a progress bar).
    """
    prompts = with_seeds([q.prompt_ids for q in questions for _ in range(group_size)])
    ask = partial(complete, model, tokenizer, sampling=sampling, progress=progress)
    completions = iter(share_out(prompts, ask, together=group_size))
    return [Group(q, [next(completions) for _ in range(group_size)]) for q in questions]


@torch.no_grad()
def complete(
    model: nn.Module,
    tokenizer: Any,
    prompts: list[tuple[list[int], Seed]],
    sampling: Sampling,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[Completion]:
    """One completion for each prompt (token ids, with the seed of its random numbers), in order."""
    ends = generation.end_tokens(model, tokenizer)
    settings = generation.generation_config(sampling, ends, tokenizer)
    completions = []
    for start in progress(range(0, len(prompts), sampling.batch_size)):
        batch = prompts[start : start + sampling.batch_size]
        for ids, log_probs in generation.generate(model, batch, sampling, settings):
            completions.append(trim_at_eos(ids, log_probs, ends, tokenizer))
    return completions


def trim_at_eos(
    ids: list[int], log_probs: list[float], ends: list[int], tokenizer: Any
) -> Completion:
    """The tokens up to and including the first end token; after it there is only padding."""
    length = next((i + 1 for i, token in enumerate(ids) if token in ends), None)
    # Tags may be special tokens, so only end and padding tokens are left out of the text.
    shown = [token for token in ids[:length] if token not in (*ends, tokenizer.pad_token_id)]
    text = tokenizer.decode(shown, skip_special_tokens=False)
    return Completion(ids[:length], text, length is None, log_probs[:length] or None)
