"""Several processes: what they cost, what a killed one costs, and what eight GPUs would say.

    python benchmarks/processes.py kills                       20 SIGKILLs of one process of a run
    python benchmarks/processes.py scaling --model FOLDER      seconds a step, 1 and 2 processes
    python benchmarks/processes.py plan                        bytes of a step beside a network

`kills`: a run in two or three processes loses one of them at a random moment, any of them, and is
resumed in two or three processes, until it is done. What was saved must be whole, no kill
may cost more steps than checkpoint_interval, and the launcher must end by itself.

`scaling`: each process has one thread, and the contenders take turns. The time of each exchange is
divided: `waiting` for the slower processes (a barrier before it, here alone), `objects` (results of
all parts, over gloo), `gradients` (their sum).

Results: results/processes.md, each part between its own marks.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from common import (
    RESULTS,
    ROOT,
    command_line,
    machine,
    metrics_of,
    positive,
    put_between,
    read_jsonl,
    table,
    versions,
)
from memory_plan import MODELS, sizes_of
from torch import distributed as dist
from transformers import AutoConfig

import train
from support import checkpoint, distributed
from support.command_line import Parser
from support.errors import UserError, command
from support.monitor import Monitor

INTERVAL = 2  # steps between checkpoints
KILLED = (
    "--preset=tiny --device=cpu --steps=60 --rollouts_per_step=5 --group_size=5 "
    "--train_batch_size=13 --micro_batch_size=4 --epochs_per_step=2 --kl_weight=0.05 "
    "--max_new_tokens=24 --eval_interval=10 --eval_questions=20 "
    f"--checkpoint_interval={INTERVAL} --keep_checkpoints=2"
)
SCALED = (
    "--preset=laptop --system_prompt= --rollouts_per_step=4 --group_size=6 --train_batch_size=24 "
    "--micro_batch_size=8 --max_new_tokens=64 --eval_interval=0 --checkpoint_interval=0 "
    "--precision=fp32 --reward=repetition"
)
KINDS = {  # processes in a run, runs at a time
    "one process": (1, 1),
    "two processes": (2, 1),
    "one process, and another run beside it": (1, 2),
}
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
# Bytes a second that a GPU sends in one direction: an H100's data sheet; 400 Gb/s InfiniBand; TCP.
NVLINK, NETWORK, HOST = 450e9, 50e9, 1e9
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


# --------------------------------------------------------------------- kills


def survive(kills: int, folder: Path, chance: random.Random) -> dict[str, Any]:
    """One run after the other, until so many kills have been survived; what they cost."""
    lost, seconds, who, runs = [], [], Counter(), 0
    while len(lost) < kills:
        run, runs = folder / f"run-{runs}", runs + 1
        while len(lost) < kills and newest(run) < 60:
            before, count = newest(run), chance.choice([2, 3])
            running = start(run, count)
            wait_for(running, run, before)
            time.sleep(chance.uniform(0, 1.5))
            children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
            if running.poll() is not None or len(children) < count:
                break  # it was done before
            rank = chance.randrange(count)
            os.kill(int(children[-count:][rank]), signal.SIGKILL)
            begun = time.monotonic()
            running.communicate(timeout=120)
            seconds.append(time.monotonic() - begun)
            who[f"process {rank + 1} of {count}"] += 1
            done = max((row["step"] for row in metrics_of(run)), default=0)
            lost.append(max(0, done - newest(run)))
            check(run, before)
        finish(run)
    return {"lost": lost, "seconds": seconds, "who": who, "runs": runs}


def newest(run: Path) -> int:
    """The step of the newest checkpoint, 0 if there is none."""
    return max(map(checkpoint.step_of, checkpoint.checkpoints(run)), default=0)


def start(run: Path, count: int) -> subprocess.Popen:
    """Begin the run, or go on with it, in so many processes."""
    argv = [f"--resume={run}"] if newest(run) else [*KILLED.split(), f"--run_dir={run}"]
    if not newest(run) and run.exists():
        raise UserError(f"{run} was killed before its first checkpoint; raise the wait.")
    command = [*LAUNCHER, str(count), "train.py", *argv]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=ONE_THREAD, stdout=pipe, stderr=pipe, text=True)


def wait_for(running: subprocess.Popen, run: Path, before: int) -> None:
    """Until it has saved one more checkpoint, or has ended."""
    while running.poll() is None and newest(run) <= before:
        time.sleep(0.05)


def check(run: Path, before: int) -> None:
    """UserError unless every checkpoint is whole, and none that was there is missing."""
    damage = [checkpoint.find_damage(path) for path in checkpoint.checkpoints(run)]
    if any(damage) or newest(run) < before:
        raise UserError(f"A kill has cost a checkpoint of {run.name}: {damage}.")


def finish(run: Path) -> None:
    """Let one process end the run; UserError unless each step is there once."""
    if newest(run) < 60:
        train.main([f"--resume={run}"])
    steps = [row["step"] for row in metrics_of(run)]
    if steps != list(range(61)):
        raise UserError(f"{run.name} has the steps {steps}.")


def report_kills(found: dict[str, Any], argv: list[str]) -> list[str]:
    """The lines of results/processes.md."""
    lost, seconds = found["lost"], found["seconds"]
    return [
        f"`{command_line(argv)}`, {machine()}; {versions()}.",
        "",
        f"{len(lost)} kills (in runs of 60 steps: {found['runs']}), each resumed in two or three "
        f"processes, by chance, and ended in one; steps lost by a kill: {max(lost)} at the most "
        f"(checkpoint_interval is {INTERVAL}), {statistics.mean(lost):.2f} on average; the "
        f"launcher had ended after {statistics.median(seconds):.1f} s, {max(seconds):.1f} s at "
        "the most; damaged checkpoints: 0; every step once in metrics.jsonl.",
        "",
        *table(["killed", "times"], sorted(found["who"].items())),
    ]


# --------------------------------------------------------------------- scaling


def measure(out: str, argv: list[str]) -> None:
    """Run train.py, and write the seconds of each exchange of each step."""
    spent: Counter = Counter()
    real, gathered = distributed.gather, dist.all_gather_object
    summed, flush = distributed.add_up_gradients, Monitor.flush

    def waiting() -> float:
        begun = time.perf_counter()
        dist.barrier()
        spent["waiting"] += time.perf_counter() - begun
        return time.perf_counter()

    def gather(mine: Any) -> Any:
        begun = waiting()
        try:
            return real(mine)
        finally:
            spent["objects"] += time.perf_counter() - begun

    def count(parts: list[bytes], own: bytes) -> None:
        gathered(parts, own)
        spent["object_bytes"] += sum(map(len, parts))

    def sum_up(model: Any) -> None:
        begun, others = time.perf_counter(), spent["waiting"] + spent["objects"]
        summed(model)
        inside = spent["waiting"] + spent["objects"] - others
        spent["gradients"] += time.perf_counter() - begun - inside

    def write(monitor: Monitor, step: int, steps: int) -> Any:
        row = flush(monitor, step, steps)
        if distributed.is_main():
            with Path(out).open("a") as file:
                file.write(json.dumps({"step": step, "seconds": row.get("time/step"), **spent}))
                file.write("\n")
        spent.clear()
        return row

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        distributed.gather, dist.all_gather_object = gather, count
        train.add_up_gradients = sum_up
    Monitor.flush = write
    train.main(argv)


def scaling(model: str, dataset: str, rounds: int, folder: Path) -> dict[str, list[dict]]:
    """The rows of each step but the first of each run, by kind."""
    rows: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    for number in range(rounds):
        for place, (kind, (count, runs)) in enumerate(KINDS.items()):
            names = [folder / f"{number}-{place}-{i}" for i in range(runs)]
            started = [begin(count, model, dataset, name) for name in names]
            if sum(process.wait() != 0 for process in started):
                raise UserError(f"A run of {kind} failed.")
            rows[kind] += [row for name in names for row in read_jsonl(Path(f"{name}.jsonl"))[1:]]
            shown = statistics.median(row["seconds"] for row in rows[kind])
            print(f"round {number + 1}, {kind}: {shown:.2f} s a step", flush=True)
    return rows


def begin(count: int, model: str, dataset: str, run: Path) -> subprocess.Popen:
    """Three steps in so many processes, which write their rows beside the run."""
    argv = [f"--model={model}", f"--dataset={dataset}", f"--run_dir={run}", "--steps=3"]
    child = [__file__, "--child", f"{run}.jsonl", *SCALED.split(), *argv]
    command = [*LAUNCHER, str(count), *child] if count > 1 else [sys.executable, *child]
    return subprocess.Popen(command, cwd=ROOT, env=ONE_THREAD, stdout=sys.stderr)


def report_scaling(rows: dict[str, list[dict]], argv: list[str], sizes: int) -> list[str]:
    """The lines of results/processes.md."""
    medians = {
        count: {
            name: statistics.median(row.get(name, 0.0) for row in some)
            for name in ("seconds", "waiting", "objects", "gradients", "object_bytes")
        }
        for count, some in rows.items()
    }
    one, two, beside = (each["seconds"] for each in medians.values())
    head = ["what runs", "s a step", "waiting", "objects", "gradients", "objects, MB"]
    body = [
        [
            count,
            f"{m['seconds']:.2f}",
            *(f"{m[name]:.2f} s ({m[name] / m['seconds']:.1%})" for name in list(m)[1:4]),
            f"{m['object_bytes'] / 1e6:.2f}",
        ]
        for count, m in medians.items()
    ]
    return [
        f"`{command_line(argv)}`, {machine()}; {versions()}; one thread for each process.",
        "",
        f"Medians of {min(map(len, rows.values()))} steps or more, in turns. One step takes "
        f"{one / two:.2f} times as long in one process as in two. Two runs at a time, which know "
        f"nothing of each other, do {2 * one / beside:.2f} times the work of one: more these two "
        f"cores do not give. {sizes / 1e6:.0f} million parameters: their gradients are "
        f"{4 * sizes / 1e6:.0f} MB. A step is 4 × 6 completions of 64 tokens at the most, one "
        "optimizer step, fp32.",
        "",
        *table(head, body),
    ]


# --------------------------------------------------------------------- plan


def report_plan(argv: list[str]) -> list[str]:
    """What a step of the preset gsm8k sends, for each model, on 8 and on 64 GPUs."""
    rows = []
    sequences, tokens, updates = 384, 300, 4
    objects = sequences * tokens * 40  # bytes, as measured above: ids, log-probabilities, rewards
    for name, config in MODELS.items():
        sizes = sizes_of(AutoConfig.for_model(**config))
        for words, trained in (
            ("all weights", sizes["parameters"]),
            ("LoRA of rank 16", 16 * sizes["adapter"]),
        ):
            times = []
            for gpus, speed in ((8, NVLINK), (64, NETWORK)):
                sent = 2 * (gpus - 1) / gpus * 4 * trained * updates
                times.append(f"{1000 * (sent / speed + objects / HOST):.0f} ms")
            gradients = 4 * trained * updates
            rows.append([name, words, f"{gradients / 1e9:.2f}", f"{objects / 1e6:.1f}", *times])
    head = ["model", "trained", "gradients, GB", "objects, MB", "8 GPUs", "8 × 8 GPUs"]
    return [
        f"`{command_line(argv)}`. Nobody has measured this.",
        "",
        f"A step of the preset `gsm8k`: {sequences} completions of about {tokens} tokens, "
        f"{updates} optimizer steps. A ring sends each gradient 2 (N − 1) / N times. "
        f"H100: {NVLINK / 1e9:.0f} GB/s over NVLink in one direction; between machines "
        f"{NETWORK / 1e9:.0f} GB/s for each GPU (400 Gb/s InfiniBand); objects over TCP at "
        f"{HOST / 1e9:.0f} GB/s. Latencies are left out.",
        "",
        *table(head, rows),
    ]


# --------------------------------------------------------------------- the command


@command(several=True)
def main(argv: list[str]) -> None:
    """One of the three parts."""
    if argv[:1] == ["--child"]:
        measure(argv[1], argv[2:])
        return
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["kills", "scaling", "plan"])
    parser.add_argument("--kills", type=positive, default=20)
    parser.add_argument("--model", help="folder of a model, for scaling")
    parser.add_argument("--dataset", default="tiny/task", help="for scaling")
    parser.add_argument("--rounds", type=positive, default=3, help="of scaling")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        if args.part == "kills":
            lines = report_kills(survive(args.kills, Path(name), random.Random(0)), argv)
        elif args.part == "scaling":
            if not args.model:
                raise UserError("Give --model, the folder of a model.")
            rows = scaling(args.model, args.dataset, args.rounds, Path(name))
            sizes = sizes_of(AutoConfig.from_pretrained(args.model))["parameters"]
            lines = report_scaling(rows, argv, int(sizes))
        else:
            lines = report_plan(argv)
    put_between(RESULTS / "processes.md", args.part, lines)


if __name__ == "__main__":
    main()
