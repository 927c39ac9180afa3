"""The demo over several seeds: does it reach 0.90, how fast, and what does the curve look like?

    python benchmarks/demo.py                       five seeds, then results/demo.md, demo.jsonl and demo.png
    python benchmarks/demo.py --seeds 1 2 --out /tmp/demo

Each seed is one run of `python train.py --preset tiny --seed S` in a process of its own. The seconds are those of
training (the sum of time/step); evaluations and checkpoints come on top, and are counted in the last column.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = 0.90


def run(seed: int, folder: Path, flags: list[str]) -> tuple[list[dict], float]:
    """One run: its metrics, and the seconds of the whole command."""
    start = time.perf_counter()
    command = [
        sys.executable,
        "train.py",
        "--preset",
        "tiny",
        "--seed",
        str(seed),
        "--run_dir",
        str(folder),
        *flags,
    ]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return rows, time.perf_counter() - start


def table_row(seed: int, rows: list[dict], seconds: float) -> str:
    """What one run showed, as a row of the table."""
    evaluated = [r for r in rows if "eval/accuracy" in r]
    first, last = evaluated[0], evaluated[-1]
    reached = next((r["step"] for r in evaluated if r["eval/accuracy"] >= TARGET), None)
    until = sum(r.get("time/step", 0) for r in rows if reached is not None and r["step"] <= reached)
    training = sum(r.get("time/step", 0) for r in rows)
    longer = last["eval/completion_tokens"] / first["eval/completion_tokens"]
    return (
        f"| {seed} | {first['eval/accuracy']:.3f} | {rows[1]['rollout/success_rate']:.3f} | {last['eval/accuracy']:.3f}"
        f" ({last['eval/accuracy_low']:.3f}–{last['eval/accuracy_high']:.3f}) | {rows[-1]['rollout/success_rate']:.3f} "
        f"| {first['eval/completion_tokens']:.1f} → {last['eval/completion_tokens']:.1f} (×{longer:.1f}) "
        f"| {reached if reached is not None else 'never'} | {until:.0f} | {training:.0f} | {seconds:.0f} |"
    )


def picture(runs: dict[int, list[dict]], path: Path) -> None:
    """Accuracy and completion length against steps, a line for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    for i, (seed, rows) in enumerate(runs.items()):
        steps = [r for r in rows if "rollout/returns" in r]
        evaluated = [r for r in rows if "eval/accuracy" in r]
        color = f"C{i}"
        left.plot(
            [r["step"] for r in steps],
            [r["rollout/success_rate"] for r in steps],
            color=color,
            alpha=0.35,
            lw=1,
        )
        left.plot(
            [r["step"] for r in evaluated],
            [r["eval/accuracy"] for r in evaluated],
            "o-",
            color=color,
            ms=4,
            label=f"seed {seed}",
        )
        right.plot(
            [r["step"] for r in steps],
            [r["rollout/completion_tokens"] for r in steps],
            color=color,
            lw=1.2,
        )
    left.axhline(TARGET, color="grey", ls=":", lw=1)
    left.set(
        xlabel="step",
        ylabel="accuracy",
        ylim=(0, 1.02),
        title="Answers right: held out, greedy (dots); sampled (thin)",
    )
    right.set(
        xlabel="step", ylabel="tokens", ylim=(0, None), title="Length of the sampled completions"
    )
    left.legend(frameon=False, fontsize=8, loc="lower right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run every seed, write the results after each one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    parser.add_argument("flags", nargs="*", help="further flags for train.py, after --")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    machine = (
        f"{os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}"
    )
    lines = [
        f"`python benchmarks/demo.py --seeds {' '.join(map(str, args.seeds))}` on {machine}", "",
        "| seed | greedy, step 0 | sampled, step 1 | greedy, end (95 %) | sampled, end | greedy tokens "
        f"| step of {TARGET} | seconds to it | seconds of training | seconds, whole command |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    runs = {}
    with tempfile.TemporaryDirectory() as folder, (args.out / "demo.jsonl").open("w") as log:
        for seed in args.seeds:
            runs[seed], seconds = run(seed, Path(folder) / str(seed), args.flags)
            lines.append(table_row(seed, runs[seed], seconds))
            print(lines[-1], flush=True)
            log.writelines(json.dumps({"seed": seed, **row}) + "\n" for row in runs[seed])
            (args.out / "demo.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
            picture(runs, args.out / "demo.png")


if __name__ == "__main__":
    main()
