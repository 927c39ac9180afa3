"""How time and memory of a step grow: with questions, group size, completion length and model size.

    python benchmarks/scaling.py                            then results/scaling.md, .jsonl and .png; about five minutes
    python benchmarks/scaling.py --only questions micro_batch_size --steps 1
    python benchmarks/scaling.py --report                   only the table and the picture, from scaling.jsonl

One quantity is varied at a time, from the workload in BASE; the model has the bundled one's architecture, random
weights, and may not end a completion before its full length. For each quantity c the law `time = a × c^b` is fitted by
least squares in log–log; b comes with its 95 % interval (Student's t) and R². The last two sweeps are the knobs that
change nothing but memory and speed: the smallest size that is within 5 % of the fastest is where more stops paying.

Each sweep is a process of its own. Memory is the highest resident size during a point (on a GPU max_memory_allocated),
above what the process had before the model was built: weights, gradients, Adam's moments, caches and activations.
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

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from memory import highest, reset, resident  # noqa: E402
from roofline import (  # noqa: E402
    Size,
    Step,
    available,
    build_trainer,
    command_line,
    forbid_end,
    machine,
    make_config,
    positive,
    seconds,
    set_prompt_length,
    versions,
)

from config import Parser, plural  # noqa: E402
from errors import UserError, choose, command  # noqa: E402

BASE = {"questions": 8, "group_size": 8, "completion_tokens": 32, "prompt_tokens": 32, "micro_batch_size": 32,
        "rollout_batch_size": 512, "hidden": 128, "layers": 4}  # fmt: skip
PAYS = 1.05  # a size this close to the fastest is as good
QUANTILE = {
    1: 12.71,
    2: 4.30,
    3: 3.18,
    4: 2.78,
    5: 2.57,
    6: 2.45,
}  # Student's t, 97.5 %, by degrees of freedom
MEASURES = {"rollout": "rollout, s", "update": "update, s", "memory": "memory, MB"}


@dataclass(frozen=True)
class Sweep:
    """One varied quantity."""

    title: str
    points: list[dict]
    others: dict = field(default_factory=dict)  # what differs from BASE in all of its points
    knob: bool = False  # whether it changes speed and memory only, so that nothing is to be fitted


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


# ------------------------------------------------------------------------------------------------ inside a process


def save_model(folder: Path, hidden: int, layers: int) -> None:
    """A model folder: the bundled architecture at this size, with random weights, and the bundled tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(ROOT / "tiny" / "model")
    config.update({"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers,
                   "num_attention_heads": hidden // 32, "num_key_value_heads": hidden // 64,
                   "max_position_embeddings": 2048})  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "tiny" / "model").save_pretrained(folder)


