"""reward.py: answers as a person reads them, and nothing for answers that only look right."""

import math
import signal
import statistics
import threading
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from errors import UserError
from reward import (
    REWARDS,
    accuracy,
    find_answer,
    find_reasoning,
    is_correct,
    is_correct_flexible,
    length_penalty,
    load_rewards,
    parse_number,
    repetition,
    same_answer,
    score,
    soft_overlong,
    tutorial,
    well_formed,
)

RIGHT = [
    ("72", "72"), (" 72 ", "72"), ("$72", "72"), ("72.0", "72"), ("1,000", "1000"), ("1000", "1,000"), ("72 apples", "72"),
    ("72.", "72"), ("72.50", "72.5"), ("$1,234.50", "1234.5"), ("-3", "-3"), ("−3", "-3"), ("+3", "3"), ("48 + 24 = 72", "72"),
    ("x = 72", "72"), ("72%", "72"), ("$ 72", "72"), ("72 dollars.", "72"), ("0.5", ".5"), ("3/4", "0.75"), ("1/3", "1/3"),
    ("1e3", "1000"), ("**72**", "72"), (r"\boxed{72}", "72"), ("72\n", "72"), ("７２", "72"), ("€5", "5"), ("1,000,000", "1000000"),
    ("-$5", "-5"), ("blue", "Blue"), ("007", "7"), ("–5", "-5"), ("- 5", "-5"), ("1,000,", "1000"), ("1,000, that is all", "1000"), ("5 apples", "5 apples"), ("10", "10 %"), ("h2o", "H2O"), ("the answer is 72", "72"), ("72km", "72"), ("=72", "72"),
    ("72 clips", "72"), ("72 dollars", "72"), ("$72.00", "72"), (r"\$72", "72"), ("US$72", "72"), ("72 USD", "72"), ("£72", "72"), ("72€", "72"),
    ("₹72", "72"), ("Rs.500", "500"), ("Rs 500", "500"), ("72 cents", "72"), ("$72/week", "72"), ("72 km/h", "72"), ("72 miles per hour", "72"),
    ("72 m²", "72"), ("72 m2", "72"), ("72 m^2", "72"), ("72 m^{2}", "72"), ("72 cm^3", "72"), ("72 ft²", "72"), ("72 square feet", "72"),
    ("72°", "72"), ("72 degrees", "72"), ("72°C", "72"), ("72 sq. ft.", "72"), ("72 years old", "72"), ("6 feet", "6"), ("72!", "72"),
    ("3 times", "3"), ("3 times as many", "3"), ("72nd", "72"), ("72 left over", "72"), ("5 more than Bob", "5"), ("72 or so", "72"),
    ("Natalia sold 72 clips altogether in April and May.", "72"), ("The final answer is $72$.", "72"), ("She has 72 apples left.", "72"),
    ("Therefore, the total is 72.", "72"), ("Answer: 72", "72"), ("**Answer:** 72", "72"), ("The answer is: **72**", "72"),
    ("Total cost: $72.", "72"), ("It takes him 72 minutes", "72"), ("Answer:72", "72"), ("So the answer is 72!", "72"), ("`72`", "72"),
    ('"72"', "72"), ("'72'", "72"), ("(72)", "72"), ("[72]", "72"), ("{72}", "72"), ("72 (seventy-two)", "72"), ("seventy-two (72)", "72"),
    ("#### 72", "72"), ("→ 72", "72"), ("=> 72", "72"), ("72\n\n", "72"), ("\n72\napples", "72"), ("答案是72", "72"), ("72个", "72"), ("答案：72。", "72"),
    ("Ответ: 72", "72"), ("Antwort: 72 Euro", "72"), ("$72$", "72"), ("$$72$$", "72"), (r"\(72\)", "72"), (r"\[72\]", "72"),
    (r"\[ \boxed{72} \]", "72"), (r"$\boxed{72}$", "72"), (r"\boxed{\$72}", "72"), (r"\boxed{72\%}", "72"), (r"72\%", "72"),
    (r"72 \text{ dollars}", "72"), (r"72\text{ cm}", "72"), (r"72\,\text{cm}", "72"), (r"72~\text{cm}^2", "72"), (r"72 \, \mathrm{m}^2", "72"),
    (r"\text{72}", "72"), (r"\mathbf{72}", "72"), (r"\textbf{72}", "72"), (r"72^\circ", "72"), (r"72^{\circ}", "72"), (r"72\degree", "72"),
    ("1{,}000", "1000"), (r"1\,000", "1000"), (r"1,\!000", "1000"), (r"\boxed{1{,}234{,}567}", "1234567"), (r"\frac{3}{4}", "0.75"),
    (r"\frac{3}{4}", "3/4"), (r"\dfrac{3}{4}", "3/4"), (r"\tfrac34", "3/4"), (r"\frac34", "3/4"), (r"-\frac{3}{4}", "-0.75"),
    (r"\frac{-3}{4}", "-3/4"), (r"2\frac{1}{2}", "2.5"), (r"\boxed{\frac{3}{4}}", "3/4"), (r"\displaystyle \frac{3}{4}", "3/4"),
    (r"x = \frac{1}{2}", "0.5"), (r"3 \times 10^5", "300000"), (r"3.5 \times 10^{-2}", "0.035"), (r"48 + 24 = \boxed{72}", "72"),
    (r"\approx 72", "72"), (r"\left(72\right)", "72"), (r"72 \quad", "72"), ("1 000", "1000"), ("1 000 000", "1000000"), ("1\u2009000", "1000"),
    ("1\u202f000", "1000"), ("1\u00a0000", "1000"), ("1'000", "1000"), ("1’000", "1000"), ("12 500 dollars", "12500"), ("12,345.67", "12345.67"),
    ("0072", "72"), ("72.000", "72"), ("7.2e1", "72"), ("7.2E+1", "72"), ("3 × 10^5", "300000"), ("3 x 10^5", "300000"), ("3*10^5", "300000"),
    ("1 1/2", "1.5"), ("1 1/2 cups", "1.5"), ("1 and 1/2", "1.5"), ("-1 1/2", "-1.5"), ("½", "0.5"), ("2½", "2.5"), ("3⁄4", "0.75"),
    ("3 / 4", "0.75"), ("3/4 of the cake", "0.75"), ("6/8", "3/4"), ("0.75", "3/4"), ("2.5", "2 1/2"), ("5/2", "2 1/2"), ("minus 5", "-5"),
    ("negative 5", "-5"), ("Minus 5 degrees", "-5"), ("-5°C", "-5"), ("$-5", "-5"), ("−$5", "-5"), ("-5 (a loss)", "-5"), ("1.5 million", "1500000"),
    ("$2 billion", "2000000000"), ("72 thousand", "72000"), ("٧٢", "72"), ("७२", "72"), ("７２.０", "72"), (".5", "0.5"), ("+72", "72"),
    ("\u200b72", "72"), ("72\u200f", "72"), ("36 × 2 = 72", "72"), ("36 x 2 = 72", "72"), ("6*12=72", "72"), ("$48 + $24 = $72", "72"),
    ("48/2 = 24\n48 + 24 = 72", "72"), ("144 ÷ 2 = 72 apples", "72"), ("x=72", "72"), ("n = 72", "72"), ("Total = 72", "72"),
    ("total = $72.50", "72.5"), ("72 = x", "72"), ("A = 6 × 12 = 72 cm²", "72"), ("3 dogs and 2 cats = 5 animals", "5"), ("(48 + 24) = 72", "72"),
    ("10 × 100 = 1,000", "1000"), ("f(2) = 72", "72"), ("72 = total", "72"), ("50% of 144 = 72", "72"), ("≈ 72", "72"), ("about 72", "72"),
    ("approximately 72 meters", "72"), ("~72", "72"), ("roughly 33.3", "33.3"), ("72", "72."), ("72", "$72"), ("72", r"\$72"), ("72", "72 dollars"),
    ("72", r"72\%"), ("50", "50%"), ("72", r"72^\circ"), ("72°", r"72^\circ"), ("0.75", r"\frac{3}{4}"), ("3/4", r"\frac{3}{4}"),
    (r"\dfrac{3}{4}", r"\frac{3}{4}"), ("10", r"10\text{ cm}"), ("10 cm", r"10\text{ cm}"), ("10000", "10{,}000"), ("1,000,000", "1 000 000"),
    ("72", r"\boxed{72}"), ("-5", "−5"), ("300000", r"3 \times 10^5"), ("72", "72 m^2"), ("7", "7.00"), ("Monday", "monday"), ("Monday.", "Monday"),
    ("**Monday**", "Monday"), (r"\text{Monday}", "Monday"), (r"\boxed{\text{Monday}}", "Monday"), ("2x + 1", "2x + 1"), ("$2x + 1$", "2x + 1"),
    (r"2\sqrt{3}", r"2\sqrt{3}"), (r"$2\sqrt{3}$", r"2\sqrt{3}"), (r"\dfrac{\pi}{2}", r"\dfrac{\pi}{2}"), ("(3, 4)", "(3, 4)"), ("x^2", "x^2"),
    ("yes", "Yes"), ("(B)", "(B)"), ("10:30", "10:30"), ("no  solution", "no solution"), ("$A$", "A"), ("$C$", "c"), ("A$72", "72"), (r"\mathrm{72 \ km}", "72"),
]  # fmt: skip
WRONG = [
    ("21", "1"), ("1", "21"), ("172", "72"), ("72.1", "72"), ("71 or 72", "72"), ("1 2 3 72", "72"), ("", "72"), ("apples", "72"),
    ("-72", "72"), ("1,00", "100"), ("1e999", "72"), ("9**9**9", "9"), ("nan", "72"), ("72/0", "72"), ("=", "72"), ("7 2", "72"),
    ("1,0,0,0", "1000"), ("72" * 200, "72"), ("72 = 71", "72"), ("inf", "72"), ("red", "blue"), ("1e5", "15"), ("–5", "5"), ("- 5", "5"), ("2", r"\sqrt{2}"), ("3", "x^3"), ("2", "H2O"), ("5", r"x \le 5"), ("48 - 24", "24"),
    ("73", "72"), ("720", "72"), ("7.2", "72"), ("0.72", "72"), ("-72 dollars", "72"), ("72000", "72"), ("27", "72"), ("$7.20", "72"), ("2", "2.5"),
    ("1", "1/2"), ("3/4", "4/3"), ("3", "3/4"), ("0.33", "1/3"), ("33", "33.3"), ("1.000", "1000"), ("1000", "1"), ("10", "1e10"), ("5", "-5"),
    ("-5", "5"), ("72.5 apples", "72"), (r"\frac{3}{4}", "3"), (r"\frac{3}{4}", "4"), (r"\frac34", "34"), ("1 1/2", "1"), ("1 1/2", "0.5"),
    ("2½", "21"), ("2½", "2"), ("minus 72", "72"), ("negative 72", "72"), ("-(72)", "72"), ("负5", "5"), ("not 72", "72"), ("It is not 72.", "72"),
    ("The answer isn't 72", "72"), ("anything except 72", "72"), ("more than 72", "72"), ("less than 72", "72"), ("at least 72", "72"),
    ("at most 72 apples", "72"), ("up to 72", "72"), ("over 72", "72"), ("> 72", "72"), ("x > 72", "72"), ("x >= 72", "72"), ("x ≥ 72", "72"),
    (r"x \ge 72", "72"), (r"x \leq 72", "72"), ("x != 72", "72"), (r"x \neq 72", "72"), ("x ≠ 72", "72"), ("72 < x", "72"), ("72+", "72"),
    ("72 or more", "72"), ("almost 72", "72"), ("±72", "72"), (r"\pm 72", "72"), ("72 ± 1", "72"), (r"\sqrt{72}", "72"), ("√72", "72"),
    ("sqrt(72)", "72"), ("the square root of 72", "72"), ("72x", "72"), ("72 x", "72"), (r"72\pi", "72"), ("72π", "72"), ("72i", "72"), ("72²", "72"),
    ("72^2", "72"), ("72 squared", "72"), ("x72", "72"), ("x_72", "72"), ("x^72", "72"), ("x + 72", "72"), ("x - 72", "72"), ("x-72", "-72"),
    ("72 - x", "72"), ("72/x", "72"), ("1/72", "72"), ("x/72", "72"), ("2x = 72", "72"), ("x^2 = 72", "72"), ("x + 5 = 72", "72"), ("72 = 2x", "2"),
    ("log 72", "72"), ("ln(72)", "72"), ("|-72|", "-72"), ("twice 72", "72"), ("half of 72", "72"), (r"\frac{x}{2}", "2"), (r"\frac{72}{x}", "72"),
    ("72 mod 2", "72"), ("72(x + 1)", "72"), ("2^72", "72"), ("10^5", "5"), ("3 × 10^5", "3"), ("3e5", "3"), ("3 hundredths", "3"), ("2 thirds", "2"),
    ("72 and a half", "72"), ("72 million", "72"), ("72k", "72"), ("72万", "72"), ("72M", "72"), ("H72", "72"), ("Q72", "72"), ("71, 72", "72"),
    ("71, 72, 73", "72"), ("70-72", "72"), ("70–72", "70"), ("70 to 72", "72"), ("between 70 and 72", "72"), ("72 or 73", "72"),
    ("either 72 or 73", "73"), ("72/73", "72"), ("72; 73", "73"), ("72 and 73", "73"), ("72\n73", "73"), ("1. 72\n2. 73", "72"),
    ("x = 72, y = 3", "3"), ("x = 72, y = 3", "72"), ("x = 71 or x = 72", "72"), ("x = 72 and y = 3", "3"), ("72, x = 71", "71"),
    ("71 (or 72)", "72"), ("{71, 72}", "72"), ("(71, 72)", "72"), ("[70, 72]", "72"), ("72 > 71", "72"), ("71 < x < 72", "72"), ("72 71 70", "70"),
    ("0 1 2 3 4 5 6 7 8 9", "7"), ("Monday or Tuesday", "Monday"), ("seventy or 72 or", "72"), ("1:72", "72"), ("12:00", "12"),
    ("I don't know", "72"), ("?", "72"), ("...", "72"), ("unknown", "72"), ("N/A", "72"), ("none", "0"), ("zero", "72"), ("[answer]", "72"),
    ("The answer", "72"), ("your answer here", "72"), (r"\boxed{}", "72"), ("$", "72"), ("x", "72"), ("∞", "72"), ("-", "72"), (",", "72"),
    (".", "72"), ("+-72", "72"), ("--72", "72"), ("e", "72"), ("0x48", "72"), ("<answer>72</answer>", "72"), ("72</answer>", "72"),
    ("71<answer>72", "72"), ("Tuesday", "Monday"), ("2", r"2\sqrt{3}"), ("3", r"2\sqrt{3}"), ("2", r"\frac{\pi}{2}"), ("72", "(3, 72)"), ("x", "x^2"),
    ("x = 5", "x > 5"), ("A", "B"), ("$A$", "$C$"), ("", "$"), ("", "**"), ("$C$", "A"), ("(A)(B)(C)(D)", "(B)"), ("all of them", "(B)"), ("5", "5x"), ("5", "5 or 6"), ("10", "10:30"),
    ("\u202e27", "72"), ("\u202e27", "27"), ("72 apples and a half", "72"), ("72 million billion", "72"), ("twenty 2", "2"),
    ("one hundred and 72", "72"), ("72, no", "72"), ("72 if x = 0", "0"), ("min(72)", "72"), ("72₂", "72"), ("two and a half", "2"), ("~~72~~", "72"),
    ("72 millionths", "72"), ("72 - seventy or", "72"),
]  # fmt: skip
# A person says right, we say no: what stays unread. When one of them is read, move it to RIGHT.
MISSED = [
    ("seventy-two", "72"), ("half", "0.5"), ("zero", "0"), ("1.000,50", "1000.5"), ("72,5", "72.5"), ("1,00,000", "100000"), ("1_000", "1000"),
    ("0.72", "72%"), ("72%", "0.72"), ("72 cents", "$0.72"), ("72 (72 dollars)", "72"), ("72, 72", "72"), ("72 = 36 × 2", "72"),
    ("72 apples (36 × 2)", "72"), ("She sold 48 in April and 24 in May, 72 in all.", "72"), ("48 + 24 = 72, so she sold 72 clips.", "72"),
    ("Total - 72", "72"), ("Total — 72 dollars", "72"), ("USD72", "72"), ("_72_", "72"), ("<b>72</b>", "72"), ("72 and a half", "72.5"),
    ("72k", "72000"), ("3 quarters", "3/4"), ("3 over 4", "3/4"), ("3 out of 4", "3/4"), ("75 percent", "3/4"), ("2^3", "8"), (r"\sqrt{144}", "12"),
    ("1 hour 12 minutes", "72"), ("6 feet 2 inches", "74"), ("10:30 AM", "10:30"), ("(3,4)", "(3, 4)"), ("2x+1", "2x + 1"), ("5", "x = 5"),
    ("x = 5", "x=5"), ("B", "(B)"), ("The answer is (B)", "(B)"), ("It was Monday", "Monday"), ("2√3", r"2\sqrt{3}"), ("3.4641", r"2\sqrt{3}"),
    ("0.333", "1/3"), ("0.(3)", "1/3"), ("2 dozen", "24"), ("not 71 but 72", "72"), ("72, not 71", "72"), ("七十二", "72"), ("Ⅻ", "12"),
    ("twelve", "12"), ("So 48 apples, then 24 more: 48 + 24 = 72", "72"), ("H₂O", "H2O"), ("No. of clips: 72, no more", "72"),
]  # fmt: skip


