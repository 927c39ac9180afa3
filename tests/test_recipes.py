"""The objectives inside the trainer: what each choice does to sampling, to the buffer and to the gradient.

The equations have their own tests (test_objectives.py); here a whole step runs on the bundled model.
"""

import pytest
import torch
from test_train import build

import train
from answers import is_correct
from log_probs import LOGITS_AT_A_TIME, token_log_probs
from loss import OBJECTIVES, has_spread

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


def moved(t, size):
    """The trainer with its policy a little away from the one that sampled, and from the reference."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in t.model.parameters():
            p += size * torch.randn_like(p)
    return t


def caught(t):
    """A list into which each optimizer step puts its gradient, and moves nothing."""
    found = []
    t.optimizer.step = lambda: found.append(
        torch.cat([p.grad.clone().flatten() for p in t.model.parameters()])
    )
    return found


@pytest.mark.parametrize("flags", CHOICES, ids=" ".join)
def test_micro_batches_never_change_the_gradient_of_any_objective(tmp_path, flags):
    """One optimizer step on data that a slightly other policy sampled, in micro-batches of 3 and all at once."""
    t, buffer = (
        build(tmp_path, "--epochs_per_step=2", "--max_norm=1e9", *flags),
        train.ReplayBuffer(),
    )
    train.seed_step(5, 1)
    groups = train.mark(t, train.ask(t, t.config.rollouts_per_step))
    train.remember(t, buffer, groups, train.compare(t, groups))
    found = caught(moved(t, 0.003))
    for size in (100, 3):
        t.micro_batch_size = size
        assert train.optimizer_step(t, buffer.items)
    full, part = found
    assert full.norm() > 0
    assert (part - full).norm() / full.norm() <= 1e-5


def test_dynamic_sampling_replaces_the_groups_without_spread(tmp_path):
    t = build(
        tmp_path,
        "--objective=dapo",
        "--rollouts_per_step=12",
        "--group_size=2",
        "--dataset=tiny/task",
    )
    train.seed_step(t.config.seed, 1)
    first = train.mark(t, train.ask(t, 12))
    kept = [i for i, g in enumerate(first) if not g.idle]
    assert [g.idle for g in first] == [not has_spread(g.returns) for g in first]
    assert 0 < len(kept) < 12, (
        "some groups of two must be without spread, or nothing is replaced here"
    )
    groups = train.replace_idle(t, first)
    assert len(groups) == 12 and all(has_spread(g.returns) for g in groups)
    assert all(groups[i] is first[i] for i in kept)
    names = [g.question.question for g in groups]
    assert len(set(names)) == 12, "a replacement is a new question"
    row = t.monitor.flush(1, 1)
    assert row["rollout/rounds"] > 1 and row["rollout/idle_groups"] == 0
    assert t.questions.position >= 24 - len(kept)
    with t.monitor.time("time/rollout"), t.monitor.time("time/rollout"):
        pass
    assert t.monitor.sums["time/rollout"][1] == 1, "the rollouts of a step add up"


def test_dynamic_sampling_is_bounded(tmp_path):
    """A reward that never differs: `dynamic_sampling` rollouts, then the step goes on with what it has."""
    (tmp_path / "same.py").write_text(
        "def same(prompts, completions, **columns):\n    return [1.0] * len(completions)\n"
    )
    reward = f"--reward={tmp_path}/same.py:same"
    t = build(
        tmp_path / "run", "--dynamic_sampling=3", reward, "--rollouts_per_step=4", "--group_size=6"
    )
    groups = train.replace_idle(t, train.mark(t, train.ask(t, 4)))
    assert len(groups) == 4 and t.questions.position == 12
    row = t.monitor.flush(1, 1)
    assert (
        row["rollout/rounds"] == 3
        and row["rollout/idle_groups"] == 4
        and row["rollout/no_spread_share"] == 1
    )


def test_dynamic_sampling_asks_for_as_many_as_are_missing(tmp_path, monkeypatch):
    """Of 4 groups 3 are idle, then 1, then none: 4 + 3 + 1 questions; found groups take the places in order."""
    t = build(tmp_path, "--dynamic_sampling=9", "--rollouts_per_step=4", "--group_size=6")
    spread = iter([0, 1, 0, 0, 1, 0, 1, 1])
    real = train.mark
    monkeypatch.setattr(
        train,
        "mark",
        lambda t, groups: [train.replace(g, idle=not next(spread)) for g in real(t, groups)],
    )
    groups = train.replace_idle(t, train.mark(t, train.ask(t, 4)))
    assert t.questions.position == 8 and not any(g.idle for g in groups)
    again = train.QuestionStream(t.questions.questions, t.config.seed).take(8)
    assert [g.question.question for g in groups] == [again[i].question for i in (4, 1, 6, 7)]


def test_idle_is_decided_before_the_kl(tmp_path):
    """A KL differs from completion to completion, so after it no two rewards are equal."""
    (tmp_path / "same.py").write_text(
        "def same(prompts, completions, **columns):\n    return [1.0] * len(completions)\n"
    )
    t = build(tmp_path / "run", "--objective=rloo", f"--reward={tmp_path}/same.py:same")
    with torch.no_grad():
        next(t.model.parameters()).mul_(1.01)
    groups = train.mark(t, train.ask(t, 2))
    assert all(g.idle and has_spread(g.returns) for g in groups)


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
    row = t.monitor.flush(1, 1)
    for name, right in (("rollout/tokens_right", True), ("rollout/tokens_wrong", False)):
        lengths = [
            len(c.ids)
            for g in groups
            for c in g.completions
            if is_correct(c.text, g.question.reference) == right
        ]
        assert row.get(name, 0) == pytest.approx(sum(lengths) / max(1, len(lengths)))
    assert "rollout/rounds" not in row and "rollout/idle_groups" not in row

    everything = build(tmp_path / "all", "--max_new_tokens=10")
    train.remember(everything, buffer, groups, advantages)
    assert len(buffer.items) == cut + whole


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
    assert t.monitor.flush(1, 1)["rollout/group_baseline"] == pytest.approx(0.5, abs=0.2)


def test_several_rewards_keep_their_weights(tmp_path):
    """GDPO: each reward compared in its group, then added up with its own weight, then whitened."""
    t = build(
        tmp_path,
        "--objective=gdpo",
        "--reward",
        "accuracy",
        "length_penalty",
        "--reward_weights",
        "1",
        "0.3",
    )
    groups = train.mark(t, train.ask(t, 3))
    for g in groups:
        penalties = [-len(c.ids) / 48 for c in g.completions]
        assert g.rewards[1].tolist() == pytest.approx(penalties)
        assert g.rewards[0].tolist() == [
            is_correct(c.text, g.question.reference) for c in g.completions
        ]
    table = torch.stack([g.rewards for g in groups]).double()  # (Q, K, G)
    centred = table - table.mean(-1, keepdim=True)
    relative = centred / (table.std(-1, keepdim=True) + 1e-4)
    total = relative[:, 0] + 0.3 * relative[:, 1]
    expected = (total - total.mean()) / (total.std() + 1e-4)
    torch.testing.assert_close(train.compare(t, groups).double(), expected, rtol=1e-4, atol=1e-4)


def test_the_overlong_penalty_knows_the_budget(tmp_path):
    """The last fifth of 10 tokens: whoever used all of them pays 1, nine of them one half."""
    t = build(tmp_path, "--reward=soft_overlong", "--max_new_tokens=10")
    groups = train.mark(t, train.ask(t, 3))
    paid = {
        len(c.ids): float(r) for g in groups for c, r in zip(g.completions, g.returns, strict=True)
    }
    assert paid[10] == -1.0 and all(r == -max(0, n - 8) / 2 for n, r in paid.items())


def test_the_constant_normaliser_scales_the_loss(tmp_path):
    """dr_grpo divides by loss_scale_factor, and by max_new_tokens without one."""
    losses = {}
    for factor in (None, 48, 96):
        flags = [f"--loss_scale_factor={factor}"] if factor else []
        t, buffer = (
            build(tmp_path / str(factor), "--objective=dr_grpo", *flags),
            train.ReplayBuffer(),
        )
        train.seed_step(1, 1)
        groups = train.mark(t, train.ask(t, 3))
        train.remember(t, buffer, groups, train.compare(t, groups))
        train.learn(t, buffer, 1, torch.Generator().manual_seed(0))
        losses[factor] = t.monitor.flush(1, 1)["train/loss"]
    assert losses[48] == losses[None] != 0
    assert losses[48] == pytest.approx(2 * losses[96])


def log_probs_alone(model, prompt, completion):
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
    rows = torch.log_softmax(logits, -1)
    return torch.stack([rows[len(prompt) - 1 + i, token] for i, token in enumerate(completion)])


@torch.no_grad()
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_in_the_reward(tmp_path, estimator):
    """R − β Σ_t KL_t, one sequence at a time; and the loss has no KL of its own."""
    t = build(tmp_path, "--objective=rloo", "--kl_weight=0.5", f"--kl_estimator={estimator}")
    total, tokens = 0.0, 0
    moved(t, 0.01)
    for g in train.mark(t, train.ask(t, 3)):
        for c, r in zip(g.completions, g.returns, strict=True):
            prompt, right = g.question.prompt_ids, is_correct(c.text, g.question.reference)
            d = log_probs_alone(t.model, prompt, c.ids) - log_probs_alone(
                t.reference.model, prompt, c.ids
            )
            kl = (d if estimator == "k1" else torch.exp(-d) + d - 1).sum()
            total, tokens = total + float(kl), tokens + len(c.ids)
            assert kl.abs() > 1e-3
            assert float(r) == pytest.approx(right - 0.5 * float(kl), abs=1e-4)
    row = t.monitor.sums["train/kl_divergence"]
    assert row[0] / row[1] == pytest.approx(total / tokens, rel=1e-3)
    assert t.loss.objective.kl_in_loss is False


@torch.no_grad()
@pytest.mark.parametrize(
    "flags", [["--temperature=0.7"], ["--temperature=1.3", "--top_p=0.8"]], ids=" ".join
)
def test_the_sampler_notes_what_it_drew_with(tmp_path, flags):
    """Against the filters written out: temperature first, then the smallest set of tokens with top_p of the mass."""
    t = build(tmp_path, *flags, "--rollout_batch_size=3")
    temperature, top_p = t.config.temperature, t.config.top_p
    groups = train.ask(t, 2)
    noted = [x for g in groups for c in g.completions for x in c.log_probs]
    assert t.monitor.flush(1, 1)["rollout/entropy"] == pytest.approx(-sum(noted) / len(noted))
    for g in groups:
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
    assert 0.25 * len(chosen) - 1 <= chosen.sum() <= 0.3 * len(chosen), (
        "a quarter, and what is equal to its last"
    )
    assert entropies[chosen].min() >= entropies[~chosen].max() - 1e-5
    one = train.recall(t, buffer.items[:1], old=False, ref=False, top_entropy=0.01)
    assert one[0].policy_mask.sum() == 1, "never none"


def test_the_gradient_of_the_exact_kl_and_of_the_entropy(tmp_path):
    """A whole optimizer step with `full`, against one completion at a time with all its logits; so is its entropy."""
    flags = [
        "--kl_weight=0.3",
        "--kl_estimator=full",
        "--entropy_weight=0.2",
        "--temperature=0.8",
        "--max_norm=1e9",
    ]
    t, buffer = build(tmp_path, *flags, "--micro_batch_size=5"), train.ReplayBuffer()
    groups = train.mark(t, train.ask(t, 3))
    advantages = train.compare(t, groups)
    train.remember(t, buffer, groups, advantages)
    found = caught(moved(t, 0.01))
    assert train.optimizer_step(t, buffer.items)
    total, kls, entropies = 0.0, [], []
    for g, row in zip(groups, advantages, strict=True):
        for c, a in zip(g.completions, row, strict=True):
            ids, start = (
                torch.tensor([g.question.prompt_ids + c.ids]),
                len(g.question.prompt_ids) - 1,
            )
            rows = torch.log_softmax(t.model(ids).logits[0, start:-1] / 0.8, -1)
            with torch.no_grad():
                others = torch.log_softmax(t.reference.model(ids).logits[0, start:-1] / 0.8, -1)
            x = rows.gather(-1, torch.tensor(c.ids)[:, None])[:, 0]
            kl, entropy = (rows.exp() * (rows - others)).sum(-1), -(rows.exp() * rows).sum(-1)
            total = total + (-torch.exp(x - x.detach()) * a + 0.3 * kl - 0.2 * entropy).mean() / 24
            kls.append(kl.detach())
            entropies.append(entropy.detach())
    total.backward()
    plain = torch.cat([p.grad.flatten() for p in t.model.parameters()])
    assert (found[0] - plain).norm() / plain.norm() < 1e-4
    row = t.monitor.flush(1, 1)
    assert row["train/kl_divergence"] == pytest.approx(float(torch.cat(kls).mean()), rel=1e-3)
    assert row["train/entropy"] == pytest.approx(float(torch.cat(entropies).mean()), rel=1e-3)
    assert row["train/loss"] == pytest.approx(float(total.detach()), rel=1e-3)


def test_exact_kl_and_entropy_over_the_vocabulary(monkeypatch):
    """Values and gradients of the pieces against torch.distributions, on the whole."""
    monkeypatch.setitem(LOGITS_AT_A_TIME, "cpu", 40)
    torch.manual_seed(0)
    logits, others = torch.randn(7, 11), torch.randn(7, 11)
    logits[:, 10], others[:, 10] = (
        torch.finfo(torch.bfloat16).min,
        -torch.inf,
    )  # a token that the model never says
    logits.requires_grad_()
    tokens, weights = torch.randint(10, (7,)), torch.randn(3, 7)
    found = token_log_probs(logits, tokens, 0.7, reference=others)
    policy, reference = (
        torch.distributions.Categorical(logits=x[:, :10] / 0.7) for x in (logits, others)
    )
    expected = (
        policy.log_prob(tokens),
        policy.entropy(),
        torch.distributions.kl_divergence(policy, reference),
    )
    for a, b, w in zip(found, expected, weights, strict=True):
        torch.testing.assert_close(a, b)
        gradients = (
            torch.autograd.grad((x * w).sum(), logits, retain_graph=True)[0] for x in (a, b)
        )
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


def test_a_greedy_completion_is_not_drawn(tmp_path):
    """So it has no log-probability, and the evaluation does not pay for noting one."""
    t = build(tmp_path)
    ((greedy,),) = train.rollout(
        t.model, t.tokenizer, t.questions.take(1), 1, train.Sampling(20, temperature=0.0)
    )
    assert greedy.ids and greedy.log_probs is None
