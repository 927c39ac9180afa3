"""The equation that a sentence ends in: `She makes 9 * 2 = $18 every day` states 18.

The last one counts, if it is true and nothing in the sentence takes it back: no `not` before it, no
`or 17`, no further sum and no other sentence behind it. That it is true is what tells a conclusion
from numbers that happen to stand beside each other.
"""

import ast
import operator
import re
from fractions import Fraction

from support.words import (
    ANOTHER_NUMBER,
    CHANGES,
    DENIALS,
    HAN,
    MORE_HAN,
    NUMERALS,
    UNIT_LETTERS,
    changes_han,
    word_set,
)

VALUE = r"(?:\d{1,3}(?:,\d{3})+(?!,?\d)|\d+)(?:\.\d+)?|\.\d+"
TOKEN = re.compile(
    rf"(?P<mixed>\d+ \d+/\d+(?![\d/]))|(?P<number>(?:{VALUE})(?:e\d{{1,2}})?(?![\d.]*\d))"
    rf"|(?P<word>[A-Za-z](?:[A-Za-z&']|-(?=[A-Za-z]))*[²³]?|[{HAN}]+[²³]?"
    rf"|/(?= ?[A-Za-z{HAN}])|[$€£¥₹¢°#\"'`])"
    r"|(?P<sign>[+*/÷^-])|(?P<open>[(\[])|(?P<close>[)\]])|(?P<equals>=)|(?P<percent>%)"
    r"|(?P<break>[,.;:!?])|(?P<other>\S)"
)


def small_power(base: Fraction, power: Fraction) -> Fraction:
    """2^3; KeyError for one that would take long."""
    if power.denominator != 1 or not 0 <= power <= 12 or abs(base) > 10**6:
        raise KeyError(power)
    return base ** int(power)


OPERANDS = ("number", "mixed", "open")
SIGNS = {"x": "*", "plus": "+", "minus": "-", "times": "*"}
UNARY = {ast.UAdd: operator.pos, ast.USub: operator.neg}
BINARY = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.Pow: small_power,
}  # fmt: skip
MOST_TOKENS = 150
# Behind the result a number may stand in an addition such as `for 6 hours`.
PREPOSITIONS = word_set(
    "for in of after over on at from per within during than every each with by before to"
)
ENDS = word_set("and but so then leaving plus minus which")  # a new statement begins
AUXILIARIES = word_set("did do does are were have has had will would can could")
WRONG = word_set("wrong incorrect false untrue impossible 错 不对 错误")
AFTER_NOT = word_set("true right correct because")
# Behind the result: it is not the end of the sum.
GOES_ON = word_set("squared cubed doubled doubles tripled half plus minus impossible but")
CLAUSES = word_set("so thus therefore hence means because since")
NUMBER_WORDS = word_set(NUMERALS) - {"one"}
TITLES = word_set("mr mrs ms dr st")
# In `add up 3 + 4` it changes nothing.
BEFORE_A_SUM = CHANGES - word_set("up")
BEHIND_AN_OPERAND = ANOTHER_NUMBER - word_set("log")  # 5 degrees/log
LETTERS = frozenset(("a", "A", "I"))  # single letters that are words


class Token:
    """A piece of a text: its kind, a group of TOKEN; its text; where it ends."""

    def __init__(self, match: re.Match[str]) -> None:
        self.kind, self.text = match.lastgroup or "", match[0]
        self.start, self.end = match.span()

    @property
    def unknown(self) -> bool:
        """Whether it is a letter that stands for a number."""
        letter = len(self.text) == 1 and self.text.isascii() and self.text.isalpha()
        return self.kind == "word" and letter and self.text not in LETTERS


