"""The rungs of docs/ladder/, each over several seeds: what does each one change on this task?

    python benchmarks/ladder.py --out FOLDER        all, then ladder.md, .jsonl and .png in FOLDER
    python benchmarks/ladder.py --out FOLDER --seeds 6 --only "2 baseline"
    python benchmarks/ladder.py --report            the table and the picture, from ladder.jsonl

What is in the folder's ladder.jsonl already is not repeated; without --out that is results/.

Every run has the same task, learning rate, and 128 completions a step. Beside the rungs as they
are stand a few that show what a part is for: the same rewards moved by a constant, and sixteen
updates of each rollout, also with a part of the loss left out.
"""

import argparse
import contextlib
import importlib.util
import math
import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from common import (
    RESULTS,
    ROOT,
    folder_of,
    machine,
    positive,
    pyplot,
    read_jsonl,
    table,
    versions,
    write_jsonl,
    write_lines,
)

from support.errors import UserError, command

LADDER, TARGET = ROOT / "docs" / "ladder", 0.8
sys.path.insert(0, str(LADDER))

from task import Task  # noqa: E402


@dataclass(frozen=True)
class Rung:
    """A script of the ladder; what is added to every reward; and parts of it in another form."""

    script: str
    reward_offset: float = 0.0
    parts: tuple[tuple[str, Any], ...] = ()  # names in the script, and what stands there instead


def without_ratio(log_probs: Any, old: Any, advantages: Any) -> Any:
    """Rung 3's loss at each token."""
    return -(advantages * log_probs)


def without_clip(log_probs: Any, old: Any, advantages: Any) -> Any:
    """The ratio alone."""
    return -(advantages * (log_probs - old).exp())


SIXTEEN = ("PASSES", 4)  # updates, in place of four
RUNGS = {
    "1 REINFORCE": Rung("1_reinforce"),
    "1, rewards 0 and -1": Rung("1_reinforce", -1.0),
    "1, rewards 11 and 10": Rung("1_reinforce", 10.0),
    "2 baseline": Rung("2_baseline"),
    "2, rewards 11 and 10": Rung("2_baseline", 10.0),
    "3 group": Rung("3_group"),
    "4 ratio and clip": Rung("4_clip"),
    "5 KL 0.01": Rung("5_kl"),
    "5, KL 1": Rung("5_kl", parts=(("KL_WEIGHT", 1.0),)),
    "4, 16 updates": Rung("4_clip", parts=(SIXTEEN,)),
    "4, 16 updates, no clip": Rung("4_clip", parts=(SIXTEEN, ("policy_term", without_clip))),
    "4, 16 updates, no ratio": Rung("4_clip", parts=(SIXTEEN, ("policy_term", without_ratio))),
    "5, 16 updates": Rung("5_kl", parts=(SIXTEEN,)),
}
PANELS = {
    "the same rewards, moved by a constant": [
        "1 REINFORCE",
        "1, rewards 0 and -1",
        "1, rewards 11 and 10",
        "2, rewards 11 and 10",
    ],
    "the rungs": ["1 REINFORCE", "2 baseline", "3 group", "4 ratio and clip", "5 KL 0.01"],
    "sixteen updates of each rollout": [
        "4, 16 updates, no ratio",
        "4, 16 updates, no clip",
        "4, 16 updates",
        "5, 16 updates",
    ],
    "the weight of the KL": ["4 ratio and clip", "5 KL 0.01", "5, KL 1"],
}


def load(script: str) -> ModuleType:
    """A script of the ladder as a module; its name is none that could be imported."""
    place = importlib.util.spec_from_file_location(f"rung_{script}", LADDER / f"{script}.py")
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    return module


def climb(name: str, steps: int, seed: int, held_out: int = 250) -> list[dict[str, float]]:
    """Run one in silence, and return the rows of its log."""
    rung = RUNGS[name]
    module = load(rung.script)
    with contextlib.ExitStack() as held, open(os.devnull, "w") as quiet:
        held.enter_context(contextlib.redirect_stdout(quiet))
        for part, other in rung.parts:
            held.enter_context(mock.patch.object(module, part, other))
        task = Task(steps, seed, rung.reward_offset, held_out)
        module.train(task)
    return task.rows


# ------------------------------------------------------------------------------------- the report


def spread(values: list[float], digits: int = 2) -> str:
    """The mean, and the smallest and the largest."""
    mean, low, high = (f"{f(values):.{digits}f}" for f in (statistics.mean, min, max))
    return f"{mean} ({low}–{high})"


def steps_to_target(logs: list[list[dict[str, float]]]) -> str:
    """Median over the seeds of the first step with TARGET of its samples right, and the range."""
    first = [
        next((row["step"] for row in log if row.get("right", 0) >= TARGET), math.inf)
        for log in logs
    ]
    words = ["never" if s == math.inf else f"{s:.0f}" for s in (min(first), max(first))]
    median = statistics.median(first)
    return f"{median:.0f} ({'–'.join(words)})" if median < math.inf else "never"


