"""loss.py against the paper's formulas, written out as slow double loops in float64."""

import math

import pytest
import torch

from loss import GRPOLoss, approx_kl_divergence, group_advantages
from objectives.equations import (
    TOKEN_WEIGHTS,
    build_loss,
    objective_advantages,
    token_weights,
)
from objectives.table import find_objective
from replay_buffer import Experience

LENGTHS = [5, 1, 3, 2]
SCALE = 7.0


def grpo(**columns):
    """The paper's row: loss.py alone, unless a column differs that it does not know."""
    return build_loss(find_objective("grpo", **columns))


def advantages(returns, normalize=True):
    if normalize:
        return group_advantages(returns)
    objective = find_objective("grpo", advantage_std="none")
    return objective_advantages(returns, returns[None], [1.0], objective)


def make_batch(seed=0, lengths=LENGTHS, with_old=True):
    """A padded batch with garbage in the padding, and log-probabilities far enough from the old ones to be clipped."""
    g = torch.Generator().manual_seed(seed)
    n, width = len(lengths), max(lengths)
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    old = -torch.rand(n, width, generator=g, dtype=torch.float64) * 3
    ref = old + torch.randn(n, width, generator=g, dtype=torch.float64)
    log_probs = old + torch.randn(n, width, generator=g, dtype=torch.float64) * 0.5
    experience = Experience(
        sequences=torch.zeros(n, width + 2, dtype=torch.long),
        attention_mask=torch.ones(n, width + 2, dtype=torch.bool),
        action_mask=mask,
        returns=torch.zeros(n),
        advantages=torch.randn(n, generator=g, dtype=torch.float64),
        action_log_probs=old if with_old else None,
        log_probs_ref=ref,
    )
    return log_probs.requires_grad_(), experience


def slow_loss(log_probs, e, mode, eps_low, eps_high, beta):
    """Equation 3 of DeepSeekMath with the k3 KL of equation 4: token by token, from the paper."""
    total = 0.0
    n_tokens = sum(LENGTHS)
    for i, length in enumerate(LENGTHS):
        sequence = 0.0
        for t in range(length):
            ratio = math.e ** (log_probs[i, t] - e.action_log_probs[i, t])
            a = e.advantages[i]
            clipped = (
                min(max(ratio, 1 - eps_low), 1 + eps_high)
                if isinstance(ratio, float)
                else ratio.clamp(1 - eps_low, 1 + eps_high)
            )
            gain = ratio * a if ratio * a < clipped * a else clipped * a
            x = math.e ** (e.log_probs_ref[i, t] - log_probs[i, t])
            kl = x - torch.log(x) - 1
            sequence = sequence - (gain - beta * kl)
        if mode == "seq-mean-token-mean":
            total = total + sequence / length / len(LENGTHS)
        elif mode == "token-mean":
            total = total + sequence / n_tokens
        else:
            total = total + sequence / len(LENGTHS) / (
                1.0 if mode == "seq-mean-token-sum" else SCALE
            )
    return total


@pytest.mark.parametrize("mode", TOKEN_WEIGHTS)
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_equal_the_double_loop(mode, seed):
    log_probs, e = make_batch(seed)
    objective = grpo(clip_eps_high=0.3, kl_weight=0.05)
    loss, metrics = objective(log_probs, e, token_weights(LENGTHS, mode, SCALE).double())
    (gradient,) = torch.autograd.grad(loss, log_probs)
    slow = slow_loss(log_probs, e, mode, 0.2, 0.3, 0.05)
    (slow_gradient,) = torch.autograd.grad(slow, log_probs)
    # the weights are float32
    assert loss.item() == pytest.approx(slow.item(), rel=1e-6)
    torch.testing.assert_close(gradient, slow_gradient, rtol=1e-6, atol=1e-9)
    share, count = metrics["train/clipped_share"]
    assert 0 < share < count, "the batch must exercise the clip, or this test compares nothing"
    no_kl = grpo(clip_eps_high=0.3, kl_weight=0.0)
    (of_policy,) = torch.autograd.grad(no_kl(log_probs, e, torch.ones(4))[0], log_probs)
    assert share == (e.action_mask & (of_policy == 0)).sum(), "clipped is what has no gradient"


