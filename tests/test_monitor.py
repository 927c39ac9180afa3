"""monitor.py: names with meanings, sums and counts, and what a reader of TensorBoard finds."""

import re

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from monitor import CHARTS, GLOSSARY, Monitor, console_line, meaning


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


def test_tensorboard_of_a_run(tiny_run):
    folder = tiny_run("a", "--kl_weight=0.01", "--steps=2", "--eval_samples=2", "--dynamic_sampling=2")
    log = EventAccumulator(str(folder))
    log.Reload()
    tags = set(log.Tags()["scalars"]) | set(log.Tags()["tensors"])
    missing = {name for name in GLOSSARY if not name.startswith("alarm/")} - tags
    assert not missing, f"explained but never logged: {missing}"
    texts = {t.removesuffix("/text_summary") for t in tags if t.endswith("/text_summary")}
    assert {"guide/metrics", "guide/config", "samples/completion_1"} <= texts
    for charts in CHARTS.values():
        for _, names in charts.values():
            empty = [n for n in names if not any(re.match(n, known) for known in GLOSSARY)]
            assert not empty, "a chart of a metric that does not exist stays empty"


def test_console_line():
    line = console_line(3, 80, {"rollout/returns": 0.5, "train/skipped_steps": 0.0, "time/step": 1.5})
    assert line == "step  3/80 | reward 0.500 | s 1.50"
    assert "skipped 2" in console_line(3, 80, {"train/skipped_steps": 2.0})
