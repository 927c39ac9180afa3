"""Every row and every choice of objectives/ against the papers: slow loops over scalars in float64, token by token.

Nothing here calls or mirrors the helpers of loss.py or equations.py. A `Paper` is a row written a second time, as plain
functions of plain numbers with `if`s, from the equations of the arXiv numbers that stand there; `either` notes which way
each `if` went, so that a batch on which a branch is never taken fails instead of comparing nothing.
"""

import ast
import inspect
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from loss import GRPOLoss, approx_kl_divergence
from objectives import equations, table
from objectives.equations import ObjectiveLoss, build_loss, kl_divergence, objective_advantages
from objectives.table import CHOICES, OBJECTIVES, Objective, find_objective
from replay_buffer import Experience, pad_batch
from support.config import Config
from support.errors import UserError

MAX_NEW_TOKENS = 16
TAKEN = set()


def either(what, condition):
    """The condition, noted."""
    TAKEN.add((what, bool(condition)))
    return bool(condition)


def plain(x):
    """The number, without its gradient."""
    return x.item() if isinstance(x, torch.Tensor) else x


# ------------------------------------------------------------------------------------ the papers: advantages


def mean(xs):
    return sum(xs) / len(xs)


def std(xs):
    return math.sqrt(sum((x - mean(xs)) ** 2 for x in xs) / (len(xs) - 1)) if len(xs) > 1 else 0.0


def scored(xs):
    return [x for x in xs if x is not None]


def against_mean(i, group):
    """2402.03300, section 4.1.2; equal rewards are exactly 0 here, whatever their mean rounds to."""
    return 0.0 if min(group) == max(group) else group[i] - mean(group)


def against_others(i, group):
    """2402.14740, eq. 6: the baseline is the mean of the others; nobody to compare with: nothing."""
    others = group[:i] + group[i + 1 :]
    return group[i] - mean(others) if others else 0.0


def gain_in_maximum(i, group):
    """2503.19595: what the best of the group would lose without this completion."""
    others = group[:i] + group[i + 1 :]
    return max(group) - max(others) if others else 0.0


def as_it_is(i, group):
    return group[i]


ADVANTAGES = {
    "group": against_mean, "leave-one-out": against_others, "pass-at-k": gain_in_maximum, "raw": as_it_is,
}  # fmt: skip


def compared(p, table):
    """Rewards (groups of numbers, None: not scored) → advantages, None where there was no reward."""
    everything = scored([r for group in table for r in group])
    out = []
    for group in table:
        there = scored(group)
        below = {"group": std(there) + 1e-4, "batch": std(everything) + 1e-4, "none": 1.0}[p.divide]
        values = iter([p.compare(i, there) / below for i in range(len(there))])
        out.append([None if r is None else next(values) for r in group])
    return out


def slow_advantages(p, tables, weights):
    """K tables of rewards → returns and advantages; a completion that nobody scored has neither."""
    shape = [(q, g) for q in range(len(tables[0])) for g in range(len(tables[0][0]))]
    total = [[None] * len(group) for group in tables[0]]
    for q, g in shape:
        given = [w * t[q][g] for w, t in zip(weights, tables, strict=True) if t[q][g] is not None]
        total[q][g] = sum(given) if given else None
    found = {}
    each = [compared(p, t) for t in tables]
    whole = compared(p, total)
    for q, g in shape:
        if total[q][g] is None:
            continue
        summed = sum(w * (z[q][g] or 0.0) for w, z in zip(weights, each, strict=True))  # 2601.05242
        found[q, g] = (
            p.relative * (summed if p.each_reward else whole[q][g]) + p.absolute * total[q][g]
        )
    if p.whiten:
        values = list(found.values())
        found = {k: (a - mean(values)) / (std(values) + 1e-4) for k, a in found.items()}
    return total, [
        [found.get((q, g), 0.0) for g in range(len(tables[0][q]))] for q in range(len(tables[0]))
    ]


# ----------------------------------------------------------------------------------- the papers: policy terms
# term(logs, lp, a): the losses of the tokens of one completion; its l and lp are lists of scalars.


def limit(x, low, high, what):
    """x inside [low, high]; beyond, a constant."""
    if either(f"{what}: below", x < low):
        return torch.tensor(low, dtype=torch.float64)
    if either(f"{what}: above", x > high):
        return torch.tensor(high, dtype=torch.float64)
    return x


def ratios(logs, level):
    """r of each token, 2507.18071: eq. 7 for a sequence, eq. 14 for a sequence's value with a token's gradient."""
    if level == "sequence":
        logs = [sum(logs) / len(logs)] * len(logs)
    if level == "sequence-token":
        s = plain(sum(logs)) / len(logs)
        logs = [s + x - plain(x) for x in logs]
    return [torch.exp(limit(x, -20.0, 20.0, "log-ratio")) for x in logs]


