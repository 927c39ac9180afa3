"""The fast way to log-probabilities: each prompt once for its group, no padding, logits in pieces.

The plain way (loss.py) is a padded batch through the model's own forward pass, for any causal
language model. Here completions lie beside each other behind the prompt that they share, in one row
without padding. An attention function of our own, put in the place of transformers' `sdpa`, lets
each of them see the prompt and itself. And the head is applied in pieces (pieces.py), so that no
(tokens × V) tensor is kept. `share_prompts` tries each model before anything is trained: does this
way give the numbers of the plain one? Who wants to understand GRPO can leave this file out.

Shapes are those of replay_buffer.py; V is the size of the vocabulary, N a number of completion
tokens, T the number of tokens in a row.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from support.adapters import adapters_off
from support.model import pad_rows
from support.pieces import in_pieces

LogProbs = Callable[..., tuple[Tensor, ...]]

SHARED = "shared_prompt"  # our attention's name in transformers' table
LENGTHS = 4  # parts of similar length, into which completions are put for attention
FAR = 2**31  # the position of padding: later than any token, so that none sees it


def shared_log_probs(
    model: nn.Module,
    sequences: Tensor,
    attention_mask: Tensor,
    num_actions: int,
    temperature: float = 1.0,
    reference: nn.Module | None = None,
    *,
    token_log_probs: LogProbs,
) -> tuple[Tensor, ...]:
    """What `token_log_probs` says of the last `num_actions` tokens of each sequence.

    Neighbours with the same prompt compute it once, and no logits are kept for the backward pass.

    Args:
        model: one that `share_prompts` has found to take this.
        sequences: int64 (B, P + C); attention_mask: bool (B, P + C); num_actions: C. On the CPU,
            where the row is laid out: on a GPU each look at a length would wait for it.
        reference: a model whose logits `token_log_probs` is given too; `model` itself stands for
            the model without its adapters.
        token_log_probs: of logits (N, V), tokens (N,), temperature and the reference's logits.
    Returns:
        each thing that `token_log_probs` returns, float32 (B, C); 0 where there is no token.
    """
    sequences, device = sequences.cpu(), model.device
    row = pack_rows(sequences, attention_mask.cpu(), num_actions)
    tokens = sequences[:, -num_actions:].flatten()
    own, inputs = tokens[row.targets].to(device), sequences.flatten()[row.source].to(device)
    row = row.to(device)
    networks, states = [model], [hidden_states(model, row, inputs)]
    if reference is not None:
        with torch.no_grad(), adapters_off(reference, reference is model):
            states.append(hidden_states(reference, row, inputs))
        networks.append(reference)
    heads = [Head(network) for network in networks]

    def piece(tokens: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        logits, *others = (head(x) for head, x in zip(heads, states, strict=True))
        return token_log_probs(logits, tokens, temperature, *others)

    found = in_pieces(piece, own, *states, vocabulary=heads[0].vocabulary)
    blank = torch.zeros(len(tokens), device=device)
    return tuple(blank.index_put((row.targets,), x).view(-1, num_actions) for x in found)


@dataclass(frozen=True)
class PackedRow:
    """Completions of the same prompts in one row of T tokens: each prompt once, without padding.

        prompt p0 p1, completions a2 a3 a4 and b2 b3

        the row      p0 p1 | a2 a3 | b2
        positions     0  1    2  3    2
        predicts     p1 → a2 and b2; a2 → a3; a3 → a4; b2 → b3 (the causal shift)
        attends to   p0 p1: themselves; a2 a3: p0 p1 a2 a3; b2: p0 p1 b2; and nothing later

    The last token of a completion predicts nothing, so it is not in the row. N completion tokens
    are predicted in all.
    """

    source: Tensor  # int64 (1, T): the place of each token in the (B, P + C) sequences
    positions: Tensor  # int64 (1, T): a completion's follow those of its prompt
    # Which tokens attend to which, as pairs of query_index and key_index, places in the row with -1
    # for padding. First the prompts, to themselves: both (prompts, longest). Then the completions,
    # to their prompt and themselves: (some, longest - 1) and (some, longest with prompt).
    contexts: list[tuple[Tensor, Tensor]]
    restore_order: Tensor  # int64 (T,): the place of each token among the results of the contexts
    read: Tensor  # int64 (N,): the place in the row whose state predicts each completion token
    targets: Tensor  # int64 (N,): the place of that token in the (B, C) completions

    def to(self, device: torch.device) -> "PackedRow":
        """The same on `device`."""
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        contexts = [(queries.to(device), keys.to(device)) for queries, keys in self.contexts]
        return replace(self, contexts=contexts, **moved)


def pack_rows(sequences: Tensor, attention_mask: Tensor, num_actions: int) -> PackedRow:
    """Lay out neighbours with the same prompt behind it; arguments as in `shared_log_probs`."""
    width = sequences.shape[1]
    edge = width - num_actions  # P
    real = torch.where(attention_mask, sequences, -1)[:, :edge]
    same_as_before = [False, *(real[1:] == real[:-1]).all(dim=-1).tolist()]
    lengths = (part.sum(dim=-1).tolist() for part in attention_mask.split([edge, num_actions], -1))
    source, positions, read, targets = [], [], [], []
    prompts, completions, contexts_of = [], [], []
    for i, (prompt, completion) in enumerate(zip(*lengths, strict=True)):
        start = i * width + edge  # of the completion, in the sequences
        if not same_as_before[i]:
            prompts.append(range(len(source), len(source) + prompt))
            source += range(start - prompt, start)
            positions += range(prompt)
        own = range(len(source), len(source) + completion - 1)
        source += range(start, start + completion - 1)
        positions += range(prompt, prompt + completion - 1)
        completions.append(own)
        contexts_of.append([*prompts[-1], *own])
        # The causal shift: the first token is predicted by the last one of the prompt.
        read += [prompts[-1][-1], *own]
        targets += range(i * num_actions, i * num_actions + completion)

    contexts = [(index_table(prompts), index_table(prompts))]
    order = sorted(range(len(completions)), key=lambda i: len(completions[i]))
    size = math.ceil(len(order) / LENGTHS)
    for part in (order[i : i + size] for i in range(0, len(order), size)):
        queries = index_table([completions[i] for i in part])
        contexts.append((queries, index_table([contexts_of[i] for i in part])))
    places = torch.cat([query_index.flatten() for query_index, _ in contexts])
    restore_order = torch.empty(len(source), dtype=torch.long)
    restore_order[places[places >= 0]] = (places >= 0).nonzero().squeeze(-1)
    lists = (torch.tensor(x) for x in (source, positions, read, targets))
    source, positions, read, targets = lists
    return PackedRow(source[None], positions[None], contexts, restore_order, read, targets)


def index_table(rows: list[Sequence[int]]) -> Tensor:
    """Rows of places as one tensor, padded with -1."""
    longest = max(map(len, rows))
    padded = [[*row, *[-1] * (longest - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.long)


def shared_prompt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    row: PackedRow | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attention in the layout of `PackedRow`: query (1, H, T, D), key and value alike.

    Transformers calls it in the place of its own `sdpa`, which does the work, and all of it where
    there is no row. The result is (1, T, H, D).
    """
    if row is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    if settings.get("softcap") is not None:  # some versions of transformers leave it out in silence
        raise ValueError("sdpa does not cap its scores")
    window = settings.get("sliding_window") or query.shape[2]  # without one, the whole row
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
    results = []
    for query_index, key_index in row.contexts:
        if not query_index.numel():  # completions of one token each are not in the row
            continue
        # Padding asks as the first token does, so that it sees something.
        asking = row.positions[0][query_index.clamp(min=0)]
        seen = torch.where(key_index < 0, FAR, row.positions[0][key_index])
        distance = asking[:, None, :, None] - seen[:, None, None, :]
        chosen = (
            x.index_select(0, places.clamp(min=0).flatten())
            .unflatten(0, places.shape)
            .transpose(1, 2)
            for x, places in ((query, query_index), (key, key_index), (value, key_index))
        )
        mask = (distance >= 0) & (distance < window)
        result, _ = sdpa_attention_forward(module, *chosen, mask, **settings)
        results.append(result.flatten(0, 1))
    return torch.cat(results).index_select(0, row.restore_order)[None], None


