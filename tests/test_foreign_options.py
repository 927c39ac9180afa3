"""Options that people bring from the tiny-grpo tutorial, TRL and verl: one sentence that says what is here."""

from dataclasses import fields

import pytest

from support.command_line import parse_config
from support.config import Config
from support.errors import UserError
from support.foreign_options import ABSENT, OWNERS, TUTORIAL, VERL

OURS = {f"--{field.name}" for field in fields(Config)} | {"--resume", "--config"}
RENAMED = [(owner, name) for owner, options in OWNERS.items() for name in options]


def sentence(*argv):
    """What the command line says to these arguments."""
    with pytest.raises(UserError) as caught:
        parse_config(["--preset=tiny", *argv])
    text = str(caught.value)
    assert "\n" not in text and len(text) < 250 and text.endswith("."), text
    return text


@pytest.mark.parametrize(("owner", "name"), RENAMED)
def test_our_name_is_said(owner, name):
    """Of a flag with its value, one apart from it, and one without any: an option that is there, and whose it was."""
    ours, _ = OWNERS[owner][name]
    assert ours in OURS
    for argv in ([f"--{name}=8"], [f"--{name}", "8"], [f"--{name.replace('_', '-')}"]):
        text = sentence(*argv)
        assert f"{name} is the name that" in text and f"here it is {ours}" in text
        # A few names are used by two of them, with the same meaning; the first one is said.
        assert any(f"that {other} uses" in text for other in OWNERS if name in OWNERS[other])


@pytest.mark.parametrize("name", ABSENT)
def test_what_is_not_here_is_said(name):
    text = sentence(f"--{name}=1")
    assert f"There is no option {name} here: {ABSENT[name]}; leave it out." == text


def test_verls_paths_need_no_dashes():
    """Hydra's way: a path, an equals sign, a plus in front of what is new."""
    for argument, ours in {
        "actor_rollout_ref.rollout.n=8": "--group_size",
        "actor_rollout_ref.actor.ppo_mini_batch_size=64": "--train_batch_size (which counts sequences",
        "data.train_batch_size=1024": "--rollouts_per_step (questions;",
        "+actor_rollout_ref.actor.kl_loss_coef=0.001": "--kl_weight",
        "algorithm.adv_estimator=grpo": "--objective",
        "actor_rollout_ref.actor.optim.lr=1e-6": "--lr",
        "trainer.total_epochs=15": "--steps",
    }.items():
        assert f"that verl uses; here it is {ours}" in sentence(argument)


def test_no_name_of_ours_is_taken_for_a_foreign_one():
    for options in (*OWNERS.values(), ABSENT):
        assert not {f"--{name}" for name in options} & OURS
    assert "train_batch_size" not in VERL, "only verl's path is one; ours has the same last part"


@pytest.mark.parametrize("flag", ["--zzz", "--qqqqqqqq=3", "-x", "--x.y.z=1", "--" + "a" * 200])
def test_an_unknown_flag_lists_no_hundred(flag):
    assert "--help" in sentence(flag) or "did you mean" in sentence(flag)


def test_the_tutorials_names_that_are_ours_work():
    """Those of the tutorial's constants that have no other name here."""
    config, _ = parse_config([
        "--seed=42", "--train_batch_size=16", "--lr=5e-6", "--kl_weight=0.01", "--clip_eps=0.2", "--group_size=12",
        "--rollouts_per_step=32", "--epochs_per_step=1", "--max_norm=1.0", "--checkpoint_interval=20", "--top_p=1.0",
        "--temperature=1.0",
    ])  # fmt: skip
    assert config.group_size == 12 and not {"group_size", "kl_weight"} & TUTORIAL.keys()