def ppo(low=0.2, high=0.2, c=None, level="token"):
    """The clip by cases: with A ≥ 0 nothing above 1 + high counts, with A < 0 nothing below 1 − low; above c neither."""

    def gain(r, a):
        if a >= 0:
            return (1 + high) * a if either("high", r > 1 + high) else r * a
        if c is not None and either("c", r > c):
            return c * a
        return (1 - low) * a if either("low", r < 1 - low) else r * a

    return lambda logs, lp, a: [-gain(r, a) for r in ratios(logs, level)]


def cispo(low, high, level="token"):
    """2506.13585: log π with the ratio, bounded to [low, high], as a constant weight."""
    return lambda logs, lp, a: [
        -plain(limit(r, low, high, "weight") if low else high if either("cap", r > high) else r)
        * a
        * x
        for r, x in zip(ratios(logs, level), lp, strict=True)
    ]


def sapo(level="token"):
    """2511.20347: a sigmoid gate."""

    def gate(r, a):
        tau = 1.0 if either("positive", a > 0) else 1.05
        return 4 / tau / (1 + torch.exp(-tau * (r - 1)))

    return lambda logs, lp, a: [-gate(r, a) * a for r in ratios(logs, level)]


def gmpo(low, high):
    """2507.20673: each token cut on the side where the objective would gain, then one geometric mean."""

    def cut(x, a):
        if a > 0:
            return torch.tensor(high) if either("high", x > high) else x
        return torch.tensor(-low) if either("low", x < -low) else x

    def term(logs, lp, a):
        middle = sum(cut(x, a) for x in logs) / len(logs)
        return [-a * torch.exp(limit(middle, -20.0, 20.0, "mean"))] * len(logs)

    return term


def reinforce(logs, lp, a):
    return [-a * x for x in lp]


def dppo(low, high):
    """2602.04879 with binary TV: no token whose probability has gone too far the way that the advantage pushes it."""

    def token(x, lp, a):
        moved = math.exp(plain(lp)) - math.exp(plain(lp - x))
        if a > 0 and either("up", moved > high) or a <= 0 and either("down", moved < -low):
            return 0.0 * lp
        r = math.exp(plain(limit(x, -20.0, 20.0, "log-ratio")))
        return -(20.0 if either("cap", r > 20) else r) * a * lp

    return lambda logs, lp, a: [token(x, y, a) for x, y in zip(logs, lp, strict=True)]


# -------------------------------------------------------------------- the papers: KL, means, sampler corrections


def k2(d, r, exact):
    return d * d / 2


def k3(d, r, exact):
    """Eq. 4, with verl's two limits."""
    x = limit(-d, -20.0, 20.0, "d")
    value = torch.exp(x) - x - 1
    return torch.tensor(10.0) if either("k3 > 10", value > 10) else value


def plus(kl):
    """The value of one, the gradient of k2."""
    return lambda d, r, exact: plain(kl(d, r, exact)) + k2(d, r, exact) - plain(k2(d, r, exact))


KL = {
    "k1": lambda d, r, exact: d, "k2": k2, "k3": k3, "abs": lambda d, r, exact: -d if either("d < 0", d < 0) else d,
}  # fmt: skip
KL |= {"kl": KL["k1"], "mse": k2, "low_var_kl": k3}
KL |= {f"{name}+": plus(kl) for name, kl in KL.items()}
KL |= {"k3-ratio": lambda d, r, exact: k3(d, r, exact) * r, "full": lambda d, r, exact: exact}

# Of the losses of the tokens of each completion, none of them empty, and the constant.
MEANS = {
    "seq-mean-token-mean": lambda rows, scale: sum(sum(row) / len(row) for row in rows) / len(rows),
    "token-mean": lambda rows, scale: sum(sum(row) for row in rows) / sum(len(row) for row in rows),
    "seq-mean-token-sum": lambda rows, scale: sum(sum(row) for row in rows) / len(rows),
    "seq-mean-token-sum-norm": lambda rows, scale: (
        sum(sum(row) for row in rows) / len(rows) / scale
    ),
}


def sampler_weight(whole, beyond):
    """π_old / π_sampler of each token, or of the `whole` completion; above the cap it is `beyond` times the cap."""

    def weights(gaps, cap):
        raw = [math.exp(limit(sum(gaps) if whole else g, -20.0, 20.0, "gap")) for g in gaps]
        return [beyond * cap if either("cap", w > cap) else w for w in raw]

    return weights


SAMPLERS = {
    "token_truncate": sampler_weight(False, 1.0), "sequence_truncate": sampler_weight(True, 1.0),
    "token_mask": sampler_weight(False, 0.0), "sequence_mask": sampler_weight(True, 0.0),
}  # fmt: skip


# ------------------------------------------------------------------------------------------- the papers: rows


@dataclass(frozen=True)
class Paper:
    """One method; the defaults are DeepSeekMath's with the tutorial's β."""

    compare: Callable = against_mean
    divide: str = "group"
    each_reward: bool = False
    relative: float = 1.0
    absolute: float = 0.0
    whiten: bool = False
    term: Callable = ppo()
    mean: str = "seq-mean-token-mean"
    scale: float = MAX_NEW_TOKENS
    kl: str = "k3"
    beta: float = 0.01
    bonus: float = 0.0
    sampler: str | None = None
    cap: float = 3.0


