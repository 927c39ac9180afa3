"""A user's reward function: loaded from a file, called with a time limit, and blamed if it fails.

A function that raises, hangs, or returns something other than numbers stops the run with a sentence
that names it and the completion that did it. What is written for TRL works here: functions for
plain text and for chat messages, `async def`, `log_metric`; not `trainer_state`, TRL's own trainer.
"""

import asyncio
import contextlib
import copy
import importlib.util
import inspect
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from support.config import Config
from support.errors import UserError, check_choice
from support.guarded import TimeUp, restore_globals, time_limit
from support.prompts import messages_of
from support.reward_model import RewardModel

RewardFunction = Callable[..., list[float | None]]

TIME_LIMIT = 60.0  # seconds that one call of a reward function may take
LARGEST_REWARD = 1e9  # above it, float32 has no room for sums and squares


# What every reward function is given, beside the columns of the dataset.
GIVEN = ("prompts", "completions", "reference", "completion_ids", "truncated", "max_new_tokens")
LOGGING = ("log_metric", "log_extra")  # TRL's, given to functions that ask for them
# What a function for messages raises when it gets a text, and hardly anything else does.
MIXED_UP = re.compile(r"string ind(?:ex|ices)|'str' object")


@dataclass
class UserReward:
    """A function of a user, and what is known of it."""

    function: RewardFunction
    name: str
    takes_messages: bool | None = None  # found out at its first call
    logged: dict[str, list[float]] = field(default_factory=dict)  # by log_metric, since last asked

    def __post_init__(self) -> None:
        self.__name__ = self.name  # as other trainers ask of a function

    def log_metric(self, name: str, value: float) -> None:
        """TRL's `log_metric`: a number for TensorBoard, the mean over the step."""
        self.logged.setdefault(f"{self.name}_{name}", []).append(float(value))

    def __call__(self, /, **given: Any) -> Any:
        """What the function returns for the arguments that it takes."""
        extra = {"log_metric": self.log_metric, "log_extra": lambda *ignored: None}
        given |= {name: extra[name] for name in LOGGING if name in self.parameters}
        values = self.function(**given)
        return finished(values) if inspect.isawaitable(values) else values

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names that it takes; none where Python cannot tell, as of some functions in C."""
        try:
            return tuple(inspect.signature(self.function).parameters)
        except ValueError:
            return ()


@dataclass(frozen=True)
class Arguments:
    """What the reward functions are given of N completions."""

    prompts: list[str]
    completions: list[str]
    columns: dict[str, Any]  # lists of N; and max_new_tokens
    messages: list[list[dict[str, str]]]  # the prompts as TRL gives them for a chat

    def one(self, place: int) -> "Arguments":
        """Of one completion alone."""
        columns = {
            name: value[place : place + 1] if isinstance(value, list) else value
            for name, value in self.columns.items()
        }
        here = slice(place, place + 1)
        return Arguments(self.prompts[here], self.completions[here], columns, self.messages[here])

    def given(self, as_messages: bool) -> dict[str, Any]:
        """Copies: what a function does to them must not reach the next one, or the tokens."""
        prompts, completions = list(self.prompts), list(self.completions)
        if as_messages:
            prompts = copy.deepcopy(self.messages)
            completions = [[{"role": "assistant", "content": text}] for text in self.completions]
        return {"prompts": prompts, "completions": completions, **copy.deepcopy(self.columns)}


def load_rewards(
    names: list[str], built_in: dict[str, RewardFunction], device: Any = "cpu"
) -> dict[str, RewardFunction]:
    """The functions for names such as `accuracy` or `my_file.py:my_function`, by short name.

    Args:
        device: where a learned reward (`model:NAME`) computes.
    """
    rewards = {}
    for given in names:
        file, colon, function = given.rpartition(":")
        kind, _, judge = given.partition(":")
        if kind == "model":
            if not judge:
                raise UserError("--reward model: lacks a name; write model:FOLDER or a hub name.")
            judge = os.path.expanduser(judge)
            name = Path(judge).name
            rewards[name] = UserReward(RewardModel(judge, device), name, takes_messages=True)
        elif colon:
            rewards[function] = load_function(Path(file).expanduser(), function)
        else:
            if given.endswith(".py"):
                raise UserError(
                    f"--reward {given} names a file but no function; write {given}:FUNCTION."
                )
            name = check_choice(given, built_in, "reward")
            rewards[name] = UserReward(built_in[name], name)  # in a notebook it may be yours
    if len(rewards) != len(names):
        raise UserError(
            f"Two of --reward {' '.join(names)} have the same name; each must have its own."
        )
    return rewards


def load_function(path: Path, name: str) -> UserReward:
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
    own = [key for key, f in functions.items() if getattr(f, "__module__", "") == spec.name]
    if name not in functions:  # what the file imports may be asked for, and is not offered
        check_choice(name, own, f"function in {path}:")
    function = UserReward(functions[name], name)
    check_signature(function)
    return function


def check_signature(reward: UserReward, columns: dict[str, Any] | None = None) -> None:
    """UserError, before anything is sampled, for a function that takes other arguments.

    Args:
        columns: those of the dataset, once it has been read: then what it asks for must be there.
    """
    if not reward.parameters:
        return
    known = dict.fromkeys((*GIVEN, *(columns or ())))
    names = ", ".join(known)
    known |= {name: None for name in LOGGING if name in reward.parameters}
    signature = inspect.signature(reward.function)
    try:
        (signature.bind_partial if columns is None else signature.bind)(**known)
    except TypeError as error:
        why = f"write it as def {reward.name}(prompts, completions, **columns)"
        if columns is not None:
            why = f"what it is given: {names}; the last ones are the columns of the dataset"
        if "trainer_state" in str(error):
            why = "that is TRL's trainer, which is not here; give it the default None"
        raise UserError(
            f"The reward {reward.name} does not take what a reward is given ({error}); {why}."
        ) from error


def check_columns(rewards: dict[str, RewardFunction], questions: list[Any]) -> None:
    """UserError, before anything is sampled, for a function that needs another column."""
    columns = {name: None for question in questions for name in question.columns}
    hidden = [name for name in GIVEN if name in columns]
    if hidden:
        print(
            f"the dataset's {', '.join(hidden)} is not handed to reward functions, which get "
            "something else under that name"
        )
    for reward in rewards.values():
        if isinstance(reward, UserReward):
            check_signature(reward, columns)


def finished(waiting: Any) -> Any:
    """What an `async def` function returns."""

    async def wait() -> Any:
        return await waiting

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    with ThreadPoolExecutor(1) as pool:  # in a notebook, which runs a loop of its own
        return pool.submit(lambda: asyncio.run(wait())).result()


def describe(error: BaseException) -> str:
    """An exception of a user's code in a line: kind, text, place."""
    places = traceback.extract_tb(error.__traceback__)
    files = {
        getattr(m, "__file__", None) for n, m in [*sys.modules.items()] if n.startswith("reward_")
    }
    # In the user's file, if it came through there, and not in a library that it calls.
    place = next((p for p in reversed(places) if p.filename in files), places[-1])
    text = " ".join(shown(error, str).split())
    return f"{type(error).__name__}: {text} ({Path(place.filename).name}, line {place.lineno})"


