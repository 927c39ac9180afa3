"""How fast could this machine make a step, and how fast is ours? Prefill, decoding, update.

    python benchmarks/roofline.py                     then results/roofline.md; about a minute
    python benchmarks/roofline.py --profile results/profile.png
    python benchmarks/roofline.py --model FOLDER --prompt_tokens 64 --completion_tokens 64

The limits of the machine are measured: matrix products (FLOP/s) and memory (bytes/s). Then the work
of each phase is counted from the model's own modules and from the lengths of the very completions
that were sampled, and divided by the limits: no program on this machine does that work in less. The
phases are those of train.py, run by its own functions. Two things differ from training, so that
each step is the same work: the learning rate is next to nothing, and advantages are ±1.

The floor takes the best rates of all that were tried. "At its shapes" takes those of the phase's
own shapes (and of reading as much as a decode step does). The gap between the two floors is the
machine's; the gap from there to the measured time is ours (and that of whatever else runs here: run
it alone). Counted as if every matrix product took part for every token (dense models), with full
causal attention.
"""

import argparse
import contextlib
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    RESULTS,
    command_line,
    machine,
    positive,
    pyplot,
    seconds,
    synchronize,
    table,
    versions,
    write_lines,
)
from torch import Tensor, nn

import train
from replay_buffer import ReplayBuffer
from rollout import Group
from support.command_line import Parser, parse_config
from support.config import Config, plural
from support.data import QuestionStream
from support.errors import UserError, command
from support.generation import Sampling, end_tokens
from support.model import set_learning_rate
from support.schedule import seed_step

PHASES = ("rollout: prefill", "rollout: decode", "log-probabilities", "update")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of each parameter: weight, gradient and both moments read, weight and moments written, in fp32.
ADAM_BYTES = 7 * 4

Shapes = dict[str, tuple[int, int, int]]  # name: m, k, n of a product (m, k) × (k, n)


# --------------------------------------------------------------------- what the machine can do


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do at best: matmul[dtype][shape] in FLOP/s, memory[way] in bytes/s."""

    matmul: dict[str, dict[str, float]]
    memory: dict[str, float]


def best_seconds(run: Callable[[], Any], budget: float = 0.4) -> float:
    """The shortest of several runs, after a warm-up: a limit is a best, not a mean."""
    run()
    best, end = math.inf, time.perf_counter() + budget
    while time.perf_counter() < end:
        synchronize()
        start = time.perf_counter()
        for _ in range(3):
            run()
        synchronize()
        best = min(best, (time.perf_counter() - start) / 3)
    return best


def matmul_rate(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of (m, k) × (k, n), which is 2 m k n FLOP, in the layout of nn.Linear."""
    m, k, n = shape
    x = torch.randn(m, k, device=device).to(dtype)
    weight = torch.randn(n, k, device=device).to(dtype)
    return 2 * m * k * n / best_seconds(lambda: nn.functional.linear(x, weight))


