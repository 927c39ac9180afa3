"""The queue of a service: requests wait here, and one thread answers them, several together.

The event loop of the service never computes: it submits jobs, and listens. The thread takes the
oldest job and all others that are sampled alike, up to `batch_size` completions, and gives them to
the rollout's own `complete` (which is handed in). What comes out is what a rollout would sample:
greedy tokens are the same in any batch (in fp32; bf16 rounds by the shape of a batch), and with a
seed s a job's completions are those of `torch.manual_seed(s)` and a rollout of its group.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch

from support.errors import UserError
from support.generation import Sampling, end_tokens, with_seeds
from support.monitor import log_line
from support.serving_text import TextStream, cut

GATHER_SHARE, GATHER_SECONDS = 0.1, 0.05  # of the last batch's time, and at most


class Refused(Exception):
    """A request that is not answered: its HTTP status, and one sentence that says what to change.

    Args:
        retry: seconds after which the same request may be answered.
    """

    def __init__(self, status: int, sentence: str, retry: int | None = None) -> None:
        super().__init__(sentence)
        self.status, self.retry = status, retry


class Piece(NamedTuple):
    """Some more text of one of a job's completions."""

    sample: int
    text: str


@dataclass(frozen=True)
class Answer:
    """One completion, as clients see it."""

    text: str
    ids: list[int]
    truncated: bool  # the budget was used up before an end token (or a stop text) came


@dataclass(eq=False)
class Job:
    """What one request asks of one model: `count` completions of a prompt.

    Made inside the event loop that listens to it.
    """

    model: str
    prompt: str
    prompt_ids: list[int]
    messages: list[dict[str, str]]  # the prompt as a chat, where the model has a chat template
    sampling: Sampling
    seed: int
    count: int = 1
    stop: tuple[str, ...] = ()
    streams: bool = False  # pieces are wanted, not only the whole
    events: asyncio.Queue = field(default_factory=asyncio.Queue)
    loop: Any = field(default_factory=asyncio.get_running_loop)
    gone: bool = False  # nobody listens any more

    def tell(self, event: Piece | list[Answer] | Exception) -> None:
        """Hand an event to who listens, from any thread."""
        with suppress(RuntimeError):  # the service has been stopped
            self.loop.call_soon_threadsafe(self.events.put_nowait, (self, event))


class Answerer(Protocol):
    """What answers jobs: the queue below, or a server elsewhere (support/serving_backend.py)."""

    def submit(self, jobs: list[Job]) -> None:
        """Take the jobs; Refused if there is no place for them."""

    def leave(self, job: Job) -> None:
        """Nobody listens to this job any more."""


async def listen(
    answerer: Answerer, jobs: list[Job], seconds: float
) -> AsyncIterator[tuple[Job, Piece | list[Answer]]]:
    """Submit jobs and yield their events: pieces, and at last the answers of each.

    Whoever stops to iterate gives the place of the jobs free.

    Raises:
        Refused: no place, an error of the model, or not done after `seconds`.
    """
    end, open_jobs = time.monotonic() + seconds, set(jobs)
    for job in jobs[1:]:
        job.events = jobs[0].events
    answerer.submit(jobs)
    try:
        while open_jobs:
            try:
                left = max(0.0, end - time.monotonic())
                job, event = await asyncio.wait_for(jobs[0].events.get(), left)
            except asyncio.TimeoutError as error:
                raise Refused(
                    504, f"There was no answer within {seconds:g} seconds; ask for fewer tokens."
                ) from error
            if isinstance(event, Exception):
                raise event
            if isinstance(event, list):
                open_jobs.discard(job)
            yield job, event
    finally:
        for job in open_jobs:
            answerer.leave(job)


async def answers_of(answerer: Answerer, jobs: list[Job], seconds: float) -> list[list[Answer]]:
    """The answers of each job, in order."""
    found: dict[Job, list[Answer]] = {}
    async with aclosing(listen(answerer, jobs, seconds)) as events:
        async for job, event in events:
            if isinstance(event, list):
                found[job] = event
    return [found[job] for job in jobs]


