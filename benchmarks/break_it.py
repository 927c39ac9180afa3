"""Break it on purpose: ten sabotages of the demo, each beside the run that is well.

    python benchmarks/break_it.py lr          one of them, as train.py prints it: about a minute;
                                              with more flags of train.py, as --steps 100
    python benchmarks/break_it.py --out FOLDER    all that are missing in FOLDER/break_it.jsonl,
                                              then break_it.md and .png beside it
    python benchmarks/break_it.py --report    only results/break_it.md and .png, from break_it.jsonl

The lesson is docs/break_it.en.md (中文：docs/break_it.zh.md). Each sabotage is `python train.py
--preset tiny` with one flag more, or with a fault in the code: a `Patch`, which puts a faulty
function in the place of the right one while the run lasts. No flag of the trainer is there for it.
"""

import argparse
import functools
import importlib
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

from common import (
    RESULTS,
    folder_of,
    machine,
    pyplot,
    read_jsonl,
    silent_run,
    table,
    versions,
    write_jsonl,
    write_lines,
)
from torch import Tensor

import train
from replay_buffer import Experience
from support.errors import UserError, check_choice, command
from support.metrics import alarms_of


@dataclass(frozen=True)
class Patch:
    """A fault in the code, while a run lasts.

    Args:
        target: the function, `file.py:Class.function`; one that is not there is an error.
        fault: makes the faulty function of the right one.
    """

    target: str
    fault: Callable[[Callable[..., Any]], Callable[..., Any]]

    @property
    def place(self) -> tuple[Any, str]:
        """The module or class that holds the function, and its name there."""
        file, _, names = self.target.partition(":")
        *owners, name = names.split(".")
        module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        return functools.reduce(getattr, owners, module), name

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The fault is there inside of `with`."""
        owner, name = self.place
        with mock.patch.object(owner, name, self.fault(getattr(owner, name))):
            yield


# ------------------------------------------------------------------------------------- the faults


def mask_off_by_one(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The loss is given `mask[:, :-1]` where `mask[:, 1:]` is right.

    So a token is trained where the token before it was sampled: the first one of a completion is
    not.
    """

    def faulty(self: Any, log_probs: Tensor, batch: Experience, *others: Any) -> Any:
        mask = batch.action_mask.roll(1, dims=-1)
        mask[:, 0] = False
        return forward(self, log_probs, replace(batch, action_mask=mask), *others)

    return faulty


