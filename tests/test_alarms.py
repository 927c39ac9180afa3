"""support/alarms.py: each alarm sounds when what it is about goes wrong, stays silent in a healthy run, and is heard once."""

import json
import random

import pytest
from conftest import ROOT, metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from objectives.table import OBJECTIVES
from support.alarms import (
    ALARMS,
    LONGEST,
    active_alarms,
    alarms_for,
    has_fallen,
    has_jumped,
    has_stayed_flat,
)
from support.config import Config
from support.monitor import Monitor

HEALTHY = {
    "train/kl_divergence": 0.02, "train/clipped_share": 0.1, "train/ratio_mean": 1.01, "train/grad_norm": 0.4,
    "train/skipped_steps": 0.0, "train/sampler_gap": 0.03, "rollout/no_spread_share": 0.4, "rollout/returns": 0.5,
    "rollout/truncated_share": 0.1, "rollout/completion_tokens": 150.0, "rollout/unscored_share": 0.0,
    "rollout/entropy": 0.4, "rollout/success_rate": 0.5, "rollout/copied_share": 0.05, "reward/format_mean": 0.9,
    "eval/accuracy": 0.5, "eval/accuracy_flexible": 0.6, "eval/accuracy_low": 0.4, "eval/accuracy_high": 0.6,
}  # fmt: skip
# metric, its values step by step (the last ones go wrong), the step in which the alarm first sounds
WRONG = {
    "kl": [0.05, 0.05, 0.05, 0.12, 0.12, 0.12], "clipped": [0.2, 0.2, 0.29, 0.32, 0.32], "ratio": [1, 1, 0.8, 0.8],
    "no_spread": [0.7, 0.85, 0.85, 0.85, 0.85], "truncated": [0.5, 0.95, 0.95, 0.95],
    "reward_falls": [0.5, 0.52] * 10 + [0.3, 0.28] * 4, "length_explodes": [100.0] * 20 + [900.0] * 5,
    "reasoning_collapses": [155.0] * 8 + [40.0] * 2, "format_alone": [0.3] * 4 + [0.9] * 2, "copied_prompt": [0.1, 0.5, 0.5],
    "answer_untagged": [0.6, 0.8], "accuracy_falls": [0.6, 0.3], "gradient": [0.5] * 10 + [6.0] * 3, "skipped": [0.0, 1.0],
    "reward_flat": [0.3] * 50 + [0.31] * 30 + [0.3] * 20, "sampler": [0.03, 0.6, 0.6, 0.6], "unscored": [0.0, 0.9, 0.9, 0.9],
}  # fmt: skip


def watched(name, values):
    """Which alarms are on after each step, when the metric of alarm `name` takes these values."""
    rows = [HEALTHY | {ALARMS[name].metric: value} for value in values]
    return [active_alarms(ALARMS, rows[: i + 1]) for i in range(len(rows))]


@pytest.mark.parametrize("name", ALARMS)
def test_each_alarm_sounds_and_no_other(name):
    on = watched(name, WRONG[name])
    assert on[-1] == [name], on
    assert on[0] == [] and all(x in ([], [name]) for x in on)


def test_the_documents_thresholds():
    for name, limit in (("kl", 0.1), ("clipped", 0.3), ("no_spread", 0.8)):
        assert watched(name, [limit - 0.001] * 10)[-1] == [] and watched(
            name, [limit + 0.001] * 10
        )[-1] == [name]
    for name, word in (
        ("kl", "raise kl_weight or lower lr"),
        ("no_spread", "--dynamic_sampling"),
        ("clipped", "lower lr"),
    ):
        assert word in ALARMS[name].advice


def test_a_spike_is_no_alarm():
    """One step in five far out of bounds, of every metric that is averaged."""
    for name in ("kl", "clipped", "gradient", "truncated"):
        good, bad = HEALTHY[ALARMS[name].metric], WRONG[name][-1]
        assert not any(watched(name, ([good] * 4 + [bad]) * 12)), name


