"""The objectives inside the trainer: what each choice does to sampling, to the buffer and to the gradient.

The equations have their own tests (test_objectives.py); here a whole step runs on the bundled model.
"""

import pytest
import torch
from test_train import build

import train
from loss import OBJECTIVES, has_spread
from model import token_log_probs
from reward import is_correct

CHOICES = [
    *([f"--objective={name}"] for name in OBJECTIVES),
    ["--kl_weight=0.3", "--kl_estimator=full"],
    ["--kl_weight=0.3", "--kl_estimator=k3-ratio"],
    ["--kl_weight=0.3", "--kl_estimator=k1+", "--clip_ratio_c=3"],
    ["--entropy_weight=0.1"],
    ["--top_entropy=0.3"],
    ["--sampler_correction=token_truncate", "--sampler_cap=1.0001"],
    ["--sampler_correction=sequence_mask", "--top_p=0.9"],
]


@pytest.mark.parametrize("flags", CHOICES, ids=" ".join)
def test_micro_batches_never_change_the_gradient_of_any_objective(tmp_path, flags):
    """One optimizer step on data that a slightly other policy sampled, in micro-batches of 3 and all at once."""
    t, buffer = build(tmp_path, "--epochs_per_step=2", "--max_norm=1e9", *flags), train.ReplayBuffer()
    train.seed_step(t.config.seed, 1)
    groups = train.mark(t, train.ask(t, t.config.rollouts_per_step))
    train.remember(t, buffer, groups, train.compare(t, groups))
    torch.manual_seed(3)
    with torch.no_grad():
        for p in t.model.parameters():
            p += 0.003 * torch.randn_like(p)
    found = []
    t.optimizer.step = lambda: found.append(torch.cat([p.grad.clone().flatten() for p in t.model.parameters()]))
    for size in (100, 3):
        object.__setattr__(t.config, "micro_batch_size", size)
        assert train.optimizer_step(t, buffer.items)
    full, part = found
    assert full.norm() > 0
    assert (part - full).norm() / full.norm() <= 1e-5


def test_dynamic_sampling_replaces_the_groups_without_spread(tmp_path):
    t = build(tmp_path, "--objective=dapo", "--rollouts_per_step=12", "--group_size=2")
    train.seed_step(t.config.seed, 1)
    first = train.mark(t, train.ask(t, 12))
    kept = [i for i, g in enumerate(first) if not g.idle]
    assert [g.idle for g in first] == [not has_spread(g.returns) for g in first]
    assert 0 < len(kept) < 12, "some groups of two must be without spread, or nothing is replaced here"
    groups = train.replace_idle(t, first)
    assert len(groups) == 12 and all(has_spread(g.returns) for g in groups)
    assert all(groups[i] is first[i] for i in kept)
    names = [g.question.question for g in groups]
    assert len(set(names)) == 12, "a replacement is a new question"
    row = t.monitor.flush(1, 1)
    assert row["rollout/rounds"] > 1 and row["rollout/idle_groups"] == 0
    assert t.questions.position >= 24 - len(kept)


def test_dynamic_sampling_is_bounded(tmp_path):
    """A reward that never differs: `dynamic_sampling` rollouts, then the step goes on with what it has."""
    (tmp_path / "same.py").write_text(
        "def same(prompts, completions, **columns):\n    return [1.0] * len(completions)\n"
    )
    reward = f"--reward={tmp_path}/same.py:same"
    t = build(tmp_path / "run", "--dynamic_sampling=3", reward, "--rollouts_per_step=4", "--group_size=6")
    groups = train.replace_idle(t, train.mark(t, train.ask(t, 4)))
    assert len(groups) == 4 and t.questions.position == 12
    row = t.monitor.flush(1, 1)
    assert row["rollout/rounds"] == 3 and row["rollout/idle_groups"] == 4 and row["rollout/no_spread_share"] == 1


def test_truncated_completions_are_compared_but_not_trained_on(tmp_path):
    t = build(tmp_path, "--mask_truncated=true", "--max_new_tokens=10")
    groups = train.mark(t, train.ask(t, 3))
    cut = sum(c.truncated for g in groups for c in g.completions)
    whole = sum(not c.truncated for g in groups for c in g.completions)
    assert cut and whole
    advantages, buffer = train.compare(t, groups), train.ReplayBuffer()
    train.remember(t, buffer, groups, advantages)
    assert len(buffer.items) == whole and max(e.num_actions for e in buffer.items) <= 10
    expected = [a for g, row in zip(groups, advantages, strict=True) for c, a in zip(g.completions, row, strict=True)
                if not c.truncated]  # fmt: skip
    assert [e.advantages for e in buffer.items] == expected


def test_nothing_left_to_train_on_moves_nothing(tmp_path):
    """Every completion truncated: an empty buffer is no step and no error."""
    t = build(tmp_path, "--mask_truncated=true", "--max_new_tokens=1")
    before = [p.clone() for p in t.model.parameters()]
    groups, buffer = train.mark(t, train.ask(t, 2)), train.ReplayBuffer()
    train.remember(t, buffer, groups, train.compare(t, groups))
    assert not buffer.items
    train.learn(t, buffer, 1, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(before, t.model.parameters(), strict=True))


def test_what_cannot_be_scored_is_in_no_mean(tmp_path):
    (tmp_path / "r.py").write_text(
        "def some(prompts, completions, **columns):\n    return [None if i % 3 == 0 else i % 2 for i in range(len(completions))]\n"
    )
    t = build(tmp_path / "run", f"--reward={tmp_path}/r.py:some")
    groups, buffer = train.mark(t, train.ask(t, 3)), train.ReplayBuffer()
    train.remember(t, buffer, groups, train.compare(t, groups))
    assert len(buffer.items) == 16


