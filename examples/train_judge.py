"""Train a small reward model: is this answer right? From a model's own right and wrong answers.

    python examples/train_judge.py --preset tiny --lr 1e-3 --steps 400 --train_batch_size 64 \
        --run_dir runs/judge
    python train.py --preset tiny --reward model:runs/judge --reward_weights 1

The model that is to be trained later answers training questions; each answer is right or wrong, as
the rule of `--reward accuracy` says. Beside them stand the dataset's own solutions, right ones and
some whose final number was changed. A sequence classifier with one label, made of the same model,
learns to tell them apart (binary cross-entropy). The judge never sees the reference: what it learns
is to check an answer. `steps` are optimizer steps of `train_batch_size` answers.
"""

import random
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import set_seed
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import AutoModelForSequenceClassification

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from objectives.table import NAMES  # noqa: E402
from rollout import rollout  # noqa: E402
from sft import target  # noqa: E402
from support.answers import is_correct  # noqa: E402
from support.checkpoint import new_run_dir  # noqa: E402
from support.command_line import parse_config  # noqa: E402
from support.config import Config, resolve_path  # noqa: E402
from support.data import Question  # noqa: E402
from support.errors import UserError, command, quoted  # noqa: E402
from support.files import open_to_readers, removed_on_failure  # noqa: E402
from support.generation import Sampling  # noqa: E402
from support.model import build_accelerator, load_model, load_tokenizer  # noqa: E402
from support.monitor import progress, quiet_progress  # noqa: E402
from support.prompts import messages_of, training_questions  # noqa: E402
from support.reward_model import RewardModel  # noqa: E402

HELD_OUT = 0.1  # of the questions: the judge is tried on answers to them

Answer = tuple[Question, str, bool]  # a question, what was answered, and whether it is right
Read = tuple[list[int], bool]  # the same, as the judge reads it


def collect(config: Config, tokenizer: Any, questions: list[Question]) -> list[Answer]:
    """The model's own answers to the questions, and the dataset's solutions, right and changed."""
    model = load_model(config.model, config.sampling_precision)
    model.to(build_accelerator(config).device)
    show = quiet_progress("answers")
    groups = rollout(model, tokenizer, questions, config.group_size, Sampling.of(config), show)
    answers = [
        (group.question, c.text, is_correct(c.text, group.question.reference, c.truncated))
        for group in groups
        for c in group.completions
    ]
    chance = random.Random(config.seed)
    for question in questions:
        right = target(question)
        answers.append((question, right, True))
        other = str(int(float(question.reference)) + chance.choice([-10, -2, -1, 1, 2, 10]))
        head, tag, _ = right.rpartition("<answer>")
        answers.append((question, f"{head}{tag}{other}</answer>", False))
    return answers


def read(judge: RewardModel, answers: list[Answer], config: Config) -> list[Read]:
    """The answers as the judge will be given them in training: with the system prompt."""
    chats = [
        [*messages_of(q.question, config.system_prompt), {"role": "assistant", "content": text}]
        for q, text, _ in answers
    ]
    return list(zip(judge.tokens(chats), (right for _, _, right in answers), strict=True))


def fit(judge: RewardModel, answers: list[Read], config: Config) -> None:
    """`config.steps` optimizer steps on batches with as many right as wrong answers."""
    judge.judge.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(judge.judge.parameters(), lr=config.lr, weight_decay=0.01)
    kinds = [[a for a in answers if a[1] is kind] for kind in (True, False)]
    chance, half = random.Random(config.seed), config.train_batch_size // 2
    bar = progress(range(config.steps), "judge")
    for step in bar:
        batch = [each for kind in kinds for each in chance.choices(kind, k=half)]
        truth = torch.tensor([float(right) for _, right in batch])
        found = judge.logits([ids for ids, _ in batch])
        loss = binary_cross_entropy_with_logits(found, truth.to(found.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(judge.judge.parameters(), config.max_norm)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * (1 - step / config.steps)
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, config.steps // 10) == 0:
            bar.write(f"step {step + 1}/{config.steps} | loss {loss.item():.3f}")
    judge.judge.eval()


def try_out(judge: RewardModel, answers: list[Read]) -> float:
    """How often it ranks a right answer above a wrong one: the area under the curve."""
    scores = torch.tensor(judge.scores([ids for ids, _ in answers], 64))
    right = torch.tensor([kind for _, kind in answers])
    above = scores[right][:, None] - scores[~right][None, :]
    return float((above > 0).float().mean() + (above == 0).float().mean() / 2)


def make_judge(
    config: Config, tokenizer: Any, folder: Path, known: list[Answer], new: list[Answer]
) -> None:
    """Fit a judge on `known` answers, try it out on `new` ones, and save it in `folder`."""
    transformers.utils.logging.set_verbosity_error()  # that the head is new is no news here
    model = AutoModelForSequenceClassification.from_pretrained(
        resolve_path(config.model), num_labels=1, dtype=torch.float32, use_safetensors=True
    )
    # Elsewhere, since a judge that is not trained yet would be taken for one.
    with tempfile.TemporaryDirectory() as begun:
        model.save_pretrained(begun)
        tokenizer.save_pretrained(begun)
        judge = RewardModel(begun, build_accelerator(config).device)
    fit(judge, read(judge, known, config), config)
    area = try_out(judge, read(judge, new, config))
    share = sum(right for _, _, right in known) / len(known)
    judge.judge.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    open_to_readers(folder)
    print(
        f"{len(known)} answers, {share:.0%} of them right; a right answer to a new question is "
        f"ranked above a wrong one in {area:.1%} of the pairs\nwritten: {folder}   go on: python "
        f"train.py with your options and --reward {quoted(f'model:{folder}')} --reward_weights 1"
    )


@command
def main(argv: list[str]) -> None:
    """Sample, fit, try out, and save a folder for --reward model:FOLDER."""
    config, others = parse_config(argv, __doc__, NAMES)
    if others["resume"]:
        raise UserError("A judge cannot be resumed: start again, in another --run_dir.")
    if config.adapter_rank:
        raise UserError("A judge has no adapters; leave out --adapter_rank.")
    set_seed(config.seed)
    tokenizer = load_tokenizer(config.model)
    questions = training_questions(config, tokenizer)
    held_out = int(HELD_OUT * len(questions))
    collected = partial(collect, config, tokenizer)
    new, known = collected(questions[:held_out]), collected(questions[held_out:])
    for name, found in (("training", known), ("held out", new)):
        if len({right for _, _, right in found}) < 2:
            raise UserError(f"All answers ({name}) are right, or all wrong; take other questions.")
    folder, _held = new_run_dir(config, resumable=False)
    with removed_on_failure(folder):
        make_judge(config, tokenizer, folder, known, new)


if __name__ == "__main__":
    main()