TOKENS, SUMS = {"mean": "token-mean", "beta": 0.0}, {"mean": "seq-mean-token-sum", "beta": 0.0}
ROWS = {
    "grpo": Paper(),
    "bnpo": Paper(mean="token-mean"),
    "dr_grpo": Paper(divide="none", mean="seq-mean-token-sum-norm", beta=0.0),
    "dapo": Paper(term=ppo(0.2, 0.28), **TOKENS),
    "lite_ppo": Paper(divide="batch", **TOKENS),
    "gspo": Paper(term=ppo(3e-4, 4e-4, level="sequence"), beta=0.0),
    "gspo_token": Paper(term=ppo(3e-4, 4e-4, level="sequence-token"), beta=0.0),
    "luspo": Paper(term=ppo(2e-3, 2.5e-3, level="sequence"), **SUMS),
    "gmpo": Paper(term=gmpo(0.4, 0.4), beta=0.0),
    "cispo": Paper(term=cispo(None, 5.0), **TOKENS),
    "sapo": Paper(term=sapo(), beta=0.0),
    "dppo": Paper(term=dppo(0.15, 0.15), **TOKENS),
    "rloo": Paper(
        compare=against_others, divide="none", term=reinforce, **SUMS
    ),  # its KL is in the reward
    "reinforce": Paper(compare=as_it_is, divide="none", term=reinforce, **SUMS),
    "reinforce_plus_plus_baseline": Paper(divide="none", whiten=True, mean="token-mean", kl="k2"),
    "gdpo": Paper(each_reward=True, whiten=True),
    "pass_at_k": Paper(compare=gain_in_maximum, divide="none", beta=0.0),
}


def choice(row, given, **other):
    return row, given, replace(ROWS[row], **other)


# name: (row, columns given to find_objective, the same as a Paper)
CASES = {row: (row, {}, paper) for row, paper in ROWS.items()} | {
    "one epsilon": choice("dr_grpo", {"clip_eps": 0.1}, term=ppo(0.1, 0.1)),
    "nothing above 1": choice("dr_grpo", {"clip_eps_high": 0.0}, term=ppo(0.2, 0.0)),
    "dual clip": choice("dapo", {"clip_ratio_c": 3.0}, term=ppo(0.2, 0.28, c=3.0)),
    "dual clip of sequences": choice(
        "gspo", {"clip_ratio_c": 1.1}, term=ppo(3e-4, 4e-4, c=1.1, level="sequence")
    ),
    "cispo, two sides": choice("cispo", {"clip_eps": 0.1, "clip_eps_high": 0.3}, term=cispo(0.9, 1.3)),
    "cispo of sequences": choice("cispo", {"ratio_level": "sequence", "clip_eps_high": 0.2}, term=cispo(None, 1.2, "sequence")),
    "sapo of sequences": choice("sapo", {"ratio_level": "sequence"}, term=sapo("sequence")),
    "sapo of sequence-token": choice("sapo", {"ratio_level": "sequence-token"}, term=sapo("sequence-token")),
    "gmpo, two sides": choice("gmpo", {"clip_eps": 0.1, "clip_eps_high": 0.5}, term=gmpo(0.1, 0.5)),
    "dppo, two sides": choice("dppo", {"clip_eps": 0.05, "clip_eps_high": 0.3}, term=dppo(0.05, 0.3)),
    "entropy bonus": choice("grpo", {"entropy_weight": 0.1}, bonus=0.1),
    "entropy bonus, adaptive, none seen yet": choice("grpo", {"entropy_weight": 0.1, "entropy_target": 0.5}),
    "loss_scale_factor": choice("dr_grpo", {"loss_scale_factor": 7.0}, scale=7.0),
    "more than the group": choice(
        "grpo", {"relative_reward_weight": 0.7, "baseline_reward_weight": 0.3}, relative=0.7, absolute=0.3
    ),
    "whitened": choice("reinforce", {"whiten_advantages": True}, whiten=True),
    "gdpo over the batch": choice("gdpo", {"advantage_std": "batch"}, divide="batch"),
    "sampler_cap": choice(
        "grpo", {"sampler_correction": "token_truncate", "sampler_cap": 1.2}, sampler="token_truncate", cap=1.2
    ),
}  # fmt: skip
CASES |= {
    f"{a}, std {s}": choice(
        "grpo", {"advantage": a, "advantage_std": s}, compare=ADVANTAGES[a], divide=s
    )
    for a in ADVANTAGES
    for s in ("group", "batch", "none")
    if a != "raw" or s == "none"
}
CASES |= {
    f"KL {k}": choice("dapo", {"kl_weight": 0.3, "kl_estimator": k}, kl=k, beta=0.3) for k in KL
}
CASES |= {f"mean {m}": choice("gspo", {"loss_agg_mode": m}, mean=m) for m in MEANS}
CASES |= {
    f"{s} of {row}": choice(row, {"sampler_correction": s}, sampler=s)
    for s in SAMPLERS
    for row in ("grpo", "gspo")
    if row == "grpo" or s.startswith("sequence")
}


