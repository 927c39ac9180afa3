"""Find the answer in a completion; the rewards by name, and your own from a file.

Every reward function, built in or yours, has the signature of TRL's for plain-text prompts and completions:

    def my_reward(prompts: list[str], completions: list[str], **columns) -> list[float | None]

`columns` holds a list for every column of the dataset, and also `reference` (the final answers), `completion_ids`
(token ids) and `max_new_tokens`. None means "cannot be scored": that completion takes no part in its group.
"""

import copy
import importlib.util
import inspect
import math
import re
import sys
import traceback
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errors import UserError, choose

RewardFunction = Callable[..., list[float | None]]

# 72, -72, - 72, 1,000, 72.50, .5, 1e3; the comma only where it separates thousands.
NUMBER = re.compile(
    r"(?:^\s*[-+] |[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d|,\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?!\d))?"
)
REFERENCE = re.compile(
    r"[-+]? ?[\d.,]+(?:[eE][-+]?\d+)?(?: ?/ ?\d+)?(?:\.| ?%|(?: [^\W\d]+)*)"
)  # a number, and perhaps its unit
NOISE = str.maketrans(
    {"$": None, "€": None, "£": None, "¥": None, "−": "-", "–": "-", "—": "-"}
)  # currency; minus signs
OVERLONG_SHARE = 0.2
LARGEST_REWARD = torch.finfo(torch.float32).max
LONGEST_ANSWER = 200  # characters; more than that is an essay
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def find_answer(completion: str) -> str | None:
    """The text inside the last complete `<answer>…</answer>`, stripped; None if there is none."""
    end = completion.rfind("</answer>")
    start = completion.rfind("<answer>", 0, max(end, 0))
    return None if start < 0 else completion[start + len("<answer>") : end].strip()


def find_reasoning(completion: str) -> str | None:
    """The text inside the first `<think>…</think>`, stripped; None if there is none."""
    _, opened, rest = completion.partition("<think>")
    inside, closed, _ = rest.partition("</think>")
    return inside.strip() if opened and closed else None


def parse_number(text: str) -> Fraction | None:
    """The one number that `text` states, as a person would read it; None if it states none, or several.

    `72`, `$72`, `72.0`, `72 apples`, `1,000`, `3/4` and `70 + 2 = 72` state one; `70 or 72` does not, so that listing
    every number earns nothing.
    """
    text = text[: LONGEST_ANSWER + 1].translate(NOISE)
    if len(text) > LONGEST_ANSWER:
        return None
    text = text.rpartition("=")[2]
    found = list(NUMBER.finditer(text))
    values = [Fraction(match.group().replace(",", "").replace(" ", "").strip()) for match in found]
    if len(values) == 2 and text[found[0].end() : found[1].start()].strip() == "/" and values[1]:
        return values[0] / values[1]
    return values[0] if len(values) == 1 else None


def same_answer(answer: str, reference: str) -> bool:
    """Whether two answers are the same number; where the reference is no plain number (x^2, H2O), the same words."""
    target = parse_number(reference) if REFERENCE.fullmatch(reference.translate(NOISE).strip()) else None
    if target is None:
        return answer.casefold().split() == reference.casefold().split()
    return parse_number(answer) == target


def is_correct(completion: str, reference: str) -> bool:
    """Strict: the answer tag is there and holds the reference."""
    answer = find_answer(completion)
    return answer is not None and same_answer(answer, reference)


def is_correct_flexible(completion: str, reference: str) -> bool:
    """Flexible: the answer tag, or without one the last number anywhere, is the reference."""
    answer = find_answer(completion)
    if answer is None:
        tail = completion[-10 * LONGEST_ANSWER :]
        tail = tail if tail == completion else tail.partition(" ")[2]  # not from the middle of a number
        answer = (NUMBER.findall(tail.translate(NOISE)) or [""])[-1]
    return same_answer(answer, reference)


def accuracy(prompts: list[str], completions: list[str], reference: list[str], **columns: Any) -> list[float | None]:
    """1 if the last answer tag holds the reference, else 0. No credit for a part of it."""
    return [float(is_correct(c, r)) for c, r in zip(completions, reference, strict=True)]