def tokens_of(text: str) -> list[Token]:
    """The tokens of a plain text; words between two operands that are signs are signs."""
    tokens = [Token(match) for match in TOKEN.finditer(text)]
    operand = False  # whether a number stands to the left, in the same clause
    for token, follows in zip(tokens, [*tokens, None][1:], strict=True):
        next_kind = follows.kind if follows else ""
        if token.kind == "word" and operand and next_kind in OPERANDS:
            if token.text.lower() in SIGNS:
                token.kind, token.text = "sign", SIGNS[token.text.lower()]
            elif token.text == "of" and operand == "part":
                token.kind, token.text = "sign", "*"
        if token.text == "equals":
            token.kind = "equals"
        if token.text == "÷":
            token.text = "/"
        if token.kind in ("number", "mixed", "close"):
            operand = True
        elif token.kind == "percent":
            operand = "part"
        elif token.kind in ("break", "equals", "other"):
            operand = False
    return tokens


def conclusion(text: str, own: frozenset[str]) -> tuple[str, str, str] | None:
    """The last equation of a plain text, where it states a number.

    Args:
        own: words that the reference itself states.
    Returns:
        the number as it is written, the words before the equation, and the text behind the number;
        or None.
    """
    tokens = tokens_of(text)
    places = [i for i, token in enumerate(tokens) if token.kind == "equals"]
    if not places or len(tokens) > MOST_TOKENS:
        return None
    right, rest = right_side(tokens[places[-1] + 1 :])
    begin = places[-2] + 1 if len(places) > 1 else 0
    left = tokens[begin : places[-1]]
    if right is None or any(has_unknown(tokens[:place]) for place in places[:-1]):
        return None
    start, in_percent = expression_start(left), bool(rest) and rest[0].kind == "percent"
    if start is not None:
        stated = is_true(left[start:], right, in_percent)
    else:
        start, stated = len(left) - 1, len(places) == 1 and is_name(left)
    before, value = tokens[: begin + max(start, 0)], value_of(right)
    if not stated or denied(before) or states_another(before, value):
        return None
    if not follows_well(rest, value, own):
        return None
    end = right[-1].end
    return text[right[0].start : end], text[: left[start].start], text[end:]


def is_true_sum(left: str, right: str) -> bool:
    """Whether `left`, all of it, is the number that `right` begins with."""
    tokens, (found, rest) = tokens_of(left), right_side(tokens_of(right))
    if found is None or not tokens:
        return False
    return is_true(tokens, found, bool(rest) and rest[0].kind == "percent")


def right_side(tokens: list[Token]) -> tuple[list[Token] | None, list[Token]]:
    """The number that follows an equals sign, with its sign; and what is behind it."""
    count = 1 if tokens and tokens[0].text == "-" else 0
    if len(tokens) <= count or tokens[count].kind not in ("number", "mixed"):
        return None, []
    count += 1
    if [t.kind for t in tokens[count : count + 2]] == ["sign", "number"] and (
        tokens[count].text == "/" and tokens[count - 1].kind == "number"
    ):
        count += 2
    return tokens[:count], tokens[count:]


def has_unknown(tokens: list[Token]) -> bool:
    """Whether what equals the rest is a multiple or a sum of an unknown: 2x, x + 5."""
    for i, token in enumerate(tokens):
        if token.unknown:
            beside = tokens[max(0, i - 1) : i] + tokens[i + 1 : i + 2]
            if any(t.kind in ("sign", "number", "close", "open", "other") for t in beside):
                return True
    return any(token.kind == "other" for token in tokens)


def expression_start(tokens: list[Token]) -> int | None:
    """Where the sum begins that these tokens end in; None if they end in none.

    A sum: operands with a sign between each two; behind an operand may stand words (12 bananas).
    """
    place, signs = operand_start(tokens, len(tokens)), 0
    while place:  # neither None nor the first token
        before = tokens[place - 1]
        if before.kind in ("number", "mixed") and tokens[place].kind == "open":  # 2(3 + 4)
            place, signs = place - 1, signs + 1
        elif before.kind == "sign":
            earlier = operand_start(tokens, place - 1)
            if earlier is None:  # -50 + 100
                unary = before.text in "+-" and before.end == tokens[place].start
                return place - 1 if unary and signs else None
            place, signs = earlier, signs + 1
        elif before.kind in ("word", "open"):
            further = tokens[place - 2].text.lower() if place > 1 and before.text == "of" else ""
            changed = before.unknown or {before.text.lower(), further} & BEFORE_A_SUM
            return place if signs and not changed else None
        else:
            return place if signs and before.kind == "break" else None
    return place if signs else None


