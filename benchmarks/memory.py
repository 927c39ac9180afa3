"""Peak memory of one update against sequence length and vocabulary: the common way, and ours.

    python benchmarks/memory.py                          then results/memory.md and memory.jsonl; about ten minutes
    python benchmarks/memory.py --lengths 128 --vocabularies 50000 --repeats 1          one column of it

The update is forward and backward of one micro-batch: two questions with four completions each, half of every sequence
is prompt. The model is a Llama with random weights, small in its layers and not in its vocabulary, as small real models
are. What is counted comes on top of what is there before: the model and its gradients. Four ways to the same numbers:

    plain          full logits of prompt and completion, a copy of them in fp32, log_softmax, gather: the common way
    pieces         the completion's logits only, log-softmax in pieces (share=False of sequences_log_probs)
    shared         each prompt once for its completions, the head in pieces too (share=True)
    shared+ckpt    shared, with gradient checkpointing

Each measurement is a fresh process, on one thread, and the table has the median. On the CPU: the highest resident size
(Linux resets it on request) less the resident size before; malloc is told to give memory back at once. On a GPU:
max_memory_allocated. Each process first checks its log-probabilities and gradient against the plain way on a short
batch, to 1e-4; and here the log-probabilities and the gradient's norm must agree between the ways at full length.
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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from roofline import available, command_line, machine, positive, versions  # noqa: E402

from config import Parser  # noqa: E402
from errors import UserError, choose, command  # noqa: E402
from log_probs import sequences_log_probs, share_prompts  # noqa: E402

WAYS = {
    "plain": (None, False), "pieces": (False, False), "shared": (True, False), "shared+ckpt": (True, True),
}  # fmt: skip
# name: (share, or None for the common way; gradient checkpointing)
QUESTIONS, GROUP = 2, 4
HIDDEN, LAYERS = 256, 4
TOLERANCE = 1e-4
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1",
          "OMP_NUM_THREADS": "1"}  # fmt: skip


# ------------------------------------------------------------------------------------------------ inside a process


def build_model(vocabulary: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A Llama with random weights, the same ones every time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=HIDDEN, intermediate_size=3 * HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(device, dtype)


def make_batch(length: int, vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Sequences and mask (B, P + C), and C: neighbours have the same prompt, half of the length is completion."""
    generator = torch.Generator().manual_seed(1)
    prompt = length // 2
    prompts = torch.randint(vocabulary, (QUESTIONS, prompt), generator=generator).repeat_interleave(
        GROUP, 0
    )
    completions = torch.randint(vocabulary, (len(prompts), length - prompt), generator=generator)
    sequences = torch.cat([prompts, completions], -1).to(device)
    return sequences, torch.ones_like(sequences, dtype=torch.bool), length - prompt


def plain_log_probs(model: nn.Module, sequences: Tensor, mask: Tensor, num_actions: int) -> Tensor:
    """The common way: log-softmax of all logits in fp32, (B, C)."""
    logits = (
        model(input_ids=sequences, attention_mask=mask.long(), use_cache=False)
        .logits[:, :-1]
        .float()
    )
    found = torch.log_softmax(logits, -1).gather(-1, sequences[:, 1:, None]).squeeze(-1)
    return found[:, -num_actions:]


def update(model: nn.Module, way: str, batch: tuple[Tensor, Tensor, int]) -> Tensor:
    """Forward and backward of advantages ±1; the log-probabilities (B, C), without their graph."""
    sequences, mask, num_actions = batch
    share, checkpointing = WAYS[way]
    switch(model, checkpointing)
    if share is None:
        log_probs = plain_log_probs(model, sequences, mask, num_actions)
    else:
        options = {"share": True} if share else {}
        log_probs = sequences_log_probs(model, sequences, mask, num_actions, **options)[0]
    signs = 1 - 2 * (torch.arange(len(sequences), device=sequences.device) % 2)
    (-(signs[:, None] * log_probs).mean()).backward()
    return log_probs.detach()


def switch(model: nn.Module, checkpointing: bool) -> None:
    """Gradient checkpointing, which works in train mode only; the model has no dropout."""
    model.train(checkpointing)
    if checkpointing and hasattr(
        model, "activation_checkpointing_enable"
    ):  # transformers 5.18 and later
        model.activation_checkpointing_enable({"use_reentrant": False})
    elif checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})


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
    """What `run` returns, and the bytes that it took at its highest, above what was in use before it."""
    reset(device)
    before = min(resident(device), highest(device))
    result = run()
    return result, highest(device) - before


