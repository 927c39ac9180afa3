"""Real runs, killed (SIGKILL) again and again and resumed each time: is anything lost or different?

    python benchmarks/kill_resume.py                      50 kills, then results/kill_resume.md
    python benchmarks/kill_resume.py --kills 6 --only dapo

For each scenario one run is never stopped; another, with the same settings, is killed at random
moments: a phase (rollout, update, in the middle of a checkpoint, …) is chosen, then a moment inside
it. Each time it is resumed as a user would, with `train.py --resume`. At the end the two must agree
bit for bit: metrics (but times and memory), weights, optimizer; TensorBoard must have each step
once; and no kill may have cost more steps than checkpoint_interval.

The processes that are killed are this file with --child, which does nothing but write the name of
each phase into a pipe as train.py enters it.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import (
    RESULTS,
    ROOT,
    command_line,
    machine,
    metrics_of,
    positive,
    table,
    versions,
    write_lines,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from support import checkpoint, schedule
from support.command_line import Parser
from support.errors import UserError, check_choice, command
from support.monitor import Monitor

INTERVAL = 2  # steps between checkpoints
# The rewards differ in each group, always.
SMALL = (
    "--preset=tiny --device=cpu --steps=24 --rollouts_per_step=4 --group_size=4 "
    "--train_batch_size=8 --max_new_tokens=32 --eval_interval=3 --eval_questions=50 "
    f"--checkpoint_interval={INTERVAL} --keep_checkpoints=2 --eval_dataset=tiny/task "
    "--reward accuracy length_penalty --reward_weights 1 0.5"
)
QUESTIONS = 30  # so that an epoch ends in the 8th step
# Two passes over each rollout, so that old log-probabilities count.
SCENARIOS = {
    "grpo": "--objective=grpo --epochs_per_step=2",
    # Dynamic sampling, for which there must be groups without a spread.
    "dapo": "--objective=dapo --epochs_per_step=2 --reward accuracy --reward_weights 1",
    "gspo": "--objective=gspo --epochs_per_step=2 --temperature=0.8",
    "entropy": "--entropy_weight=0.01 --entropy_target=0.5 --top_entropy=0.5 --eval_samples=2",
    "bf16": "--objective=dr_grpo --precision=bf16 --kl_weight=0.05 --gradient_checkpointing",
}
# The functions that are entered in each phase, where they are looked up.
PHASES = {
    "rollout": (train, "sample_and_score"),
    "rewards": (train, "score"),
    "log-probabilities": (train, "policy_pass"),
    "update": (train, "update"),
    "evaluation": (schedule, "evaluate_run"),
    "logs": (Monitor, "flush"),
    "checkpoint": (checkpoint, "save_checkpoint"),
    "checkpoint: hashes": (checkpoint, "write_sums"),
    "checkpoint: deleting": (checkpoint, "discard"),
    "logs, on resume": (Monitor, "open"),
}
ONCE = ("logs, on resume",)  # in a process
OUTSIDE = "between phases, or at the start"


def announce(pipe: int, argv: list[str]) -> None:
    """Run train.py with `argv`, and write the name of each phase into the pipe."""

    def wrapped(function: Any, phase: str) -> Any:
        def call(*args: Any, **settings: Any) -> Any:
            os.write(pipe, f"{phase}\n".encode())
            try:
                return function(*args, **settings)
            finally:
                os.write(pipe, f"{OUTSIDE}\n".encode())

        return call

    for phase, (owner, name) in PHASES.items():
        setattr(owner, name, wrapped(getattr(owner, name), phase))
    train.main(argv)


@dataclass
class Process:
    """A run of train.py in a process of its own, of which we know what it does."""

    argv: list[str]
    typical: dict[str, float]  # seconds that a phase took lately
    phase: str = OUTSIDE
    output: str = ""
    begun: Counter = field(default_factory=Counter)

    def go(self, target: str | None, occurrence: int, chance: random.Random) -> int:
        """Run it, and kill it in the `occurrence`-th `target` phase; its exit code, or -9."""
        ours, theirs = os.pipe()
        arguments = [sys.executable, __file__, "--child", str(theirs), *self.argv]
        with tempfile.TemporaryFile("w+") as log, os.fdopen(ours, "rb", buffering=0) as pipe:
            settings = {"pass_fds": [theirs], "stdout": log, "stderr": log, "cwd": ROOT}
            settings["env"] = os.environ | {"OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(arguments, **settings)
            os.close(theirs)
            entered = time.perf_counter()
            while data := pipe.read(4096):
                for phase in data.decode().splitlines():
                    now = time.perf_counter()
                    self.typical[self.phase] = now - entered
                    self.phase, entered = phase, now
                    self.begun[phase] += 1
                due = target is not None and self.begun[target] >= occurrence
                if due and process.poll() is None:
                    time.sleep(chance.uniform(0, self.typical.get(target, 0.05)))
                    process.send_signal(signal.SIGKILL)
                    target = None
            process.wait()
            log.seek(0)
            self.output = log.read()
        return process.returncode


@dataclass
class Outcome:
    """What a scenario showed."""

    name: str
    kills: Counter = field(default_factory=Counter)  # by phase
    # By kill: steps that were done and had to be done again.
    lost: list[int] = field(default_factory=list)
    runs: int = 0
    processes: int = 0
    rows: int = 0
    differences: list[str] = field(default_factory=list)


def punish(name: str, flags: list[str], kills: int, folder: Path, seed: int) -> Outcome:
    """One scenario: a run that is never stopped, and runs that are killed, `kills` times in all."""
    outcome, chance, typical = Outcome(name), random.Random(f"{name} {seed}"), {}
    whole = folder / f"{name}-whole"
    process = Process([*SMALL.split(), *flags, f"--run_dir={whole}"], typical)
    if process.go(None, 0, chance):
        raise UserError(f"{name}: the run that is not killed failed: {process.output[-500:]}")
    while outcome.kills.total() < kills and not outcome.differences:
        killed = folder / f"{name}-killed-{outcome.runs}"
        survive(outcome, flags, kills, killed, chance, typical)
        compare(outcome, whole, killed)
    return outcome


def survive(
    outcome: Outcome,
    flags: list[str],
    kills: int,
    killed: Path,
    chance: random.Random,
    typical: dict[str, float],
) -> None:
    """A run that is killed until it is done, or has been killed often enough."""
    outcome.runs += 1
    code = None
    while code != 0:
        argv = [f"--resume={killed}"]
        if not (killed / "config.yaml").exists():  # killed before there was anything to resume
            shutil.rmtree(killed, ignore_errors=True)
            argv = [*SMALL.split(), *flags, f"--run_dir={killed}"]
        process = Process(argv, typical)
        target = chance.choice([*PHASES, OUTSIDE]) if outcome.kills.total() < kills else None
        code = process.go(target, 1 if target in ONCE else chance.randint(1, 3), chance)
        outcome.processes += 1
        if code == -signal.SIGKILL:
            outcome.kills[process.phase] += 1
            newest = max((checkpoint.step_of(p) for p in checkpoint.checkpoints(killed)), default=0)
            done = max((row["step"] for row in metrics_of(killed)), default=0)
            outcome.lost.append(max(0, done - newest))
        elif code:
            outcome.differences.append(f"exit code {code}: {process.output[-500:]}")
            return


def compare(outcome: Outcome, whole: Path, killed: Path) -> None:
    """Note every difference between the two runs."""
    expected, found = metrics_of(whole), metrics_of(killed)
    outcome.rows += len(found)
    if expected != found:
        steps = [e["step"] for e, f in zip(expected, found, strict=False) if e != f]
        outcome.differences.append(
            f"metrics differ in steps {steps} ({len(expected)} and {len(found)} rows)"
        )
    for saved in checkpoint.checkpoints(whole):
        other = killed / saved.name
        if checkpoint.find_damage(saved) or not other.is_dir() or checkpoint.find_damage(other):
            outcome.differences.append(f"{saved.name} is not whole")
            continue
        if (saved / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes():
            outcome.differences.append(f"weights differ in {saved.name}")
        states = [torch.load(p / "trainer_state.pt", weights_only=True) for p in (saved, other)]
        try:
            torch.testing.assert_close(*states, rtol=0, atol=0)
        except AssertionError as error:
            outcome.differences.append(f"optimizer differs in {saved.name}: {str(error)[:100]}")
    log = EventAccumulator(str(killed), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    log.Reload()
    for tag in log.Tags()["scalars"]:
        shown, known = [e.step for e in log.Scalars(tag)], [r["step"] for r in found if tag in r]
        if not tag.startswith(("time/", "perf/")) and shown != known:
            outcome.differences.append(f"TensorBoard shows {tag} at {shown}")
    leftovers = [p.name for kind in (".checkpoint*", "**/*.partial") for p in killed.glob(kind)]
    if leftovers:
        outcome.differences.append(f"left behind: {leftovers}")


def report(outcomes: list[Outcome], argv: list[str], out: Path) -> None:
    """results/kill_resume.md."""
    kills = sum((o.kills for o in outcomes), Counter())
    lost = [n for o in outcomes for n in o.lost]
    differences = sum(len(o.differences) for o in outcomes)
    head = ["scenario", "flags", "kills", "processes", "most steps lost"]
    rows = [
        [
            o.name,
            f"`{SCENARIOS[o.name]}`",
            o.kills.total(),
            o.processes,
            max(o.lost, default=0),
            o.rows,
            "; ".join(o.differences) or "none",
        ]
        for o in outcomes
    ]
    lines = [
        "# Killed and resumed",
        "",
        f"`{command_line(argv)}`, {machine()}; {versions()}; one thread for each process.",
        "",
        f"{kills.total()} kills survived in {len(outcomes)} scenarios; differences: {differences}; "
        f"steps lost by a kill: {max(lost, default=0)} at the most (checkpoint_interval is "
        f"{INTERVAL}), {sum(lost) / max(1, len(lost)):.2f} on average.",
        "",
        *table([*head, "rows of metrics compared", "differences"], rows),
        "",
        *table(["phase in which the process was killed", "kills"], kills.most_common()),
    ]
    write_lines(out / "kill_resume.md", lines)


def read_flags(argv: list[str]) -> argparse.Namespace:
    """The command line of this benchmark."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag, names = parser.add_argument, list(SCENARIOS)
    flag("--kills", type=positive, default=50, help="over all scenarios")
    flag("--only", nargs="+", default=names, metavar="SCENARIO", help=", ".join(names))
    flag("--jobs", type=positive, default=2, help="scenarios at a time, one thread each")
    flag("--seed", type=int, default=0, help="of the moments")
    flag("--out", type=Path, default=RESULTS, help="folder for the table")
    args = parser.parse_args(argv)
    args.only = [check_choice(name, SCENARIOS, "scenario") for name in args.only]
    return args


