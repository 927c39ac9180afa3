"""The demo over several seeds: does it reach 0.90, how fast, and what does the curve look like?

    python benchmarks/demo.py              five seeds, then results/demo.md, demo.jsonl and demo.png
    python benchmarks/demo.py --seeds 1 2 --out /tmp/demo
    python benchmarks/demo.py --against ../before --seeds 1 2 3      two checkouts, taking turns

Each seed is one run of `python train.py --preset tiny --seed S` in a process of its own. The
seconds are those of training (the sum of time/step); evaluations and checkpoints come on top, and
are counted in the last column.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import (
    RESULTS,
    ROOT,
    available,
    command_line,
    machine,
    pyplot,
    read_jsonl,
    table,
    versions,
    write_jsonl,
    write_lines,
)

TARGET = 0.90
HEAD = [
    "seed",
    "greedy, step 0",
    "sampled, step 1",
    "greedy, end (95 %)",
    "sampled, end",
    "greedy tokens",
    f"step of {TARGET}",
    "seconds to it",
    "seconds of training",
    "seconds, whole command",
]


def run(checkout: Path, seed: int, folder: Path, flags: list[str]) -> tuple[list[dict], float]:
    """One run: its metrics, and the seconds of the whole command."""
    own = ["--preset=tiny", f"--seed={seed}", f"--run_dir={folder}"]
    start = time.perf_counter()
    command = [sys.executable, "train.py", *own, *flags]
    subprocess.run(command, cwd=checkout, check=True, stdout=subprocess.DEVNULL)
    return read_jsonl(folder / "metrics.jsonl"), time.perf_counter() - start


def training_seconds(rows: list[dict], until: float = float("inf")) -> float:
    """Of the steps up to one of them."""
    return sum(row.get("time/step", 0) for row in rows if row["step"] <= until)


def summary(seed: int, rows: list[dict], seconds: float) -> list[str]:
    """What one run showed, as a row of the table."""
    evaluated = [row for row in rows if "eval/accuracy" in row]
    first, last = evaluated[0], evaluated[-1]
    reached = next((row["step"] for row in evaluated if row["eval/accuracy"] >= TARGET), None)
    low, high = last["eval/accuracy_low"], last["eval/accuracy_high"]
    before, after = (row["eval/completion_tokens"] for row in (first, last))
    return [
        str(seed),
        f"{first['eval/accuracy']:.3f}",
        f"{rows[1]['rollout/success_rate']:.3f}",
        f"{last['eval/accuracy']:.3f} ({low:.3f}–{high:.3f})",
        f"{rows[-1]['rollout/success_rate']:.3f}",
        f"{before:.1f} → {after:.1f} (×{after / before:.1f})",
        str(reached) if reached is not None else "never",
        f"{training_seconds(rows, -1 if reached is None else reached):.0f}",
        f"{training_seconds(rows):.0f}",
        f"{seconds:.0f}",
    ]


def picture(runs: dict[int, list[dict]], path: Path) -> None:
    """Accuracy and completion length against steps, a line for each seed."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)

    def line(axes: object, rows: list[dict], metric: str, *style: str, **more: object) -> None:
        shown = [row for row in rows if metric in row]
        axes.plot([r["step"] for r in shown], [r[metric] for r in shown], *style, **more)

    for i, (seed, rows) in enumerate(runs.items()):
        color = f"C{i}"
        line(left, rows, "rollout/success_rate", color=color, alpha=0.35, lw=1)
        line(left, rows, "eval/accuracy", "o-", color=color, ms=4, label=f"seed {seed}")
        line(right, rows, "rollout/completion_tokens", color=color, lw=1.2)
    left.axhline(TARGET, color="grey", ls=":", lw=1)
    left.set_title("Answers right: held out, greedy (dots); sampled (thin)")
    left.set(xlabel="step", ylabel="accuracy", ylim=(0, 1.02))
    right.set_title("Length of the sampled completions")
    right.set(xlabel="step", ylabel="tokens", ylim=(0, None))
    left.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def compare(other: Path, seeds: list[int], flags: list[str]) -> None:
    """The demo in two checkouts, in turns: medians of the seconds, and the median of the ratios."""
    checkouts = {"this": ROOT, "other": other.resolve()}
    training: dict[str, list[float]] = {name: [] for name in checkouts}
    whole: dict[str, list[float]] = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory() as work:
        for i, seed in enumerate(seeds):
            for name in list(checkouts)[:: 1 if i % 2 else -1]:
                folder = Path(work, f"{name}-{i}")
                rows, seconds = run(checkouts[name], seed, folder, flags)
                training[name].append(training_seconds(rows))
                whole[name].append(seconds)
                print(f"{name}, seed {seed}: {training[name][-1]:.1f} s, {seconds:.1f} s in all")
    for what, times in (("training", training), ("whole command", whole)):
        medians = [statistics.median(times[name]) for name in checkouts]
        ratios = [a / b for a, b in zip(times["this"], times["other"], strict=True)]
        print(
            f"{what}: {medians[0]:.1f} s here, {medians[1]:.1f} s there; here ÷ there "
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        )


def main() -> None:
    """Run every seed, write the results after each one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2, 3, 4])
    parser.add_argument("--against", type=Path, help="another checkout, to compare the seconds")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("flags", nargs="*", help="further flags for train.py, after --")
    args = parser.parse_args()
    if args.against:
        compare(args.against, args.seeds, args.flags)
        return
    runs, cells, log = {}, [], []
    with tempfile.TemporaryDirectory() as work:
        for seed in args.seeds:
            runs[seed], seconds = run(ROOT, seed, Path(work, str(seed)), args.flags)
            cells.append(summary(seed, runs[seed], seconds))
            print(" | ".join(cells[-1]), flush=True)
            log += [{"seed": seed, **row} for row in runs[seed]]
            device = "cpu" if "--device=cpu" in args.flags else available("auto")
            words = f"`{command_line(sys.argv[1:])}` on {machine(device)}; {versions()}"
            write_lines(args.out / "demo.md", [words, "", *table(HEAD, cells)])
            write_jsonl(args.out / "demo.jsonl", log)
            picture(runs, args.out / "demo.png")


if __name__ == "__main__":
    main()
