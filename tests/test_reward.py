"""reward.py and support/user_rewards.py: nothing for answers that only look right; nothing that is written, by a model or by you, stops it silently."""

import asyncio
import contextlib
import math
import os
import signal
import statistics
import threading
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_answers import PIECES

from reward import (
    REWARDS,
    accuracy,
    length_penalty,
    repetition,
    score,
    soft_overlong,
    tutorial,
    well_formed,
)
from rollout import Completion, Group
from support import metrics, user_rewards
from support.answers import (
    find_answer,
    find_reasoning,
    is_correct_flexible,
    parse_number,
    same_answer,
)
from support.config import Config
from support.data import Question
from support.errors import UserError


def load_rewards(names):
    return user_rewards.load_rewards(names, REWARDS)


def score_texts(rewards, weights, completions, seconds=60.0, max_new_tokens=100, **columns):
    """`score` of groups of one completion each: the returns (N,), and the scores (N,) of each reward by name.

    Of the columns, lists with a value for each completion, `reference` and `completion_ids` stand where a run has them.
    """
    groups = []
    for i, text in enumerate(completions):
        own = {name: values[i] for name, values in columns.items()}
        reference, ids = own.pop("reference", ""), own.pop("completion_ids", [1])
        question = Question("q", reference, "", columns=own, prompt="p")
        groups.append(Group(question, [Completion(ids, text, truncated=False)]))
    config = Config(
        reward=list(rewards),
        reward_weights=weights,
        reward_timeout=seconds,
        max_new_tokens=max_new_tokens,
    )
    scored = score(groups, rewards, config)
    by_name = torch.cat([group.rewards for group in scored], dim=1)
    return torch.cat([g.returns for g in scored]), dict(zip(rewards, by_name, strict=True))


def ask(function, completions, references, **columns):
    n = len(completions)
    return function(
        prompts=[""] * n, completions=completions, reference=references, truncated=[False] * n, **columns
    )  # fmt: skip


def test_accuracy_gives_no_credit_for_a_part():
    """Fault 7: the substring test paid 0.5 for ` 72 `, for 172 and for a list of every number."""
    completions = [
        "<answer> 72 </answer>",
        "<answer>172</answer>",
        "<answer>71 72 73</answer>",
        "72",
    ]
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
    "the tags turned round": "</answer>72<answer>",
    "another tag": "<result>72</result>",
    "an open tag, and a list": "<answer>71 72 73",
    "an open tag, at last": "<answer>72</answer><answer>73",
    "a sum, and another number": "<answer>70 + 2 = 72 or 73</answer>",
    "a denial of a sum": "<answer>It is not 70 + 2 = 72.</answer>",
    "many sums": "<answer>" + ", ".join(f"{n} + 0 = {n}" for n in range(100)) + "</answer>",
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
    columns = {
        "prompts": [""],
        "completions": [text],
        "reference": [reference],
        "truncated": [False],
    }
    assert accuracy(**columns) == [0.0]
    assert accuracy(**columns)[0] + 0.2 * well_formed(**columns)[0] <= 0.2


def test_many_guesses_are_worth_one():
    """Of all the tags, lines and equals signs one number counts, so that 100 guesses are right as often as one is."""
    for text in (
        GAMES["many tags"],
        GAMES["every number, equals signs"],
        GAMES["every number"],
        GAMES["many sums"],
    ):
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
    assert ask(
        length_penalty, ["", ""], ["", ""], completion_ids=[[1] * 5, [1] * 10], max_new_tokens=10
    ) == [
        -0.5,
        -1.0,
    ]


