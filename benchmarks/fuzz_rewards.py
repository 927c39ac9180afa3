"""Hostile completions through every built-in reward: exceptions? does time grow as length does?

    python benchmarks/fuzz_rewards.py          a million, then results/fuzz.md; ten minutes
    python benchmarks/fuzz_rewards.py --cases 10000 --atheris 0

Two ways to make them. From a grammar: pieces of tags, digits, signs, LaTeX and odd characters,
joined, repeated, cut and nested by a seeded generator; a few are megabytes long. And guided by
coverage: atheris mutates bytes towards parts of answers.py and reward.py that no text has reached
yet. atheris is optional (pip install atheris); without it the grammar makes all.

And texts that no person can credit, with their references: one of several numbers (`72 or 73`), a
number that is denied, changed or bounded (`not 72`, `72 and a half`, `at least 72`), in another
unit, or in a sum that is not finished, in sentences and in tags, in English and in Chinese. None
may be credited, strictly or flexibly.

Each text goes through every reward of reward.py and through what is below them, half of the time
with a reference that is hostile too. What is returned must be finite numbers of the right type.
Times are of this thread alone, so that other programs do not count. Then the texts that look worst
are measured at growing sizes: µs per kB must not grow.
"""

import argparse
import importlib.util
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import RESULTS, command_line, machine, positive, table, versions, whole, write_lines

from support.command_line import Parser
from support.errors import UserError, command

PIECES = (
    "<answer>", "</answer>", "<think>", "</think>", "<answer", "</answer", "</", "<",
    "<answer>72</answer>", "72", "1,000", "1,", ",", ".", "..", "-", "−", "–", "+", "=", "/", "*",
    "**", "^", "_", "|", "1e999", "1e-999", "1e", "e", "nan", "inf", "9**9**9", "٧٢", "７２", "𝟕𝟐",
    "²", "½", "¼", "Ⅻ", "\\frac{", "}{", "}", "{", "\\boxed{", "\\text{", "\\sqrt{", "\\,", "\\!",
    "{,}", "\\", "m^2", "m2", " ", "  ", "\n", "\t", "\x00", "\x85", "\u2028", "\ud800", "\udfff",
    "\u202e", "\u200f", "\u200b", "\u00a0", "\ufeff", "$", "€", "%", "°", "(", ")", "[", "]", "x",
    "or", "not", "half", "million", "hundred thousand", "minus ", "1 000", "1'000", "'", "İ", "ß",
    "ﬀ", "Σ", "e\u0301", "🍎", "x = ", "× 10^", "10^{-5}", "__import__('os')", "0x48", "1_000",
    "# 72", "1 1/2", "72/0", "0/0", "9" * 60,
)  # fmt: skip
WORST = (
    "<answer>", "</answer>", "<answer>1</answer>", "<think>", "<", "1", "1,", "1,000", "1 000 ",
    "- ", "1 ", "a ", "1 a ", "=", "1e", "9**", "\\frac{", "m^2 ", "minus ", "ß", "\ud800", "\x00",
    "７", "1/",
)  # fmt: skip
SIZES = (16, 64, 256, 1024, 4096)  # thousands of characters
LONG = 10_000  # characters, from which on time per kB says something
GROWTH = 8.0  # of the time per kB, from the smallest size to the largest; quadratic would be 256


# --------------------------------------------------------------------- what is called


def functions() -> dict[str, Callable[[str, str], Any]]:
    """What reads a completion, by name: of (completion, reference); each checks its result."""
    import reward  # here, so that atheris can instrument them first
    from support import answers

    def checked(kind: type, call: Callable[[str, str], Any]) -> Callable[[str, str], None]:
        def run(text: str, reference: str) -> None:
            value = call(text, reference)
            assert isinstance(value, kind), f"{type(value).__name__} returned"
            assert kind is not float or math.isfinite(value), f"{value} returned"

        return run

    others = {"completion_ids": [[1]], "truncated": [False], "max_new_tokens": 9}

    def through(function: Callable[..., list]) -> Callable[[str, str], float]:
        return lambda text, reference: function(
            prompts=[text], completions=[text], reference=[reference], **others
        )[0]

    found = {name: checked(float, through(function)) for name, function in reward.REWARDS.items()}
    return found | {
        "find_answer": checked(str | None, lambda text, _: answers.find_answer(text)),
        "find_reasoning": checked(str | None, lambda text, _: answers.find_reasoning(text)),
        "same_answer": checked(bool, answers.same_answer),
        "same_answer, as reference": checked(
            bool, lambda text, reference: answers.same_answer(reference, text)
        ),
        "is_correct_flexible": checked(bool, answers.is_correct_flexible),
    }


