"""Token log-probabilities: what a model says of its own completions, prompts once and logits in pieces.

Two ways to the same numbers. The plain one is a padded batch through the model's own forward, for any causal language
model. The fast one (`share=True`) lays completions beside each other behind the prompt that they share, in one row
without padding: our attention, put in the place of transformers' `sdpa`, lets each of them see the prompt and itself.
And the head is applied in pieces which the backward pass computes again, so that no (tokens × V) tensor is kept.
`share_prompts` tries on each model, before anything is trained, whether the fast way says what the plain one says.
Who wants to understand GRPO can leave the fast way out: `sequences_log_probs` and `completion_logits` are all of it.

V is the vocabulary's size, N a number of completion tokens; the other letters are those of replay_buffer.py.
"""

import inspect
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from replay_buffer import Experience, batches, pad_batch

# Numbers in a piece of fp32 logits; a few tensors of that size are alive at a time. On a CPU 24 MB: from 32 MB on
# malloc asks the system for every single tensor, which takes longer than the arithmetic. On a GPU 256 MB: the backward
# pass of each piece makes a gradient as large as the head, so there should be few.
LOGITS_AT_A_TIME = {"cpu": 6 * 2**20, "cuda": 2**26}
SHARED = "shared_prompt"  # our attention's name in transformers' table
LENGTHS = 4  # into so many parts of similar length completions are put for attention, which alone needs padding
FAR = 2**31  # the position of padding: later than any token, so that none sees it
LOWEST = -1e30  # log-probability of a masked token; with −inf the entropy and its gradient would have 0 × inf


class Policy(nn.Module):
    """A language model that is asked for the log-probabilities of its completions.

    The module that Accelerate prepares is this one, so precision (and, with several processes, gradient exchange)
    act on the whole computation and not on the logits, which never leave it.
    """

    def __init__(
        self, model: nn.Module, temperature: float, share: bool = False, entropy_gradient: bool = True
    ) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.entropy_gradient = entropy_gradient  # whether entropies and exact KL need a gradient
        self.share = share  # what `share_prompts` says of the model

    def forward(self, experience: Experience, reference: "Policy | None" = None) -> tuple[Tensor, Tensor, Tensor]:
        """What `sequences_log_probs` says of each completion token; with `reference`, its exact KL too."""
        return sequences_log_probs(
            self.model, experience.sequences, experience.attention_mask, experience.num_actions, self.temperature,
            None if reference is None else reference.model, self.share, self.entropy_gradient,
        )  # fmt: skip