def test_soft_overlong_is_the_papers_line():
    """DAPO, equation 13, with a budget of 100 and a buffer of 20."""
    for length, expected in [(1, 0.0), (80, 0.0), (85, -0.25), (90, -0.5), (100, -1.0)]:
        assert ask(
            soft_overlong, [""], [""], completion_ids=[[1] * length], max_new_tokens=100
        ) == [expected]


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
    total, by_name = score_texts(rewards, [1.0, 0.5], completions, **columns)
    assert list(by_name) == ["accuracy", "short"]
    assert by_name["short"].tolist()[:2] == [-18 + 1, -2] and by_name["short"][2].isnan()
    assert total.tolist() == [1 - 8.5, -1.0, 0.0], (
        "the unscored one keeps what the other reward gave it"
    )
    total, _ = score_texts({"short": rewards["short"]}, [1.0], completions, **columns)
    assert total[2].isnan()


def broken(tmp_path, body):
    """A user's reward function of this body, from a file."""
    (tmp_path / "mine.py").write_text(
        f"def broken(prompts, completions, colour=(), **columns):\n    {body}\n"
    )
    return load_rewards([f"{tmp_path}/mine.py:broken"])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 1 / 0", "failed: ZeroDivisionError.*line 2.* \\(the completion 'first' does it, also alone\\).$"),
        ("return [1 / (c != 'second') for c in completions]", "ZeroDivisionError.*the completion 'second' does it, also alone"),
        ("return [{'red': 1}[c] for c in colour]", "KeyError: 'blue'.*the completion 'second' does it, also alone"),
        ("return [1 / (len(completions) - 2)] * len(completions)", "no completion does it alone"),
        ("raise SystemExit(3)", "failed: SystemExit: 3 .*'first' does it"),
        ("return [1.0 for c in completions if c != 'second']", "returned 1 value; it must return a list of 2 numbers .the completion 'second' does it"),
        ("return 3", "returned int; it must return a list of 2 numbers .the completion 'first' does it"),
        ("import torch; return torch.tensor(1.0)", "returned Tensor"),
        ("return (1.0 for c in completions)", "returned generator"),
        ("return [float('nan'), 1]", "returned nan for the completion 'first'"),
        ("return [1, float('inf')]", "returned inf for the completion 'second'"),
        ("return [1e39, 1]", "returned 1e\\+39 for the completion 'first'"),
        ("return [10**400, 1]", "returned 1000"),
        ("return [10**5000, 1]", "returned a value of the kind int for the completion 'first'"),
        ("import torch; return [torch.ones(2), 1]", "for the completion 'first'; it must return a number between -1e9 and 1e9"),
        ("completions.clear(); return []", "returned 0 values; it must return a list of 2"),
        ("return ['1', 1]", "returned '1' for the completion 'first'"),
        ("raise type('Odd', (Exception,), {'__str__': lambda self: 1 / 0})", "failed: Odd: a value of the kind Odd"),
        ("raise ValueError('many\\nlines ' * 999)", "^[^\\n]{1,400}$"),
    ],
)  # fmt: skip
def test_a_broken_reward_is_named(tmp_path, body, message):
    with pytest.raises(UserError, match=message):
        score_texts(broken(tmp_path, body), [1.0], ["first", "second"], colour=["red", "blue"])


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
    words = "took longer than the limit of 0.5 seconds .the completion 'second' does it, also alone"
    with pytest.raises(UserError, match=words):
        score_texts(rewards, [1.0], ["first", "second"], seconds=0.5)
    assert time.monotonic() - start < 20
    assert (
        signal.getsignal(signal.SIGALRM) is handler and signal.getitimer(signal.ITIMER_REAL)[0] == 0
    )