@dataclass
class Tally:
    """What one function did. Times in µs: the longest call under LONG; from LONG on for each kB."""

    calls: int = 0
    exceptions: int = 0
    first: str = ""
    longest: float = 0.0
    per_kb: float = 0.0
    size: int = 0

    def call(self, function: Callable[[str, str], Any], text: str, reference: str) -> None:
        """One call, counted and timed."""
        self.calls += 1
        start = time.thread_time()
        try:
            function(text, reference)
        except Exception as error:  # this is what is looked for
            self.exceptions += 1
            words = f"{type(error).__name__} for {text[:200]!r} and {reference[:50]!r}"
            self.first = self.first or words
        took = 1e6 * (time.thread_time() - start)
        if len(text) < LONG:
            self.longest = max(self.longest, took)
        elif took / (len(text) / 1000) > self.per_kb:
            self.per_kb, self.size = took / (len(text) / 1000), len(text)


# --------------------------------------------------------------------- from a grammar


def hostile(rng: random.Random) -> str:
    """One text: pieces in a row, perhaps repeated, wrapped in tags, reversed or cut."""
    pieces = rng.choices(PIECES, k=rng.randrange(1, 12))
    if rng.random() < 0.3:
        pieces.insert(
            rng.randrange(len(pieces)),
            "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(9))),
        )
    text = "".join(pieces)
    chance = rng.random()
    if chance < 0.2:
        text *= rng.randrange(2, 40)
    elif chance < 0.21:
        text *= rng.randrange(2, 20_000) // len(text) + 1
    elif chance < 0.2101:
        text *= rng.randrange(100_000, 2_000_000) // len(text) + 1
    if rng.random() < 0.6:
        text = f"<think>{rng.choice(PIECES)}</think><answer>{text}</answer>"
    if rng.random() < 0.05:
        text = text[::-1]
    if rng.random() < 0.05:
        text = text[: rng.randrange(len(text))]
    return text


