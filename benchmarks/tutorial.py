"""The baseline of benchmarks/step.py: a step of GRPO, computed the way of the tiny-grpo tutorial.

This is no command. It computes what train.py computes (`tests/test_tutorial.py` compares), but in
the tutorial's way: one `generate` call for each question; the logits of prompt and completion, all
of them, in fp32, to gather one of each; the old policy (and, with a KL, the reference) asked about
each group; rows that keep the padding of their group, in the order of the buffer; every completion
trained, with or without an advantage. The tutorial's numerical faults are mended, since a wrong
step is no baseline: masks come from lengths, the end token is trained, the sampler has no filter.

S: tokens of prompt and completion with padding; what is said of tokens is (rows, S - 1), one for
each token but the first.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from reward import score
from rollout import Completion, Group
from support.config import Config
from support.data import Question


class Row(NamedTuple):
    """One completion in the buffer, with the padding of its group."""

    sequence: Tensor  # int64 (S,)
    attention_mask: Tensor  # int64 (S,)
    action_mask: Tensor  # bool (S - 1,): whether the next token was sampled
    log_probs_old: Tensor  # float32 (S - 1,)
    log_probs_ref: Tensor  # float32 (S - 1,); zeros without a KL
    advantage: Tensor  # float32 ()


def autocast(model: nn.Module, config: Config) -> torch.autocast:
    """The arithmetic of config.precision."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=config.precision == "bf16")


@torch.no_grad()
def sample(model: nn.Module, tokenizer: Any, question: Question, config: Config) -> list[list[int]]:
    """`group_size` completions of one question, each up to and including its end token."""
    own = model.generation_config.eos_token_id
    ends = {
        tokenizer.eos_token_id,
        *([] if own is None else [own] if isinstance(own, int) else own),
    }
    settings = GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        do_sample=True,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=0,
        typical_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        num_beams=1,
        use_cache=True,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.eos_token_id,
    )
    prompt = torch.tensor([question.prompt_ids] * config.group_size, device=model.device)
    with autocast(model, config):
        output = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=settings
        )
    rows = output[:, prompt.shape[1] :].tolist()
    return [
        row[: next((i + 1 for i, token in enumerate(row) if token in ends), None)] for row in rows
    ]


def returns_of(
    rewards: dict[str, Callable],
    question: Question,
    completions: list[list[int]],
    tokenizer: Any,
    config: Config,
) -> Tensor:
    """The weighted sum of the rewards of one group, float32 (group_size,)."""
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    # No reward is told whether a completion was truncated.
    answers = [Completion(*pair, truncated=False) for pair in zip(completions, texts, strict=True)]
    (scored,) = score([Group(question, answers)], rewards, config)
    return scored.returns


def sequences_log_probs(
    model: nn.Module, sequences: Tensor, attention_mask: Tensor, config: Config
) -> Tensor:
    """Log-probability of every token but the first, (rows, S - 1), from all logits."""
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    with autocast(model, config):
        output = model(
            input_ids=sequences,
            attention_mask=attention_mask,
            position_ids=positions,
            use_cache=False,
        )
    log_probs = torch.log_softmax(output.logits[:, :-1].float() / config.temperature, -1)
    return log_probs.gather(-1, sequences[:, 1:, None]).squeeze(-1)


@torch.no_grad()
def make_rows(
    model: nn.Module,
    reference: nn.Module | None,
    question: Question,
    completions: list[list[int]],
    returns: Tensor,
    config: Config,
) -> list[Row]:
    """The group as rows, with what the policy that sampled and the reference say of its tokens."""
    start, width = len(question.prompt_ids), max(map(len, completions))
    sequences = torch.tensor(
        [question.prompt_ids + c + [0] * (width - len(c)) for c in completions]
    )
    lengths = torch.tensor([start + len(c) for c in completions])[:, None]
    places = torch.arange(start + width)
    attention_mask = (places < lengths).long()
    action_mask = ((places >= start) & (places < lengths))[:, 1:]
    inputs = sequences.to(model.device), attention_mask.to(model.device), config
    old = sequences_log_probs(model, *inputs).cpu()
    ref = torch.zeros_like(old)
    if reference is not None:
        ref = sequences_log_probs(reference, *inputs).cpu()
    relative = (returns - returns.mean()) / (returns.std() + 1e-4)
    advantages = relative * (returns.max() > returns.min())
    return list(map(Row, sequences, attention_mask, action_mask, old, ref, advantages))


def update(
    model: nn.Module, optimizer: torch.optim.Optimizer, rows: list[Row], config: Config
) -> tuple[float, float]:
    """One optimizer step over all rows, in micro-batches; returns loss and gradient norm."""
    model.train()
    total = 0.0
    for start in range(0, len(rows), config.micro_batch):
        part = rows[start : start + config.micro_batch]
        columns = list(zip(*part, strict=True))
        padded = [
            pad_sequence(c, batch_first=True, padding_side="left").to(model.device)
            for c in columns[:5]
        ]
        sequences, attention_mask, mask, old, ref = padded
        advantages = torch.stack(columns[5]).to(model.device)[:, None]
        new = sequences_log_probs(model, sequences, attention_mask, config)
        ratio = torch.where(mask, new - old, 0.0).exp()
        clipped = ratio.clamp(1 - config.clip_eps, 1 + config.clip_eps)
        loss = -torch.min(ratio * advantages, clipped * advantages)
        if config.kl_weight:
            distance = torch.where(mask, ref - new, 0.0)
            loss = loss + config.kl_weight * (distance.exp() - distance - 1).clamp(max=10)
        loss = (torch.where(mask, loss, 0.0).sum(-1) / mask.sum(-1)).sum() / len(rows)
        loss.backward()
        total += loss.item()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_norm)
    optimizer.step()
    optimizer.zero_grad()
    model.eval()
    return total, float(norm)


def step(
    model: nn.Module,
    reference: nn.Module | None,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    questions: list[Question],
    rewards: dict[str, Callable],
    config: Config,
) -> dict[str, float]:
    """One step, rollout to update.

    Args:
        config: must state clip_eps and kl_weight; None would be the choice of the objective.
    Returns:
        seconds of its parts, sampled tokens, loss and gradient norm.
    """
    spent = {"rollout": 0.0, "log_probs": 0.0, "update": 0.0}

    def timed(part: str, function: Callable, *args: Any) -> Any:
        start, result = time.perf_counter(), function(*args)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        spent[part] += time.perf_counter() - start
        return result

    buffer, tokens = [], 0
    for question in questions:
        completions = timed("rollout", sample, model, tokenizer, question, config)
        returns = returns_of(rewards, question, completions, tokenizer, config)
        buffer += timed(
            "log_probs", make_rows, model, reference, question, completions, returns, config
        )
        tokens += sum(map(len, completions))
    order = torch.randperm(len(buffer)).tolist()
    loss, norm = timed("update", update, model, optimizer, [buffer[i] for i in order], config)
    return {**spent, "tokens": tokens, "loss": loss, "grad_norm": norm}
