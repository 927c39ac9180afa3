"""The numbers of docs/tutorial.*.md, each computed by the project's own code.

In the text a number is followed by a comment with its name, which no reader sees:
`+1.620<!--=compare.right-->`. tests/test_tutorial_pages.py rounds the value here to the digits that
the text shows, and compares. What is given in an example (a probability, a length) is here too.
"""

import json
from pathlib import Path

import torch

from loss import GRPOLoss, approx_kl_divergence, group_advantages
from objectives.equations import KL_ESTIMATORS, leave_one_out, objective_advantages, token_weights
from objectives.table import find_objective
from replay_buffer import Experience, pad_batch
from reward import accuracy, tutorial
from support.config import PRESETS, Config

ROOT = Path(__file__).resolve().parent.parent
# Of the tiny-grpo tutorial, section 6.1: twelve answers to one question, and the rewards that its
# text gives them. The reference is 6个 (个 counts things, as "pieces" does).
APPLES = ["6个", "6", "6个苹果", "6", "6", "5个", "需要计算", "10个", "5", "6", "6个", "6个苹果"]
PRINTED = [1.0, 0.5, 1.0, 1.0, 0.5, 0.01, 0.01, 0.01, 0.01, 0.5, 1.0, 1.0]


def one_token(log_prob, old=None, reference=None, advantage=0.0):
    """A batch of one completion of one token."""
    numbers = {"action_log_probs": old, "log_probs_ref": reference}
    return Experience(
        sequences=torch.zeros(1, 2, dtype=torch.long),
        attention_mask=torch.ones(1, 2, dtype=torch.bool),
        action_mask=torch.ones(1, 1, dtype=torch.bool),
        advantages=torch.tensor([advantage]),
        **{k: v and torch.tensor([[v]]).log() for k, v in numbers.items()},
    )


def policy_term(p, p_old, advantage):
    """The policy term of a token, and its gradient at log π."""
    log_prob = torch.tensor([[p]]).log().requires_grad_()
    loss, _ = GRPOLoss(kl_weight=0.0)(
        log_prob, one_token(p, old=p_old, advantage=advantage), torch.ones(1)
    )
    loss.backward()
    return loss.item(), log_prob.grad.item()


def kl(name, p, p_ref):
    """A KL estimate of a token, and its gradient at log π."""
    log_prob = torch.tensor(p).log().requires_grad_()
    value = KL_ESTIMATORS[name](log_prob, torch.tensor(p_ref).log())
    value.backward()
    return value.item(), log_prob.grad.item()


def without_std(returns):
    """R - mean, as Dr. GRPO has it."""
    objective = find_objective("grpo", advantage_std="none")
    return objective_advantages(returns, returns[None], [1.0], objective)


def read_rows(name):
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]


def right(count, group=8):
    """The rewards of a group in which `count` completions are right."""
    return torch.tensor([1.0] * count + [0.0] * (group - count))


def score():
    texts = [f"<answer>{answer}</answer>" for answer in APPLES]
    paid = {
        "text": PRINTED,
        "tutorial": tutorial([], texts, ["6个"] * 12),
        "ours": accuracy([], texts, ["6个"] * 12, [False] * 12),
    }
    rewards = {f"{who}.{i}": r for who, row in paid.items() for i, r in enumerate(row, 1)}
    compared = {who: group_advantages(torch.tensor(row)).tolist() for who, row in paid.items()}
    advantages = {f"{who}.A{i}": compared[who][i - 1] for who in paid for i in (2, 6)}
    return rewards | advantages | {f"i{i}": i for i in range(1, 13)}


def compare():
    two, same = group_advantages(right(2)), torch.full((12,), 0.01)
    alone, others = without_std(right(2)), leave_one_out(right(2))
    one = group_advantages(right(1))
    return {
        "G": 8,
        "count": 2,
        "mean": right(2).mean(),
        "std": right(2).std(),
        "right": two[0],
        "wrong": two[-1],
        "sum": two.sum().abs(),
        "centered_right": alone[0],
        "centered_wrong": alone[-1],
        "others_right": others[0],
        "others_wrong": others[-1],
        "shrink": alone[0] / others[0],
        "same": 0.01,
        "noise": ((same - same.mean()) / (same.std() + 1e-8))[0],
        "ours": group_advantages(same)[0],
        "highest": one[0],
        "spread": two.std(correction=0),
    }


def buffer():
    sizes = ((3, 4), (5, 2))
    batch = pad_batch([Experience.of([7] * p, [8] * c) for p, c in sizes])
    width = batch.sequences.shape[1]
    given = {
        f"{'prompt' if k == 0 else 'length'}.{i}": s[k] for i, s in enumerate(sizes) for k in (0, 1)
    }
    return given | {
        "L": width,
        "P": width - batch.num_actions,
        "C": batch.num_actions,
        "theirs": width - 1,
        "sampled": batch.action_mask.sum(),
    }


def ratio():
    up, down = policy_term(0.35, 0.25, 1.62), policy_term(0.35, 0.25, -0.54)
    return {
        "old": 0.25,
        "new": 0.35,
        "r": 0.35 / 0.25,
        "good": 1.62,
        "bad": -0.54,
        "minus_bad": 0.54,
        "good_loss": up[0],
        "good_gradient": abs(up[1]),
        "bad_loss": down[0],
        "bad_gradient": down[1],
        "high": 1 + GRPOLoss().clip_eps,
        "minus_high": -1 - GRPOLoss().clip_eps,
    }


