"""How far from the machine's limits is a step? The floor of each phase, what was measured, and floor ÷ measured.

    python benchmarks/roofline.py                                the bundled model and task, then results/roofline.md
    python benchmarks/roofline.py --profile results/profile.png      also a picture of where the time goes
    python benchmarks/roofline.py --model FOLDER --questions 2 --group_size 4 --prompt_tokens 64 --completion_tokens 32
    python benchmarks/roofline.py -- --precision bf16 --gradient_checkpointing true    further flags of train.py

First the ceilings of this machine are measured: matrix products (FLOP/s) and memory (bytes/s). Then the work of each
phase is counted from the model's own modules and from the lengths of the very completions that were sampled, and
divided by the ceilings: no program on this machine does that work in less. The phases are those of train.py, run by
its own functions. Two things differ from a training run, so that each step is the same work: the learning rate is next
to nothing, and the advantages are ±1, so that no completion is left out.

The floor takes the best rates of all that were tried; "at its shapes" takes those of the phase's own shapes (and of
reading as much as a decode step does), so the gap between the two floors is the machine's, and the gap from there to
the measured time is ours (and that of whatever else runs on the machine: run it alone). Counted as if every matrix
product took part for every token (dense models), with full causal attention.
"""

import argparse
import contextlib
import itertools
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from config import Config, Parser, parse_config, plural  # noqa: E402
from data import QuestionStream  # noqa: E402
from errors import UserError, choose, command  # noqa: E402
from replay_buffer import ReplayBuffer  # noqa: E402

PHASES = ("rollout: prefill", "rollout: decode", "log-probabilities", "update")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ADAM_BYTES = (
    7 * 4
)  # of each parameter: weight, gradient and both moments read, weight and moments written, in fp32


# ------------------------------------------------------------------------------------------------------- ceilings


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do at best: matmul[dtype][shape] in FLOP/s, memory[way] in bytes/s."""

    matmul: dict[str, dict[str, float]]
    memory: dict[str, float]

    @property
    def bandwidth(self) -> float:
        """The best memory rate, bytes/s."""
        return max(self.memory.values())


def synchronize(device: torch.device) -> None:
    """Wait for what was asked of a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(run: Callable[[], Any], device: torch.device, budget: float = 0.4) -> float:
    """The shortest of several runs, after a warm-up; seconds. A ceiling is a best, not a mean."""
    run()
    best, end = math.inf, time.perf_counter() + budget
    while time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(3):
            run()
        synchronize(device)
        best = min(best, (time.perf_counter() - start) / 3)
    return best


