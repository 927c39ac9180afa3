"""Sample a group of completions for each question.

Many prompts go through one `generate` call of transformers, padded on the left. What is sampled from is exactly the
distribution that `sequences_log_probs` describes: softmax(logits / temperature), with no other filter, whatever the
model's own generation settings say (Qwen's, for one, ask for top_k 20 and a repetition penalty). What it was sampled
with is noted token by token, so that the gap between sampler and trainer can be seen, and corrected.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from data import Question


@dataclass(frozen=True)
class Completion:
    """What the model said to one prompt."""

    ids: list[int]  # at least one token; the end token is the last one, unless truncated
    text: str  # decoded, special tokens left out
    truncated: bool  # the budget ran out before an end token came
    log_probs: list[float] | None = None  # of each token, by the sampler's own distribution; None: greedy


@dataclass(frozen=True)
class Sampling:
    """How to sample."""

    max_new_tokens: int
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    batch_size: int = 64  # sequences per generate call


def rollout(
    model: nn.Module,
    tokenizer: Any,
    questions: list[Question],
    group_size: int,
    sampling: Sampling,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[list[Completion]]:
    """`group_size` completions for each question.

    Args:
        model: a causal language model in eval mode; randomness is torch's global generator on its device.
        questions: with their prompt_ids.
        progress: wraps the loop over generate calls (a progress bar).
    Returns:
        one group, a list of `group_size` completions, for each question, in order.
    """
    prompts = [q.prompt_ids for q in questions for _ in range(group_size)]
    flat = complete(model, tokenizer, prompts, sampling, progress)
    return [flat[i : i + group_size] for i in range(0, len(flat), group_size)]


@torch.no_grad()
def complete(
    model: nn.Module,
    tokenizer: Any,
    prompts: list[list[int]],
    sampling: Sampling,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[Completion]:
    """One completion for each prompt (token ids), in order."""
    ends = end_tokens(model, tokenizer)
    settings = generation_config(sampling, ends, tokenizer)
    # generate() fills what a config leaves open from the model's own; for the time of the call, that is this one too.
    own, model.generation_config = model.generation_config, settings
    done = []
    try:
        for start in progress(range(0, len(prompts), sampling.batch_size)):
            chunk = prompts[start : start + sampling.batch_size]
            input_ids, attention_mask = pad_left(chunk, settings.pad_token_id, model.device)
            processors, noted = sampler(sampling)
            output = model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                generation_config=settings,
                logits_processor=processors,
            )
            rows = output[:, input_ids.shape[1] :].tolist()
            log_probs = noted.log_probs(output).tolist() if noted else [None] * len(rows)
            done += [cut(row, ends, tokenizer, lp) for row, lp in zip(rows, log_probs, strict=True)]
    finally:
        model.generation_config = own
    return done


def end_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """Every token that ends a completion: the model's own list and the tokenizer's."""
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    return sorted({*ends, tokenizer.eos_token_id})


def generation_config(sampling: Sampling, ends: list[int], tokenizer: Any) -> GenerationConfig:
    """Every field that shapes the distribution, stated; temperature and top_p are applied by `sampler`."""
    greedy = sampling.temperature == 0
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=not greedy,
        temperature=1.0,
        top_p=1.0,
        top_k=0 if not greedy else 50,  # 0: off; greedy ignores it, and warns of any value but its default
        typical_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        num_beams=1,
        use_cache=True,
        eos_token_id=ends,
        pad_token_id=pad,
    )


def pad_left(prompts: list[list[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, int64 (B, P); the mask is made from lengths."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


class Noted(LogitsProcessor):
    """Notes the log-probability that each sampled token was drawn with.

    It stands last in generate's list, so that what it sees is what is sampled from; which token was drawn shows in the
    next call's input_ids. One step's scores (B, V) are alive at a time.
    """

    def __init__(self) -> None:
        self.scores: torch.Tensor | None = None
        self.columns: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Settle the step before, keep this one's scores (B, V)."""
        self.settle(input_ids[:, -1])
        self.scores = scores
        return scores

    def settle(self, tokens: torch.Tensor) -> None:
        """Log-probability of `tokens` (B,) under the scores that they were drawn from."""
        if self.scores is not None:
            drawn = self.scores.gather(-1, tokens[:, None]).squeeze(-1)
            self.columns.append(drawn - self.scores.logsumexp(-1))

    def log_probs(self, output: torch.Tensor) -> torch.Tensor:
        """All of them, (B, new tokens), once generate has returned `output`; padding holds anything."""
        self.settle(output[:, -1])
        return torch.stack(self.columns, -1)


def sampler(sampling: Sampling) -> tuple[LogitsProcessorList, Noted | None]:
    """Temperature and nucleus, in transformers' order, and who notes what comes of them; greedy draws nothing."""
    processors, noted = LogitsProcessorList(), Noted()
    if sampling.temperature == 0:
        return processors, None
    if sampling.temperature != 1:
        processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    processors.append(noted)
    return processors, noted


def cut(row: list[int], ends: list[int], tokenizer: Any, log_probs: list[float] | None = None) -> Completion:
    """One row of generate's output up to and including its first end token; what follows that is padding."""
    length = next((i + 1 for i, token in enumerate(row) if token in ends), None)
    ids = row[:length]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return Completion(ids, text, truncated=length is None, log_probs=log_probs and log_probs[:length])
