"""The rewards by name, your own from a file, and a time limit for whatever you wrote.

Every reward function, built in or yours, has the signature of TRL's for plain-text prompts and completions:

    def my_reward(prompts: list[str], completions: list[str], **columns) -> list[float | None]

`columns` holds a list for every column of the dataset, and also `reference` (the final answers), `completion_ids`
(token ids) and `max_new_tokens`. None means "cannot be scored": that completion takes no part in its group. A function
that fails, or that takes longer than a limit, stops the run with a sentence that names it and the completion.
"""

import contextlib
import copy
import importlib.util
import inspect
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from answers import find_answer, is_correct
from errors import UserError, choose

RewardFunction = Callable[..., list[float | None]]

OVERLONG_SHARE = 0.2
TIME_LIMIT = 60.0  # seconds that one call of a reward function may take
LARGEST_REWARD = 1e9  # above that a float32 has no room for sums and squares of it
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


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
        count = len(words) - 2
        penalties.append(len(set(zip(words, words[1:], words[2:], strict=False))) / count - 1 if count > 0 else 0.0)
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
        with undisturbed():
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        raise UserError(f"{path} cannot be run: {describe(error)}.") from error
    functions = dict(inspect.getmembers(module, callable))
    function = functions[choose(name, functions, f"function in {path}:")]
    check_signature(function, name)
    return function


def check_signature(function: RewardFunction, name: str) -> None:
    """UserError, before anything is sampled, for a function that cannot be called as a reward is."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C have none
        return
    try:
        signature.bind_partial(prompts=[], completions=[], reference=[], completion_ids=[], max_new_tokens=1)
    except TypeError as error:
        raise UserError(
            f"The reward {name} does not take what a reward is given ({error}); write it as "
            f"def {name}(prompts, completions, **columns)."
        ) from error
    if inspect.iscoroutinefunction(function):
        raise UserError(f"The reward {name} is asynchronous; write it with def, not async def.")


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Around somebody else's code: what it does to the working folder and to torch's modes ends with it."""
    folder, dtype, grad = os.getcwd(), torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        yield
    finally:
        os.chdir(folder)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)


def describe(error: BaseException) -> str:
    """An exception of somebody else's code in a line: kind, text, place."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(shown(error, str).split())
    return f"{type(error).__name__}: {text} ({Path(place.filename).name}, line {place.lineno})"


def shown(value: Any, how: Callable[[Any], str] = repr) -> str:
    """The first 200 characters of somebody else's value, whose own words may fail too (an int of 5000 digits)."""
    try:
        return how(value)[:200]
    except Exception:
        return f"a value of the kind {type(value).__name__}"


class TimeUp(BaseException):
    """A reward function took too long. Not an Exception, so that an `except Exception` inside it cannot swallow it."""