def matmul_rate(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of (m, k) × (k, n), which is 2 m k n FLOP, in the layout of nn.Linear."""
    m, k, n = shape
    x, weight = (
        torch.randn(m, k, device=device).to(dtype),
        torch.randn(n, k, device=device).to(dtype),
    )
    return 2 * m * k * n / best_seconds(lambda: nn.functional.linear(x, weight), device)


def copy_rate(size: float, device: torch.device) -> float:
    """Bytes/s, read and written, of a copy of `size` bytes."""
    source = torch.ones(int(size) // 4, device=device)
    target = torch.empty_like(source)
    return 8 * source.numel() / best_seconds(lambda: target.copy_(source), device)


def read_rate(size: float, device: torch.device) -> float:
    """Bytes/s read by a product of a matrix of `size` bytes with a vector: 2 FLOP for each 4 bytes."""
    columns = 1024
    matrix = torch.ones(max(1, int(size) // 4 // columns), columns, device=device)
    vector = torch.ones(columns, device=device)
    return 4 * matrix.numel() / best_seconds(lambda: torch.mv(matrix, vector), device)


def measure_ceilings(
    shapes: dict[str, tuple[int, int, int]], working_set: float, device: torch.device
) -> Ceilings:
    """Try every shape in both precisions; memory at a large size and at `working_set` bytes, which may fit a cache."""
    with torch.no_grad():
        matmul = {
            name: {s: matmul_rate(mkn, d, device) for s, mkn in shapes.items()}
            for name, d in DTYPES.items()
        }
        large = 2**30 if device.type == "cuda" else 2**28
        memory = {
            f"copy, {large >> 20} MB": copy_rate(large, device),
            f"matrix × vector, {large >> 20} MB": read_rate(large, device),
            f"matrix × vector, {working_set / 2**20:.1f} MB (a decode step's)": read_rate(
                working_set, device
            ),
        }
    return Ceilings(matmul, memory)


# --------------------------------------------------------------------------------------------- the work of a phase


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
        """Counted from the modules; embeddings are looked up, not multiplied. UserError for models without a head."""
        head, config = model.get_output_embeddings(), model.config
        if head is None:
            raise UserError(
                f"{type(model).__name__} names no output layer, so its work cannot be counted."
            )
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

        tokens: that go through the layers; heads: of which logits are read; pairs: (query, key) in one layer under the
        causal mask, each 2 FLOP × width for q·k and as many for weight × v.
        """
        return 2 * self.body * tokens + 2 * self.head * heads + 4 * self.layers * self.width * pairs


@dataclass(frozen=True)
class Work:
    """What a step had to do: for each question its prompt's length, and the lengths of its completions, in tokens."""

    prompts: list[int]
    completions: list[list[int]]

    @property
    def rows(self) -> np.ndarray:
        """(prompt, completion) of every sequence, int (N, 2), in the order of the rollout."""
        return np.array(
            [(p, c) for p, group in zip(self.prompts, self.completions, strict=True) for c in group]
        )


@dataclass(frozen=True)
class Rates:
    """FLOP/s of the matrix products, bytes/s of the memory, bytes of a number in weights and cache."""

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

    Step s of a call feeds the s-th token of each completion that is longer than s, at context P + s: 2 (body + head)
    FLOP a row and its attention; bytes: the weights once, and the keys and values of every row's context, 2 layers ×
    kv_width × context numbers. (Rows of a group could read their prompt's keys together; generate does not.)
    """
    rows = work.rows
    for chunk in (
        rows[i : i + config.rollout_batch_size]
        for i in range(0, len(rows), config.rollout_batch_size)
    ):
        for s in range(1, chunk[:, 1].max()):
            alive = chunk[chunk[:, 1] > s, 0] + s
            context = float(alive.sum())
            cache = 2 * size.layers * size.kv_width * context
            yield (
                size.operations(len(alive), len(alive), context),
                (size.body + size.head + cache) * number,
            )


def decode_floor(size: Size, work: Work, config: Config, rates: Rates) -> float:
    """Seconds: Σ over steps of max(FLOP ÷ rate, bytes ÷ bandwidth)."""
    steps = decode_steps(size, work, config, rates.number)
    return sum(
        max(operations / rates.decode, moved / rates.bandwidth) for operations, moved in steps
    )


def forward_work(size: Size, work: Work) -> tuple[float, float]:
    """FLOP of one forward pass over everything, each prompt once for its group: of the layers, and of the head.

    Tokens Σ P + Σ C, logits for Σ C, pairs Σ P (P + 1) / 2 + Σ (C P + C (C + 1) / 2).
    """
    p, (prompt, c) = np.array(work.prompts), work.rows.T
    pairs = (p * (p + 1) / 2).sum() + (c * prompt + c * (c + 1) / 2).sum()
    return size.operations(p.sum() + c.sum(), 0, pairs), size.operations(0, c.sum(), 0)


def log_probs_floor(size: Size, work: Work, config: Config, rates: Rates) -> float:
    """Seconds of the old or of the reference's log-probabilities: max(FLOP ÷ rate, weights once ÷ bandwidth)."""
    moved = (size.body + size.head) * rates.number
    return max(sum(forward_work(size, work)) / rates.tokens, moved / rates.bandwidth)


def update_floor(size: Size, work: Work, config: Config, rates: Rates) -> float:
    """Seconds of forward, backward (twice the FLOP of forward) and optimizer.

    With gradient checkpointing the layers go forward once more. Bytes: the weights in each pass of each micro-batch;
    7 × 4 bytes a parameter in each step of Adam. What ours computes again besides (the logits) is no part of a floor.
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


# ------------------------------------------------------------------------------------------------ our own trainer


def build_trainer(config: Config) -> train.Trainer:
    """train.build, without its words."""
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        trainer = train.build(config, None)
    trainer.policy.eval()
    return trainer


def set_prompt_length(t: train.Trainer, length: int) -> None:
    """Give every question a prompt of `length` random tokens."""
    generator = np.random.default_rng(t.config.seed)
    usual = min(len(t.tokenizer), Size.of(t.model).vocabulary)
    ids = generator.integers(usual, size=(len(t.questions.questions), length)).tolist()
    questions = [
        replace(q, prompt_ids=row) for q, row in zip(t.questions.questions, ids, strict=True)
    ]
    t.questions = QuestionStream(questions, t.config.seed)


def forbid_end(t: train.Trainer) -> None:
    """Take the end tokens out of what the sampler sees, so that each completion has its full length."""
    own = t.model.generation_config.eos_token_id
    ends = [t.tokenizer.eos_token_id, *([own] if isinstance(own, int) else own or [])]

    def hook(module: nn.Module, inputs: tuple, output: Any) -> None:
        if not torch.is_grad_enabled() and isinstance(output.get("logits"), Tensor):
            output["logits"][..., ends] = -1e30

    for model in filter(
        None, (t.model, vars(t).get("twin"))
    ):  # the twin samples where the arithmetic is bf16
        model.register_forward_hook(hook)


class Step:
    """One step of training in pieces, each of which can be called (and timed, or profiled) on its own."""

    def __init__(self, t: train.Trainer, number: int) -> None:
        self.t, self.number, self.buffer = t, number, ReplayBuffer()
        self.generator = train.seed_step(t.config.seed, number)
        self.groups: list[train.Group] = []

    def ask(self) -> None:
        """The rollout."""
        self.groups = train.ask(self.t, self.t.config.rollouts_per_step)

    def prefill(self) -> None:
        """The same questions again, with one token each: a rollout without decoding."""
        again = QuestionStream([g.question for g in self.groups], self.t.config.seed)
        short = replace(self.t, questions=again, config=replace(self.t.config, max_new_tokens=1))
        train.ask(short, self.t.config.rollouts_per_step)

    def prepare(self) -> None:
        """mark, compare, remember; the advantages replaced by ±1."""
        self.groups = train.mark(self.t, self.groups)
        advantages = torch.ones_like(train.compare(self.t, self.groups))
        advantages[:, ::2] = -1
        train.remember(self.t, self.buffer, self.groups, advantages)

    def log_probs(self) -> None:
        """What the old policy (or the reference, which is the same work) says of the tokens."""
        train.recall(self.t, self.buffer.items, old=True, ref=False)

    def learn(self) -> None:
        """The update."""
        train.learn(self.t, self.buffer, self.number, self.generator)

    @property
    def work(self) -> Work:
        """The lengths of what was sampled."""
        prompts = [len(g.question.prompt_ids) for g in self.groups]
        return Work(prompts, [[len(c.ids) for c in g.completions] for g in self.groups])


def seconds(run: Callable[[], None], device: torch.device) -> float:
    """Wall time of one call."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def timed_step(t: train.Trainer, number: int) -> tuple[dict[str, float], Work]:
    """Seconds of each phase of one step, and its work. Decoding is the rollout less a rollout of one token."""
    step, device = Step(t, number), t.accelerator.device
    whole = seconds(step.ask, device)
    prefill = seconds(step.prefill, device)
    step.prepare()
    log_probs, update = seconds(step.log_probs, device), seconds(step.learn, device)
    return dict(zip(PHASES, (prefill, whole - prefill, log_probs, update), strict=True)), step.work


# -------------------------------------------------------------------------------------------------------- profile

OTHER = "python and the rest"
# The first rule whose pattern fits the name of an operation; what fits none is python and the rest.
KINDS = (
    ("attention", r"scaled_dot_product|flash_attention|efficient_attention|cudnn_attention|\bbmm|baddbmm"),
    ("matmul", r"\b(mm|addmm|linear|_addmm|matmul|mkldnn_linear|mkl_linear)\b"),
    ("softmax, log-probs", r"softmax|logsumexp|gather|scatter|nll|log\b|exp\b"),
    ("sampling", r"multinomial|exponential|argmax|isin|sort|topk|cumsum|uniform|any\b|all\b"),
    ("cache: copies, cat", r"\bcat\b|copy_|index_select|index_copy|\bindex\b|index_put|clone|fill_|zero_|slice_back"),
    ("norm, activation, rotary", r"aten::(mul|add|sub|div|neg|rsqrt|mean|pow|silu|gelu|tanh|sum|sin|cos|sigmoid|"
     r"relu|rms_norm|layer_norm|native_layer_norm|_fused_rms_norm|where|clamp|maximum|square|sqrt|reciprocal|"
     r"silu_backward|gelu_backward|embedding|embedding_dense_backward|masked_fill|native_layer_norm_backward)_?$"),
)  # fmt: skip
COLORS = dict(zip(
    ["matmul", "attention", "cache: copies, cat", "sampling", "norm, activation, rotary", "softmax, log-probs",
     "optimizer", OTHER],
    ["#4269d0", "#9c6b4e", "#efb118", "#6cc5b0", "#3ca951", "#a463f2", "#ff725c", "#9498a0"],
    strict=True,
))  # fmt: skip


def kind_of(event: Any, rollout: bool) -> str:
    """The kind of work of a profiled operation; in a rollout what happens to the logits is sampling."""
    parent = event
    while parent is not None:
        if parent.name.startswith("Optimizer."):
            return "optimizer"
        parent = parent.cpu_parent
    name = event.name
    if name == "aten::cat" and event.input_shapes:
        parts = [tuple(s) for s in event.input_shapes[0] or [] if isinstance(s, list | tuple)]
        if len(parts) == 2 and parts[0] == parts[1]:  # rotate_half
            return "norm, activation, rotary"
    found = next((kind for kind, pattern in KINDS if re.search(pattern, name)), OTHER)
    return "sampling" if rollout and found == "softmax, log-probs" else found


def profiled(run: Callable[[], None], device: torch.device, rollout: bool) -> dict[str, float]:
    """Seconds of each kind in one call, which add up to its wall time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    cuda = device.type == "cuda"
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        whole = seconds(run, device)
    kinds = dict.fromkeys(COLORS, 0.0)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CPU and event.name.startswith("aten::"):
            own = event.self_device_time_total if cuda else event.self_cpu_time_total
            kinds[kind_of(event, rollout)] += own / 1e6
    kinds[OTHER] += max(0.0, whole - sum(kinds.values()))
    return kinds


def picture(shares: dict[str, dict[str, float]], title: str, path: Path) -> None:
    """A stacked bar for each phase: which share of its time each kind takes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 1.1 + 0.75 * len(shares)), constrained_layout=True)
    for row, (_phase, kinds) in enumerate(shares.items()):
        whole, left = sum(kinds.values()), 0.0
        for kind, value in kinds.items():
            part = 100 * value / whole
            axes.barh(
                row,
                part,
                left=left,
                height=0.62,
                color=COLORS[kind],
                label=kind if row == 0 else None,
            )
            if part >= 4:
                axes.text(
                    left + part / 2,
                    row,
                    f"{part:.0f}",
                    ha="center",
                    va="center",
                    color="white",
                    fontsize=9,
                )
            left += part
    axes.set_yticks(
        range(len(shares)), [f"{p}\n{sum(k.values()):.2f} s" for p, k in shares.items()]
    )
    axes.set(xlim=(0, 100), xlabel="% of the time under the profiler")
    axes.set_title(title, fontsize=10, loc="left")
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def profile_step(t: train.Trainer, number: int) -> dict[str, dict[str, float]]:
    """Seconds by kind of one rollout and of one update."""
    step, device = Step(t, number), t.accelerator.device
    shares = {"rollout": profiled(step.ask, device, rollout=True)}
    step.prepare()
    return shares | {"update": profiled(step.learn, device, rollout=False)}


