"""How soon does a model reach the target? A run for each seed, by the rules of results/speedrun.md.

    python benchmarks/speedrun.py laptop --out results/speedrun/NAME --by YOU -- --steps 6
    python benchmarks/speedrun.py gsm8k-50 --model FOLDER --dataset FOLDER --out FOLDER -- --lr 2e-6
    python benchmarks/speedrun.py gsm8k-50 … --seconds 500    in pieces: exit code 75, call it again
    python benchmarks/speedrun.py table                     the table of results/speedrun.md

Flags behind -- are train.py's. What is done is not done twice: first each run (its folder is in
runs/, and is resumed), then greedy answers to the whole test set, of its last checkpoint and of the
untrained model, then the summary, which verify_record.py checks. --stages does a part of that.
"""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from common import (
    RESULTS,
    ROOT,
    available,
    command_line,
    machine,
    positive,
    put_between,
    read_jsonl,
    table,
    versions,
    whole,
    write_jsonl,
)
from defaults import PROMPTS, asked_with
from tracks import (
    OWN_PROMPT,
    SEEDS,
    SOURCE,
    TRACKS,
    Track,
    digest,
    fingerprint,
    require,
    source_digest,
    source_here,
    source_of,
)
from verify_record import summary_of, verify

from rollout import rollout
from support.checkpoint import SUMS, checkpoints, find_model, sha256, step_of, write_sums
from support.command_line import Parser, parse_config
from support.config import Config, resolve_path
from support.data import Question, load_questions
from support.errors import command
from support.evaluation import evaluate
from support.model import build_accelerator, load_model, load_tokenizer
from support.monitor import quiet_progress
from support.prompts import with_prompts

STAGES = ("train", "evaluate", "baseline", "record")
AGAIN = 75  # the exit code of what has to be called again (EX_TEMPFAIL of sysexits.h)
GRACE = 100.0  # seconds for a step and a checkpoint to be finished; a quarter of less time
PAGE = RESULTS / "speedrun.md"


@dataclass(frozen=True)
class Entry:
    """What one call works on."""

    track: Track
    name: str
    by: str
    out: Path  # of the record
    work: Path  # of the runs
    flags: list[str]  # of train.py
    commit: str
    deadline: float  # on the clock of time.monotonic
    grace: float  # seconds before it, in which nothing long is begun
    questions: int  # of the test set; 0: all
    given: list[str]  # the command line

    def config(self, seed: int) -> Config:
        """The settings of a run; UserError if they are none."""
        return parse_config([*self.flags, f"--seed={seed}"])[0]

    def stop_if_late(self, seconds: float = 0.0) -> None:
        """End with exit code 75 where less than so many seconds are left."""
        if time.monotonic() + seconds > self.deadline:
            print("the time is up: call it again to go on", flush=True)
            sys.exit(AGAIN)


def pinned_commit(given: str | None) -> str:
    """The commit whose source is the one that lies here; empty where git is not there to say."""
    line = ["git", "log", "-1", "--format=%H", "--", *SOURCE]
    try:
        found = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
        commit = given or found.stdout.strip()
        known = found.returncode == 0 and bool(commit)
    except OSError:
        known = False
    if not known:
        print(f"no git repository here, so the commit {given or '(none: --commit)'} is not checked")
        return given or ""
    require(
        source_digest(source_of(commit)) == source_digest(source_here()),
        f"The trainer's source is not that of the commit {commit}; commit what you have changed, "
        "since a record is of a commit.",
    )
    return commit


def weights_of(model: str) -> str:
    """SHA-256 of a model's weights: of its file, or of the list of its files' hashes."""
    folder = Path(resolve_path(model)).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model, allow_patterns=["*.safetensors"]))
    found = [sha256(path) for path in sorted(folder.glob("*.safetensors"))]
    return found[0] if len(found) == 1 else " ".join(found)


# --------------------------------------------------------------------- training


def run_of(entry: Entry, seed: int) -> Path:
    """The folder of a run."""
    return entry.work / f"seed-{seed}"


def noted(entry: Entry, seed: int, **more: Any) -> dict[str, Any]:
    """What is known of a run beside its own files, kept in runs/ from call to call."""
    file = entry.work / f"seed-{seed}.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if more:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found | more), encoding="utf-8")
    return found | more