def operand_start(tokens: list[Token], end: int) -> int | None:
    """Where the operand begins that tokens[:end] end in: a number or brackets, and words."""
    i = end - 1
    while i >= 0 and tokens[i].kind in ("word", "percent"):
        word = tokens[i].text.lower()
        if tokens[i].unknown or word in BEHIND_AN_OPERAND or changes_han(word):
            return None
        i -= 1
    if i < 0:
        return None
    if tokens[i].kind in ("number", "mixed"):
        return i
    if tokens[i].kind != "close":
        return None
    depth, first = 0, i
    while first >= 0:
        depth += (tokens[first].kind == "close") - (tokens[first].kind == "open")
        if depth == 0:
            break
        first -= 1
    if depth:
        return None
    if any(token.kind in ("number", "mixed") for token in tokens[first:i]):
        return first
    return operand_start(tokens, first)  # a comment: 48 (in April)


def is_name(tokens: list[Token]) -> bool:
    """Whether these words end in an unknown that is named: `so we get x`."""
    clause = []
    for token in reversed(tokens[:-1]):
        if token.kind == "break":
            break
        clause.append(token)
    named = bool(clause) and tokens[-1].unknown and clause[0].text.lower() not in CHANGES
    return named and all(t.kind == "word" and not t.unknown for t in clause)


def states_another(tokens: list[Token], value: Fraction) -> bool:
    """Whether another answer stands before: `20, since 10 + 8 = 18`, `Answer: 20. 9 * 2 = 18`.

    At the beginning, behind the word answer, or before a because that leads to the equation.
    """
    numbers = [i for i, token in enumerate(tokens) if token.kind in ("number", "mixed")]
    other = [i for i in numbers if value_of([tokens[i]]) != value]
    words = [token.text.lower() for token in tokens]
    if other and other[0] == 0 and len(tokens) > 1 and tokens[1].kind in ("break", "open"):
        return True
    if any({"answer", "result", "答案"} & set(words[max(0, i - 3) : i]) for i in other):
        return True
    reasons = [i for i, word in enumerate(words) if word in ("because", "since", "因为")]
    if not reasons or any(token.kind == "break" for token in tokens[reasons[-1] :]):
        return False
    claims = [i for i in numbers if i < reasons[-1]]
    return bool(claims) and claims[-1] in other


def denied(tokens: list[Token]) -> bool:
    """Whether what leads to an equation takes it back: `it is not 9 * 2`, `Wrong: 9 * 2 = 18`."""
    for token, follows in zip(tokens, [*tokens, None][1:], strict=False):
        ends = follows is None or follows.kind == "break" or follows.text.lower() in AFTER_NOT
        if token.text.lower() in WRONG or (token.text.lower() == "not" and ends):
            return True
    for token in reversed(tokens):
        word = token.text.lower()
        if token.kind == "break" or word in CLAUSES:
            return False
        if word in DENIALS or changes_han(word):
            return True
    return False


def follows_well(tokens: list[Token], value: Fraction, own: frozenset[str]) -> bool:
    """Whether what stands behind the result leaves it as it is.

    Another number may stand there in an addition (`for 6 hours`), or if it is the result again.
    """
    if tokens and changes_at_once(tokens[0], own):
        return False
    new_statement = addition = new_sentence = again = False
    for last, token, follows in zip([None, *tokens], tokens, [*tokens, None][1:], strict=False):
        word = token.text.lower()
        if token.kind == "number" and last and last.text == "#":  # horse #12
            continue
        if token.kind in ("number", "mixed"):
            again = value_of([token]) == value
            if not again and (new_statement or not addition):
                return False
        elif token.kind == "break":
            new_statement = True
            ends = token.text in ".;!" and not (last and last.text.lower() in TITLES)
            new_sentence |= ends and follows is not None and not follows.text[:1].islower()
        elif token.kind == "word":
            of_others = word == "not" and last and last.text.lower() in AUXILIARIES
            if (word in DENIALS and word not in own and not of_others) or changes_han(word):
                return False
            if word in GOES_ON or (new_statement and word in NUMBER_WORDS):
                return False
            if word in ("least", "most") and last and last.text.lower() == "at":
                return False
            addition |= word in PREPOSITIONS
            new_statement |= word in ENDS
        if token.kind == "other" or token.text == "?" or is_sign(token, follows):
            return False
    return again or not new_sentence