# --------------------------------------------------------------------------------------------------------- report


def machine(device: torch.device) -> str:
    """The machine in words: cores and name, never where it is."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
        name = names[0] if names else name
    words = f"{os.cpu_count()} CPU cores, {name}"
    if device.type == "cuda":
        words += f", {torch.cuda.get_device_name(device)}"
    return words


def versions() -> str:
    """What ran."""
    return f"Python {platform.python_version()}, PyTorch {torch.__version__}, transformers {transformers.__version__}"


def command_line(argv: list[str]) -> str:
    """The command, each path shortened to its last name."""
    program = f"benchmarks/{Path(sys.argv[0]).name}"
    return " ".join(
        ["python", program, *(Path(a).name if Path(a).is_absolute() else a for a in argv)]
    )


def ceilings_table(ceilings: Ceilings, shapes: dict[str, tuple[int, int, int]]) -> list[str]:
    """The machine's limits, as Markdown."""
    lines = ["| matrix product | m × k × n | fp32, TFLOP/s | bf16, TFLOP/s |", "|---|---|---|---|"]
    for name, shape in shapes.items():
        fp32, bf16 = (ceilings.matmul[d][name] / 1e12 for d in DTYPES)
        lines.append(f"| {name} | {' × '.join(map(str, shape))} | {fp32:.3f} | {bf16:.3f} |")
    lines += ["", "| memory | GB/s |", "|---|---|"]
    return lines + [f"| {name} | {rate / 1e9:.1f} |" for name, rate in ceilings.memory.items()]


