"""Peak memory of one update against sequence length and vocabulary: the common way, and ours.

    python benchmarks/memory.py            then results/memory.md and memory.jsonl; ten minutes
    python benchmarks/memory.py --lengths 128 --vocabularies 50000 --repeats 1

The update is forward and backward of one micro-batch: two questions with four completions each,
half of every sequence is prompt. The model is a Llama with random weights, small in its layers and
not in its vocabulary, as small real models are. What is counted comes on top of what is there
before: the model and its gradients. Four ways to the same numbers:

    plain          all logits, a copy of them in fp32, log_softmax, gather: the common way
    pieces         the completion's logits only, log-softmax in pieces (loss.py)
    shared         each prompt once for its completions, the head in pieces (shared_prompts.py)
    shared+ckpt    shared, with gradient checkpointing

Each measurement is a fresh process, on one thread, and the table has the median. On the CPU: the
highest resident size (Linux resets it on request) less the resident size before; malloc is told to
give memory back at once. On a GPU: max_memory_allocated. Each process first checks its
log-probabilities and gradient against the plain way on a short batch, to 1e-4; and the
log-probabilities and the gradient's norm must agree between the ways at full length.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import (
    RESULTS,
    available,
    command_line,
    machine,
    positive,
    table,
    versions,
    write_jsonl,
    write_lines,
)
from torch import Tensor, nn

from loss import sequences_log_probs, token_log_probs
from support.command_line import Parser
from support.errors import UserError, check_choice, command
from support.shared_prompts import share_prompts, shared_log_probs

QUESTIONS, GROUP = 2, 4
HIDDEN, LAYERS = 256, 4
TOLERANCE = 1e-4
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "1048576",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
}


# --------------------------------------------------------------------- inside a process


def build_model(vocabulary: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A Llama with random weights, the same ones every time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    )
    return LlamaForCausalLM(config).to(device, dtype)


def make_batch(length: int, vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Sequences and mask (B, P + C), and C, half of the length; neighbours share their prompt."""
    generator, prompt = torch.Generator().manual_seed(1), length // 2
    prompts = torch.randint(vocabulary, (QUESTIONS, prompt), generator=generator)
    prompts = prompts.repeat_interleave(GROUP, 0)
    completions = torch.randint(vocabulary, (len(prompts), length - prompt), generator=generator)
    sequences = torch.cat([prompts, completions], -1).to(device)
    return sequences, torch.ones_like(sequences, dtype=torch.bool), length - prompt


def plain_log_probs(
    model: nn.Module, sequences: Tensor, mask: Tensor, num_actions: int
) -> tuple[Tensor]:
    """The common way: log-softmax of all logits in fp32, (B, C)."""
    logits = model(input_ids=sequences, attention_mask=mask.long(), use_cache=False).logits
    log_probs = torch.log_softmax(logits[:, :-1].float(), -1)
    found = log_probs.gather(-1, sequences[:, 1:, None]).squeeze(-1)
    return (found[:, -num_actions:],)


SHARED = partial(shared_log_probs, token_log_probs=token_log_probs)
# name: (log-probabilities; gradient checkpointing)
WAYS = {
    "plain": (plain_log_probs, False),
    "pieces": (sequences_log_probs, False),
    "shared": (SHARED, False),
    "shared+ckpt": (SHARED, True),
}


def update(model: nn.Module, way: str, batch: tuple[Tensor, Tensor, int]) -> Tensor:
    """Forward and backward of advantages ±1; the log-probabilities (B, C), without their graph."""
    ask, checkpointing = WAYS[way]
    switch(model, checkpointing)
    log_probs = ask(model, *batch)[0]
    signs = 1 - 2 * (torch.arange(len(log_probs), device=log_probs.device) % 2)
    (-(signs[:, None] * log_probs).mean()).backward()
    return log_probs.detach()


def switch(model: nn.Module, checkpointing: bool) -> None:
    """Gradient checkpointing, which works in train mode only; the model has no dropout."""
    model.train(checkpointing)
    if checkpointing:
        later = hasattr(model, "activation_checkpointing_enable")  # transformers 5.18 and later
        kind = "activation" if later else "gradient"
        getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})


def gradients(model: nn.Module) -> Tensor:
    """All of them in one vector, fp32."""
    return torch.cat([p.grad.flatten().float() for p in model.parameters()])


def clear(model: nn.Module) -> None:
    """Gradients of zero, in memory: where a run is from its second micro-batch on."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


def check(model: nn.Module, way: str, vocabulary: int, device: torch.device) -> None:
    """Stop if this way and the plain one differ on a short batch."""
    batch, found = make_batch(16, vocabulary, device), []
    tolerance = TOLERANCE if model.dtype == torch.float32 else 0.1
    for name in (way, "plain"):
        clear(model)
        found.append((update(model, name, batch), gradients(model)))
    (log_probs, gradient), (expected, slope) = found
    gap, turn = (log_probs - expected).abs().max(), (gradient - slope).norm() / slope.norm()
    assert gap < tolerance and turn < tolerance, (
        f"{way}: log-probabilities off by {gap:.2g}, gradient by {turn:.2g}"
    )


def resident(device: torch.device) -> int:
    """Bytes in use now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return highest(device)