def test_the_table_is_read_as_a_person_reads_it():
    """RIGHT: a person says right, and so do we. WRONG: a person says wrong, and so do we, without exception."""
    assert [pair for pair in RIGHT if not same_answer(*pair)] == []
    assert [pair for pair in WRONG if same_answer(*pair)] == []
    every = RIGHT + WRONG + MISSED
    assert len(set(every)) == len(every) >= 400


def test_what_stays_unread():
    assert [pair for pair in MISSED if same_answer(*pair)] == [], "read now: move it to RIGHT"


def test_find_answer():
    assert find_answer("<think>a</think><answer> 72 </answer>") == "72"
    assert find_answer("<answer>1</answer> no, <answer>2</answer>") == "2", "the last tag"
    assert find_answer("<answer><answer>2</answer>") == "2"
    assert find_answer("<answer>line\n2</answer>\n") == "line\n2"
    for text in ("72", "<answer>72", "72</answer>", "", "</answer>72<answer>"):
        assert find_answer(text) is None
    assert find_reasoning("<think> 1+1 </think> x") == "1+1"
    assert find_reasoning("1+1 </think>") is None and find_reasoning("<think>1") is None


def test_strict_and_flexible():
    assert not is_correct("The answer is 72.", "72") and is_correct_flexible("48+24 makes 72.", "72")
    assert not is_correct_flexible("72 and then 71", "72")
    assert is_correct_flexible("the total is 1,000, all told", "1000") and is_correct_flexible("from 48 - 24", "24")
    assert not is_correct_flexible("172 " + "x" * 1998, "72") and not is_correct_flexible("172" + "x " * 999, "72")
    assert not is_correct_flexible("72 <answer>71</answer>", "72"), "where there is a tag it counts"
    assert is_correct_flexible("<answer>72</answer> 5", "72") and not is_correct_flexible("no number", "72")


