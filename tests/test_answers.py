"""support/answers.py: answers as a person reads them, and nothing for answers that only look right."""

import time

from answers_table import MISSED, RIGHT, RIGHT_CHINESE, WRONG, WRONG_CHINESE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.answers import (
    LONGEST_ANSWER,
    find_answer,
    find_reasoning,
    is_correct,
    is_correct_flexible,
    same_answer,
)

PIECES = (
    "<answer>", "</answer>", "<think>", "</think>", "<answer", "</", "72", "1,000", ",", "1,", ".", "-", "−", "+", "=", "/",
    "1e999", "1e-999", "e", "nan", "inf", "9**9**9", "٧٢", "７２", "²", "½", "\\frac{", "}{", "}", "\\boxed{", "^", "m^2", " ",
    "\n", "\x00", "\ud800", "\udfff", "\u202e", "\u200f", "$", "%", "(", ")", "x", "or", "million", "1 000", "'", "𝟕", "İ", "ß",
)  # fmt: skip


def test_the_table_is_read_as_a_person_reads_it():
    """Right: a person says right, and so do we. Wrong: a person says wrong, and so do we, without exception."""
    right, wrong = RIGHT + RIGHT_CHINESE, WRONG + WRONG_CHINESE
    assert [pair for pair in right if not same_answer(*pair)] == []
    assert [pair for pair in wrong if same_answer(*pair)] == []
    every = right + wrong + MISSED
    assert len(set(every)) == len(every) and len(right + wrong) >= 1100
    assert len(RIGHT_CHINESE + WRONG_CHINESE) >= 290


def test_what_stays_unread():
    assert [pair for pair in MISSED if same_answer(*pair)] == [], "read now: move it to RIGHT"


def test_find_answer():
    assert find_answer("<think>a</think><answer> 72 </answer>") == "72"
    assert find_answer("<answer>1</answer> no, <answer>2</answer>") == "2", "the last tag"
    assert find_answer("<answer><answer>2</answer>") == "2"
    assert find_answer("<answer>line\n2</answer>\n") == "line\n2"
    for text in ("72", "72</answer>", "", "</answer>72", "<answers>72</answers>"):
        assert find_answer(text) is None
    assert find_reasoning("<think> 1+1 </think> x") == "1+1"
    assert find_reasoning("1+1 </think>") is None and find_reasoning("<think>1") is None


def test_tags_as_models_write_them():
    """Capitals and spaces; and a last tag that is never closed, unless the budget has cut it off."""
    for text in (
        "<Answer>72</Answer>",
        "< answer >72</ answer >",
        "<ANSWER>72</answer>",
        "<answer>72",
    ):
        assert find_answer(text) == "72" and is_correct(text, "72")
    assert find_answer("<answer>7", truncated=True) is None, "it may have become 72"
    assert find_answer("<answer>71</answer> no: <answer>72") == "72"
    assert find_answer("<answer>71</answer> no: <answer>72", truncated=True) == "71"
    assert find_answer("<answer>72</answer> <answer>") == "72", "nothing was said in the last one"
    assert find_answer("<answer>72</answer><answer></answer>") == "", "nothing, and closed"
    assert find_answer("</answer>72<answer>") == "" and not is_correct("</answer>72<answer>", "72")
    assert find_reasoning("<Think>1+1</THINK>") == "1+1"


def test_strict_and_flexible():
    assert not is_correct("The answer is 72.", "72")
    for text in (
        "48+24 makes 72.", "the total is 1,000, all told", "She sold 48, then 24.\nThat makes 72 clips.",
        "He has 48. He gets 24. So he has 48 + 24 = 72 clips.", "#### 72", "\\boxed{72}", "一共有72个。",
        "=48\n48+24=72</answer>", "<think>48+24=72</think>72", "½ of 144 is 72.", "48 + 24 = 72. She does this every day.", "小明有48个，小红有24个，所以一共有72个。",
        "48 clips and then 24 clips make 72 clips", "So the answer is **$72**", "<answer>72</answer> 5",
    ):  # fmt: skip
        assert is_correct_flexible(text, "1000" if "1,000" in text else "72"), text
    for text in (
        "72 and then 71", "not 72", "The answer is not 72.", "71 or 72", "71, 72", "71 and 72", "72 thousand",
        "72 and a half", "72x", "from 96 - 24 to 72", "at least 72", "72 <answer>71</answer>", "no number",
        "172 " + "x" * 1998, "172" + "x " * 999, "48 + 24", "between 70 and 72", "72?", "不是72", "71或72",
        "72 is wrong", "x > 72", "9 * 8 = 72. So this is not the answer.", "72. That is wrong.", "He had 72 apples and ate 3",
        "He had 3 apples and ate 72", "15 of the 72 apples", "71到72", "So she needs 71 or 72 of them.",
    ):  # fmt: skip
        assert not is_correct_flexible(text, "72"), text
    for text in (
        "72.\nThat is wrong.", "The answer is 72.\nNo, that is not the answer.", "答案是72。\n不对。", "So it takes 1 hour 72 minutes",
        "It costs 5 dollars 72 cents", "The answer is 100 decreased by 72", "She has 5 boxes with 72 apples each",
        "The answer is 71, otherwise 72", "The answer is 71, maybe it is 72", "所以答案是71个，也可能是72个", "So 8 * 9 = 73 for 72 days",
        "So 7 * 9 = 63 apples a day for 72 days",
    ):  # fmt: skip
        assert not is_correct_flexible(text, "72"), text
    assert is_correct_flexible("So 8 * 9 = 72 for 19 days", "72")
    assert not is_correct_flexible("So far she has 72", "72", truncated=True), (
        "cut off: no answer yet"
    )
    assert is_correct_flexible("<answer>72</answer> and", "72", truncated=True)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    first=st.integers(0, 10**6),
    second=st.integers(0, 10**6),
    between=st.sampled_from([p for p in PIECES if p not in ("/", "=")]),
)
def test_two_numbers_are_no_guess_at_either(first, second, between):
    """Whatever is between them, unless it says which one is meant (=) or makes one of them (/)."""
    assert [n for n in (first, second) if same_answer(f"{first} {between} {second}", str(n))] == []


def test_one_open_tag_and_many_closed_ones_take_no_long_time():
    """Each of them ended a copy of all before it: two seconds for a megabyte."""
    start = time.thread_time()
    assert find_answer("<answer>72" + "</answer>" * 100_000).startswith("72</answer>")
    assert time.thread_time() - start < 1


def test_a_short_text_takes_no_long_time():
    """The length of what is parsed has a limit; inside it no pattern may be cubic (one was: 14 ms)."""
    for unit in PIECES:
        for end in ("", "a 72", "72 a", "72", "=72"):
            text, took = (unit * LONGEST_ANSWER)[: LONGEST_ANSWER - len(end)] + end, []
            for _ in range(3):
                start = time.thread_time()
                same_answer(text, text)
                took.append(time.thread_time() - start)
            assert min(took) < 0.01, (unit, end)
