"""Find an answer in a completion, and read it as a person does: `$1,000.00` is 1000.

A reward is paid for what is read here. So this says what counts, and nothing else does. An answer
is either one number with words around it (STATES), perhaps behind an equals sign; or a sentence
that ends in an equation which is true (`She makes 9 * 2 = $18 every day`, support/equation.py). No
word may change what the number means (CHANGES), and a unit must be that of the reference
(support/units.py). When in doubt it reads nothing: a right answer that is missed costs a little, a
wrong one that is paid is what the model will learn to write.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from support.equation import VALUE, conclusion, is_true_sum
from support.plain_text import CHARACTERS, chinese_to_digits, plain
from support.units import Unit, factor, read_unit
from support.words import ANOTHER_NUMBER, CHANGES, DENIALS, HAN, WORDS, keep_its_meaning

LONGEST_ANSWER = 320  # characters; more than that is an essay

TAG = re.compile(r"<[ \t]{0,3}(/?)[ \t]{0,3}(answer|think)[ \t]{0,3}>", re.IGNORECASE)
NUMBER = rf"(?:{VALUE})(?:[eE][-+]?\d{{1,3}}(?!\d))?"
LETTER = f"A-Za-z{HAN}"
HYPHEN = r"(?<=[A-Za-z])-(?=[A-Za-z])"
# Not x72, nor (2)72.
BEFORE = (
    rf"(?P<before>(?:[{LETTER} ,.:;!'\"`#)\]]|(?<![A-Za-z])[(\[]|{HYPHEN})*)(?<![A-Za-z.,!)\]])"
)
# Away from its number at the start only: `48 - 24` is no -24.
SIGN = rf"(?P<sign>(?:^[-+] |(?<![{HAN}])[-+])?)"
FRACTION = r"(?:(?P<whole>\d+) (?:and )?)?(?P<over>\d+) ?/ ?(?P<under>\d+)"
# m^2, m², km/h; but not 72².
UNIT = rf"(?<=[{LETTER}]) ?\^ ?[23](?!\.?\d)|(?<=[{LETTER}])[²³]|/ ?(?=[{LETTER}])"
AFTER = rf"(?P<after>(?:{UNIT}|{HYPHEN}|[{LETTER} ,.:;!'\"`)(\[\]%°$€£¥₹¢])*)"
STATES = re.compile(rf"{BEFORE}{SIGN}(?:{FRACTION}|(?P<number>{NUMBER})){AFTER}")
# Left of an equals sign: no letters (48 + 24), or no digits and one unknown at most (x, so x, Total
# cost).
SUM = re.compile(r"(?:[\d\s.()+*/÷^%$€£¥₹-]|,(?=\d{3}(?!\d)))*")
NAME = re.compile(rf"([{LETTER} .,:']*?)(?:\b[A-Za-z])? ?")
DIGIT = re.compile(r"\d")
SENTENCE = re.compile(r"(?<=[a-z\d)*$%][.!]) +")
JOINED = re.compile(
    r"[-+*/=<>^÷]\s*\$?\s*\Z|(?:\A|\s)(?:and|or|not|to|of|of the|through)\s*\Z"
    r"|[和或到至与]\s*\Z"
)
CONCLUDES = re.compile(
    r"\b(?:so|therefore|thus|hence|total|altogether|in all|is|are|was|were|makes?|leaves?|left"
    r"|equals?|answer|result|have|has|will|needs?|costs?|earns?)\b|所以|因此|共|是|有|得|剩|为|需要",
    re.IGNORECASE,
)
COMMENT = re.compile(rf"\([{LETTER} ,.'-]*\)")  # 6 (times)


@dataclass(frozen=True)
class Reading:
    """What a text states: a number, of something."""

    value: Fraction
    unit: Unit


def find_answer(completion: str, truncated: bool = False) -> str | None:
    """The text inside the last `<answer>…</answer>`, stripped; None if there is none.

    A tag that is opened last and never closed counts too, unless the completion was cut off there.
    """
    opened, closed = -1, (-1, -1)  # where the last tag begins; begin and end of the last answer
    for tag in TAG.finditer(completion):
        if tag[2].lower() == "answer" and not tag[1]:
            opened = tag.end()
        elif tag[2].lower() == "answer" and opened >= 0:
            closed = opened, tag.start()
    start, end = closed
    if opened > end and not truncated and (completion[opened:].strip() or start < 0):
        start, end = opened, len(completion)
    return None if start < 0 else completion[start:end].strip()


def find_reasoning(completion: str) -> str | None:
    """The text inside the first `<think>…</think>`, stripped; None if there is none."""
    start = None
    for tag in TAG.finditer(completion):
        if tag[2].lower() == "think":
            if not tag[1] and start is None:
                start = tag.end()
            elif tag[1] and start is not None:
                return completion[start : tag.start()].strip()
    return None


@lru_cache(maxsize=8192)
def read(text: str, own: frozenset[str] = frozenset(), trusted: bool = False) -> Reading | None:
    """The one number that `text` states, as a person reads it; None if it states none, or several.

    `72`, `$72`, `72.0`, `72 apples`, `1,000`, `3/4`, `1 1/2`, `七十二个` and `70 + 2 = 72` state
    one; `70 or 72` does not, so that listing every number earns nothing, nor do `not 72`, `x > 72`
    and `2x = 72`.

    Args:
        own: words that the reference states, which may stand in the answer as well.
        trusted: the text is a reference, which means what it says: `5 times as many`, `6 (times)`.
    """
    if len(text) > LONGEST_ANSWER:
        return None
    line = plain(COMMENT.sub(comment, text) if trusted else text)
    *left, right = line.split("=")
    stated = STATES.fullmatch(right.strip())
    changes = ANOTHER_NUMBER if trusted else CHANGES
    if (
        stated
        and all(map(is_sum_or_name, left))
        and (not left or not DIGIT.search(left[-1]) or is_true_sum(left[-1], right))
        and keep_its_meaning(stated["before"], stated["after"], changes, own)
    ):
        value = number_of(stated)
        unit = read_unit(stated["before"], stated["after"])
        return None if value is None else Reading(value, unit)
    found = conclusion(line, own)
    if not found:
        return None
    number, before, after = found
    stated = STATES.fullmatch(number.replace("- ", "-"))
    value = number_of(stated) if stated else None
    return None if value is None else Reading(value, read_unit(before, after))


def comment(found: re.Match[str]) -> str:
    """A remark in brackets is left out of a reference, but not one of size: 6 (thousand)."""
    sizes = {word.lower().removesuffix("s") for word in WORDS.findall(found[0])} & ANOTHER_NUMBER
    return found[0] if sizes else ""


def states_number(reference: str) -> bool:
    """Whether a reference is read as a number; else an answer must have the same words."""
    return read(reference, trusted=True) is not None


def number_of(stated: re.Match[str]) -> Fraction | None:
    """The value of a match of STATES; None for 1/0 and for 1 3/2."""
    if stated["number"]:
        value = Fraction(stated["number"].replace(",", ""))
    else:
        whole, over, under = (int(stated[name] or 0) for name in ("whole", "over", "under"))
        if under == 0 or (stated["whole"] and over >= under):
            return None
        value = whole + Fraction(over, under)
    return -value if "-" in stated["sign"] else value


def parse_number(text: str) -> Fraction | None:
    """The number that a text states, without its unit; None if there is none."""
    found = read(text)
    return found.value if found else None


def is_sum_or_name(left: str) -> bool:
    """Whether what equals the number is a sum (`48 + 24`) or a name (`x`), not `71 or x`."""
    name = NAME.fullmatch(left.strip())
    is_sum = SUM.fullmatch(left) and (DIGIT.search(left) or not left.strip())
    return bool(is_sum) or (name is not None and keep_its_meaning(name[1]))


def same_answer(answer: str, reference: str) -> bool:
    """Whether two answers are the same number; the same words, for a reference such as x^2."""
    if answer.strip() == reference.strip():
        return True
    target = read(reference, trusted=True)
    if target is None:
        return words(answer) == words(reference)
    found = read(answer, frozenset(WORDS.findall(reference.lower())))
    return found is not None and same_reading(found, target)


def same_reading(answer: Reading, reference: Reading) -> bool:
    """Whether two numbers are the same, in their units."""
    ratio = factor(answer.unit, reference.unit)
    return ratio is not None and answer.value * ratio == reference.value


def words(text: str) -> list[str]:
    """What is compared where no number is: no capitals, bold, full stop; short LaTeX plain."""
    short = plain(text) if len(text) <= LONGEST_ANSWER else text
    return short.casefold().strip(" \n*`").rstrip(".").split() or text.split()


def is_correct(completion: str, reference: str, truncated: bool = False) -> bool:
    """Strict: the answer tag is there and holds the reference."""
    answer = find_answer(completion, truncated)
    return answer is not None and same_answer(answer, reference)


def is_correct_flexible(completion: str, reference: str, truncated: bool = False) -> bool:
    """Flexible: the answer tag, or without one what the last sentence with a number states.

    Where it has several numbers and no equation, the last one counts if the words since the one
    before it conclude (CONCLUDES), and leave it as it is. A completion that was cut off has
    not come to its answer.
    """
    answer = find_answer(completion, truncated)
    if answer is not None:
        return same_answer(answer, reference)
    tail = completion[-10 * LONGEST_ANSWER :].translate(CHARACTERS)
    tail = TAG.sub("\n", tail).strip()  # a tag that has no other half
    lines = [line for line in tail.splitlines() if DIGIT.search(chinese_to_digits(line))]
    if truncated or not lines or len(lines[-1]) > 5 * LONGEST_ANSWER:
        return False
    later = tail[tail.rfind(lines[-1]) + len(lines[-1]) :]
    if not keep_its_meaning("", later, DENIALS):
        return False
    sentences = SENTENCE.split(lines[-1])
    while not DIGIT.search(chinese_to_digits(sentences[-1])):
        if not keep_its_meaning("", sentences.pop(), DENIALS):  # `18. That is wrong.`
            return False
    whole = read(sentences[-1]) is not None
    return same_answer(sentences[-1] if whole else last_number(sentences[-1]), reference)


def last_number(sentence: str) -> str:
    """The last number of a sentence, if a conclusion leads to it, with the words since another.

    Nothing where the two are joined: `17 or 18`, `17, 18`, `48 - 24`, `15 of 18`.
    """
    numbers = list(re.finditer(NUMBER, sentence))
    if len(numbers) < 2:
        return ""
    between = sentence[numbers[-2].end() : numbers[-1].start()]
    if not CONCLUDES.search(between):
        return ""
    joined = JOINED.search(between) or not re.search(rf"[A-Za-z]{{2}}|[{HAN}]", between)
    return "" if joined else sentence[numbers[-2].end() :].lstrip("%.,")
