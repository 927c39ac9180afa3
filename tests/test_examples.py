"""examples/: rewards to copy from, and a judge that is trained on right and wrong answers."""

import runpy
import sys

import pytest
from conftest import FEW, ROOT, metrics

import train
from support.user_rewards import load_rewards

REWARDS = ROOT / "examples" / "rewards.py"
SOLUTION = "11+5=<<11+5=16>>16\n16+8=<<16+8=24>>24\n#### 24"


@pytest.mark.parametrize(
    "completion, share",
    [
        ("<think>11+5=16\n16+8=24</think><answer>24</answer>", 1.0),
        ("First 11 + 5 = 16, then $16 + 8 = $24.", 1.0),
        ("11+5=16\n16+8=25", 0.5), ("11+5=17\n16+8=24", 0.0), ("16+8=24\n11+5=16", 0.5), ("<answer>24</answer>", 0.0),
        ("1+1=2\n11+5=16\n2+2=4\n16+8=24", 0.5), ("=1 =2 =16 =24 =30 =31 =32 =33", 0.25), ("", 0.0),
    ],
)  # fmt: skip
def test_steps_on_the_way(completion, share):
    (reward,) = load_rewards([f"{REWARDS}:steps_on_the_way"], {}).values()
    given = {"prompts": [""], "completions": [completion]}
    assert reward(**given, answer=[SOLUTION]) == [share]
    assert reward(**given, answer=["no equation\n#### 24"]) == [None]


def test_thousands_and_decimals_on_the_way():
    (reward,) = load_rewards([f"{REWARDS}:steps_on_the_way"], {}).values()
    given = {"prompts": [""], "completions": ["= 1,250.50"], "answer": ["<<2501/2=1250.5>>"]}
    assert reward(**given) == [1.0]


def test_form_pays_with_a_right_answer_alone():
    (reward,) = load_rewards([f"{REWARDS}:format_if_right"], {}).values()
    texts = ["<think>1+1=2</think><answer>2</answer>", "<think> reasoning </think><answer>3</answer>", "<answer>2</answer>"]  # fmt: skip
    given = {"prompts": [""] * 3, "completions": texts, "reference": ["2"] * 3}
    assert reward(**given, truncated=[False] * 3) == [1.0, 0.0, 0.0]


def test_a_run_with_credit_for_steps(tmp_path):
    """The column `answer` of the dataset reaches the function."""
    folder = tmp_path / "run"
    train.main([
        "--preset=tiny", "--device=cpu", "--steps=1", "--rollouts_per_step=4", "--group_size=4", "--train_batch_size=16",
        "--eval_interval=0", "--checkpoint_interval=0", f"--dataset={FEW[0]}", f"--run_dir={folder}", "--reward",
        "accuracy", f"{REWARDS}:steps_on_the_way", "--reward_weights", "1", "0.5",
    ])  # fmt: skip
    (row,) = metrics(folder)
    assert 0 < row["reward/steps_on_the_way_mean"] < 1


class Replies:
    """A judge's tokenizer and model that say these replies."""

    def __init__(self, *replies):
        self.replies, self.asked, self.device = replies, [], "cpu"

    def apply_chat_template(self, chats, **settings):
        self.asked += [chat[0]["content"] for chat in chats]
        return self.asked

    def __call__(self, texts, **settings):
        import torch

        class Inputs(dict):
            def to(self, device):
                return self

        return Inputs(input_ids=torch.zeros(len(texts), 3, dtype=torch.long))

    def generate(self, input_ids, **settings):
        import torch

        return torch.cat([input_ids, torch.arange(len(input_ids))[:, None]], -1)

    def batch_decode(self, ids):
        return [self.replies[int(row[0])] for row in ids]


def test_an_asked_judge_gives_marks(monkeypatch):
    """Of the question and the answer alone; a reply without a mark scores nothing."""
    judge = Replies("10", " 7<|end|>", "It is 3 of 10", "Good!", "11", "0")
    (reward,) = load_rewards([f"{REWARDS}:asked_judge"], {}).values()
    monkeypatch.setenv("JUDGE", "a-folder")
    monkeypatch.setitem(reward.function.__globals__, "judge", lambda name: (judge, judge))
    chats = [[{"role": "system", "content": "s"}, {"role": "user", "content": "1+1?"}]] * 6
    said = [[{"role": "assistant", "content": f"It is {i}."}] for i in range(6)]
    assert reward(prompts=chats, completions=said) == [1.0, 0.7, 0.3, None, None, 0.0]
    assert "1+1?" in judge.asked[0] and "It is 5." in judge.asked[5]


def test_a_judge_is_trained_and_trains(tmp_path, monkeypatch, capsys):
    """The whole way: answers, a classifier, a run that is rewarded by it; and what cannot be learned is refused."""
    monkeypatch.setattr(sys, "argv", ["train_judge.py"])
    example = runpy.run_path(str(ROOT / "examples" / "train_judge.py"))
    own = [
        "--preset=tiny", "--device=cpu", f"--dataset={FEW[0]}", "--train_batch_size=16", "--group_size=4", "--max_new_tokens=24",
    ]  # fmt: skip
    folder = tmp_path / "judge"
    example["main"]([*own, "--steps=2", "--lr=1e-3", f"--run_dir={folder}"])
    assert "is ranked above a wrong one in" in capsys.readouterr().out
    train.main([
        *own, "--steps=1", "--rollouts_per_step=4", "--eval_interval=0", "--checkpoint_interval=0",
        f"--run_dir={tmp_path / 'run'}", "--reward", f"model:{folder}", "--reward_weights", "1",
    ])  # fmt: skip
    (row,) = metrics(tmp_path / "run")
    assert row["rollout/unscored_share"] == 0 and row["rollout/returns_std"] > 0
    assert (folder / "model.safetensors").stat().st_mode & 0o044, "others may read it"
    with pytest.raises(SystemExit):
        example["main"]([*own, f"--resume={folder}"])
    assert "holds a model and no run that could go on" in capsys.readouterr().err


@pytest.mark.parametrize("program", ["sft.py", "examples/train_judge.py"])
def test_what_is_interrupted_leaves_nothing(tmp_path, monkeypatch, capsys, program):
    """Ctrl-C in the middle: half of a warm start, or a judge with a random head, would be taken for a whole one."""
    monkeypatch.setattr(sys, "argv", [program])
    names = runpy.run_path(str(ROOT / program))

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(names["main"].__wrapped__.__globals__, "fit", interrupted)
    few = tmp_path / "few.jsonl"
    few.write_text("".join((FEW[0] / "train.jsonl").read_text().splitlines(keepends=True)[:20]))
    flags = [
        "--preset=tiny",
        "--device=cpu",
        f"--dataset={few}",
        "--train_batch_size=16",
        "--group_size=4",
    ]
    with pytest.raises(SystemExit) as caught:
        names["main"]([*flags, "--max_new_tokens=24", f"--run_dir={tmp_path / 'run'}"])
    assert caught.value.code == 130 and "stopped" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
