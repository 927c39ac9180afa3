"""What stays the same on every rung: the model, the questions, the reward, the optimizer, the log.

Nothing here is reinforcement learning. The rungs are the numbered files beside this one; each is a
function `train(task)`, and `climb` below gives it a command line.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the five files of the project

from loss import sequences_log_probs  # noqa: E402
from replay_buffer import Experience, pad_batch  # noqa: E402
from reward import accuracy  # noqa: E402
from rollout import Group, rollout  # noqa: E402
from support.config import PRESETS, Config  # noqa: E402
from support.data import QuestionStream  # noqa: E402
from support.errors import command  # noqa: E402
from support.evaluation import evaluate, held_out_questions  # noqa: E402
from support.generation import Sampling  # noqa: E402
from support.model import load_model, load_tokenizer  # noqa: E402
from support.prompts import training_questions  # noqa: E402
from support.schedule import seed_step  # noqa: E402

EVALUATE_EVERY = 5  # steps


class Task:
    """The bundled model, 0.8 million parameters, on the bundled word problems (`tiny/`).

    Args:
        seed: decides the questions, the samples and the order of the mini-batches.
        reward_offset: is added to every reward, right or wrong.
        held_out: questions of an evaluation.
    """

    def __init__(
        self, steps: int = 15, seed: int = 1, reward_offset: float = 0.0, held_out: int = 250
    ) -> None:
        settings = PRESETS["tiny"] | {"seed": seed, "eval_questions": held_out}
        self.config = config = Config(preset="tiny", **settings)
        self.tokenizer = load_tokenizer(config.model)
        self.model = load_model(config.model, "fp32")
        self.start = load_model(config.model, "fp32").requires_grad_(False)  # as it was
        self.questions = QuestionStream(training_questions(config, self.tokenizer), seed)
        self.held_out = held_out_questions(config, self.tokenizer)
        self.sampling = Sampling(config.max_new_tokens, batch_size=256)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.0)
        self.rewards = {"accuracy": with_offset(accuracy, reward_offset)}
        self.offset, self.last = reward_offset, steps
        self.seconds = 0.0  # of the processor, in steps: other work on the machine does not count
        self.rows: list[dict[str, float]] = []

    def steps(self) -> Iterator[int]:
        """The numbers of the steps. Before each one, everything that is drawn in it is seeded."""
        self.rows.append({"step": 0, "seconds": 0.0, "accuracy": self.held_out_accuracy()})
        print(line_of(self.rows[-1]), flush=True)
        for step in range(1, self.last + 1):
            self.generator = seed_step(self.config.seed, step)
            self.began = time.process_time()
            yield step

    def update(self, loss: Tensor) -> None:
        """One optimizer step."""
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def log(self, step: int, groups: list[Group]) -> None:
        """What a step has sampled; and every few steps the accuracy on held-out questions."""
        self.seconds += time.process_time() - self.began
        completions = [completion for group in groups for completion in group.completions]
        rewards = torch.cat([group.returns for group in groups]) - self.offset
        row = {
            "step": step,
            "seconds": round(self.seconds, 2),
            "right": round(rewards.mean().item(), 4),
            "tokens": sum(len(c.ids) for c in completions) / len(completions),
        }
        if step % EVALUATE_EVERY == 0 or step == self.last:
            row |= {"accuracy": self.held_out_accuracy(), "kl": self.distance(groups)}
        self.rows.append(row)
        print(line_of(row), flush=True)

    def held_out_accuracy(self) -> float:
        """The share of the held-out questions that the likeliest answer gets right."""
        sample = lambda *arguments: rollout(self.model, self.tokenizer, *arguments)  # noqa: E731
        right, count = evaluate(sample, self.held_out, self.config)["eval/accuracy"]
        return right / count

    @torch.no_grad()
    def log_probs_at_start(self, experiences: list[Experience]) -> list[Tensor]:
        """How likely the model at the start finds the tokens of each completion, (C,) each."""
        batch = pad_batch(experiences)
        sequences = batch.sequences, batch.attention_mask, batch.num_actions
        rows = sequences_log_probs(self.start, *sequences)[0]
        return [row[: e.num_actions] for row, e in zip(rows, experiences, strict=True)]

    def distance(self, groups: list[Group]) -> float:
        """How far the model has moved: KL to the model at the start, nats per sampled token."""
        experiences = [e for group in groups for e in group.experiences]
        now = torch.cat([e.sampler_log_probs for e in experiences])
        return round((now - torch.cat(self.log_probs_at_start(experiences))).mean().item(), 5)


def with_offset(reward: Callable[..., list[float]], offset: float) -> Callable[..., list[float]]:
    """A reward function whose values are all moved by `offset`."""
    return lambda *texts, **columns: [value + offset for value in reward(*texts, **columns)]


def line_of(row: dict[str, float]) -> str:
    """A row of the log as a line of the console."""
    words = {"right": "{:.3f} of the samples right", "tokens": "{:.1f} tokens each"}
    words |= {"accuracy": "{:.3f} of the held-out questions", "kl": "KL {:.3f}"}
    parts = [text.format(row[name]) for name, text in words.items() if name in row]
    return " | ".join([f"step {row['step']:3} | {row['seconds']:5.1f} s", *parts])


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def climb(train: Callable[[Task], Any], words: str | None) -> None:
    """The command line of a rung."""

    @command
    def main(argv: list[str]) -> None:
        parser = argparse.ArgumentParser(
            description=words, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("--steps", type=positive, default=15)
        parser.add_argument("--seed", type=positive, default=1)
        parser.add_argument(
            "--reward_offset", type=float, default=0.0, help="added to every reward"
        )
        args = parser.parse_args(argv)
        train(Task(args.steps, args.seed, args.reward_offset))

    main()
