"""Questions: GSM8K from the hub, a local file or the bundled task; and their order.

A row needs the column `question`, and either `answer` in GSM8K's format (a worked solution whose
last line is `#### 72`) or a column `answer_only` (the Chinese GSM8K). --question_column and
--answer_column name others; a column so named may hold the final answer alone. Other columns are
kept and handed to the reward functions.
"""

import csv
import gzip
import json
import math
import re
from dataclasses import dataclass, field, replace
from numbers import Number
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from support.answers import states_number
from support.config import Config
from support.errors import UserError, is_text

FORMATS = (".jsonl", ".parquet", ".json", ".csv", ".jsonl.gz")
OPENED = re.compile(r"<(think|thinking|thought|reasoning|answer)>\s*\Z")


@dataclass(frozen=True)
class Question:
    """One question, with its prompt as text and as tokens once `with_prompts` has added them."""

    question: str
    reference: str  # the final answer, as the dataset writes it
    solution: str  # the worked solution without the final answer; empty where the dataset has none
    difficulty: str = (
        ""  # easy, middle or hard; empty where there is no solution to count the steps of
    )
    columns: dict[str, Any] = field(default_factory=dict)  # the row as it was read
    prompt: str = ""
    prompt_ids: list[int] = field(default_factory=list)

    @property
    def opened(self) -> str:
        """The tag that the prompt ends with, as some chat templates do (`<think>`), or "".

        It belongs to the completion as rewards and people see it. (TRL shows its rewards what the
        model has generated, without it.)
        """
        found = OPENED.search(self.prompt)
        return found[0] if found else ""


def load_questions(dataset: str, split: str, config: Config | None = None) -> list[Question]:
    """Read the questions of one split.

    Args:
        dataset: a file in one of FORMATS (then `split` is not looked at), a folder with `train.*`
            and `test.*`, one that `datasets` has written (save_to_disk), or a hub name.
        split: train or test.
        config: dataset_config, of a hub dataset; question_column and answer_column.
    Raises:
        UserError: a missing file or split; a broken row, named by file and line (or row).
    """
    config, path = config or Config(), Path(dataset).expanduser()
    saved = path.is_dir() and is_saved_by_datasets(path)
    if path.is_dir() and not saved:
        path = find_split(path, split)
    elif not path.exists() and (path.suffix in FORMATS or dataset.startswith((".", "/", "~"))):
        raise UserError(
            f"There is no file or folder {dataset}; give --dataset a file, a folder or a hub name."
        )
    if saved:
        rows = read_saved(path, split)
    else:
        rows = read_file(path) if path.exists() else read_hub(dataset, split, config.dataset_config)
    if not rows:
        raise UserError(f"{path} holds no questions.")
    columns = config.question_column, config.answer_column
    return with_difficulty([parse_row(row, where, *columns) for row, where in rows])


def find_split(folder: Path, split: str) -> Path:
    """The one file of `folder`, or of the folder `data` in it, that holds `split`."""
    own = any(f.name.endswith(FORMATS) and f.name.startswith(split) for f in folder.iterdir())
    if (folder / "data").is_dir() and not own:
        folder = folder / "data"  # as in a copy of a hub dataset
    files = [
        f
        for f in sorted(folder.iterdir())
        if f.name.endswith(FORMATS) and f.name.split(".")[0].split("-")[0] == split
    ]
    if len(files) != 1:
        # train.csv, perhaps
        near = files or [f for f in sorted(folder.iterdir()) if f.name.startswith(split)]
        names = ", ".join(f.name for f in near) or "none"
        raise UserError(
            f"{folder} must hold one {split}.jsonl, .parquet, .json or .csv; it holds {names}."
        )
    return files[0]


