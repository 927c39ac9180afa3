"""Is a record of results/speedrun.md what it says? Checked from its files, not from its summary.

    python benchmarks/verify_record.py results/speedrun/laptop-preset
    python benchmarks/verify_record.py FOLDER --dataset GSM8K    a folder with it, or its hub name

The rules are in results/speedrun.md. Everything that can be computed again is: each answer is read
by the trainer's own reader, times are added up from metrics.jsonl, and the source, the starting
weights and the questions are compared with those of the commit (of GSM8K and its model: with the
hashes in tracks.py). What nobody can see in files, such as completions that no model has written,
needs a second run: the commit and the settings for it are in the record.
"""

import argparse
import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from common import ROOT, read_jsonl
from tracks import (
    SEEDS,
    TRACKS,
    Track,
    digest,
    fingerprint,
    require,
    source_digest,
    source_of,
)

from support.answers import is_correct, is_correct_flexible
from support.checkpoint import SUMS, sha256
from support.command_line import Parser
from support.data import FORMATS, Question, load_questions
from support.errors import UserError, check_choice, command
from support.evaluation import wilson_interval

SEED_FILES = ("about.json", "config.yaml", "metrics.jsonl", "evaluation.jsonl")
# Of the questions, in bf16: an evaluation inside the run and one of its checkpoint may round apart.
APART = 0.005


# --------------------------------------------------------------------- the parts of a record


@dataclass(frozen=True)
class Facts:
    """What a record is compared with: of its track, and of the source at its commit."""

    track: Track
    source: str
    weights: str
    train: str
    questions: list[Question]  # the whole test set


def facts_of(track: Track, commit: str, dataset: str | None, repo: Path) -> Facts:
    """Of the laptop's track all from the commit; of GSM8K the questions from `dataset`."""
    files = source_of(commit, repo)
    if track.test:
        questions = load_questions(dataset or track.dataset, "test")
        require(
            digest(questions) == track.test,
            f"{dataset or track.dataset} does not hold GSM8K's test questions as they were "
            "published; give --dataset the folder or the hub name of the real ones.",
        )
        return Facts(track, source_digest(files), track.weights, track.train, questions)
    weights = hashlib.sha256(files[f"{track.model}/model.safetensors"]).hexdigest()
    with tempfile.TemporaryDirectory() as folder:
        splits = {}
        for split in ("train", "test"):
            Path(folder, f"{split}.jsonl").write_bytes(files[f"{track.dataset}/{split}.jsonl"])
            splits[split] = load_questions(folder, split)
    return Facts(track, source_digest(files), weights, digest(splits["train"]), splits["test"])


def check_sums(folder: Path) -> None:
    """Each file is what SHA256SUMS says, and no other file is there."""
    sums = folder / SUMS
    require(sums.is_file(), f"{folder} is no record: it has no {SUMS}.")
    lines = [line.partition("  ") for line in sums.read_text(encoding="utf-8").splitlines()]
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {SUMS}
    named = {name for _, _, name in lines}
    odd = sorted(there ^ named)
    require(not odd, f"{odd[:1]} is not both in the folder and in {SUMS}.")
    for found, _, name in lines:
        require(sha256(folder / name) == found, f"{name} is not what {SUMS} says; it was changed.")


def read_answers(file: Path, questions: list[Question], most: int) -> list[dict[str, Any]]:
    """The answers in a file, in the order of the test set: one for each of its questions.

    Args:
        most: max_new_tokens.
    """
    rows = {}
    for row in read_jsonl(file):
        i, where = row["index"], f"{file.parent.name}/{file.name}, question {row['index']}"
        require(i not in rows, f"{where} is answered twice; greedy answers once.")
        require(0 <= i < len(questions), f"{where}: the test set has {len(questions)} questions.")
        same = row["question"] == fingerprint(questions[i].question)
        require(same, f"{where} is another question than that of the test set.")
        require(0 < row["tokens"] <= most, f"{where} has {row['tokens']} tokens, not 1 to {most}.")
        cut = row["truncated"]
        require(not cut or row["tokens"] == most, f"{where} was cut off before its {most} tokens.")
        rows[i] = row
    missing = [i for i in range(len(questions)) if i not in rows]
    require(
        not missing,
        f"{file.parent.name}/{file.name} lacks {len(missing)} of the {len(questions)} questions of "
        f"the test set (the first: {missing[:1]}); all of them count.",
    )
    return [rows[i] for i in range(len(questions))]


def count_right(rows: list[dict[str, Any]], questions: list[Question]) -> tuple[int, int]:
    """How many answers are right: strict, flexible."""
    said = [
        (row["completion"], question.reference, row["truncated"])
        for row, question in zip(rows, questions, strict=True)
    ]
    return sum(is_correct(*one) for one in said), sum(is_correct_flexible(*one) for one in said)


