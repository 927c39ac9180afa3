"""A soak: the bundled task for an hour. Do memory, open files, threads or the logs grow?

    python benchmarks/soak.py              an hour, then results/soak.md, soak.jsonl and soak.png
    python benchmarks/soak.py --minutes 2 --out /tmp/soak

`python train.py --preset tiny` in a process of its own, with more steps than fit, a checkpoint
every 25 steps and an evaluation every 10. Once a second its resident memory, open files, threads
and logs are read from the outside. The slopes are of a straight line through the second half (the
first is warm-up), with a 95 % interval from 20 blocks of it, since neighbouring readings are not
independent.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import (
    RESULTS,
    ROOT,
    command_line,
    machine,
    positive,
    pyplot,
    table,
    versions,
    write_jsonl,
    write_lines,
)

from support.command_line import Parser
from support.errors import UserError, command

FLAGS = (
    "--preset=tiny --device=cpu --steps=1000000 --rollouts_per_step=8 --train_batch_size=64 "
    "--eval_interval=10 --eval_questions=50 --checkpoint_interval=25"
)
# name: unit, what a reader takes for no growth, per 1000 steps
MEASURES = {
    "memory": ("MB", 5.0),
    "files": ("open files", 0.5),
    "threads": ("threads", 0.5),
    "events": ("kB a step", 1.0),
    "metrics": ("kB a step", 0.1),
    "seconds": ("s a step", 0.1),
}


def reading(pid: int, run: Path) -> dict[str, float] | None:
    """The process as the kernel sees it, and its logs; None before the first step is logged."""
    log = run / "metrics.jsonl"
    if not log.exists():
        return None
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 20_000))
        lines = [line for line in file.read().splitlines(keepends=True) if line.endswith(b"\n")]
    if not lines:
        return None
    return {
        "at": time.time(),
        "step": json.loads(lines[-1])["step"],
        "memory": int(fields["VmRSS"].split()[0]) / 1024,
        "files": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(fields["Threads"]),
        "events": sum(f.stat().st_size for f in run.glob("events.*")) / 1000,
        "metrics": log.stat().st_size / 1000,
        "folders": len(list(run.iterdir())),
    }


def soak(minutes: float, folder: Path) -> tuple[list[dict], int, str]:
    """Run it; the readings, the exit code after a polite kill, and what it printed."""
    run, end = folder / "run", time.time() + 60 * minutes
    command = [sys.executable, "train.py", *FLAGS.split(), f"--run_dir={run}"]
    readings = []
    with (folder / "output").open("w+") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        while time.time() < end and process.poll() is None:
            found = reading(process.pid, run)
            if found:
                readings.append(found)
            time.sleep(1)
        process.send_signal(signal.SIGTERM)
        process.wait()
        output.seek(0)
        return readings, process.returncode, output.read()


def slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Of a straight line, per 1000 of x; and its 95 % interval (bootstrap over 20 blocks)."""
    chance = random.Random(0)
    blocks = np.array_split(np.arange(len(x)), 20)
    found = []
    for _ in range(1000):
        chosen = np.concatenate([blocks[chance.randrange(20)] for _ in range(20)])
        found.append(1000 * np.polyfit(x[chosen], y[chosen], 1)[0])
    return (1000 * np.polyfit(x, y, 1)[0], *np.percentile(found, [2.5, 97.5]))


def series(readings: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a measure: for logs and time what a step adds, else the value itself."""
    steps = np.array([r["step"] for r in readings], dtype=float)
    if name in ("memory", "files", "threads"):
        return steps, np.array([r[name] for r in readings], dtype=float)
    values = np.array([r["at" if name == "seconds" else name] for r in readings], dtype=float)
    places = np.linspace(0, len(readings) - 1, 201).round().astype(int)  # 200 stretches
    grown = np.diff(steps[places])
    kept = grown > 0
    return steps[places][1:][kept], (np.diff(values[places])[kept] / grown[kept])


def report(readings: list[dict], code: int, argv: list[str], out: Path) -> bool:
    """results/soak.md and its picture; whether nothing grows."""
    half = readings[len(readings) // 2 :]
    steps, seconds = half[-1]["step"], half[-1]["at"] - readings[0]["at"]
    rows, flat = [], []
    for name, (unit, limit) in MEASURES.items():
        x, y = series(half, name)
        found, low, high = slope(x, y)
        flat.append(bool(low <= 0 <= high or abs(found) < limit))
        first, last = np.median(y[: len(y) // 10 + 1]), np.median(y[-len(y) // 10 :])
        interval = f"{found:+.3g} ({low:+.3g} to {high:+.3g})"
        verdict = "yes" if flat[-1] else "NO"
        rows.append([f"{name} ({unit})", f"{first:.3g}", f"{last:.3g}", interval, verdict])
    head = ["measure", "at the half", "at the end", "slope per 1000 steps", "flat"]
    lines = [
        "# Soak",
        "",
        f"`{command_line(argv)}`, {machine()}; {versions()}.",
        "",
        f"{steps} steps in {seconds / 60:.0f} minutes, {len(readings)} readings; a polite kill at "
        f"the end gave exit code {code}. Slopes of the second half, per 1000 steps, with their "
        "95 % intervals.",
        "",
        *table(head, rows),
    ]
    write_lines(out / "soak.md", lines)
    write_jsonl(out / "soak.jsonl", readings[:: max(1, len(readings) // 360)])
    picture(readings, out / "soak.png")
    print("\n".join(lines[6:]))
    return all(flat)


def picture(readings: list[dict], path: Path) -> None:
    """Each measure against the steps."""
    plt = pyplot()
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), constrained_layout=True)
    for ax, (name, (unit, _)) in zip(axes.flat, MEASURES.items(), strict=True):
        x, y = series(readings, name)
        ax.plot(x, y, linewidth=0.8)
        ax.set(title=f"{name} ({unit})", xlabel="step", ylim=(0, 1.15 * max(y)))
        ax.axvline(readings[len(readings) // 2]["step"], color="grey", linewidth=0.5)
    figure.savefig(path, dpi=80)


def read_flags(argv: list[str]) -> argparse.Namespace:
    """The command line of this benchmark."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=positive, default=60)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(argv)


@command
def main(argv: list[str]) -> None:
    """Soak, and say whether anything grows."""
    args = read_flags(argv)
    with tempfile.TemporaryDirectory() as folder:
        readings, code, output = soak(args.minutes, Path(folder))
    if code:
        raise UserError(f"The run ended with exit code {code}: {output[-800:]}")
    steps = len({reading["step"] for reading in readings[len(readings) // 2 :]})
    if steps < 60:  # a slope of 20 blocks needs a few steps in each
        raise UserError(f"The second half had {steps} steps, too few for a slope: more --minutes.")
    bars = output.count("\r")
    if not report(readings, code, argv, args.out) or bars:
        raise UserError(
            "Something grows (see the table), or a progress bar was drawn into a file "
            f"({bars} times)."
        )


if __name__ == "__main__":
    main()