def shown(value: Any, how: Callable[[Any], str] = repr) -> str:
    """The first 200 characters of a user's value. Its repr may fail too (an int of 5000 digits)."""
    try:
        return how(value)[:200]
    except Exception:
        return f"a value of the kind {type(value).__name__}"


# All but KeyboardInterrupt, which is not the function's.
ENDS = (Exception, SystemExit, GeneratorExit, asyncio.CancelledError)


class Failed(Exception):
    """How a reward function failed: the text for a person, `kind` to compare two failures."""

    def __init__(self, text: str, kind: str) -> None:
        super().__init__(text)
        self.kind = kind


def reward_arguments(groups: list[Any], config: Config) -> Arguments:
    """What the reward functions are given of groups.

    The columns are those of the dataset, `reference`, `completion_ids`, `truncated` and
    `max_new_tokens`. A completion begins with the tag that its prompt has opened, if it has opened
    one.
    """
    pairs = [(group.question, completion) for group in groups for completion in group.completions]
    names = {name for group in groups for name in group.question.columns}
    columns: dict[str, Any] = {
        name: [question.columns.get(name) for question, _ in pairs]
        for name in sorted(names - {"prompts", "completions"})
    }
    columns["reference"] = [question.reference for question, _ in pairs]
    columns["completion_ids"] = [completion.ids for _, completion in pairs]
    columns["truncated"] = [completion.truncated for _, completion in pairs]
    columns["max_new_tokens"] = config.max_new_tokens
    prompts = [question.prompt for question, _ in pairs]
    texts = [question.opened + completion.text for question, completion in pairs]
    chats = [messages_of(question.question, config.system_prompt) for question, _ in pairs]
    return Arguments(prompts, texts, columns, chats)