def sequences_log_probs(
    model: nn.Module, sequences: Tensor, attention_mask: Tensor, num_actions: int, temperature: float = 1.0,
    reference: nn.Module | None = None, share: bool = False, entropy_gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Log-probabilities of the last `num_actions` tokens of each sequence, and the entropies beside them.

    Args:
        model: a causal language model.
        sequences: int64 (B, P + C); attention_mask: bool (B, P + C).
        num_actions: C.
        temperature: what the sampler divided its logits by.
        reference: a model with the same vocabulary, for the KL.
        share: the fast way to the same numbers, for models that `share_prompts` has found to take it: neighbours
            with the same prompt compute it once, and no logits are kept for the backward pass.
        entropy_gradient: whether entropies and KL shall have a gradient.
    Returns:
        log-probabilities, entropies in nats, and KL(model ‖ reference) over the whole vocabulary (0 without a
        reference), all float32 (B, C). Where there is no token, anything.
    """
    tokens = sequences[:, -num_actions:].flatten()
    compared = {}  # what token_log_probs needs of the reference
    if not share:
        logits = completion_logits(model, sequences, attention_mask, num_actions).flatten(0, 1)
        if reference is not None:
            with torch.no_grad():
                of_reference = completion_logits(reference, sequences, attention_mask, num_actions)
            compared = {"reference": of_reference.flatten(0, 1)}
        found = token_log_probs(logits, tokens, temperature, entropy_gradient, **compared)
        return tuple(x.view(-1, num_actions) for x in found)
    row = one_row(sequences, attention_mask, num_actions)
    if reference is not None:
        with torch.no_grad():
            compared = {"reference": last_states(reference, row, sequences), "reference_head": Head(reference)}
    states = last_states(model, row, sequences)
    found = token_log_probs(
        states, tokens[row.targets], temperature, head=Head(model), entropy_gradient=entropy_gradient, **compared
    )
    blank = torch.zeros(len(tokens), device=tokens.device)
    return tuple(blank.index_put((row.targets,), x).view(-1, num_actions) for x in found)  # back to (B, C)


def completion_logits(model: nn.Module, sequences: Tensor, attention_mask: Tensor, num_actions: int) -> Tensor:
    """The logits (B, C, V) that the last `num_actions` tokens of each sequence were read off.

    The causal shift is here and in `one_row`, and nowhere else: the logits at position t are about the token at
    t + 1, so the completion in columns P … P+C-1 is read off the logits at P-1 … P+C-2. No other logits are computed.
    """
    width = sequences.shape[1]
    positions = torch.arange(width - num_actions - 1, width - 1, device=sequences.device)
    inputs = padded_inputs(model, sequences, attention_mask) | {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(**inputs, logits_to_keep=positions).logits
    return model(**inputs).logits[:, positions]


def padded_inputs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
    """What a forward pass is given of rows (B, S) with padding: tokens, mask, and positions that leave padding out."""
    mask = attention_mask.long()
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return inputs


@dataclass(frozen=True)
class Row:
    """Completions of the same prompts in one row of T tokens: each prompt once, no padding, no last tokens.

        the row       p0 p1 | a2 a3 | b2 | …       of the prompt p0 p1 with the completions a2 a3 a4 and b2 b3
        positions      0  1    2  3    2
        attend to     p0 p1 see p0 p1; a2 a3 see p0 p1 a2 a3; b2 sees p0 p1 b2; each as far as its own position
        predict       p1 → a2 (and b2), a2 → a3, a3 → a4, b2 → b3: the causal shift

    The last token of a completion predicts nothing, so it is not there. N completion tokens are predicted in all.
    """

    source: Tensor  # int64 (1, T): the place in the (B, P + C) sequences
    positions: Tensor  # int64 (1, T): each completion's go on from its prompt's
    # Who attends to whom, as places in the row with -1 for padding: the prompts to themselves, both (prompts, longest),
    # and the completions, (some, longest - 1), to their prompt and themselves, (some, longest of both).
    contexts: list[tuple[Tensor, Tensor]]
    back: Tensor  # int64 (T,): the place of each token in what comes out of the contexts
    read: Tensor  # int64 (N,): the place in the row whose state each completion token is predicted from
    targets: Tensor  # int64 (N,): the place of that token in the (B, C) completions


def one_row(sequences: Tensor, attention_mask: Tensor, num_actions: int) -> Row:
    """Lay out neighbours with the same prompt behind it; arguments as those of `sequences_log_probs`."""
    width, device = sequences.shape[1], sequences.device
    edge = width - num_actions  # P
    real = torch.where(attention_mask, sequences, -1)[:, :edge]
    same_as_before = [False, *(real[1:] == real[:-1]).all(-1).tolist()]
    lengths = (part.sum(-1).tolist() for part in attention_mask.split([edge, num_actions], -1))
    source, positions, prompts, completions, seen, read, targets = [], [], [], [], [], [], []
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
        seen.append([*prompts[-1], *own])
        # The causal shift: the first token is predicted from the prompt's last place, each other from the one before.
        read += [prompts[-1][-1], *own]
        targets += range(i * num_actions, i * num_actions + completion)

    def table(rows: list[Sequence[int]]) -> Tensor:
        longest = max(map(len, rows))
        return torch.tensor([[*row, *[-1] * (longest - len(row))] for row in rows], dtype=torch.long, device=device)

    contexts = [(table(prompts), table(prompts))]
    order = sorted(range(len(completions)), key=lambda i: len(completions[i]))
    for part in batches(order, math.ceil(len(order) / LENGTHS)):  # of similar length, so that little is padding
        contexts.append((table([completions[i] for i in part]), table([seen[i] for i in part])))
    places = torch.cat([asks.flatten() for asks, _ in contexts])
    back = torch.empty(len(source), dtype=torch.long, device=device)
    back[places[places >= 0]] = (places >= 0).nonzero().squeeze(-1)
    source, positions, read, targets = (torch.tensor(x, device=device) for x in (source, positions, read, targets))
    return Row(source[None], positions[None], contexts, back, read, targets)


def shared_prompt_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    row: Row | None = None, **settings: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention in the layout of `Row`: query (1, H, T, D), key and value alike, the result (1, T, H, D).

    Transformers calls it in the place of its own `sdpa`, which does the work, and all of it where there is no row.
    """
    if row is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    if settings.get("softcap") is not None:
        raise ValueError("sdpa does not cap its scores")  # some versions of transformers leave that out in silence
    window = settings.get("sliding_window") or query.shape[2]  # without one, as far as the row goes
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
    results = []
    for asks, sees in row.contexts:
        if not asks.numel():  # completions of one token each: nothing of them is in the row
            continue
        mine = row.positions[0][asks.clamp(min=0)]  # padding asks as the first token, so that it sees something
        theirs = torch.where(sees < 0, FAR, row.positions[0][sees])
        distance = mine[:, None, :, None] - theirs[:, None, None, :]
        picked = (
            x.index_select(0, places.clamp(min=0).flatten()).unflatten(0, places.shape).transpose(1, 2)
            for x, places in ((query, asks), (key, sees), (value, sees))
        )
        result, _ = sdpa_attention_forward(module, *picked, (distance >= 0) & (distance < window), **settings)
        results.append(result.flatten(0, 1))
    return torch.cat(results).index_select(0, row.back)[None], None


def last_states(model: nn.Module, row: Row, sequences: Tensor) -> Tensor:
    """The hidden states that the completion tokens are predicted from, (N, hidden size)."""
    assert model.config._attn_implementation == SHARED, "share_prompts comes first"
    no_mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=sequences.device)  # keeps the model from making one
    output = model.base_model(
        input_ids=sequences.flatten()[row.source], position_ids=row.positions, attention_mask=no_mask, use_cache=False,
        row=row,
    )  # fmt: skip
    return output.last_hidden_state[0].index_select(0, row.read)