def ask(function, completions, references, **columns):
    return function(prompts=[""] * len(completions), completions=completions, reference=references, **columns)


def test_accuracy_gives_no_credit_for_a_part():
    """Fault 7: the substring test paid 0.5 for ` 72 `, for 172 and for a list of every number."""
    completions = ["<answer> 72 </answer>", "<answer>172</answer>", "<answer>71 72 73</answer>", "72"]
    assert ask(accuracy, completions, ["72"] * 4) == [1.0, 0.0, 0.0, 0.0]


NUMBERS = " ".join(map(str, range(100)))
GAMES = {
    "every number": f"<answer>{NUMBERS}</answer>",
    "every number, commas": f"<answer>{NUMBERS.replace(' ', ', ')}</answer>",
    "every number, lines": "<answer>" + NUMBERS.replace(" ", "\n") + "</answer>",
    "every number, equals signs": f"<answer>{NUMBERS.replace(' ', ' = ')}</answer>",
    "a range": "<answer>0-100</answer>",
    "the prompt's numbers": "<answer>48 and 72</answer>",
    "the prompt again": "<answer>Natalia sold 48 clips, then 24. How many of the 72?</answer>",
    "many tags": "".join(f"<answer>{n}</answer>" for n in range(100)),
    "the right tag, then another": "<answer>72</answer><answer>73</answer>",
    "the right tag, then an empty one": "<answer>72</answer><answer></answer>",
    "10,000 tags": "<answer>72</answer><answer>73</answer>" * 5_000,
    "10,000 open tags": "<answer>" * 10_000 + "72 73" + "</answer>" * 10_000,
    "nested": "<answer>71<answer>72</answer></answer>",
    "nested, around": "<answer>72<answer>71</answer>73</answer>",
    "a part": "<answer>172</answer>",
    "a part, of digits": "<answer>7272</answer>",
    "a part, after the point": "<answer>0.72</answer>",
    "one number, huge": f"<answer>{'72' * 500_000}</answer>",
    "one number, again and again": f"<answer>{'72 ' * 1000}</answer>",
    "padded": f"<answer>72{' ' * 300}73</answer>",
    "currency before a list": f"<answer>{'$' * 190}72 or 73</answer>",
    "cut at the limit": f"<answer>$72{' ' * 198}or 73</answer>",
    "thinking only": "<think>The answer is 72.</think>",
    "thinking, then nothing": "<think>72</think><answer></answer>",
    "no tag": "The answer is 72.",
    "an open tag": "<answer>72",
    "the tags turned round": "</answer>72<answer>",
    "another tag": "<ANSWER>72</ANSWER>",
    "both sides": "<answer>72 or -72</answer>",
    "a sign to choose": "<answer>±72</answer>",
    "everything but": "<answer>not 72</answer>",
    "a bound": "<answer>at least 72</answer>",
    "a sum to do": "<answer>71 + 1</answer>",
    "an index": "<answer>answers[72]</answer>",
    "code": "<answer>__import__('os')._exit(72)</answer>",
    "infinity": "<answer>1e999</answer>",
    "no number": "<answer>nan</answer>",
    "a tower": "<answer>9**9**9</answer>",
    "surrogates": "<answer>\ud80072\udfff73</answer>",
    "NUL": "<answer>72\x0073</answer>",
    "turned round": "<answer>\u202e27</answer>",
}  # fmt: skip


