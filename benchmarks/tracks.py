"""The tracks of the speedrun, and the hashes by which a record names what it is about.

This is no command; results/speedrun.md has the rules, verify_record.py checks a record by them.
"""

import hashlib
import io
import subprocess
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from common import ROOT

from support.data import Question
from support.errors import UserError

# What a run of train.py executes and reads. A record pins the bytes of these.
SOURCE = [
    *("train.py", "rollout.py", "reward.py", "loss.py", "replay_buffer.py"),
    *("objectives", "support", "tiny"),
]
SEEDS = (42, 1)
OWN_PROMPT = "that of the run"


@dataclass(frozen=True)
class Track:
    """What a record is about. An empty hash: of the folder in the repository, at the commit."""

    words: str
    target: float  # the lower end of the 95 % interval of strict accuracy has to reach it
    device: str
    model: str
    dataset: str
    weights: str = ""  # SHA-256 of the starting weights
    train: str = ""  # digest of the training questions
    test: str = ""
    flags: tuple[str, ...] = ()
    # What the untrained model is asked with, by the names of benchmarks/defaults.py.
    prompts: tuple[str, ...] = (OWN_PROMPT,)
    cores: int = 0  # of the processor; 0: all


LAPTOP = Track(
    "the bundled task to 0.90, on 2 CPU cores",
    0.90,
    "cpu",
    "tiny/model",
    "tiny/task",
    flags=("--preset=tiny", "--device=cpu"),
    cores=2,
)
GSM8K = {
    "device": "cuda",
    "model": "Qwen/Qwen2.5-0.5B-Instruct",
    "dataset": "openai/gsm8k",
    # Of model.safetensors in revision 7ae557604adf67be50417f59c2c2f167def9a775 on the hub.
    "weights": "fdf756fa7fcbe7404d5c60e26bff1a0c8b8aa1f72ced49e7dd0210fe288fb7fe",
    "train": "a0adf6d8f46379328de42c03fec4aa58a03fac6c356bb2429046422b774327eb",
    "test": "e41d3b6139c52d9e8e30825b033b4086b1830e5253a06cacf2448754f892be97",
    "flags": ("--preset=gsm8k",),
    "prompts": (
        OWN_PROMPT,
        "the worked example as a turn of the chat",
        "two worked examples",
        "step by step, no tag",
    ),
}
TRACKS = {
    "laptop": LAPTOP,
    "gsm8k-50": Track("GSM8K to 50 %, on one GPU", 0.50, **GSM8K),
    "gsm8k-55": Track("GSM8K to 55 %, on one GPU", 0.55, **GSM8K),
}


def require(good: object, sentence: str) -> None:
    """UserError unless it is so."""
    if not good:
        raise UserError(sentence)


# --------------------------------------------------------------------- hashes


def fingerprint(text: str) -> str:
    """What stands for a question in a record, so that the record need not hold its text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest(questions: Iterable[Question]) -> str:
    """Of questions and final answers, in their order."""
    lines = "".join(f"{q.question}\t{q.reference}\n" for q in questions)
    return hashlib.sha256(lines.encode()).hexdigest()


def source_digest(files: dict[str, bytes]) -> str:
    """Of names and contents."""
    lines = (f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def source_here(root: Path = ROOT) -> dict[str, bytes]:
    """SOURCE as it lies in the working tree."""
    paths = [p for name in SOURCE for p in (root / name, *(root / name).rglob("*")) if p.is_file()]
    kept = (path for path in paths if "__pycache__" not in path.parts)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in kept}


def source_of(commit: str, repo: Path = ROOT) -> dict[str, bytes]:
    """SOURCE as it is in a commit; UserError where there is no such commit."""
    named = len(commit) == 40 and set(commit) <= set("0123456789abcdef")
    require(named, f"{commit!r} is not the full name of a commit (40 hexadecimal digits).")
    try:
        line = ["git", "archive", "--format=tar", commit, "--", *SOURCE]
        found = subprocess.run(line, cwd=repo, capture_output=True)
    except OSError as error:
        raise UserError("git is needed to look at the commit of a record; install it.") from error
    require(
        found.returncode == 0,
        f"There is no commit {commit} with the trainer's source in this repository; fetch its "
        f"whole history, or that of the fork that has it ({found.stderr.decode().strip()[:120]}).",
    )
    with tarfile.open(fileobj=io.BytesIO(found.stdout)) as tar:
        files = [member for member in tar.getmembers() if member.isfile()]
        return {member.name: tar.extractfile(member).read() for member in files}
