"""Ask the trained model and the model it came from the same question, side by side.

    python run.py                          three questions of the test set, with their references
    python run.py --model runs/NAME --question "Tom has 5 apples. ..."

--model is a run folder or a checkpoint; without it, it is the newest run in runs/. The base is the
model that the run started from, unless --base names another. Answers are greedy.
"""

import re
import shutil
import textwrap
from dataclasses import replace

from loss import sequences_log_probs
from objectives.table import NAMES
from rollout import Completion, rollout
from support.answers import find_answer, find_reasoning, is_correct
from support.checkpoint import find_model
from support.command_line import parse_run_config, quantize_of
from support.config import Config
from support.data import Question
from support.errors import UserError, command
from support.evaluation import held_out_questions
from support.generation import Sampling
from support.model import build_accelerator, load_model, load_tokenizer
from support.preflight import check_model
from support.prompts import with_prompts

LABEL = re.compile(r"(reasoning|answer|reward|tokens|said) +")


def greedy_answers(
    name: str, questions: list[Question], config: Config, quantize: str
) -> list[Completion]:
    """Greedy answers of the model `name`, which is dropped afterwards: never two in the memory."""
    accelerator = build_accelerator(config)
    tokenizer = load_tokenizer(name)
    prompted, _ = with_prompts(questions, tokenizer, config)
    if len(prompted) < len(questions):
        raise UserError(
            f"The question is longer than --max_prompt_tokens {config.max_prompt_tokens}; raise it."
        )
    model = load_model(name, config.sampling_precision, quantize=quantize)
    check_model(model, tokenizer, replace(config, model=name), sequences_log_probs)
    model.to(accelerator.device)
    greedy = Sampling(config.max_new_tokens, temperature=0.0, batch_size=config.rollout_batch_size)
    groups = rollout(model, tokenizer, prompted, 1, greedy)
    answers = [(group.question.opened, group.completions[0]) for group in groups]
    return [replace(answer, text=opened + answer.text) for opened, answer in answers]


def describe(title: str, completion: Completion, reference: str) -> str:
    """One model's answer: its reasoning, its answer, and the reward where there is a reference."""
    reasoning = find_reasoning(completion.text)
    answer = find_answer(completion.text, completion.truncated)
    lines = [title, "", f"reasoning  {reasoning if reasoning is not None else '(no <think> tag)'}"]
    lines += [f"answer     {answer if answer is not None else '(no <answer> tag)'}"]
    if reference:
        reward = float(is_correct(completion.text, reference, completion.truncated))
        lines += [f"reward     {reward:.0f} (reference {reference})"]
    lines += [f"tokens     {len(completion.ids)}{', cut off' if completion.truncated else ''}"]
    if reasoning is None or answer is None:
        lines += ["", "said       " + completion.text]
    return "\n".join(lines)


def wrap(line: str, column: int) -> list[str]:
    """A line in pieces; behind a label (`answer     72`) the others are indented."""
    label = LABEL.match(line)
    return textwrap.wrap(line, column, subsequent_indent=" " * len(label[0]) if label else "")


def side_by_side(left: str, right: str, width: int) -> str:
    """Two texts in two columns that fill `width` characters."""
    column = max(20, (width - 3) // 2)
    wrapped = [
        [piece for line in text.splitlines() for piece in wrap(line, column) or [""]]
        for text in (left, right)
    ]
    height = max(map(len, wrapped))
    rows = zip(*(lines + [""] * (height - len(lines)) for lines in wrapped), strict=True)
    return "\n".join(f"{a:<{column}} | {b}" for a, b in rows)


@command
def main(argv: list[str]) -> None:
    """Answer with both models and print the answers beside each other."""
    config, others = parse_run_config(
        argv,
        __doc__,
        NAMES,
        question="the question to ask; without one, the first three of the test set",
        base="the model to compare with, instead of the one the run started from",
    )
    if others["question"] is not None:
        if not others["question"].strip():
            raise UserError(
                "--question is empty; write one, or leave it out for three questions of the test "
                "set."
            )
        questions = [Question(others["question"], "", "")]
    else:
        questions = held_out_questions(config, load_tokenizer(config.model))[:3]
    models = [(config.model, config.quantize)]
    if others["base"]:
        # What a run started from is loaded as in the run; a model that was chosen, as its own.
        base, chosen = find_model(others["base"]), any(a.startswith("--base") for a in argv)
        models.insert(0, (base, quantize_of(base) if chosen else config.quantize))
    names = [name for name, _ in models]
    columns = [greedy_answers(name, questions, config, kind) for name, kind in models]
    width = shutil.get_terminal_size((120, 24)).columns
    for question, *completions in zip(questions, *columns, strict=True):
        print("\n" + textwrap.fill(question.question, width) + "\n")
        pairs = zip(names, completions, strict=True)
        texts = [describe(name, answer, question.reference) for name, answer in pairs]
        print(texts[0] if len(texts) == 1 else side_by_side(*texts, width))


if __name__ == "__main__":
    main()
