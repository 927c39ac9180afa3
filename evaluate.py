"""Accuracy of a model on held-out questions, greedy and sampled, with its 95 % interval.

    python evaluate.py                             the newest run in runs/, with its own settings
    python evaluate.py --model runs/NAME           the newest checkpoint of a run
    python evaluate.py --preset tiny                   a preset's starting model
    python evaluate.py --model runs/NAME --eval_samples 8        pass@8 as well

What is measured is explained in support/evaluation.py.
"""

from functools import partial

from accelerate.utils import set_seed

from loss import sequences_log_probs
from objectives.table import NAMES
from rollout import rollout
from support.command_line import parse_run_config
from support.errors import command
from support.evaluation import evaluate, held_out_questions
from support.metrics import meaning
from support.model import build_accelerator, load_model, load_tokenizer
from support.monitor import quiet_progress
from support.preflight import check_model


@command
def main(argv: list[str]) -> None:
    """Evaluate `--model` and print each figure with its meaning."""
    config, _ = parse_run_config(argv, __doc__, NAMES)
    accelerator = build_accelerator(config)
    tokenizer = load_tokenizer(config.model)
    questions = held_out_questions(config, tokenizer)
    model = load_model(config.model, config.sampling_precision, quantize=config.quantize)
    check_model(model, tokenizer, config, sequences_log_probs)
    model.to(accelerator.device)
    set_seed(config.seed)
    sample = partial(rollout, model, tokenizer)
    metrics = evaluate(sample, questions, config, quiet_progress("evaluate"))
    print(f"{config.model} on {len(questions)} held-out questions")
    for name, (total, count) in metrics.items():
        print(f"  {name:24} {total / count:8.4f}   {meaning(name)}")


if __name__ == "__main__":
    main()
