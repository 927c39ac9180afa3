"""Sample a group of completions for each question.

Many prompts go through one `generate` of transformers, padded on the left. What is sampled from is exactly the
distribution that `sequences_log_probs` describes: softmax(logits / temperature), with no other filter, whatever the
model's own generation settings say (Qwen's, for one, ask for top_k 20 and a repetition penalty). What each token was
drawn with is noted, so that the gap between sampler and trainer can be seen, and corrected.

Three things make it fast. A prompt is read once and its cache repeated over the group. Completions that have ended make
room: whenever half of a batch has, `generate` is called again for the others. And a token costs one random number,
where generate's own multinomial makes one for each token of the vocabulary.
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from data import Question
from errors import UserError
from log_probs import padded_inputs

BLOCK = 256  # tokens of the vocabulary that are first drawn from together


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
            for row, log_probs in decode(model, chunk, sampling, settings):
                done.append(cut(row, ends, tokenizer, log_probs))
    finally:
        model.generation_config = own
    return done


def decode(
    model: nn.Module, prompts: list[list[int]], sampling: Sampling, settings: GenerationConfig
) -> list[tuple[list[int], list[float]]]:
    """The new tokens of one batch, and the log-probability of each (none if greedy); after an end token, anything.

    Each turn of the loop is a call of generate that goes on where the one before stopped, with the rows that go on.
    """
    input_ids, attention_mask = pad_left(prompts, settings.pad_token_id, model.device)
    cache = read_prompts(model, input_ids, attention_mask)
    ends = torch.tensor(settings.eos_token_id, device=model.device)
    tokens, log_probs = [[] for _ in prompts], [[] for _ in prompts]
    rows, left = list(range(len(prompts))), sampling.max_new_tokens
    while rows and left:
        processors, drawn = sampler(sampling)
        ended = HalfEnded(ends, input_ids.shape[1])
        settings.max_new_tokens = left
        output = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            generation_config=settings,
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([] if cache is None else [ended]),
        )
        new = output.sequences[:, input_ids.shape[1] :]
        left -= new.shape[1]
        noted = drawn.log_probs() if drawn else torch.empty(len(rows), 0)
        if noted.isnan().any():
            raise UserError(
                "The model's logits are not finite, so nothing can be sampled: its weights have overflowed (lower "
                "--lr, and go on from an earlier checkpoint) or are broken from the start."
            )
        for i, ids, values in zip(rows, new.tolist(), noted.tolist(), strict=True):
            tokens[i] += ids
            log_probs[i] += values
        going = (~ended.rows(output.sequences)).nonzero().squeeze(-1)
        rows = [rows[i] for i in going.tolist()]
        if rows and left:
            cache = output.past_key_values
            cache.batch_select_indices(going)
            input_ids = output.sequences[going]
            attention_mask = torch.cat([attention_mask, torch.ones_like(new)], -1)[going]
    return list(zip(tokens, log_probs, strict=True))


def read_prompts(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Cache | None:
    """Keys and values of all prompt tokens but the last, each different prompt computed once; (B, …) as the prompts.

    The last one is left for generate, which wants something to read. None for models whose state is more than keys and
    values (Mamba, LFM2), which could not be repeated and picked from by row: those read all, and no row leaves early.
    """
    if model._is_stateful or not model._supports_default_dynamic_cache():  # private, and what generate itself asks
        return None
    if "past_key_values" not in inspect.signature(model.forward).parameters:  # no cache at all (OpenAI's first GPT)
        return None
    cache = DynamicCache(config=model.config)
    if not {type(layer) for layer in cache.layers} <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return None
    width = input_ids.shape[1]
    if width > 1:
        different, place = torch.unique(torch.cat([input_ids, attention_mask], -1), dim=0, return_inverse=True)
        inputs = padded_inputs(model, different[:, : width - 1], different[:, width:-1])
        model.base_model(**inputs, past_key_values=cache, use_cache=True)
        cache.batch_select_indices(place)
    return cache


def end_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """Every token that ends a completion: the model's own list and the tokenizer's."""
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    return sorted({*ends, tokenizer.eos_token_id})


def generation_config(sampling: Sampling, ends: list[int], tokenizer: Any) -> GenerationConfig:
    """Every field that shapes the distribution, stated. Greedy also when sampling: `Draw` leaves it one choice."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        num_beams=1,
        use_cache=True,
        eos_token_id=ends,
        pad_token_id=pad,
        return_dict_in_generate=True,
    )


