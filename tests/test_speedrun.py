"""Records of results/speedrun.md: true ones are verified, and each kind of forgery is refused with a sentence."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import speedrun
import tracks as t
import verify_record as v

from support.checkpoint import write_sums
from support.errors import UserError
from support.evaluation import wilson_interval

COUNT, RIGHT, STEPS = 60, 60, 3


def git(repo, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *words], cwd=repo, check=True, capture_output=True)


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    """A repository with two commits, whose trainer is a few bytes and whose task has 60 questions."""
    repo = tmp_path_factory.mktemp("repo")
    for name in t.SOURCE:
        (repo / name).parent.mkdir(exist_ok=True)
        if name.endswith(".py"):
            (repo / name).write_text(f"# {name}")
    for name in ("objectives/table.py", "support/data.py", "tiny/model/model.safetensors"):
        (repo / name).parent.mkdir(parents=True, exist_ok=True)
        (repo / name).write_text(name)
    (repo / "tiny/task").mkdir()
    for split, first in (("train", 100), ("test", 0)):
        rows = [
            {"question": f"How many are {i}?", "answer": f"#### {i}"}
            for i in range(first, first + COUNT)
        ]
        v_lines = "".join(json.dumps(row) + "\n" for row in rows)
        (repo / f"tiny/task/{split}.jsonl").write_text(v_lines)
    git(repo, "init", "-q")
    git(repo, "add", ".")
    git(repo, "commit", "-q", "-m", "one")
    (repo / "loss.py").write_text("# another loss")
    git(repo, "commit", "-q", "-am", "two")
    return repo


def commits(repo):
    found = subprocess.run(["git", "log", "--format=%H"], cwd=repo, capture_output=True, text=True)
    return found.stdout.split()


def step_row(step):
    """A row of metrics.jsonl that can be: 4 × 2 completions of 5 tokens on average."""
    row = {"step": step, "time/step": 1.0, "time/rollout": 0.5, "time/update": 0.4}
    row |= {"rollout/completion_tokens": 5.0, "perf/tokens_per_second": 80.0, "train/lr": 1e-5}
    return row | ({"eval/accuracy": RIGHT / COUNT} if step == STEPS else {})


def answer(i, text=None):
    text = f"<answer>{i}</answer>" if text is None else text
    said = {"index": i, "question": t.fingerprint(f"How many are {i}?")}
    return said | {"tokens": 5, "truncated": False, "completion": text}


@pytest.fixture(scope="module")
def true_record(repo, tmp_path_factory):
    """A record as speedrun.py writes it, on the laptop's track."""
    folder, commit = tmp_path_factory.mktemp("record") / "true", commits(repo)[1]
    files = t.source_of(commit, repo)
    about = {"commit": commit, "source": t.source_digest(files), "processor": 9.0}
    about |= {
        "machine": "2 CPU cores",
        "versions": "Python 3",
        "base": t.hashlib.sha256(b"tiny/model/model.safetensors").hexdigest(),
    }
    about["train"] = t.digest(v.load_questions(str(repo / "tiny/task"), "train"))
    about["evaluation"] = {"step": STEPS, "temperature": 0.0, "max_new_tokens": 48}
    config = {
        "device": "cpu", "model": "tiny/model", "dataset": "tiny/task", "eval_dataset": "", "eval_questions": 0,
        "question_column": "question", "answer_column": "answer", "max_new_tokens": 48, "precision": "fp32", "lr": 1e-5,
        "warmup_steps": 0, "rollouts_per_step": 4, "group_size": 2, "reward": ["accuracy"], "system_prompt": "", "rollout_url": "",
    }  # fmt: skip
    for seed in t.SEEDS:
        own = folder / f"seed-{seed}"
        speedrun.write_jsonl(own / "evaluation.jsonl", map(answer, range(COUNT)))
        speedrun.write_jsonl(own / "metrics.jsonl", map(step_row, range(1, STEPS + 1)))
        (own / "about.json").write_text(json.dumps(about))
        (own / "config.yaml").write_text(yaml.safe_dump(config | {"seed": seed}))
    untrained = [answer(i, "no idea") for i in range(COUNT)]
    speedrun.write_jsonl(folder / "baseline/0.jsonl", untrained)
    summarize(folder, repo)
    return folder


def summarize(folder, repo):
    """The summary and the hashes, as whoever has changed a file would make them again."""
    found = v.summary_of(folder, "laptop", "me", None, repo)
    (folder / "record.json").write_text(json.dumps(found))
    (folder / "SHA256SUMS").unlink(missing_ok=True)
    write_sums(folder)


@pytest.fixture
def record(true_record, tmp_path):
    return shutil.copytree(true_record, tmp_path / "record")