def check_settings(config: dict[str, Any], facts: Facts, name: str) -> None:
    """The run trains the track's model on its training questions, and has not seen the others."""
    track, dataset = facts.track, str(config["dataset"])
    wanted = {"device": track.device, "eval_dataset": "", "eval_questions": 0}
    wanted |= {"question_column": "question", "answer_column": "answer"}
    if not track.test:
        wanted |= {"model": track.model, "rollout_url": ""}
    for option, value in wanted.items():
        found = config[option]
        require(found == value, f"{name}: --{option} is {found!r}; this track has {value!r}.")
    require(
        not dataset.endswith(FORMATS),
        f"{name}: --dataset {dataset} is one file, which is trained on whatever it holds; a folder "
        "or hub name keeps training and test questions apart.",
    )
    own = [reward for reward in config["reward"] if ":" in reward]
    require(not own, f"{name}: --reward {own} is not one of reward.py, so not in the commit.")
    told = [q.question for q in facts.questions if q.question in config["system_prompt"]]
    require(not told, f"{name}: --system_prompt holds {len(told)} of the test questions.")


def check_about(about: dict[str, Any], facts: Facts, config: dict[str, Any], name: str) -> None:
    """The source, the starting weights, the training questions; and the evaluation was greedy."""
    require(
        about["source"] == facts.source,
        f"{name}: the source that ran is not that of the commit {about['commit']}.",
    )
    require(
        about["train"] == facts.train,
        f"{name}: the run trained on other questions than the training questions of the track.",
    )
    stand_in = about["base"] != facts.weights
    require(
        not stand_in or facts.track.test,
        f"{name}: the run began with other weights than those of {facts.track.model}.",
    )
    evaluated, most = about["evaluation"], config["max_new_tokens"]
    require(
        evaluated["temperature"] == 0,
        f"{name}: the answers were sampled at temperature {evaluated['temperature']}; a record is "
        "greedy, temperature 0.",
    )
    found = evaluated["max_new_tokens"]
    require(found == most, f"{name}: {found} tokens for an answer, and {most} in training.")


def check_steps(
    rows: list[dict[str, Any]], config: dict[str, Any], name: str
) -> tuple[float, dict[str, Any]]:
    """The sum of the times of all steps, each of which is there once, and the last one."""
    steps = [row for row in rows if row["step"] > 0]
    numbers = [row["step"] for row in steps]
    require(
        numbers and numbers == list(range(1, len(steps) + 1)),
        f"{name}: metrics.jsonl must hold each step once, from 1 on; it has {numbers[:20]} ….",
    )
    for row in steps:
        where = f"{name}, step {row['step']}"
        parts = [row.get(f"time/{part}", 0.0) for part in ("rollout", "log_probs", "update")]
        require(min(parts) >= 0, f"{where}: a part of it took less than no time.")
        require(
            row["time/step"] >= sum(parts) - 1e-6,
            f"{where}: its parts took {sum(parts):.3f} s, more than its {row['time/step']:.3f} s.",
        )
        lr = config["lr"] * min(1.0, row["step"] / max(1, config["warmup_steps"]))
        same = abs(row["train/lr"] - lr) <= 1e-6 * lr
        require(same, f"{where}: the learning rate is not that of config.yaml; another run's step?")
        tokens = row["rollout/completion_tokens"] * config["rollouts_per_step"]
        rate = tokens * config["group_size"] / row["time/rollout"]
        noted = row["perf/tokens_per_second"]
        several = row.get("rollout/rounds", 1) > 1  # dynamic sampling: of more completions
        require(
            several or abs(rate - noted) <= 1e-3 * noted,
            f"{where}: its tokens and seconds make {rate:.0f} tokens a second, and it says "
            f"{noted:.0f}; one of the three was changed.",
        )
    return sum(row["time/step"] for row in steps), steps[-1]


