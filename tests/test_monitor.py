"""support/monitor.py and support/metrics.py: names with meanings, sums and counts, and what a reader of TensorBoard finds."""

import os
import threading

import pytest
import torch
from conftest import FEW, metrics
from steps import forked
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

import train
from rollout import Completion, Group
from support.alarms import ALARMS, LONGEST
from support.data import Question
from support.metrics import (
    CHARTS,
    CONSOLE,
    GLOSSARY,
    OTHER_QUESTIONS,
    charts_of,
    console_line,
    copies_of_examples,
    fold,
    meaning,
    of_rollout,
)
from support.monitor import Monitor, progress


def test_unknown_names_raise(tmp_path):
    monitor = Monitor()
    monitor.open(tmp_path)
    with pytest.raises(KeyError):
        monitor.add("train/lss", 1.0)
    with pytest.raises(KeyError):
        monitor.add("reward/accuracy_median", 1.0)
    assert meaning("reward/my_own_reward_mean") == "Mean of the reward my_own_reward."


def test_means_are_over_all_counts_not_means_of_means(tmp_path):
    monitor = Monitor()
    monitor.open(tmp_path)
    monitor.add("train/entropy", torch.tensor(10.0), torch.tensor(10))
    monitor.add("train/entropy", torch.tensor(0.0), torch.tensor(90))
    assert monitor.flush(1, 1)["train/entropy"] == pytest.approx(0.1)
    assert "train/entropy" not in monitor.flush(2, 2), "forgotten after the step"


def test_the_tutorials_names_are_there():
    names = "train/loss train/kl_divergence train/grad_norm rollout/returns rollout/success_rate eval/accuracy"
    assert set(names.split()) <= set(GLOSSARY)


def copies(prompt, *texts):
    """Whether each of these completions repeats an example of the prompt."""
    completions = [Completion([1], text, False, [-1.0]) for text in texts]
    group = Group(Question("q", "16", "", prompt=prompt), completions)
    found = copies_of_examples(group)
    share = of_rollout([group], 1.0).get("rollout/copied_share")
    assert share == ((sum(found), len(texts)) if found else None)
    return found


def test_a_copied_example_is_noticed_and_an_answer_is_not():
    tutorial = "like this: <think> reasoning </think> <answer> number </answer>"
    said = "<think>reasoning</think> <answer>16</answer>", "<think> 4 * 4 = 16 </think>", "16"
    assert copies(tutorial, *said) == [True, False, False]
    worked = "Example:\n<think>\n4 pens\nand 12\n</think>\n<answer>16</answer>"
    said = "<think> 4 pens and 12 </think>", "<think>8</think> <answer>16</answer>"
    assert copies(worked, *said) == [True, False], "the example's number may be the answer"
    assert copies("<think> 推理过程 </think>", "<think>推理过程</think>") == [True]
    letters = "<answer>A</answer> or <answer>yes</answer>, <think> so </think>"
    assert (
        copies(letters, "<think>2</think> <answer>A</answer>", "<answer>yes</answer>")
        == [False] * 2
    )
    assert copies("No tags, or one: <think>", "<think>") == [], "nothing to copy, no metric"


def test_tensorboard_of_a_run(tiny_run):
    folder = tiny_run(
        "a", "--kl_weight=0.01", "--steps=2", "--eval_samples=2", "--dynamic_sampling=2"
    )
    log = EventAccumulator(str(folder))
    log.Reload()
    tags = set(log.Tags()["scalars"]) | set(log.Tags()["tensors"])
    missing = {name for name in GLOSSARY if not name.startswith("alarm/")} - tags
    # Of a prompt with an example, as the test above has one; and of a resume.
    missing -= {"rollout/copied_share", OTHER_QUESTIONS}
    assert not missing, f"explained but never logged: {missing}"
    texts = {t.removesuffix("/text_summary") for t in tags if t.endswith("/text_summary")}
    assert {
        "guide/metrics",
        "guide/config",
        "samples/group_1_best",
        "samples/group_2_worst",
    } <= texts
    for charts in CHARTS.values():
        assert set(charts.values()) <= set(GLOSSARY), (
            "a chart of a metric that does not exist stays empty"
        )
    (layout,) = log.Tensors("custom_scalars__config__")[-1:]
    proto = layout_pb2.Layout.FromString(layout.tensor_proto.string_val[0])
    shown = {chart.title for category in proto.category for chart in category.chart}
    assert "KL to the reference: below 0.1" in shown
    few = charts_of({"time/step", "train/lr"})
    assert [list(charts) for charts in few.values()] == [[], [], ["seconds of a step"]], (
        "no empty chart"
    )
    (config,) = log.Tensors("guide/config/text_summary")
    text = config.tensor_proto.string_val[0].decode()
    assert "clip_eps: 0.2" in text and "kl_weight: 0.01" in text, "the effective objective"