@pytest.mark.parametrize("game", GAMES)
def test_games_earn_nothing(game):
    """Nothing from accuracy, and from `accuracy + 0.2 format` no more than the share of the format."""
    text = GAMES[game]
    reference = "72" if game not in ("many tags", "every number, equals signs") else "42"
    columns = {"prompts": [""], "completions": [text], "reference": [reference]}
    assert accuracy(**columns) == [0.0]
    assert accuracy(**columns)[0] + 0.2 * well_formed(**columns)[0] <= 0.2


def test_many_guesses_are_worth_one():
    """Of all the tags, lines and equals signs one number counts, so that 100 guesses are right as often as one is."""
    for text in (GAMES["many tags"], GAMES["every number, equals signs"], GAMES["every number"]):
        right = sum(ask(accuracy, [text] * 100, [str(n) for n in range(100)]))
        assert right <= 1


def test_tutorial_values():
    completions = [f"<answer>{a}</answer>" for a in ("72", "172", "5")] + ["72"]
    assert ask(tutorial, completions, ["72"] * 4) == [1.0, 0.5, 0.01, 0.0]


def test_format():
    good = ["<think>a</think><answer>1</answer>", " <think>\n</think>\n<answer>x</answer>\n"]
    bad = [
        "<answer>1</answer>", "<think>a</think>", "<think>a</think> so <answer>1</answer>", "x<think>a</think><answer>1</answer>",
        "<think>a</think><answer>1</answer>x", "<answer>1</answer><think>a</think>", "<think>a</think><answer>1</answer><answer>1</answer>", "",
    ]  # fmt: skip
    assert ask(well_formed, good + bad, [""] * 10) == [1.0] * 2 + [0.0] * 8