def test_the_time_limit_leaves_others_alone(tmp_path):
    """0 is no limit, off the main thread there is none; Ctrl-C is no failure; an alarm that was set goes on."""
    rewards = broken(tmp_path, "import time; time.sleep(0.05); return [1.0]")
    assert score_texts(rewards, [1.0], ["x"], seconds=0)[0].tolist() == [1.0]
    found = []
    thread = threading.Thread(
        target=lambda: found.append(score_texts(rewards, [1.0], ["x"], 0.01)[0].tolist())
    )
    thread.start()
    thread.join()
    assert found == [[1.0]]
    with pytest.raises(UserError, match="the limit of 0.01 seconds .the completion 'x'..$"):
        score_texts(rewards, [1.0], ["x"], 0.01)
    with pytest.raises(KeyboardInterrupt):
        score_texts(broken(tmp_path, "raise KeyboardInterrupt"), [1.0], ["x"])
    handler = signal.signal(signal.SIGALRM, lambda *_: found.append("rang"))
    signal.setitimer(signal.ITIMER_REAL, 100)
    try:
        score_texts(rewards, [1.0], ["x"], seconds=5)
        assert 90 < signal.getitimer(signal.ITIMER_REAL)[0] < 100
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


ALARMS = {
    "alarm": "signal.signal(signal.SIGALRM, lambda *_: None); signal.alarm(1)",
    "alarm off": "signal.alarm(0); signal.setitimer(signal.ITIMER_REAL, 0)",
    "ignored": "signal.signal(signal.SIGALRM, signal.SIG_IGN); signal.alarm(1)",
}


@pytest.mark.parametrize("alarm", ALARMS)
@pytest.mark.parametrize(
    "wait", ["time.sleep(60)", "[None for _ in iter(int, 1)]"], ids=["sleep", "loop"]
)
def test_a_reward_with_an_alarm_of_its_own_has_the_same_limit(tmp_path, alarm, wait):
    """As math-verify's `parse` has. Its alarm does not outlive it either: it would end the process."""
    rewards = broken(tmp_path, f"import signal, time; {ALARMS[alarm]}; {wait}; return [1.0]")
    handler, start = signal.getsignal(signal.SIGALRM), time.monotonic()
    with pytest.raises(UserError, match="took longer than the limit of 0.4 seconds"):
        score_texts(rewards, [1.0], ["x"], seconds=0.4)
    assert time.monotonic() - start < 10 and signal.getsignal(signal.SIGALRM) is handler
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_an_answer_that_comes_too_late_is_refused(tmp_path):
    """From a call into C that looks for no signal (here: they are blocked)."""
    body = (
        "import signal, time; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGVTALRM}); time.sleep(0.3); "
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGVTALRM}); return [1.0]"
    )
    with pytest.raises(UserError, match="took longer than the limit of 0.1 seconds"):
        score_texts(broken(tmp_path, body), [1.0], ["x"], seconds=0.1)


CHAT = """
import re
def think(completions, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if re.match(r"^<think>.*</think>", text, re.DOTALL) else 0.0 for text in contents]
def asked(prompts, completions, **kwargs):
    return [float(p[-1]["content"] == "q" and c[-1].get("role") == "assistant") for p, c in zip(prompts, completions)]
def neither(prompts, completions, **kwargs):
    return [completion["content"] for completion in completions]
"""


def test_functions_for_chat_messages_get_messages(tmp_path, capsys):
    """TRL's own rewards index `completion[0]["content"]`; found out at the first call, and said once."""
    (tmp_path / "mine.py").write_text(CHAT)
    texts = ["<think>a</think> 1", "1"]
    for name, expected in (("think", [1.0, 0.0]), ("asked", [1.0, 1.0])):
        rewards = load_rewards([f"{tmp_path}/mine.py:{name}"])
        for _ in range(2):
            assert score_texts(rewards, [1.0], texts)[0].tolist() == expected
        assert capsys.readouterr().out.count("is written for chat messages, and gets them") == 1
    with pytest.raises(UserError, match="failed: TypeError: string indices must be integers"):
        score_texts(load_rewards([f"{tmp_path}/mine.py:neither"]), [1.0], texts)


