"""Accuracy on held-out questions, greedy and sampled, with its 95 % interval.

    python evaluate.py                                   the newest run in runs/, with the run's own settings
    python evaluate.py --model runs/NAME                 the newest checkpoint of a run
    python evaluate.py --preset tiny                     a preset's starting model
    python evaluate.py --model runs/NAME --eval_samples 8          pass@8 as well

Strict accuracy asks for the answer inside the `<answer>` tag; flexible accuracy takes the last number where there is
no tag, so the difference between the two is format, not arithmetic. Evaluation draws nothing from the random numbers
of training.
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import nn

from answers import is_correct, is_correct_flexible
from checkpoint import checkpoints, find_model
from config import Config, located, parse_config
from data import Question, load_questions, with_prompts
from errors import UserError, command
from model import build_accelerator, load_model, load_tokenizer
from monitor import meaning, progress
from preflight import check_model
from rollout import Sampling, rollout

Metrics = dict[str, tuple[float, float]]


def wilson_interval(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % confidence interval of a proportion (Wilson, 1927): right also near 0 and 1 and for few questions."""
    p, n = correct / total, total
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def held_out_questions(config: Config, tokenizer: Any) -> list[Question]:
    """The questions that the run is evaluated on, with prompts: the first `eval_questions` of the test split."""
    name = located(config.eval_dataset or config.dataset)
    if not config.eval_dataset and Path(name).is_file():
        raise UserError(
            f"--dataset {config.dataset} is one file, without held-out questions; give --eval_dataset, a folder "
            "with train.* and test.*, or --eval_interval 0."
        )
    questions = load_questions(name, "test", config.dataset_config)
    questions, dropped = with_prompts(questions, tokenizer, config.system_prompt, config.max_prompt_tokens)
    if dropped:
        print(f"{dropped} held-out questions left out: prompt longer than {config.max_prompt_tokens} tokens")
    return questions[: config.eval_questions or None]


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    questions: list[Question],
    config: Config,
    show: Callable[[Iterable], Iterable] = iter,
) -> Metrics:
    """Evaluate `model` on `questions`: greedy, and from `eval_samples` samples where the config asks for them.

    Args:
        model: a causal language model in eval mode.
        show: wraps the loops over generate calls (a progress bar).
    Returns:
        the eval/ metrics as (sum, count).
    """
    greedy = Sampling(config.max_new_tokens, temperature=0.0, batch_size=config.rollout_batch_size)
    answers = [group[0] for group in rollout(model, tokenizer, questions, 1, greedy, show)]
    n = len(questions)
    strict = sum(is_correct(a.text, q.reference) for a, q in zip(answers, questions, strict=True))
    flexible = sum(is_correct_flexible(a.text, q.reference) for a, q in zip(answers, questions, strict=True))
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
        metrics |= evaluate_samples(model, tokenizer, questions, config, show)
    return metrics


def evaluate_samples(
    model: nn.Module, tokenizer: Any, questions: list[Question], config: Config, show: Callable[[Iterable], Iterable]
) -> Metrics:
    """pass@k with k = eval_samples: a question passes if any of its samples is right."""
    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p, config.rollout_batch_size)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        groups = rollout(model, tokenizer, questions, config.eval_samples, sampling, show)
    right = [[is_correct(c.text, q.reference) for c in group] for group, q in zip(groups, questions, strict=True)]
    return {
        "eval/sampled_accuracy": (sum(map(sum, right)), len(questions) * config.eval_samples),
        "eval/pass_at_k": (sum(map(any, right)), len(questions)),
    }


def newest_run() -> Path | None:
    """The run in runs/ that has written last, among those with a checkpoint."""
    return max(filter(checkpoints, Path("runs").glob("*")), key=lambda run: run.stat().st_mtime, default=None)


def run_config(argv: list[str], description: str | None, **extra: str) -> tuple[Config, dict[str, str | None]]:
    """The command line of a command that looks at a model: --model may be a run folder or a checkpoint.

    Without --model (and without a preset or a config) it is the newest run in runs/.

    The settings (prompt, dataset, budget) are those of the run that made the model, unless flags say otherwise; the
    extra value `base` is the model that the run started from, or None.
    """
    newest = None if any(a.startswith(("--model", "--preset", "--config")) for a in argv) else newest_run()
    if newest:
        print(f"--model {newest}, the newest run")
        argv = [f"--model={newest}", *argv]
    config, others = parse_config(argv, description, **extra)
    if others["resume"]:
        raise UserError(f"--resume is train.py's; to look at a run say --model {others['resume']}.")
    folder = find_model(config.model)
    saved = Path(folder, "config.yaml")
    others["base"] = others.get("base")
    if saved.is_file() and not any(a.startswith(("--config", "--preset")) for a in argv):
        others["base"] = others["base"] or parse_config(["--config", str(saved)])[0].model
        config, _ = parse_config(["--config", str(saved), *argv], description, **extra)
    return Config(**{**vars(config), "model": folder}), others


@command
def main(argv: list[str]) -> None:
    """Evaluate `--model` and print each figure with its meaning."""
    config, _ = run_config(argv, __doc__)
    accelerator = build_accelerator(config)
    tokenizer = load_tokenizer(config.model)
    questions = held_out_questions(config, tokenizer)
    model = load_model(config.model, config.sampling_precision)
    check_model(model, tokenizer, config)
    model.to(accelerator.device)
    set_seed(config.seed)
    metrics = evaluate(model, tokenizer, questions, config, lambda items: progress(items, "evaluate", leave=False))
    print(f"{config.model} on {len(questions)} held-out questions")
    for name, (total, count) in metrics.items():
        print(f"  {name:24} {total / count:8.4f}   {meaning(name)}")


if __name__ == "__main__":
    main()
