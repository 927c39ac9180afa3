"""reward.py: answers as a person reads them, and nothing for answers that only look right."""

import pytest
import torch

from errors import UserError
from reward import (
    accuracy,
    find_answer,
    find_reasoning,
    is_correct,
    is_correct_flexible,
    length_penalty,
    load_rewards,
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
]  # fmt: skip
WRONG = [
    ("21", "1"), ("1", "21"), ("172", "72"), ("72.1", "72"), ("71 or 72", "72"), ("1 2 3 72", "72"), ("", "72"), ("apples", "72"),
    ("-72", "72"), ("1,00", "100"), ("1e999", "72"), ("9**9**9", "9"), ("nan", "72"), ("72/0", "72"), ("=", "72"), ("7 2", "72"),
    ("1,0,0,0", "1000"), ("72" * 200, "72"), ("72 = 71", "72"), ("inf", "72"), ("red", "blue"), ("1e5", "15"), ("–5", "5"), ("- 5", "5"), ("2", r"\sqrt{2}"), ("3", "x^3"), ("2", "H2O"), ("5", r"x \le 5"), ("48 - 24", "24"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "reference"), RIGHT)
def test_right(answer, reference):
    assert same_answer(answer, reference)


@pytest.mark.parametrize(("answer", "reference"), WRONG)
def test_wrong(answer, reference):
    assert not same_answer(answer, reference)


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


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 1 / 0", "failed: ZeroDivisionError.*line 2"),
        ("return [1.0]", "returned 1 values; it must return a list of 2"),
        ("return 3", "returned int"),
        ("return [float('nan'), 1]", "returned nan for the completion 'first'"),
        ("return [1, float('inf')]", "returned inf for the completion 'second'"),
        ("return [1e39, 1]", "returned 1e\\+39 for the completion 'first'"),
        ("return [10**400, 1]", "returned 1000"),
        ("completions.clear(); return []", "returned 0 values; it must return a list of 2"),
        ("return ['x', 1]", "returned 'x' for the completion 'first'"),
    ],
)
def test_a_broken_reward_is_named(tmp_path, body, message):
    (tmp_path / "mine.py").write_text(f"def broken(prompts, completions, **columns):\n    {body}\n")
    with pytest.raises(UserError, match=message):
        score(load_rewards([f"{tmp_path}/mine.py:broken"]), [1.0], ["", ""], ["first", "second"], {})


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