def from_grammar(cases: int, seed: int) -> dict[str, Tally]:
    """`cases` texts through every function; half of the references are hostile too."""
    rng, calls = random.Random(seed), functions()
    tallies = {name: Tally() for name in calls}
    start = time.perf_counter()
    for case in range(cases):
        text = hostile(rng)
        reference = (
            rng.choice(("72", "1,000", "3/4", "x^2"))
            if rng.random() < 0.5
            else "".join(rng.choices(PIECES, k=3))
        )
        for name, function in calls.items():
            tallies[name].call(function, text, reference)
        if (case + 1) % 100_000 == 0:
            print(
                f"{case + 1:,} texts of the grammar, {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    return tallies


# --------------------------------------------------------------------- wrong on purpose

# {a} is the number of the reference, {b} another one. No person would say that {a} is stated.
WRONG = (
    "{a} or {b}", "{b} or {a}", "either {a} or {b}", "{a}, {b}", "{b}, {a}", "{a} and {b}",
    "{a} {b}",
    "{b} {a}", "{a}; {b}", "{a}-{b}", "{b} to {a}", "between {b} and {a}", "not {a}",
    "It is not {a}",
    "never {a}", "{a} is wrong", "no {a}", "anything but {a}", "anything except {a}",
    "at least {a}",
    "at most {a}", "more than {a}", "less than {a}", "up to {a}", "over {a}", "{a} and a half",
    "{a} thousand", "{a} million", "{a} dozen", "{a}k", "{a} squared", "{a}^2", "{a}x", "x{a}",
    "2x = {a}",
    "x + 5 = {a}", "x > {a}", "x != {a}", "-{a}", "minus {a}", "{a}/{b}", "{b}/{a}", "{a}.5",
    "0.{a}", "{a}%{b}",
    "half of {a}", "twice {a}", "the square root of {a}", "{a} + {b}", "{b} - {a}", "{a} * {b}",
    "{a} - {b} = ?",
    "{b} + 1 = {a} or {b}", "not {p} + {q} = {a}", "{p} + {q} = {a} or {b}",
    "{p} + {q} = {a} + {b}",
    "{p} + {q} = {a}?", "{p} + {q} = {a} is wrong", "{p} + {q} = {a}, not",
    "{p} + {q} = {a} thousand",
    "{p} + {q} = {a}, {p} + {b} = {c}", "{p} + {q} = {a} and {b} more", "x + {p} + {q} = {a}",
    "{a}个或{b}个", "{a}或者{b}", "{b}、{a}", "不是{a}", "没有{a}个", "不到{a}", "超过{a}个",
    "至少{a}", "最多{a}元",
    "{a}左右", "{a}多个",
    "{a}万", "{a}分之一", "{a}的一半", "{a}个和{b}个", "{a}还是{b}", "不等于{a}",
    "{p}+{q}={a}或{b}", "{a}以上",
    "负{a}",
)  # fmt: skip
UNITS = (
    ("{a} miles", "{a} km"), ("{a} cents", "{a} dollars"), ("${a}", "{a} cents"),
    ("{a} hours", "{a} minutes"),
    ("{a} kg", "{a} g"), ("{a} feet", "{a} square feet"), ("{a}元", "{a}角"), ("{a}千米", "{a}米"),
    ("€{a}", "${a}"),
)  # fmt: skip
AROUND = (
    "{}", " {} ", "{}.", "**{}**", "The answer is {}", "So the answer is {}.", "Answer: {}",
    r"\boxed{{{}}}", "${}$",
    "She has {} apples", "In total {} clips were sold", "\n{}\n", "答案是{}", "所以一共{}。",
    "`{}`",
    "Therefore, it is {}!",
)  # fmt: skip


def wrong_on_purpose(cases: int, seed: int) -> tuple[int, list[str]]:
    """How many of `cases` wrong texts were credited, and the first of them."""
    from support.answers import is_correct, is_correct_flexible

    rng, credited = random.Random(seed), []
    for _ in range(cases):
        p, q = rng.randrange(2, 500), rng.randrange(2, 500)
        b = rng.choice([n for n in (p + q + 1, p + q - 1, p, 7 * q + 3) if n not in (p + q, q)])
        numbers = {"a": p + q, "b": b, "c": p + b, "p": p, "q": q}
        text, reference = rng.choice(WRONG), "{a}"
        if rng.random() < 0.1:
            text, reference = rng.choice(UNITS)
        text, reference = text.format(**numbers), reference.format(**numbers)
        text = rng.choice(AROUND).format(text)
        tagged = f"<think>{rng.choice(PIECES)}</think><answer>{text}</answer>"
        if is_correct(tagged, reference):
            credited.append(f"{tagged!r} for {reference}")
        if is_correct_flexible(text, reference):
            credited.append(f"{text!r} without a tag for {reference}")
    return len(credited), credited[:20]


# --------------------------------------------------------------------- guided by coverage


def child(cases: int, seed: int, folder: Path) -> None:
    """In a process of its own, which libFuzzer ends: `cases` texts, then the tallies in a file."""
    import atheris

    with atheris.instrument_imports(include=["reward", "support.answers", "support.equation"]):
        calls = functions()
    tallies = {name: Tally() for name in calls}
    seen = 0

    def one(data: bytes) -> None:
        nonlocal seen
        text, _, reference = data.partition(b"\xff")
        text, reference = (
            part.decode("utf-8", "surrogateescape") for part in (text, reference or b"72")
        )
        for name, function in calls.items():
            for wrapped in (text, f"<answer>{text}</answer>"):
                tallies[name].call(function, wrapped, reference)
        seen += 1
        if seen == cases:
            found = {name: asdict(tally) for name, tally in tallies.items()}
            (folder / "tallies.json").write_text(json.dumps(found))

    corpus = folder / "corpus"
    corpus.mkdir()
    for number, piece in enumerate(PIECES):
        (corpus / str(number)).write_bytes(piece.encode("utf-8", "surrogatepass"))
    flags = [f"-runs={cases}", f"-seed={seed}", "-max_len=2000", f"-artifact_prefix={folder}/"]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], one)
    atheris.Fuzz()