def test_every_row_and_every_name_has_a_reference():
    """A new row or a new choice cannot come without its slow twin."""
    assert set(ROWS) == set(OBJECTIVES)
    assert set(KL) == set(CHOICES["kl_estimator"]) and set(MEANS) == set(CHOICES["loss_agg_mode"])
    assert set(SAMPLERS) | {"none"} == set(CHOICES["sampler_correction"]) and set(
        ADVANTAGES
    ) == set(CHOICES["advantage"])
    built = [find_objective(row, **given) for row, given, _ in CASES.values()]
    for column, names in CHOICES.items():
        assert set(names) == {getattr(o, column) for o in built} | ({"none"} & set(names)), column


def test_the_table_the_equations_and_the_options_name_the_same():
    """A name that the command line offers and no equation has, or the other way round, would fail in the first step."""
    dictionaries = {
        "advantage": equations.ADVANTAGES, "ratio_level": equations.RATIO_LEVELS, "surrogate": equations.SURROGATES,
        "loss_agg_mode": equations.TOKEN_WEIGHTS,
    }  # fmt: skip
    for column, known in dictionaries.items():
        assert list(CHOICES[column]) == list(known), column
    assert set(table.SAMPLED_KL) == set(equations.KL_ESTIMATORS)
    columns = [field.name for field in fields(Objective)]
    assert set(CHOICES) < set(columns), "a choice of a column"
    assert [name for name in columns if name not in {f.name for f in fields(Config)}] == []


def test_the_table_needs_no_torch():
    """What a method is, and what is refused, is read and checked without it."""
    known = "import sys; sys.modules['torch'] = None; from objectives.table import OBJECTIVES, find_objective; "
    code = known + "[find_objective(name) for name in OBJECTIVES]"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(table.__file__).parent.parent)


# ------------------------------------------------------------------------------------------------- advantages

GROUPS = 7


def reward_tables(seed):
    """Three rewards of groups of six: whole, of equals, of nobody, of one, of two, scored in part, with a shared best."""
    g = torch.Generator().manual_seed(seed)
    tables = (
        (torch.rand(3, GROUPS, 6, generator=g, dtype=torch.float64) * 4).round(decimals=1).tolist()
    )
    for k, rewards in enumerate(tables):
        rewards[1] = [0.1 * (k + 1)] * 6
        rewards[2] = [None] * 6
        rewards[3][:2] = rewards[3][3:] = [None] * 3
        rewards[3] = [None, None, rewards[3][2], None, None, None]
        rewards[4][:4] = [None] * 4
        rewards[5][k] = None  # scored by the others
    tables[0][6] = [None] * 6  # one function scores nothing of this group
    tables[1][6] = [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]  # the best is shared
    return tables


@pytest.mark.parametrize("case", CASES)
def test_advantages_equal_the_papers(case):
    """Float64 to 1e-9, several rewards with weights of both signs; who has no score has exactly 0."""
    row, given, paper = CASES[case]
    for seed in range(3):
        for weights in ([1.0, 1.0, 1.0], [0.5, 2.0, -1.0]):
            tables = reward_tables(seed)
            returns, expected = slow_advantages(paper, tables, weights)
            numbers = [
                [torch.nan if r is None else r for r in group]
                for t in [returns, *tables]
                for group in t
            ]
            numbers = torch.tensor(numbers, dtype=torch.float64).view(4, GROUPS, 6)
            found = build_loss(find_objective(row, **given)).advantages(
                numbers[0], numbers[1:], weights
            )
            torch.testing.assert_close(
                found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-11
            )
            assert (found[numbers[0].isnan()] == 0).all() and (found != 0).any()


# ------------------------------------------------------------------------------------------- loss and gradient

LENGTHS = [5, 1, 3, 2, 7, 4, 1, 6]
SPREADS = [
    0.5,
    1.0,
    1e-4,
    0.2,
    1.0,
    2e-4,
    0.1,
    0.02,
]  # of l in each completion: for clips from 1e-4 to 5
FIELDS = {
    "old": "action_log_probs",
    "ref": "log_probs_ref",
    "sampler": "sampler_log_probs",
    "keep": "policy_mask",
}
LEAVES = ("lp", "entropy", "exact_kl")