def is_saved_by_datasets(folder: Path) -> bool:
    """Whether a folder was written by the `save_to_disk` of datasets."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def read_saved(folder: Path, split: str) -> list[tuple[dict, str]]:
    """Rows of a folder that `datasets` has written."""
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # datasets has many kinds for a damaged file
        raise UserError(f"{folder} cannot be read: {first_line(error)}.") from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise UserError(f"{folder} has no split {split}; it has {', '.join(found)}.")
        found = found[split]
    return [(row, f"{folder}, {split} row {i}") for i, row in enumerate(found, 1)]


def read_file(path: Path) -> list[tuple[dict, str]]:
    """Rows of a local file, each with the words that name its place."""
    if not path.name.endswith(FORMATS):
        raise UserError(
            f"{path} is neither .jsonl, .parquet, .json nor .csv; convert it to one of them."
        )
    if path.suffix == ".parquet":
        return read_parquet(path)
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        # Windows programs put a mark at the beginning.
        with opened(path, "rt", encoding="utf-8-sig", newline="") as lines:
            if path.suffix == ".csv":
                return read_csv(path, lines)
            return read_json(path, lines)
    except (OSError, EOFError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path} cannot be read: {reason}.") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} cannot be read as UTF-8 text ({error}); save it again, as UTF-8."
        ) from error


def read_csv(path: Path, lines: TextIO) -> list[tuple[dict, str]]:
    """Rows of a table whose first line has the names of its columns."""
    rows = [(row, f"{path}, row {i}") for i, row in enumerate(csv.DictReader(lines), 1)]
    head = list(rows[0][0]) if rows else []
    if len(head) == 1 and ";" in head[0]:
        raise UserError(f"{path} has ; between its cells; save it with commas.")
    for row, where in rows:
        if None in row or None in row.values():
            raise UserError(
                f"{where} has {'more' if None in row else 'fewer'} cells than the first line has "
                'names; a text with a comma stands in double quotes ("a, b").'
            )
    return rows


def read_parquet(path: Path) -> list[tuple[dict, str]]:
    """Rows of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).rstrip(".\n")
        raise UserError(
            f"{path} cannot be read as Parquet: {reason}; write or download it again."
        ) from error
    return [(row, f"{path}, row {i}") for i, row in enumerate(rows, 1)]


def read_json(path: Path, lines: TextIO) -> list[tuple[dict, str]]:
    """Rows of a file of objects, one in each line; a .json file may hold one list of them."""
    place = "line 1"
    try:
        if path.suffix == ".json":
            text = lines.read()
            if text.lstrip().startswith("["):
                found = json.loads(text)
                return [(row, f"{path}, row {i}") for i, row in enumerate(found, 1)]
            lines = text.splitlines()
        rows = []
        for i, line in enumerate(lines, 1):
            place = f"line {i}"
            if line.strip():
                rows.append((json.loads(line), f"{path}, {place}"))
        return rows
    except UnicodeDecodeError:  # a ValueError too, which the caller explains
        raise
    # Not JSON; a number of 5000 digits; brackets too deep.
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error).split(";")[0]
        raise UserError(
            f"{path}, {place}: not valid JSON ({reason}); each line must be one whole object."
        ) from error


def read_hub(name: str, split: str, hub_config: str) -> list[tuple[dict, str]]:
    """Rows of a dataset on the Hugging Face hub."""
    import datasets

    try:
        rows = datasets.load_dataset(name, hub_config, split=split)
    except Exception as error:  # datasets, the hub client and the network have their own kinds
        advice = "check the name and the connection; a file or folder of that name is not here"
        if "BuilderConfig" in str(error):
            advice = "choose one with --dataset_config"
        raise UserError(
            f"Cannot load the {split} split of the dataset {name!r} from the hub "
            f"({type(error).__name__}: {first_line(error)}); {advice}."
        ) from error
    return [(row, f"{name}, {split} row {i}") for i, row in enumerate(rows, 1)]


def first_line(error: Exception) -> str:
    """The first line of what an exception says, or its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip(".")


def parse_row(
    row: Any, where: str, question_column: str = "question", answer_column: str = "answer"
) -> Question:
    """One dataset row as a Question; `where` names it in the error."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be an object with the columns question and answer.")
    question = row.get(question_column)
    if not isinstance(question, str) or not question.strip():
        raise UserError(
            f"{where}: the column {question_column} is missing or empty, or is not text "
            f"({columns_of(row)}); name the right one with --question_column."
        )
    for name, text in row.items():
        if isinstance(text, str) and not is_text(text):
            raise UserError(
                f"{where}: the column {name} holds half a character (a lone surrogate); mend or "
                "remove it."
            )
    images = [name for name in ("image", "images") if row.get(name)]
    if images:
        raise UserError(
            f"{where}: the column {images[0]} would not be seen, since the model reads text alone; "
            "leave it out, or train with TRL or verl, which know images."
        )
    solution, reference = parse_answer(row, where, answer_column)
    lines = reference.strip().splitlines()
    if not lines:
        raise UserError(f"{where}: the final answer is empty.")
    return Question(question.strip(), lines[0].strip(), solution.strip(), columns=row)