class Failed(Exception):
    """How a reward function failed: the text as a person reads it, `kind` to compare two failures."""

    def __init__(self, text: str, kind: str) -> None:
        super().__init__(text)
        self.kind = kind


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeUp inside the block after `seconds`, once more each second; 0 or less: no limit.

    By the alarm signal, so there is no limit off the main thread, or on systems without it. Python code and `re` look
    for signals; a call into C that does not cannot be interrupted.
    """
    on_main = threading.current_thread() is threading.main_thread()
    if seconds <= 0 or not on_main or not hasattr(signal, "setitimer"):
        yield
        return
    late = False

    def stop(number: int, frame: Any) -> None:
        nonlocal late
        late = True
        raise TimeUp

    start, handler = time.monotonic(), signal.signal(signal.SIGALRM, stop)
    waiting, interval = signal.getitimer(signal.ITIMER_REAL)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
            yield
        finally:  # an alarm may interrupt this one, but then not the outer one
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)
        if waiting:  # somebody else's alarm goes on
            signal.setitimer(signal.ITIMER_REAL, max(waiting - (time.monotonic() - start), 1e-3), interval)
    if late:  # a bare `except:` swallowed it
        raise TimeUp


def call_reward(
    function: RewardFunction, prompts: list[str], completions: list[str], columns: dict[str, Any], seconds: float
) -> Any:
    """What a reward function returns for its own copies of the arguments; Failed if it raises, hangs or miscounts."""
    # Copies: what a function does to its arguments must not reach the next one, or the tokens that are trained.
    given = {"prompts": list(prompts), "completions": list(completions), **copy.deepcopy(columns)}
    try:
        with undisturbed(), time_limit(seconds):
            values = function(**given)
    except TimeUp:
        raise Failed(f"took longer than the limit of {seconds:g} seconds", "time") from None
    except (Exception, SystemExit) as error:  # a user's function may raise anything; Ctrl-C goes through
        raise Failed(f"failed: {describe(error)}", type(error).__name__) from error
    listed = isinstance(values, list | tuple) or (isinstance(values, Tensor) and values.dim() > 0)
    if not listed or len(values) != len(completions):
        size = f"{len(values)} {'value' if len(values) == 1 else 'values'}" if listed else type(values).__name__
        raise Failed(f"returned {size}; it must return a list of {len(completions)} numbers", "shape")
    return values


def culprit(
    function: RewardFunction,
    prompts: list[str],
    completions: list[str],
    columns: dict[str, Any],
    seconds: float,
    kind: str,
) -> str:
    """The words that name the first completion that fails in the same way (`kind`) when it is asked about alone.

    Within the limit of one call for all of them. One that takes more than half of that counts as one that hangs.
    """
    if len(completions) == 1:
        return f" (the completion {completions[0][:200]!r})"
    limit = seconds if seconds > 0 else TIME_LIMIT
    end = time.monotonic() + limit
    for i, completion in enumerate(completions):
        left = end - time.monotonic()
        if left <= 0:
            return " (there was no time to find the completion that does it)"
        own = {k: [v[i]] if isinstance(v, list) and len(v) == len(completions) else v for k, v in columns.items()}
        try:
            call_reward(function, prompts[i : i + 1], [completion], own, left if seconds > 0 else 0)
        except Failed as again:
            if again.kind == kind and (kind != "time" or left > limit / 2):
                return f" (the completion {completion[:200]!r} does it, also alone)"
    return " (no completion does it alone)"


def score(
    rewards: dict[str, RewardFunction],
    weights: list[float],
    prompts: list[str],
    completions: list[str],
    columns: dict[str, Any],
    seconds: float = TIME_LIMIT,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Ask every reward function about every completion, each for at most `seconds` (0 or less: no limit).

    Returns:
        the weighted sums, float32 (N,), NaN where no function gave a score; and each function's own scores by name.
    Raises:
        UserError: a function failed, took too long, or returned something other than N finite numbers or Nones.
    """
    by_name = {}
    for name, function in rewards.items():
        try:
            values = call_reward(function, prompts, completions, columns, seconds)
        except Failed as failure:
            who = culprit(function, prompts, completions, columns, seconds, failure.kind)
            raise UserError(f"The reward {name} {failure}{who}.") from failure.__cause__
        by_name[name] = checked(values, name, completions)
    table = torch.stack([weight * by_name[name] for name, weight in zip(rewards, weights, strict=True)])
    total = torch.where(table.isnan().all(0), torch.nan, table.nansum(0))
    if total.isinf().any():
        raise UserError("The weighted sum of the rewards is too large for float32; scale the rewards or their weights.")
    return total, by_name


def checked(values: Any, name: str, completions: list[str]) -> Tensor:
    """What a reward function returned for each completion, as float32 (N,) with NaN for None."""
    numbers = []
    for value, completion in zip(values, completions, strict=True):
        try:
            number = math.nan if value is None else math.inf if isinstance(value, str | bytes) else float(value)
        except Exception:  # a user's value may raise anything
            number = math.inf
        if abs(number) > LARGEST_REWARD or (math.isnan(number) and value is not None):
            raise UserError(
                f"The reward {name} returned {shown(value)} for the completion {completion[:200]!r}; it must return a "
                "number between -1e9 and 1e9, or None where it cannot score."
            )
        numbers.append(number)
    return torch.tensor(numbers, dtype=torch.float32)