def test_a_reward_that_stays_flat_is_told_from_one_that_rises():
    chance = random.Random(1)

    def rate(p):
        return sum(chance.random() < p for _ in range(64)) / 64

    flat = [[rate(p) for _ in range(150)] for p in (0.05, 0.3, 0.6) for _ in range(20)]
    rises = [
        [rate(p + 0.2 * i / 100) for i in range(150)] for p in (0.05, 0.3, 0.6) for _ in range(20)
    ]
    assert sum(first(values, has_stayed_flat) is not None for values in flat) >= 55
    assert sum(first(values, has_stayed_flat) is not None for values in rises) <= 1
    assert not has_stayed_flat([0.5] * LONGEST), "its beginning is forgotten"


def first(values, bad=has_fallen):
    """The step at which an alarm first sounds, or None."""
    return next(
        (n for n in range(1, len(values) + 1) if bad(values[max(0, n - LONGEST) : n])), None
    )


def test_a_noisy_reward_that_does_not_fall_is_left_alone():
    """Constant or rising rates, 8 and 32 samples a step, or questions that are all or none: 160 runs of 100 steps, of
    which one may sound (a larger trial of 900 runs had one)."""
    chance = random.Random(0)

    def rate(p, n):
        return sum(chance.random() < p for _ in range(n)) / n

    runs = [[rate(p, 32) for _ in range(100)] for p in [chance.random() for _ in range(60)]]
    runs += [[rate(min(0.8, 0.2 + 0.6 * i / 60), 8) for i in range(100)] for _ in range(50)]
    runs += [[rate(0.5, 2) for _ in range(100)] for _ in range(50)]
    assert sum(first(values) is not None for values in runs) <= 1


@pytest.mark.parametrize("good", [3, 5, 7, 10, 50])
def test_a_reward_that_falls_is_noticed_wherever_it_does(good):
    """Also in the first steps, where a learning rate that is far too high shows; within 16 steps of the fall."""
    assert good < first([0.5] * good + [0.0] * 60) <= good + 16
    chance = random.Random(1)
    falls = [
        [chance.gauss(0.5, 0.1) for _ in range(good)]
        + [chance.gauss(0.05, 0.04) for _ in range(60)]
        for _ in range(20)
    ]
    assert all(first(values) for values in falls if good > 4)


def test_steps_without_a_spread_make_no_gradient_alarm():
    """With a KL they have a gradient too, a hundredth of the others'."""
    chance = random.Random(0)
    runs = [
        [0.5 + 0.1 * chance.random() if chance.random() < 0.4 else 0.005 for _ in range(100)]
        for _ in range(50)
    ]
    assert sum(first(values, has_jumped) is not None for values in runs) <= 2


# alarm: steps before, a value (of as many steps as it looks at) that is just fine, and one that is just not
EDGES = {
    "kl": ([], [0.099] * 3, [0.101] * 3), "clipped": ([], [0.299] * 3, [0.301] * 3),
    "ratio": ([], [0.901] * 3, [0.899] * 3), "no_spread": ([], [0.79] * 5, [0.81] * 5),
    "truncated": ([], [0.89] * 3, [0.91] * 3), "reward_falls": ([0.5] * 50, [0.41] * 10, [0.39] * 10),
    "length_explodes": ([100.0] * 20, [399.0] * 5, [401.0] * 5),
    "reasoning_collapses": ([100.0] * 20, [50.5] * 2, [49.5] * 2), "format_alone": ([0.2] * 20, [0.49] * 2, [0.51] * 2),
    "copied_prompt": ([], [0.24] * 2, [0.26] * 2), "answer_untagged": ([], [0.74], [0.76]), "accuracy_falls": ([0.6], [0.41], [0.39]), "gradient": ([0.5] * 20, [4.9] * 3, [5.1] * 3),
    "reward_flat": ([0.3, 0.34] * 40, [0.346] * 20, [0.328] * 20), "skipped": ([], [0.0], [1.0]), "unscored": ([], [0.49] * 3, [0.51] * 3), "sampler": ([], [0.29] * 3, [0.31] * 3),
}  # fmt: skip


@pytest.mark.parametrize("name", ALARMS)
def test_each_limit_from_both_sides(name):
    before, fine, bad = EDGES[name]
    assert watched(name, before + fine)[-1] == [] and watched(name, before + bad)[-1] == [name]
    if len(bad) in (3, 5) and name != "length_explodes":
        assert watched(name, before + bad[:-1])[-1] == [], "it waits for all of its steps"
    if name == "ratio":
        assert watched(name, [1.099] * 3)[-1] == [] and watched(name, [1.101] * 3)[-1] == [name]


