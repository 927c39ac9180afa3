"""The baseline of the speed benchmark computes what train.py computes, or comparing their seconds would say nothing.

Both get the same completions, the same returns and the same policy, which is no longer the one that sampled, so that
the ratios are not 1 and the clip acts.
"""

import copy
import dataclasses

import pytest
import torch

import train
from benchmarks import tutorial
from config import parse_config
from model import build_optimizer, load_model

FLAGS = [
    "--preset=tiny", "--device=cpu", "--rollouts_per_step=4", "--group_size=5", "--max_new_tokens=40", "--eval_interval=0",
    "--train_batch_size=20", "--micro_batch_size=3", "--epochs_per_step=2", "--temperature=0.7", "--clip_eps=0.05",
    "--lr=3e-4", "--weight_decay=0.1", "--max_norm=0.2", "--reward=tutorial",
]  # fmt: skip


def nudge(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01 * torch.randn_like(p)


def rollout(t):
    """Marked groups: one without any spread, and at least one with rewards of more than two values."""
    train.seed_step(t.config.seed, 1)
    groups = train.mark(t, train.ask(t, 4))
    returns = torch.stack([g.returns for g in groups])
    returns[0, 0] += 0.25
    returns[1] = 1.0
    return [dataclasses.replace(g, returns=r) for g, r in zip(groups, returns, strict=True)]


def tutorials_update(t, groups, config, moved):
    """The tutorial's step from the weights of `t` now, on a copy: loss, gradient norm, weights."""
    model = copy.deepcopy(t.model)
    reference = load_model("tiny/model", "fp32") if config.kl_weight else None
    rows = []
    for g in groups:
        rows += tutorial.remember(
            model, reference, g.question, [c.ids for c in g.completions], g.returns, config
        )
    model.load_state_dict(moved)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(3)).tolist()
    loss, norm = tutorial.learn(
        model, build_optimizer(model, config), [rows[i] for i in order], config
    )
    return loss, norm, list(model.parameters())


@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_the_tutorials_update_is_ours(tmp_path, kl_weight):
    config, _ = parse_config([*FLAGS, f"--kl_weight={kl_weight}"])
    t = train.build(config, None)
    t.monitor.open(tmp_path)
    nudge(t.model, 5)  # away from the reference
    groups, buffer = rollout(t), train.ReplayBuffer()
    train.remember(t, buffer, groups, train.compare(t, groups))
    assert {len(e.sequences) for e in buffer.items} != {len(buffer.items[0].sequences)}, (
        "there must be padding"
    )

    moved = copy.deepcopy(t.model)
    nudge(moved, 6)  # and away from the policy that sampled
    loss, norm, theirs = tutorials_update(t, groups, config, moved.state_dict())
    t.model.load_state_dict(moved.state_dict())
    object.__setattr__(
        config, "epochs_per_step", 1
    )  # two of them made `remember` keep the old log-probabilities
    train.learn(t, buffer, 10, torch.Generator().manual_seed(3))
    row = t.monitor.flush(1, 1)

    assert row["train/clipped_share"] > 0, "the clip must act, or this test does not see it"
    assert row["train/grad_norm"] > 0.2, "and so must the clipping of the gradient"
    assert loss == pytest.approx(row["train/loss"], rel=1e-4, abs=1e-6)
    assert norm == pytest.approx(row["train/grad_norm"], rel=1e-4)
    for ours, other, start in zip(t.model.parameters(), theirs, moved.parameters(), strict=True):
        step = (ours - start).norm()
        assert step > 0
        assert (
            other - ours
        ).norm() < 0.01 * step  # Adam's first step makes much of a gradient that is almost 0


def test_a_whole_step_of_the_tutorial_moves_the_policy(tokenizer):
    """Sampling included: every question is asked, its tokens are counted, and the weights move."""
    flags = ["--rollouts_per_step=4", "--kl_weight=0.1", "--temperature=1"]
    config, _ = parse_config([*FLAGS, *flags])
    t = train.build(config, None)
    before = [p.clone() for p in t.model.parameters()]
    torch.manual_seed(0)
    found = tutorial.step(
        t.model, load_model("tiny/model", "fp32"), tokenizer, build_optimizer(t.model, config), t.questions.take(4),
        t.rewards, config,
    )  # fmt: skip
    assert 20 <= found["tokens"] <= 20 * config.max_new_tokens
    assert all(found[part] > 0 for part in ("rollout", "log_probs", "update", "grad_norm"))
    assert any((p - b).abs().max() > 0 for p, b in zip(t.model.parameters(), before, strict=True))