def rewrite(file, change):
    """Change the rows of a .jsonl file, or what a .json or .yaml file holds."""
    if file.suffix == ".jsonl":
        rows = v.read_jsonl(file)
        rows = change(rows) or rows
        speedrun.write_jsonl(file, rows)
        return
    read, write = (
        (yaml.safe_load, yaml.safe_dump) if file.suffix == ".yaml" else (json.loads, json.dumps)
    )
    found = read(file.read_text())
    file.write_text(write(change(found) or found))


def test_a_true_record_is_verified(record, repo):
    found = v.verify(record, None, repo)
    assert found["seconds"] == STEPS and found["questions"] == COUNT
    low, _ = wilson_interval(RIGHT, COUNT)
    assert [run["low"] for run in found["seeds"].values()] == [low, low]
    assert found["baseline"] == {"strict": 0, "flexible": 0}


def fast(row):
    """Half the time of a step, and of each of its parts."""
    return row | {name: row[name] / 2 for name in row if name.startswith("time/")}


# file, what is done to it, what the sentence says. Each one with the hashes of SHA256SUMS made again.
FORGERIES = {
    "a right answer in the place of a wrong one": (
        "record.json", lambda r: r["seeds"]["42"].update(strict=COUNT - 1), "by the files it is"),
    "a completion is changed": (
        "seed-42/evaluation.jsonl", lambda rows: rows[7].update(completion="<answer>8</answer>"), "not those of this run"),
    "a question is missing": ("seed-1/evaluation.jsonl", lambda rows: rows[:-1], "lacks 1 of the 60 questions"),
    "an easy question twice": ("seed-42/evaluation.jsonl", lambda rows: [*rows[:-1], rows[0]], "answered twice"),
    "another question": ("seed-42/evaluation.jsonl", lambda rows: rows[3].update(question="0" * 16), "another question"),
    "a question too many": ("seed-42/evaluation.jsonl", lambda rows: [*rows, answer(COUNT)], "has 60 questions"),
    "a long answer": ("seed-42/evaluation.jsonl", lambda rows: rows[3].update(tokens=49), "49 tokens, not 1 to 48"),
    "cut off early": ("seed-42/evaluation.jsonl", lambda rows: rows[3].update(truncated=True), "cut off before"),
    "a lower bound of one's own": ("record.json", lambda r: r["seeds"]["1"].update(low=0.99), "by the files it is"),
    "a lower time": ("record.json", lambda r: r.update(seconds=1.0), "record.json says seconds 1.0"),
    "a better untrained model": ("record.json", lambda r: r["baseline"].update(strict=3), "says baseline"),
    "a faster step": ("seed-42/metrics.jsonl", lambda rows: rows[1].update({"time/step": 0.1}), "more than its 0.100 s"),
    "faster with all its parts": ("seed-42/metrics.jsonl", lambda rows: list(map(fast, rows)), "one of the three was changed"),
    "a step is left out": ("seed-42/metrics.jsonl", lambda rows: [rows[0], rows[2]], "hold each step once"),
    "steps of another run": ("seed-42/metrics.jsonl", lambda rows: rows[0].update({"train/lr": 3e-5}), "learning rate"),
    "an unknown commit": ("about.json", lambda a: a.update(commit="0" * 40), "There is no commit"),
    "a branch in its place": ("about.json", lambda a: a.update(commit="HEAD"), "not the full name of a commit"),
    "sampled": ("about.json", lambda a: a["evaluation"].update(temperature=1.0), "sampled at temperature 1.0"),
    "more tokens than in training": ("about.json", lambda a: a["evaluation"].update(max_new_tokens=64), "64 tokens for an answer"),
    "answers of another step": ("about.json", lambda a: a["evaluation"].update(step=2), "those of step 2"),
    "a warm start": ("about.json", lambda a: a.update(base="f" * 64), "began with other weights"),
    "trained on other questions": ("about.json", lambda a: a.update(train="f" * 64), "trained on other questions"),
    "trained on the test file": ("config.yaml", lambda c: c.update(dataset="tiny/task/test.jsonl"), "is one file"),
    "another test set": ("config.yaml", lambda c: c.update(eval_dataset="other"), "--eval_dataset is 'other'"),
    "some of the questions": ("config.yaml", lambda c: c.update(eval_questions=30), "--eval_questions is 30"),
    "a test question in the prompt": ("config.yaml", lambda c: c.update(system_prompt="How many are 7? 7"), "holds 1 of the test questions"),
    "a reward that nobody can see": ("config.yaml", lambda c: c.update(reward=["own.py:paid"]), "not one of reward.py"),
    "on a GPU": ("config.yaml", lambda c: c.update(device="cuda"), "--device is 'cuda'"),
    "the same seed twice": ("config.yaml", lambda c: c.update(seed=42), "the seed of config.yaml is 42"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forgery_is_refused(name, record, repo):
    file, change, sentence = FORGERIES[name]
    shared = file in ("about.json", "config.yaml")  # what both runs must have alike
    for path in [record / f"seed-{s}" / file for s in t.SEEDS] if shared else [record / file]:
        rewrite(path, change)
    write_sums_again(record)
    with pytest.raises(UserError, match=sentence):
        v.verify(record, None, repo)


def write_sums_again(record):
    (record / "SHA256SUMS").unlink()
    write_sums(record)


def test_another_commit_is_refused(record, repo):
    """One that exists, with another loss.py."""
    for seed in t.SEEDS:
        rewrite(record / f"seed-{seed}/about.json", lambda a: a.update(commit=commits(repo)[0]))
    write_sums_again(record)
    with pytest.raises(UserError, match="not that of the commit"):
        v.verify(record, None, repo)


@pytest.mark.parametrize(
    ("right", "untrained", "sentence"),
    [(57, 0, "the lower end must be 0.9"), (COUNT, COUNT, "there is nothing to train")],
)
def test_a_target_that_is_not_reached_or_was_no_target(right, untrained, sentence, record, repo):
    """57 of 60 are 0.95, and may be 0.86."""
    texts = [None if i < right else "?" for i in range(COUNT)]
    for seed in t.SEEDS:
        rows = list(map(answer, range(COUNT), texts))
        speedrun.write_jsonl(record / f"seed-{seed}/evaluation.jsonl", rows)
        rewrite(
            record / f"seed-{seed}/metrics.jsonl",
            lambda rows: rows[-1].update({"eval/accuracy": right / COUNT}),
        )
    before = [answer(i, None if i < untrained else "?") for i in range(COUNT)]
    speedrun.write_jsonl(record / "baseline/0.jsonl", before)
    write_sums_again(record)
    with pytest.raises(UserError, match=sentence):
        v.verify(record, None, repo)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda r: rewrite(r / "seed-1/metrics.jsonl", lambda rows: rows[:2]), "it was changed"),
        (lambda r: (r / "seed-1/more.txt").write_text("?"), "not both in the folder"),
        (lambda r: (r / "SHA256SUMS").unlink(), "is no record"),
    ],
)
def test_a_file_that_its_hash_does_not_know(damage, sentence, record, repo):
    damage(record)
    with pytest.raises(UserError, match=sentence):
        v.verify(record, None, repo)


