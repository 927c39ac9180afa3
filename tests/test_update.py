"""The whole update, from sampled completions to new weights, against a plain one that shares no
code with it.

Every option that shapes the mathematics is off its default, so that one which is not passed on, or
passed on twice, shows. The slow side computes each completion alone, with all its logits, in loops,
and steps with torch's own AdamW.
"""

import copy
from dataclasses import replace

import pytest
import steps
import torch

import train
from support.generation import Sampling
from support.model import load_model
from support.schedule import seed_step

FLAGS = [
    "--rollouts_per_step=4", "--group_size=5", "--max_new_tokens=40", "--train_batch_size=7", "--micro_batch_size=3",
    "--epochs_per_step=2", "--temperature=0.7", "--clip_eps=0.05", "--clip_eps_high=0.11", "--kl_weight=0.3", "--lr=3e-4",
    "--warmup_steps=4", "--weight_decay=0.1", "--max_norm=0.2", "--reward=tutorial",
]  # fmt: skip


def build(tmp_path, dataset, *flags):
    trainer = steps.build(tmp_path, dataset, *FLAGS, *flags)
    # The policy starts away from the reference, so that the KL has a gradient from the beginning.
    torch.manual_seed(5)
    with torch.no_grad():
        for p in trainer.policy.parameters():
            p += 0.01 * torch.randn_like(p)
    return trainer


def log_probs_alone(model, prompt, completion, temperature):
    """Log-probabilities of one completion: the whole sequence, no padding, no mask."""
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0] / temperature
    rows = torch.log_softmax(logits, -1)
    return torch.stack([rows[len(prompt) - 1 + i, token] for i, token in enumerate(completion)])


def plain_update(
    model, reference, prompts, completions, returns, batches, step, *, std, token_mean, kl_weight
):
    """One step of GRPO on `model`, in place; returns its mean loss, gradient norm and KL.

    `batches`: which completions go into each optimizer step, in order.
    """
    advantages = []
    for group in returns:
        mean = sum(group) / len(group)
        spread = (sum((r - mean) ** 2 for r in group) / (len(group) - 1)) ** 0.5
        advantages += [((r - mean) / (spread + 1e-4) if std else r - mean) for r in group]
    with torch.no_grad():
        old = [log_probs_alone(model, p, c, 0.7) for p, c in zip(prompts, completions, strict=True)]
        ref = [
            log_probs_alone(reference, p, c, 0.7) for p, c in zip(prompts, completions, strict=True)
        ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4 * step / 4, weight_decay=0.1)
    losses, norms, kls = [], [], []
    for batch in batches:
        terms = []
        for i in batch:
            new = log_probs_alone(model, prompts[i], completions[i], 0.7)
            ratio = torch.exp(new - old[i])
            gain = torch.minimum(
                ratio * advantages[i], torch.clamp(ratio, 0.95, 1.11) * advantages[i]
            )
            kl = (torch.exp(ref[i] - new) - (ref[i] - new) - 1).clamp(max=10)
            terms.append(-gain + kl_weight * kl)
            kls.append(kl.detach())
        loss = (
            torch.cat(terms).mean() if token_mean else torch.stack([x.mean() for x in terms]).mean()
        )
        optimizer.zero_grad()
        loss.backward()
        losses += [loss.item()] * len(batch)
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.2)))
        optimizer.step()
    return sum(losses) / len(losses), sum(norms) / len(norms), float(torch.cat(kls).mean())


@pytest.mark.parametrize(
    ("flags", "std", "token_mean", "kl_weight"),
    [
        ([], True, False, 0.3),
        (["--loss_agg_mode=token-mean", "--advantage_std=none"], False, True, 0.3),
        (["--objective=bnpo", "--kl_weight=0"], True, True, 0.0),
    ],
    ids=["grpo", "token-mean-without-std", "bnpo-without-kl"],
)
def test_the_update_equals_a_plain_one(tmp_path, few_questions, flags, std, token_mean, kl_weight):
    trainer = build(tmp_path, few_questions, *flags)
    policy = trainer.policy.model
    model, before = copy.deepcopy(policy), [p.clone() for p in policy.parameters()]
    reference = load_model("tiny/model", "fp32")
    step = 2  # of 4 warm-up steps
    groups = steps.sample(trainer, step=step)
    returns = torch.stack([g.returns for g in groups])
    returns[0, 0] += 0.25  # rewards of more than two values, and a spread in at least this group
    returns[1] = 1.0  # and one group without any
    groups = [replace(g, returns=r) for g, r in zip(groups, returns, strict=True)]

    # The whole step by the real loop; its buffer and its random numbers say what was in each batch.
    buffer = steps.one_step(trainer, groups, step=step)
    row = trainer.monitor.flush(step, 4)
    index = {id(e): i for i, e in enumerate(buffer.items)}
    drawn = buffer.mini_batches(7, 2, seed_step(trainer.config.seed, step))
    batches = [[index[id(e)] for e in batch] for batch in drawn]
    assert [len(b) for b in batches] == [7, 7, 6] * 2 and batches[:3] != batches[3:]

    completions = [c.ids for g in groups for c in g.completions]
    prompts = [g.question.prompt_ids for g in groups for _ in range(5)]
    loss, norm, kl = plain_update(
        model, reference, prompts, completions, returns.tolist(), batches, step,
        std=std, token_mean=token_mean, kl_weight=kl_weight,
    )  # fmt: skip

    (optimized,) = trainer.optimizer.param_groups
    assert optimized["lr"] == pytest.approx(1.5e-4) and row["train/skipped_steps"] == 0
    assert 0 < row["train/clipped_share"] < 1, "the clip must act, or this test does not see it"
    assert row["train/grad_norm"] > 0.2, "and so must the clipping of the gradient"
    assert row["train/grad_norm"] == pytest.approx(norm, rel=0.01)
    assert row["train/loss"] == pytest.approx(loss, rel=0.01, abs=1e-4)
    assert row.get("train/kl_divergence", kl) == pytest.approx(kl, rel=0.01)
    for found, plain, start in zip(policy.parameters(), model.parameters(), before, strict=True):
        moved = (plain - start).norm()
        assert moved > 0
        assert (found - plain).norm() < 0.01 * moved


def test_the_samplers_settings_are_the_runs(tmp_path, few_questions, monkeypatch):
    trainer = build(tmp_path, few_questions, "--top_p=0.9", "--rollout_batch_size=11")
    asked, real = [], train.rollout
    monkeypatch.setattr(train, "rollout", lambda *args: asked.append(args[3:5]) or real(*args))
    steps.sample(trainer, 2)
    assert asked == [(5, Sampling(40, temperature=0.7, top_p=0.9, batch_size=11))]
