"""Units behind a number: two answers with different ones are different, a missing one is forgiven.

60 minutes are 1 hour, and 5 miles are not 5 km. A word that is not in the table (apples) is no
unit, but it is not one of money or length either. `pounds`, `分` and `度` mean several things.
"""

import re
from dataclasses import dataclass, field
from fractions import Fraction

from support.words import HAN, word_set

# By what is measured: each unit with its names, and how many of the first one it is.
TABLE: dict[str, dict[str, str]] = {
    "length": {
        "m meter meters metre metres 米": "1", "dm decimeter 分米": "1/10",
        "cm centimeter centimeters centimetre centimetres 厘米": "1/100",
        "mm millimeter millimeters 毫米": "1/1000",
        "km kms kilometer kilometers kilometre kilometres 千米 公里": "1000",
        "inch inches 英寸": "254/10000", "ft foot feet 英尺": "3048/10000",
        "yd yard yards": "9144/10000", "mile miles mi 英里": "1609344/1000",
    },
    "mass": {
        "g gram grams 克": "1", "kg kgs kilogram kilograms kilo kilos 千克 公斤": "1000",
        "mg milligram milligrams 毫克": "1/1000", "斤": "500", "t tonne tonnes 吨": "1000000",
        "oz ounce ounces": "28349523125/1000000000", "lb lbs": "45359237/100000",
    },
    "time": {
        "s sec secs seconds 秒": "1", "minute minutes mins 分钟": "60",
        "h hr hrs hour hours 小时 个小时": "3600", "day days 天": "86400",
        "week weeks 周 星期 个星期": "604800",
    },
    "months": {"month months 个月": "1", "year years yr yrs 年": "12"},
    "dollars": {"$ dollar dollars usd 美元": "1", "¢ cent cents 美分": "1/100"},
    "euros": {"€ euro euros eur 欧元": "1"},
    "sterling": {"£ gbp 英镑": "1"},
    "yuan": {"元 圆 块 ¥ yuan rmb 人民币": "1", "角 毛": "1/10"},
    "rupees": {"₹ rupee rupees": "1"},
    "volume": {
        "l liter liters litre litres 升": "1", "ml milliliter milliliters 毫升": "1/1000",
        "gallon gallons": "3785411784/1000000000", "quart quarts": "3785411784/4000000000",
        "pint pints": "3785411784/8000000000", "cup cups": "3785411784/16000000000",
    },
    "percent": {"% percent": "1"},
    "celsius": {"°c celsius 摄氏度": "1"},
    "fahrenheit": {"°f fahrenheit 华氏度": "1"},
}  # fmt: skip
UNITS = {
    name: (measures, Fraction(size))
    for measures, rows in TABLE.items()
    for names, size in rows.items()
    for name in names.split()
}
AMBIGUOUS = "pound pounds 分 度 点 °"
# Words that may follow a number and say nothing of what it is a number of.
NO_NOUN = word_set(
    f"{AMBIGUOUS} in total left each per a an every of more altogether for is are was were and so "
    "on to by from at now still remaining only too as well all that"
)
SPEEDS = {"mph": "miles/hour", "kmh": "km/hour", "kph": "km/hour", "mpg": "miles/gallon"}
UNIT = re.compile(
    rf"[ (-]*(?:us )?(?P<name>[$€£¥₹¢%]|°[cf]?|[a-z]+(?:\.[a-z]\.)?|[{HAN}]+)\.?"
    rf"(?: ?\^? ?(?P<power>[23²³])(?!\d))?(?P<rest>.*)",
    re.DOTALL,
)
PER = re.compile(rf" ?(?:/ ?|per |an? |every |each )(?P<name>[a-z]+|[{HAN}]+)")
# Months and days, short and long; `may` and `march` are other words, unless in capitals.
NAME = re.compile(
    r"\b(?:(?i:jan(?:uary)?|feb(?:ruary)?|apr(?:il)?|june?|july?|aug(?:ust)?|sept?(?:ember)?|"
    r"oct(?:ober)?|nov(?:ember)?|dec(?:ember)?|(?:mon|tues|wednes|thurs|fri|satur|sun)day)|"
    r"Mar(?:ch)?|MAR(?:CH)?|May|MAY)\b|上午|下午|早上|晚上|凌晨|中午|午夜|傍晚"
)
CLOCK = re.compile(r"[ \d]([ap])\.?m\b\.?", re.IGNORECASE)


@dataclass(frozen=True)
class Unit:
    """What a number is a number of, as far as that is said."""

    over: tuple[str, int, Fraction] | None = None  # what is measured, its power, and the size
    under: tuple[str, int, Fraction] | None = None  # miles per hour
    names: frozenset[str] = field(default_factory=frozenset)  # May, Monday, pm
    noun: bool = False  # a word follows that is no unit: 5 apples


def read_unit(before: str, after: str) -> Unit:
    """The unit of a number, from the words before and behind it."""
    names = {name.lower()[:3] for name in NAME.findall(f"{before} {after}")}
    clock = CLOCK.match(after if after.startswith(" ") else " " + after)
    if clock:
        return Unit(names=frozenset(names | {clock[1].lower()}))
    bare = PER.match(after.lower())
    found = UNIT.match(after.lower())
    if bare or not found:
        return Unit(None, size_of(bare["name"], None) if bare else None, frozenset(names))
    name, rest = SPEEDS.get(found["name"], found["name"]), found["rest"]
    if "/" in name:
        name, _, rest = name.partition("/")
        rest = "/" + rest
    per = PER.match(rest)
    over, under = size_of(name, found["power"]), size_of(per["name"], None) if per else None
    return Unit(over, under, frozenset(names), over is None and name not in NO_NOUN)


def size_of(name: str, power: str | None) -> tuple[str, int, Fraction] | None:
    """The row of a unit; of Chinese, which has no spaces, the longest that `name` begins with."""
    if name not in UNITS:
        starts = [unit for unit in UNITS if re.match(f"[{HAN}]", unit) and name.startswith(unit)]
        name = max(starts, key=len, default="")
    if name not in UNITS:
        return None
    measures, size = UNITS[name]
    exponent = {"2": 2, "²": 2, "3": 3, "³": 3}.get(power or "", 1)
    return measures, exponent, size**exponent


def factor(answer: Unit, reference: Unit) -> Fraction | None:
    """What a number in the unit of the answer is multiplied by, to be one in the reference's.

    1 where a unit is missing; None where the two cannot be the same.
    """
    if answer.names and reference.names and answer.names != reference.names:
        return None
    ratio = Fraction(1)
    for mine, its, sign in ((answer.over, reference.over, 1), (answer.under, reference.under, -1)):
        if sign == 1 and ((its and not mine and answer.noun) or (mine and reference.noun)):
            return None
        if mine and its:
            if mine[:2] != its[:2]:
                return None
            ratio *= (mine[2] / its[2]) ** sign
    return ratio