def train(entry: Entry, seed: int) -> None:
    """Run train.py to its end, or politely stop it in time."""
    run, config, now = run_of(entry, seed), entry.config(seed), source_digest(source_here())
    about = noted(entry, seed)
    require(
        about.get("source", now) == now,
        f"The source has changed since {run} began; put it back, or choose another --out.",
    )
    if max(map(step_of, checkpoints(run)), default=0) >= config.steps:
        return
    entry.stop_if_late(entry.grace)
    if not about:
        train_set = load_questions(resolve_path(config.dataset), "train", config)
        hashes = {"base": weights_of(config.model), "train": digest(train_set), "source": now}
        start = {"commit": entry.commit, "command": command_line(entry.given), "processor": 0.0}
        about = noted(entry, seed, **start, **hashes)
    argv = [*entry.flags, f"--seed={seed}", f"--run_dir={run}"]
    if (run / "config.yaml").exists():
        argv = [f"--resume={run}", f"--steps={config.steps}"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    running = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *argv])
    late = wait(running, entry.deadline - entry.grace)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = sum(b - a for a, b in zip(before[:2], after[:2], strict=True))
    noted(entry, seed, processor=about["processor"] + used)
    code = running.returncode
    stopped = late and code == -signal.SIGTERM  # before its first step
    require(
        code == 0 or stopped,
        f"train.py has ended with exit code {code}; what it says stands above (-9: it was killed, "
        "for want of memory, say). Call this again to go on.",
    )
    rows = read_jsonl(run / "metrics.jsonl")
    spent = sum(row.get("time/step", 0.0) for row in rows)
    done = rows[-1]["step"] if rows else 0
    print(f"seed {seed}: step {done} of {config.steps}, {spent:.1f} s of training", flush=True)
    if late:
        entry.stop_if_late(float("inf"))


def wait(running: subprocess.Popen, until: float) -> bool:
    """For a run to end; at a time it is asked to stop after its step. Whether it was."""
    left = None if until == float("inf") else max(1.0, until - time.monotonic())
    try:
        running.wait(left)
        return False
    except subprocess.TimeoutExpired:
        running.send_signal(signal.SIGTERM)
        running.wait()
        return True
    except KeyboardInterrupt:  # which both of us have heard
        running.wait()
        raise


# --------------------------------------------------------------------- evaluation


def test_set(config: Config) -> list[Question]:
    """All test questions, each with its place."""
    questions = load_questions(resolve_path(config.dataset), "test", config)
    return [replace(q, columns=q.columns | {"place": i}) for i, q in enumerate(questions)]


def answers(
    model: str, config: Config, count: int, prompt: str = OWN_PROMPT
) -> tuple[list[dict], float]:
    """Greedy answers to the test set (its first `count`; 0: all); the seconds that they took."""
    accelerator, tokenizer = build_accelerator(config), load_tokenizer(model)
    questions = test_set(config)[: count or None]
    if prompt == OWN_PROMPT:
        questions, _ = with_prompts(questions, tokenizer, config)
    else:
        questions = asked_with(PROMPTS[prompt], tokenizer, questions)
    network = load_model(model, config.sampling_precision, quantize=config.quantize)
    sample = partial(rollout, network.to(accelerator.device), tokenizer)
    groups: list[Any] = []
    start = time.perf_counter()
    config = replace(config, eval_samples=0)
    evaluate(sample, questions, config, quiet_progress("evaluate"), keep=groups.extend)
    return [row_of(group) for group in groups], time.perf_counter() - start


def row_of(group: Any) -> dict[str, Any]:
    """An answer, and of its question no more than a hash."""
    question, completion = group.question, group.completions[0]
    return {
        "index": question.columns["place"],
        "question": fingerprint(question.question),
        "tokens": len(completion.ids),
        "truncated": completion.truncated,
        "completion": question.opened + completion.text,
    }