def completions(seed):
    """Plain float64 vectors of each completion; seeds 0 and 2 have an l, a d and a gap beyond every limit."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for n, scale in zip(LENGTHS, SPREADS, strict=True):
        noise = torch.randn(4, n, generator=g, dtype=torch.float64)
        lp = -torch.rand(n, generator=g, dtype=torch.float64) * 3 - 0.01
        c = SimpleNamespace(
            lp=lp, old=lp - scale * noise[0], ref=lp + noise[1], entropy=noise[2].abs()
        )
        c.exact_kl = noise[3].square()
        c.sampler = c.old - torch.randn(n, generator=g, dtype=torch.float64)
        c.keep = torch.rand(n, generator=g) < 0.7
        c.a = float(torch.randn(1, generator=g))
        out.append(c)
    out[seed % len(out)].a = 0.0
    if seed in (0, 2):
        for i, far in ((1, 25.0), (6, -25.0)):
            c = out[i]
            c.lp[0] = min(0.0, far) - 5
            c.a, c.old, c.ref, c.sampler = (
                (1 - seed) * math.copysign(1.0, far),
                c.lp - far,
                c.lp - far,
                c.lp - 2 * far,
            )
        out[4].lp[:2] -= 4
        out[4].old[:2], out[4].a = out[4].lp[:2] + torch.tensor([-3.2, 3.2]), -1.3
        out[4].sampler[:2] = out[4].old[:2] + torch.tensor([-22.0, 22.0])
        out[5].lp[0], out[5].old[0], out[5].ref[0] = -25.5, -25.5, -0.5
        out[7].lp[0], out[7].old[0] = (
            -30.0,
            -6.0,
        )  # beyond the limit, in the middle of a completion whose mean is not
        out[3].lp[0], out[3].old[0], out[3].a = (
            -0.1,
            -2.0,
            0.8,
        )  # a probability that has gone up by 0.77
    for c in out:
        for name in LEAVES:
            getattr(c, name).requires_grad_()
    return out


def slow_loss(p, cs, on_policy, keep):
    """The loss of a whole optimizer step, and what the metrics count: r, KL, and tokens that learn nothing."""
    rows, r_sum, kl_sum, idle = [], 0.0, 0.0, 0
    for c in cs:
        lp, old = list(c.lp), (c.lp if on_policy else c.old).tolist()
        losses = p.term([x - o for x, o in zip(lp, old, strict=True)], lp, c.a)
        if c.a != 0:
            learns = torch.autograd.grad(sum(losses) + 0 * c.lp.sum(), c.lp, retain_graph=True)[0]
            idle += int((learns == 0).sum())
        if p.sampler:
            weights = SAMPLERS[p.sampler](
                [o - float(s) for o, s in zip(old, c.sampler, strict=True)], p.cap
            )
            losses = [w * x for w, x in zip(weights, losses, strict=True)]
        if keep:
            losses = [x if k else 0.0 * x for k, x in zip(c.keep, losses, strict=True)]
        row = []
        for x, y, o, ref, h, exact in zip(
            losses, lp, old, c.ref, c.entropy, c.exact_kl, strict=True
        ):
            r = ratios([y - o], "token")[0]
            kl = KL[p.kl](y - ref, r, exact) if p.beta else 0.0
            row.append(x + p.beta * kl - p.bonus * h)
            r_sum, kl_sum = r_sum + r.item(), kl_sum + plain(kl)
        rows.append(row)
    return MEANS[p.mean](rows, p.scale), r_sum, kl_sum, idle


def none_in_padding(gradient, mask):
    """A NaN there, 0 × ∞, would go on into every weight of the network."""
    assert (gradient[~mask] == 0).all()


def batch(cs, on_policy=False, keep=False):
    """What train.py would hand to the loss: pad_batch's batch and the padded leaves; then garbage in the padding."""
    singles = []
    for c in cs:
        other = {f: getattr(c, k) for k, f in FIELDS.items()}
        other |= {"action_log_probs": None} if on_policy else {}
        other |= {} if keep else {"policy_mask": None}
        e = Experience.of([1, 2], [3] * len(c.lp))
        singles.append(replace(e, advantages=torch.tensor(c.a, dtype=torch.float64), **other))
    e = pad_batch(singles)
    garbage = iter([torch.nan, torch.inf, -torch.inf, 1e30] * 4)
    for field in fields(e):
        value = getattr(e, field.name)
        if value is not None and value.shape == e.action_mask.shape and value.is_floating_point():
            value[~e.action_mask] = next(garbage)
    padding = (-0.3, torch.nan, torch.inf)
    padded = []
    for name, value in zip(LEAVES, padding, strict=True):
        leaf = torch.full(e.action_mask.shape, value, dtype=torch.float64)
        for i, c in enumerate(cs):
            leaf[i, : len(c.lp)] = getattr(c, name)
        leaf.register_hook(lambda gradient: none_in_padding(gradient, e.action_mask))
        padded.append(leaf)
    return e, padded


def gradients(loss, cs):
    leaves = [getattr(c, name) for c in cs for name in LEAVES]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]
    )