def heard(rows):
    """Which alarms were on in any step of these metrics, on top of healthy ones."""
    rows = [HEALTHY | row for row in rows]
    return {name for i in range(len(rows)) for name in active_alarms(ALARMS, rows[: i + 1])}


def test_shorter_answers_are_no_collapse_while_more_of_them_are_right():
    """Nor is a format that is learned with the answers; entropy alone is a collapse too."""
    tokens, success = "rollout/completion_tokens", "rollout/success_rate"
    shorter = [{tokens: 160.0 - 30 * i, success: 0.2 + 0.05 * i} for i in range(5)]
    assert heard(shorter) == set()
    assert heard([row | {success: 0.2} for row in shorter]) == {"reasoning_collapses"}
    entropy = [{"rollout/entropy": 0.5 / 2**i, success: 0.2} for i in range(5)]
    assert heard(entropy) == {"reasoning_collapses"}
    assert heard([row | {success: 0.2 + i / 20} for i, row in enumerate(entropy)]) == set()
    form = [{"reward/format_mean": 0.1 + i / 4, success: 0.1 + i / 9} for i in range(4)]
    assert heard(form) == set()
    assert heard([row | {success: 0.1} for row in form]) == {"format_alone"}


def test_an_alarm_about_two_metrics_needs_both():
    rows = [{"reward/format_mean": value} for value in (0.1, 0.9, 0.9, 0.9)]
    assert active_alarms(ALARMS, rows) == [], "a run without that metric"


def test_missing_metrics_are_no_alarm():
    assert active_alarms(ALARMS, [{"eval/accuracy": 0.0}]) == []
    assert (
        active_alarms(
            ALARMS, [HEALTHY | {"train/kl_divergence": 9.0}] * 5 + [{"eval/accuracy": 0.0}]
        )
        == []
    )


def test_alarms_that_mean_nothing_are_left_out():
    every = set(ALARMS)
    grpo, gspo = OBJECTIVES["grpo"].ratio_level, OBJECTIVES["gspo"].ratio_level
    assert set(alarms_for(grpo, Config())) == every
    assert set(alarms_for(gspo, Config())) == every - {"clipped"}, (
        "its narrow clip takes most, by design"
    )
    assert set(alarms_for(grpo, Config(top_p=0.9))) == every - {"sampler"}, (
        "a nucleus is a known gap"
    )
    short = Config(reward=["accuracy", "length_penalty"], reward_weights=[1.0, 0.1])
    assert set(alarms_for(grpo, short)) == every - {"reasoning_collapses"}, "it is asked for"


def test_in_fp32_sampler_and_trainer_are_closer():
    rows = [{"train/sampler_gap": 0.07}] * 3
    grpo = OBJECTIVES["grpo"].ratio_level
    assert active_alarms(alarms_for(grpo, Config(precision="bf16")), rows) == []
    fp32 = alarms_for(grpo, Config(precision="fp32"))
    assert active_alarms(fp32, rows) == ["sampler"]
    assert active_alarms(fp32, [{"train/sampler_gap": 1e-6}] * 3) == []


def test_a_policy_that_has_learned_may_be_sure_of_it():
    rows = [{"rollout/success_rate": 0.95, "rollout/entropy": 0.4 * 0.8**i} for i in range(30)]
    assert heard(rows) == set()


def test_the_demo_raises_none():
    """Five seeds of the whole demo, as they are in results/. Its completions grow six times as long, and should."""
    runs = {}
    for line in (ROOT / "results" / "demo.jsonl").read_text().splitlines():
        row = json.loads(line)
        runs.setdefault(row["seed"], []).append(row)
    assert len(runs) == 5
    for rows in runs.values():
        heard = {name for i in range(len(rows)) for name in active_alarms(ALARMS, rows[: i + 1])}
        assert not heard