def hidden_states(model: nn.Module, row: PackedRow, inputs: Tensor) -> Tensor:
    """The last hidden states that predict the completion tokens, (N, hidden size).

    Args:
        inputs: int64 (1, T), the tokens of the row.
    """
    assert model.config._attn_implementation == SHARED, "share_prompts comes first"
    # A mask keeps the model from making one of its own; our attention does not look at it.
    no_mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=inputs.device)
    output = model.base_model(
        input_ids=inputs,
        position_ids=row.positions,
        attention_mask=no_mask,
        use_cache=False,
        row=row,
    )
    return output.last_hidden_state[0].index_select(0, row.read)


class Head:
    """What a language model makes of its last hidden states: logits over V tokens."""

    def __init__(self, model: nn.Module) -> None:
        config = vars(model.config.get_text_config())
        self.linear = model.get_output_embeddings()
        self.vocabulary = self.linear.weight.shape[0]
        # Cohere's scale; Granite's; Gemma's cap
        self.scale = config.get("logit_scale") or 1 / (config.get("logits_scaling") or 1)
        self.cap = config.get("final_logit_softcapping")

    def __call__(self, states: Tensor) -> Tensor:
        """Logits (N, V) of states (N, hidden size)."""
        logits = self.linear(states) * self.scale if self.scale != 1 else self.linear(states)
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def share_prompts(
    model: nn.Module, name: str, longest: int, log_probs: LogProbs, shared: LogProbs
) -> bool:
    """Prepare the model for `shared_log_probs` if it gives the plain numbers; else say so.

    Not, for example: models with a recurrent state, with ALiBi, with attention that is not sdpa,
    with a head that does more than `Head` knows. Tried on a few tokens: both ways under our
    attention are compared with the plain one before it.

    Args:
        longest: tokens of prompt and completion. Where the config has a window, a chunk or a top-k
            below it, one of the rows that are tried is longer than that.
        log_probs, shared: the plain way and this one.
    """
    own = model.config._attn_implementation
    *batch, width = pad_rows(trial_rows(model, longest))
    mask = batch[1][:, -width:]
    try:
        with torch.no_grad():
            plain = log_probs(model, *batch, width)[0]
            AttentionInterface.register(SHARED, shared_prompt_attention)
            AttentionMaskInterface.register(SHARED, sdpa_mask)
            model.set_attn_implementation(SHARED)
            if model.config._attn_implementation != SHARED:
                raise ValueError("its attention cannot be exchanged")
            ways = [way(model, *batch, width)[0] for way in (log_probs, shared)]
        gap = max((plain - way)[mask].abs().max().item() for way in ways)
        reason = f"its log-probabilities would be off by {gap:.2g}"
        fine = gap < (1e-3 if model.dtype == torch.float32 else 0.1)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        fine = False
    if not fine:
        model.set_attn_implementation(own)
        print(
            f"{name} computes a prompt once for each completion ({reason}): slower, the numbers "
            "are the same"
        )
    return fine


