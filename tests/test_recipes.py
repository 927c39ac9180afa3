"""The objectives inside the trainer: what each choice does to sampling, to the buffer, to the
gradient.

The equations have their own tests (test_objectives.py); here a whole step runs on the bundled
model.
"""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from steps import build, fill, learn, one_step, sample

import train
from loss import rewards_differ
from objectives import equations, participation
from objectives.table import OBJECTIVES
from replay_buffer import pad_batch
from rollout import rollout
from support.answers import is_correct
from support.data import QuestionStream
from support.generation import Sampling
from support.pieces import LOGITS_AT_A_TIME

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
SAME = "def same(prompts, completions, **columns):\n    return [1.0] * len(completions)\n"


def move(trainer, size):
    """Put the policy a little away from the one that sampled, and from the reference."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in trainer.policy.parameters():
            p += size * torch.randn_like(p)


def catch(trainer):
    """A list into which each optimizer step puts its gradient; it moves nothing."""
    found = []
    trainer.optimizer.step = lambda: found.append(
        torch.cat([p.grad.clone().flatten() for p in trainer.policy.parameters()])
    )
    return found


def compare(trainer, groups):
    """The advantages (Q, G) of scored groups."""
    returns = torch.stack([g.returns for g in groups])
    rewards = torch.stack([g.rewards for g in groups], dim=1)
    return trainer.loss.advantages(returns, rewards, trainer.config.reward_weights)


def completions_of(groups):
    """Pairs of question and completion, in the order of the buffer."""
    return [(g.question, c) for g in groups for c in g.completions]


SAMPLED = {}  # by top_p, for the test below: before the update all objectives sample alike


def groups_of(trainer):
    """Groups of which each objective has something to learn, sampled once for all of them."""
    top_p = trainer.config.top_p
    if top_p not in SAMPLED:
        SAMPLED[top_p] = sample(trainer, step=2)  # one group with a single right answer
    return SAMPLED[top_p]


@pytest.mark.parametrize("flags", CHOICES, ids=" ".join)
def test_micro_batches_never_change_the_gradient_of_any_objective(tmp_path, few_questions, flags):
    """One update on data that a slightly other policy sampled, in micro-batches of 3 and as one."""
    trainer = build(tmp_path, few_questions, "--epochs_per_step=2", "--max_norm=1e9", *flags)
    buffer = fill(trainer, groups_of(trainer))
    move(trainer, 0.003)
    found = catch(trainer)
    for size in (100, 3):
        trainer.micro_batch.size = size
        train.update(trainer, buffer.items)
    assert trainer.skipped == 0
    full, part = found
    assert full.norm() > 0
    assert (part - full).norm() / full.norm() <= 1e-5


def test_dynamic_sampling_replaces_the_groups_of_equal_rewards(tmp_path):
    flags = ("--objective=dapo", "--rollouts_per_step=12", "--group_size=2")
    trainer = build(tmp_path, "tiny/task", *flags)
    first = sample(trainer)
    equal = [participation.zero_std(g, trainer.objective) for g in first]
    kept = [i for i, same in enumerate(equal) if not same]
    assert equal == [not rewards_differ(g.returns) for g in first]
    assert 0 < len(kept) < 12, "some groups of two must have equal rewards, or nothing is replaced"
    sample_more = partial(train.sample_and_score, trainer)
    groups = participation.replace_zero_std(first, sample_more, trainer.objective, trainer.monitor)
    assert len(groups) == 12 and all(rewards_differ(g.returns) for g in groups)
    assert all(groups[i] is first[i] for i in kept)
    names = [g.question.question for g in groups]
    assert len(set(names)) == 12, "a replacement is a new question"
    assert trainer.monitor.sums["time/rollout"][1] == 1, "the rollouts of a step add up"
    row = trainer.monitor.flush(1, 1)
    assert row["rollout/rounds"] > 1 and row["rollout/idle_groups"] == 0
    assert trainer.questions.position >= 24 - len(kept)


def test_dynamic_sampling_is_bounded(tmp_path, few_questions):
    """A reward that never differs: `dynamic_sampling` rollouts, then the step goes on as it is."""
    (tmp_path / "same.py").write_text(SAME)
    flags = ("--dynamic_sampling=3", "--rollouts_per_step=4", "--group_size=6")
    trainer = build(tmp_path, few_questions, f"--reward={tmp_path}/same.py:same", *flags)
    assert len(fill(trainer).items) == 24 and trainer.questions.position == 12
    row = trainer.monitor.flush(1, 1)
    assert row["rollout/rounds"] == 3 and row["rollout/idle_groups"] == 4
    assert row["rollout/no_spread_share"] == 1


def test_dynamic_sampling_asks_for_as_many_as_are_missing(tmp_path, few_questions):
    """Of 4 groups 3 have equal rewards, then 1, then none: 4 + 3 + 1 questions. Those that are
    found take the places in order."""
    flags = ("--dynamic_sampling=9", "--rollouts_per_step=4", "--group_size=6")
    trainer = build(tmp_path, few_questions, *flags)
    differ, asked = iter([0, 1, 0, 0, 1, 0, 1, 1]), []

    def sample_more(count):
        asked.append(count)
        groups = train.sample_and_score(trainer, count)
        return [replace(g, returns=torch.arange(6.0) * next(differ)) for g in groups]

    groups = participation.replace_zero_std(
        sample_more(4), sample_more, trainer.objective, trainer.monitor
    )
    assert asked == [4, 3, 1] and trainer.questions.position == 8
    assert all(rewards_differ(g.returns) for g in groups)
    again = QuestionStream(trainer.questions.questions, trainer.config.seed).take(8)
    assert [g.question.question for g in groups] == [again[i].question for i in (4, 1, 6, 7)]


def test_equal_rewards_are_noticed_before_the_kl(tmp_path, few_questions):
    """A KL differs from completion to completion, so with it no two returns are equal."""
    (tmp_path / "same.py").write_text(SAME)
    flags = ("--objective=rloo", "--dynamic_sampling=2", "--rollouts_per_step=2")
    reward = f"--reward={tmp_path}/same.py:same"
    trainer = build(tmp_path, few_questions, reward, "--train_batch_size=16", *flags)
    with torch.no_grad():
        next(trainer.policy.parameters()).mul_(1.01)
    returns = torch.stack([e.returns for e in fill(trainer).items]).view(2, 8)
    assert rewards_differ(returns).all()
    row = trainer.monitor.flush(1, 1)
    assert row["rollout/no_spread_share"] == 1 and row["rollout/idle_groups"] == 2


def test_truncated_completions_are_compared_but_not_trained_on(tmp_path, few_questions):
    trainer = build(tmp_path, few_questions, "--mask_truncated=true", "--max_new_tokens=10")
    groups = sample(trainer)
    pairs = completions_of(groups)
    whole = [not c.truncated for _, c in pairs]
    assert 0 < sum(whole) < 24
    buffer = fill(trainer, groups)
    assert len(buffer.items) == sum(whole) and max(e.num_actions for e in buffer.items) <= 10
    advantages = compare(trainer, groups).flatten().tolist()
    expected = [a for a, kept in zip(advantages, whole, strict=True) if kept]
    assert [float(e.advantages) for e in buffer.items] == expected
    row = trainer.monitor.flush(1, 1)
    for name, right in (("rollout/tokens_right", True), ("rollout/tokens_wrong", False)):
        lengths = [len(c.ids) for q, c in pairs if is_correct(c.text, q.reference) == right]
        assert row.get(name, 0) == pytest.approx(sum(lengths) / max(1, len(lengths)))
    assert "rollout/rounds" not in row and "rollout/idle_groups" not in row

    everything = build(tmp_path / "all", few_questions, "--max_new_tokens=10")
    assert len(fill(everything, groups).items) == 24

    # A KL in the reward is that of all completions; the same ones are trained.
    flags = ("--mask_truncated=true", "--max_new_tokens=10", "--objective=rloo")
    trained = fill(build(tmp_path / "kl", few_questions, *flags), groups).items
    assert [e.sequences.tolist() for e in trained] == [e.sequences.tolist() for e in buffer.items]


def test_nothing_left_to_train_on_moves_nothing(tmp_path, few_questions):
    """Every completion truncated: an empty buffer is no update and no error."""
    trainer = build(tmp_path, few_questions, "--mask_truncated=true", "--max_new_tokens=1")
    before = [p.clone() for p in trainer.policy.parameters()]
    assert not one_step(trainer).items
    now = trainer.policy.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))


def test_what_cannot_be_scored_is_in_no_mean(tmp_path, few_questions):
    (tmp_path / "r.py").write_text(
        "def some(prompts, completions, **columns):\n"
        "    return [None if i % 3 == 0 else i % 2 for i in range(len(completions))]\n"
    )
    trainer = build(tmp_path, few_questions, f"--reward={tmp_path}/r.py:some")
    assert len(fill(trainer).items) == 16
    row = trainer.monitor.flush(1, 1)
    assert row["rollout/group_baseline"] == pytest.approx(0.5, abs=0.2)


def test_several_rewards_keep_their_weights(tmp_path, few_questions):
    """GDPO: each reward compared in its group, added up with its own weight, then whitened."""
    rewards = ("--reward", "accuracy", "length_penalty", "--reward_weights", "1", "0.3")
    trainer = build(tmp_path, few_questions, "--objective=gdpo", *rewards)
    groups = sample(trainer)
    for g in groups:
        penalties = [-len(c.ids) / 48 for c in g.completions]
        assert g.rewards[1].tolist() == pytest.approx(penalties)
        right = [is_correct(c.text, g.question.reference) for c in g.completions]
        assert g.rewards[0].tolist() == right
    table = torch.stack([g.rewards for g in groups]).double()  # (Q, K, G)
    centred = table - table.mean(-1, keepdim=True)
    relative = centred / (table.std(-1, keepdim=True) + 1e-4)
    total = relative[:, 0] + 0.3 * relative[:, 1]
    expected = (total - total.mean()) / (total.std() + 1e-4)
    found = torch.stack([e.advantages for e in fill(trainer, groups).items]).double()
    torch.testing.assert_close(found, expected.flatten(), rtol=1e-4, atol=1e-4)


def test_the_overlong_penalty_knows_the_budget(tmp_path, few_questions):
    """The last fifth of 10 tokens: whoever used all of them pays 1, nine of them one half."""
    trainer = build(tmp_path, few_questions, "--reward=soft_overlong", "--max_new_tokens=10")
    paid = {}
    for g in sample(trainer):
        lengths = [len(c.ids) for c in g.completions]
        paid |= dict(zip(lengths, g.returns.tolist(), strict=True))
    assert paid[10] == -1.0 and all(r == -max(0, n - 8) / 2 for n, r in paid.items())


def test_the_constant_normaliser_scales_the_loss(tmp_path, few_questions):
    """dr_grpo divides by loss_scale_factor, and by max_new_tokens without one."""
    losses, groups = {}, None
    for factor in (None, 48, 96):
        flags = [f"--loss_scale_factor={factor}"] if factor else []
        trainer = build(tmp_path / str(factor), few_questions, "--objective=dr_grpo", *flags)
        groups = groups or sample(trainer)
        one_step(trainer, groups)
        losses[factor] = trainer.monitor.flush(1, 1)["train/loss"]
    assert losses[48] == losses[None] != 0
    assert losses[48] == pytest.approx(2 * losses[96])


def log_probs_alone(model, prompt, completion):
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
    rows = torch.log_softmax(logits, -1)
    return torch.stack([rows[len(prompt) - 1 + i, token] for i, token in enumerate(completion)])


@torch.no_grad()
def kl_alone(trainer, question, completion, estimator):
    """The KL to the reference, summed over the tokens of one completion."""
    networks = (trainer.policy.model, trainer.reference.model)
    own, theirs = (log_probs_alone(n, question.prompt_ids, completion.ids) for n in networks)
    d = own - theirs
    return float((d if estimator == "k1" else torch.exp(-d) + d - 1).sum())


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_in_the_reward(tmp_path, few_questions, estimator):
    """R - β Σ_t KL_t, one sequence at a time; and the loss has no KL of its own."""
    flags = ("--objective=rloo", "--kl_weight=0.5", f"--kl_estimator={estimator}")
    trainer = build(tmp_path, few_questions, *flags)
    move(trainer, 0.01)
    groups = sample(trainer)
    buffer, total, tokens = fill(trainer, groups), 0.0, 0
    for (question, completion), e in zip(completions_of(groups), buffer.items, strict=True):
        kl = kl_alone(trainer, question, completion, estimator)
        total, tokens = total + kl, tokens + len(completion.ids)
        assert abs(kl) > 1e-3
        right = is_correct(completion.text, question.reference)
        assert float(e.returns) == pytest.approx(right - 0.5 * kl, abs=1e-4)
    found, count = trainer.monitor.sums["train/kl_divergence"]
    assert found / count == pytest.approx(total / tokens, rel=1e-3)
    assert trainer.objective.kl_in_loss is False and trainer.loss.kl_weight == 0


def test_dynamic_sampling_with_a_kl_in_the_reward(tmp_path, monkeypatch):
    """Groups are replaced by their rewards; then the KL is computed once, for those that are
    kept."""
    flags = ("--objective=rloo", "--kl_weight=0.5", "--dynamic_sampling=3", "--max_norm=1e9")
    sizes = ("--rollouts_per_step=6", "--group_size=4")
    trainer = build(tmp_path, "tiny/task", *flags, *sizes)
    move(trainer, 0.01)
    rounds, passes = [], []
    real_sample, real_pass = train.sample_and_score, train.policy_pass

    def noted_sample(*arguments):
        rounds.append(real_sample(*arguments))
        return rounds[-1]

    def noted_pass(policy, names, experiences, size):
        passes.append((policy, len(experiences)))
        return real_pass(policy, names, experiences, size)

    monkeypatch.setattr(train, "sample_and_score", noted_sample)
    monkeypatch.setattr(train, "policy_pass", noted_pass)
    found = catch(trainer)
    buffer = one_step(trainer)
    assert len(rounds) > 1, "a group must have been replaced, or this test does not see it"
    assert passes == [(trainer.policy, 24), (trainer.reference, 24)], "once for each model"

    # What is kept, found again from what was sampled.
    kept, more = list(rounds[0]), [g for groups in rounds[1:] for g in groups]
    more = iter([g for g in more if rewards_differ(g.returns)])
    kept = [g if rewards_differ(g.returns) else next(more, g) for g in kept]
    pairs = completions_of(kept)
    assert len(buffer.items) == 24 == len(pairs)
    kls, advantages = [], []
    for (question, completion), e in zip(pairs, buffer.items, strict=True):
        assert e.sequences.tolist() == question.prompt_ids + completion.ids
        kls.append(kl_alone(trainer, question, completion, "k1"))
        right = is_correct(completion.text, question.reference)
        assert float(e.returns) == pytest.approx(right - 0.5 * kls[-1], abs=1e-4)
    for group in torch.stack([e.returns for e in buffer.items]).view(6, 4):
        advantages += [float(r - (group.sum() - r) / 3) for r in group]  # the mean of the others
    assert [float(e.advantages) for e in buffer.items] == pytest.approx(advantages, abs=1e-5)
    assert len(found) == 1 and found[0].norm() > 0 and trainer.skipped == 0
    row = trainer.monitor.flush(1, 1)
    assert row["rollout/rounds"] == len(rounds)
    tokens = sum(len(c.ids) for _, c in pairs)
    assert row["train/kl_divergence"] == pytest.approx(sum(kls) / tokens, rel=1e-3)
    returns = torch.stack([e.returns for e in buffer.items])
    assert row["rollout/returns"] == pytest.approx(float(returns.mean()), rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "flags", [["--temperature=0.7"], ["--temperature=1.3", "--top_p=0.8"]], ids=" ".join
)
def test_the_sampler_notes_what_it_drew_with(tmp_path, few_questions, flags):
    """Against the filters written out: temperature first, then the smallest set of tokens with
    top_p of the mass."""
    trainer = build(tmp_path, few_questions, *flags, "--rollout_batch_size=3")
    temperature, top_p = trainer.config.temperature, trainer.config.top_p
    groups = sample(trainer, 2)
    noted = [x for _, c in completions_of(groups) for x in c.log_probs]
    row = trainer.monitor.flush(1, 1)
    assert row["rollout/entropy"] == pytest.approx(-sum(noted) / len(noted))
    for question, c in completions_of(groups):
        ids, start = torch.tensor([question.prompt_ids + c.ids]), len(question.prompt_ids) - 1
        logits = trainer.policy.model(input_ids=ids).logits[0, start:-1]
        probs = torch.softmax(logits / temperature, -1)
        ranked = probs.sort(descending=True)
        before = ranked.values.cumsum(-1) - ranked.values
        kept = torch.zeros_like(probs).scatter(-1, ranked.indices, (before < top_p).float())
        drawn = torch.tensor(c.ids)[:, None]
        assert (kept.gather(-1, drawn) == 1).all()
        expected = (probs.gather(-1, drawn)[:, 0] / (probs * kept).sum(-1)).log()
        assert c.log_probs == pytest.approx(expected.tolist(), abs=1e-3)


def test_the_gap_between_sampler_and_trainer_is_measured(tmp_path, few_questions):
    gaps = {}
    for top_p in (1.0, 0.6):
        trainer = build(tmp_path / str(top_p), few_questions, f"--top_p={top_p}")
        one_step(trainer)
        gaps[top_p] = trainer.monitor.flush(1, 1)["train/sampler_gap"]
    assert gaps[1.0] < 1e-4 and gaps[0.6] > 0.01


def test_the_tokens_of_highest_entropy(tmp_path, few_questions):
    trainer = build(tmp_path, few_questions, "--top_entropy=0.25")
    buffer = fill(trainer)
    with torch.no_grad():
        found = [trainer.policy(pad_batch([e]))[1][0] for e in buffer.items]
    entropies, chosen = torch.cat(found), torch.cat([e.policy_mask for e in buffer.items])
    least = 0.25 * len(chosen) - 1
    assert least <= chosen.sum() <= 0.3 * len(chosen), "a quarter, and what is equal to its last"
    assert entropies[chosen].min() >= entropies[~chosen].max() - 1e-5
    one = replace(buffer.items[0], entropies=found[0])
    (masked,) = participation.mask_low_entropy([one], 0.01)
    assert masked.policy_mask.sum() == 1, "never none"


def test_the_gradient_of_the_exact_kl_and_of_the_entropy(tmp_path, few_questions):
    """A whole update with `full`, against one completion at a time with all its logits; so is its
    entropy."""
    weights = ("--kl_weight=0.3", "--kl_estimator=full", "--entropy_weight=0.2")
    flags = ("--temperature=0.8", "--max_norm=1e9", "--micro_batch_size=5")
    sizes = ("--rollouts_per_step=2", "--group_size=6", "--train_batch_size=12")
    trainer = build(tmp_path, few_questions, *weights, *flags, *sizes)
    groups = sample(trainer)
    buffer = fill(trainer, groups)
    advantages = compare(trainer, groups).flatten()
    move(trainer, 0.01)
    found = catch(trainer)
    train.update(trainer, buffer.items)
    total, kls, entropies = 0.0, [], []
    for (question, c), a in zip(completions_of(groups), advantages, strict=True):
        ids, start = torch.tensor([question.prompt_ids + c.ids]), len(question.prompt_ids) - 1
        rows = torch.log_softmax(trainer.policy.model(ids).logits[0, start:-1] / 0.8, -1)
        with torch.no_grad():
            logits = trainer.reference.model(ids).logits[0, start:-1]
            others = torch.log_softmax(logits / 0.8, -1)
        x = rows.gather(-1, torch.tensor(c.ids)[:, None])[:, 0]
        kl, entropy = (rows.exp() * (rows - others)).sum(-1), -(rows.exp() * rows).sum(-1)
        total = total + (-torch.exp(x - x.detach()) * a + 0.3 * kl - 0.2 * entropy).mean() / 12
        kls.append(kl.detach())
        entropies.append(entropy.detach())
    total.backward()
    plain = torch.cat([p.grad.flatten() for p in trainer.policy.parameters()])
    assert (found[0] - plain).norm() / plain.norm() < 1e-4
    row = trainer.monitor.flush(1, 1)
    assert row["train/kl_divergence"] == pytest.approx(float(torch.cat(kls).mean()), rel=1e-3)
    assert row["train/entropy"] == pytest.approx(float(torch.cat(entropies).mean()), rel=1e-3)
    assert row["train/loss"] == pytest.approx(float(total.detach()), rel=1e-3)


class Says:
    """A language model that always gives these logits, (S, V)."""

    def __init__(self, logits):
        self.logits = logits

    def forward(self, input_ids, attention_mask, use_cache):
        return SimpleNamespace(logits=self.logits.unsqueeze(0))

    __call__ = forward


def test_exact_kl_and_entropy_over_the_vocabulary(monkeypatch):
    """Values and gradients of the pieces against torch.distributions, on the whole."""
    monkeypatch.setitem(LOGITS_AT_A_TIME, "cpu", 40)
    torch.manual_seed(0)
    logits, others = torch.randn(7, 11), torch.randn(7, 11)
    # A token that the model never says.
    logits[:, 10], others[:, 10] = torch.finfo(torch.bfloat16).min, -torch.inf
    logits.requires_grad_()
    tokens, weights = torch.randint(10, (7,)), torch.randn(3, 7)
    # The logits at each position are those of the next token; those at the last one are not used.
    sequences = torch.cat([torch.zeros(1, dtype=torch.long), tokens]).unsqueeze(0)
    models = [Says(torch.cat([x, torch.full((1, 11), 9.0)])) for x in (logits, others)]
    found = equations.sequences_log_probs(
        models[0], sequences, torch.ones_like(sequences, dtype=torch.bool), 7, 0.7, models[1]
    )
    policy, reference = (
        torch.distributions.Categorical(logits=x[:, :10] / 0.7) for x in (logits, others)
    )
    expected = (
        policy.log_prob(tokens),
        policy.entropy(),
        torch.distributions.kl_divergence(policy, reference),
    )
    for a, b, w in zip(found, expected, weights, strict=True):
        torch.testing.assert_close(a[0], b)
        gradients = (
            torch.autograd.grad((x * w).sum(), logits, retain_graph=True)[0] for x in (a[0], b)
        )
        torch.testing.assert_close(*gradients)


def test_the_entropy_bonus_raises_the_entropy_and_moves_towards_its_target(tmp_path, few_questions):
    """On the same completions, whose rewards say nothing: only the bonus moves the policy. Its
    weight grows by 0.005 below the target."""
    flags = ("--entropy_weight=0.5", "--entropy_target=5", "--lr=1e-4")
    trainer = build(tmp_path, few_questions, *flags)
    buffer = fill(trainer)
    buffer.items = [replace(e, advantages=torch.tensor(0.0)) for e in buffer.items]

    def entropy():
        with torch.no_grad():
            batch = pad_batch(buffer.items)
            return trainer.policy(batch)[1][batch.action_mask].mean()

    before = entropy()
    for _ in range(3):
        learn(trainer, buffer)
    assert entropy() > before + 0.01
    assert float(trainer.loss.entropy_weight) == pytest.approx(0.515)


def test_a_greedy_completion_is_not_drawn(tmp_path, few_questions):
    """So it has no log-probability, and the evaluation does not pay for noting one."""
    trainer = build(tmp_path, few_questions)
    questions, sampling = trainer.questions.take(1), Sampling(20, temperature=0.0)
    (group,) = rollout(trainer.policy.model, trainer.tokenizer, questions, 1, sampling)
    (greedy,) = group.completions
    assert greedy.ids and greedy.log_probs is None