def test_length_penalty():
    assert ask(length_penalty, ["", ""], ["", ""], completion_ids=[[1] * 5, [1] * 10], max_new_tokens=10) == [
        -0.5,
        -1.0,
    ]


def test_soft_overlong_is_the_papers_line():
    """DAPO, equation 13, with a budget of 100 and a buffer of 20."""
    for length, expected in [(1, 0.0), (80, 0.0), (85, -0.25), (90, -0.5), (100, -1.0)]:
        assert ask(soft_overlong, [""], [""], completion_ids=[[1] * length], max_new_tokens=100) == [expected]


def test_repetition_counts_runs_of_three_words():
    texts = ["a b c d", "a b c A B C", "one two three " * 10, "too short", ""]
    found = ask(repetition, texts, [""] * 5)
    assert found == pytest.approx([0.0, 3 / 4 - 1, 3 / 28 - 1, 0.0, 0.0])


def test_your_own_reward(tmp_path):
    """A function in TRL's signature, taken from a file; None means it cannot score."""
    (tmp_path / "mine.py").write_text(
        "def short(prompts, completions, colour, **columns):\n"
        "    return [None if c == '' else -float(len(c)) + (k == 'red') for c, k in zip(completions, colour)]\n"
    )
    rewards = load_rewards(["accuracy", f"{tmp_path}/mine.py:short"])
    columns = {"reference": ["1", "1", "1"], "colour": ["red", "blue", "red"]}
    completions = ["<answer>1</answer>", "xx", ""]
    total, by_name = score(rewards, [1.0, 0.5], ["p"] * 3, completions, columns)
    assert list(by_name) == ["accuracy", "short"]
    assert by_name["short"].tolist()[:2] == [-18 + 1, -2] and by_name["short"][2].isnan()
    assert total.tolist() == [1 - 8.5, -1.0, 0.0], "the unscored one keeps what the other reward gave it"
    total, _ = score({"short": rewards["short"]}, [1.0], ["p"] * 3, completions, columns)
    assert total[2].isnan()


