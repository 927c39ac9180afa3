"""support/answers.py: answers as a person reads them, and nothing for answers that only look right."""

import time

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.answers import (
    find_answer,
    find_reasoning,
    is_correct,
    is_correct_flexible,
    same_answer,
)

RIGHT = [
    ("72", "72"), (" 72 ", "72"), ("$72", "72"), ("72.0", "72"), ("1,000", "1000"), ("1000", "1,000"), ("72 apples", "72"),
    ("72.", "72"), ("72.50", "72.5"), ("$1,234.50", "1234.5"), ("-3", "-3"), ("−3", "-3"), ("+3", "3"), ("48 + 24 = 72", "72"),
    ("x = 72", "72"), ("72%", "72"), ("$ 72", "72"), ("72 dollars.", "72"), ("0.5", ".5"), ("3/4", "0.75"), ("1/3", "1/3"),
    ("1e3", "1000"), ("**72**", "72"), (r"\boxed{72}", "72"), ("72\n", "72"), ("７２", "72"), ("€5", "5"), ("1,000,000", "1000000"),
    ("-$5", "-5"), ("blue", "Blue"), ("007", "7"), ("–5", "-5"), ("- 5", "-5"), ("1,000,", "1000"), ("1,000, that is all", "1000"), ("5 apples", "5 apples"), ("10", "10 %"), ("h2o", "H2O"), ("the answer is 72", "72"), ("72km", "72"), ("=72", "72"),
    ("72 clips", "72"), ("72 dollars", "72"), ("$72.00", "72"), (r"\$72", "72"), ("US$72", "72"), ("72 USD", "72"), ("£72", "72"), ("72€", "72"),
    ("₹72", "72"), ("Rs 500", "500"), ("72 cents", "72"), ("$72/week", "72"), ("72 km/h", "72"), ("72 miles per hour", "72"),
    ("72 m²", "72"), ("72 m^2", "72"), ("72 m^{2}", "72"), ("72 cm^3", "72"), ("72 ft²", "72"), ("72 square feet", "72"),
    ("72°", "72"), ("72 degrees", "72"), ("72°C", "72"), ("72 sq. ft.", "72"), ("72 years old", "72"), ("6 feet", "6"), ("72!", "72"),
    ("72nd", "72"), ("72 left over", "72"),
    ("Natalia sold 72 clips altogether in April and May.", "72"), ("The final answer is $72$.", "72"), ("She has 72 apples left.", "72"),
    ("Therefore, the total is 72.", "72"), ("Answer: 72", "72"), ("**Answer:** 72", "72"), ("The answer is: **72**", "72"),
    ("Total cost: $72.", "72"), ("It takes him 72 minutes", "72"), ("Answer:72", "72"), ("So the answer is 72!", "72"), ("`72`", "72"),
    ('"72"', "72"), ("'72'", "72"), ("(72)", "72"), ("[72]", "72"), ("{72}", "72"),
    ("#### 72", "72"), ("72\n\n", "72"), ("\n72\napples", "72"),
    ("Antwort: 72 Euro", "72"), ("$72$", "72"), ("$$72$$", "72"), (r"\(72\)", "72"), (r"\[72\]", "72"),
    (r"\[ \boxed{72} \]", "72"), (r"$\boxed{72}$", "72"), (r"\boxed{\$72}", "72"), (r"\boxed{72\%}", "72"), (r"72\%", "72"),
    (r"72 \text{ dollars}", "72"), (r"72\text{ cm}", "72"), (r"72\,\text{cm}", "72"), (r"72~\text{cm}^2", "72"), (r"72 \, \mathrm{m}^2", "72"),
    (r"\text{72}", "72"), (r"\mathbf{72}", "72"), (r"\textbf{72}", "72"), (r"72^\circ", "72"), (r"72^{\circ}", "72"), (r"72\degree", "72"),
    ("1{,}000", "1000"), (r"1\,000", "1000"), (r"1,\!000", "1000"), (r"\boxed{1{,}234{,}567}", "1234567"), (r"\frac{3}{4}", "0.75"),
    (r"\frac{3}{4}", "3/4"), (r"\dfrac{3}{4}", "3/4"), (r"\tfrac34", "3/4"), (r"\frac34", "3/4"), (r"-\frac{3}{4}", "-0.75"),
    (r"\frac{-3}{4}", "-3/4"), (r"2\frac{1}{2}", "2.5"), (r"\boxed{\frac{3}{4}}", "3/4"), (r"\displaystyle \frac{3}{4}", "3/4"),
    (r"x = \frac{1}{2}", "0.5"), (r"3 \times 10^5", "300000"), (r"3.5 \times 10^{-2}", "0.035"), (r"48 + 24 = \boxed{72}", "72"),
    (r"\approx 72", "72"), (r"\left(72\right)", "72"), (r"72 \quad", "72"), ("1 000", "1000"), ("1 000 000", "1000000"), ("1\u2009000", "1000"),
    ("1\u202f000", "1000"), ("1\u00a0000", "1000"), ("12 500 dollars", "12500"), ("12,345.67", "12345.67"),
    ("0072", "72"), ("72.000", "72"), ("7.2e1", "72"), ("7.2E+1", "72"), ("3 × 10^5", "300000"), ("3 x 10^5", "300000"), ("3*10^5", "300000"),
    ("1 1/2", "1.5"), ("1 1/2 cups", "1.5"), ("1 and 1/2", "1.5"), ("-1 1/2", "-1.5"), ("½", "0.5"), ("2½", "2.5"), ("3⁄4", "0.75"),
    ("3 / 4", "0.75"), ("3/4 of the cake", "0.75"), ("6/8", "3/4"), ("0.75", "3/4"), ("2.5", "2 1/2"), ("5/2", "2 1/2"), ("minus 5", "-5"),
    ("negative 5", "-5"), ("Minus 5 degrees", "-5"), ("-5°C", "-5"), ("$-5", "-5"), ("−$5", "-5"), ("-5 (a loss)", "-5"),
    ("٧٢", "72"), ("७२", "72"), ("７２.０", "72"), (".5", "0.5"), ("+72", "72"),
    ("\u200b72", "72"), ("72\u200f", "72"), ("36 × 2 = 72", "72"), ("36 x 2 = 72", "72"), ("6*12=72", "72"), ("$48 + $24 = $72", "72"),
    ("48/2 = 24\n48 + 24 = 72", "72"), ("144 ÷ 2 = 72 apples", "72"), ("x=72", "72"), ("n = 72", "72"), ("Total = 72", "72"),
    ("total = $72.50", "72.5"), ("A = 6 × 12 = 72 cm²", "72"), ("(48 + 24) = 72", "72"),
    ("10 × 100 = 1,000", "1000"), ("≈ 72", "72"), ("about 72", "72"),
    ("approximately 72 meters", "72"), ("~72", "72"), ("roughly 33.3", "33.3"), ("72", "72."), ("72", "$72"), ("72", r"\$72"), ("72", "72 dollars"),
    ("72", r"72\%"), ("50", "50%"), ("72", r"72^\circ"), ("72°", r"72^\circ"), ("0.75", r"\frac{3}{4}"), ("3/4", r"\frac{3}{4}"),
    (r"\dfrac{3}{4}", r"\frac{3}{4}"), ("10", r"10\text{ cm}"), ("10 cm", r"10\text{ cm}"), ("10000", "10{,}000"), ("1,000,000", "1 000 000"),
    ("72", r"\boxed{72}"), ("-5", "−5"), ("300000", r"3 \times 10^5"), ("72", "72 m^2"), ("7", "7.00"), ("Monday", "monday"), ("Monday.", "Monday"),
    ("**Monday**", "Monday"), (r"\text{Monday}", "Monday"), (r"\boxed{\text{Monday}}", "Monday"), ("2x + 1", "2x + 1"), ("$2x + 1$", "2x + 1"),
    (r"2\sqrt{3}", r"2\sqrt{3}"), (r"$2\sqrt{3}$", r"2\sqrt{3}"), (r"\dfrac{\pi}{2}", r"\dfrac{\pi}{2}"), ("(3, 4)", "(3, 4)"), ("x^2", "x^2"),
    ("yes", "Yes"), ("(B)", "(B)"), ("10:30", "10:30"), ("no  solution", "no solution"), ("$A$", "A"), ("$C$", "c"), (r"\mathrm{72 \ km}", "72"),
    ("5", "x = 5"), ("x = 5", "x=5"), ("72 min", "72"), ("72min", "72"), ("72 more", "72"), ("72 a week", "72"), ("A total of 72", "72"),
    ("Bob's 72", "72"), ("x = - 5", "-5"), ("x = minus 5", "-5"), (r"The answer is -\frac{3}{4}", "-0.75"), (r"\frac{144}{2} = 72", "72"),
    (r"\frac12 \times 144 = 72", "72"), ("y = 6 * 12 = 72", "72"), (r"\(x = 72\)", "72"), ("**x = 72**", "72"), ("So, x = 72.", "72"),
    (r"The answer is $\boxed{72}$.", "72"), ("Total cost = $5 + $10 = $15", "15"), (r"Answer: \$1,234.56", "1234.56"),
    (r"72\text{ m}^{2}", "72"), ("1,000 + 5 = 1,005", "1005"), ("72 percent", "72"), ("72元", "72"), ("$.50", "0.5"), ("72", "x = 72"),
    (r"\textbf{Answer: }72", "72"), ("2^3 = 8", "8"),
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
    ("72xy", "72"), ("72 xy", "72"), ("72ab", "72"), ("72a", "72"), ("72A", "72"), ("1**000", "1000"), ("2**3", "23"), ("2**3", "8"),
    ("5$3", "53"), ("7$2", "72"), ("the square of 72", "72"), ("square the 72", "72"), ("72 square root", "72"), ("the cube of 72", "72"),
    ("f (72)", "72"), ("(2)72", "72"), ("x(72)", "72"), ("72(3)", "72"), ("price * 72", "72"), ("72 * price", "72"), ("is.5", "5"),
    (".5", "5"), ("Rs.5", "5"), ("1.2.3", "3"), ("1/2/3", "1/2"), ("1 3/2", "2.5"), ("1-1/2", "1.5"), ("1-1/2", "0.5"), ("1/3*10^5", "1/3"),
    ("3x10^56", "3e5"), ("2*10^{5}6", "2e5"), ("-x = 72", "72"), ("1/x = 72", "72"), ("xy = 72", "72"), ("x y = 72", "72"),
    ("not x = 72", "72"), ("x or y = 72", "72"), ("|x| = 72", "72"), ("log x = 72", "72"), ("twice x = 72", "72"), ("2x = 36*2 = 72", "72"),
    ("72, 2a = 144", "144"), ("total = 72 and rest = 3", "3"), ("total = 72, rest = 3", "3"), ("x <= 72", "72"), ("72 =", "72"),
    ("72 = ?", "72"), ("72?", "72"), ("--5", "5"), ("-(-5)", "5"), ("minus -5", "5"), ("apples - 5", "-5"), ("apples - 5", "5"),
    ("ten minus 5", "5"), ("ten minus 5", "-5"), (r"total-\frac12", "-1/2"), (r"x-\frac12", "-1/2"), ("no 72", "72"), ("nicht 72", "72"),
    ("NOT 72", "72"), ("72 wrong", "72"), ("3 sevenths", "3"), ("2 twelfths", "2"), ("72-million", "72"), ("7²2", "72"), ("72 m^25", "72"),
    ("72 m^2.5", "72"), ("72 x^2", "72"), ("72 x²", "72"), ("72 ^2", "72"), ("7{2}", "72"), ("7{200}", "7200"), (r"\frac{72}{0}", "72"),
    (r"\frac{1}{2}3", "1/2"), ("0.5 100", "0.51"), ("1/2 100", "1/2100"), ("1.000,5", "1"), ("1e5.5", "1e5"), ("0b1", "1"), ("1_000", "1"),
    ("ratio 1:2", "2"), ("B72", "72"), ("min 72", "72"), ("max 72", "72"), ("[72, inf)", "72"), ("72 dozen", "72"),
    ("I'm 71, not 72", "72"), ("72..73", "72"), ("72 as x", "72"), ("different from 72", "72"), ("72 choose 2", "2"),
    ("over 72 people", "72"), (r"\text{not }72", "72"), (r"72\cdot x", "72"), (r"\sin 72", "72"), ("72 feet 5", "72"),
]  # fmt: skip
# A person says right, we say no: what stays unread. When one of them is read, move it to RIGHT.
MISSED = [
    ("seventy-two", "72"), ("half", "0.5"), ("zero", "0"), ("1.000,50", "1000.5"), ("72,5", "72.5"), ("1,00,000", "100000"), ("1_000", "1000"),
    ("0.72", "72%"), ("72%", "0.72"), ("72 cents", "$0.72"), ("72 (72 dollars)", "72"), ("72, 72", "72"), ("72 = 36 × 2", "72"),
    ("72 apples (36 × 2)", "72"), ("She sold 48 in April and 24 in May, 72 in all.", "72"), ("48 + 24 = 72, so she sold 72 clips.", "72"),
    ("Total - 72", "72"), ("Total — 72 dollars", "72"), ("USD72", "72"), ("_72_", "72"), ("<b>72</b>", "72"), ("72 and a half", "72.5"),
    ("72k", "72000"), ("3 quarters", "3/4"), ("3 over 4", "3/4"), ("3 out of 4", "3/4"), ("75 percent", "3/4"), ("2^3", "8"), (r"\sqrt{144}", "12"),
    ("1 hour 12 minutes", "72"), ("6 feet 2 inches", "74"), ("10:30 AM", "10:30"), ("(3,4)", "(3, 4)"), ("2x+1", "2x + 1"),
    ("B", "(B)"), ("The answer is (B)", "(B)"), ("It was Monday", "Monday"), ("2√3", r"2\sqrt{3}"), ("3.4641", r"2\sqrt{3}"),
    ("0.333", "1/3"), ("0.(3)", "1/3"), ("2 dozen", "24"), ("not 71 but 72", "72"), ("72, not 71", "72"), ("七十二", "72"), ("Ⅻ", "12"),
    ("twelve", "12"), ("So 48 apples, then 24 more: 48 + 24 = 72", "72"), ("H₂O", "H2O"), ("No. of clips: 72, no more", "72"),
    ("Rs.500", "500"), ("72 m2", "72"), ("3 times", "3"), ("3 times as many", "3"), ("5 more than Bob", "5"), ("72 or so", "72"),
    ("72 (seventy-two)", "72"), ("seventy-two (72)", "72"), ("→ 72", "72"), ("=> 72", "72"), ("答案是72", "72"), ("72个", "72"),
    ("答案：72。", "72"), ("Ответ: 72", "72"), ("1'000", "1000"), ("1’000", "1000"), ("1.5 million", "1500000"), ("$2 billion", "2000000000"),
    ("72 thousand", "72000"), ("72 = x", "72"), ("3 dogs and 2 cats = 5 animals", "5"), ("f(2) = 72", "72"), ("72 = total", "72"),
    ("50% of 144 = 72", "72"), ("A$72", "72"), ("The answer is negative 5", "-5"), ("I'm 72", "72"), ("72 different ways", "72"),
    ("48 clips + 24 clips = 72 clips", "72"), (r"144 \div 2 = 72", "72"), ("72, I'm sure", "72"), ("...72", "72"),
]  # fmt: skip