def well_formed(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    """`format`: 1 if the completion is <think>…</think> and then <answer>…</answer>, each tag once, nothing around."""

    def good(text: str) -> bool:
        places = [text.find(tag) for tag in TAGS]
        between = text[places[1] + len(TAGS[1]) : places[2]].strip()
        once = all(text.count(tag) == 1 for tag in TAGS) and places == sorted(places)
        return once and not between and text.strip().startswith(TAGS[0]) and text.strip().endswith(TAGS[3])

    return [float(good(c)) for c in completions]


def length_penalty(
    prompts: list[str], completions: list[str], completion_ids: list[list[int]], max_new_tokens: int, **columns: Any
) -> list[float | None]:
    """Minus the share of the token budget that the completion used: 0 … −1."""
    return [-len(ids) / max_new_tokens for ids in completion_ids]


def soft_overlong(
    prompts: list[str], completions: list[str], completion_ids: list[list[int]], max_new_tokens: int, **columns: Any
) -> list[float | None]:
    """0 up to four fifths of the token budget, then in a line down to −1 at its end (DAPO, arXiv 2503.14476, eq. 13).

    The last fifth is DAPO's share: 4096 of 20480 tokens.
    """
    buffer = OVERLONG_SHARE * max_new_tokens
    return [-min(1.0, max(0.0, (len(ids) - (max_new_tokens - buffer)) / buffer)) for ids in completion_ids]


def repetition(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    """Minus the share of runs of three words that were there before: 0 … −1 (after Yeo et al., arXiv 2502.03373)."""
    penalties = []
    for words in (c.lower().split() for c in completions):
        runs = list(zip(words, words[1:], words[2:], strict=False))
        penalties.append(len(set(runs)) / len(runs) - 1 if runs else 0.0)
    return penalties


def tutorial(prompts: list[str], completions: list[str], reference: list[str], **columns: Any) -> list[float | None]:
    """The tiny-grpo tutorial's: 1.0 the answer equals the reference, 0.5 contains it, 0.01 is another, 0 no tag.

    Kept for comparison: the substring credit pays for answers such as `1 2 3 4`. The answer is stripped, as the
    tutorial's own code forgot to.
    """
    answers = [find_answer(c) for c in completions]
    return [
        0.0 if a is None else 1.0 if a == r else 0.5 if r in a else 0.01
        for a, r in zip(answers, reference, strict=True)
    ]


REWARDS: dict[str, RewardFunction] = {
    "accuracy": accuracy, "format": well_formed, "length_penalty": length_penalty, "soft_overlong": soft_overlong,
    "repetition": repetition, "tutorial": tutorial,
}  # fmt: skip


def load_rewards(names: list[str]) -> dict[str, RewardFunction]:
    """The reward functions for names such as `accuracy` or `my_file.py:my_function`, keyed by their short names."""
    rewards = {}
    for given in names:
        file, colon, function = given.rpartition(":")
        if colon:
            rewards[function] = load_function(Path(file).expanduser(), function)
        else:
            if given.endswith(".py"):
                raise UserError(f"--reward {given} names a file but no function; write {given}:FUNCTION.")
            name = choose(given, REWARDS, "reward")
            rewards[name] = REWARDS[name]
    if len(rewards) != len(names):
        raise UserError(f"Two of --reward {' '.join(names)} have the same name; each must have its own.")
    return rewards


def load_function(path: Path, name: str) -> RewardFunction:
    """One function of a user's Python file."""
    if not path.is_file():
        raise UserError(f"There is no file {path} to take the reward {name} from; write --reward FILE.py:FUNCTION.")
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    if spec is None:
        raise UserError(f"{path} is not a Python file; write --reward FILE.py:FUNCTION.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's file may raise anything
        raise UserError(f"{path} cannot be run: {describe(error)}.") from error
    functions = dict(inspect.getmembers(module, callable))
    return functions[choose(name, functions, f"function in {path}:")]


def describe(error: Exception) -> str:
    """An exception of somebody else's code in a line: kind, text, place."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"


def score(
    rewards: dict[str, RewardFunction],
    weights: list[float],
    prompts: list[str],
    completions: list[str],
    columns: dict[str, Any],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Ask every reward function about every completion.

    Returns:
        the weighted sums, float32 (N,), NaN where no function gave a score; and each function's own scores by name.
    Raises:
        UserError: a function failed, or returned something other than N finite numbers or Nones.
    """
    by_name = {}
    for name, function in rewards.items():
        # Copies: what a function does to its arguments must not reach the next one, or the tokens that are trained.
        given = {"prompts": list(prompts), "completions": list(completions), **copy.deepcopy(columns)}
        try:
            values = function(**given)
        except Exception as error:  # a user's function may raise anything
            raise UserError(f"The reward {name} failed: {describe(error)}.") from error
        by_name[name] = checked(values, name, completions)
    table = torch.stack([weight * by_name[name] for name, weight in zip(rewards, weights, strict=True)])
    total = torch.where(table.isnan().all(0), torch.nan, table.nansum(0))
    if total.isinf().any():
        raise UserError("The weighted sum of the rewards is too large for float32; scale the rewards or their weights.")
    return total, by_name


def checked(values: Any, name: str, completions: list[str]) -> Tensor:
    """What a reward function returned, as float32 (N,) with NaN for None."""
    if not isinstance(values, list | tuple | Tensor) or len(values) != len(completions):
        size = f"{len(values)} values" if isinstance(values, list | tuple | Tensor) else type(values).__name__
        raise UserError(f"The reward {name} returned {size}; it must return a list of {len(completions)} numbers.")
    numbers = []
    for value, completion in zip(values, completions, strict=True):
        try:
            number = math.nan if value is None else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.inf
        if abs(number) > LARGEST_REWARD or (math.isnan(number) and value is not None):
            raise UserError(
                f"The reward {name} returned {value!r} for the completion {completion[:200]!r}; it must return a "
                "finite number, or None where it cannot score."
            )
        numbers.append(number)
    return torch.tensor(numbers, dtype=torch.float32)
