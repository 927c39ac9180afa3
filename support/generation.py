"""transformers' `generate`, made fast: prompts once, one random number a token, ended rows leave.

Nothing of it changes the distribution: softmax(logits / temperature), inside the nucleus top_p. A
prompt is computed once, and its keys and values are repeated for its group. A token is drawn by
inverting the cumulated distribution at a random number, which follows from the seed of its
completion and from nothing else in the batch. Whenever half of a batch has ended, `generate` is
called again for the others.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
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

from support.errors import UserError
from support.model import padded_inputs
from support.served_rollout import ServedModel

Seed = tuple[int, ...]

BLOCK = 256  # tokens of the vocabulary whose probabilities are first added up together


@dataclass(frozen=True)
class Sampling:
    """How to sample."""

    max_new_tokens: int
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    batch_size: int = 64  # sequences in one call of generate
    # Is told rows of the batch and their newest tokens, and names the rows that shall end there.
    watch: Callable[[list[int], list[int]], list[int]] | None = None

    @classmethod
    def of(cls, config: Any) -> "Sampling":
        """The rollout's settings in a Config."""
        return cls(
            config.max_new_tokens, config.temperature, config.top_p, config.rollout_batch_size
        )


def generate(
    model: nn.Module,
    batch: list[tuple[list[int], Seed]],
    sampling: Sampling,
    settings: GenerationConfig,
) -> list[tuple[list[int], list[float]]]:
    """New tokens for each prompt of a batch, and the log-probability of each (none if greedy).

    A model on a server has one of its own. Here, anything may stand after a row's first end token;
    each turn of the loop goes on where the turn before stopped, with the rows that have not ended.

    Args:
        batch: prompts, as token ids, with the seeds of their random numbers.
    """
    if isinstance(model, ServedModel):
        return model.generate(batch, sampling, settings)
    prompts = [prompt for prompt, _ in batch]
    numbers = random_numbers([seed for _, seed in batch], sampling).to(model.device)
    input_ids, attention_mask = pad_left(prompts, settings.pad_token_id, model.device)
    cache = prompt_cache(model, input_ids, attention_mask)
    tokens, log_probs = [[] for _ in prompts], [[] for _ in prompts]
    rows, budget, width = list(range(len(prompts))), sampling.max_new_tokens, input_ids.shape[1]
    while rows and budget:
        settings.max_new_tokens = budget
        sampler = TokenSampler(sampling, numbers[rows, -budget:])
        half_done = StopWhenHalfDone(settings.eos_token_id, input_ids)
        watch = [Watch(sampling, rows, width, settings.eos_token_id)] if sampling.watch else []
        with replaced_generation_config(model, settings):
            output = model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                past_key_values=cache,
                generation_config=settings,
                logits_processor=LogitsProcessorList([*watch, sampler]),
                stopping_criteria=StoppingCriteriaList([] if cache is None else [half_done]),
            )
        new = output.sequences[:, input_ids.shape[1] :]
        drawn = sampler.log_probs().tolist()
        for row, ids, values in zip(rows, new.tolist(), drawn, strict=True):
            tokens[row] += ids
            log_probs[row] += values
        budget -= new.shape[1]
        going = (~half_done.ended(output.sequences)).nonzero().squeeze(-1)
        rows = [rows[i] for i in going.tolist()]
        if rows and budget:
            cache = output.past_key_values
            cache.batch_select_indices(going)
            input_ids = output.sequences[going]
            attention_mask = torch.cat([attention_mask, torch.ones_like(new)], dim=-1)[going]
    return list(zip(tokens, log_probs, strict=True))


def with_seeds(prompts: list[list[int]]) -> list[tuple[list[int], Seed]]:
    """Each prompt with the seed of its random numbers, another one for each, by torch's generator.

    So what is drawn for a completion follows from its place in the rollout; batches do not matter.
    """
    seed = int(torch.randint(2**62, ()))
    return [(prompt, (seed, place)) for place, prompt in enumerate(prompts)]


def random_numbers(seeds: list[Seed], sampling: Sampling) -> Tensor:
    """Numbers in [0, 1), one for each token of each completion: float64 (B, max_new_tokens)."""
    rows = [np.random.default_rng(seed).random(sampling.max_new_tokens) for seed in seeds]
    return torch.from_numpy(np.stack(rows))


def end_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """Every token that ends a completion: the model's own list and the tokenizer's."""
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    return sorted({*ends, tokenizer.eos_token_id})


def generation_config(sampling: Sampling, ends: list[int], tokenizer: Any) -> GenerationConfig:
    """Every field that shapes the distribution, stated.

    Greedy, also when we sample: the `TokenSampler` leaves generate only one token to choose.
    """
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


@contextmanager
def replaced_generation_config(model: nn.Module, settings: GenerationConfig) -> Iterator[None]:
    """Set the model's own generation config aside: generate fills what is left open from it."""
    own, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = own