def divergence():
    names = ("k1", "k2", "k3")
    values = {name: kl(name, 0.35, 0.25) for name in names}
    found = {name: value for name, (value, _) in values.items()}
    assert (
        abs(approx_kl_divergence(torch.tensor(0.35).log(), torch.tensor(0.25).log()) - found["k3"])
        < 1e-7
    )
    return (
        found | {f"{name}_gradient": values[name][1] for name in names} | {"p": 0.35, "ref": 0.25}
    )


def means():
    grpo = GRPOLoss().token_weights
    modes = {
        "paper": lambda lengths: grpo(lengths, 0),
        "dapo": lambda lengths: token_weights(lengths, "token-mean"),
        "dr": lambda lengths: token_weights(lengths, "seq-mean-token-sum-norm", max(lengths)),
    }
    found = {}
    for pair in ((3, 5), (10, 100)):
        for name, weigh in modes.items():
            weights = weigh(list(pair))
            found |= {f"{name}.{n}": w for n, w in zip(pair, weights, strict=True)}
    return found | {f"length.{n}": n for n in (3, 5, 10, 100)}


def update():
    config, ours = Config(**PRESETS["tutorial"]), Config()
    groups = right(6, ours.group_size).repeat(ours.rollouts_per_step, 1)
    # The standard error of the mean of a batch that is drawn without replacement.
    size, count = ours.train_batch_size, ours.sequences_per_step
    scatter = group_advantages(groups).std() * (1 / size - 1 / count) ** 0.5
    return {
        "scatter": scatter,
        "questions": config.rollouts_per_step,
        "G": config.group_size,
        "completions": config.sequences_per_step,
        "size": config.train_batch_size,
        "steps": config.optimizer_steps,
        "stale": config.optimizer_steps - 1,
        "gsm8k": Config().optimizer_steps,
        "tiny": Config(**PRESETS["tiny"]).optimizer_steps,
        "gsm8k_size": Config().train_batch_size,
    }


def well():
    """Of the two runs in results/tutorial_runs.jsonl."""
    rows = read_rows("results/tutorial_runs.jsonl")
    well, sick = ([row for row in rows if row["run"] == run] for run in ("healthy", "sick"))
    names = {
        "kl": "train/kl_divergence",
        "clipped": "train/clipped_share",
        "grad": "train/grad_norm",
    }
    tokens = "rollout/completion_tokens"
    return {
        "before": well[0]["eval/accuracy"],
        "after": well[-1]["eval/accuracy"],
        "sick_after": sick[-1]["eval/accuracy"],
        "reward": sick[1]["rollout/returns"],
        "sick_reward": sick[2]["rollout/returns"],
        "kl": max(row[names["kl"]] for row in well[1:]),
        "sick_kl_after": sick[-1][names["kl"]],
        "clipped": max(row[names["clipped"]] for row in well[1:]),
        "grad": max(row[names["grad"]] for row in well[1:]),
        "grad_after": well[-1][names["grad"]],
        "entropy": well[1]["train/entropy"],
        "entropy_ten": well[10]["train/entropy"],
        "tokens": well[1][tokens],
        "tokens_after": well[-1][tokens],
        "sick_tokens": max(row[tokens] for row in sick[1:]),
        "sick_tokens_after": sick[-1][tokens],
    } | {f"sick_{name}": sick[1][metric] for name, metric in names.items()}


def minute():
    """Of the five runs in results/demo.jsonl."""
    rows = read_rows("results/demo.jsonl")
    first = [row for row in rows if row["step"] == 0]
    last = [row for row in rows if row["step"] == 40]
    greedy = [row["eval/accuracy"] for row in last]
    return {
        "before": first[0]["eval/accuracy"],
        "worst": min(greedy),
        "best": max(greedy),
        "tokens_before": first[0]["eval/completion_tokens"],
        "tokens_after": last[0]["eval/completion_tokens"],
        "seeds": len(last),
        "questions": len(read_rows("tiny/task/test.jsonl")),
    }


def std():
    found = {"G": 8}
    for count in (1, 4, 7):
        ours, alone = group_advantages(right(count)), without_std(right(count))
        found |= {
            f"{count}.right": ours[0],
            f"{count}.wrong": ours[-1],
            f"{count}.centered_right": alone[0],
            f"{count}.centered_wrong": alone[-1],
            f"{count}.count": count,
            f"{count}.std": right(count).std(),
            f"{count}.push": ours.abs().sum(),
            f"{count}.centered_push": alone.abs().sum(),
        }
    shares = {
        name: 100 * found[f"7.{push}"] / found[f"4.{push}"]
        for name, push in (("share", "push"), ("share_centered", "centered_push"))
    }
    return found | shares


CHAPTERS = {
    "minute": minute,
    "score": score,
    "compare": compare,
    "buffer": buffer,
    "ratio": ratio,
    "kl": divergence,
    "means": means,
    "update": update,
    "well": well,
    "std": std,
}


def numbers():
    """Every number by its name, `chapter.name`."""
    return {f"{c}.{name}": float(v) for c, make in CHAPTERS.items() for name, v in make().items()}