def give_back() -> None:
    """Hand what the last point left back to the system, where malloc can; else it would serve the next one unseen."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def measure_point(name: str, point: dict, steps: int, device: str) -> dict:
    """Median seconds of rollout and update, and the highest memory, at one point of a sweep."""
    w = {**BASE, **SWEEPS[name].others, **point}
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), w["hidden"], w["layers"])
        config = make_config(
            folder, w["questions"], w["group_size"], w["micro_batch_size"], w["completion_tokens"],
            "--device", device, "--rollout_batch_size", str(w["rollout_batch_size"]),
        )  # fmt: skip
        give_back()
        place = torch.device("cuda" if device == "cuda" else "cpu")
        reset(place)
        before = min(resident(place), highest(place))
        t = build_trainer(config)
    forbid_end(t)
    set_prompt_length(t, w["prompt_tokens"])
    found = []
    for number in range(steps + 1):
        step = Step(t, number + 1)
        rollout = seconds(step.ask, place)
        step.prepare()
        found.append((rollout, seconds(step.learn, place)))
    rollouts, updates = zip(*found[1:], strict=True)  # the first one warms up
    size = Size.of(t.model).parameters
    x = size / 1e6 if name == "parameters" else w[name]
    memory = (highest(place) - before) / 1e6
    return {"sweep": name, "x": x, **w, "parameters": size, "rollout": statistics.median(rollouts),
            "update": statistics.median(updates), "memory": memory, "device": device}  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the table


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
    return float(b), QUANTILE[min(free, max(QUANTILE))] * error, float(r2)


def pays_until(rows: list[dict], measure: str) -> float:
    """The smallest x within 5 % of the fastest."""
    best = min(r[measure] for r in rows)
    return min(r["x"] for r in rows if r[measure] <= PAYS * best)


def laws(found: dict[str, list[dict]]) -> list[str]:
    """The exponents, as Markdown."""
    lines = ["| grows with | points | rollout | update | memory |", "|---|---|---|---|---|"]
    for name, rows in found.items():
        if SWEEPS[name].knob or len(rows) < 2:
            continue
        xs = [r["x"] for r in rows]
        cells = [
            "{:.2f} ± {:.2f} (R² {:.3f})".format(*fit(xs, [r[m] for r in rows])) for m in MEASURES
        ]
        points = f"{min(xs):.3g} to {max(xs):.3g}"
        lines.append(f"| {SWEEPS[name].title} | {points} | {' | '.join(cells)} |")
    return lines


def details(found: dict[str, list[dict]]) -> list[str]:
    """Every measurement, as Markdown."""
    lines = []
    for name, rows in found.items():
        others = {**BASE, **SWEEPS[name].others}
        kept = {k: v for k, v in others.items() if k not in SWEEPS[name].points[0]}
        lines += ["", f"## {SWEEPS[name].title}", "", ", ".join(f"{k} {v}" for k, v in kept.items()), "",
                  f"| {SWEEPS[name].title} | {' | '.join(MEASURES.values())} |", "|---|---|---|---|"]  # fmt: skip
        lines += [
            f"| {r['x']:.3g} | {r['rollout']:.3f} | {r['update']:.3f} | {r['memory']:.0f} |"
            for r in rows
        ]
        if SWEEPS[name].knob:
            most = pays_until(rows, "update" if name == "micro_batch_size" else "rollout")
            last = (
                "; it is the largest one tried"
                if most == rows[-1]["x"]
                else ", and more does not pay"
            )
            lines += ["", f"{most} is the smallest that is within 5 % of the fastest{last}."]
    return lines


def picture(found: dict[str, list[dict]], path: Path) -> None:
    """A panel for each sweep: seconds of rollout and update on the left axis, memory on the right one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(3, len(found))
    count = math.ceil(len(found) / columns)
    figure, axes = plt.subplots(count, columns, figsize=(4.3 * columns, 3.3 * count), squeeze=False,
                                constrained_layout=True)  # fmt: skip
    for ax in axes.flat[len(found) :]:
        ax.set_visible(False)
    for ax, (name, rows) in zip(axes.flat, found.items(), strict=False):
        xs, right = [r["x"] for r in rows], ax.twinx()
        for measure, color, side in (
            ("rollout", "#4269d0", ax),
            ("update", "#ff725c", ax),
            ("memory", "#9498a0", right),
        ):
            ys, label = [r[measure] for r in rows], measure
            if not SWEEPS[name].knob and len(rows) > 1:
                label += f" ∝ c^{fit(xs, ys)[0]:.2f}"
            side.plot(
                xs, ys, "o--" if side is right else "o-", color=color, ms=3.5, lw=1.3, label=label
            )
        for side in (ax, right):
            side.set_yscale("log")
            side.minorticks_off()
            low, high = side.get_ylim()
            ticks = [
                m * 10.0**e
                for e in range(-4, 6)
                for m in (1, 2, 3, 5)
                if low <= m * 10.0**e <= high
            ]
            side.set_yticks(ticks, [f"{v:g}" for v in ticks])
            side.spines["top"].set_visible(False)
        ax.set_xscale("log")
        ax.minorticks_off()
        ax.set_xticks(xs, [f"{x:.3g}" for x in xs])
        ax.set(xlabel=SWEEPS[name].title, ylabel="seconds")
        right.set_ylabel("memory, MB", color="#6b6f76")
        handles = [h for side in (ax, right) for h in side.get_legend_handles_labels()[0]]
        words = [h.get_label() for h in handles]
        ax.legend(handles, words, frameon=False, fontsize=7.5, ncols=3, columnspacing=1, handlelength=1.4,
                  loc="lower left", bbox_to_anchor=(-0.05, 0.99))  # fmt: skip
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(out: Path, argv: list[str]) -> None:
    """The table and the picture, from scaling.jsonl."""
    rows = [
        json.loads(line)
        for line in (out / "scaling.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    if not rows:
        raise UserError("scaling.jsonl holds no measurement; run without --report first.")
    found = {
        name: sorted((r for r in rows if r["sweep"] == name), key=lambda r: r["x"])
        for name in SWEEPS
    }
    found = {name: points for name, points in found.items() if points}
    threads = f"{rows[0]['threads']} {plural(rows[0]['threads'], 'thread')}"
    lines = [
        f"`{command_line(argv)}` on {machine(torch.device(rows[0]['device']))}, {threads}; {versions()}.",
        "",
        "Exponents b of `a × c^b`, with 95 % intervals; memory is the step's highest above the empty process.",
        "",
        *laws(found),
        *details(found),
    ]
    print("\n".join(lines))
    (out / "scaling.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    picture(found, out / "scaling.png")


def run_sweep(name: str, args: argparse.Namespace) -> list[dict]:
    """One sweep in a process of its own, its lines as they come."""
    command = [
        sys.executable,
        __file__,
        "--child",
        name,
        "--steps",
        str(args.steps),
        "--device",
        args.device,
    ]
    threads = str(args.threads or torch.get_num_threads())
    child = subprocess.Popen([*command, "--threads", threads], stdout=subprocess.PIPE, text=True)
    rows = []
    for line in child.stdout:
        if line.startswith("{"):
            rows.append(json.loads(line))
            r = rows[-1]
            print(f"{name} {r['x']:.3g}: rollout {r['rollout']:.3f} s, update {r['update']:.3f} s, "
                  f"memory {r['memory']:.0f} MB", flush=True)  # fmt: skip
    if child.wait():
        raise UserError(f"The sweep over {name} failed; its error stands above.")
    return rows


def read_flags(argv: list[str]) -> argparse.Namespace:
    """The command line of this benchmark."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=list(SWEEPS), metavar="SWEEP", help=", ".join(SWEEPS)
    )
    parser.add_argument("--steps", type=positive, default=2, help="steps to take the median of")
    parser.add_argument("--device", default="auto", help="cuda, cpu or auto")
    parser.add_argument("--threads", type=positive, help="CPU threads; else PyTorch's own choice")
    parser.add_argument(
        "--report", action="store_true", help="only the table and the picture, from scaling.jsonl"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.only = [choose(name, SWEEPS, "sweep") for name in args.only]
    args.device = available(args.device)
    if args.report and not (args.out / "scaling.jsonl").is_file():
        raise UserError(f"There is no scaling.jsonl in {args.out}; run without --report first.")
    return args


@command
def main(argv: list[str]) -> None:
    """Every sweep, then the report."""
    args = read_flags(argv)
    if args.child:
        torch.set_num_threads(args.threads)
        measure_point(
            args.child, SWEEPS[args.child].points[0], 1, args.device
        )  # what is loaded once is not its memory
        for point in SWEEPS[args.child].points:
            row = {
                **measure_point(args.child, point, args.steps, args.device),
                "threads": args.threads,
            }
            print(json.dumps(row), flush=True)
        return
    if not args.report:
        args.out.mkdir(parents=True, exist_ok=True)
        rows = []
        for name in (
            args.only
        ):  # written down after each, so that an interrupted run leaves its sweeps for --report
            rows += run_sweep(name, args)
            (args.out / "scaling.jsonl").write_text(
                "".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8"
            )
    report(args.out, argv)


if __name__ == "__main__":
    main()