@pytest.mark.parametrize("mode", TOKEN_WEIGHTS)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_micro_batches_add_up_to_the_full_batch(mode, size):
    """Averaging inside each micro-batch, the usual way, fails this for every size that does not divide evenly."""
    objective = grpo(kl_weight=0.05)
    log_probs, e = make_batch()
    weights = token_weights(LENGTHS, mode).double()
    full = torch.autograd.grad(objective(log_probs, e, weights)[0], log_probs)[0]
    parts = torch.zeros_like(full)
    for i in range(0, len(LENGTHS), size):
        rows = slice(i, i + size)
        part = Experience(**{k: None if v is None else v[rows] for k, v in vars(e).items()})
        parts += torch.autograd.grad(objective(log_probs[rows], part, weights[rows])[0], log_probs)[
            0
        ]
    torch.testing.assert_close(parts, full, rtol=1e-12, atol=1e-15)


def test_the_weights_are_one_mean():
    for mode in ("seq-mean-token-mean", "token-mean"):
        weights = token_weights(LENGTHS, mode)
        assert float((weights * torch.tensor(LENGTHS)).sum()) == pytest.approx(1.0)
    assert token_weights([3, 0], "seq-mean-token-mean").isfinite().all()


def test_clip_is_on_the_pessimistic_side_for_both_signs():
    """Fault in the field: `where(A >= 0, min, max)` of the two surrogates trains where it must not, for A < 0."""
    objective = grpo(kl_weight=0.0)
    for ratio, advantage, moves in [
        (1.5, 1, False),
        (0.5, 1, True),
        (1.5, -1, True),
        (0.5, -1, False),
    ]:
        log_probs = torch.tensor([[math.log(ratio)]], requires_grad=True)
        e = Experience(
            torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool),
            torch.zeros(1), torch.tensor([float(advantage)]), torch.zeros(1, 1),
        )  # fmt: skip
        loss, _ = objective(log_probs, e, torch.ones(1))
        loss.backward()
        assert bool(log_probs.grad.abs() > 0) == moves, (ratio, advantage)


def test_without_old_log_probs_the_gradient_is_that_of_reinforce():
    log_probs, e = make_batch(with_old=False)
    weights = token_weights(LENGTHS, "seq-mean-token-mean").double()
    loss, metrics = grpo(kl_weight=0.0)(log_probs, e, weights)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    expected = torch.where(e.action_mask, -weights[:, None] * e.advantages[:, None], 0.0)
    torch.testing.assert_close(gradient, expected)
    total, count = metrics["train/ratio_mean"]
    assert total / count == 1


def test_padding_may_hold_anything():
    """Fault 5: multiplying by the mask after the exponential turns an infinity in the padding into NaN."""
    log_probs, e = make_batch()
    clean = grpo(kl_weight=0.1)(log_probs, e, torch.ones(4))[0]
    dirty = Experience(
        **{**vars(e), "log_probs_ref": torch.where(e.action_mask, e.log_probs_ref, torch.inf)}
    )
    loss, metrics = grpo(kl_weight=0.1)(log_probs, dirty, torch.ones(4))
    (gradient,) = torch.autograd.grad(loss, log_probs)
    assert loss == clean and gradient.isfinite().all()
    assert all(total.isfinite() for total, _ in metrics.values())


def test_extreme_log_probs_stay_finite():
    log_probs, e = make_batch()
    for shift in (-1000.0, 1000.0):  # e^1000 is an infinity even in float64
        moved = (log_probs + shift).detach().requires_grad_()
        loss, _ = grpo(kl_weight=0.1)(moved, e, torch.ones(4))
        loss.backward()
        assert loss.isfinite() and moved.grad.isfinite().all()


def test_an_empty_completion_is_no_nan():
    """Fault 3: a masked mean over no token is 0/0, and one such row used to throw away its whole batch."""
    log_probs, e = make_batch()
    mask = e.action_mask.clone()
    mask[1] = False
    e = Experience(**{**vars(e), "action_mask": mask})
    weights = token_weights(mask.sum(-1).tolist(), "seq-mean-token-mean").double()
    loss, metrics = grpo(kl_weight=0.1)(log_probs, e, weights)
    loss.backward()
    assert loss.isfinite() and log_probs.grad.isfinite().all()