def trial_rows(model: nn.Module, longest: int) -> list[tuple[list[int], list[int]]]:
    """Pairs of prompt and completion to try the model on; one is longer than any of its limits."""
    rows = [
        ([1, 2, 3], [4, 5]),
        ([1, 2, 3], [6, 7, 8, 3]),
        ([1, 2, 3], [5]),
        ([4, 2, 9, 1, 7], [3, 3, 8]),
    ]
    settings = vars(model.config.get_text_config())
    limits = [
        value
        for key, value in settings.items()
        if re.search("window|chunk|topk", key) and type(value) is int and 0 < value < longest
    ]
    if limits:
        rows.append(([1 + t % 9 for t in range(max(limits))], [3, 1, 4, 1, 5, 9, 2, 6]))
    return rows


def order_by_prompt(experiences: list[Any]) -> list[int]:
    """An order in which completions of one prompt are neighbours, and lengths grow slowly.

    Micro-batches that are cut from it compute few prompts twice and hold little padding.

    Args:
        experiences: with `sequences`, a prompt and then `num_actions` tokens.
    """
    prompts = [tuple(e.sequences[: -e.num_actions].tolist()) for e in experiences]
    tokens = Counter({prompt: len(prompt) for prompt in prompts})
    for prompt, e in zip(prompts, experiences, strict=True):
        tokens[prompt] += e.num_actions
    keys = [
        (tokens[prompt], prompt, e.num_actions)
        for prompt, e in zip(prompts, experiences, strict=True)
    ]
    return sorted(range(len(experiences)), key=keys.__getitem__)
