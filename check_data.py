"""Look at a dataset before a night is spent on it: answers, prompts, lengths, duplicates.

    python check_data.py --model MODEL --dataset FOLDER          as train.py would read them
    python check_data.py --preset gsm8k-zh

Nothing is trained, and only the tokenizer of the model is loaded. The options are those of
train.py.
"""

import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from objectives.table import NAMES
from support.answers import same_answer, states_number
from support.command_line import parse_config
from support.config import Config, check_place, resolve_path
from support.data import Question, load_questions
from support.errors import UserError, command
from support.model import load_tokenizer
from support.prompts import check_lengths, check_tags, holds, prompts_of

SHOWN, EXAMPLES = 3, 5  # prompts, final answers
BROKEN = ("\ufffd", "\0", "â€", "Ã©", "Ã¼")  # UTF-8 that was read as something else


def say_columns(questions: list[Question], config: Config) -> None:
    """The columns of the rows, and what each is used for."""
    names = Counter(name for question in questions for name in question.columns)
    used = {config.question_column: "the question", config.answer_column: "solution and answer"}
    if "answer_only" in names and config.answer_column == "answer":
        used["answer_only"] = "the final answer"
    for name, count in names.items():
        missing = f", missing in {len(questions) - count} rows" if count < len(questions) else ""
        print(f"  {name}: {used.get(name, 'for reward functions')}{missing}")


def say_answers(questions: list[Question]) -> None:
    """How many final answers are numbers, and examples of both kinds."""
    kinds: dict[bool, list[str]] = {True: [], False: []}
    for question in questions:
        kinds[states_number(question.reference)].append(question.reference)
    for is_number, words in ((True, "numbers"), (False, "compared word by word")):
        some = list(dict.fromkeys(kinds[is_number]))[:EXAMPLES]
        examples = ", ".join(repr(text[:60]) for text in some)
        if kinds[is_number]:
            print(f"  final answers, {words}: {len(kinds[is_number])}, such as {examples}")


def say_lengths(what: str, lengths: list[int], budget: int, option: str) -> None:
    """The middle, the 95th percentile and the longest, beside the budget."""
    ordered = sorted(lengths)
    over = sum(length > budget for length in ordered)
    print(
        f"  {what}: median {statistics.median(ordered):.0f} tokens, 95 % within "
        f"{ordered[int(0.95 * (len(ordered) - 1))]}, longest {ordered[-1]}; {over} above {option} "
        f"{budget}"
    )


def say_split(
    split: str, questions: list[Question], tokenizer: Any, config: Config
) -> list[list[int]]:
    """All there is to say of one split; returns the tokens of its prompts."""
    print(f"{split}: {len(questions)} questions")
    say_columns(questions, config)
    say_answers(questions)
    prompts, tokens = prompts_of(questions, tokenizer, config)
    say_lengths("prompts", [*map(len, tokens)], config.max_prompt_tokens, "--max_prompt_tokens")
    solutions = [question.solution for question in questions if question.solution]
    if solutions:
        lengths = [len(ids) for ids in tokenizer(solutions, add_special_tokens=False)["input_ids"]]
        what = "the dataset's own solutions (the model may answer in fewer words)"
        say_lengths(what, lengths, config.max_new_tokens, "--max_new_tokens")
    for prompt, question in list(zip(prompts, questions, strict=True))[:SHOWN]:
        print(f"  prompt: {prompt!r}\n  answer: {question.reference!r}")
    unseen = sum(not holds(tokenizer.decode(t), p) for t, p in zip(tokens, prompts, strict=True))
    if unseen:
        print(f"  {unseen} prompts have characters that the tokenizer cannot write")
    broken = [q.question for q in questions if any(sign in q.question for sign in BROKEN)]
    if broken:
        print(
            f"  {len(broken)} questions have signs of a wrong encoding, such as "
            f"{broken[0][:80]!r}: save the file again, as UTF-8"
        )
    return tokens


def plain(question: Question) -> str:
    """Its text without the case of letters, and with single spaces."""
    return " ".join(question.question.split()).casefold()


def say_duplicates(train: list[Question], test: list[Question]) -> None:
    """Questions that stand twice, and those of the test split that are trained on."""
    texts = Counter(map(plain, train))
    twice = sum(count - 1 for count in texts.values())
    print(f"duplicates: {twice} inside train")
    answers: dict[str, Question] = {}
    for question in train:
        first = answers.setdefault(plain(question), question)
        if not same_answer(question.reference, first.reference):
            print(
                f"  one question has two answers, {first.reference!r} and "
                f"{question.reference!r}: {question.question[:80]!r}"
            )
            break
    if test:
        seen = [question for question in test if plain(question) in texts]
        example = f", such as {seen[0].question[:80]!r}" if seen else ""
        print(f"  {len(seen)} questions of test stand in train too{example}")


@command
def main(argv: list[str]) -> None:
    """Read both splits and say what is in them."""
    config, _ = parse_config(argv, __doc__, NAMES)
    tokenizer = load_tokenizer(config.model)
    check_tags(config.system_prompt, tokenizer)
    train = load_questions(resolve_path(config.dataset), "train", config)
    tokens = say_split("train", train, tokenizer, config)
    name = resolve_path(config.eval_dataset or config.dataset)
    test: list[Question] = []
    if not config.eval_dataset and Path(name).is_file():
        print("test: none, --dataset is one file; give --eval_dataset, or --eval_interval 0")
    else:
        check_place(config.eval_dataset, "--eval_dataset")
        try:
            test = load_questions(name, "test", config)
        except UserError as error:
            if config.eval_dataset:
                raise
            print(f"test: none ({error})")
    if test:
        say_split("test", test, tokenizer, config)
    say_duplicates(train, test)
    check_lengths(tokens, config)  # which train.py would refuse too


if __name__ == "__main__":
    main()