def test_a_function_for_texts_stays_one(tmp_path):
    """A fault that a text has brought about is none of the kind, nor is any once it has read a text."""
    (tmp_path / "mine.py").write_text(
        "import re\n"
        "def found(prompts, completions, **columns):\n"
        "    return [float(re.search('#### (.)', c).group(1) == '1') if '####' in c else 0.0 for c in completions]\n"
        "def late(prompts, completions, **columns):\n"
        "    return [1.0 if 'bad' not in c else c[0]['content'] for c in completions]\n"
        "def empty(completions, **columns):\n    return [float(len(c[0]['content'])) for c in completions]\n"
    )
    rewards = load_rewards([f"{tmp_path}/mine.py:found"])
    for texts in (["####"], ["#### 1", "####"]):
        with pytest.raises(UserError, match="AttributeError: 'NoneType'.*the completion '####'"):
            score_texts(rewards, [1.0], texts)
    assert score_texts(rewards, [1.0], ["#### 1", "x"])[0].tolist() == [1.0, 0.0]
    rewards = load_rewards([f"{tmp_path}/mine.py:late"])
    assert score_texts(rewards, [1.0], ["good"])[0].tolist() == [1.0]
    with pytest.raises(UserError, match="TypeError: string indices.*the completion 'bad'"):
        score_texts(rewards, [1.0], ["good", "bad"])
    rewards = load_rewards([f"{tmp_path}/mine.py:empty"])
    assert score_texts(rewards, [1.0], ["", "c"])[0].tolist() == [0.0, 1.0], (
        "an empty text has no [0]"
    )


def test_messages_are_those_of_the_run():
    config = Config(system_prompt="Be short.")
    group = Group(Question("How many?", "1", ""), [Completion([1], "one", truncated=False)])
    arguments = user_rewards.reward_arguments([group], config)
    assert arguments.given(as_messages=True)["prompts"] == [
        [{"role": "system", "content": "Be short."}, {"role": "user", "content": "How many?"}]
    ]
    assert arguments.given(as_messages=False)["completions"] == ["one"]


def test_asynchronous_functions_and_arrays(tmp_path):
    """As TRL takes them; also where a loop runs already, as in a notebook."""
    (tmp_path / "mine.py").write_text(
        "import asyncio, numpy as np, torch\n"
        "async def slow(prompts, completions, **columns):\n"
        "    await asyncio.sleep(0.01)\n    return [float(len(c)) for c in completions]\n"
        "async def stuck(prompts, completions, **columns):\n    await asyncio.sleep(60)\n"
        "def array(prompts, completions, **columns):\n    return np.array([0.5] * len(completions))\n"
        "def tensor(prompts, completions, **columns):\n    return torch.ones(len(completions))\n"
    )
    names = ("slow", "array", "tensor")
    rewards = load_rewards([f"{tmp_path}/mine.py:{name}" for name in names])
    assert score_texts(rewards, [1.0] * 3, ["xx"])[0].tolist() == [3.5]

    async def in_a_loop():
        return score_texts(rewards, [1.0] * 3, ["xx"])[0].tolist()

    assert asyncio.run(in_a_loop()) == [3.5]
    (tmp_path / "other.py").write_text(
        "import numpy as np\n"
        "async def fails(**columns): raise ValueError('the true reason')\n"
        "def cancelled(**columns):\n    import asyncio\n    raise asyncio.CancelledError\n"
        "def complex(completions, **columns): return np.array([1 + 2j] * len(completions))\n"
    )

    async def fails_in_a_loop(name):
        score_texts(load_rewards([f"{tmp_path}/other.py:{name}"]), [1.0], ["x"])

    for name, words in (
        ("fails", "the true reason"),
        ("cancelled", "CancelledError"),
        ("complex", "returned np.complex|returned .1"),
    ):
        with pytest.raises(UserError, match=words):
            asyncio.run(fails_in_a_loop(name))
    with pytest.raises(UserError, match="took longer than the limit of 0.2 seconds"):
        score_texts(load_rewards([f"{tmp_path}/mine.py:stuck"]), [1.0], ["x"], seconds=0.2)