def evaluate_run(entry: Entry, seed: int) -> None:
    """The record's folder of a run: settings, metrics, answers, and what else is known."""
    run, folder = run_of(entry, seed), entry.out / f"seed-{seed}"
    found = checkpoints(run)
    require(found, f"{run} has no checkpoint; train first.")
    config = parse_config([f"--config={run / 'config.yaml'}"])[0]
    step, about = step_of(found[-1]), noted(entry, seed)
    if about.get("evaluation", {}).get("step") == step and (folder / "about.json").exists():
        return
    entry.stop_if_late(entry.grace)
    rows, seconds = answers(find_model(str(run)), config, entry.questions)
    write_jsonl(folder / "evaluation.jsonl", rows)
    steps = [row for row in read_jsonl(run / "metrics.jsonl") if row["step"] <= step]
    write_jsonl(folder / "metrics.jsonl", steps)
    settings = {name: without_place(name, value) for name, value in asdict(config).items()}
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    about = noted(
        entry,
        seed,
        machine=machine(available(config.device)),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        versions=versions(),
        weights=weights_of(str(found[-1])),
        evaluation={
            "step": step,
            "temperature": 0.0,
            "max_new_tokens": config.max_new_tokens,
            "batch_size": config.rollout_batch_size,
            "precision": config.sampling_precision,
            "seconds": seconds,
        },
    )
    (folder / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print(f"seed {seed}: {len(rows)} answers of step {step} in {seconds:.1f} s", flush=True)


def without_place(name: str, value: Any) -> Any:
    """A setting without the folders of this machine."""
    local = name in ("model", "dataset") and Path(value).expanduser().is_absolute()
    return Path(value).name if local else value


def ask_untrained(entry: Entry) -> None:
    """The untrained model with each prompt of the track, a file each."""
    config = entry.config(SEEDS[0])
    for number, prompt in enumerate(entry.track.prompts):
        file = entry.out / "baseline" / f"{number}.jsonl"
        if file.exists():
            continue
        entry.stop_if_late(entry.grace)
        rows, seconds = answers(config.model, config, entry.questions, prompt)
        write_jsonl(file, rows)
        print(f"untrained, prompt: {prompt}: {seconds:.1f} s", flush=True)


# --------------------------------------------------------------------- the record and the table


def write_record(entry: Entry) -> None:
    """The summary, the hashes, and whether it is a record."""
    dataset = entry.config(SEEDS[0]).dataset
    found = summary_of(entry.out, entry.name, entry.by, dataset)
    text = json.dumps(found, indent=1) + "\n"
    (entry.out / "record.json").write_text(text, encoding="utf-8")
    (entry.out / SUMS).unlink(missing_ok=True)
    write_sums(entry.out)
    verify(entry.out, dataset)
    print(f"{entry.out}: a record, {found['seconds']:.1f} s; `speedrun.py table` lists it")


def records_table() -> list[str]:
    """A row for each record in results/speedrun, the fastest of a track first."""
    files = sorted((RESULTS / "speedrun").glob("*/record.json"))
    found = [(file.parent, json.loads(file.read_text(encoding="utf-8"))) for file in files]
    tracks, rows = list(TRACKS), []
    for folder, record in sorted(
        found, key=lambda r: (tracks.index(r[1]["track"]), r[1]["seconds"])
    ):
        runs, count = record["seeds"].values(), record["questions"]
        strict = (f"{r['strict'] / count:.3f} ({r['low']:.3f}–{r['high']:.3f})" for r in runs)
        before = (f"{record['baseline'][way] / count:.3f}" for way in ("strict", "flexible"))
        rows.append(
            [
                f"`{record['track']}`",
                f"**{record['seconds']:.1f}**",
                ", ".join(f"{run['seconds']:.1f}" for run in runs),
                next(iter(runs))["steps"],
                ", ".join(strict),
                ", ".join(f"{run['flexible'] / count:.3f}" for run in runs),
                " / ".join(before),
                ", ".join(f"{run['processor']:.0f}" for run in runs),
                record["model"],
                f"{record['machine']}; {record['versions']}",
                f"`{record['commit'][:10]}`",
                f"[{folder.name}](speedrun/{folder.name}) by {record['by']}",
            ]
        )
    head = ["track", "seconds", "of each seed", "steps", "strict (95 %)", "flexible"]
    head += ["untrained, best prompt, strict / flexible", "processor seconds of the commands"]
    return table([*head, "model", "machine", "commit", "record"], rows)


# --------------------------------------------------------------------- the command line


def read_flags(argv: list[str]) -> argparse.Namespace:
    """The command line; UserError if it cannot be."""
    how = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=how, allow_abbrev=False)
    flag = parser.add_argument
    flag("track", choices=[*TRACKS, "table"])
    flag("--out", type=Path, help="the folder of the record")
    flag("--work", type=Path, help="that of its runs (default: runs/speedrun-NAME)")
    flag("--by", default="pocket-grpo", help="whose record it is")
    flag("--model", help="a folder with the track's model, or a stand-in")
    flag("--dataset", help="a folder with the track's questions")
    flag("--commit", help="the commit of the source, where there is no git to ask")
    flag("--seeds", type=int, nargs="+", default=list(SEEDS), help="those to work on now")
    flag("--stages", nargs="+", choices=STAGES, default=STAGES, help="those to do now")
    flag("--seconds", type=positive, help="after which it stops, to be called again")
    flag("--questions", type=whole, default=0, help="of the test set; 0: all, as a record has")
    place = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:place])
    args.flags = argv[place + 1 :]
    require(args.out or args.track == "table", "Say where the record is to be: --out FOLDER.")
    return args


def entry_of(args: argparse.Namespace, argv: list[str]) -> Entry:
    """What the command line asks for, looked at before anything is done."""
    track = TRACKS[args.track]
    flags = [*track.flags, f"--model={args.model or track.model}"]
    flags += [f"--dataset={args.dataset or track.dataset}", "--eval_interval=1000000000"]
    work = args.work or Path("runs") / f"speedrun-{args.out.name}"
    span = args.seconds or float("inf")
    times = time.monotonic() + span, min(GRACE, span / 4)
    places = args.track, args.by, args.out, work, [*flags, *args.flags]
    return Entry(track, *places, pinned_commit(args.commit), *times, args.questions, argv)


@command
def main(argv: list[str]) -> None:
    """Do the stages, for each seed."""
    args = read_flags(argv)
    if args.track == "table":
        put_between(PAGE, "records", records_table())
        return
    entry = entry_of(args, argv)
    entry.config(args.seeds[0])
    if entry.track.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: entry.track.cores])
    entry.out.mkdir(parents=True, exist_ok=True)
    for stage, do in (("train", train), ("evaluate", evaluate_run)):
        for seed in args.seeds if stage in args.stages else ():
            do(entry, seed)
    if "baseline" in args.stages:
        ask_untrained(entry)
    if "record" in args.stages:
        write_record(entry)


if __name__ == "__main__":
    main()
