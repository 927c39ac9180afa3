"""How time and memory of a step grow: with questions, group size, completion length and model size.

    python benchmarks/scaling.py            then results/scaling.md, .jsonl and .png; five minutes
    python benchmarks/scaling.py --only questions micro_batch_size --steps 1
    python benchmarks/scaling.py --report   only the table and the picture, from scaling.jsonl

One quantity is varied at a time, from the workload in BASE; the model has the bundled one's
architecture, random weights, and may not end a completion before its full length. For each quantity
c the law `time = a × c^b` is fitted by least squares in log–log; b comes with its 95 % interval
(Student's t) and R². The last two sweeps are of options that change nothing but memory and speed:
the smallest size that is within 5 % of the fastest is where more stops paying.

Each sweep is a process of its own. Memory is the highest resident size during a point (on a GPU
max_memory_allocated), above what the process had before the model was built: weights, gradients,
Adam's moments, caches and activations.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import math
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    QUANTILES,
    RESULTS,
    ROOT,
    available,
    command_line,
    machine,
    positive,
    pyplot,
    read_jsonl,
    seconds,
    table,
    versions,
    write_jsonl,
    write_lines,
)
from memory import highest, reset, resident
from roofline import Size, Step, build_trainer, forbid_end, make_config, set_prompt_length

from support.command_line import Parser
from support.config import plural
from support.errors import UserError, check_choice, command

BASE = {
    "questions": 8,
    "group_size": 8,
    "completion_tokens": 32,
    "prompt_tokens": 32,
    "micro_batch_size": 32,
    "rollout_batch_size": 512,
    "hidden": 128,
    "layers": 4,
}
PAYS = 1.05  # a size this close to the fastest is as good
MEASURES = {"rollout": "rollout, s", "update": "update, s", "memory": "memory, MB"}


@dataclass(frozen=True)
class Sweep:
    """One varied quantity."""

    title: str
    points: list[dict]
    others: dict = field(default_factory=dict)  # what differs from BASE in all of its points
    only_speed: bool = False  # it changes speed and memory only, so there is no law to fit


SWEEPS = {
    "questions": Sweep("questions", [{"questions": n} for n in (2, 4, 8, 16, 32)]),
    "group_size": Sweep("group size", [{"group_size": n} for n in (2, 4, 8, 16, 32)]),
    "completion_tokens": Sweep(
        "tokens of a completion", [{"completion_tokens": n} for n in (16, 32, 64, 128, 256)]
    ),
    "parameters": Sweep(
        "parameters of the model, millions",
        [{"hidden": h, "layers": n} for h, n in ((64, 2), (128, 4), (192, 6), (320, 8), (512, 8))],
        {"questions": 4},
    ),
    "micro_batch_size": Sweep(
        "micro_batch_size",
        [{"micro_batch_size": n} for n in (1, 2, 4, 8, 16, 32, 64, 128)],
        {"questions": 16},
        True,
    ),
    "rollout_batch_size": Sweep(
        "rollout_batch_size",
        [{"rollout_batch_size": n} for n in (4, 8, 16, 32, 64, 128)],
        {"questions": 16},
        True,
    ),
}


# --------------------------------------------------------------------- inside a process


def save_model(folder: Path, hidden: int, layers: int) -> None:
    """A model folder: the bundled architecture at this size, random weights, the tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(ROOT / "tiny" / "model")
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
    heads = {"num_attention_heads": hidden // 32, "num_key_value_heads": hidden // 64}
    config.update(sizes | heads | {"max_position_embeddings": 2048})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "tiny" / "model").save_pretrained(folder)


