"""The model of a service at another server: vLLM, SGLang, `transformers serve`, llama.cpp.

That server decides what it computes together, and how it rounds; what a request leaves open it
fills from the model's own generation settings, if it is not started otherwise (docs/service.md).
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from support.errors import UserError
from support.server import Server, reason_of
from support.serving_queue import Answer, Job, Piece, Refused, check_count, count
from support.serving_text import TextStream, cut

CONNECT_SECONDS = 10.0


class Backend:
    """Answers jobs by asking an OpenAI-compatible server, with one request for each completion.

    Args:
        url: of the server, without /v1. name: of the model there; "" for the first that it lists.
        limit: completions that are asked for at the same time.
    Raises:
        UserError: no name is given, and there is no such server, or it lists no model.
    """

    def __init__(self, url: str, name: str, limit: int) -> None:
        self.url, self.name, self.limit = url, name, limit
        self.asking: dict[Job, asyncio.Task] = {}
        if name:  # `transformers serve` lists what is on the hub, and fails where that is not there
            return
        try:
            listed = Server(url, CONNECT_SECONDS).ask("/v1/models", again=False)["data"]
            self.name = listed[0]["id"]
        except (UserError, LookupError, TypeError) as error:
            raise UserError(
                f"--backend {url} is no OpenAI-compatible server that lists a model; start it "
                "(docs/service.md), and give --backend_model if it lists none."
            ) from error

    def start(self) -> None:
        """The connections are made by the event loop that they are used in."""
        import httpx2

        # No proxy: it would not know this machine's `localhost`.
        timeout = httpx2.Timeout(None, connect=CONNECT_SECONDS)
        self.client = httpx2.AsyncClient(base_url=self.url, timeout=timeout, trust_env=False)

    def stop(self) -> None:
        """Leave every request."""
        for task in self.asking.values():
            task.cancel()

    def submit(self, jobs: list[Job]) -> None:
        """Ask for the jobs' completions; Refused (429) where too many are asked for already."""
        check_count(jobs, self.limit)
        if count([*self.asking, *jobs]) > self.limit:
            raise Refused(429, f"{self.limit} completions are asked for; try again later.", 1)
        for job in jobs:
            task = asyncio.get_running_loop().create_task(self.answer(job))
            task.add_done_callback(lambda done, job=job: self.asking.pop(job, None))
            self.asking[job] = task

    def leave(self, job: Job) -> None:
        """Close the connections of a job, which frees its place there."""
        if job in self.asking:
            self.asking[job].cancel()

    async def answer(self, job: Job) -> None:
        """All completions of a job, or one sentence."""
        import httpx2

        asked = [asyncio.ensure_future(self.complete(job, i)) for i in range(job.count)]
        try:
            job.tell(list(await asyncio.gather(*asked)))
        except Refused as error:
            job.tell(error)
        except httpx2.HTTPError as error:
            kind = type(error).__name__
            job.tell(Refused(502, f"The server behind this one cannot be reached ({kind})."))
        except Exception as error:  # whatever else it sends; else the client would wait in vain
            kind = type(error).__name__
            job.tell(
                Refused(502, f"The server behind this one does not speak OpenAI's API ({kind}).")
            )
        finally:
            for one in asked:
                one.cancel()

    async def complete(self, job: Job, sample: int) -> Answer:
        """One completion, its pieces told as they come."""
        text, reason, tokens, stream = "", None, 0, TextStream(str, [], job.stop)
        async for choice, usage in self.choices(job, sample):
            piece = (choice.get("delta") or choice).get("content", choice.get("text")) or ""
            text, tokens = text + piece, tokens + bool(piece)
            reason = choice.get("finish_reason") or reason
            told = stream.grow(text)
            if told and job.streams:
                job.tell(Piece(sample, told))
            tokens = (usage or {}).get("completion_tokens", tokens)
        text, stopped = cut(text, job.stop)  # `transformers serve` leaves the stop text in
        rest = stream.finish(text)
        if rest and job.streams:
            job.tell(Piece(sample, rest))
        truncated = reason == "length" and not stopped
        return Answer(text, [0] * tokens, truncated)  # of its tokens only the number is known

    async def choices(self, job: Job, sample: int) -> AsyncIterator[tuple[dict, dict | None]]:
        """The parts of a streamed response, each with the usage that it brings; to its end."""
        (path, body), ended = self.request(job, sample), False
        async with self.client.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                said = (await response.aread()).decode(errors="replace")
                raise Refused(502, f"The server behind this one refuses: {in_a_line(said)}")
            async for line in response.aiter_lines():
                data = line.removeprefix("data:").strip()
                ended |= data == "[DONE]"
                if not line.startswith("data:") or data == "[DONE]":
                    continue
                found = json.loads(data)
                if "error" in found:
                    raise Refused(502, f"The server behind this one failed: {in_a_line(data)}")
                for choice in found["choices"] or [{}]:
                    ended |= bool(choice.get("finish_reason"))
                    yield choice, found.get("usage")
        if not ended:
            raise Refused(502, "The server behind this one has ended in the middle of an answer.")

    def request(self, job: Job, sample: int) -> tuple[str, dict[str, Any]]:
        """Path and body: the chat of the training, or its text where there is no chat template."""
        sampling = job.sampling
        body = {"model": self.name, "max_tokens": sampling.max_new_tokens, "stream": True}
        body["stream_options"] = {"include_usage": True}
        body["temperature"] = float(sampling.temperature)
        body["seed"] = (job.seed + sample) % 2**31
        if sampling.top_p < 1:
            body["top_p"] = sampling.top_p
        if job.stop:
            body["stop"] = list(job.stop)
        if job.messages:
            return "/v1/chat/completions", {**body, "messages": job.messages}
        return "/v1/completions", {**body, "prompt": job.prompt}


def in_a_line(said: str) -> str:
    """Why a server refuses."""
    with suppress(ValueError):
        said = reason_of(json.loads(said))
    return " ".join(said.split())[:200]