def read_seed(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a run, and what is said about it."""
    for file in SEED_FILES:
        require((folder / file).is_file(), f"{folder.name} lacks the file {file}.")
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    return config, json.loads((folder / "about.json").read_text(encoding="utf-8"))


def check_seed(folder: Path, seed: int, facts: Facts) -> dict[str, Any]:
    """One run: what it has reached, and in which time."""
    name, questions, (config, about) = folder.name, facts.questions, read_seed(folder)
    require(config["seed"] == seed, f"{name}: the seed of config.yaml is {config['seed']}.")
    check_settings(config, facts, name)
    check_about(about, facts, config, name)
    rows = read_jsonl(folder / "metrics.jsonl")
    seconds, last = check_steps(rows, config, name)
    answered = about["evaluation"]["step"]
    same = answered == last["step"]
    require(same, f"{name}: the answers are those of step {answered}, not of the last one.")
    answers = read_answers(folder / "evaluation.jsonl", questions, config["max_new_tokens"])
    strict, flexible = count_right(answers, questions)
    inside, allowed = last.get("eval/accuracy"), 0.0 if config["precision"] == "fp32" else APART
    require(inside is not None, f"{name}: the run has not evaluated itself after its last step.")
    require(
        abs(strict / len(questions) - inside) <= allowed + 1e-9,
        f"{name}: by its answers {strict / len(questions):.4f} are right, and the run itself had "
        f"found {inside:.4f}; the answers are not those of this run's model.",
    )
    low, high = wilson_interval(strict, len(questions))
    require(
        low >= facts.track.target,
        f"{name}: {strict} of {len(questions)} are right, {strict / len(questions):.3f} "
        f"({low:.3f}–{high:.3f}); the lower end must be {facts.track.target} or more.",
    )
    found = {"steps": last["step"], "seconds": seconds, "strict": strict, "flexible": flexible}
    return found | {"low": low, "high": high, "processor": about["processor"]}


def check_baseline(folder: Path, facts: Facts, most: int) -> dict[str, Any]:
    """What the untrained model does with the best of the track's prompts."""
    counts = {}
    for number, prompt in enumerate(facts.track.prompts):
        file = folder / "baseline" / f"{number}.jsonl"
        require(file.is_file(), f"The untrained model was not asked with the prompt {prompt!r}.")
        counts[prompt] = count_right(read_answers(file, facts.questions, most), facts.questions)
    strict, flexible = (max(column) for column in zip(*counts.values(), strict=True))
    require(
        wilson_interval(max(strict, flexible), len(facts.questions))[0] < facts.track.target,
        "The untrained model reaches the target with a better prompt; there is nothing to train.",
    )
    return {"strict": strict, "flexible": flexible}


def check_alike(configs: list[dict[str, Any]], abouts: list[dict[str, Any]]) -> None:
    """The runs differ in their seed alone."""
    own, names = ("seed", "run_dir", "prompt_date", "steps"), configs[0] | configs[1]
    odd = [n for n in names if n not in own and configs[0].get(n) != configs[1].get(n)]
    require(not odd, f"The runs differ in more than the seed: --{', --'.join(odd)}.")
    for name in ("commit", "base"):
        require(abouts[0][name] == abouts[1][name], f"The runs differ in their {name}.")


def summary_of(
    folder: Path, track: str, by: str, dataset: str | None = None, repo: Path = ROOT
) -> dict[str, Any]:
    """What the files of a record say, without its own summary.

    Args:
        track: its name; by: whose record it is.
        dataset: GSM8K, where the track is on it.
    Raises:
        UserError: the first thing that is wrong with it.
    """
    about_track = TRACKS[check_choice(track, TRACKS, "track")]
    folders = [folder / f"seed-{seed}" for seed in SEEDS]
    for each in folders:
        require(each.is_dir(), f"The run {each.name} is missing; both seeds {SEEDS} must be there.")
    configs, abouts = zip(*map(read_seed, folders), strict=True)
    check_alike(configs, abouts)
    config, about = configs[0], abouts[0]
    facts = facts_of(about_track, about["commit"], dataset, repo)
    seeds = {str(s): check_seed(f, s, facts) for s, f in zip(SEEDS, folders, strict=True)}
    steps = {found["steps"] for found in seeds.values()}
    require(len(steps) == 1, f"The runs have {sorted(steps)} steps; each seed has as many.")
    stand_in = about["base"] != facts.weights
    return {
        "track": track,
        "by": by,
        "model": config["model"] + (" (a stand-in)" if stand_in else ""),
        "questions": len(facts.questions),
        "seconds": max(found["seconds"] for found in seeds.values()),
        "seeds": seeds,
        "baseline": check_baseline(folder, facts, config["max_new_tokens"]),
        "commit": about["commit"],
        "machine": about["machine"],
        "versions": about["versions"],
    }


def verify(folder: Path, dataset: str | None = None, repo: Path = ROOT) -> dict[str, Any]:
    """The summary of a record, if its files bear it out; else UserError."""
    check_sums(folder)
    try:
        record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        found = summary_of(folder, record["track"], record["by"], dataset, repo)
    except (LookupError, TypeError, AttributeError, ValueError, OSError, yaml.YAMLError) as error:
        kind = type(error).__name__
        raise UserError(
            f"{folder.name} cannot be read ({kind}: {error}); a part is missing."
        ) from error
    for name in found | record:
        said, true = record.get(name), found.get(name)
        require(said == true, f"record.json says {name} {said}; by the files it is {true}.")
    return found


@command
def main(argv: list[str]) -> None:
    """Verify each record, and say what it is."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--dataset", help="GSM8K, for records on it (default: from the hub)")
    args = parser.parse_args(argv)
    for folder in args.folders:
        found = verify(folder, args.dataset)
        reached = "; ".join(
            f"seed {seed}: {run['strict'] / found['questions']:.3f} ({run['low']:.3f}–"
            f"{run['high']:.3f}) in {run['seconds']:.1f} s"
            for seed, run in found["seeds"].items()
        )
        words = TRACKS[found["track"]].words
        print(f"{folder} is a record: {words}, in {found['seconds']:.1f} s ({reached}).")


if __name__ == "__main__":
    main()
