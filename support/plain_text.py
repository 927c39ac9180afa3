"""A short text in its plainest writing: `１，０００` as 1,000, `一千` as 1000, `$5` as 5 $.

What is done here keeps the meaning of a text, and does not decide anything: answers.py does.
"""

import re

from support.words import HAN, ONES, TENS

CHARACTERS = str.maketrans({
    "−": "-", "–": "-", "—": "-", "’": "'", "⁄": "/", "×": "*", "✕": "*", "·": "*", "⋅": "*",
    "≈": " ", "•": " ",
    "½": " 1/2", "¼": " 1/4", "¾": " 3/4", "⅓": " 1/3", "⅔": " 2/3", "⅛": " 1/8", "…": ".",
    "\u200b": "", "\u200e": "", "\u200f": "", "\ufeff": "",
    # Full width, as Chinese keyboards write them.
    "，": ",", "。": ". ", "．": ".", "、": "; ", "；": "; ", "：": ": ", "！": "! ", "？": "? ",
    "（": "(", "）": ")", "【": "[", "】": "]", "《": '"', "》": '"', "“": '"', "”": '"', "‘": "'",
    "％": "%", "＋": "+", "－": "-", "＊": "*", "／": "/", "＝": "=", "＜": "<", "＞": ">",
    "～": "~", "￥": "¥", "＄": "$", "￡": "£", "℃": "°C", "℉": "°F", "㎡": "m²",
})  # fmt: skip

# ------------------------------------------------------------------------------- Chinese numbers