def test_a_pretrained_model_that_unlearns_is_noticed_within_three_steps():
    """The runs of results/defaults.jsonl: the old prompt and reward; too high an lr; and those that learn."""
    runs = {}
    for line in (ROOT / "results" / "defaults.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.pop("kind") == "step":
            run = (row.pop("run"), row.pop("seed"))
            known = {k: v for k, v in row.items() if isinstance(v, float) and "alarm" not in k}
            runs.setdefault(run, []).append(known)
    first = {}
    for run, rows in runs.items():
        for step in range(len(rows)):
            for name in active_alarms(ALARMS, rows[: step + 1]):
                first.setdefault(run, {}).setdefault(name, step)
    expected = {"answer_untagged": 0, "copied_prompt": 2, "reasoning_collapses": 3}
    assert first["old", 42] == expected | {"format_alone": 3}
    same_lr = {"reasoning_collapses": 5, "format_alone": 5, "accuracy_falls": 6}
    assert first["old-same-lr", 42] == expected | same_lr
    assert first["lr-high", 42] == {"reasoning_collapses": 6, "accuracy_falls": 8}
    assert {("new", 42), ("new", 1)} <= runs.keys() and not {("new", 42), ("new", 1)} & first.keys()


def lines_of(monitor, values, start=1):
    for step, value in enumerate(values, start):
        monitor.add("train/kl_divergence", value)
        monitor.flush(step, 99)


def test_an_alarm_is_printed_when_it_begins_and_is_in_every_log(tmp_path, capsys):
    monitor = Monitor(ALARMS)
    monitor.open(tmp_path)
    lines_of(monitor, [0.2] * 6 + [0.0] * 15 + [0.2] * 4 + [0.0] * 25 + [0.2] * 4)
    monitor.close()
    out = capsys.readouterr().out
    assert out.count("ALARM kl: The policy is far from the reference") == 2, (
        "when it begins, not when it was off for a moment, and when it comes back"
    )
    rows = metrics(tmp_path)
    on = [row["step"] for row in rows if "alarm/kl" in row]
    assert out.count("| ALARM kl") == len(on), "each step's line says which are on"
    assert on[:4] == [3, 4, 5, 6] and all(row.get("alarm/kl", 1.0) == 1.0 for row in rows)
    log = EventAccumulator(str(tmp_path))
    log.Reload()
    assert [e.step for e in log.Scalars("alarm/kl")] == on
    (first, _) = log.Tensors("alarm/kl/text_summary")
    assert b"step 3: The policy is far" in first.tensor_proto.string_val[0]


def test_alarms_remember_over_a_resume(tmp_path, capsys):
    """Two steps above the limit before the resume and one after it are three; and what was said is not said again."""
    for start, values in ((0, [0.2, 0.2]), (2, [0.2]), (3, [0.2])):
        monitor = Monitor(ALARMS)
        monitor.open(tmp_path, start)
        assert len(monitor.rows) == start
        lines_of(monitor, values, start + 1)
        monitor.close()
    assert capsys.readouterr().out.count("ALARM kl:") == 1
    assert ["alarm/kl" in row for row in metrics(tmp_path)] == [False, False, True, True]


def test_alarms_remember_evaluations_of_long_ago(tmp_path, capsys):
    """Held-out accuracy that falls slowly, in a run with few evaluations, and over a resume."""
    accuracy = [{"eval/accuracy_low": low, "eval/accuracy_high": low + 0.1} for low in (0.6, 0.2)]
    for resumed in (False, True):
        folder = tmp_path / str(resumed)
        folder.mkdir()
        monitor = Monitor(ALARMS)
        monitor.open(folder)
        for step in range(1, LONGEST + 60):
            if resumed and step == LONGEST + 30:
                monitor.close()
                monitor = Monitor(ALARMS)
                monitor.open(folder, step - 1)
            held_out = accuracy[step > 1] if step in (1, LONGEST + 50) else {}
            for name, value in ({"train/grad_norm": 0.4} | held_out).items():
                monitor.add(name, value)
            monitor.flush(step, 999)
        monitor.close()
        assert len(monitor.rows) == LONGEST and len(monitor.evaluated) == 1
        on = [row["step"] for row in metrics(folder) if "alarm/accuracy_falls" in row]
        assert on == [LONGEST + 50]
