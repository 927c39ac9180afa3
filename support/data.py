"""Questions: GSM8K from the hub, a local file or the bundled task; their prompts, their order.

A row needs `question`, and either `answer` in GSM8K's format (a worked solution whose last line is
`#### 72`) or a column `answer_only` (the Chinese GSM8K). Other columns are kept and handed to the
reward functions.
"""

import json
import math
import re
from dataclasses import dataclass, field, replace
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np

from support.config import Config, resolve_path
from support.errors import UserError, is_text

FORMATS = (".jsonl", ".parquet")
OPENED = re.compile(r"<(think|thinking|thought|reasoning|answer)>\s*\Z")
NO_LETTERS = re.compile(r"[\W_]+")
TAGS = re.compile(r"</?[a-z]+>")


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


def load_questions(dataset: str, split: str, hub_config: str = "main") -> list[Question]:
    """Read the questions of one split.

    Args:
        dataset: a .jsonl or .parquet file (then `split` is not looked at), a folder with `train.*`
            and `test.*`, or the name of a dataset on the Hugging Face hub.
        split: train or test.
        hub_config: the configuration of a hub dataset.
    Raises:
        UserError: a missing file or split; a broken row, named by file and line (or row).
    """
    path = Path(dataset).expanduser()
    if path.is_dir():
        path = find_split(path, split)
    elif not path.exists() and (path.suffix in FORMATS or dataset.startswith((".", "/", "~"))):
        raise UserError(
            f"There is no file or folder {dataset}; give --dataset a file, a folder or a hub name."
        )
    rows = read_file(path) if path.exists() else read_hub(dataset, split, hub_config)
    if not rows:
        raise UserError(f"{path} holds no questions.")
    return with_difficulty([parse_row(row, where) for row, where in rows])


def find_split(folder: Path, split: str) -> Path:
    """The one file of `folder` that holds `split`."""
    files = [
        f
        for f in sorted(folder.iterdir())
        if f.suffix in FORMATS and f.name.split(".")[0].split("-")[0] == split
    ]
    if len(files) != 1:
        # train.csv, perhaps
        near = files or [f for f in sorted(folder.iterdir()) if f.name.startswith(split)]
        names = ", ".join(f.name for f in near) or "none"
        raise UserError(
            f"{folder} must hold one {split}.jsonl or {split}.parquet; it holds {names}."
        )
    return files[0]


def read_file(path: Path) -> list[tuple[dict, str]]:
    """Rows of a local file, each with the words that name its place."""
    if path.suffix not in FORMATS:
        raise UserError(f"{path} is neither .jsonl nor .parquet; convert it to one of them.")
    if path.suffix == ".parquet":
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
    rows = []
    try:
        # Windows programs put a mark at the beginning.
        with path.open(encoding="utf-8-sig") as lines:
            for i, line in enumerate(lines, 1):
                if line.strip():
                    rows.append((json.loads(line), f"{path}, line {i}"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} cannot be read as UTF-8 text ({error}); save it again, as UTF-8."
        ) from error
    # Not JSON; a number of 5000 digits; brackets too deep.
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error).split(";")[0]
        raise UserError(
            f"{path}, line {i}: not valid JSON ({reason}); each line must be one whole object."
        ) from error
    return rows


def read_hub(name: str, split: str, hub_config: str) -> list[tuple[dict, str]]:
    """Rows of a dataset on the Hugging Face hub."""
    import datasets

    try:
        rows = datasets.load_dataset(name, hub_config, split=split)
    except Exception as error:  # datasets, the hub client and the network have their own kinds
        raise UserError(
            f"Cannot load the {split} split of the dataset {name!r} from the hub "
            f"({type(error).__name__}); check the name and the connection, or give --dataset a "
            "local file or folder."
        ) from error
    return [(row, f"{name}, {split} row {i}") for i, row in enumerate(rows, 1)]


