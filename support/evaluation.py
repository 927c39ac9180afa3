"""Accuracy on held-out questions, greedy and sampled, with its 95 % interval.

Strict accuracy asks for the answer inside the `<answer>` tag; flexible accuracy takes the last
number where there is no tag: their difference is format, not arithmetic. Evaluation draws
nothing from the random numbers of training.
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from support.answers import is_correct, is_correct_flexible
from support.config import Config, check_place, resolve_path
from support.data import Question, load_questions
from support.errors import UserError
from support.generation import Sampling
from support.metrics import Metrics
from support.prompts import with_prompts

Sample = Callable[..., list[Any]]  # groups of completions for questions, as rollout.rollout


def wilson_interval(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % confidence interval of a proportion (Wilson, 1927).

    Right also near 0 and 1, and for few questions.
    """
    p, n = correct / total, total
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def held_out_questions(config: Config, tokenizer: Any) -> list[Question]:
    """The first `eval_questions` of the test split, with prompts: what a run is evaluated on."""
    name = resolve_path(config.eval_dataset or config.dataset)
    if not config.eval_dataset and Path(name).is_file():
        raise UserError(
            f"--dataset {config.dataset} is one file, without held-out questions; give "
            "--eval_dataset, a folder with train.* and test.*, or --eval_interval 0."
        )
    check_place(config.eval_dataset, "--eval_dataset")
    questions = load_questions(name, "test", config)
    questions, dropped = with_prompts(questions, tokenizer, config)
    if dropped:
        print(
            f"{dropped} held-out questions left out: prompt longer than {config.max_prompt_tokens} "
            "tokens"
        )
    return questions[: config.eval_questions or None]


def evaluate(
    sample: Sample,
    questions: list[Question],
    config: Config,
    show: Callable[[Iterable], Iterable] = iter,
    keep: Callable[[list[Any]], None] = lambda groups: None,
) -> Metrics:
    """Accuracy on `questions`: greedy; and of `eval_samples` samples, where the config asks for it.

    Args:
        sample: (questions, group_size, sampling, progress) → groups.
        show: wraps the loops over batches (a progress bar).
        keep: is given the greedy answers, a group of one for each question.
    Returns:
        the eval/ metrics as (sum, count).
    """
    greedy = Sampling(config.max_new_tokens, temperature=0.0, batch_size=config.rollout_batch_size)
    with torch.random.fork_rng(devices=[]):
        groups = sample(questions, 1, greedy, show)
    keep(groups)
    answers = [group.completions[0] for group in groups]
    n, pairs = len(questions), list(zip(answers, questions, strict=True))
    said = [(q.opened + a.text, q.reference, a.truncated) for a, q in pairs]
    strict, flexible = (sum(f(*one) for one in said) for f in (is_correct, is_correct_flexible))
    low, high = wilson_interval(strict, n)
    metrics: Metrics = {
        "eval/accuracy": (strict, n),
        "eval/accuracy_low": (low, 1),
        "eval/accuracy_high": (high, 1),
        "eval/accuracy_flexible": (flexible, n),
        "eval/completion_tokens": (sum(len(a.ids) for a in answers), n),
        "eval/truncated_share": (sum(a.truncated for a in answers), n),
    }
    if config.eval_samples:
        metrics |= evaluate_samples(sample, questions, config, show)
    return metrics


def evaluate_samples(
    sample: Sample,
    questions: list[Question],
    config: Config,
    show: Callable[[Iterable], Iterable],
) -> Metrics:
    """pass@k with k = eval_samples: a question passes if any of its samples is right."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        groups = sample(questions, config.eval_samples, Sampling.of(config), show)
    right = [
        [is_correct(q.opened + c.text, q.reference, c.truncated) for c in group.completions]
        for group in groups
        for q in [group.question]
    ]
    return {
        "eval/sampled_accuracy": (sum(map(sum, right)), len(questions) * config.eval_samples),
        "eval/pass_at_k": (sum(map(any, right)), len(questions)),
    }
