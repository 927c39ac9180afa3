"""Laws that loss.py and objectives/ obey whatever the numbers are: symmetries, bounds, identities. Hypothesis looks for exceptions."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loss import rewards_differ
from objectives.equations import ObjectiveLoss, build_loss, kl_divergence, token_weights
from objectives.table import CHOICES, OBJECTIVES, find_objective
from replay_buffer import Experience, pad_batch


def law(examples):
    """The same examples every time; no clock, no files."""
    return settings(derandomize=True, deadline=None, database=None, max_examples=examples)


rows = pytest.mark.parametrize("row", OBJECTIVES)
seeds = st.integers(0, 2**31)

NO_BASELINE = {"reinforce"}  # the reward as it is
OVER_THE_BATCH = {
    "lite_ppo"
}  # the std is that of all rewards, so a shift of one group is seen by the others
WHITENED = {"gdpo", "reinforce_plus_plus_baseline"}
ONLY_BEST = {"pass_at_k"}  # the others get 0, so that the advantages of a group do not add up to 0
UNSCALED = {
    "dr_grpo",
    "rloo",
    "reinforce",
    "pass_at_k",
}  # no std: twice the reward is twice the advantage
ONE_RATIO = {
    "gspo",
    "luspo",
    "gmpo",
}  # one ratio for a whole completion: each token's gradient is of all of them
KL_IN_LOSS = {"grpo", "bnpo", "gdpo", "reinforce_plus_plus_baseline"}


@st.composite
def reward_tables(draw, unscored=True):
    """float64 (2, Q, G): two rewards with one decimal, some of them NaN for both."""
    q, g = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    tenths = st.lists(st.integers(-20, 20), min_size=2 * q * g, max_size=2 * q * g)
    table = torch.tensor(draw(tenths), dtype=torch.float64).view(2, q, g) / 10
    if unscored:
        lost = (
            torch.tensor(draw(st.lists(st.integers(0, 4), min_size=q * g, max_size=q * g))).view(
                q, g
            )
            == 0
        )
        table[:, lost] = torch.nan
    return table


def total(rewards):
    return rewards[0] + 0.25 * rewards[1]


def advantages(row, rewards):
    return build_loss(find_objective(row)).advantages(total(rewards), rewards, [1.0, 0.25])


def sample(seed, spread=0.5, dtype=torch.float64):
    """Five completions of 1 to 6 tokens, padded, and log-probabilities of the policy now, a leaf."""
    g = torch.Generator().manual_seed(seed)
    singles, now = [], []
    for n in [1, *torch.randint(1, 7, (4,), generator=g).tolist()]:
        old, a = (
            -torch.rand(n, generator=g, dtype=torch.float64) * 3,
            torch.randn(1, generator=g, dtype=torch.float64),
        )
        move, far, sampled = torch.randn(3, n, generator=g, dtype=torch.float64)
        e = replace(
            Experience.of([1], [2] * n),
            advantages=a[0].to(dtype),
            action_log_probs=old.to(dtype),
        )
        e = replace(
            e,
            log_probs_ref=(old + far).to(dtype),
            sampler_log_probs=(old + 0.3 * sampled).to(dtype),
        )
        singles.append(replace(e, policy_mask=torch.rand(n, generator=g) < 0.6))
        now.append((old + spread * move).to(dtype))
    return torch.nn.utils.rnn.pad_sequence(now, batch_first=True).requires_grad_(), replace(
        pad_batch(singles), policy_mask=None
    )


def value_and_gradient(row, log_probs, e, **columns):
    """Of the loss of one row, entropies and exact KL being made up from the log-probabilities."""
    o = find_objective(row, **columns)
    # In a run a policy mask comes with --top_entropy, which the paper's row does not have.
    module = build_loss(o) if e.policy_mask is None else ObjectiveLoss(o)
    weights = module.token_weights(e.action_mask.sum(-1).tolist(), 6).to(log_probs)
    exact_kl = log_probs.square() if o.needs_exact_kl else None
    loss, metrics = module(log_probs, e, weights, -log_probs, exact_kl)
    assert all(value.isfinite() for value, _ in metrics.values())
    return loss.detach(), torch.autograd.grad(loss, log_probs)[0]


def pick(e, index):
    """The completions of a batch in another order."""
    return Experience(**{k: None if v is None else v[index] for k, v in vars(e).items()})


# ------------------------------------------------------------------------------------------------- advantages


@rows
@law(15)
@given(rewards=reward_tables(), seed=seeds)
def test_order_does_not_matter_to_advantages(row, rewards, seed):
    """Shuffled completions, and shuffled groups: each completion keeps its advantage."""
    g = torch.Generator().manual_seed(seed)
    across, inside = (
        torch.randperm(rewards.shape[1], generator=g),
        torch.randperm(rewards.shape[2], generator=g),
    )
    found = advantages(row, rewards[:, across][..., inside])
    torch.testing.assert_close(
        found, advantages(row, rewards)[across][:, inside], rtol=1e-12, atol=1e-12
    )


@rows
@law(15)
@given(rewards=reward_tables(), shifts=st.lists(st.integers(-50, 50), min_size=4, max_size=4))
def test_a_constant_added_to_a_group_changes_nothing(row, rewards, shifts):
    """What a baseline is for. One constant for all groups where the std is that of the batch; `reinforce` has none."""
    shift = torch.tensor(shifts[: rewards.shape[1]], dtype=torch.float64)[:, None]
    shift = shift[0] if row in OVER_THE_BATCH else shift
    before, after = advantages(row, rewards), advantages(row, rewards + shift)
    if row in NO_BASELINE:
        moved = torch.where(rewards[0].isnan(), 0.0, 1.25 * shift.expand_as(before))
        torch.testing.assert_close(after - before, moved)
    else:
        torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


@rows
@law(15)
@given(rewards=reward_tables(), scale=st.sampled_from([0.5, 2.0, 100.0]))
def test_the_scale_of_rewards(row, rewards, scale):
    """Divided by a std: nothing changes, up to eps; not divided: the advantages scale along."""
    before, after = advantages(row, rewards), advantages(row, rewards * scale)
    if row in UNSCALED:
        torch.testing.assert_close(after, before * scale, rtol=1e-9, atol=1e-9)
    else:
        torch.testing.assert_close(after, before, rtol=1e-2, atol=1e-9)


@rows
@law(15)
@given(rewards=reward_tables())
def test_the_advantages_of_a_group_add_up_to_zero(row, rewards):
    """Why the loss of a step is about 0 on-policy."""
    if row not in NO_BASELINE | ONLY_BEST:
        assert advantages(row, rewards).sum(-1).abs().max() < 1e-9


@rows
@law(15)
@given(
    value=st.floats(-(2.0**126), 2.0**126, width=32),
    size=st.integers(2, 16),
    others=reward_tables(unscored=False),
)
def test_equal_rewards_give_exactly_zero(row, value, size, others):
    """Whatever their magnitude, alone or beside other groups; there the mean of whitening is a hair beside 0."""
    equal = torch.full((1, 3, size), value)
    assert not rewards_differ(equal).any()
    found = build_loss(find_objective(row)).advantages(equal[0], equal, [1.0])
    assert (found == (equal[0] if row in NO_BASELINE else 0.0)).all()
    beside = others.clone()
    beside[:, 0] = beside[:, 0, :1]
    found = advantages(row, beside)[0]
    if row in NO_BASELINE:
        assert (found == total(beside)[0]).all()
    else:
        assert found.abs().max() <= (1e-12 if row in WHITENED else 0.0)


@law(15)
@given(
    st.lists(
        st.one_of(st.none(), st.floats(-(2.0**100), 2.0**100, width=32)), min_size=1, max_size=6
    )
)
def test_rewards_differ_is_max_above_min(values):
    """NaN has no part in it, and a group of nobody has none."""
    there = [v for v in values if v is not None]
    group = torch.tensor([math.nan if v is None else v for v in values])
    assert bool(rewards_differ(group)) == (len(set(there)) > 1)


@rows
@pytest.mark.parametrize(
    "rewards",
    [[[1e30, -1e30]], [[1e30, 0.0, 1.0, 1e-30]], [[5.0] * 4], [[0.0, 1.0]], [[1e-30, 0.0]]],
)
def test_extreme_rewards_stay_finite(row, rewards):
    """One group, equal ones, huge and tiny ones, in float32."""
    rewards = torch.tensor([rewards])
    found = build_loss(find_objective(row)).advantages(rewards[0], rewards, [1.0])
    assert found.isfinite().all() and found.dtype == torch.float32
    log_probs, e = sample(0, dtype=torch.float32)
    e = replace(e, advantages=found.flatten().repeat(5)[:5])
    loss, gradient = value_and_gradient(row, log_probs, e)
    assert loss.isfinite() and gradient.isfinite().all()


# ------------------------------------------------------------------------------------------- loss and gradient


@rows
@law(15)
@given(seed=seeds)
def test_order_and_padding_do_not_matter_to_the_loss(row, seed):
    """Shuffled completions and three more columns of garbage: the same loss, and each token keeps its gradient."""
    columns = {"kl_weight": 0.1, "entropy_weight": 0.1, "sampler_correction": "sequence_truncate"}
    log_probs, e = sample(seed)
    loss, gradient = value_and_gradient(row, log_probs, e, **columns)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    n = len(order)

    def wider(x, fill):
        return torch.cat([x, x.new_full((n, 3), fill)], 1)

    junk = {
        k: wider(v, math.nan)
        for k, v in vars(e).items()
        if v is not None and v.shape == log_probs.shape and v.is_floating_point()
    }
    wide = replace(e, action_mask=wider(e.action_mask, False), **junk)
    leaf = wider(log_probs.detach(), -7.0)[order].requires_grad_()
    again, moved = value_and_gradient(row, leaf, pick(wide, order), **columns)
    torch.testing.assert_close(again, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moved, wider(gradient, 0.0)[order], rtol=1e-12, atol=1e-12)


@rows
@law(15)
@given(seed=seeds)
def test_on_policy_every_row_has_the_gradient_of_reinforce(row, seed):
    """For the policy term alone, of every row: −weight × A at each token, whether `old` is given or left out.

    It cannot hold for a KL in the loss, unless the policy is the reference as well (k2 and k3 are flat there); nor,
    where one ratio stands for the whole completion, once tokens have weights of their own: a token left out by
    policy_mask, or by the sampler's correction, still has a gradient through the others.
    """
    log_probs, e = sample(seed, spread=0.0)
    weights = token_weights(
        e.action_mask.sum(-1).tolist(), OBJECTIVES[row].loss_agg_mode, 6.0
    ).double()
    expected = torch.where(e.action_mask, -weights[:, None] * e.advantages[:, None], 0.0)
    kept = torch.rand(log_probs.shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    for batch in e, replace(e, action_log_probs=None):
        alone = value_and_gradient(row, log_probs, batch, kl_weight=0.0)[1]
        torch.testing.assert_close(alone, expected, rtol=1e-12, atol=1e-15)
        masked = value_and_gradient(
            row, log_probs, replace(batch, policy_mask=kept), kl_weight=0.0
        )[1]
        split = (kept != kept[:, :1]) & e.action_mask & (e.advantages[:, None] != 0)
        holds = torch.allclose(masked, expected * kept, rtol=1e-12, atol=1e-15)
        assert holds == (row not in ONE_RATIO or not split.any())
        with_kl = value_and_gradient(row, log_probs, batch)[1]
        assert torch.allclose(with_kl, expected, rtol=1e-12, atol=1e-15) == (row not in KL_IN_LOSS)
        at_reference = value_and_gradient(
            row, log_probs, replace(batch, log_probs_ref=log_probs.detach())
        )[1]
        torch.testing.assert_close(at_reference, expected, rtol=1e-12, atol=1e-15)


@law(200)
@given(
    log_r=st.floats(-3, 3),
    a=st.floats(-3, 3),
    low=st.floats(0.05, 0.9),
    high=st.floats(0.05, 2.0),
    c=st.floats(3.1, 9.0),
)
def test_clip_stops_the_optimistic_side_and_dual_clip_the_far_one(log_r, a, low, high, c):
    """Gradient −A r, but 0 above 1 + ε_high for A > 0 and below 1 − ε_low for A < 0; with c also above c for A < 0.

    Fault in the field: the other side for A < 0, so that a token that must come back has no gradient.
    """
    r = math.exp(log_r)
    if min(abs(r - edge) for edge in (1 - low, 1 + high, c)) < 1e-9 or abs(a) < 1e-9:
        return
    e = replace(Experience.of([1], [2]), action_log_probs=torch.tensor([-4.0], dtype=torch.float64))
    e = replace(e, advantages=torch.tensor(a, dtype=torch.float64))
    idle = r > 1 + high if a > 0 else r < 1 - low
    for dual in None, c:
        leaf = torch.tensor([[log_r - 4.0]], dtype=torch.float64, requires_grad=True)
        columns = {"clip_eps": low, "clip_eps_high": high, "clip_ratio_c": dual}
        gradient = value_and_gradient(
            "dr_grpo", leaf, pad_batch([e]), loss_agg_mode="token-mean", **columns
        )[1]
        stopped = idle or dual is not None and a < 0 and r > c
        torch.testing.assert_close(gradient.item(), 0.0 if stopped else -a * r, rtol=1e-9, atol=0.0)


@rows
@law(15)
@given(seed=seeds)
def test_float32_agrees_with_float64(row, seed):
    """To 1e-5 of the largest gradient, and 1e-5 of the loss: the rounding of about six operations."""
    single, double = (sample(seed, dtype=dtype) for dtype in (torch.float32, torch.float64))
    loss, gradient = value_and_gradient(row, *double)
    rough, rough_gradient = value_and_gradient(row, *single)
    assert rough.dtype == rough_gradient.dtype == torch.float32
    assert rough.item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-5)
    torch.testing.assert_close(
        rough_gradient.double(), gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max())
    )


EXTREMES = [0.0, 50.0, -50.0, 1000.0, -1000.0]


@rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_log_probs_stay_finite(row, dtype):
    """Every pair of log-ratios of 0, ±50 and ±1000 to old and to ref, log π = 0 exactly, completions of one token."""
    far = torch.tensor([[x, y] for x in EXTREMES for y in EXTREMES], dtype=dtype)
    for sign in (1.0, -1.0, 0.0):
        for base in (0.0, -1000.0):
            log_probs = torch.full((len(far), 2), base, dtype=dtype, requires_grad=True)
            mask = torch.tensor([[True, i % 2 == 0] for i in range(len(far))])
            tokens = torch.ones(len(far), 3, dtype=torch.long)
            e = Experience(
                sequences=tokens, attention_mask=tokens.bool(), action_mask=mask, returns=far[:, 0],
                advantages=torch.full((len(far),), sign, dtype=dtype), action_log_probs=base - far,
                log_probs_ref=base - far.flip(-1), sampler_log_probs=base + far,
            )  # fmt: skip
            whole = [c for c in CHOICES["sampler_correction"] if not c.startswith("token")]
            for correction in (
                whole if OBJECTIVES[row].couples_tokens else CHOICES["sampler_correction"]
            ):
                loss, gradient = value_and_gradient(
                    row, log_probs, e, kl_weight=0.1, sampler_correction=correction
                )
                assert loss.isfinite() and gradient.isfinite().all()


@law(50)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=9), scale=st.floats(1.0, 2048.0))
def test_the_weights_are_means(lengths, scale):
    """Weights × lengths add up to 1 for the two means; sums per completion are per completion that is not empty."""
    tokens, count = sum(lengths), sum(n > 0 for n in lengths)
    for mode in CHOICES["loss_agg_mode"]:
        weights = token_weights(lengths, mode, scale)
        assert (
            weights.isfinite().all()
            and weights.dtype == torch.float32
            and len(weights) == len(lengths)
        )
        whole = float((weights * torch.tensor(lengths)).sum())
        expected = {"seq-mean-token-sum": tokens, "seq-mean-token-sum-norm": tokens / scale}.get(
            mode, count
        )
        assert whole == pytest.approx(expected / max(count, 1), rel=1e-5), mode


# ------------------------------------------------------------------------------------------------------------ KL


@law(100)
@given(st.floats(-1e4, 1e4), st.sampled_from([k for k in CHOICES["kl_estimator"] if k != "full"]))
def test_estimators_are_finite_and_k3_and_k2_are_never_negative(d, name):
    """Also far away; 0 where the policy is the reference."""
    log_probs = torch.tensor(d, dtype=torch.float64, requires_grad=True)
    found = kl_divergence(log_probs, torch.tensor(0.0), name, log_probs.clamp(-20, 20).exp())
    assert found.isfinite() and torch.autograd.grad(found, log_probs)[0].isfinite()
    assert found >= 0 or name.removesuffix("+") in ("k1", "kl")
    assert kl_divergence(log_probs, log_probs, name, torch.tensor(1.0)) == 0


@law(50)
@given(st.lists(st.tuples(*[st.floats(-0.8, 0.8)] * 2), min_size=2, max_size=6))
def test_estimators_agree_in_expectation(logits):
    """Enumerated over the vocabulary: all but abs and k2 are KL(π ‖ ref), which is never negative."""
    now, ref = torch.tensor(logits, dtype=torch.float64).log_softmax(0).unbind(-1)
    kl = (now.exp() * (now - ref)).sum()
    assert kl >= -1e-15
    for name in CHOICES["kl_estimator"]:
        if name.removesuffix("+") not in ("abs", "k2", "mse", "full"):
            found = (now.exp() * kl_divergence(now, ref, name, torch.ones_like(now))).sum()
            torch.testing.assert_close(found, kl, rtol=1e-10, atol=1e-14)
