"""A user's reward function: loaded from a file, called with a time limit, and blamed if it fails.

A function that raises, hangs, or returns something other than numbers stops the run with a sentence
that names it and the completion that did it.
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

from support.errors import UserError, check_choice

RewardFunction = Callable[..., list[float | None]]

TIME_LIMIT = 60.0  # seconds that one call of a reward function may take
LARGEST_REWARD = 1e9  # above it, float32 has no room for sums and squares


def load_rewards(
    names: list[str], built_in: dict[str, RewardFunction]
) -> dict[str, RewardFunction]:
    """The functions for names such as `accuracy` or `my_file.py:my_function`, by short name."""
    rewards = {}
    for given in names:
        file, colon, function = given.rpartition(":")
        if colon:
            rewards[function] = load_function(Path(file).expanduser(), function)
        else:
            if given.endswith(".py"):
                raise UserError(
                    f"--reward {given} names a file but no function; write {given}:FUNCTION."
                )
            name = check_choice(given, built_in, "reward")
            rewards[name] = built_in[name]
    if len(rewards) != len(names):
        raise UserError(
            f"Two of --reward {' '.join(names)} have the same name; each must have its own."
        )
    return rewards


def load_function(path: Path, name: str) -> RewardFunction:
    """One function of a user's Python file."""
    if not path.is_file():
        raise UserError(
            f"There is no file {path} to take the reward {name} from; write --reward "
            "FILE.py:FUNCTION."
        )
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    if spec is None:
        raise UserError(f"{path} is not a Python file; write --reward FILE.py:FUNCTION.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    try:
        with restore_globals():
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        raise UserError(f"{path} cannot be run: {describe(error)}.") from error
    functions = dict(inspect.getmembers(module, callable))
    function = functions[check_choice(name, functions, f"function in {path}:")]
    check_signature(function, name)
    return function


def check_signature(function: RewardFunction, name: str) -> None:
    """UserError, before anything is sampled, for a function that takes other arguments."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C have none
        return
    try:
        signature.bind_partial(
            prompts=[], completions=[], reference=[], completion_ids=[], max_new_tokens=1
        )
    except TypeError as error:
        raise UserError(
            f"The reward {name} does not take what a reward is given ({error}); write it as def "
            f"{name}(prompts, completions, **columns)."
        ) from error
    if inspect.iscoroutinefunction(function):
        raise UserError(f"The reward {name} is asynchronous; write it with def, not async def.")


@contextlib.contextmanager
def restore_globals() -> Iterator[None]:
    """Around a user's code: the working folder and torch's modes are afterwards what they were."""
    folder, dtype, grad = os.getcwd(), torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        yield
    finally:
        os.chdir(folder)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)


def describe(error: BaseException) -> str:
    """An exception of a user's code in a line: kind, text, place."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(shown(error, str).split())
    return f"{type(error).__name__}: {text} ({Path(place.filename).name}, line {place.lineno})"


def shown(value: Any, how: Callable[[Any], str] = repr) -> str:
    """The first 200 characters of a user's value. Its repr may fail too (an int of 5000 digits)."""
    try:
        return how(value)[:200]
    except Exception:
        return f"a value of the kind {type(value).__name__}"


class TimeUp(BaseException):
    """A reward function took too long.

    Not an Exception, so that an `except Exception` inside the function cannot swallow it.
    """


class Failed(Exception):
    """How a reward function failed: the text for a person, `kind` to compare two failures."""

    def __init__(self, text: str, kind: str) -> None:
        super().__init__(text)
        self.kind = kind


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeUp inside the block after `seconds`, and again each second; 0 or less: no limit.

    By the alarm signal, so there is no limit off the main thread, or on systems without it. Python
    code and `re` look for signals; a call into C that does not cannot be interrupted.
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
        if waiting:  # an alarm that was set before goes on
            left = max(waiting - (time.monotonic() - start), 1e-3)
            signal.setitimer(signal.ITIMER_REAL, left, interval)
    if late:  # a bare `except:` swallowed it
        raise TimeUp


def reward_arguments(
    groups: list[Any], max_new_tokens: int
) -> tuple[list[str], list[str], dict[str, Any]]:
    """What a reward function is given of groups: prompts, completions, and columns by name.

    The columns are those of the dataset, `reference`, `completion_ids` and `max_new_tokens`. A
    completion begins with the tag that its prompt has opened, if it has opened one.
    """
    pairs = [(group.question, completion) for group in groups for completion in group.completions]
    names = {name for group in groups for name in group.question.columns}
    columns: dict[str, Any] = {
        name: [question.columns.get(name) for question, _ in pairs]
        for name in sorted(names - {"prompts", "completions"})
    }
    columns["reference"] = [question.reference for question, _ in pairs]
    columns["completion_ids"] = [completion.ids for _, completion in pairs]
    columns["max_new_tokens"] = max_new_tokens
    prompts = [question.prompt for question, _ in pairs]
    texts = [question.opened + completion.text for question, completion in pairs]
    return prompts, texts, columns


def call_function(
    function: RewardFunction,
    prompts: list[str],
    completions: list[str],
    columns: dict[str, Any],
    seconds: float,
) -> Any:
    """What a function returns for copies of the arguments; Failed if it raises or hangs."""
    # Copies: what it does to them must not reach the next function, or the tokens that are trained.
    given = {
        "prompts": list(prompts),
        "completions": list(completions),
        **copy.deepcopy(columns),
    }
    try:
        with restore_globals(), time_limit(seconds):
            values = function(**given)
    except TimeUp:
        raise Failed(f"took longer than the limit of {seconds:g} seconds", "time") from None
    except (Exception, SystemExit) as error:  # a user's function may raise anything
        raise Failed(f"failed: {describe(error)}", type(error).__name__) from error
    listed = isinstance(values, list | tuple) or (isinstance(values, Tensor) and values.dim() > 0)
    if not listed or len(values) != len(completions):
        count = len(values) if listed else None
        size = f"{count} {'value' if count == 1 else 'values'}" if listed else type(values).__name__
        raise Failed(
            f"returned {size}; it must return a list of {len(completions)} numbers", "shape"
        )
    return values


def find_failing_completion(
    function: RewardFunction,
    prompts: list[str],
    completions: list[str],
    columns: dict[str, Any],
    seconds: float,
    kind: str,
) -> str:
    """The words that name the first completion that fails in the same way (`kind`) alone.

    Within the limit of one call for all of them. One that takes more than half of that counts as
    one that hangs.
    """
    if len(completions) == 1:
        return f" (the completion {completions[0][:200]!r})"
    limit = seconds if seconds > 0 else TIME_LIMIT
    end = time.monotonic() + limit
    for i, completion in enumerate(completions):
        left = end - time.monotonic()
        if left <= 0:
            return " (there was no time to find the completion that does it)"
        own = {
            name: [value[i]]
            if isinstance(value, list) and len(value) == len(completions)
            else value
            for name, value in columns.items()
        }
        try:
            call_function(
                function, prompts[i : i + 1], [completion], own, left if seconds > 0 else 0
            )
        except Failed as again:
            if again.kind == kind and (kind != "time" or left > limit / 2):
                return f" (the completion {completion[:200]!r} does it, also alone)"
    return " (no completion does it alone)"


def call_reward(
    name: str,
    function: RewardFunction,
    prompts: list[str],
    completions: list[str],
    columns: dict[str, Any],
    seconds: float = TIME_LIMIT,
) -> Tensor:
    """What the reward `name` says of N completions, float32 (N,), NaN for None.

    Args:
        seconds: for all completions together; 0 or less: no limit.
    Raises:
        UserError: it failed, took too long, or did not return N finite numbers or Nones.
    """
    try:
        values = call_function(function, prompts, completions, columns, seconds)
    except Failed as failure:
        who = find_failing_completion(
            function, prompts, completions, columns, seconds, failure.kind
        )
        raise UserError(f"The reward {name} {failure}{who}.") from failure.__cause__
    return check_values(values, name, completions)


def check_values(values: Any, name: str, completions: list[str]) -> Tensor:
    """What a function returned for each completion, as float32 (N,) with NaN for None."""
    numbers = []
    for value, completion in zip(values, completions, strict=True):
        number = math.nan if value is None else as_number(value)
        if abs(number) > LARGEST_REWARD or (math.isnan(number) and value is not None):
            raise UserError(
                f"The reward {name} returned {shown(value)} for the completion "
                f"{completion[:200]!r}; it must return a number between -1e9 and 1e9, or None "
                "where it cannot score."
            )
        numbers.append(number)
    return torch.tensor(numbers, dtype=torch.float32)


def as_number(value: Any) -> float:
    """A user's value as a float; infinity if it is none."""
    try:
        return math.inf if isinstance(value, str | bytes) else float(value)
    except Exception:  # a user's value may raise anything
        return math.inf