@command
def main(argv: list[str]) -> None:
    """Punish all scenarios; the table is written anew after each."""
    if argv[:1] == ["--child"]:
        announce(int(argv[1]), argv[2:])
        return
    args = read_flags(argv)
    outcomes, count = [], len(args.only)
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(args.jobs) as pool:
        few = Path(name, "few.jsonl")
        questions = (ROOT / "tiny/task/train.jsonl").read_text(encoding="utf-8").splitlines()
        write_lines(few, questions[:QUESTIONS])
        shares = [args.kills // count + (i < args.kills % count) for i in range(count)]
        jobs = []
        for scenario, kills in zip(args.only, shares, strict=True):
            flags = [f"--dataset={few}", *SCENARIOS[scenario].split()]
            jobs.append(pool.submit(punish, scenario, flags, kills, Path(name), args.seed))
        for job in jobs:
            o = job.result()
            outcomes.append(o)
            print(
                f"{o.name}: {o.kills.total()} kills, most steps lost {max(o.lost, default=0)}, "
                f"{o.rows} rows, differences: {'; '.join(o.differences) or 'none'}",
                flush=True,
            )
            report(outcomes, argv, args.out)
    if any(o.differences or max(o.lost, default=0) > INTERVAL for o in outcomes):
        raise UserError("A killed run is not the run that it should be; see the differences above.")


if __name__ == "__main__":
    main()