def test_the_runs_must_be_two_and_alike(record, repo):
    rewrite(record / "seed-1/config.yaml", lambda c: c.update(lr=2e-5))
    with pytest.raises(UserError, match="differ in more than the seed: --lr"):
        v.summary_of(record, "laptop", "me", None, repo)
    shutil.rmtree(record / "seed-1")
    with pytest.raises(UserError, match="seed-1 is missing"):
        v.summary_of(record, "laptop", "me", None, repo)


def test_gsm8k_is_known_by_its_hash(record, repo):
    """The bundled questions are not taken for it."""
    with pytest.raises(UserError, match="does not hold GSM8K"):
        v.summary_of(record, "gsm8k-50", "me", str(repo / "tiny/task"), repo)


RECORDS = sorted(ROOT.glob("results/speedrun/*/record.json"))


@pytest.mark.parametrize("file", RECORDS, ids=lambda file: file.parent.name)
def test_the_records_of_the_table(file):
    """Each one on the laptop's track, from its files alone."""
    record = json.loads(file.read_text())
    found = ["git", "cat-file", "-e", f"{record['commit']}^{{commit}}"]
    if subprocess.run(found, cwd=ROOT, capture_output=True).returncode:
        pytest.skip("not in a clone with the commit of the record")
    if record["track"] == "laptop":
        v.verify(file.parent)


def test_the_table_is_fresh(tmp_path, monkeypatch):
    """`python benchmarks/speedrun.py table` writes it again, and nothing else of the page."""
    page, copy = speedrun.PAGE.read_bytes(), tmp_path / "speedrun.md"
    copy.write_bytes(page)
    monkeypatch.setattr(speedrun, "PAGE", copy)
    speedrun.main(["table"])
    assert RECORDS and copy.read_bytes() == page


def test_a_page_without_marks_is_left_as_it_is(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- records -->\nand no end")
    with pytest.raises(UserError, match="/records"):
        speedrun.put_between(page, "records", ["a table"])
    assert page.read_text() == "<!-- records -->\nand no end"