def test_kl_metric_is_the_mean_over_completion_tokens():
    """Fault 4: a mean over padding zeros under-reports the KL by the density of the mask."""
    log_probs, e = make_batch()
    total, count = grpo(kl_weight=0.1)(log_probs, e, torch.ones(4))[1]["train/kl_divergence"]
    kl = [
        approx_kl_divergence(log_probs[i, t], e.log_probs_ref[i, t])
        for i, n in enumerate(LENGTHS)
        for t in range(n)
    ]
    assert count == sum(LENGTHS)
    torch.testing.assert_close(total / count, torch.stack(kl).mean().detach())
    assert min(kl) >= 0


def test_advantages_equal_the_formula():
    returns = torch.tensor([[1.0, 0.0, 0.5, 0.0], [0.2, 0.9, 0.4, 0.1]])
    for normalize in (True, False):
        for row, found in zip(returns, advantages(returns, normalize), strict=True):
            mean = sum(row) / 4
            std = (sum((r - mean) ** 2 for r in row) / 3) ** 0.5
            expected = [(r - mean) / (std + 1e-4) if normalize else r - mean for r in row]
            torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("value", [0.0, 0.01, 0.1, 0.7, 1.0, -3.3, 1e6])
@pytest.mark.parametrize("size", [2, 7, 8, 12, 16])
def test_equal_rewards_give_exactly_zero(value, size):
    """Fault 6: with eps 1e-8 twelve rewards of 0.01 got advantages of +0.085 each, out of rounding alone."""
    for normalize in (True, False):
        assert (advantages(torch.full((3, size), value), normalize) == 0).all()


def test_groups_do_not_see_each_other():
    alone = advantages(torch.tensor([[1.0, 0.0, 0.0]]))
    beside = advantages(torch.tensor([[5.0, 9.0, 2.0], [1.0, 0.0, 0.0]]))
    assert (beside[1] == alone[0]).all()


def test_unscored_completions_take_no_part():
    nan = torch.nan
    found = advantages(
        torch.tensor([[1.0, nan, 0.0, nan], [nan, nan, nan, nan], [0.3, nan, nan, nan]])
    )
    torch.testing.assert_close(found[0, [0, 2]], advantages(torch.tensor([[1.0, 0.0]]))[0])
    assert found[0, 1] == 0 and found[0, 3] == 0 and (found[1:] == 0).all()


def test_a_column_of_returns_is_refused_by_its_shape():
    """The tutorial's way, (group_size, 1): each completion would be a group of its own, and every advantage 0."""
    returns = torch.tensor([1.0, 0.0, 0.0, 1.0])
    for shape in ((4, 1), (1,), (), (2, 2, 1)):
        with pytest.raises(
            ValueError, match="hold groups of one completion.*give .questions, group_size."
        ):
            group_advantages(
                returns[:1].view(shape) if math.prod(shape) == 1 else returns.view(shape)
            )
    row = group_advantages(returns)
    assert row.shape == (4,) and torch.equal(group_advantages(returns[None])[0], row)
    assert torch.equal(
        group_advantages(returns.view(2, 2)),
        torch.stack([group_advantages(r) for r in returns.view(2, 2)]),
    )


def test_the_papers_loss_needs_no_table():
    """`GRPOLoss(clip_eps, kl_weight)`, as in the tutorial; the tutorial's defaults."""
    log_probs, e = make_batch()
    module = GRPOLoss(clip_eps=0.2, kl_weight=0.01)
    weights = module.token_weights(LENGTHS, max_new_tokens=99).double()
    loss, _ = module(log_probs, e, weights)
    assert torch.equal(loss, GRPOLoss()(log_probs, e, weights)[0])
    slow = slow_loss(log_probs, e, "seq-mean-token-mean", 0.2, 0.2, 0.01)
    assert loss.item() == pytest.approx(slow.item(), rel=1e-6)


def test_columns_of_advantages_or_weights_are_refused():
    """The tutorial's (B, 1) would be broadcast to (B, B, C): another loss, without a word."""
    log_probs, e = make_batch()
    weights = torch.ones(4)
    with pytest.raises(AssertionError, match="a number for each sequence"):
        grpo()(log_probs, e, weights[:, None])
    column = Experience(**{**vars(e), "advantages": e.advantages[:, None]})
    with pytest.raises(AssertionError, match="a number for each sequence"):
        grpo()(log_probs, column, weights)
