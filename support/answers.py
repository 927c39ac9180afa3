"""Find an answer in a completion, and read it as a person does: `$1,000.00` is 1000.

A reward is paid for what is read here. So this says what counts, and nothing else does: an answer
is written plainly (PLAINER); what stands behind its last equals sign must be one number with words
around it (STATES); and none of the words may change what the number means (CHANGES). When in doubt
it reads nothing: a right answer that is missed costs a little, a wrong one that is paid is what the
model will learn to write.
"""

import re
from fractions import Fraction

LONGEST_ANSWER = 200  # characters; more than that is an essay

CHARACTERS = str.maketrans({
    "−": "-", "–": "-", "—": "-", "’": "'", "⁄": "/", "×": "*", "≈": " ",
    "½": " 1/2", "¼": " 1/4", "¾": " 3/4", "⅓": " 1/3", "⅔": " 2/3",
    "\u200b": "", "\u200e": "", "\u200f": "", "\ufeff": "",
})  # fmt: skip
# Other ways of writing the same, mostly LaTeX's, and the plain way; in this order.
PLAINER = [(re.compile(pattern), plain_way) for pattern, plain_way in (
    (r"n't\b", " not"),
    (r"(^|= ?)(?:[Mm]inus|[Nn]egative) (?=\d)", r"\1-"),
    (r"\\(?=[%$#])", ""),
    (r"\{,\}|,\\!", ","),
    (r"(?<![\d.,/])(\d{1,3})(?: |\\,)(?=\d{3}(?!\d| ?/))", r"\1"),
    (r"\*\*([^*]*)\*\*(?!\w)", r" \1 "),
    (r"\^ ?\{? ?\\circ ?\}?|\\degree\b", "°"),
    (r"((?<![\w)])-|)\\[dt]?frac ?(?:\{(-?\d+)\} ?\{(\d+)\}|(\d) ?(\d))", r" \1\2\4/\3\5 "),
    (r"(?<=\d) *(?:\*|x|\\times|\\cdot) *(?=\d)", "*"),
    (r"(?<=\d)\*10\^ ?(?:(\d)|\{ ?(-?\d{1,3}) ?\})(?!\d)", r"e\1\2 "),
    (r"\\(?:(?:text|math)(?:bf|rm|it)?|boxed|approx|q?quad|left|right|displaystyle)(?![a-z])", " "),
    (r"\\[,;: ()\[\]]|[{}]|(?<!~)~(?!~)", " "),
    (r"(?<!\d)(?:\bUS)?[$€£¥₹] ?|[$€£¥₹元](?!\d)", ""),
    (r"(?<=\d) ?(?:min\b|left over\b|(?:square|cubic) (?=[a-z]))", " "),  # but `min 72` is a bound
)]  # fmt: skip