def parse_answer(row: dict[str, Any], where: str, column: str) -> tuple[str, str]:
    """The worked solution of a row, perhaps empty, and its final answer."""
    answer, only = row.get(column), row.get("answer_only")
    if column != "answer" and (is_number(answer) or isinstance(answer, str)):
        solution, marker, reference = str(answer).rpartition("####")
        if not marker and len(reference.strip().splitlines()) > 1:
            raise UserError(
                f"{where}: the column {column} has several lines and no '#### ' line with the "
                "final answer; name another with --answer_column."
            )
        return solution, reference
    solution, marker, reference = (answer if isinstance(answer, str) else "").rpartition("####")
    if only is not None and column == "answer":
        if not is_number(only) and not isinstance(only, str):
            raise UserError(f"{where}: answer_only is {only!r}; it must be a text or a number.")
        return (solution if marker else reference), str(only)
    if not isinstance(answer, str):
        raise UserError(
            f"{where}: the column {column} is missing or is not text ({columns_of(row)}); name the "
            "right one with --answer_column."
        )
    if not marker:
        raise UserError(
            f"{where}: answer has no '#### ' line with the final answer (and there is no "
            "answer_only); if another column holds it, name that with --answer_column."
        )
    return solution, reference


def is_number(value: Any) -> bool:
    """Whether a cell holds a finite number."""
    return isinstance(value, Number) and not isinstance(value, bool) and math.isfinite(value)


def columns_of(row: dict[str, Any]) -> str:
    """The names of a row's columns, for a sentence."""
    return f"the row has: {', '.join(map(str, row)) or 'none'}"


def check_references(questions: list[Question], dataset: str) -> None:
    """Say how many final answers are no number; UserError where no completion could match any."""
    odd = [q.reference for q in questions if not states_number(q.reference)]
    if not odd:
        return
    example = min(odd, key=lambda text: len(text.split()))  # one that looks most like an answer
    if len(odd) == len(questions) and len(example.split()) > 1:
        raise UserError(
            f"None of the final answers of {dataset} is a number or a single word, as in "
            f"{odd[0][:80]!r}: no completion would match them; name the column of the final answer "
            "with --answer_column."
        )
    print(
        f"{len(odd)} of {len(questions)} final answers are no number, such as {odd[0][:80]!r}: an "
        "answer must have the same words"
    )


def with_difficulty(questions: list[Question]) -> list[Question]:
    """Label each question by the lines of its solution: the lower, middle or upper third."""
    steps = [len(q.solution.splitlines()) for q in questions]
    ranked = sorted(s for s in steps if s)
    if not ranked:
        return questions
    low, high = ranked[(len(ranked) - 1) // 3], ranked[(len(ranked) - 1) * 2 // 3]
    labels = [
        "" if not s else "easy" if s <= low else "middle" if s <= high else "hard" for s in steps
    ]
    return [replace(q, difficulty=label) for q, label in zip(questions, labels, strict=True)]


class QuestionStream:
    """The training questions in a seeded order, epoch after epoch, each one once in every epoch.

    `position` (questions taken so far) is the whole state: the order is a function of seed and
    epoch, so a stream that is put back to a position goes on exactly as it would have.
    """

    def __init__(self, questions: list[Question], seed: int, position: int = 0) -> None:
        self.questions = questions
        self.seed = seed
        self.position = position

    def take(self, count: int) -> list[Question]:
        """The next `count` questions; runs over the end of an epoch into the next one."""
        size = len(self.questions)
        taken = []
        while len(taken) < count:
            epoch, start = divmod(self.position, size)
            order = np.random.default_rng((self.seed, epoch)).permutation(size)
            here = order[start : start + count - len(taken)]
            taken += [self.questions[i] for i in here]
            self.position += len(here)
        return taken
