"""Which warm start a model needs that knows neither tags nor task, until GRPO teaches it more.

    python benchmarks/warm_start.py --model SMOLLM2 --work FOLDER      all of STARTS, two seeds
    python benchmarks/warm_start.py --model SMOLLM2 --work FOLDER --only both --seeds 42
    python benchmarks/warm_start.py --report                           only the page and the picture

Each warm start is one or two rounds of sft.py on problems that are in no dataset of the project,
all of them solved correctly: *worked*, every step of the working shown; *habits*, 60 % answered at
once, 32 % with the working shown, 8 % without the tag (tiny/make.py, as for the bundled model).
Then GRPO, `train.py --preset laptop`, on the bundled task. What is done is not done twice. The
models stay in FOLDER; steps go to results/warm_start.jsonl, the page to results/warm_start.md.
"""

import argparse
import random
import subprocess
import sys
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Any

from common import (
    RESULTS,
    ROOT,
    machine,
    positive,
    pyplot,
    read_jsonl,
    table,
    versions,
    write_jsonl,
    write_lines,
)

from support.errors import UserError, check_choice, command
from support.metrics import alarms_of
from tiny import make

FILE = RESULTS / "warm_start.jsonl"
COMMON = ["--preset=laptop", "--system_prompt=", "--max_new_tokens=64"]
SUPERVISED = ["--train_batch_size=16", "--micro_batch_size=16", "--warmup_steps=5", "--seed=0"]
GRPO = ["--lr=1e-5", "--steps=24", "--eval_interval=6", "--eval_questions=200"]
GRPO += ["--checkpoint_interval=0"]
HABITS = {"worked": (0, 1, 0), "habits": (0.60, 0.32, 0.08)}
# Name: the rounds, each with its steps of 16 examples and its learning rate.
STARTS = {
    "worked": (("worked", 60, 2e-4),),
    "mixed": (("habits", 80, 2e-4),),
    "both": (("worked", 60, 2e-4), ("habits", 20, 1e-4)),
}


def run(script: str, *flags: str) -> None:
    """One command of the project."""
    subprocess.run([sys.executable, script, *COMMON, *flags], cwd=ROOT, check=True)


def write_examples(folder: Path, habit: str) -> Path:
    """Solved problems that are in neither part of the bundled task; as a dataset for sft.py."""
    rng, taken = random.Random(0), set()
    for known in (make.TEST, make.TRAIN):
        make.problems(known, rng, taken)
    rows = make.problems(80 * 16, rng, taken)
    rows = [{**row, "completion": make.completion(row, HABITS[habit], rng)} for row in rows]
    make.write_rows(folder / "train.jsonl", rows)
    return folder


def warm_start(name: str, model: str, work: Path) -> str:
    """The model's folder after the rounds of a start; those that are there are not repeated."""
    done = []
    for habit, steps, rate in STARTS[name]:
        done.append(f"{habit}-{steps}")
        folder = work / "-".join(done)
        if not (folder / "model").exists():
            examples = write_examples(work / f"examples-{habit}", habit)
            own = [f"--model={model}", f"--dataset={examples}", f"--run_dir={folder}"]
            run("sft.py", *SUPERVISED, *own, f"--steps={steps}", f"--lr={rate}")
        model = str(folder / "model")
    return model


def measure(name: str, seed: int, model: str, work: Path) -> None:
    """GRPO from a warm start; adds every step to the file."""
    start = warm_start(name, model, work)
    free = next(p for n in count() if not (p := work / f"grpo-{name}-{seed}-{n}").exists())
    run("train.py", *GRPO, f"--model={start}", f"--seed={seed}", f"--run_dir={free}")
    rows = [{"start": name, "seed": seed} | row for row in read_jsonl(free / "metrics.jsonl")]
    write_jsonl(FILE, [*read_jsonl(FILE), *rows])


# -------------------------------------------------------------------------------------- report