def test_what_a_function_asks_for_is_looked_for_before_anything_is_sampled(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "def level(prompts, completions, level, **columns): return [1.0] * len(completions)\n"
        "def colour(prompts, completions, colour, **columns): return [1.0] * len(completions)\n"
        "def state(prompts, completions, trainer_state, **columns): return [1.0] * len(completions)\n"
        "def state_or_none(prompts, completions, trainer_state=None, **columns): return [float(trainer_state is None)]\n"
    )
    questions = [Question("q", "1", "", columns={"question": "q", "level": 3})]

    def check(name):
        rewards = load_rewards([f"{tmp_path}/mine.py:{name}"]) | {"accuracy": accuracy}
        user_rewards.check_columns(rewards, questions)
        return rewards

    check("level")
    assert "is not handed" not in capsys.readouterr().out
    named = [Question("q", "1", "", columns={"question": "q", "reference": "mine", "level": 3})]
    user_rewards.check_columns(load_rewards(["accuracy"]), named)
    assert "the dataset's reference is not handed to reward functions" in capsys.readouterr().out
    with pytest.raises(
        UserError,
        match="missing a required argument: 'colour'.*max_new_tokens, question, level; the last",
    ):
        check("colour")
    with pytest.raises(
        UserError, match="TRL's trainer, which is not here; give it the default None"
    ):
        check("state")
    rewards = {"state_or_none": check("state_or_none")["state_or_none"]}
    assert score_texts(rewards, [1.0], ["x"])[0].tolist() == [1.0]


def test_a_function_of_a_notebook_is_a_reward(monkeypatch):
    """Put into REWARDS, it is treated as one from a file: it may want messages, a column, a log."""

    def mine(completions, level, log_metric, **columns):
        log_metric("level", level[0])
        return [float(len(completion[0]["content"])) for completion in completions]

    monkeypatch.setitem(REWARDS, "mine", mine)
    rewards = load_rewards(["mine"])
    assert score_texts(rewards, [1.0], ["xxx"], level=[2])[0].tolist() == [3.0]
    assert rewards["mine"].__name__ == "mine" and rewards["mine"].logged == {"mine_level": [2.0]}
    with pytest.raises(UserError, match="missing a required argument: 'level'"):
        user_rewards.check_columns(rewards, [Question("q", "1", "", columns={"question": "q"})])


def test_a_function_can_log(tmp_path):
    """TRL's `log_metric` becomes a metric of its own; `log_extra` is taken, and shows nothing."""
    (tmp_path / "mine.py").write_text(
        "def mine(prompts, completions, log_metric, log_extra=None, **columns):\n"
        "    log_extra('text', completions)\n    log_metric('length', len(completions[0]))\n    return [1.0]\n"
    )
    rewards = load_rewards([f"{tmp_path}/mine.py:mine"])
    groups = [Group(Question("q", "1", ""), [Completion([1], "xxx", truncated=False)])]
    config = Config(reward=["mine"], reward_weights=[1.0])
    for length in (3, 3):
        found = metrics.of_rewards(score(groups, rewards, config), rewards)
        assert found["logged/mine_length"] == (length, 1)
    assert "log_metric" in metrics.meaning("logged/mine_length")


def test_a_slow_reward_is_not_blamed_on_one_completion(tmp_path):
    rewards = broken(
        tmp_path,
        "import time; time.sleep(0.05 * len(completions)); return [1.0] * len(completions)",
    )
    with pytest.raises(UserError, match="no time to find|no completion does it alone"):
        score_texts(rewards, [1.0], ["x"] * 40, seconds=1.0)


def test_a_reward_cannot_change_what_is_trained(tmp_path):
    """Sorting or clearing its arguments would otherwise reach the next function, and the tokens of the update."""
    (tmp_path / "mine.py").write_text(
        "def rough(prompts, completions, completion_ids, **columns):\n"
        "    [ids.clear() for ids in completion_ids]\n    prompts.clear()\n    return [0.0 for _ in completions]\n"
    )
    columns, text = {"completion_ids": [[3, 1]], "reference": ["1"]}, ["<answer>1</answer>"]
    rewards = load_rewards([f"{tmp_path}/mine.py:rough", "length_penalty"])
    total, _ = score_texts(rewards, [1.0, 1.0], text, max_new_tokens=4, **columns)
    assert columns["completion_ids"] == [[3, 1]] and total.tolist() == [-0.5]