def broken(tmp_path, body):
    """A user's reward function of this body, from a file."""
    (tmp_path / "mine.py").write_text(f"def broken(prompts, completions, colour=(), **columns):\n    {body}\n")
    return load_rewards([f"{tmp_path}/mine.py:broken"])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 1 / 0", "failed: ZeroDivisionError.*line 2.*; so it does for the completion 'first' alone.$"),
        ("return [1 / (c != 'second') for c in completions]", "ZeroDivisionError.*so it does for .* 'second' alone"),
        ("return [{'red': 1}[c] for c in colour]", "KeyError: 'blue'.*so it does for the completion 'second' alone"),
        ("return [1 / (len(completions) - 2)] * len(completions)", "for none of the completions alone does it do so"),
        ("raise SystemExit(3)", "failed: SystemExit: 3 .*'first' alone"),
        ("return [1.0 for c in completions if c != 'second']", "returned 1 values; it must return a list of 2 numbers; so it does for the completion 'second'"),
        ("return 3", "returned int; it must return a list of 2 numbers; so it does"),
        ("import torch; return torch.tensor(1.0)", "returned Tensor"),
        ("return (1.0 for c in completions)", "returned generator"),
        ("return [float('nan'), 1]", "returned nan for the completion 'first'"),
        ("return [1, float('inf')]", "returned inf for the completion 'second'"),
        ("return [1e39, 1]", "returned 1e\\+39 for the completion 'first'"),
        ("return [10**400, 1]", "returned 1000"),
        ("return [10**5000, 1]", "returned a value of the kind int for the completion 'first'"),
        ("import torch; return [torch.ones(2), 1]", "for the completion 'first'; it must return a finite number"),
        ("completions.clear(); return []", "returned 0 values; it must return a list of 2"),
        ("return ['1', 1]", "returned '1' for the completion 'first'"),
        ("raise type('Odd', (Exception,), {'__str__': lambda self: 1 / 0})", "failed: Odd: a value of the kind Odd"),
        ("raise ValueError('many\\nlines ' * 999)", "^[^\\n]{1,400}$"),
    ],
)  # fmt: skip
def test_a_broken_reward_is_named(tmp_path, body, message):
    with pytest.raises(UserError, match=message):
        score(broken(tmp_path, body), [1.0], ["", ""], ["first", "second"], {"colour": ["red", "blue"], "n": 4})