def test_the_samples_are_best_and_worst_of_the_groups_that_teach_most(tmp_path):
    """Of three groups the one without a spread comes last."""
    pages = {}
    log = Monitor()
    log.text = lambda tag, page, step: pages.__setitem__(tag, page)
    returns = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 0.0], [0.2, 0.0, 0.1]])
    groups = [
        Group(
            Question(f"q{i}", "1", ""),
            [Completion([1], f"text {i}{j}", False) for j in range(3)],
            returns=row,
        )
        for i, row in enumerate(returns)
    ]
    advantages = torch.tensor([[0.0, 0.0, 0.0], [-0.6, 1.2, -0.6], [0.1, -0.1, 0.0]])
    log.show_completions(groups, advantages, 1, 5)
    assert list(pages) == [f"samples/group_{i}_{k}" for i in (1, 2) for k in ("best", "worst")] + [
        "samples/group_3_best"
    ]
    assert (
        "text 11" in pages["samples/group_1_best"] and "text 10" in pages["samples/group_1_worst"]
    )
    assert "text 20" in pages["samples/group_2_best"] and "text 00" in pages["samples/group_3_best"]


def test_a_line_of_the_console_fits_the_terminal():
    row = {name: 0.123 for _, name, _ in CONSOLE}
    line = console_line(3, 80, row)
    assert len(line) > 80 and fold(line, 200) == line
    folded = fold(line, 80).splitlines()
    assert max(map(len, folded)) <= 80 and " | ".join(part.strip(" |") for part in folded) == line
    assert all(part.startswith("    ") for part in folded[1:])


def test_console_line():
    line = console_line(
        3, 80, {"rollout/returns": 0.5, "train/skipped_steps": 0.0, "time/step": 1.5}
    )
    assert line == "step  3/80 | reward 0.500 | s 1.50"
    assert console_line(3, 80, {"alarm/kl": 1.0, "alarm/ratio": 1.0}).endswith("| ALARM kl, ratio")
    assert "skipped 2" in console_line(3, 80, {"train/skipped_steps": 2.0})


def test_a_progress_bar_in_a_file_is_nothing(capfd):
    """stderr is not a terminal here: no byte, and no more work than the loop alone."""
    assert list(progress(range(1000), "steps")) == list(range(1000))
    assert capfd.readouterr().err == ""
    bar = progress(range(3), "steps")
    assert bar.disable and not hasattr(bar, "last_print_t"), (
        "a bar that is switched off keeps no clock"
    )


def test_a_run_gives_back_what_it_took(tiny_run):
    """Open files and threads; the hour-long version is benchmarks/soak.py."""

    def held():
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    tiny_run("first")  # what torch and transformers open once
    before = held()
    for i in range(3):
        tiny_run(f"run{i}", "--steps=2")
    assert held() == before


def test_a_log_of_many_steps_keeps_few_in_memory(tmp_path):
    monitor = Monitor(ALARMS)
    monitor.open(tmp_path)
    sizes = []
    for step in range(3 * LONGEST):
        monitor.add("rollout/returns", 0.5)
        monitor.flush(step, 10**6)
        sizes.append((tmp_path / "metrics.jsonl").stat().st_size)
    assert len(monitor.rows) == LONGEST and not monitor.sums
    grown = [b - a for a, b in zip(sizes, sizes[1:], strict=False)]
    assert max(grown) - min(grown) <= 30, (
        "each step adds a line of the same length, but for its numbers"
    )


def test_metrics_that_were_tampered_with(tmp_path, capsys):
    """Lines out of order lose nothing; steps that are not there are said."""
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f'{{"step": {step}}}\n' for step in (0, 1, 7, 2, 4))
    )
    monitor = Monitor()
    monitor.open(tmp_path, 4)
    assert [row["step"] for row in metrics(tmp_path)] == [0, 1, 2, 4]
    assert "lacks 1 of the 4 steps that were done" in capsys.readouterr().out
    (tmp_path / "metrics.jsonl").unlink()
    Monitor().open(tmp_path, 4)
    assert "lacks 4 of the 4 steps" in capsys.readouterr().out
    (tmp_path / "new").mkdir()
    Monitor().open(tmp_path / "new")
    assert "lacks" not in capsys.readouterr().out


def test_a_run_goes_on_when_nobody_listens(tmp_path):
    """`python train.py | head`: the pipe is closed after the first step, and the training is not."""
    flags = "--preset tiny --device cpu --steps 9 --rollouts_per_step 2 --group_size 2 --train_batch_size 4"
    flags += f" --max_new_tokens 4 --eval_interval 0 --dataset {FEW[0]} --run_dir {tmp_path}/run"
    code, output, error = forked(lambda: train.main(flags.split()), lines=6)
    assert output.count("\n") == 6 and "step 1/9" in output
    assert code == 0 and (tmp_path / "run" / "checkpoint-9").is_dir(), error
    assert "Traceback" not in error


def test_metrics_are_on_the_disk_before_a_checkpoint_can_be(tmp_path, monkeypatch):
    monitor, synced = Monitor(), []
    monitor.open(tmp_path)
    monkeypatch.setattr(
        os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}"))
    )
    monitor.flush(1, 1)
    assert str(tmp_path / "metrics.jsonl") in synced