def reset(device: torch.device) -> None:
    """Forget the highest use so far, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # elsewhere the difference starts at the highest use so far
        return


def highest(device: torch.device) -> int:
    """The most bytes in use since `reset`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_of(run: Callable[[], Any], device: torch.device) -> tuple[Any, int]:
    """What `run` returns, and the bytes that it took at its highest, above those before it."""
    reset(device)
    before = min(resident(device), highest(device))
    result = run()
    return result, highest(device) - before


def measure_one(task: dict) -> dict:
    """One measurement, in this process."""
    device = torch.device(task["device"])
    model = build_model(task["vocabulary"], getattr(torch, task["dtype"]), device)
    if WAYS[task["way"]][0] is SHARED:
        shares = share_prompts(model, "the model", task["length"], sequences_log_probs, SHARED)
        assert shares, "cannot share prompts"
    check(model, task["way"], task["vocabulary"], device)
    clear(model)
    batch = make_batch(task["length"], task["vocabulary"], device)
    log_probs, peak = peak_of(lambda: update(model, task["way"], batch), device)
    norm = float(torch.stack([p.grad.norm() for p in model.parameters()]).norm())
    return {**task, "peak": peak, "log_prob": float(log_probs.double().mean()), "grad_norm": norm}


# --------------------------------------------------------------------- the table


def in_a_process(task: dict) -> dict:
    """One measurement, in a fresh process; UserError with its last words if it fails."""
    command = [sys.executable, __file__, "--child", json.dumps(task)]
    done = subprocess.run(command, env={**os.environ, **MALLOC}, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"signal {-done.returncode}"]
        raise UserError(
            f"The way {task['way']!r} at length {task['length']}, vocabulary "
            f"{task['vocabulary']}: {last[0]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def agree(rows: list[dict], dtype: str) -> None:
    """Stop if the ways at one length and vocabulary are not the same update."""
    tolerance = TOLERANCE if dtype == "float32" else 0.05
    for name in ("log_prob", "grad_norm"):
        values = [r[name] for r in rows]
        assert max(values) - min(values) < tolerance * abs(values[0]), (
            f"{name} of the ways: {values}"
        )


def report(rows: list[dict], argv: list[str], out: Path) -> None:
    """results/memory.md: megabytes of each way, and how many times less than plain."""
    ways = [w for w in WAYS if any(r["way"] == w for r in rows)]
    cells = []
    for vocabulary, length in sorted({(r["vocabulary"], r["length"]) for r in rows}):
        here = [r for r in rows if (r["vocabulary"], r["length"]) == (vocabulary, length)]
        peaks = {way: statistics.median(r["peak"] for r in here if r["way"] == way) for way in ways}
        plain = peaks.get("plain", math.nan)
        shown = [
            f"{peak / 1e6:.0f}" + ("" if way == "plain" else f" ({plain / peak:.1f}×)")
            for way, peak in peaks.items()
        ]
        cells.append([vocabulary, length, *shown])
    lines = [
        f"`{command_line(argv)}` on {machine(rows[0]['device'])}, one thread; {versions()}.",
        "",
        f"Peak memory of one update (forward and backward of {QUESTIONS} questions × {GROUP} "
        "completions) above the model and its gradients, in MB; in brackets how many times less "
        f"than plain. Hidden size {HIDDEN}, {LAYERS} layers, {rows[0]['dtype']}; half of each "
        "sequence is prompt. Log-probabilities and gradient are the same for all.",
        "",
        *table(["vocabulary", "tokens in a sequence", *ways], cells),
    ]
    write_lines(out / "memory.md", lines)
    write_jsonl(out / "memory.jsonl", rows)


def read_flags(argv: list[str]) -> argparse.Namespace:
    """The command line of this benchmark."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag, lengths = parser.add_argument, [64, 128, 256]
    flag("--lengths", type=positive, nargs="+", default=lengths, help="tokens in a sequence")
    flag("--vocabularies", type=positive, nargs="+", default=[50_000, 150_000])
    flag("--ways", nargs="+", default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    flag("--repeats", type=positive, default=3)
    flag("--device", default="auto", help="cuda, cpu or auto")
    flag("--dtype", default="float32", help="of the weights: float32 or bfloat16")
    flag("--out", type=Path, default=RESULTS)
    flag("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.ways = [check_choice(w, WAYS, "way") for w in args.ways]
    args.device = available(args.device)
    check_choice(args.dtype, ("float32", "bfloat16"), "dtype")
    if min(args.lengths) < 4:
        raise UserError(f"--lengths {min(args.lengths)} is too short; 4 tokens are the least.")
    return args


@command
def main(argv: list[str]) -> None:
    """Measure everything, one process at a time; the table is written anew after each case."""
    args = read_flags(argv)
    if args.child:
        print(json.dumps(measure_one(json.loads(args.child))))
        return
    rows = []
    for vocabulary in args.vocabularies:
        for length in args.lengths:
            case = {"vocabulary": vocabulary, "length": length}
            case |= {"device": args.device, "dtype": args.dtype}
            tasks = [case | {"way": way} for way in args.ways for _ in range(args.repeats)]
            found = [in_a_process(task) for task in tasks]
            agree(found, args.dtype)
            rows += found
            report(rows, argv, args.out)
            for way in args.ways:
                peaks = [r["peak"] / 1e6 for r in found if r["way"] == way]
                print(
                    f"vocabulary {vocabulary}, length {length}, {way}: "
                    f"{statistics.median(peaks):.0f} MB ({min(peaks):.0f} to {max(peaks):.0f})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