def summary(name: str, runs: list[dict[str, Any]]) -> list[str]:
    """One variant as a row of the table."""
    logs = [run["rows"] for run in runs]
    greedy = [[row["accuracy"] for row in log if "accuracy" in row] for log in logs]
    late = [statistics.mean(row["right"] for row in log[1:][-3:]) for log in logs]
    return [
        name,
        str(len(runs)),
        steps_to_target(logs),
        spread([values[1] for values in greedy]),
        spread([values[-1] for values in greedy]),
        spread(late),
        spread([log[-1]["kl"] for log in logs], 3),
        spread([log[-1]["seconds"] / log[-1]["step"] for log in logs], 1),
    ]


HEAD = [
    "rung",
    "seeds",
    f"{TARGET} of the samples, step",
    "greedy, step 5",
    "greedy, end",
    "sampled, late",
    "KL, end",
    "s a step",
]


def report(log: Path, out: Path) -> None:
    """The table and the picture, from whatever has been run so far."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for name in RUNGS:
        found = [run for run in read_jsonl(log) if run["name"] == name]
        if found:
            runs[name] = found
    steps = sorted({run["rows"][-1]["step"] for found in runs.values() for run in found})
    lines = [
        f"`python benchmarks/ladder.py` on {machine()}; {versions()}; steps of 128 completions: "
        f"{', '.join(map(str, steps))}. Means over the seeds, in parentheses the lowest and the "
        "highest; of the first step with 0.8 of the samples right the median, and *never* where "
        "it was not reached. *Greedy*: accuracy on 250 held-out questions, 0.12 before training; "
        "*sampled, late*: the samples of the last three steps; *KL*: to the model at the "
        "start, nats a token; *s a step*: seconds of the processor, one thread.",
        "",
        *table(HEAD, [summary(name, found) for name, found in runs.items()]),
    ]
    write_lines(out / "ladder.md", lines)
    picture(runs, out / "ladder.png")


def picture(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """A panel for each question: samples that are right, mean and range; and greedy in dots."""
    plt = pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharey=True, constrained_layout=True)
    for ax, (title, names) in zip(axes.flat, PANELS.items(), strict=True):
        for i, name in enumerate(name for name in names if name in runs):
            color, logs = f"C{list(RUNGS).index(name) % 10}", [run["rows"] for run in runs[name]]
            steps, columns = zip(*values_by_step(logs, "right"), strict=True)
            mean, low, high = (list(map(f, columns)) for f in (statistics.mean, min, max))
            ax.plot(steps, mean, color=color, label=name)
            ax.fill_between(steps, low, high, color=color, alpha=0.12, lw=0)
            for step, values in values_by_step(logs, "accuracy"):
                place = [step + 0.25 * (i - len(names) / 2)] * len(values)  # beside each other
                ax.plot(place, values, "o", color=color, ms=4, alpha=0.6)
        ax.set(title=title, xlabel="step", ylim=(0, 1.02), xticks=range(0, 16, 5))
        ax.legend(frameon=False, fontsize=8, bbox_to_anchor=(1, 0.5), loc="center left")
    for ax in axes[:, 0]:
        ax.set_ylabel("right: samples (lines), held out, greedy (dots)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def values_by_step(logs: list[list[dict[str, float]]], name: str) -> list[tuple[int, list[float]]]:
    """A metric at each step that has it, of all seeds."""
    steps = sorted({row["step"] for log in logs for row in log if name in row})
    return [(s, [r[name] for log in logs for r in log if r["step"] == s]) for s in steps]


@command
def main(argv: list[str]) -> None:
    """Run what is missing, one after the other, and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--steps", type=positive, default=15, help="5 or more")
    parser.add_argument("--only", nargs="+", default=list(RUNGS))
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if args.steps < 5:
        raise UserError("--steps must be 5 or more: the table has a column of step 5.")
    for name in args.only:
        if name not in RUNGS:
            raise UserError(f"There is no rung {name!r}; choose among {list(RUNGS)}.")
    log = args.out / "ladder.jsonl"
    runs = read_jsonl(log)
    other = {run["rows"][-1]["step"] for run in runs} - {args.steps}
    if other and not args.report:
        raise UserError(f"{log} has runs of {max(other)} steps; name another folder by --out.")
    done = {(run["name"], run["seed"]) for run in runs}
    todo = [(name, seed) for seed in args.seeds for name in args.only if (name, seed) not in done]
    for name, seed in [] if args.report else todo:
        folder_of(args.out)
        rows = climb(name, args.steps, seed)
        write_jsonl(log, [*read_jsonl(log), {"name": name, "seed": seed, "rows": rows}])
        print(
            f"{name}, seed {seed}: {rows[-1]['accuracy']:.3f} in {rows[-1]['seconds']:.0f} s",
            flush=True,
        )
    if not read_jsonl(log):
        raise UserError(f"There is no run in {log} to report; leave --report out.")
    if not (todo or args.report):
        print(f"nothing to do: {log} has these runs; --out FOLDER makes your own")
        return
    report(log, args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