def phase_table(rows: dict[str, tuple[float, float, float]]) -> list[str]:
    """Measured, floor and share of each phase, as Markdown; rows: phase to (measured, floor, floor at its shapes)."""
    lines = ["| phase | measured, s | floor, s | floor ÷ measured | floor at its shapes, s | that ÷ measured |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    total = tuple(map(sum, zip(*rows.values(), strict=True)))
    for name, (measured, floor, shaped) in [*rows.items(), ("together", total)]:
        shares = f"{floor / measured:.1%} | {shaped:.3f} | {shaped / measured:.1%}"
        lines.append(f"| {name} | {measured:.3f} | {floor:.3f} | {shares} |")
    return lines


def model_shapes(
    size: Size, work: Work, config: Config, device: torch.device
) -> dict[str, tuple[int, int, int]]:
    """The matrix products to try: m × k × n. The first is the machine's best, the others are this workload's."""
    square = 8192 if device.type == "cuda" else 1024
    rows = min(len(work.rows), config.rollout_batch_size)
    lengths = work.rows.mean(0)
    tokens = round(min(len(work.rows), config.micro_batch) * lengths.sum())
    return {
        "large": (square, square, square),
        "decode: a token of each row": (rows, size.hidden, size.inner),
        "decode, half of the rows": (max(1, rows // 2), size.hidden, size.inner),
        "update: the tokens of a micro-batch": (tokens, size.hidden, size.inner),
        "head: its completions' tokens": (
            round(min(len(work.rows), config.micro_batch) * lengths[1]), size.hidden, size.vocabulary
        ),
    }  # fmt: skip


def measure(
    t: train.Trainer, steps: int
) -> tuple[Ceilings, dict, dict[str, tuple[float, float, float]], Work]:
    """A warm-up step, the ceilings, then `steps` steps: medians of measured time and floors."""
    config, device, size = t.config, t.accelerator.device, Size.of(t.model)
    _, work = timed_step(t, 1)
    name = "fp32" if config.precision == "fp32" else "bf16"
    number = DTYPES[name].itemsize
    shapes = model_shapes(size, work, config, device)
    moved = [b for _, b in decode_steps(size, work, config, number)] or [size.body * number]
    ceilings = measure_ceilings(shapes, statistics.mean(moved), device)
    matmul = ceilings.matmul[name]
    best = Rates(max(matmul.values()), max(matmul.values()), ceilings.bandwidth, number)
    shaped = Rates(
        matmul["decode: a token of each row"],
        matmul["update: the tokens of a micro-batch"],
        list(ceilings.memory.values())[-1],
        number,
    )
    found = [timed_step(t, i + 2) for i in range(steps)]
    rows = {
        phase: (
            statistics.median(s[phase] for s, _ in found),
            *(
                statistics.median(FLOORS[phase](size, w, config, r) for _, w in found)
                for r in (best, shaped)
            ),
        )
        for phase in PHASES
    }
    return ceilings, shapes, rows, found[-1][1]


def report(t: train.Trainer, argv: list[str], steps: int, out: Path) -> None:
    """Measure, print, and write results/roofline.md."""
    config, device, size = t.config, t.accelerator.device, Size.of(t.model)
    ceilings, shapes, rows, work = measure(t, steps)
    prompt, completion = work.rows.mean(0)
    lines = [
        f"`{command_line(argv)}` on {machine(device)}, {torch.get_num_threads()} "
        f"{plural(torch.get_num_threads(), 'thread')}; {versions()}.",
        "",
        f"{Path(config.model).name}: {size.parameters / 1e6:.2f} million parameters, of them {size.body / 1e6:.2f} in "
        f"the layers and {size.head / 1e6:.2f} in the head. {config.arithmetic}. {config.precision}, gradient "
        f"checkpointing {'on' if config.gradient_checkpointing else 'off'}; on average {prompt:.0f} tokens of prompt, "
        f"{completion:.0f} of completion (the longest {work.rows[:, 1].max()}). Medians of {steps} "
        f"{plural(steps, 'step')}.",
        "",
        *phase_table(rows),
        "",
        "log-probabilities: of the old policy, or of the reference; a run computes each only where its objective asks "
        "for it.",
        "",
        *ceilings_table(ceilings, shapes),
    ]
    print("\n".join(lines))
    out.mkdir(parents=True, exist_ok=True)
    (out / "roofline.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{text!r} is not a whole number of 1 or more.")
    return int(text)


def available(device: str) -> str:
    """`device` as the flag has it, auto decided; UserError for one that is not there."""
    choose(device, ("auto", "cuda", "cpu"), "device")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("There is no CUDA GPU here; --device cpu measures on the CPU.")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def read_flags(argv: list[str]) -> Any:
    """The command line of this benchmark."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="tiny/model", help="a Hugging Face folder, or a hub name"
    )
    parser.add_argument("--device", default="auto", help="cuda, cpu or auto")
    parser.add_argument("--threads", type=positive, help="CPU threads; else PyTorch's own choice")
    parser.add_argument("--questions", type=positive, default=32)
    parser.add_argument("--group_size", type=positive, default=8)
    parser.add_argument(
        "--prompt_tokens", type=positive, help="random prompts of this length; else the task's own"
    )
    parser.add_argument(
        "--completion_tokens", type=positive, help="of exactly this length; else as they end"
    )
    parser.add_argument("--micro_batch_size", type=positive, default=128)
    parser.add_argument("--steps", type=positive, default=3, help="steps to take the median of")
    parser.add_argument("--profile", type=Path, help="where to draw the picture of the time's use")
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    parser.add_argument("flags", nargs="*", help="further flags of train.py, after --")
    return parser.parse_args(argv)


def make_config(
    model: str, questions: int, group_size: int, micro: int, max_new_tokens: int, *flags: str
) -> Config:
    """The preset `tiny` at these sizes: one optimizer step of each rollout, no evaluation, hardly any learning."""
    sequences = questions * group_size
    settings = {
        "preset": "tiny", "model": model, "rollouts_per_step": questions, "group_size": group_size, "lr": 1e-12,
        "train_batch_size": sequences, "micro_batch_size": min(micro, sequences), "max_new_tokens": max_new_tokens,
        "eval_interval": 0, "max_prompt_tokens": 256,
    }  # fmt: skip
    given = list(itertools.chain.from_iterable((f"--{k}", str(v)) for k, v in settings.items()))
    return parse_config([*given, *flags])[0]


@command
def main(argv: list[str]) -> None:
    """Build the trainer, measure, report; the profile last."""
    args = read_flags(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    config = make_config(
        args.model, args.questions, args.group_size, args.micro_batch_size, args.completion_tokens or 48,
        "--device", args.device, *args.flags,
    )  # fmt: skip
    t = build_trainer(config)
    if args.prompt_tokens:
        set_prompt_length(t, args.prompt_tokens)
    if args.completion_tokens:
        forbid_end(t)
    report(t, argv, args.steps, args.out)
    if args.profile:
        shares = profile_step(t, args.steps + 2)
        threads = f"{torch.get_num_threads()} {plural(torch.get_num_threads(), 'thread')}"
        title = (
            f"One step of {Path(config.model).name}: {config.arithmetic.split(';')[0]}, {threads}"
        )
        picture(shares, title, args.profile)
        for phase, kinds in shares.items():
            whole = sum(kinds.values())
            print(
                f"{phase}: "
                + ", ".join(f"{kind} {value / whole:.0%}" for kind, value in kinds.items())
            )


if __name__ == "__main__":
    main()