def without_temperature(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The trainer's log-probabilities are those of temperature 1, the sampler's are not."""

    def faulty(self: Any, *arguments: Any) -> Any:
        with mock.patch.object(self, "temperature", 1.0):
            return forward(self, *arguments)

    return faulty


# Without the check before a run, which finds that the sampler is another policy, the damage shows.
UNCHECKED = Patch("train.py:check_sampler", lambda right: lambda *arguments: None)


# --------------------------------------------------------------------------------- the sabotages


@dataclass(frozen=True)
class Sabotage:
    """What is different from the demo: flags, or a fault in the code."""

    flags: str = ""
    patches: tuple[Patch, ...] = ()
    beside: str = "healthy"  # the run that it is compared with


MANY_UPDATES = "--epochs_per_step 4 --train_batch_size 32 --steps 12 --eval_interval 2"
SABOTAGES = {
    "lr": Sabotage("--lr 9e-4"),
    "no_clip": Sabotage(f"{MANY_UPDATES} --clip_eps 1000000", beside="healthy_32_updates"),
    "sign": Sabotage("--reward_weights -1"),
    "length": Sabotage("--reward length_penalty --reward_weights -1 --steps 80 --eval_interval 10"),
    "mask": Sabotage(patches=(Patch("loss.py:GRPOLoss.forward", mask_off_by_one),)),
    "short": Sabotage("--max_new_tokens 16"),
    "bf16": Sabotage("--precision bf16-pure"),
    "temperature": Sabotage(
        "--temperature 0.5",
        (Patch("support/policy.py:Policy.forward", without_temperature), UNCHECKED),
        beside="healthy_half",
    ),
    "k1": Sabotage("--kl_weight 1 --kl_estimator k1", beside="k3"),
    "group_size": Sabotage("--group_size 2 --rollouts_per_step 128"),
}
# What they are compared with; and the control of docs/is_this_normal.en.md#only-format.
OTHERS = {
    "healthy": Sabotage(),
    "healthy_32_updates": Sabotage(MANY_UPDATES),
    "healthy_half": Sabotage("--temperature 0.5"),
    "k3": Sabotage("--kl_weight 1"),
    "form": Sabotage("--reward format"),
}
RUNS = OTHERS | SABOTAGES
PAYS_ELSE = ("sign", "length")  # their reward is not success
COMMON = "--preset tiny --device cpu"
QUIET = "--eval_questions 250 --checkpoint_interval 0 --log_completions 0"
KEPT = (
    "step",
    "eval/accuracy",
    "eval/completion_tokens",
    "rollout/returns",
    "rollout/success_rate",
    "rollout/completion_tokens",
    "rollout/entropy",
    "rollout/no_spread_share",
    "rollout/truncated_share",
    "train/clipped_share",
    "train/kl_divergence",
    "train/grad_norm",
    "train/loss",
    "train/sampler_gap",
    "time/step",
)


def run(name: str, flags: list[str], checked: bool = False) -> None:
    """One run of train.py with the faults of a sabotage; `checked`: with the check at its start."""
    sabotage = RUNS[name]
    with ExitStack() as faults:
        for patch in sabotage.patches:
            if not (checked and patch is UNCHECKED):
                faults.enter_context(patch.applied())
        train.main([*COMMON.split(), *sabotage.flags.split(), *flags])


def curve_of(job: tuple[str, int]) -> dict[str, Any]:
    """Run one (name, seed) in silence, and return its curve with the alarms of each step.

    Raises:
        UserError: what train.py ended with.
    """
    name, seed = job
    rows = silent_run(name, functools.partial(run, name), [*QUIET.split(), f"--seed={seed}"])
    curve = [
        {k: round(v, 5) for k, v in row.items() if k in KEPT} | {"alarms": alarms_of(row)}
        for row in rows
    ]
    return {"name": name, "seed": seed, "curve": curve}


# ------------------------------------------------------------------------------------ the report


def first_alarms(curve: list[dict[str, Any]]) -> dict[str, int]:
    """The alarms of a run, each with the step in which it first sounded."""
    first: dict[str, int] = {}
    for row in curve:
        for alarm in row["alarms"]:
            first.setdefault(alarm, row["step"])
    return first


def words_of(sabotage: Sabotage) -> str:
    """What is different, in a cell."""
    faults = [patch for patch in sabotage.patches if patch is not UNCHECKED]
    names = [f"{patch.fault.__name__} in `{patch.target}`" for patch in faults]
    return ", ".join([*names, *([f"`{sabotage.flags}`"] if sabotage.flags else [])]) or "–"


def summary(run: dict[str, Any]) -> list[str]:
    """A run as a row of the table."""
    curve = run["curve"]
    accuracy = [row["eval/accuracy"] for row in curve if "eval/accuracy" in row]
    steps = [row for row in curve if row["step"]]
    mean = lambda name: fmean(row[name] for row in steps[-4:])  # noqa: E731
    return [
        run["name"],
        words_of(RUNS[run["name"]]),
        str(curve[-1]["step"]),
        f"{accuracy[0]:.2f} → {max(accuracy):.2f} → {accuracy[-1]:.2f}",
        f"{steps[0]['rollout/success_rate']:.2f} → {mean('rollout/success_rate'):.2f}",
        f"{steps[0]['rollout/returns']:.2f} → {mean('rollout/returns'):.2f}",
        f"{steps[0]['rollout/completion_tokens']:.0f} → {mean('rollout/completion_tokens'):.0f}",
        ", ".join(f"{name} ({step})" for name, step in first_alarms(curve).items()) or "none",
    ]


HEAD = [
    "run",
    "different from the demo",
    "steps",
    "greedy: start → best → end",
    "sampled: first → last",
    "reward",
    "tokens",
    "alarms (first step)",
]


def report(log: Path, out: Path, seed: int) -> None:
    """The table and the picture, from whatever has been run of a seed so far."""
    runs = {run["name"]: run for run in read_jsonl(log) if run["seed"] == seed}
    runs = {name: runs[name] for name in RUNS if name in runs}
    lines = [
        f"`python benchmarks/break_it.py` on {machine()}; {versions()}; every run: `{COMMON} "
        f"{QUIET}`, seed {seed}. *Greedy* is accuracy on 250 held-out "
        "questions; *last* is the mean of the last four steps; tokens are those of the samples.",
        "",
        *table(HEAD, map(summary, runs.values())),
    ]
    write_lines(out / "break_it.md", lines)
    picture(runs, out / "break_it.png")


def picture(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Each sabotage beside the healthy run: held-out accuracy, samples, reward, first alarm."""
    plt = pyplot()
    names = [name for name in SABOTAGES if {name, RUNS[name].beside} <= runs.keys()]
    figure, axes = plt.subplots(2, 5, figsize=(15, 6), sharey=True, constrained_layout=True)
    for ax, name in zip(axes.flat, names, strict=False):
        beside = RUNS[name].beside
        for run, color in ((runs[beside], "0.6"), (runs[name], "C3")):
            line(ax, run["curve"], "eval/accuracy", "o-", color=color, ms=4)
            line(ax, run["curve"], "rollout/success_rate", "-", color=color, lw=0.8)
            if run["name"] in PAYS_ELSE:
                line(ax, run["curve"], "rollout/returns", "--", color=color, lw=0.8)
        for alarm, step in list(first_alarms(runs[name]["curve"]).items())[:1]:
            ax.axvline(step, color="k", lw=0.8, ls=":")
            ax.text(step, 1.03, f" {alarm}", fontsize=8, va="bottom")
        words = "" if beside == "healthy" else f"grey: {beside}"
        ax.set(title=name, ylim=(-0.45, 1.1), xlabel=f"step    {words}".rstrip())
        ax.xaxis.get_major_locator().set_params(integer=True)
    for ax in axes.flat[len(names) :]:
        ax.axis("off")
    figure.suptitle(
        "Accuracy: dots held out, greedy; thin line samples; dashed: the reward, where it is "
        "another. Red: the sabotage; grey: the healthy run, or the one named below it. Dotted: the "
        "first alarm.",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def line(ax: Any, curve: list[dict[str, Any]], name: str, *style: str, **more: Any) -> None:
    """One metric of a curve, where it has it."""
    shown = [row for row in curve if name in row]
    ax.plot([row["step"] for row in shown], [row[name] for row in shown], *style, **more)


@command
def main(argv: list[str]) -> None:
    """Run the one that is named, or all that are missing, one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", help=", ".join(RUNS))
    parser.add_argument("--checked", action="store_true", help="leave the check at the start on")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--only", nargs="+", default=list(RUNS), help="of all, these")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args, more = parser.parse_known_args(argv)
    for name in [*args.only, *([args.name] if args.name else [])]:
        check_choice(name, RUNS, "sabotage")
    if args.name and (args.report or args.out != RESULTS or args.only != list(RUNS)):
        raise UserError("--report, --out and --only are for all runs; leave the name out.")
    if args.name:
        run(args.name, [f"--seed={args.seed}", *more], args.checked)
        return
    if more or args.checked:
        raise UserError(f"{' '.join(more) or '--checked'} goes with the name of one sabotage.")
    log = args.out / "break_it.jsonl"
    done = {(run["name"], run["seed"]) for run in read_jsonl(log)}
    jobs = [(name, args.seed) for name in args.only if (name, args.seed) not in done]
    if not (jobs or args.report):
        print(f"nothing to do: {log} has these runs; --out FOLDER makes your own")
        return
    for job in [] if args.report else jobs:
        folder_of(args.out)
        # A process for each, which takes its faults and its memory with it.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(curve_of, job).result()
        write_jsonl(log, [*read_jsonl(log), found])
        print(" | ".join(summary(found)), flush=True)
    if not any(run["seed"] == args.seed for run in read_jsonl(log)):
        raise UserError(f"{log} has no run of seed {args.seed} to report; leave --report out.")
    report(log, args.out, args.seed)


if __name__ == "__main__":
    main(sys.argv[1:])