def log_probs_alone(model, prompt, completion):
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
    rows = torch.log_softmax(logits, -1)
    return torch.stack([rows[len(prompt) - 1 + i, token] for i, token in enumerate(completion)])


@torch.no_grad()
def test_kl_in_the_reward(tmp_path):
    """R − β Σ_t KL_t, one sequence at a time; and the loss has no KL of its own."""
    t = build(tmp_path, "--objective=rloo", "--kl_weight=0.5")
    torch.manual_seed(3)
    for p in t.model.parameters():
        p += 0.01 * torch.randn_like(p)
    for g in train.mark(t, train.ask(t, 3)):
        for c, r in zip(g.completions, g.returns, strict=True):
            prompt, right = g.question.prompt_ids, is_correct(c.text, g.question.reference)
            kl = (log_probs_alone(t.model, prompt, c.ids) - log_probs_alone(t.reference.model, prompt, c.ids)).sum()
            assert kl.abs() > 1e-3
            assert float(r) == pytest.approx(right - 0.5 * float(kl), abs=1e-4)
    assert t.loss.objective.kl_in_loss is False and "train/kl_divergence" in t.monitor.sums


@torch.no_grad()
@pytest.mark.parametrize("flags", [["--temperature=0.7"], ["--temperature=1.3", "--top_p=0.8"]], ids=" ".join)
def test_the_sampler_notes_what_it_drew_with(tmp_path, flags):
    """Against the filters written out: temperature first, then the smallest set of tokens with top_p of the mass."""
    t = build(tmp_path, *flags, "--rollout_batch_size=3")
    temperature, top_p = t.config.temperature, t.config.top_p
    for g in train.ask(t, 2):
        for c in g.completions:
            prompt = g.question.prompt_ids
            logits = t.model(input_ids=torch.tensor([prompt + c.ids])).logits[0] / temperature
            for i, token in enumerate(c.ids):
                probs = torch.softmax(logits[len(prompt) - 1 + i], -1)
                ranked = probs.sort(descending=True)
                before = ranked.values.cumsum(-1) - ranked.values
                kept = ranked.indices[before < top_p]
                assert token in kept
                expected = (probs[token] / probs[kept].sum()).log()
                assert c.log_probs[i] == pytest.approx(float(expected), abs=1e-3)


def test_the_gap_between_sampler_and_trainer_is_measured(tmp_path):
    gaps = {}
    for top_p in (1.0, 0.6):
        t = build(tmp_path / str(top_p), f"--top_p={top_p}")
        groups, buffer = train.mark(t, train.ask(t, 3)), train.ReplayBuffer()
        train.remember(t, buffer, groups, train.compare(t, groups))
        train.learn(t, buffer, 1, torch.Generator().manual_seed(0))
        gaps[top_p] = t.monitor.flush(1, 1)["train/sampler_gap"]
    assert gaps[1.0] < 1e-4 and gaps[0.6] > 0.01


def test_the_tokens_of_highest_entropy(tmp_path):
    t = build(tmp_path, "--top_entropy=0.25")
    groups, buffer = train.mark(t, train.ask(t, 3)), train.ReplayBuffer()
    train.remember(t, buffer, groups, train.compare(t, groups))
    with torch.no_grad():
        entropies = torch.cat([t.policy(train.pad_batch([e]))[1][0] for e in buffer.items])
    chosen = torch.cat([e.policy_mask for e in buffer.items])
    assert 0.25 * len(chosen) - 1 <= chosen.sum() <= 0.3 * len(chosen), "a quarter, and what is equal to its last"
    assert entropies[chosen].min() >= entropies[~chosen].max() - 1e-5


def test_exact_kl_and_entropy_over_the_vocabulary(monkeypatch):
    """Values and gradients of the pieces against torch.distributions, on the whole."""
    monkeypatch.setattr("model.LOGITS_AT_A_TIME", 40)
    torch.manual_seed(0)
    logits, others = torch.randn(7, 11, requires_grad=True), torch.randn(7, 11)
    tokens, weights = torch.randint(11, (7,)), torch.randn(3, 7)
    found = token_log_probs(logits, tokens, 0.7, others)
    policy, reference = (torch.distributions.Categorical(logits=x / 0.7) for x in (logits, others))
    expected = policy.log_prob(tokens), policy.entropy(), torch.distributions.kl_divergence(policy, reference)
    for a, b, w in zip(found, expected, weights, strict=True):
        torch.testing.assert_close(a, b)
        gradients = (torch.autograd.grad((x * w).sum(), logits, retain_graph=True)[0] for x in (a, b))
        torch.testing.assert_close(*gradients)


def test_the_entropy_bonus_raises_the_entropy_and_moves_towards_its_target(tmp_path):
    """On the same completions, whose rewards say nothing: only the bonus moves the policy. Its weight grows by 0.005
    below the target."""
    t = build(tmp_path, "--entropy_weight=0.5", "--entropy_target=5", "--lr=1e-4")
    groups, buffer = train.mark(t, train.ask(t, 3)), train.ReplayBuffer()
    train.remember(t, buffer, groups, train.compare(t, groups) * 0)

    def entropy():
        with torch.no_grad():
            return torch.cat([t.policy(train.pad_batch([e]))[1][0] for e in buffer.items]).mean()

    before = entropy()
    for _ in range(3):
        train.learn(t, buffer, 1, torch.Generator().manual_seed(0))
    assert entropy() > before + 0.01
    assert float(t.loss.entropy_weight) == pytest.approx(0.515)
