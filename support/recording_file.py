"""The file that report.py reads, completions.jsonl: a line for each step and each evaluation.

It stays below LIMIT bytes: a long run keeps every second step, then every fourth, and so on, always
with the first and the last one. Each text and each list in a line has a limit too. Texts are those
of datasets and models: whoever shows them must trust none.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.answers import is_correct
from support.files import write_whole

FILE = "completions.jsonl"
LIMIT = 6_000_000  # bytes of the file
MOST_TOKENS = 8192  # of a step; a completion counts once for each optimizer step that trained it
MOST_GROUPS, MOST_COMPLETIONS = 64, 64  # of a step, of a group
MOST_TEXT = 2000  # characters of a question or of a held-out answer
COLUMNS = {"step": int, "every": int}  # of each line
CONTENT = {
    "groups": {"groups": list, "all": int, "completions": list, "objective": dict},
    "answers": {"answers": list},
}
BROKEN = "\ufffd"  # what a half of a character is decoded to


class RecordingFile:
    """The file of a run, open for writing."""

    def __init__(
        self, run_dir: Path, start_step: int = 0, steps: int = 0, eval_interval: int = 0
    ) -> None:
        """Take back what was written after `start_step`, and what is no line of ours.

        Args:
            steps, eval_interval: of the run, to know its last step and to count its evaluations.
        """
        self.path = run_dir / FILE
        self.steps, self.eval_interval = steps, max(1, eval_interval)
        rows, broken = read_rows(self.path) if start_step and self.path.exists() else ([], 0)
        if broken:
            print(f"{self.path}: {broken} lines cannot be read, and are left out")
        rows = [row for row in rows if row["step"] <= start_step]
        self.every = max([1, *(row["every"] for row in rows)])
        self.rewrite(rows)

    def keeps(self, kind: str, step: int) -> bool:
        """Whether a step's line of this kind (groups or answers) is kept."""
        place = step - 1 if kind == "groups" else step // self.eval_interval
        return place % self.every == 0 or step == self.steps

    def append(self, kind: str, step: int, content: dict[str, Any]) -> None:
        """Write a line, if it is kept; where the file is full, make room first in all of it."""
        if not self.keeps(kind, step):
            return
        row = {"step": step, "every": self.every, **content}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(as_line(row))
        while self.path.stat().st_size > LIMIT and self.every < 2**30:
            self.every *= 2
            rows = [r for r in read_rows(self.path)[0] if self.keeps(kind_of(r), r["step"])]
            self.rewrite([r | {"every": self.every} for r in rows])

    def rewrite(self, rows: Sequence[dict[str, Any]]) -> None:
        """Replace the file by one with these rows; it is whole at every moment."""
        write_whole(self.path, "".join(map(as_line, rows)).encode())


def as_line(row: dict[str, Any]) -> str:
    """A row in ASCII, so that half a character of a dataset cannot spoil the file."""
    return json.dumps(row, separators=(",", ":"), allow_nan=False) + "\n"


def kind_of(row: dict[str, Any]) -> str:
    """What a row is of."""
    return "groups" if "groups" in row else "answers"


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a recording, and how many of its lines are none."""
    rows, broken = [], 0
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
            kinds = COLUMNS | CONTENT[kind_of(row)]
            good = all(isinstance(row[name], kind) for name, kind in kinds.items())
        except (ValueError, TypeError, KeyError, RecursionError):
            good = False
        if good:
            rows.append(row)
        broken += not good
    return rows, broken


# ------------------------------------------------------------------------- what stands in a line


def rounded(values: Sequence[float]) -> list[float | None]:
    """Numbers with 7 digits, as many as float32 has; None where one is not finite."""
    return [float(f"{x:.7g}") if math.isfinite(x) else None for x in values]


def question_of(group: Any) -> dict[str, Any]:
    """A group's question."""
    question = group.question
    return {"question": question.question[:MOST_TEXT], "reference": question.reference[:MOST_TEXT]}


def group_of(q: int, group: Any, advantages: Any, rewards: list[str]) -> dict[str, Any]:
    """A group: its question, and the rewards, advantages and lengths of its completions.

    Args:
        advantages: float (G,); rewards: the names of its K rewards.
    """
    found = {"group": q, **question_of(group), "all": len(group.completions)}
    found["returns"] = rounded(group.returns[:MOST_COMPLETIONS].tolist())
    found["advantages"] = rounded(advantages[:MOST_COMPLETIONS].tolist())
    found["lengths"] = [len(each.ids) for each in group.completions[:MOST_COMPLETIONS]]
    if len(rewards) > 1:
        rows = [rounded(row[:MOST_COMPLETIONS].tolist()) for row in group.rewards]
        found["rewards"] = dict(zip(rewards, rows, strict=True))
    return found


def completion_of(group: Any, i: int, tokenizer: Any = None) -> dict[str, Any]:
    """A completion of a group, its text token by token where there is a tokenizer."""
    question, completion = group.question, group.completions[i]
    text = question.opened + completion.text
    found = {"opened": question.opened, "truncated": completion.truncated}
    found["right"] = bool(is_correct(text, question.reference, completion.truncated))
    if tokenizer is None:
        return found | {"text": text[:MOST_TEXT], "length": len(completion.ids)}
    copies = sum(each.ids == completion.ids for each in group.completions)
    return found | {"copies": copies, "tokens": token_texts(tokenizer, completion.ids)}


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text that each token adds: joined, they are the completion.

    A token is decoded behind the one before it, since some tokenizers drop a space at the
    beginning. A character of several tokens stands at its last one.
    """
    texts, before, start, read = [], "", 0, 0
    for i in range(len(ids)):
        text = tokenizer.decode(ids[start : i + 1], clean_up_tokenization_spaces=False)
        if text.endswith(BROKEN) and i + 1 < len(ids) and i - read < 4:
            texts.append("")
            continue
        texts.append(text[len(before) :])
        start, read = read, i + 1
        before = tokenizer.decode(ids[start:read], clean_up_tokenization_spaces=False)
    return texts