NUMBER = r"(?:(?:\d{1,3}(?:,\d{3})+(?!,?\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?!\d))?"
HYPHEN = r"(?<=[A-Za-z])-(?=[A-Za-z])"
# Not x72, nor (2)72.
BEFORE = rf"(?P<before>(?:[A-Za-z ,.:;!'\"`#)\]]|(?<![A-Za-z])[(\[]|{HYPHEN})*)(?<![A-Za-z.,!)\]])"
SIGN = r"(?P<sign>(?:^[-+] |[-+])?)"  # away from its number at the start only: `48 - 24` is no -24
FRACTION = r"(?:(?P<whole>\d+) (?:and )?)?(?P<over>\d+) ?/ ?(?P<under>\d+)"
# m^2, m², km/h; but not 72².
UNIT = r"(?<=[A-Za-z]) ?\^ ?[23](?!\.?\d)|(?<=[A-Za-z])[²³]|/ ?(?=[A-Za-z])"
AFTER = rf"(?P<after>(?:{UNIT}|{HYPHEN}|[A-Za-z ,.:;!'\"`)(\[\]%°])*)"
STATES = re.compile(rf"{BEFORE}{SIGN}(?:{FRACTION}|(?P<number>{NUMBER})){AFTER}")
# Left of an equals sign: no letters (48 + 24), or no digits and one unknown at most (x, so x, Total
# cost).
SUM = re.compile(r"(?:[\d\s.()+*/÷^%-]|,(?=\d{3}(?!\d)))*")
NAME = re.compile(r"([A-Za-z .,:']*?)(?:\b[A-Za-z])? ?")
# All but the words `a` and `I`: other single letters are unknowns.
WORDS = re.compile(r"(?![aAI] [a-z]{2})[A-Za-z]+")
UNITS = frozenset("CFLghlms")  # ... or these, behind a number
NUMERALS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety "
    "dozen hundred thousand million billion trillion"
)
# With one of these beside it a number is not what is meant: `not 72`, `at least 72`, `72 squared`,
# `72 and a half`.
OTHER_MEANING = (
    "not no never none neither nor cannot isnt nicht kein pas except unless without if but instead "
    "unlike wrong incorrect false different or either between than least most up over under above "
    "below beyond past less exceeds min max minimum maximum almost nearly nowhere far plus minus "
    "negative times divided multiplied by root sqrt square squared cube cubed power log ln exp sin "
    "cos tan mod modulo factorial choose abs floor ceil round inverse reciprocal opposite multiple "
    "as half halves third thirds fifth fifths eighth eighths ninth ninths twelfth twelfths quarter "
    "quarters ths double doubled twice triple tripled bn mil inf infinity pi ab abc ac bc dx dy mn "
    "pq xy xyz xz yz"
)
CHANGES = frozenset(OTHER_MEANING.split()) | {
    numeral + end for numeral in NUMERALS.split() for end in ("", "s", "th", "ths")
}


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
    """`text` on one line, without LaTeX, currency, and the many kinds of minus and space."""
    text = " ".join(text.translate(CHARACTERS).split())
    for pattern, plain_way in PLAINER:
        text = pattern.sub(plain_way, text)
    return " ".join(text.split())


def parse_number(text: str) -> Fraction | None:
    """The one number that `text` states, as a person reads it; None if it states none, or several.

    `72`, `$72`, `72.0`, `72 apples`, `1,000`, `3/4`, `1 1/2` and `70 + 2 = 72` state one; `70 or
    72` does not, so that listing every number earns nothing, nor do `not 72`, `x > 72` and `2x =
    72`.
    """
    if len(text) > LONGEST_ANSWER:
        return None
    *left, right = plain(text).split("=")
    stated = STATES.fullmatch(right.strip())
    if not stated or not all(map(is_sum_or_name, left)):
        return None
    if not (keep_its_meaning(stated["before"]) and keep_its_meaning(stated["after"], UNITS)):
        return None
    if stated["number"]:
        value = Fraction(stated["number"].replace(",", ""))
    else:
        whole, over, under = (int(stated[name] or 0) for name in ("whole", "over", "under"))
        if under == 0 or (stated["whole"] and over >= under):
            return None
        value = whole + Fraction(over, under)
    return -value if "-" in stated["sign"] else value


def keep_its_meaning(words: str, letters: frozenset[str] = frozenset("s")) -> bool:  # Bob's
    """Whether a number among these words is what it would be without them."""
    return all(
        word.lower() not in CHANGES and (len(word) > 1 or word in letters)
        for word in WORDS.findall(words)
    )


def is_sum_or_name(left: str) -> bool:
    """Whether what equals the number is a sum (`48 + 24`) or a name (`x`), not `71 or x`."""
    name = NAME.fullmatch(left.strip())
    return bool(SUM.fullmatch(left)) or (name is not None and keep_its_meaning(name[1]))


def same_answer(answer: str, reference: str) -> bool:
    """Whether two answers are the same number; the same words, for a reference such as x^2."""
    target = parse_number(reference)
    return words(answer) == words(reference) if target is None else parse_number(answer) == target


def words(text: str) -> list[str]:
    """What is compared where no number is: no capitals, bold, full stop; short LaTeX plain."""
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
        if tail != completion:  # not from the middle of a number
            tail = tail.partition(" ")[2]
        numbers = re.findall(rf"[-+]?{NUMBER}", tail.translate(CHARACTERS).replace("$", ""))
        answer = numbers[-1] if numbers else ""
    return same_answer(answer, reference)