def changes_at_once(token: Token, own: frozenset[str]) -> bool:
    """Whether the word directly behind a number makes another number of it."""
    if token.kind != "word":
        return False
    word, unit = token.text.lower(), not token.unknown or token.text in UNIT_LETTERS
    changed = word in ANOTHER_NUMBER and word not in own
    return changed or not unit or bool(MORE_HAN.match(word))


def is_sign(token: Token, follows: Token | None) -> bool:
    """Whether a sum goes on here."""
    return token.kind == "sign" and follows is not None and follows.kind in OPERANDS


def value_of(tokens: list[Token]) -> Fraction:
    """The number of one side: 12,500, -3, 1 1/2, 1/3."""
    total, text = Fraction(0), "".join(f" {token.text}" for token in tokens).replace(",", "")
    negative, parts = "-" in text, text.replace("-", " ").replace(" / ", "/").split()
    for part in parts:
        over, _, under = part.partition("/")
        total += Fraction(over) / (Fraction(under) if under and Fraction(under) else 1)
    return -total if negative else total


def is_true(tokens: list[Token], right: list[Token], in_percent: bool) -> bool:
    """Whether a sum is the number on its right, to the places that are printed there.

    50 % is 0.5 or, where the result is in percent (`7/20 * 100% = 35%`), 50.
    """
    value, decimals = value_of(right), len(right[-1].text.partition(".")[2])
    whole = in_percent or [token.text for token in tokens[-2:]] == ["100", "%"]
    percents = (Fraction(1, 100), Fraction(1)) if whole else (Fraction(1, 100),)
    found = [sum_of(tokens, percent) for percent in percents]
    precision = Fraction(1, 2 * 10**decimals) if decimals else 0
    return any(other is not None and abs(other - value) <= precision for other in found)


def sum_of(tokens: list[Token], percent: Fraction) -> Fraction | None:
    """The value of `2 * (3 + 4) bananas`; None if it is no sum, or divides by 0.

    Python's own parser knows which sign comes first; the numbers are handed to it as names.
    """
    numbers, text, last = {"percent": percent}, "", ""
    for token in tokens:
        if token.kind in ("number", "mixed"):
            name = f"n{len(numbers)}"
            numbers[name], piece = value_of([token]), name
        else:
            pieces = {
                "sign": token.text.replace("^", "**"),
                "open": "(",
                "close": ")",
                "percent": "*percent",
            }
            piece = pieces.get(token.kind, "")
        text += "*(" if piece == "(" and last not in ("", "(", *"+-*/") else piece
        last = piece or last
    try:
        return value_at(ast.parse(text, mode="eval").body, numbers)
    except (SyntaxError, ZeroDivisionError, KeyError, RecursionError):
        return None


def value_at(node: ast.AST, numbers: dict[str, Fraction]) -> Fraction:
    """The value of a node of the tree; KeyError for one that is no sum."""
    if isinstance(node, ast.Name):
        return numbers[node.id]
    if isinstance(node, ast.UnaryOp):
        return UNARY[type(node.op)](value_at(node.operand, numbers))
    if isinstance(node, ast.BinOp):
        left, right = value_at(node.left, numbers), value_at(node.right, numbers)
        return BINARY[type(node.op)](left, right)
    raise KeyError(type(node))