def copy_rate(size: float, device: torch.device) -> float:
    """Bytes/s, read and written, of a copy of `size` bytes."""
    source = torch.ones(int(size) // 4, device=device)
    target = torch.empty_like(source)
    return 8 * source.numel() / best_seconds(lambda: target.copy_(source))


def read_rate(size: float, device: torch.device) -> float:
    """Bytes/s of a matrix of `size` bytes times a vector: 2 FLOP for each 4 bytes read."""
    columns = 1024
    matrix = torch.ones(max(1, int(size) // 4 // columns), columns, device=device)
    vector = torch.ones(columns, device=device)
    return 4 * matrix.numel() / best_seconds(lambda: torch.mv(matrix, vector))


@torch.no_grad()
def measure_ceilings(shapes: Shapes, working_set: float, device: torch.device) -> Ceilings:
    """Every shape in both precisions; memory at a large size, and at `working_set` bytes."""
    matmul = {
        name: {s: matmul_rate(mkn, dtype, device) for s, mkn in shapes.items()}
        for name, dtype in DTYPES.items()
    }
    large = 2**30 if device.type == "cuda" else 2**28
    small = f"matrix × vector, {working_set / 2**20:.1f} MB (a decode step's)"
    memory = {
        f"copy, {large >> 20} MB": copy_rate(large, device),
        f"matrix × vector, {large >> 20} MB": read_rate(large, device),
        small: read_rate(working_set, device),
    }
    return Ceilings(matmul, memory)


# --------------------------------------------------------------------- the work of a phase


@dataclass(frozen=True)
class Size:
    """A model, as far as work is concerned."""

    parameters: int  # all of them, each once
    body: int  # those of the matrix products outside the head
    head: int  # V × hidden size
    layers: int
    width: int  # query heads × head size
    kv_width: int  # key-value heads × head size
    hidden: int
    inner: int  # columns of the largest matrix of a layer
    vocabulary: int

    @classmethod
    def of(cls, model: nn.Module) -> "Size":
        """Counted from the modules (embeddings are looked up, not multiplied)."""
        head, config = model.get_output_embeddings(), model.config
        if head is None:
            name = type(model).__name__
            raise UserError(f"{name} names no output layer, so its work cannot be counted.")
        matrices = [
            p.shape
            for module in model.modules()
            if not isinstance(module, nn.Embedding) and module is not head
            for p in module.parameters(recurse=False)
            if p.dim() >= 2
        ]
        heads = config.num_attention_heads
        head_size = vars(config).get("head_dim") or config.hidden_size // heads
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),
            body=sum(map(math.prod, matrices)),
            head=head.weight.numel(),
            layers=config.num_hidden_layers,
            width=heads * head_size,
            kv_width=(vars(config).get("num_key_value_heads") or heads) * head_size,
            hidden=config.hidden_size,
            inner=max(max(shape) for shape in matrices),
            vocabulary=head.weight.shape[0],
        )

    def operations(self, tokens: float, heads: float, pairs: float) -> float:
        """FLOP of a forward pass: 2 body × tokens + 2 head × heads + 4 layers × width × pairs.

        tokens: that go through the layers; heads: of which logits are read; pairs: (query, key) in
        one layer under the causal mask, each 2 FLOP × width for q·k and as many for weight × v.
        """
        return 2 * self.body * tokens + 2 * self.head * heads + 4 * self.layers * self.width * pairs


@dataclass(frozen=True)
class Work:
    """What a step had to do: the length of each prompt, and of each of its completions."""

    prompts: list[int]
    completions: list[list[int]]

    @property
    def rows(self) -> np.ndarray:
        """(prompt, completion) of every sequence, int (N, 2), in the order of the rollout."""
        groups = zip(self.prompts, self.completions, strict=True)
        return np.array([(prompt, length) for prompt, group in groups for length in group])


@dataclass(frozen=True)
class Rates:
    """FLOP/s of matrix products, bytes/s of the memory, bytes of a number in weights and cache."""

    decode: float
    tokens: float
    bandwidth: float
    number: int


def prefill_floor(size: Size, work: Work, config: Config, rates: Rates) -> float:
    """Seconds: max(FLOP ÷ rate, weights ÷ bandwidth), each prompt once for its whole group.

    FLOP of Σ P tokens, one row of logits each, Σ P (P + 1) / 2 pairs.
    """
    p = np.array(work.prompts)
    operations = size.operations(p.sum(), len(p), (p * (p + 1) / 2).sum())
    return max(operations / rates.tokens, (size.body + size.head) * rates.number / rates.bandwidth)


def decode_steps(
    size: Size, work: Work, config: Config, number: int
) -> Iterator[tuple[float, float]]:
    """(FLOP, bytes) of every step of decoding, the batch shrinking as rows finish.

    Step s of a call feeds the s-th token of each completion that is longer than s, at context
    P + s: 2 (body + head) FLOP a row and its attention; bytes: the weights once, and the keys and
    values of every row's context, 2 layers × kv_width × context numbers. (The rows of a group could
    read the keys of their prompt together; generate does not.)
    """
    rows = work.rows
    for start in range(0, len(rows), config.rollout_batch_size):
        chunk = rows[start : start + config.rollout_batch_size]
        for s in range(1, chunk[:, 1].max()):
            alive = chunk[chunk[:, 1] > s, 0] + s
            context = float(alive.sum())
            cache = 2 * size.layers * size.kv_width * context
            operations = size.operations(len(alive), len(alive), context)
            yield operations, (size.body + size.head + cache) * number


def decode_floor(size: Size, work: Work, config: Config, rates: Rates) -> float:
    """Seconds: Σ over steps of max(FLOP ÷ rate, bytes ÷ bandwidth)."""
    steps = decode_steps(size, work, config, rates.number)
    return sum(max(flop / rates.decode, moved / rates.bandwidth) for flop, moved in steps)


def forward_work(size: Size, work: Work) -> tuple[float, float]:
    """FLOP of one forward pass over everything, each prompt once: of the layers, of the head.

    Tokens Σ P + Σ C, logits for Σ C, pairs Σ P (P + 1) / 2 + Σ (C P + C (C + 1) / 2).
    """
    p, (prompt, c) = np.array(work.prompts), work.rows.T
    pairs = (p * (p + 1) / 2).sum() + (c * prompt + c * (c + 1) / 2).sum()
    return size.operations(p.sum() + c.sum(), 0, pairs), size.operations(0, c.sum(), 0)


def log_probs_floor(size: Size, work: Work, config: Config, rates: Rates) -> float:
    """Seconds of the log-probabilities of one model: max(FLOP ÷ rate, weights ÷ bandwidth)."""
    moved = (size.body + size.head) * rates.number
    return max(sum(forward_work(size, work)) / rates.tokens, moved / rates.bandwidth)


def update_floor(size: Size, work: Work, config: Config, rates: Rates) -> float:
    """Seconds of forward, backward (twice the FLOP of forward) and optimizer.

    With gradient checkpointing the layers go forward once more. Bytes: the weights in each pass of
    each micro-batch; 7 × 4 bytes a parameter in each step of Adam. What ours computes twice (the
    logits) is no part of a floor.
    """
    body, head = forward_work(size, work)
    passes = 4 if config.gradient_checkpointing else 3
    calls = config.epochs_per_step * math.ceil(len(work.rows) / config.micro_batch)
    operations = config.epochs_per_step * (passes * body + 3 * head)
    moved = calls * (passes * size.body + 3 * size.head) * rates.number
    adam = config.optimizer_steps * ADAM_BYTES * size.parameters / rates.bandwidth
    return max(operations / rates.tokens, moved / rates.bandwidth) + adam


FLOORS = dict(
    zip(PHASES, (prefill_floor, decode_floor, log_probs_floor, update_floor), strict=True)
)


# --------------------------------------------------------------------- our own trainer


def build_trainer(config: Config) -> train.Trainer:
    """train.build, without its words."""
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        trainer = train.build(config, None)
    trainer.policy.eval()
    return trainer


def set_prompt_length(trainer: train.Trainer, length: int) -> None:
    """Give every question a prompt of `length` random tokens."""
    config, questions = trainer.config, trainer.questions.questions
    usual = min(len(trainer.tokenizer), Size.of(trainer.policy.model).vocabulary)
    generator = np.random.default_rng(config.seed)
    ids = generator.integers(usual, size=(len(questions), length)).tolist()
    questions = [replace(q, prompt_ids=row) for q, row in zip(questions, ids, strict=True)]
    trainer.questions = QuestionStream(questions, config.seed)


def forbid_end(trainer: train.Trainer) -> None:
    """Hide the end tokens from the sampler, so that each completion has its full length."""
    ends = end_tokens(trainer.policy.model, trainer.tokenizer)

    def hook(module: nn.Module, inputs: tuple, output: Any) -> None:
        if not torch.is_grad_enabled() and isinstance(output.get("logits"), Tensor):
            output["logits"][..., ends] = -1e30

    # Where the arithmetic is bf16, a copy of the model samples.
    for model in filter(None, (trainer.policy.model, trainer.policy.bf16_copy)):
        model.register_forward_hook(hook)


class Step:
    """One step of training in pieces, each of which can be timed, or profiled, on its own."""

    def __init__(self, trainer: train.Trainer, number: int) -> None:
        self.trainer, self.buffer = trainer, ReplayBuffer()
        self.groups: list[Group] = []
        self.generator = seed_step(trainer.config.seed, number)
        set_learning_rate(trainer.optimizer, trainer.config, number)

    def sample(self) -> None:
        """The rollout."""
        config = self.trainer.config
        questions = self.trainer.questions.take(config.rollouts_per_step)
        self.groups = self.trainer.sample(questions, config.group_size, Sampling.of(config))

    def prefill(self) -> None:
        """The same questions again, with one token each: a rollout without decoding."""
        config, questions = self.trainer.config, [group.question for group in self.groups]
        short = replace(Sampling.of(config), max_new_tokens=1)
        self.trainer.sample(questions, config.group_size, short)

    def prepare(self) -> None:
        """The log-probabilities that the update needs; advantages of ±1."""
        count = sum(len(group.completions) for group in self.groups)
        experiences = train.add_log_probs(self.trainer, self.groups, list(range(count)))
        advantages = torch.ones(count)
        advantages[::2] = -1
        self.buffer.fill(experiences, torch.zeros(count), advantages)

    def log_probs(self) -> None:
        """What the policy (or the reference, which is the same work) says of the tokens."""
        trainer, names = self.trainer, ["action_log_probs"]
        train.policy_pass(trainer.policy, names, self.buffer.items, trainer.micro_batch.size)

    def update(self) -> None:
        """The optimizer steps."""
        config = self.trainer.config
        sizes = config.train_batch_size, config.epochs_per_step
        for mini_batch in self.buffer.mini_batches(*sizes, self.generator):
            train.update(self.trainer, mini_batch)

    @property
    def work(self) -> Work:
        """The lengths of what was sampled."""
        prompts = [len(group.question.prompt_ids) for group in self.groups]
        return Work(prompts, [[len(c.ids) for c in group.completions] for group in self.groups])


def timed_step(trainer: train.Trainer, number: int) -> tuple[dict[str, float], Work]:
    """Seconds of each phase, and the work. Decoding is the rollout less one of a single token."""
    step = Step(trainer, number)
    whole, prefill = seconds(step.sample), seconds(step.prefill)
    step.prepare()
    times = prefill, whole - prefill, seconds(step.log_probs), seconds(step.update)
    return dict(zip(PHASES, times, strict=True)), step.work


# --------------------------------------------------------------------- profile

OTHER = "python and the rest"
COPIES = "cache: copies, cat"
ELEMENTWISE = (
    "mul add sub div neg rsqrt mean pow silu gelu tanh sum sin cos sigmoid relu rms_norm "
    "layer_norm native_layer_norm _fused_rms_norm where clamp maximum square sqrt reciprocal "
    "silu_backward gelu_backward embedding embedding_dense_backward masked_fill "
    "native_layer_norm_backward"
)
# The first rule whose pattern fits the name of an operation; what fits none is OTHER.
KINDS = {
    "attention": r"scaled_dot_product|flash_attention|efficient_attention|cudnn_attention|\bbmm|"
    r"baddbmm",
    "matmul": r"\b(mm|addmm|linear|_addmm|matmul|mkldnn_linear|mkl_linear)\b",
    "softmax, log-probs": r"softmax|logsumexp|gather|scatter|nll|log\b|exp\b",
    "sampling": r"multinomial|exponential|argmax|isin|sort|topk|cumsum|uniform|any\b|all\b",
    COPIES: r"\bcat\b|copy_|index_select|index_copy|\bindex\b|index_put|clone|fill_|zero_|"
    r"slice_back",
    "norm, activation, rotary": rf"aten::({'|'.join(ELEMENTWISE.split())})_?$",
}
COLORS = {
    "matmul": "#4269d0",
    "attention": "#9c6b4e",
    COPIES: "#efb118",
    "sampling": "#6cc5b0",
    "norm, activation, rotary": "#3ca951",
    "softmax, log-probs": "#a463f2",
    "optimizer": "#ff725c",
    OTHER: "#9498a0",
}


def kind_of(event: Any, rollout: bool) -> str:
    """The kind of a profiled operation; in a rollout what happens to the logits is sampling."""
    parent = event
    while parent is not None:
        if parent.name.startswith("Optimizer."):
            return "optimizer"
        parent = parent.cpu_parent
    if event.name == "aten::cat" and event.input_shapes:
        parts = [tuple(s) for s in event.input_shapes[0] or [] if isinstance(s, list | tuple)]
        if len(parts) == 2 and parts[0] == parts[1]:  # rotate_half
            return "norm, activation, rotary"
    found = next((k for k, pattern in KINDS.items() if re.search(pattern, event.name)), OTHER)
    return "sampling" if rollout and found == "softmax, log-probs" else found


def profiled(run: Callable[[], None], cuda: bool, rollout: bool) -> dict[str, float]:
    """Seconds of each kind in one call, which add up to its wall time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        whole = seconds(run)
    kinds = dict.fromkeys(COLORS, 0.0)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CPU and event.name.startswith("aten::"):
            own = event.self_device_time_total if cuda else event.self_cpu_time_total
            kinds[kind_of(event, rollout)] += own / 1e6
    kinds[OTHER] += max(0.0, whole - sum(kinds.values()))
    return kinds


def profile_step(trainer: train.Trainer, number: int) -> dict[str, dict[str, float]]:
    """Seconds by kind of one rollout and of one update."""
    step, cuda = Step(trainer, number), trainer.policy.device.type == "cuda"
    found = {"rollout": profiled(step.sample, cuda, rollout=True)}
    step.prepare()
    return found | {"update": profiled(step.update, cuda, rollout=False)}


def picture(found: dict[str, dict[str, float]], title: str, path: Path) -> None:
    """A stacked bar for each phase: which share of its time each kind takes."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(10, 1.1 + 0.75 * len(found)), constrained_layout=True)
    for row, kinds in enumerate(found.values()):
        whole, left = sum(kinds.values()), 0.0
        for kind, value in kinds.items():
            share = 100 * value / whole
            label = kind if row == 0 else None
            axes.barh(row, share, left=left, height=0.62, color=COLORS[kind], label=label)
            if share >= 4:
                style = {"ha": "center", "va": "center", "color": "white", "fontsize": 9}
                axes.text(left + share / 2, row, f"{share:.0f}", **style)
            left += share
    labels = [f"{phase}\n{sum(kinds.values()):.2f} s" for phase, kinds in found.items()]
    axes.set_yticks(range(len(found)), labels)
    axes.set(xlim=(0, 100), xlabel="% of the time under the profiler")
    axes.set_title(title, fontsize=10, loc="left")
    axes.invert_yaxis()
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


# --------------------------------------------------------------------- report


def ceilings_table(ceilings: Ceilings, shapes: Shapes) -> list[str]:
    """The limits of the machine, as Markdown."""
    rows = []
    for name, shape in shapes.items():
        rates = (f"{ceilings.matmul[dtype][name] / 1e12:.3f}" for dtype in DTYPES)
        rows.append([name, " × ".join(map(str, shape)), *rates])
    memory = [[name, f"{rate / 1e9:.1f}"] for name, rate in ceilings.memory.items()]
    head = ["matrix product", "m × k × n", "fp32, TFLOP/s", "bf16, TFLOP/s"]
    return [*table(head, rows), "", *table(["memory", "GB/s"], memory)]


def phase_table(rows: dict[str, tuple[float, float, float]]) -> list[str]:
    """Of each phase measured time, floor, floor at its shapes, and the shares; as Markdown."""
    total = tuple(map(sum, zip(*rows.values(), strict=True)))
    cells = [
        [
            name,
            f"{measured:.3f}",
            f"{floor:.3f}",
            f"{floor / measured:.1%}",
            f"{shaped:.3f}",
            f"{shaped / measured:.1%}",
        ]
        for name, (measured, floor, shaped) in [*rows.items(), ("together", total)]
    ]
    head = ["phase", "measured, s", "floor, s", "floor ÷ measured", "floor at its shapes, s"]
    return table([*head, "that ÷ measured"], cells)


def model_shapes(size: Size, work: Work, config: Config, device: torch.device) -> Shapes:
    """The products to try: the first is the machine's best, the others are this workload's."""
    square = 8192 if device.type == "cuda" else 1024
    rows = min(len(work.rows), config.rollout_batch_size)
    lengths, micro = work.rows.mean(0), min(len(work.rows), config.micro_batch)
    layer = size.hidden, size.inner
    return {
        "large": (square, square, square),
        "decode: a token of each row": (rows, *layer),
        "decode, half of the rows": (max(1, rows // 2), *layer),
        "update: the tokens of a micro-batch": (round(micro * lengths.sum()), *layer),
        "head: its completions' tokens": (
            round(micro * lengths[1]),
            size.hidden,
            size.vocabulary,
        ),
    }


def measure(trainer: train.Trainer, steps: int) -> tuple[list[str], list[str], Work]:
    """A warm-up step, the ceilings, then `steps` steps.

    Returns:
        the table of phases (medians of measured time and floors), that of ceilings, the last work.
    """
    config, device = trainer.config, trainer.policy.device
    size = Size.of(trainer.policy.model)
    _, work = timed_step(trainer, 1)
    name = "fp32" if config.precision == "fp32" else "bf16"
    number = DTYPES[name].itemsize
    shapes = model_shapes(size, work, config, device)
    moved = [b for _, b in decode_steps(size, work, config, number)] or [size.body * number]
    ceilings = measure_ceilings(shapes, statistics.mean(moved), device)
    matmul, memory = ceilings.matmul[name], list(ceilings.memory.values())
    best = Rates(max(matmul.values()), max(matmul.values()), max(memory), number)
    decode, tokens = "decode: a token of each row", "update: the tokens of a micro-batch"
    shaped = Rates(matmul[decode], matmul[tokens], memory[-1], number)
    found = [timed_step(trainer, i + 2) for i in range(steps)]

    def floor(phase: str, rates: Rates) -> float:
        return statistics.median(FLOORS[phase](size, w, config, rates) for _, w in found)

    rows = {
        phase: (
            statistics.median(times[phase] for times, _ in found),
            floor(phase, best),
            floor(phase, shaped),
        )
        for phase in PHASES
    }
    return phase_table(rows), ceilings_table(ceilings, shapes), found[-1][1]


def threads() -> str:
    """How many of them torch has, in words."""
    return f"{torch.get_num_threads()} {plural(torch.get_num_threads(), 'thread')}"


def report(trainer: train.Trainer, argv: list[str], steps: int, out: Path) -> None:
    """Measure, print, and write results/roofline.md."""
    config, size = trainer.config, Size.of(trainer.policy.model)
    phases, ceilings, work = measure(trainer, steps)
    prompt, completion = work.rows.mean(0)
    checkpointing = "on" if config.gradient_checkpointing else "off"
    lines = [
        f"`{command_line(argv)}` on {machine(trainer.policy.device.type)}, {threads()}; "
        f"{versions()}.",
        "",
        f"{Path(config.model).name}: {size.parameters / 1e6:.2f} million parameters, of them "
        f"{size.body / 1e6:.2f} in the layers and {size.head / 1e6:.2f} in the head. "
        f"{config.arithmetic}. {config.precision}, gradient checkpointing {checkpointing}; on "
        f"average {prompt:.0f} tokens of prompt, {completion:.0f} of completion (the longest "
        f"{work.rows[:, 1].max()}). Medians of {steps} {plural(steps, 'step')}.",
        "",
        *phases,
        "",
        "log-probabilities: of the old policy, or of the reference; a run computes each only where "
        "its objective asks for it.",
        "",
        *ceilings,
    ]
    print("\n".join(lines))
    write_lines(out / "roofline.md", lines)


def read_flags(argv: list[str]) -> argparse.Namespace:
    """The command line of this benchmark."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--model", default="tiny/model", help="a Hugging Face folder, or a hub name")
    flag("--device", default="auto", help="cuda, cpu or auto")
    flag("--threads", type=positive, help="CPU threads; else PyTorch's own choice")
    flag("--questions", type=positive, default=32)
    flag("--group_size", type=positive, default=8)
    flag("--prompt_tokens", type=positive, help="random prompts of this length; else the task's")
    flag("--completion_tokens", type=positive, help="of exactly this length; else as they end")
    flag("--micro_batch_size", type=positive, default=128)
    flag("--steps", type=positive, default=3, help="steps to take the median of")
    flag("--profile", type=Path, help="where to draw the picture of the time's use")
    flag("--out", type=Path, default=RESULTS)
    flag("flags", nargs="*", help="further flags of train.py, after --")
    return parser.parse_args(argv)


def make_config(
    model: str, questions: int, group_size: int, micro: int, max_new_tokens: int, *flags: str
) -> Config:
    """The preset `tiny` at these sizes: one optimizer step a rollout, and hardly any learning."""
    sequences = questions * group_size
    settings = {
        "preset": "tiny",
        "model": model,
        "rollouts_per_step": questions,
        "group_size": group_size,
        "train_batch_size": sequences,
        "micro_batch_size": min(micro, sequences),
        "max_new_tokens": max_new_tokens,
        "max_prompt_tokens": 256,
        "lr": 1e-12,
        "eval_interval": 0,
    }
    return parse_config([*(f"--{name}={value}" for name, value in settings.items()), *flags])[0]


@command
def main(argv: list[str]) -> None:
    """Build the trainer, measure, report; the profile last."""
    args = read_flags(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    sizes = args.questions, args.group_size, args.micro_batch_size, args.completion_tokens or 48
    trainer = build_trainer(make_config(args.model, *sizes, "--device", args.device, *args.flags))
    if args.prompt_tokens:
        set_prompt_length(trainer, args.prompt_tokens)
    if args.completion_tokens:
        forbid_end(trainer)
    report(trainer, argv, args.steps, args.out)
    if args.profile:
        found, config = profile_step(trainer, args.steps + 2), trainer.config
        words = f"{config.arithmetic.split(';')[0]}, {threads()}"
        picture(found, f"One step of {Path(config.model).name}: {words}", args.profile)
        for phase, kinds in found.items():
            whole = sum(kinds.values())
            shares = (f"{kind} {value / whole:.0%}" for kind, value in kinds.items())
            print(f"{phase}: {', '.join(shares)}")


if __name__ == "__main__":
    main()