class Head:
    """What a language model makes of its last hidden states: logits over V tokens."""

    def __init__(self, model: nn.Module) -> None:
        config = vars(model.config.get_text_config())
        self.linear = model.get_output_embeddings()
        self.scale = config.get("logit_scale") or 1 / (config.get("logits_scaling") or 1)  # Cohere's; Granite's
        self.cap = config.get("final_logit_softcapping")  # Gemma's

    def __call__(self, states: Tensor) -> Tensor:
        """Logits (N, V) of states (N, hidden size)."""
        logits = self.linear(states) * self.scale if self.scale != 1 else self.linear(states)
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def token_log_probs(
    states: Tensor, tokens: Tensor, temperature: float, entropy_gradient: bool = True, head: Head | None = None,
    reference: Tensor | None = None, reference_head: Head | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Log-softmax of logits over temperature, read at `tokens` (N,); its entropy; its KL to the reference's.

    `states` and `reference` are what the heads make logits of, or, without heads, logits (N, V). All results float32
    (N,); `entropy_gradient`: whether the entropy and the KL have a gradient. In pieces that are computed again in the
    backward pass, so that a full fp32 copy of the logits (with heads, any copy) is never alive. Without a reference the
    KL is 0.
    """

    def normalized(states: Tensor, head: Head | None) -> Tensor:
        logits = (head(states) if head else states).float()
        return torch.log_softmax(logits if temperature == 1 else logits / temperature, -1)

    def piece(states: Tensor, tokens: Tensor, others: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        log_probs = normalized(states, head)
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            finite = log_probs.clamp(min=LOWEST)
            probs = finite.exp()
            entropy = -(probs * finite).sum(-1)
            kl = torch.zeros_like(entropy)
            if others is not None:
                kl = -entropy - (probs * normalized(others, reference_head).clamp(min=LOWEST)).sum(-1)
        return log_probs.gather(-1, tokens[:, None]).squeeze(-1), entropy, kl

    vocabulary = head.linear.weight.shape[0] if head else states.shape[-1]
    size = max(1, LOGITS_AT_A_TIME[states.device.type] // vocabulary)
    pieces = states.split(size), tokens.split(size)
    others = [None] * len(pieces[0]) if reference is None else reference.split(size)
    found = (checkpoint(piece, *args, use_reentrant=False) for args in zip(*pieces, others, strict=True))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def share_prompts(model: nn.Module, name: str, longest: int) -> bool:
    """Let `sequences_log_probs` share prompts, if it may: tried on a few tokens against the plain way; says so if not.

    Not, for example: models with a recurrent state, with ALiBi, with attention that is not sdpa, with a head that does
    more than `Head` knows. Both ways under our attention are compared with the plain one before it. `longest`: tokens
    of prompt and completion; where the config has a window, a chunk or a top-k below that, one row is longer than it.
    """
    own, settings = model.config._attn_implementation, vars(model.config.get_text_config())
    limits = [
        v for k, v in settings.items() if re.search("window|chunk|topk", k) and type(v) is int and 0 < v < longest
    ]
    rows = [([1, 2, 3], [4, 5]), ([1, 2, 3], [6, 7, 8, 3]), ([1, 2, 3], [5]), ([4, 2, 9, 1, 7], [3, 3, 8])]
    if limits:
        rows.append(([1 + t % 9 for t in range(max(limits))], [3, 1, 4, 1, 5, 9, 2, 6]))
    e = pad_batch([Experience.of(*row, 0.0, 0.0) for row in rows])
    arguments = e.sequences, e.attention_mask, e.num_actions
    try:
        with torch.no_grad():
            plain = sequences_log_probs(model, *arguments)[0]
            AttentionInterface.register(SHARED, shared_prompt_attention)
            AttentionMaskInterface.register(SHARED, sdpa_mask)
            model.set_attn_implementation(SHARED)
            if model.config._attn_implementation != SHARED:
                raise ValueError("its attention cannot be exchanged")
            ways = [sequences_log_probs(model, *arguments, share=share)[0] for share in (False, True)]
        gap = max((plain - way)[e.action_mask].abs().max().item() for way in ways)
        reason = f"its log-probabilities would be off by {gap:.2g}"
        fine = gap < (1e-3 if model.dtype == torch.float32 else 0.1)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        reason, fine = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}", False
    if not fine:
        model.set_attn_implementation(own)
        print(f"{name} computes a prompt once for each completion ({reason}): slower, the numbers are the same")
    return fine