PIECES = (
    "<answer>", "</answer>", "<think>", "</think>", "<answer", "</", "72", "1,000", ",", "1,", ".", "-", "−", "+", "=", "/",
    "1e999", "1e-999", "e", "nan", "inf", "9**9**9", "٧٢", "７２", "²", "½", "\\frac{", "}{", "}", "\\boxed{", "^", "m^2", " ",
    "\n", "\x00", "\ud800", "\udfff", "\u202e", "\u200f", "$", "%", "(", ")", "x", "or", "million", "1 000", "'", "𝟕", "İ", "ß",
)  # fmt: skip


def test_the_table_is_read_as_a_person_reads_it():
    """RIGHT: a person says right, and so do we. WRONG: a person says wrong, and so do we, without exception."""
    assert [pair for pair in RIGHT if not same_answer(*pair)] == []
    assert [pair for pair in WRONG if same_answer(*pair)] == []
    every = RIGHT + WRONG + MISSED
    assert len(set(every)) == len(every) and len(RIGHT + WRONG) >= 400


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
    assert not is_correct("The answer is 72.", "72") and is_correct_flexible(
        "48+24 makes 72.", "72"
    )
    assert not is_correct_flexible("72 and then 71", "72")
    assert is_correct_flexible("the total is 1,000, all told", "1000") and is_correct_flexible(
        "from 48 - 24", "24"
    )
    assert not is_correct_flexible("172 " + "x" * 1998, "72") and not is_correct_flexible(
        "172" + "x " * 999, "72"
    )
    assert not is_correct_flexible("72 <answer>71</answer>", "72"), "where there is a tag it counts"
    assert is_correct_flexible("<answer>72</answer> 5", "72") and not is_correct_flexible(
        "no number", "72"
    )


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    first=st.integers(0, 10**6),
    second=st.integers(0, 10**6),
    between=st.sampled_from([p for p in PIECES if p not in ("/", "=")]),
)
def test_two_numbers_are_no_guess_at_either(first, second, between):
    """Whatever is between them, unless it says which one is meant (=) or makes one of them (/)."""
    assert [n for n in (first, second) if same_answer(f"{first} {between} {second}", str(n))] == []


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