def measure_one(task: dict) -> dict:
    """One measurement, in this process."""
    device = torch.device(task["device"])
    model = build_model(task["vocabulary"], getattr(torch, task["dtype"]), device)
    if WAYS[task["way"]][0]:
        assert share_prompts(model, "the model", task["length"]), "cannot share prompts"
    check(model, task["way"], task["vocabulary"], device)
    clear(model)
    batch = make_batch(task["length"], task["vocabulary"], device)
    log_probs, peak = peak_of(lambda: update(model, task["way"], batch), device)
    norm = float(torch.stack([p.grad.norm() for p in model.parameters()]).norm())
    return {**task, "peak": peak, "log_prob": float(log_probs.double().mean()), "grad_norm": norm}


# ------------------------------------------------------------------------------------------------------- the table


def in_a_process(task: dict) -> dict:
    """One measurement, in a fresh process; UserError with its last words if it fails."""
    command = [sys.executable, __file__, "--child", json.dumps(task)]
    done = subprocess.run(command, env={**os.environ, **MALLOC}, capture_output=True, text=True)
    if done.returncode:
        words = (
            done.stderr.strip().splitlines()[-1]
            if done.stderr.strip()
            else f"signal {-done.returncode}"
        )
        raise UserError(
            f"The way {task['way']!r} at length {task['length']}, vocabulary {task['vocabulary']}: {words}"
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
    cases = sorted({(r["vocabulary"], r["length"]) for r in rows})
    ways = [w for w in WAYS if any(r["way"] == w for r in rows)]
    device = torch.device(rows[0]["device"])
    lines = [
        f"`{command_line(argv)}` on {machine(device)}, one thread; {versions()}.",
        "",
        f"Peak memory of one update (forward and backward of {QUESTIONS} questions × {GROUP} completions) above the "
        f"model and its gradients, in MB; in brackets how many times less than plain. Hidden size {HIDDEN}, {LAYERS} "
        f"layers, {rows[0]['dtype']}; half of each sequence is prompt. Log-probabilities and gradient are the same "
        "for all.",
        "",
        f"| vocabulary | tokens in a sequence | {' | '.join(ways)} |",
        "|---|---|" + "---|" * len(ways),
    ]
    for vocabulary, length in cases:
        here = [r for r in rows if (r["vocabulary"], r["length"]) == (vocabulary, length)]
        peaks = {w: statistics.median(r["peak"] for r in here if r["way"] == w) for w in ways
                 if any(r["way"] == w for r in here)}  # fmt: skip
        plain = peaks.get("plain", math.nan)
        cells = [
            f"{peaks[w] / 1e6:.0f}" + ("" if w == "plain" else f" ({plain / peaks[w]:.1f}×)")
            for w in peaks
        ]
        lines.append(f"| {vocabulary} | {length} | {' | '.join(cells)} |")
    out.mkdir(parents=True, exist_ok=True)
    (out / "memory.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / "memory.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def read_flags(argv: list[str]) -> argparse.Namespace:
    """The command line of this benchmark."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--lengths", type=positive, nargs="+", default=[64, 128, 256], help="tokens in a sequence"
    )
    parser.add_argument("--vocabularies", type=positive, nargs="+", default=[50_000, 150_000])
    parser.add_argument(
        "--ways", nargs="+", default=list(WAYS), metavar="WAY", help=", ".join(WAYS)
    )
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--device", default="auto", help="cuda, cpu or auto")
    parser.add_argument("--dtype", default="float32", help="of the weights: float32 or bfloat16")
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.ways = [choose(w, WAYS, "way") for w in args.ways]
    args.device = available(args.device)
    choose(args.dtype, ("float32", "bfloat16"), "dtype")
    if min(args.lengths) < 4:
        raise UserError(f"--lengths {min(args.lengths)} is too short; 4 tokens are the least.")
    return args


@command
def main(argv: list[str]) -> None:
    """Measure everything, one process after the other; the table is written anew after each case."""
    args = read_flags(argv)
    if args.child:
        print(json.dumps(measure_one(json.loads(args.child))))
        return
    rows = []
    for vocabulary in args.vocabularies:
        for length in args.lengths:
            case = {
                "vocabulary": vocabulary,
                "length": length,
                "device": args.device,
                "dtype": args.dtype,
            }
            found = [
                in_a_process({**case, "way": way}) for way in args.ways for _ in range(args.repeats)
            ]
            agree(found, args.dtype)
            rows += found
            report(rows, argv, args.out)
            for way in args.ways:
                peaks = [r["peak"] / 1e6 for r in found if r["way"] == way]
                print(f"vocabulary {vocabulary}, length {length}, {way}: {statistics.median(peaks):.0f} MB "
                      f"({min(peaks):.0f} to {max(peaks):.0f})", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