def ask_rewards(
    rewards: dict[str, RewardFunction], config: Config, groups: list[Any]
) -> list[Tensor]:
    """What the K rewards say of each group, float32 (K, G); arguments and errors as `score`'s."""
    arguments = reward_arguments(groups, config), config.reward_timeout
    table = torch.stack([call_reward(*pair, *arguments) for pair in rewards.items()])
    return list(table.chunk(len(groups), dim=1))


def call_function(
    function: RewardFunction, arguments: Arguments, seconds: float, as_messages: bool = False
) -> Any:
    """What a function returns for copies of the arguments; Failed if it raises or hangs."""
    try:
        with restore_globals(), time_limit(seconds):
            values = function(**arguments.given(as_messages))
    except TimeUp:
        raise Failed(f"took longer than the limit of {seconds:g} seconds", "time") from None
    except ENDS as error:  # a user's function may raise anything
        raise Failed(f"failed: {describe(error)}", type(error).__name__) from error
    count = len(arguments.completions)
    listed = isinstance(values, list | tuple) or (
        isinstance(values, Tensor | np.ndarray) and values.ndim > 0
    )
    if not listed or len(values) != count:
        found = len(values) if listed else None
        size = f"{found} {'value' if found == 1 else 'values'}" if listed else type(values).__name__
        raise Failed(f"returned {size}; it must return a list of {count} numbers", "shape")
    return values


def call_as_it_wants(function: RewardFunction, arguments: Arguments, seconds: float) -> Any:
    """`call_function`; a user's function that is written for chat messages gets messages.

    It shows at its first call: it takes a text for a list of messages, fails, and does not fail
    with messages.
    """
    if not isinstance(function, UserReward):
        return call_function(function, arguments, seconds)
    logged = copy.deepcopy(function.logged)
    try:
        values = call_function(function, arguments, seconds, bool(function.takes_messages))
        function.takes_messages = bool(function.takes_messages)
        return values
    except Failed as failure:
        function.logged = logged  # without what the call has logged that failed
        if function.takes_messages is not None or not MIXED_UP.search(str(failure)):
            raise
        with contextlib.suppress(Failed):
            values = call_function(function, arguments, seconds, as_messages=True)
            function.takes_messages = True
            print(f"the reward {function.name} is written for chat messages, and gets them")
            return values
        raise


def find_failing_completion(
    function: RewardFunction, arguments: Arguments, seconds: float, kind: str
) -> str:
    """The words that name the first completion that fails in the same way (`kind`) alone.

    Within the limit of one call for all of them. One that takes more than half of that counts as
    one that hangs.
    """
    completions = arguments.completions
    if len(completions) == 1:
        return f" (the completion {completions[0][:200]!r})"
    limit = seconds if seconds > 0 else TIME_LIMIT
    end = time.monotonic() + limit
    for i, completion in enumerate(completions):
        left = end - time.monotonic()
        if left <= 0:
            return " (there was no time to find the completion that does it)"
        try:
            call_as_it_wants(function, arguments.one(i), left if seconds > 0 else 0)
        except Failed as again:
            if again.kind == kind and (kind != "time" or left > limit / 2):
                return f" (the completion {completion[:200]!r} does it, also alone)"
    return " (no completion does it alone)"


def call_reward(
    name: str, function: RewardFunction, arguments: Arguments, seconds: float = TIME_LIMIT
) -> Tensor:
    """What the reward `name` says of N completions, float32 (N,), NaN for None.

    Args:
        seconds: for all completions together; 0 or less: no limit.
    Raises:
        UserError: it failed, took too long, or did not return N finite numbers or Nones.
    """
    try:
        values = call_as_it_wants(function, arguments, seconds)
    except Failed as failure:
        who = find_failing_completion(function, arguments, seconds, failure.kind)
        raise UserError(f"The reward {name} {failure}{who}.") from failure.__cause__
    return check_values(values, name, arguments.completions)


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
        wrong = isinstance(value, str | bytes | complex | np.complexfloating)
        return math.inf if wrong else float(value)
    except Exception:  # a user's value may raise anything
        return math.inf