class ModelQueue:
    """A bounded queue before one thread that computes.

    Args:
        models: (model, tokenizer) by name; the models in eval mode. The tokenizers are used by the
            thread alone: a tokenizer is not made for two threads.
        complete: as rollout.complete.
        limit: completions that may wait; what would be more is refused.
        batch_size: completions that are computed together at the most.
    """

    def __init__(
        self,
        models: dict[str, tuple[Any, Any]],
        complete: Callable[..., list[Any]],
        limit: int,
        batch_size: int,
    ) -> None:
        self.models, self.complete = models, complete
        self.limit, self.batch_size = limit, batch_size
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.changed = threading.Condition()
        self.stopped = False
        self.took = 0.0  # seconds of the last batch
        self.thread = threading.Thread(target=self.work, name="model", daemon=True)

    def start(self) -> None:
        """Begin to answer; once is enough."""
        if not self.thread.is_alive():
            self.thread.start()

    def stop(self) -> None:
        """Answer nobody any more; the thread ends after the token that it is at."""
        with self.changed:
            self.stopped = True
            for job in [*self.waiting, *self.running]:
                job.gone = True
                job.tell(Refused(503, "The server is being stopped."))
            self.changed.notify()

    def submit(self, jobs: list[Job]) -> None:
        """Let jobs wait; Refused (429) where not all of them have a place."""
        with self.changed:
            if self.stopped:
                raise Refused(503, "The server is being stopped.")
            check_count(jobs, self.limit)
            if count(self.waiting) + count(jobs) > self.limit:
                retry = max(1, round(self.took * (1 + self.limit / self.batch_size)))
                raise Refused(429, f"{self.limit} completions are waiting; try again later.", retry)
            self.waiting += jobs
            self.changed.notify()

    def leave(self, job: Job) -> None:
        """Give a job's place free; if it is being computed, its rows end at their next token."""
        with self.changed:
            job.gone = True
            if job in self.waiting:
                self.waiting.remove(job)

    def take(self) -> list[Job]:
        """The next batch, once there is one: the oldest job, and those that are sampled alike.

        Clients that were just answered ask again in a moment. A short wait for as many as there
        were keeps them in one batch, where they would fall apart into two that take turns.
        """
        with self.changed:
            expected = min(self.batch_size, count(self.running) + count(self.waiting))
            self.running = []
            moment = min(GATHER_SECONDS, GATHER_SHARE * self.took)
            self.changed.wait_for(lambda: self.stopped or count(self.waiting) >= expected, moment)
            self.changed.wait_for(lambda: self.stopped or self.waiting)
            batch: list[Job] = []
            for job in list(self.waiting):
                alike = not batch or (job.model, job.sampling) == (
                    batch[0].model,
                    batch[0].sampling,
                )
                if alike and (not batch or count([*batch, job]) <= self.batch_size):
                    batch.append(job)
                    self.waiting.remove(job)
            self.running = batch
        return batch

    def work(self) -> None:
        """The thread: batch after batch, whatever happens to one of them."""
        while not self.stopped:
            batch = self.take()
            start = time.monotonic()
            try:
                if batch:
                    self.answer(batch)
            except Exception as error:
                self.answer_alone(batch, error)
            self.took = time.monotonic() - start

    def answer_alone(self, batch: list[Job], error: Exception) -> None:
        """After an error, each job by itself: it may be of one of them, or of the memory.

        Not those that stream, whose text may have begun.
        """
        for job in batch:
            try:
                if len(batch) == 1 or job.streams:
                    raise error
                self.answer([job])
            except UserError as found:
                job.tell(Refused(500, str(found)))
            except Exception as found:  # whatever the code of a model raises
                log_line(f"the model failed: {type(found).__name__}")
                job.tell(Refused(500, f"The model failed ({type(found).__name__})."))

    def answer(self, batch: list[Job]) -> None:
        """Compute the completions of jobs that are sampled alike, and tell each its own."""
        model, tokenizer = self.models[batch[0].model]
        ends = [*end_tokens(model, tokenizer), tokenizer.pad_token_id]
        rows = [(job, sample) for job in batch for sample in range(job.count)]
        texts = [TextStream(tokenizer.decode, ends, job.stop) for job, _ in rows]

        def watch(places: list[int], tokens: list[int]) -> list[int]:
            ended = []
            for place, token in zip(places, tokens, strict=True):
                (job, sample), text = rows[place], texts[place]
                if job.streams or job.stop:
                    piece = text.add(token)
                    if piece and job.streams:
                        job.tell(Piece(sample, piece))
                if job.gone or (job.stop and text.over):
                    ended.append(place)
            return ended

        prompts = [prompt for job in batch for prompt in prompts_of(job)]
        sampling = replace(batch[0].sampling, batch_size=len(rows), watch=watch)
        found = iter(zip(self.complete(model, tokenizer, prompts, sampling), texts, strict=True))
        for job in batch:
            answers = list(finished(job, [next(found) for _ in range(job.count)]))
            job.tell(answers)


def finished(job: Job, found: list[tuple[Any, TextStream]]) -> Iterator[Answer]:
    """The answers of a job, after what was left to tell of their texts."""
    for sample, (completion, stream) in enumerate(found):
        text, stopped = cut(completion.text, job.stop)
        piece = stream.finish(text)
        if piece and job.streams:
            job.tell(Piece(sample, piece))
        yield Answer(text, completion.ids, completion.truncated and not stopped)


def prompts_of(job: Job) -> list[tuple[list[int], Any]]:
    """The prompt of each completion of a job, with the seed that a rollout would give it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        return with_seeds([job.prompt_ids] * job.count)


def count(jobs: list[Job]) -> int:
    """How many completions jobs ask for."""
    return sum(job.count for job in jobs)


def check_count(jobs: list[Job], limit: int) -> None:
    """Refused (400) if jobs ask for more completions than ever have a place."""
    if count(jobs) > limit:
        raise Refused(400, f"At most {limit} completions can be asked for at once.")