def parse_row(row: Any, where: str) -> Question:
    """One dataset row as a Question; `where` names it in the error."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be an object with the columns question and answer.")
    question, answer, answer_only = row.get("question"), row.get("answer"), row.get("answer_only")
    has = f"the row has: {', '.join(map(str, row)) or 'none'}"
    if not isinstance(question, str) or not question.strip():
        raise UserError(
            f"{where}: the column question is missing or empty, or is not text ({has})."
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
    solution, marker, reference = (answer if isinstance(answer, str) else "").rpartition("####")
    if answer_only is not None:
        number = (
            isinstance(answer_only, Number)
            and not isinstance(answer_only, bool)
            and math.isfinite(answer_only)
        )
        if not number and not isinstance(answer_only, str):
            raise UserError(
                f"{where}: answer_only is {answer_only!r}; it must be a text or a number."
            )
        solution, reference = solution if marker else reference, str(answer_only)
    elif not isinstance(answer, str):
        raise UserError(f"{where}: the column answer is missing or is not text ({has}).")
    elif not marker:
        raise UserError(
            f"{where}: answer has no '#### ' line with the final answer (and there is no "
            "answer_only)."
        )
    if not reference.strip():
        raise UserError(f"{where}: the final answer is empty.")
    return Question(question.strip(), reference.strip(), solution.strip(), columns=row)


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


def with_prompts(
    questions: list[Question], tokenizer: Any, system_prompt: str, max_prompt_tokens: int
) -> tuple[list[Question], int]:
    """Add each question's prompt; leave out those that are too long.

    Returns:
        the questions that fit, and how many did not.
    Raises:
        UserError: if none fits.
    """
    prompts = [build_prompt(question.question, tokenizer, system_prompt) for question in questions]
    # A chat template writes its own special tokens; a model without one gets those of its
    # tokenizer.
    tokens = tokenizer(prompts, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    check_tags(system_prompt, tokenizer)
    fitting = [
        replace(question, prompt=prompt, prompt_ids=ids)
        for question, prompt, ids in zip(questions, prompts, tokens, strict=True)
        if 0 < len(ids) <= max_prompt_tokens
    ]
    if not any(tokens):
        raise UserError(
            "Every prompt is empty: the model's chat template or tokenizer makes no tokens of a "
            "question."
        )
    if not fitting:
        raise UserError(
            f"Every prompt is longer than --max_prompt_tokens {max_prompt_tokens} (the shortest: "
            f"{min(map(len, tokens))} tokens); raise it."
        )
    return fitting, len(questions) - len(fitting)


def check_tags(system_prompt: str, tokenizer: Any) -> None:
    """UserError if the tags that a system prompt asks for do not survive tokens and decoding."""
    for tag in dict.fromkeys(TAGS.findall(system_prompt)):
        ids = tokenizer(f"so {tag} 1", add_special_tokens=False)["input_ids"]
        if tag not in tokenizer.decode(ids, skip_special_tokens=False):
            raise UserError(
                f"--system_prompt asks for {tag}, which this tokenizer cannot write; ask for "
                "another tag, or choose another model."
            )


def training_questions(config: Config, tokenizer: Any) -> list[Question]:
    """The questions that a run trains on, with prompts; says how many are left out."""
    questions = load_questions(resolve_path(config.dataset), "train", config.dataset_config)
    questions, dropped = with_prompts(
        questions, tokenizer, config.system_prompt, config.max_prompt_tokens
    )
    print(
        f"{len(questions)} questions; {dropped} left out: prompt longer than "
        f"{config.max_prompt_tokens} tokens"
    )
    return questions


def build_prompt(question: str, tokenizer: Any, system_prompt: str) -> str:
    """The text that the completion continues, from the model's chat template.

    Templates that know no system role, or leave it out, get the system prompt in front of the
    question. Without a chat template the prompt is the system prompt, the question and the word
    "Answer:", each in a paragraph of its own.
    """
    if not tokenizer.chat_template:
        parts = (system_prompt, f"Question: {question}", "Answer:")
        return "\n\n".join(part for part in parts if part)
    user = {"role": "user", "content": question}
    messages = [{"role": "system", "content": system_prompt}, user] if system_prompt else [user]
    try:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if holds(prompt, question) and holds(prompt, system_prompt):
            return prompt
    except Exception:  # a template raises what it likes
        pass
    user = {"role": "user", "content": f"{system_prompt}\n\n{question}".strip()}
    try:
        prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    except Exception as error:
        raise UserError(
            f"The chat template of the model cannot be used ({error}); mend its "
            "chat_template.jinja, or remove it to go without one."
        ) from error
    if not (holds(prompt, question) and holds(prompt, system_prompt)):
        raise UserError(
            f"The chat template of the model drops the question: it makes {prompt[:200]!r} of "
            f"{question[:80]!r}; mend its chat_template.jinja, or remove it to go without one."
        )
    return prompt


def holds(prompt: str, text: str) -> bool:
    """Whether a prompt has the letters and digits of a text, in order. Templates trim, escape."""
    return NO_LETTERS.sub("", text) in NO_LETTERS.sub("", prompt)


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