def give_back() -> None:
    """Hand what the last point left back to the system; else it would serve the next one unseen."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def measure_point(name: str, point: dict, steps: int, device: str) -> dict:
    """Median seconds of rollout and update, and the highest memory, at one point of a sweep."""
    w = {**BASE, **SWEEPS[name].others, **point}
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), w["hidden"], w["layers"])
        names = "questions", "group_size", "micro_batch_size", "completion_tokens"
        flags = f"--device={device}", f"--rollout_batch_size={w['rollout_batch_size']}"
        config = make_config(folder, *(w[name] for name in names), *flags)
        give_back()
        place = torch.device("cuda" if device == "cuda" else "cpu")
        reset(place)
        before = min(resident(place), highest(place))
        trainer = build_trainer(config)
    forbid_end(trainer)
    set_prompt_length(trainer, w["prompt_tokens"])
    found = []
    for number in range(steps + 1):
        step = Step(trainer, number + 1)
        rollout = seconds(step.sample)
        step.prepare()
        found.append((rollout, seconds(step.update)))
    rollouts, updates = zip(*found[1:], strict=True)  # the first one warms up
    size = Size.of(trainer.policy.model).parameters
    return {
        "sweep": name,
        "x": size / 1e6 if name == "parameters" else w[name],
        **w,
        "parameters": size,
        "rollout": statistics.median(rollouts),
        "update": statistics.median(updates),
        "memory": (highest(place) - before) / 1e6,
        "device": device,
    }


# --------------------------------------------------------------------- the table


def fit(xs: list[float], ys: list[float]) -> tuple[float, float, float]:
    """Exponent b of y = a x^b by least squares in log–log, half of its 95 % interval, R²."""
    x, y = np.log(xs), np.log(ys)
    b, a = np.polyfit(x, y, 1)
    rest = ((y - a - b * x) ** 2).sum()
    r2 = 1 - rest / ((y - y.mean()) ** 2).sum()
    free = len(x) - 2
    if free < 1:
        return float(b), math.nan, float(r2)
    error = math.sqrt(rest / free / ((x - x.mean()) ** 2).sum())
    return float(b), QUANTILES[free] * error, float(r2)


def pays_until(rows: list[dict], measure: str) -> float:
    """The smallest x within 5 % of the fastest."""
    best = min(r[measure] for r in rows)
    return min(r["x"] for r in rows if r[measure] <= PAYS * best)


def laws(found: dict[str, list[dict]]) -> list[str]:
    """The exponents, as Markdown."""
    lines = []
    for name, rows in found.items():
        if SWEEPS[name].only_speed or len(rows) < 2:
            continue
        xs = [r["x"] for r in rows]
        fits = (fit(xs, [r[measure] for r in rows]) for measure in MEASURES)
        cells = ("{:.2f} ± {:.2f} (R² {:.3f})".format(*numbers) for numbers in fits)
        lines.append([SWEEPS[name].title, f"{min(xs):.3g} to {max(xs):.3g}", *cells])
    return table(["grows with", "points", "rollout", "update", "memory"], lines)


def details(found: dict[str, list[dict]]) -> list[str]:
    """Every measurement, as Markdown."""
    lines = []
    for name, rows in found.items():
        others = {**BASE, **SWEEPS[name].others}
        kept = {k: v for k, v in others.items() if k not in SWEEPS[name].points[0]}
        lines += ["", f"## {SWEEPS[name].title}", ""]
        lines += [", ".join(f"{k} {v}" for k, v in kept.items()), ""]
        cells = [
            [f"{r['x']:.3g}", f"{r['rollout']:.3f}", f"{r['update']:.3f}", f"{r['memory']:.0f}"]
            for r in rows
        ]
        lines += table([SWEEPS[name].title, *MEASURES.values()], cells)
        if SWEEPS[name].only_speed:
            most = pays_until(rows, "update" if name == "micro_batch_size" else "rollout")
            largest = most == rows[-1]["x"]
            last = "; it is the largest one tried" if largest else ", and more does not pay"
            lines += ["", f"{most} is the smallest that is within 5 % of the fastest{last}."]
    return lines


def picture(found: dict[str, list[dict]], path: Path) -> None:
    """A panel for each sweep: seconds on the left axis, memory on the right one."""
    plt = pyplot()
    columns = min(3, len(found))
    count = math.ceil(len(found) / columns)
    size = {"figsize": (4.3 * columns, 3.3 * count), "constrained_layout": True}
    figure, axes = plt.subplots(count, columns, squeeze=False, **size)
    for ax in axes.flat[len(found) :]:
        ax.set_visible(False)
    for ax, (name, rows) in zip(axes.flat, found.items(), strict=False):
        panel(ax, name, rows)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def panel(ax: Any, name: str, rows: list[dict]) -> None:
    """One sweep."""
    xs, right = [r["x"] for r in rows], ax.twinx()
    lines = ("rollout", "#4269d0", ax), ("update", "#ff725c", ax), ("memory", "#9498a0", right)
    for measure, color, side in lines:
        ys, label = [r[measure] for r in rows], measure
        if not SWEEPS[name].only_speed and len(rows) > 1:
            label += f" ∝ c^{fit(xs, ys)[0]:.2f}"
        kind = "o--" if side is right else "o-"
        side.plot(xs, ys, kind, color=color, ms=3.5, lw=1.3, label=label)
    for side in (ax, right):
        side.set_yscale("log")
        side.minorticks_off()
        low, high = side.get_ylim()
        ticks = [m * 10.0**e for e in range(-4, 6) for m in (1, 2, 3, 5)]
        ticks = [tick for tick in ticks if low <= tick <= high]
        side.set_yticks(ticks, [f"{v:g}" for v in ticks])
    right.spines["right"].set_visible(True)
    ax.set_xscale("log")
    ax.minorticks_off()
    ax.set_xticks(xs, [f"{x:.3g}" for x in xs])
    ax.set(xlabel=SWEEPS[name].title, ylabel="seconds")
    right.set_ylabel("memory, MB", color="#6b6f76")
    handles = [h for side in (ax, right) for h in side.get_legend_handles_labels()[0]]
    style = {"frameon": False, "fontsize": 7.5, "columnspacing": 1, "handlelength": 1.4}
    place = {"ncols": 3, "loc": "lower left", "bbox_to_anchor": (-0.05, 0.99)}
    ax.legend(handles, [h.get_label() for h in handles], **style, **place)


def report(out: Path, argv: list[str]) -> None:
    """The table and the picture, from scaling.jsonl."""
    rows = read_jsonl(out / "scaling.jsonl")
    if not rows:
        raise UserError(f"There is no measurement in {out}; run without --report first.")
    found = {
        name: sorted((r for r in rows if r["sweep"] == name), key=lambda r: r["x"])
        for name in SWEEPS
    }
    found = {name: points for name, points in found.items() if points}
    threads = f"{rows[0]['threads']} {plural(rows[0]['threads'], 'thread')}"
    lines = [
        f"`{command_line(argv)}` on {machine(rows[0]['device'])}, {threads}; {versions()}.",
        "",
        "Exponents b of `a × c^b`, with 95 % intervals; memory is the step's highest above the "
        "empty process.",
        "",
        *laws(found),
        *details(found),
    ]
    print("\n".join(lines))
    write_lines(out / "scaling.md", lines)
    picture(found, out / "scaling.png")


def run_sweep(name: str, args: argparse.Namespace) -> list[dict]:
    """One sweep in a process of its own, its lines as they come."""
    threads = args.threads or torch.get_num_threads()
    flags = f"--child={name} --steps={args.steps} --device={args.device} --threads={threads}"
    command = [sys.executable, __file__, *flags.split()]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    rows = []
    for line in child.stdout:
        if line.startswith("{"):
            r = json.loads(line)
            rows.append(r)
            print(
                f"{name} {r['x']:.3g}: rollout {r['rollout']:.3f} s, update {r['update']:.3f} s, "
                f"memory {r['memory']:.0f} MB",
                flush=True,
            )
    if child.wait():
        raise UserError(f"The sweep over {name} failed; its error stands above.")
    return rows


def read_flags(argv: list[str]) -> argparse.Namespace:
    """The command line of this benchmark."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--only", nargs="+", default=list(SWEEPS), metavar="SWEEP", help=", ".join(SWEEPS))
    flag("--steps", type=positive, default=2, help="steps to take the median of")
    flag("--device", default="auto", help="cuda, cpu or auto")
    flag("--threads", type=positive, help="CPU threads; else PyTorch's own choice")
    flag("--report", action="store_true", help="only the table and picture, from scaling.jsonl")
    flag("--out", type=Path, default=RESULTS)
    flag("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.only = [check_choice(name, SWEEPS, "sweep") for name in args.only]
    args.device = available(args.device)
    return args


@command
def main(argv: list[str]) -> None:
    """Every sweep, then the report."""
    args = read_flags(argv)
    if args.child:
        torch.set_num_threads(args.threads)
        points = SWEEPS[args.child].points
        measure_point(args.child, points[0], 1, args.device)  # what is loaded once is not counted
        for point in points:
            row = measure_point(args.child, point, args.steps, args.device)
            print(json.dumps(row | {"threads": args.threads}), flush=True)
        return
    rows = []
    for name in [] if args.report else args.only:
        rows += run_sweep(name, args)
        write_jsonl(args.out / "scaling.jsonl", rows)  # an interrupted run leaves its sweeps
    report(args.out, argv)


if __name__ == "__main__":
    main()