def pad_left(prompts: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 (B, P); the mask is made from lengths."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


class Draw(LogitsProcessor):
    """Draws the next token of each row, hides all others from generate, and notes the log-probability of the draw.

    It stands last in generate's list, which then takes the best, and only, token left. The draw inverts the cumulated
    distribution: one random number, first among blocks of the vocabulary, then inside one; in double, so that the tail
    of a large vocabulary keeps its share.
    """

    def __init__(self) -> None:
        self.columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) in, a distribution on one token out, in the same memory: generate made it for this step."""
        probs = scores.softmax(-1)
        blocks = nn.functional.pad(probs, (0, -probs.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
        sums = blocks.sum(-1).double()
        number = torch.rand(len(scores), 1, dtype=torch.float64, device=scores.device)
        block, rest = passed(sums, number * sums.sum(-1, keepdim=True))
        place, _ = passed(blocks.take_along_dim(block[..., None], 1)[:, 0].double(), rest)
        token = (block * BLOCK + place).clamp(max=probs.shape[-1] - 1)  # of a row of NaNs, which `decode` reports
        self.columns.append(probs.gather(-1, token).log())
        return scores.fill_(-torch.inf).scatter_(-1, token, 0.0)

    def log_probs(self) -> Tensor:
        """All that was noted, (B, new tokens)."""
        return torch.cat(self.columns, -1)


def passed(weights: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
    """Where the cumulated `weights` (B, K) pass `point` (B, 1), never at a weight of 0; and what is left of the point.

    With a random point this draws in proportion to the weights (the inverse of their cumulated distribution).

    float64 in; int64 (B, 1) and float64 (B, 1) out. A row of NaNs is passed at its end.
    """
    cumulated = weights.cumsum(-1)
    point = torch.minimum(point, cumulated[:, -1:] * (1 - 2**-50))  # rounding may have put it at the end or beyond
    index = torch.searchsorted(cumulated, point, right=True).clamp(max=weights.shape[-1] - 1)
    return index, point - (cumulated - weights).gather(-1, index)


def sampler(sampling: Sampling) -> tuple[LogitsProcessorList, Draw | None]:
    """Temperature and nucleus, in transformers' order, and the draw; greedy draws nothing."""
    processors = LogitsProcessorList()
    if sampling.temperature == 0:
        return processors, None
    if sampling.temperature != 1:
        processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    draw = Draw()
    processors.append(draw)
    return processors, draw


class HalfEnded(StoppingCriteria):
    """Stops generate when half of its rows have ended."""

    def __init__(self, ends: Tensor, width: int) -> None:
        self.ends = ends  # on the device: it is asked for each token
        self.width = width  # of the prompts, whose end tokens do not count

    def rows(self, input_ids: Tensor) -> Tensor:
        """Which rows hold an end token, bool (B,)."""
        return torch.isin(input_ids[:, self.width :], self.ends).any(-1)

    def __call__(self, input_ids: Tensor, scores: Tensor, **others: Any) -> Tensor:
        """For every row the same, since generate stops when all say so."""
        return (self.rows(input_ids).double().mean() >= 0.5).expand(len(input_ids))


def cut(row: list[int], ends: list[int], tokenizer: Any, log_probs: list[float] | None = None) -> Completion:
    """One row of new tokens up to and including its first end token; what follows that is padding."""
    length = next((i + 1 for i, token in enumerate(row) if token in ends), None)
    ids = row[:length]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return Completion(ids, text, truncated=length is None, log_probs=log_probs[:length] if log_probs else None)
