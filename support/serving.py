"""A service: a run's models behind a queue, and what its training would have said of an answer."""

import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from support import serving_queue
from support.answers import find_answer, find_reasoning, is_correct
from support.config import Config
from support.data import Question
from support.serving_options import Options
from support.serving_page import outside_tags
from support.serving_prompts import Chat, prompt_of
from support.serving_queue import Answer, Answerer, Job, Refused
from support.user_rewards import reward_arguments

COLDEST = 1e-6  # of temperatures but 0: logits are divided by it, and have to stay finite


@dataclass
class Service:
    """What the routes need: the run, who answers, and what training would say of an answer."""

    config: Config
    name: str  # of the run or model, without where it is
    options: Options
    answerer: Answerer
    tokenizers: dict[str, Any]  # by the name of a model: of the event loop alone
    examples: list[Question]
    rewards: dict[str, Callable[..., list[float]]]  # as those of reward.py
    weights: list[float]
    advantages: Callable[..., Tensor]  # as GRPOLoss.advantages

    def job(self, model: str, chat: Chat, seed: int | None, **settings: Any) -> Job:
        """A job for one of the models; Refused if it cannot be asked that."""
        if model not in self.tokenizers:
            have = " and ".join(self.tokenizers)
            raise Refused(404, f"There is no model {model[:40]!r} here, only {have}.")
        if 0 < settings["sampling"].temperature < COLDEST:
            raise Refused(400, f"`temperature` is 0 (greedy), or {COLDEST:g} at the least.")
        prompt, ids, messages = prompt_of(chat, self.tokenizers[model], self.config)
        seed = secrets.randbits(48) if seed is None else seed
        return Job(model, prompt, ids, messages, seed=seed, **settings)

    def listen(self, jobs: list[Job]) -> AsyncIterator:
        """The events of jobs, within the time of a request."""
        return serving_queue.listen(self.answerer, jobs, self.options.timeout)

    async def answers(self, jobs: list[Job]) -> list[list[Answer]]:
        """The answers of jobs."""
        return await serving_queue.answers_of(self.answerer, jobs, self.options.timeout)

    def judged(self, job: Job, answers: list[Answer], reference: str | None) -> list[dict]:
        """Each answer in its parts; with a reference, what training would have said of it."""
        texts = [opened(job) + answer.text for answer in answers]
        rows = [
            {**parts(text, answer), "model": job.model}
            for text, answer in zip(texts, answers, strict=True)
        ]
        if reference:
            returns, advantages = self.training_says(job, answers, reference)
            for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
                row["reward"] = returns[i]
                row["correct"] = is_correct(text, reference, answers[i].truncated)
                if advantages:
                    row["advantage"] = advantages[i]
        return rows

    def training_says(
        self, job: Job, answers: list[Answer], reference: str
    ) -> tuple[list[float], list[float]]:
        """The return of each answer; and, of several, the advantages in a group of them alone."""
        group = SimpleNamespace(
            question=Question("", reference, "", prompt=job.prompt), completions=answers
        )
        given = reward_arguments([group], self.config)
        asked = given.prompts, given.completions
        rewards = torch.tensor([f(*asked, **given.columns) for f in self.rewards.values()])
        returns = torch.tensor(self.weights) @ rewards  # (n,), of (K,) and (K, n)
        if len(answers) < 2:
            return returns.tolist(), []
        advantages = self.advantages(returns[None], rewards[:, None], self.weights)
        return returns.tolist(), advantages[0].tolist()


def opened(job: Job) -> str:
    """The tag that a prompt has opened for its answer, or ""."""
    return Question("", "", "", prompt=job.prompt).opened


def parts(text: str, answer: Answer) -> dict[str, Any]:
    """The fields of the tutorial's `data`, read as the trainer reads; and length and end."""
    return {
        "assistant_response": text,
        "reasoning_process": find_reasoning(text) or "",
        "final_answer": find_answer(text, answer.truncated) or "",
        "clean_response": outside_tags(text),
        "tokens": len(answer.ids),
        "truncated": answer.truncated,
    }