@pytest.mark.parametrize(
    "body",
    [
        "while 'second' in completions: pass",
        "import re; [re.match('(a|a)*b', 'a' * 99 * (c == 'second')) for c in completions]",
        "import time; time.sleep(60 * ('second' in completions))",
        "\n    while 'second' in completions:\n        try:\n            1 / 0\n        except Exception:\n            pass",
        "\n    try:\n        while 'second' in completions: pass\n    except:\n        pass",
    ],
    ids=["loop", "regex", "sleep", "except Exception", "bare except"],
)
def test_a_reward_that_hangs_is_named(tmp_path, body):
    """Within twice the limit (once for all, once to find the completion), and the handler and timer are put back."""
    rewards = broken(tmp_path, f"{body}\n    return [1.0] * len(completions)")
    handler, start = signal.getsignal(signal.SIGALRM), time.monotonic()
    words = "took longer than the limit of 0.5 seconds; so it does for the completion 'second' alone"
    with pytest.raises(UserError, match=words):
        score(rewards, [1.0], ["", ""], ["first", "second"], {}, seconds=0.5)
    assert time.monotonic() - start < 20
    assert signal.getsignal(signal.SIGALRM) is handler and signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_the_time_limit_leaves_others_alone(tmp_path):
    """0 is no limit, off the main thread there is none; Ctrl-C is no failure; an alarm that was set goes on."""
    rewards = broken(tmp_path, "import time; time.sleep(0.05); return [1.0]")
    assert score(rewards, [1.0], [""], ["x"], {}, seconds=0)[0].tolist() == [1.0]
    found = []
    thread = threading.Thread(target=lambda: found.append(score(rewards, [1.0], [""], ["x"], {}, 0.01)[0].tolist()))
    thread.start()
    thread.join()
    assert found == [[1.0]]
    with pytest.raises(UserError, match="the limit of 0.01 seconds; the completion is 'x'.$"):
        score(rewards, [1.0], [""], ["x"], {}, 0.01)
    with pytest.raises(KeyboardInterrupt):
        score(broken(tmp_path, "raise KeyboardInterrupt"), [1.0], [""], ["x"], {})
    handler = signal.signal(signal.SIGALRM, lambda *_: found.append("rang"))
    signal.setitimer(signal.ITIMER_REAL, 100)
    try:
        score(rewards, [1.0], [""], ["x"], {}, seconds=5)
        assert 90 < signal.getitimer(signal.ITIMER_REAL)[0] < 100
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def test_a_slow_reward_is_not_blamed_on_one_completion(tmp_path):
    rewards = broken(tmp_path, "import time; time.sleep(0.05 * len(completions)); return [1.0] * len(completions)")
    with pytest.raises(UserError, match="no time to ask|for none of the completions alone"):
        score(rewards, [1.0], [""] * 40, ["x"] * 40, {}, seconds=1.0)


def test_a_reward_cannot_change_what_is_trained(tmp_path):
    """Sorting or clearing its arguments would otherwise reach the next function, and the tokens of the update."""
    (tmp_path / "mine.py").write_text(
        "def rough(prompts, completions, completion_ids, **columns):\n"
        "    [ids.clear() for ids in completion_ids]\n    prompts.clear()\n    return [0.0 for _ in completions]\n"
    )
    columns = {"completion_ids": [[3, 1]], "reference": ["1"], "max_new_tokens": 4}
    rewards = load_rewards([f"{tmp_path}/mine.py:rough", "length_penalty"])
    total, _ = score(rewards, [1.0, 1.0], ["p"], ["<answer>1</answer>"], columns)
    assert columns["completion_ids"] == [[3, 1]] and total.tolist() == [-0.5]
    with pytest.raises(UserError, match="too large for float32"):
        score(load_rewards(["accuracy"]), [1e39], ["p"], ["<answer>1</answer>"], columns)


