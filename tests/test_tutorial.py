"""The baseline of the speed benchmark computes what train.py computes, or comparing their seconds
would say nothing.

Both get the same completions, the same returns and the same policy, which is no longer the one that
sampled, so that the ratios are not 1 and the clip acts.
"""

import copy
from dataclasses import replace

import pytest
import torch
from steps import build, fill, sample

import train
from benchmarks import tutorial
from support.model import build_optimizer, load_model

FLAGS = [
    "--rollouts_per_step=4", "--group_size=5", "--max_new_tokens=40", "--train_batch_size=20", "--micro_batch_size=3",
    "--epochs_per_step=2", "--temperature=0.7", "--clip_eps=0.05", "--lr=3e-4", "--weight_decay=0.1", "--max_norm=0.2",
    "--reward=tutorial",
]  # fmt: skip


def nudge(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01 * torch.randn_like(p)


def rollout(trainer):
    """Scored groups: one without any spread, and at least one with rewards of more than two
    values."""
    groups = sample(trainer)
    returns = torch.stack([g.returns for g in groups])
    returns[0, 0] += 0.25
    returns[1] = 1.0
    return [replace(g, returns=r) for g, r in zip(groups, returns, strict=True)]


def tutorials_update(trainer, groups, moved):
    """The tutorial's step from the weights of the trainer, on a copy: loss, gradient norm,
    weights."""
    model, config = copy.deepcopy(trainer.policy.model), trainer.config
    reference = load_model("tiny/model", "fp32") if config.kl_weight else None
    rows = []
    for g in groups:
        completions = [c.ids for c in g.completions]
        rows += tutorial.make_rows(model, reference, g.question, completions, g.returns, config)
    model.load_state_dict(moved)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(3)).tolist()
    optimizer = build_optimizer(model, config)
    loss, norm = tutorial.update(model, optimizer, [rows[i] for i in order], config)
    return loss, norm, list(model.parameters())


@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_the_tutorials_update_is_ours(tmp_path, few_questions, kl_weight):
    trainer = build(tmp_path, few_questions, *FLAGS, f"--kl_weight={kl_weight}")
    policy = trainer.policy.model
    nudge(policy, 5)  # away from the reference
    groups = rollout(trainer)
    buffer = fill(trainer, groups)
    assert len({len(e.sequences) for e in buffer.items}) > 1, "there must be padding"

    moved = copy.deepcopy(policy)
    nudge(moved, 6)  # and away from the policy that sampled
    loss, norm, theirs = tutorials_update(trainer, groups, moved.state_dict())
    policy.load_state_dict(moved.state_dict())
    # Two epochs make the real loop keep the old log-probabilities; here one of them is compared.
    generator = torch.Generator().manual_seed(3)
    (mini_batch,) = buffer.mini_batches(20, 1, generator)
    train.update(trainer, mini_batch)
    row = trainer.monitor.flush(1, 1)

    assert row["train/clipped_share"] > 0, "the clip must act, or this test does not see it"
    assert row["train/grad_norm"] > 0.2, "and so must the clipping of the gradient"
    assert loss == pytest.approx(row["train/loss"], rel=1e-4, abs=1e-6)
    assert norm == pytest.approx(row["train/grad_norm"], rel=1e-4)
    for ours, other, start in zip(policy.parameters(), theirs, moved.parameters(), strict=True):
        step = (ours - start).norm()
        assert step > 0
        # Adam's first step makes much of a gradient that is almost 0.
        assert (other - ours).norm() < 0.01 * step


def test_a_whole_step_of_the_tutorial_moves_the_policy(tmp_path, few_questions, tokenizer):
    """Sampling included: every question is asked, its tokens are counted, and the weights move."""
    trainer = build(tmp_path, few_questions, *FLAGS, "--kl_weight=0.1", "--temperature=1")
    model, config = trainer.policy.model, trainer.config
    before = [p.clone() for p in model.parameters()]
    torch.manual_seed(0)
    found = tutorial.step(
        model, load_model("tiny/model", "fp32"), tokenizer, build_optimizer(model, config), trainer.questions.take(4),
        trainer.rewards, config,
    )  # fmt: skip
    assert 20 <= found["tokens"] <= 20 * config.max_new_tokens
    assert all(found[part] > 0 for part in ("rollout", "log_probs", "update", "grad_norm"))
    assert any((p - b).abs().max() > 0 for p, b in zip(model.parameters(), before, strict=True))