def test_a_return_beyond_float32_is_refused():
    """A config does not take such a weight; two large ones may add up to it."""
    group = Group(Question("q", "1", ""), [Completion([1], "<answer>1</answer>", truncated=False)])
    config = Config(reward=["accuracy"], reward_weights=[1.0])
    object.__setattr__(config, "reward_weights", [1e39])
    with pytest.raises(UserError, match="too large for float32"):
        score([group], load_rewards(["accuracy"]), config)


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
    rewards = load_rewards(["tutorial", "accuracy"])
    total, _ = score_texts(rewards, [2.0, -1.0], ["<answer>5</answer>"], reference=["72"])
    torch.testing.assert_close(total, torch.tensor([0.02]))


# ------------------------------------------------------------------------------------------------- hostile texts

anything = st.text(st.characters(exclude_categories=[]), max_size=300)
hostile = st.lists(st.sampled_from(PIECES) | anything, max_size=60).map("".join)
tagged = hostile.map(lambda text: f"<think>a</think><answer>{text}</answer>")


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(completion=anything | hostile | tagged, reference=anything | hostile | st.just("72"))
def test_nothing_that_is_written_raises(completion, reference):
    columns = {
        "prompts": [completion], "completions": [completion], "reference": [reference],
        "completion_ids": [[1] * len(completion)], "truncated": [False], "max_new_tokens": 100,
    }  # fmt: skip
    for function in REWARDS.values():
        (value,) = function(**columns)
        assert isinstance(value, float) and math.isfinite(value)
    ids = columns["completion_ids"]
    score_texts(
        REWARDS, [1.0] * len(REWARDS), [completion], reference=[reference], completion_ids=ids
    )
    for find in (find_answer, find_reasoning):
        assert isinstance(find(completion), str | None)
    assert isinstance(same_answer(completion, reference), bool)
    assert isinstance(is_correct_flexible(completion, reference), bool)
    assert same_answer(completion, completion)


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
        prompts=[text], completions=[text], reference=[text], completion_ids=[[1]], truncated=[False], max_new_tokens=9
    )
    for name, function in REWARDS.items()
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_time_is_linear(name):
    """From 16 kB to 4 MB the time per kB would grow 256 times in a quadratic function.

    16 times is allowed, for what no longer fits a cache; 50 µs per kB are always allowed.
    """
    units = [
        "<answer>",
        "</answer>",
        "<",
        "1",
        "1,",
        "1,000",
        "- ",
        "1 ",
        "a ",
        "=",
        "1e",
        "9**",
        "\ud800",
    ]
    for unit in units:
        function = FUNCTIONS[name]
        small, large = (
            per_kilobyte(function, unit, 16_000, 3),
            per_kilobyte(function, unit, 4_096_000, 1),
        )
        assert large <= max(16 * small, 50), (unit, small, large)


def test_what_a_reward_does_to_the_process_ends_with_it(tmp_path, monkeypatch):
    """Working folder and torch's modes; also where it raises, and while its file is read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "import os, torch\nos.chdir('/')\ntorch.set_grad_enabled(False)\n"
        "def wild(prompts, completions, **columns):\n"
        "    os.chdir('/'); torch.set_grad_enabled(False); torch.set_default_dtype(torch.float64)\n"
        "    return [1.0 / (completions[0] != 'bad')]\n"
    )
    for completion in ("good", "bad"):
        rewards = load_rewards([f"{tmp_path}/mine.py:wild"])
        with contextlib.suppress(UserError):
            score_texts(rewards, [1.0], [completion])
        assert (
            os.getcwd() == str(tmp_path)
            and torch.is_grad_enabled()
            and torch.get_default_dtype() == torch.float32
        )