def from_atheris(cases: int, seed: int) -> dict[str, Tally]:
    """The tallies of a child process; UserError with its last words if it leaves none."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--cases={cases}", f"--seed={seed}", f"--child={folder}"]
        command = [sys.executable, __file__, *flags]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        found = Path(folder) / "tallies.json"
        if not found.is_file():
            last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            raise UserError(f"atheris left no result: {last[0]}.")
        return {name: Tally(**t) for name, t in json.loads(found.read_text()).items()}


# --------------------------------------------------------------------- is it linear


def worst_at(function: Callable[[str, str], Any], size: int) -> float:
    """µs per kB of the worst text of `size` characters: the median of three calls each."""
    worst = 0.0
    for unit in WORST:
        text, took = (unit * (size // len(unit) + 1))[:size] + "!", []
        for _ in range(3):
            start = time.thread_time()
            function(text, "72")
            took.append(time.thread_time() - start)
        worst = max(worst, statistics.median(took) * 1e6 / (size / 1000))
    return worst


# --------------------------------------------------------------------- report


def tally_table(ways: dict[str, dict[str, Tally]]) -> list[str]:
    """Markdown: each function over all ways of making texts."""
    head = ["function", "calls", "exceptions", f"longest call under {LONG // 1000} kB, µs"]
    rows = []
    for name in next(iter(ways.values())):
        every = [tallies[name] for tallies in ways.values()]
        calls, exceptions = sum(t.calls for t in every), sum(t.exceptions for t in every)
        longest, worst = max(t.longest for t in every), max(every, key=lambda t: t.per_kb)
        times = f"{longest:.0f}", f"{worst.per_kb:.1f}", f"{worst.size / 1000:.0f}"
        rows.append([name, f"{calls:,}", exceptions, *times])
    return table([*head, f"worst µs per kB from {LONG // 1000} kB on", "at, kB"], rows)


def report(
    ways: dict[str, dict[str, Tally]],
    cases: dict[str, int],
    notes: list[str],
    credited: tuple[int, list[str]],
    argv: list[str],
    out: Path,
) -> bool:
    """Print and write results/fuzz.md; whether nothing was found."""
    linear = {
        name: [worst_at(function, 1000 * size) for size in SIZES]
        for name, function in functions().items()
    }
    every = [tally for tallies in ways.values() for tally in tallies.values()]
    growing = [name for name, row in linear.items() if row[-1] > max(GROWTH * row[0], 50)]
    wrong = sum(tally.exceptions for tally in every)
    verdict = "It does not grow with the length."
    if growing:
        verdict = f"It grows for {', '.join(growing)}."
    made = ", ".join(f"{n:,} {way}" for way, n in cases.items())
    rows = [[name, *(f"{v:.2f}" for v in row)] for name, row in linear.items()]
    lines = [
        f"`{command_line(argv)}` on {machine()}, one thread; {versions()}.",
        "",
        f"{sum(cases.values()):,} hostile texts ({made}): **{wrong} exceptions** or results of the "
        "wrong kind. Times are the thread's own; a longest call may hold a pause of Python's "
        "garbage collector or of the machine.",
        *notes,
        "",
        f"{sum(cases.values()):,} texts that no person can credit, inside an answer tag and "
        f"without one: **{credited[0]} credited**.",
        *(f"- {text}" for text in credited[1]),
        "",
        *tally_table(ways),
        "",
        f"µs per kB of the worst of {len(WORST)} texts that look worst (one piece, repeated), "
        f"medians of three. {verdict} (A quadratic function would take {SIZES[-1] // SIZES[0]} "
        "times more in the last column than in the first.)",
        "",
        *table(["function", *(f"{size} kB" for size in SIZES)], rows),
    ]
    print("\n".join(lines))
    print("\n".join(tally.first for tally in every if tally.first))
    write_lines(out / "fuzz.md", lines)
    return not wrong and not growing and not credited[0]


def read_flags(argv: list[str]) -> argparse.Namespace:
    """The command line of this benchmark."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--cases", type=positive, default=1_000_000, help="texts in all")
    flag("--atheris", type=whole, default=100_000, help="how many of them atheris makes; 0: none")
    flag("--seed", type=whole, default=1)
    flag("--out", type=Path, default=RESULTS)
    flag("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not args.child and args.atheris >= args.cases:
        raise UserError(f"--atheris {args.atheris} leaves none of {args.cases} to the grammar.")
    return args


@command
def main(argv: list[str]) -> None:
    """Both ways, one after the other, then the table; exit code 1 if something was found."""
    args = read_flags(argv)
    if args.child:
        child(args.cases, args.seed, args.child)
        return
    guided, notes = args.atheris, []
    if guided and importlib.util.find_spec("atheris") is None:
        guided = 0
        words = "atheris is not installed (pip install atheris): nothing was guided by coverage."
        notes = ["", words]
    cases = {"from a grammar": args.cases - guided}
    ways = {"from a grammar": from_grammar(args.cases - guided, args.seed)}
    if guided:
        cases["guided by coverage"] = guided
        ways["guided by coverage"] = from_atheris(guided, args.seed)
    credited = wrong_on_purpose(args.cases, args.seed)
    if not report(ways, cases, notes, credited, argv, args.out):
        sys.exit(1)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