def test_reward_names(tmp_path):
    (tmp_path / "bad.py").write_text("import nothing_like_this\n")
    for name, message in [
        ("acuracy", "did you mean accuracy"), ("nowhere.py:f", "There is no file"), (f"{tmp_path}/bad.py:f", "cannot be run"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            load_rewards([name])
    with pytest.raises(UserError, match="have the same name"):
        load_rewards(["accuracy", "accuracy"])


def test_scores_are_weighted():
    total, _ = score(
        load_rewards(["tutorial", "accuracy"]), [2.0, -1.0], [""], ["<answer>5</answer>"], {"reference": ["72"]}
    )
    torch.testing.assert_close(total, torch.tensor([0.02]))


# ------------------------------------------------------------------------------------------------- hostile texts

PIECES = (
    "<answer>", "</answer>", "<think>", "</think>", "<answer", "</", "72", "1,000", ",", "1,", ".", "-", "−", "+", "=", "/",
    "1e999", "1e-999", "e", "nan", "inf", "9**9**9", "٧٢", "７２", "²", "½", "\\frac{", "}{", "}", "\\boxed{", "^", "m^2", " ",
    "\n", "\x00", "\ud800", "\udfff", "\u202e", "\u200f", "$", "%", "(", ")", "x", "or", "million", "1 000", "'", "𝟕", "İ", "ß",
)  # fmt: skip
anything = st.text(st.characters(exclude_categories=[]), max_size=300)
hostile = st.lists(st.sampled_from(PIECES) | anything, max_size=60).map("".join)
tagged = hostile.map(lambda text: f"<think>a</think><answer>{text}</answer>")


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(completion=anything | hostile | tagged, reference=anything | hostile | st.just("72"))
def test_nothing_that_is_written_raises(completion, reference):
    columns = {
        "prompts": [completion], "completions": [completion], "reference": [reference],
        "completion_ids": [[1] * len(completion)], "max_new_tokens": 100,
    }  # fmt: skip
    for function in REWARDS.values():
        (value,) = function(**columns)
        assert isinstance(value, float) and math.isfinite(value)
    score(REWARDS, [1.0] * len(REWARDS), **{k: columns.pop(k) for k in ("prompts", "completions")}, columns=columns)
    for find in (find_answer, find_reasoning):
        assert isinstance(find(completion), str | None)
    assert isinstance(same_answer(completion, reference), bool)
    assert isinstance(is_correct_flexible(completion, reference), bool)
    assert same_answer(completion, completion)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    first=st.integers(0, 10**6),
    second=st.integers(0, 10**6),
    between=st.sampled_from([p for p in PIECES if p not in ("/", "=")]),
)
def test_two_numbers_are_no_guess_at_either(first, second, between):
    """Whatever is between them, unless it says which one is meant (=) or makes one of them (/)."""
    assert [n for n in (first, second) if same_answer(f"{first} {between} {second}", str(n))] == []


def per_kilobyte(function, unit, size, calls):
    """Microseconds per kB of this thread for `unit` repeated to `size` characters: the median."""
    text, took = (unit * (size // len(unit) + 1))[:size] + "!", []
    for _ in range(calls):
        start = time.thread_time()
        function(text)
        took.append(time.thread_time() - start)
    return statistics.median(took) * 1e6 / (size / 1000)


FUNCTIONS = {
    "find_answer": find_answer, "find_reasoning": find_reasoning, "parse_number": parse_number,
    "same_answer": lambda text: same_answer(text, "72"), "same_answer, reference": lambda text: same_answer("72", text),
    "is_correct_flexible": lambda text: is_correct_flexible(text, "72"),
} | {
    name: lambda text, function=function: function(
        prompts=[text], completions=[text], reference=[text], completion_ids=[[1]], max_new_tokens=9
    )
    for name, function in REWARDS.items()
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_time_is_linear(name):
    """From 16 kB to 4 MB the time per kB would grow 256 times in a quadratic function.

    16 times is allowed, for what no longer fits a cache; 50 µs per kB are always allowed.
    """
    units = ["<answer>", "</answer>", "<", "1", "1,", "1,000", "- ", "1 ", "a ", "=", "1e", "9**", "\ud800"]
    for unit in units:
        function = FUNCTIONS[name]
        small, large = per_kilobyte(function, unit, 16_000, 3), per_kilobyte(function, unit, 4_096_000, 1)
        assert large <= max(16 * small, 50), (unit, small, large)


def test_a_short_text_takes_no_long_time():
    """The length of what is parsed has a limit; inside it no pattern may be cubic (one was: 14 ms, and 0.6 now)."""
    for unit in PIECES:
        for end in ("", "a 72", "72 a", "72", "=72"):
            text, took = (unit * 200)[: 200 - len(end)] + end, []
            for _ in range(3):
                start = time.thread_time()
                same_answer(text, text)
                took.append(time.thread_time() - start)
            assert min(took) < 0.01, (unit, end)