def summary(name: str, seed: int, rows: list[dict[str, Any]]) -> list[str]:
    """One run as a row of the table."""
    held = [row for row in rows if "eval/accuracy" in row]
    steps = [row for row in rows if "time/step" in row]
    told = [
        f"{r['eval/accuracy']:.3f} ({r['eval/accuracy_low']:.2f}–{r['eval/accuracy_high']:.2f})"
        for r in held
    ]
    first, last = steps[:3], steps[-3:]

    def both(metric: str, digits: int) -> str:
        means = (fmean(row[metric] for row in part) for part in (first, last))
        return " → ".join(f"{mean:.{digits}f}" for mean in means)

    alarms = {alarm for row in rows for alarm in alarms_of(row)}
    rounds = ", then ".join(f"{steps} × 16 {habit}" for habit, steps, _ in STARTS[name])
    return [
        f"`{name}`: {rounds}",
        str(seed),
        told[0],
        ", ".join(f"{row['eval/accuracy']:.3f}" for row in held[1:-1]),
        told[-1],
        both("rollout/success_rate", 2),
        both("rollout/completion_tokens", 0),
        both("rollout/entropy", 2),
        both("rollout/no_spread_share", 2),
        f"{sum(row['time/step'] for row in steps) / 60:.1f}",
        ", ".join(sorted(alarms)) or "none",
    ]


HEAD = [
    "supervised examples",
    "seed",
    "held out, before (95 %)",
    "steps 6, 12, 18",
    "step 24 (95 %)",
    "sampled",
    "tokens",
    "entropy",
    "no spread",
    "minutes",
    "alarms",
]


def report() -> None:
    """The page and the picture."""
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in read_jsonl(FILE):
        runs.setdefault((row["start"], row["seed"]), []).append(row)
    if not runs:
        raise UserError(f"There is no run in {FILE.name} to report; leave --report out.")
    runs = {key: runs[key] for key in sorted(runs, key=lambda k: (list(STARTS).index(k[0]), -k[1]))}
    lines = [
        "# SmolLM2-135M-Instruct: a warm start, then GRPO",
        "",
        f"`python benchmarks/warm_start.py` on {machine()}; {versions()}. GRPO: `train.py "
        f"{' '.join(COMMON + GRPO)}`, 6 × 8 completions a step. *Held out* is greedy accuracy on "
        "200 questions of the bundled task; the columns behind it are means of the first three "
        "steps → of the last three. Minutes are those of GRPO's steps, other work beside them.",
        "",
        *table(HEAD, (summary(*key, rows) for key, rows in runs.items())),
        "",
        "![Held-out accuracy, samples and completion length](warm_start.png)",
    ]
    write_lines(RESULTS / "warm_start.md", lines)
    picture(runs, RESULTS / "warm_start.png")


def picture(runs: dict[tuple[str, int], list[dict[str, Any]]], path: Path) -> None:
    """Held-out accuracy with the samples' success, and completion length, over the steps."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    for (name, seed), rows in runs.items():
        color = f"C{list(STARTS).index(name)}"
        style = "-" if seed == max(s for n, s in runs if n == name) else "--"
        held = [row for row in rows if "eval/accuracy" in row]
        steps = [row for row in rows if "time/step" in row]
        shown = [row["step"] for row in held], [row["eval/accuracy"] for row in held]
        left.plot(*shown, style, color=color, marker="o", ms=4, label=f"{name}, seed {seed}")
        for ax, metric in ((left, "success_rate"), (right, "completion_tokens")):
            values = [row[f"rollout/{metric}"] for row in steps]
            ax.plot([row["step"] for row in steps], values, style, color=color, lw=0.8)
    left.set(xlabel="step", ylim=(0, 1), title="right: held out (dots), samples (thin)")
    right.set(xlabel="step", ylim=(0, None), title="tokens of a sample")
    left.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


@command
def main(argv: list[str]) -> None:
    """The runs that are missing, then the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder or name of SmolLM2-135M-Instruct")
    parser.add_argument("--work", type=Path, help="a folder for the models")
    parser.add_argument("--only", nargs="+", default=list(STARTS), help=", ".join(STARTS))
    parser.add_argument("--seeds", nargs="+", type=positive, default=[42, 1])
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args(argv)
    for name in args.only:
        check_choice(name, STARTS, "warm start")
    if not args.report:
        if not (args.model and args.work):
            raise UserError("Give --model and --work, or --report for the page alone.")
        done = {(row["start"], row["seed"]) for row in read_jsonl(FILE)}
        for name in args.only:
            for seed in args.seeds:
                if (name, seed) not in done:
                    measure(name, seed, args.model, args.work.resolve())
    report()


if __name__ == "__main__":
    main(sys.argv[1:])
