"""Find the answer in a completion; the rewards by name, and your own from a file.

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
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
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
    r"[-+]? ?[\d.,]+(?:[eE][-+]?\d+)?(?: \d+)?(?: ?/ ?\d+)?(?:\.| ?[%°]|(?: [^\W\d]+)*)"
)  # a number, and perhaps its unit
SIGNS = str.maketrans({
    "−": "-", "–": "-", "—": "-", "’": "'", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "⁄": "/",
    "½": " 1/2", "¼": " 1/4", "¾": " 3/4", "⅓": " 1/3", "⅔": " 2/3",
})  # fmt: skip
UNIT = r"(?<![^\W\d])((?:[ckm]?m|ft|in|yd|inches|feet|units?|(?:centi|kilo)?met(?:er|re)s?)[}) ]?)"
# Ways of writing, mostly LaTeX's, and the plain way, in this order. None changes what is meant.
REWRITES = [(re.compile(pattern, re.I), plainer) for pattern, plainer in (
    (r"(?<![^\W_])(?:US|CA|AU|HK|A|C)\\?\$(?=\.?\d)|\\?[$€£¥₹]", ""),
    (r"\\!|[\u200b\ufeff]", ""),
    (r"\{,\}", ","),
    (r"\\(?=[%#&])", ""),
    (r"\\[,;: ()\[\]]|\\(?:approx|q?quad|left|right|displaystyle|(?:text|math)(?:bf|rm|it)?|boxed|mbox)(?![a-z])", " "),
    (r" ?\^ ?\{? ?\\circ ?\}?|\\degree\b", "°"),
    (r"[-=]+>|→", " "),
    (r"[!<>]=|\\(?:n?leq?|n?geq?|neq?|lt|gt)(?![a-z])", "≠"),
    (r"(?<=[^\W\d])\.(?=\d)", ". "),  # Rs.500 is not .500
    (r"\\[dt]?frac *(?:\{ *([-+]?[\d.]+) *\} *\{ *([\d.]+) *\}|(\d) *(\d))", r" \1\3/\2\4"),
    (UNIT + r"(?:\^ ?\{?2\}?(?!\d)|(?<! )2\b)", r"\1²"),
    (UNIT + r"(?:\^ ?\{?3\}?(?!\d)|(?<! )3\b)", r"\1³"),
    (r"(?<![\d/^.,])(?<!/ )(\d+(?:\.\d+)?) ?(?:×|x|\*|\\times|\\cdot) ?10\^ ?\{?([-+]?\d{1,3})(?!\d)\}?", r"\1e\2"),
    (r"(?:\b(?:minus|negative) +|[负負])(?=\.?\d)", "-"),
    (r"(?<![\d.,])(?<!\d[ '])\d{1,3}([ '])\d{3}(?:\1\d{3})*(?![\d,/]|[ '][\d/])", lambda m: m[0].replace(m[1], "")),
    (r"[{}]", " "),
)]  # fmt: skip
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# Where one of these stands, the number is not what the text states: `not 72`, `x > 72`, `2x = 72`, `\sqrt{72}`, `72²`.
UNSURE = re.compile(
    r"\b(?:not|never|cannot|neither|except|unless|if|nowhere|almost|nearly|wrong|at least|at most|or(?! so\b)|"
    r"half|and \w+ (?:third|quarter|fourth|fifth|eighth|tenth)s?)\b|n't|不|\\[a-z]|[∞¬⌊⌈\u202e]|~~|, no\b",
    re.I,
)
UNSURE_LEFT = re.compile(  # of the last equals sign
    r"\d ?[^\W\d]*[,;](?!\d)|\b(?:or|if|not|and [a-z])\b|n't|≠|"
    r"\d ?[xyzn]\b(?! ?\d)|\b[xyzn] ?[-+*/^²³√]|[-+*/√] ?[xyzn]\b"
)
UNSURE_BEFORE = re.compile(
    r"(?:[-+^√<>≤≥≠/×÷·|±]|[\w)] ?\*)\W*$|[A-Za-zα-ω_)\]][\[(]?$|"
    r"\b(?i:than|least|most|over|under|above|below|up to|twice|double|triple|times|divided by|multiplied by|plus|root|"
    r"squared?|cubed?|sqrt|abs|min|max|floor|ceil|round|log|ln|sin|cos|tan|mod|between|past|(?:much|many) as|"
    r"(?:twen|thir|for|fif|six|seven|eigh|nine)ty|hundred|thousand|(?:hundred|thousand) and)(?: of)? ?\(?$"
)
UNSURE_AFTER = re.compile(
    r"\s?(?:[xyzni]\b|\(?pi\b|\(?[π√]|\( ?[xyzn]\b|[-+*×÷/·] ?\(?[xyzn]\b|[<>≤≥≠±])|"
    r"[⁰¹²³⁴-⁹₀-₉^|百千万萬亿億]|_\w|[kKMB]\b|\+(?!\w)|"
    r"[ -](?i:squared|cubed|factorial|plus|minus|divided|mod|root|(?:less|more) than [a-z]\b|"
    r"(?:third|fourth|fifth|sixth|eighth|tenth|\w+(?:red|and|ion)th)s?\b|\w+(?:red|and|ion) \w+(?:red|and|ion)\b)"
)
OVERLONG_SHARE = 0.2
TIME_LIMIT = 60.0  # seconds that one call of a reward function may take
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


def plain(text: str) -> str:
    """`text` without the ways of writing that mean nothing: LaTeX, currency, kinds of minus and of space."""
    text = text.translate(SIGNS)
    for pattern, plainer in REWRITES:
        text = pattern.sub(plainer, text)
    return text


def parse_number(text: str) -> Fraction | None:
    """The one number that `text` states, as a person would read it; None if it states none, or several.

    `72`, `$72`, `72.0`, `72 apples`, `1,000`, `3/4`, `1 1/2` and `70 + 2 = 72` state one; `70 or 72` does not, so that
    listing every number earns nothing, nor do `not 72` and `x > 72`.
    """
    if len(text) > LONGEST_ANSWER:
        return None
    parts = plain(text).split("=")
    while len(parts) > 1 and not NUMBER.search(parts[-1]):  # 72 = x
        parts.pop()
    text = parts[-1]
    found = list(NUMBER.finditer(text))
    if not found or UNSURE.search(text) or any(UNSURE_LEFT.search(part) for part in parts[:-1][-1:]):
        return None
    before, after = text[: found[0].start()], text[found[-1].end() :]
    value = one_value(found, text)
    if value is None or UNSURE_BEFORE.search(before) or UNSURE_AFTER.match(after):
        return None
    scale = re.match(r"\s?(hundred|thousand|million|billion|trillion)\b(?!-)", after, re.I)
    return value * SCALES[scale[1].lower()] if scale else value


def one_value(found: list[re.Match[str]], text: str) -> Fraction | None:
    """The value of one number, of a fraction, or of a whole number with a fraction; None for other lists of numbers."""
    values = [Fraction(match.group().replace(",", "").replace(" ", "").strip()) for match in found]
    gaps = [text[a.end() : b.start()].strip() for a, b in zip(found, found[1:], strict=False)]
    if len(values) == 1:
        return values[0]
    if gaps == ["/"] and values[1]:
        return values[0] / values[1]
    if gaps in (["", "/"], ["and", "/"]) and values[0].denominator == 1 and 0 < values[1] < values[2]:
        part = values[1] / values[2]
        return values[0] - part if "-" in found[0].group() else values[0] + part
    return None


def same_answer(answer: str, reference: str) -> bool:
    """Whether two answers are the same number; where the reference is no plain number (x^2, H2O), the same words."""
    if len(reference) <= LONGEST_ANSWER and REFERENCE.fullmatch(" ".join(plain(reference).split())):
        target = parse_number(reference)
        if target is not None:
            return parse_number(answer) == target
    return words(answer) == words(reference)


def words(text: str) -> list[str]:
    """What is compared where there is no number: no capitals, no bold, no full stop; LaTeX plain where it is short."""
    short = plain(text) if len(text) <= LONGEST_ANSWER else text
    return short.casefold().strip(" \n*`.").split() or text.split()


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
        answer = (NUMBER.findall(tail.translate(SIGNS).replace("$", "")) or [""])[-1]
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


def ask(
    function: RewardFunction, prompts: list[str], completions: list[str], columns: dict[str, Any], seconds: float
) -> Any:
    """What a reward function returns for its own copies of the arguments; Failed if it raises, hangs or miscounts."""
    # Copies: what a function does to its arguments must not reach the next one, or the tokens that are trained.
    given = {"prompts": list(prompts), "completions": list(completions), **copy.deepcopy(columns)}
    try:
        with time_limit(seconds):
            values = function(**given)
    except TimeUp:
        raise Failed(f"took longer than the limit of {seconds:g} seconds", "time") from None
    except (Exception, SystemExit) as error:  # a user's function may raise anything; Ctrl-C goes through
        raise Failed(f"failed: {describe(error)}", type(error).__name__) from error
    listed = isinstance(values, list | tuple) or (isinstance(values, Tensor) and values.dim() > 0)
    if not listed or len(values) != len(completions):
        size = f"{len(values)} values" if listed else type(values).__name__
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
        return f"; the completion is {completions[0][:200]!r}"
    limit = seconds if seconds > 0 else TIME_LIMIT
    end = time.monotonic() + limit
    for i, completion in enumerate(completions):
        left = end - time.monotonic()
        if left <= 0:
            return "; there was no time to ask about each completion alone"
        own = {k: [v[i]] if isinstance(v, list) and len(v) == len(completions) else v for k, v in columns.items()}
        try:
            ask(function, prompts[i : i + 1], [completion], own, left if seconds > 0 else 0)
        except Failed as again:
            if again.kind == kind and (kind != "time" or left > limit / 2):
                return f"; so it does for the completion {completion[:200]!r} alone"
    return "; for none of the completions alone does it do so"


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
            values = ask(function, prompts, completions, columns, seconds)
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
                "finite number, or None where it cannot score."
            )
        numbers.append(number)
    return torch.tensor(numbers, dtype=torch.float32)