def fast_loss(o, cs, size, **how):
    """The sum over micro-batches of `size`, with the weights of the whole step, and the metrics."""
    # In a run a policy mask comes with --top_entropy, which the paper's row does not have.
    module = ObjectiveLoss(o) if how.get("keep") else build_loss(o)
    total, sums = 0.0, {}
    weights = module.token_weights([len(c.lp) for c in cs], MAX_NEW_TOKENS).double()
    for i in range(0, len(cs), size):
        e, (lp, entropy, exact_kl) = batch(cs[i : i + size], **how)
        others = [entropy, exact_kl] if o.needs_exact_kl else [entropy]
        loss, metrics = module(lp, e, weights[i : i + size], *others)
        total = total + loss
        for name, (value, count) in metrics.items():
            sums[name] = [
                sums.get(name, [0, 0])[0] + float(value),
                sums.get(name, [0, 0])[1] + int(count),
            ]
    return total, sums


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_equal_the_double_loop(case):
    """Value, gradient and metrics, on- and off-policy, with and without a policy mask; every branch is taken."""
    row, given, paper = CASES[case]
    TAKEN.clear()
    for seed, on_policy, keep in [
        (0, False, False),
        (1, False, True),
        (2, False, False),
        (3, True, False),
    ]:
        cs = completions(seed)
        slow, r_sum, kl_sum, idle = slow_loss(paper, cs, on_policy, keep)
        fast, sums = fast_loss(
            find_objective(row, **given), cs, len(cs), on_policy=on_policy, keep=keep
        )
        assert fast.item() == pytest.approx(
            slow.item(), rel=1e-6, abs=1e-7
        )  # the weights are float32
        torch.testing.assert_close(gradients(fast, cs), gradients(slow, cs), rtol=1e-6, atol=1e-12)
        assert sums["train/ratio_mean"] == [pytest.approx(r_sum), sum(LENGTHS)]
        assert sums["train/clipped_share"] == [idle, sum(LENGTHS)]
        assert ("train/kl_divergence" in sums) == (paper.beta > 0)
        assert sums.get("train/kl_divergence", [0.0])[0] == pytest.approx(kl_sum)
        gap = sum(plain(((c.lp if on_policy else c.old) - c.sampler).abs().sum()) for c in cs)
        assert sums["train/sampler_gap"][0] == pytest.approx(gap)
    missed = {what for what, way in TAKEN if (what, not way) not in TAKEN}
    assert not missed, f"the batches must go both ways at {missed}, or this test compares nothing"


