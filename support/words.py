"""Words that change what a number beside them means: `not 72`, `72 and a half`, `不到72`."""

import re


def word_set(words: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(words.split())


HAN = "\u4e00-\u9fff"  # Chinese
# All but the words `a` and `I`: other single letters are unknowns.
WORDS = re.compile(r"(?![aAI] [a-z]{2})[A-Za-z]+")
UNIT_LETTERS = frozenset("CFLghlmst")  # ... or these, behind a number
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
)
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
NUMERALS = f"{ONES} {TENS} dozen hundred thousand million billion trillion"
PARTS = (
    "half halves third thirds fifth fifths eighth eighths ninth ninths twelfth twelfths quarter "
    "quarters ths root sqrt log ln exp sin cos tan mod modulo factorial choose abs floor ceil "
    "inverse reciprocal divisor factor gcd lcm reversed hex octal binary lakh crore grand squared "
    "cubed negative minus plus twice double doubled doubles triple tripled ish bn mil "
    "inf infinity pi ab abc ac bc dx dy mn pq xy xyz xz yz"
)
DENIALS = word_set(
    "not no never none neither nor cannot isnt arent wasnt cant wont dont doesnt aint nope nicht "
    "kein pas wrong incorrect false untrue invalid impossible rejected or either"
)
OTHERS = (
    "except unless without if but instead unlike different between than least most up over under "
    "maybe perhaps possibly otherwise hardly doubt differs menos moins mindestens "
    "above below beyond past less exceeds min max minimum maximum almost nearly nowhere far times "
    "divided multiplied square cube power round opposite multiple as"
)
# None of these beside a number, even in a reference. (It is no adversary, and may say `5 times as
# many`; but `2 thirds` is not 2.)
ANOTHER_NUMBER = (
    DENIALS
    | word_set(PARTS)
    | {numeral + end for numeral in NUMERALS.split() for end in ("", "s", "th", "ths")}
)
CHANGES = ANOTHER_NUMBER | word_set(OTHERS)
# Chinese has no spaces, so these are looked for as parts of the text, once HARMLESS is out of it.
HARMLESS = re.compile(
    "一共|一起|一样|一定|一般|一直|一些|一下|统一|唯一|第[一二三四五六七八九十]+|三角形|"
    "[四五六八]边形|星期[一二三四五六]|周[一二三四五六]|不同|无论|至今|非常|未来|以后|增加|减少|参加|"
    "添加|剩余|其余|余下|多余|百分|千[米克瓦卡]|[总人个次页件只天岁]数|数[字学量]|分别|特别|区别"
)
CHANGES_HAN = re.compile(
    "[不没未非无否错勿别假吗数负逾翻或除减加乘零〇二两三四五六七八九十百千万亿兆半几余]|至少|至多|最多|最少|大于|"
    "小于|多于|少于|高于|低于|超过|多达|近|有误|可能|因数|约数|倍数|之[和差积商]|双倍|各位|出头|"
    "上[百千万]|一;|[比上]$|但|以上|以下|以内|以外|左右|上下|平方|立方|次方|方根|根号|对数|倒数|"
    "相反|还是|要么|介于|之间|分之"
)
MORE_HAN = re.compile(" ?[多来一成打折许]|.*多$")  # 72多个: more than 72


def keep_its_meaning(
    before: str,
    after: str = "",
    changes: frozenset[str] = CHANGES,
    own: frozenset[str] = frozenset(),
) -> bool:
    """Whether a number between these words is what it would be without them.

    Args:
        own: words that the reference itself states: they may stand in an answer too.
    """
    for words, letters in ((before, "s"), (after, UNIT_LETTERS)):  # Bob's
        for word in WORDS.findall(words):
            if word.lower() not in own and (
                word.lower() in changes or (len(word) == 1 and word not in letters)
            ):
                return False
        if changes_han(words):
            return False
    return not MORE_HAN.match(after)


def changes_han(words: str) -> bool:
    """The same of Chinese words."""
    return CHANGES_HAN.search(HARMLESS.sub("", words)) is not None