def pad_left(prompts: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 (B, P). The mask is made from lengths."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def prompt_cache(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Cache | None:
    """Keys and values of all prompt tokens but the last, each different prompt computed once.

    The last token is left for generate, which needs one to begin with. None for models whose state
    is more than keys and values (Mamba, LFM2): it could not be repeated for a group, nor could rows
    be taken out of it. Such models read every prompt anew, and no row leaves a batch early.

    Args:
        input_ids, attention_mask: int64 (B, P), padded on the left.
    """
    # Private, and what generate itself asks.
    if model._is_stateful or not model._supports_default_dynamic_cache():
        return None
    if "past_key_values" not in inspect.signature(model.forward).parameters:  # OpenAI's first GPT
        return None
    cache = DynamicCache(config=model.config)
    if not {type(layer) for layer in cache.layers} <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return None
    width = input_ids.shape[1]
    if width > 1:
        both = torch.cat([input_ids, attention_mask], dim=-1)
        different, place = torch.unique(both, dim=0, return_inverse=True)
        inputs = padded_inputs(model, different[:, : width - 1], different[:, width:-1])
        model.base_model(**inputs, past_key_values=cache, use_cache=True)
        cache.batch_select_indices(place)
    return cache


class TokenSampler(LogitsProcessor):
    """Draws the next token of each row, hides the others from generate, keeps its log-probability.

    The draw inverts the cumulated distribution, so it costs one random number, where generate's own
    multinomial makes one for each token of the vocabulary. It chooses among blocks of the
    vocabulary first and then inside one, in float64, so that the tail of a large vocabulary keeps
    its share.

    Args:
        numbers: float64 (B, new tokens), in [0, 1): where each draw falls.
    """

    def __init__(self, sampling: Sampling, numbers: Tensor) -> None:
        self.numbers = numbers
        self.greedy = sampling.temperature == 0
        self.warpers = LogitsProcessorList()  # in transformers' order
        if not self.greedy and sampling.temperature != 1:
            self.warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if not self.greedy and sampling.top_p < 1:
            self.warpers.append(TopPLogitsWarper(sampling.top_p))
        self.columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) in; out, in the same memory, a distribution with a single token."""
        if self.greedy:
            self.columns.append(scores.new_empty(len(scores), 0))
            return scores
        scores = self.warpers(input_ids, scores)
        probs = scores.softmax(dim=-1)
        blocks = nn.functional.pad(probs, (0, -probs.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
        sums = blocks.sum(dim=-1).double()
        number = self.numbers[:, len(self.columns), None]
        block, rest = invert_cdf(sums, number * sums.sum(dim=-1, keepdim=True))
        inside = blocks.take_along_dim(block[..., None], dim=1)[:, 0].double()
        place, _ = invert_cdf(inside, rest)
        # The clamp is for a row of NaNs, which `log_probs` reports.
        token = (block * BLOCK + place).clamp(max=probs.shape[-1] - 1)
        self.columns.append(probs.gather(-1, token).log())
        return scores.fill_(-torch.inf).scatter_(-1, token, 0.0)

    def log_probs(self) -> Tensor:
        """The log-probabilities of all tokens that were drawn, (B, new tokens); greedy: (B, 0)."""
        log_probs = torch.cat(self.columns, dim=-1)
        if log_probs.isnan().any():
            raise UserError(
                "The model's logits are not finite, so nothing can be sampled: its weights have "
                "overflowed (lower --lr, and go on from an earlier checkpoint) or are broken from "
                "the start."
            )
        return log_probs


class Watch(LogitsProcessor):
    """Shows each row's newest token to `sampling.watch`, and ends the rows that it names."""

    def __init__(self, sampling: Sampling, rows: list[int], width: int, ends: list[int]) -> None:
        self.watch, self.rows = sampling.watch, rows
        self.width, self.end = width, ends[0]  # tokens of a prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) in, and out, where only the end token is left of rows that end."""
        if input_ids.shape[1] > self.width:
            named = self.watch(self.rows, input_ids[:, -1].tolist())
            ended = [place for place, row in enumerate(self.rows) if row in named]
            scores[ended] = -torch.inf
            scores[ended, self.end] = 0.0
        return scores


def invert_cdf(weights: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
    """Where the cumulated weights (B, K) pass a point (B, 1), and what is left of the point there.

    With a random point this draws in proportion to the weights, and never one of weight 0.

    Args:
        weights, point: float64.
    Returns:
        int64 (B, 1) and float64 (B, 1). A row of NaNs is passed at its end.
    """
    cumulated = weights.cumsum(dim=-1)
    # Rounding may have put the point at the end or beyond.
    point = torch.minimum(point, cumulated[:, -1:] * (1 - 2**-50))
    index = torch.searchsorted(cumulated, point, right=True).clamp(max=weights.shape[-1] - 1)
    return index, point - (cumulated - weights).gather(-1, index)


class StopWhenHalfDone(StoppingCriteria):
    """Stops generate when half of its rows have ended."""

    def __init__(self, ends: list[int], prompts: Tensor) -> None:
        self.ends = torch.tensor(ends, device=prompts.device)
        self.width = prompts.shape[1]  # end tokens inside the prompts do not count

    def ended(self, input_ids: Tensor) -> Tensor:
        """Which rows hold an end token, bool (B,)."""
        return torch.isin(input_ids[:, self.width :], self.ends).any(dim=-1)

    def __call__(self, input_ids: Tensor, scores: Tensor, **others: Any) -> Tensor:
        """For every row the same, since generate stops when all of them say so."""
        return (self.ended(input_ids).double().mean() >= 0.5).expand(len(input_ids))