DIGITS = {c: i for i, c in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
POWERS = {"十": 10, "百": 100, "千": 1000}
MYRIADS = {"万": 10**4, "亿": 10**8}
SIZE_OF = POWERS | MYRIADS
RUN = "[零〇一二两三四五六七八九十百千万亿]{1,24}(?:点[零〇一二三四五六七八九]{1,24})?"
NUMBER_WORD = re.compile(rf"(?<![第\d])({RUN})(?!角形|边形)")
SHARE = re.compile(rf"(\d+|{RUN})分之(\d+(?:\.\d+)?|{RUN})")
# 3万, 2.5亿, 5千; but 千米, 千克, 千瓦, and 百分 are other words.
SHORT = re.compile(r"(?<=\d)(百万|千万|百|千|万|亿)(?![米克瓦卡赫帕分])")
SIZES = {"百": "e2", "千": "e3", "万": "e4", "亿": "e8", "百万": "e6", "千万": "e7"}
SPOKEN = [(re.compile(pattern), sign) for pattern, sign in (
    (r"负\s*(?=\d)", " -"), (r"(?<![增参添附])加上?(?=\d)", "+"), (r"减去?(?=\d)", "-"),
    (r"乘以?(?=\d)", "*"), (r"除以(?=\d)", "/"), ("等于", "="),
)]  # fmt: skip
# A single 一 … 十 is a number if one of these, or nothing, follows: 六个, 八元; not 一共.
COUNTED = re.compile(
    r"[个只条张本支枝把件位名人元块角分米克吨升斤秒天周年月岁次辆头匹朵颗粒根瓶杯盒包袋箱套双对"
    r"页台座棵盆份场道间步首篇门层排行列组种类倍度批盘碗筐篮艘架厘毫千公平立小星英"
    r".,;:!?)(\]\s+*/=%°-]"
    r"|\Z"
)


VERY_GOOD = re.compile("十分(?![之钟])")
NUMBERS = re.compile(rf"\d+|{RUN}")


def chinese_number(text: str) -> str | None:
    """`一千零五` as "1005", `三点五` as "3.5", `一九九八` as "1998"; None if it is no number."""
    whole, _, decimals = text.partition("点")
    end = "".join(str(DIGITS[c]) for c in decimals)
    if all(c in DIGITS for c in whole) and (len(whole) == 1 or len(whole) > 3):
        value = int("".join(str(DIGITS[c]) for c in whole))
    else:
        found = below_power(whole)
        if found is None:
            return None
        value = found
    return f"{value}.{end}" if end else str(value)


def below_power(text: str) -> int | None:
    """A number with 十, 百, 千, 万, 亿 in their order; None if the order is another."""
    total, section, digit, last, last_myriad = 0, 0, None, 10**4, 10**12
    for c in text:
        if c in DIGITS:
            if digit is not None and digit != 0:
                return None
            digit = DIGITS[c]
        elif c in POWERS:
            if POWERS[c] >= last or digit == 0 and c != "十":
                return None
            section += (1 if digit is None or digit == 0 else digit) * POWERS[c]
            digit, last = None, POWERS[c]
        else:
            section += digit or 0
            if section == 0 or MYRIADS[c] >= last_myriad:
                return None
            total += section * MYRIADS[c]
            section, digit, last, last_myriad = 0, None, 10**4, MYRIADS[c]
    if digit and text[-2:-1] in SIZE_OF:
        digit *= SIZE_OF[text[-2]] // 10  # 一百二 is 120, 一万二 is 12000
    return total + section + (digit or 0)


def chinese_to_digits(text: str) -> str:
    """Chinese numbers in digits: `七十二个` as 72个, `三分之一` as 1/3, `3万` as 3e4."""

    def share(found: re.Match[str]) -> str:
        under, over = map(number_in, found.groups())
        if under is None or over is None:
            return found[0]
        return f" {over}% " if under == "100" else f" {over}/{under} "

    def number(found: re.Match[str]) -> str:
        run, text = found[0], found.string
        counted = COUNTED.match(text, found.end()) and not VERY_GOOD.match(text, found.start())
        if len(run) == 1 and not counted:
            return run
        if run == "一" and len(NUMBERS.findall(text)) > 1:
            return run  # 一天72元 is 72 yuan a day
        return chinese_number(run) or run

    if not re.search(f"[〇{HAN}]", text):
        return text
    text = SHARE.sub(share, text.replace("又", " "))
    text = NUMBER_WORD.sub(number, text)
    text = SHORT.sub(lambda found: SIZES[found[1]], text)
    for pattern, sign in SPOKEN:
        text = pattern.sub(sign, text)
    return text


def number_in(text: str) -> str | None:
    """`chinese_number` of a text that may be digits already."""
    return text if text.replace(".", "").isdecimal() else chinese_number(text)


# ------------------------------------------------------------------------------- English numbers

SMALL = {word: value for value, word in enumerate(ONES.split())}
SMALL |= {word: 10 * tens for tens, word in enumerate(TENS.split(), 2)}
LARGE = {"hundred": 100, "thousand": 1000, "million": 10**6}
SPELLED = "|".join([*SMALL, *LARGE])
ENGLISH = re.compile(
    rf"\b(?:{SPELLED})(?:(?:-| and | )(?:{SPELLED}))*\b(?![ -](?:{SPELLED}))",
    re.IGNORECASE,
)


def english_to_digits(text: str) -> str:
    """`twenty-five apples` as 25 apples, in a text without digits; `no one` has no number."""
    if re.search(r"\d", text) or not re.search(SPELLED, text, re.IGNORECASE):
        return text

    def number(found: re.Match[str]) -> str:
        pronoun = found[0].lower() == "one" and found.start() > 0  # no one, this one
        return found[0] if pronoun else english_number(found[0]) or found[0]

    return ENGLISH.sub(number, text)


def english_number(text: str) -> str | None:
    """`two hundred and five` as "205"; None for words that are no number in this order."""
    words = re.split(r" and |[- ]", text.lower())
    total, section, last = 0, 0, 0
    for word in words:
        if word in SMALL:
            value = SMALL[word]
            tens_before = last in (20, 30, 40, 50, 60, 70, 80, 90) and 0 < value < 10
            if not (tens_before or last in (0, 100, 1000, 10**6)):
                return None
            section, last = section + value, value or -1
        elif LARGE[word] == 100:
            if not 0 < section < 10:
                return None
            section, last = section * 100, 100
        else:
            if not 0 < section < 1000 or (total and LARGE[word] >= 10**6):
                return None
            total, section, last = total + section * LARGE[word], 0, LARGE[word]
    return str(total + section)


# --------------------------------------------------------------------- other ways of writing

AMOUNT = r"-?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:e\d+)?(?!\d)"
# Other ways of writing the same, mostly LaTeX's, and the plain way; in this order.
PLAINER = [(re.compile(pattern), plain_way) for pattern, plain_way in (
    (r"</?(?:b|i|u|em|strong|p|br|span|mark)\s*/?>", " "),
    (r"<<[^<>]*>>", ""),  # GSM8K's calculator: 48/2 = <<48/2=24>>24
    (r"n't\b", " not"), (r"\bequals\b", "="),
    (r"(?<=\d) ?degrees? ([CcFf])(?:elsius|ahrenheit)?\b", r"°\1"),
    (r"\b(?:USD|US dollars?) ?(?=\d)", "$"), (r"\bEUR ?(?=\d)", "€"),
    (r"(^|= ?)(?:[Mm]inus|[Nn]egative) (?=\d)", r"\1-"),
    (r"\\(?=[%$#])", ""),
    (r"\{,\}|,\\!", ","),
    (r"(?<![\d.,/])(\d{1,3})(?: |\\,)(?=\d{3}(?!\d| ?/))", r"\1"),
    (r"\*\*([^*]*)\*\*(?!\w)", r" \1 "),
    (r"\^ ?\{? ?\\circ ?\}?|\\degree\b", "°"),
    (r"((?<![\w)])-|)\\[dt]?frac ?(?:\{(-?\d+)\} ?\{(\d+)\}|\{(-?\d+)\} ?(\d)|(\d) ?\{(\d+)\}"
     r"|(\d) ?(\d))", r" \1\2\4\6\8/\3\5\7\9 "),
    (r"(?<![\w)])-\((\d+(?:\.\d+)?(?: ?/ ?\d+)?)\)", r"-\1"),
    (r"(?<=\d) *(?:\*|x|\\times|\\cdot) *(?=\d)", "*"),
    (r" ?\\div ?", "÷"),
    (r"(?<=\d)\*10\^ ?(?:(\d)|\{ ?(-?\d{1,3}) ?\})(?!\d)", r"e\1\2 "),
    (r"\\(?:(?:text|math)(?:bf|rm|it)?|mbox|boxed|approx|q?quad|left|right|displaystyle)(?![a-z])",
     " "),
    (r"\\[,;: ()\[\]]|[{}]|(?<!~)~(?!~)", " "),
    (r"(?<=\d) (?:hundred)\b(?! and)", "e2"), (r"(?<=\d) (?:thousand)\b", "e3"),
    (r"(?<=\d) (?:million)\b", "e6"), (r"(?<=\d) (?:billion)\b", "e9"),
    (r"\b(\d{1,6}) dozens?\b(?! of)", lambda found: str(12 * int(found[1]))),
    (r"\b(\d{1,6}) and (?:a|one) half\b", r"\1.5"),
    (r"^\$([^$]+)\$[.]?$", r"\1"), (r"\$(-?[\d.,/ ]*\d)\$", r"\1"),  # LaTeX's
    (rf"(?<![\d$.,])(-?)(?:\bUS)?([$€£¥₹]) ?({AMOUNT})", r"\1\3 \2"),
    (r"(?<!\d)(?<!\d )(?:\bUS)?[$€£¥₹] ?|(?<!\d )[$€£¥₹](?!\d)", ""),
    (r"(?<=\d) ?\b([APap])\.[Mm]\b\.?", r" \1m"),
    (r"(?<=\d) ?min\b", " minutes"),  # but `min 72` is a bound
    (r"(?<=\d) ?left over\b", " "), (r"° *([CF])\b", r"°\1"),
    (r"(?<=\d) ([a-z]+) squared\b", r" \1²"), (r"(?<=\d) ([a-z]+) cubed\b", r" \1³"),
    (r"(?<=\d) ?(?:square|sq\.?) ([a-z]+)", r" \1²"), (r"(?<=\d) ?cubic ([a-z]+)", r" \1³"),
    (r"(?<=\d) ?(\(?)平方((?:厘|分|千|毫)?米|公里)", r" \1\2²"),
    (r"(?<=\d) ?(\(?)立方((?:厘|分|毫)?米)", r" \1\2³"),
)]  # fmt: skip


LINES = re.compile(r"(?<=\d) *\n\s*(?=[\d(])")  # one sum below another


def plain(text: str) -> str:
    """`text` on one line, in its plainest writing."""
    text = LINES.sub("; ", text.translate(CHARACTERS))
    text = " ".join(text.split())
    text = english_to_digits(chinese_to_digits(text))
    for pattern, plain_way in PLAINER:
        text = pattern.sub(plain_way, text)
    return " ".join(text.split())