def test_dppo_measures_the_move_from_the_true_old_probability():
    """A token that has gone from 0.6 to e^−30, with A < 0, is far below δ: masked. Its r is 0, so little depends on it."""
    o = find_objective("dppo")
    lp = torch.tensor([[-30.0]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([math.log(0.6)], dtype=torch.float64)
    e = replace(Experience.of([1], [2]), advantages=torch.tensor(-1.0), action_log_probs=old)
    loss, metrics = build_loss(o)(lp, pad_batch([e]), torch.ones(1))
    assert torch.autograd.grad(loss, lp)[0] == 0 and metrics["train/clipped_share"][0] == 1


def whole_loss(module, cs, weights, on_policy):
    e, (lp, entropy, _) = batch(cs, on_policy)
    return module(lp, e, weights, entropy)


@pytest.mark.parametrize("given", [{}, {"clip_eps": 0.1, "kl_weight": 0.0}, {"kl_weight": 0.5}])
def test_the_papers_row_is_the_same_in_both_classes(given):
    """loss.py is the whole of the paper's row: `ObjectiveLoss`, through its dictionaries, gives the same bits."""
    o = find_objective("grpo", **given)
    paper, general = build_loss(o), ObjectiveLoss(o)
    assert type(paper) is GRPOLoss
    for seed in range(4):
        cs = completions(seed)
        returns = torch.rand(3, 5, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
        found = [m.advantages(returns, returns[None], [1.0]) for m in (paper, general)]
        assert torch.equal(*found) and torch.equal(
            found[0], objective_advantages(returns, returns[None], [1.0], o)
        )
        lengths = [len(c.lp) for c in cs]
        weights = [m.token_weights(lengths, MAX_NEW_TOKENS) for m in (paper, general)]
        assert (
            torch.equal(*weights) and paper.trains_zero_advantage == general.trains_zero_advantage
        )
        for on_policy in (False, True):
            (a, of_paper), (b, of_general) = (
                whole_loss(m, cs, weights[0], on_policy) for m in (paper, general)
            )
            assert a == b and torch.equal(gradients(a, cs), gradients(b, cs))
            assert of_paper == of_general
    k3 = [f(LOGITS, REF) for f in (approx_kl_divergence, kl_divergence)]
    assert torch.equal(*k3)


@pytest.mark.parametrize("row", OBJECTIVES)
def test_micro_batches_add_up_to_the_full_batch(row):
    """Also with everything else on: a mean inside each micro-batch, whitening or a baseline there, would show."""
    corrected = {"entropy_weight": 0.1, "sampler_correction": "sequence_truncate", "kl_weight": 0.1}
    for given, how in ({}, {}), (corrected, {"keep": True}):
        cs = completions(1)
        o = find_objective(row, **given)
        full, sums = fast_loss(o, cs, len(cs), **how)
        for size in (1, 2, 3, 4):
            part, other = fast_loss(o, cs, size, **how)
            torch.testing.assert_close(
                gradients(part, cs), gradients(full, cs), rtol=1e-12, atol=1e-15
            )
            full, _ = fast_loss(o, cs, len(cs), **how)
            assert part.item() == pytest.approx(full.item(), rel=1e-12)
            assert other == {k: [pytest.approx(v), n] for k, (v, n) in sums.items()}


@pytest.mark.parametrize("row", OBJECTIVES)
def test_an_empty_completion_is_as_if_it_were_not_there(row):
    """It has no token to train; it must not count in a mean, nor make 0/0."""
    cs = completions(2)
    o = find_objective(row, kl_weight=0.1)
    e, (lp, entropy, _) = batch(cs)
    e.action_mask[3] = False
    module = build_loss(o)
    weights = module.token_weights(e.action_mask.sum(-1).tolist(), MAX_NEW_TOKENS)
    loss, _ = module(lp, e, weights.double(), entropy)
    without, _ = fast_loss(o, cs[:3] + cs[4:], len(cs))
    torch.testing.assert_close(loss, without, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(loss, cs), gradients(without, cs), rtol=1e-12, atol=0)


# --------------------------------------------------------------------------------------- KL, in expectation

LOGITS = torch.tensor([0.3, -0.8, 1.1, 0.0, -0.2], dtype=torch.float64)
REF = torch.log_softmax(torch.tensor([0.1, 0.4, 0.5, -0.9, 0.2], dtype=torch.float64), 0)
OLD = torch.log_softmax(torch.tensor([0.9, -0.3, 0.2, 0.4, -0.6], dtype=torch.float64), 0)


def expectation(estimator, old=None):
    """Value and gradient of Σ_x π_old(x) estimator(x) over the five tokens; `old` None: on-policy."""
    logits = LOGITS.clone().requires_grad_()
    lp = torch.log_softmax(logits, 0)
    old = lp.detach() if old is None else old
    value = (old.exp() * kl_divergence(lp, REF, estimator, (lp - old).exp())).sum()
    return value.detach(), torch.autograd.grad(value, logits)[0]


def exact(forward):
    """Value and gradient of KL(π ‖ ref), or of KL(ref ‖ π)."""
    logits = LOGITS.clone().requires_grad_()
    lp = torch.log_softmax(logits, 0)
    value = (lp.exp() * (lp - REF)).sum() if forward else (REF.exp() * (REF - lp)).sum()
    return value.detach(), torch.autograd.grad(value, logits)[0]


@pytest.mark.parametrize("estimator", [k for k in CHOICES["kl_estimator"] if k != "full"])
def test_kl_estimators_in_expectation(estimator):
    """The comment above KL_ESTIMATORS, enumerated: what each one is as a value, and as a gradient."""
    base = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}.get(
        estimator.removesuffix("+"), estimator.removesuffix("+")
    )
    value, gradient = expectation(estimator)
    kl, right = exact(forward=True)
    _, other = exact(forward=False)
    assert torch.isclose(value, kl, rtol=1e-12) == (base not in ("abs", "k2"))
    directions = {"none": torch.zeros(5, dtype=torch.float64), "right": right, "other": other}
    expected = {"k1": "none", "k2": "right", "k3": "other", "k3-ratio": "right", "abs": "neither"}
    expected = "right" if estimator.endswith("+") else expected[base]
    found = [
        name
        for name, g in directions.items()
        if torch.allclose(gradient, g, rtol=1e-12, atol=1e-15)
    ]
    assert found == [expected] or (found == [] and expected == "neither")


def test_only_the_ratio_keeps_the_kl_right_off_policy():
    """`k3-ratio`, value and gradient; the plain estimators are of another distribution then."""
    for estimator in ("k1", "k2", "k3", "k3+", "k3-ratio"):
        found = [
            torch.allclose(a, b, rtol=1e-12)
            for a, b in zip(expectation(estimator, OLD), exact(True), strict=True)
        ]
        assert found == [estimator == "k3-ratio"] * 2, estimator


# ------------------------------------------------------------------------------------- refusals, entropy bonus

# (row, columns that mean nothing together, words of the sentence, the same mended)
REFUSED = [
    ("sapo", {"clip_eps": 0.2}, "sapo does not clip", {"surrogate": "clip"}),
    ("sapo", {"clip_ratio_c": 3.0}, "belongs to --surrogate clip", {"surrogate": "clip"}),
    ("grpo", {"clip_ratio_c": 1.2}, "must be more than 1 . clip_eps_high = 1.2", {"clip_ratio_c": 1.21}),
    ("dppo", {"ratio_level": "sequence"}, "no use for --ratio_level sequence", {"ratio_level": "token"}),
    ("grpo", {"loss_scale_factor": 9.0}, "not to seq-mean-token-mean", {"loss_agg_mode": "seq-mean-token-sum-norm"}),
    ("dapo", {"kl_estimator": "k2"}, "without a KL", {"kl_weight": 0.1}),
    ("grpo", {"kl_in_reward": True, "kl_estimator": "k3+"}, "kl_estimator k3. means nothing in it", {"kl_estimator": "k3"}),
    ("gdpo", {"kl_in_reward": True}, "normalize_then_sum does not use", {"kl_in_reward": False}),
    ("grpo", {"relative_reward_weight": 0.0}, "nothing would be learned", {"baseline_reward_weight": 1.0}),
    ("grpo", {"advantage": "raw"}, "no std to divide by", {"advantage_std": "none"}),
    ("reinforce", {"dynamic_sampling": 5}, "does learn", {"advantage": "group"}),
    ("gspo", {"top_entropy": 0.2}, "reaches its whole sequence", {"ratio_level": "sequence-token"}),
    ("gmpo", {"sampler_correction": "token_mask"}, "must be of the sequence", {"sampler_correction": "sequence_mask"}),
    ("grpo", {"sampler_cap": 2.0}, "belongs to --sampler_correction", {"sampler_correction": "token_mask"}),
]  # fmt: skip
# More ways to the same sentences, and their neighbours.
REFUSED_TOO = [
    (
        "reinforce",
        {"clip_eps_high": 0.2},
        "reinforce does not clip",
        {"surrogate": "dppo", "ratio_level": "token"},
    ),
    ("cispo", {"clip_ratio_c": 9.0}, "not to cispo", {"surrogate": "clip"}),
    ("gspo", {"surrogate": "gmpo"}, "no use for --ratio_level", {"surrogate": "cispo"}),
    ("gspo", {"surrogate": "reinforce"}, "no use for --ratio_level", {"surrogate": "sapo"}),
    ("dapo", {"kl_in_reward": True}, "without a KL", {"kl_weight": 0.1}),
    ("rloo", {"kl_estimator": "full"}, "A reward has no gradient", {"kl_in_reward": False}),
    (
        "rloo",
        {"kl_estimator": "k3-ratio"},
        "A reward has no gradient",
        {"kl_estimator": "low_var_kl"},
    ),
    *(
        (row, {column: "nonsense"}, "nonsense", {column: None})
        for row in ("grpo",)
        for column in CHOICES
    ),
]


@pytest.mark.parametrize(("row", "given", "sentence", "mended"), REFUSED + REFUSED_TOO)
def test_what_means_nothing_is_refused_and_its_neighbour_is_not(row, given, sentence, mended):
    """The sentence that names the fault; one column mended, and the row is built with what was asked for."""
    with pytest.raises(UserError, match=sentence):
        find_objective(row, **given)
    o = find_objective(row, **(given | mended))
    assert all(getattr(o, k) == v for k, v in (given | mended).items() if v is not None)


def test_every_refusal_is_reached():
    """As many sentences in table.py's checks as in the table above, each of them another one; an unknown row too."""
    checks = table.check_policy_term, table.check_advantages, table.check_kl, table.check_tokens
    trees = [ast.parse(inspect.getsource(check)) for check in checks]
    returns = [n.value for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Return)]
    sentences = [v for v in returns if not (isinstance(v, ast.Constant) and v.value is None)]
    assert len(sentences) == len(REFUSED)
    own = [
        f for f in vars(table).values() if inspect.isfunction(f) and f.__module__ == table.__name__
    ]
    every = [f for f in own if f.__name__.startswith("check_") and f is not table.check_objective]
    assert every == list(checks), "a check that this test does not know"
    assert len({sentence for _, _, sentence, _ in REFUSED}) == len(REFUSED)
    with pytest.raises(UserError, match="objective"):
        find_objective("ppo")


def test_the_adaptive_entropy_bonus_moves_acts_and_is_saved():
    """0.005 a step towards the target, inside [0, 1], acting only at or below the target; the state is a checkpoint's."""
    o = find_objective("dapo", entropy_weight=0.01, entropy_target=0.5)
    dapo = build_loss(find_objective("dapo"))
    assert build_loss(o).trains_zero_advantage and not dapo.trains_zero_advantage
    assert build_loss(find_objective("dapo", entropy_target=0.5)).trains_zero_advantage
    loss = build_loss(o)
    expected = [
        (0.4, 0.015, True),
        (0.5, 0.02, True),
        (0.6, 0.015, False),
        (0.3, 0.02, True),
        *[(0.9, 0.0, False)] * 6,
    ]
    for i, (entropy, weight, acts) in enumerate(expected):
        loss.adapt(entropy)
        if i < 4:
            assert float(loss.entropy_weight) == pytest.approx(weight)
        assert loss.entropy_bonus == (pytest.approx(weight) if acts else 0.0)
    assert float(loss.entropy_weight) == 0.0, "never below 0"
    for _ in range(250):
        loss.adapt(0.1)
    assert loss.entropy_bonus == 1.0, "never above 1"
    loss.adapt(0.7)
    again = build_loss(o)
    again.load_state_dict(loss.state_dict())
    assert again.entropy_bonus == 0.0 and float(again.entropy_weight) == float(loss.entropy_weight)
    again.adapt(0.2)
    assert again.entropy_bonus == pytest.approx(1.0)
    grown = build_loss(find_objective("dapo", entropy_target=0.5))
    grown.adapt(0.1)
    e, (lp, entropy, _) = batch(completions(1)[:1])
    loss, before = (f(lp, e, torch.full((1,), 0.2), entropy)[0] for f in (grown, dapo))
    assert (before - loss).item() == pytest.approx(0.005 * entropy.mean().item()), (
        "one that began at 0 acts too"
    )
    fixed = build_loss(find_objective("grpo", entropy_weight=0.01))
    fixed.adapt(9.0)
    assert fixed.entropy_bonus == pytest.approx(0.01), "without a target it stays"
