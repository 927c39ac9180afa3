"""What the routes of a service share: clients that leave, answers in pieces, and refusals."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from support.serving_gate import refusal
from support.serving_queue import Answer, Job, Piece, Refused


async def unless_gone(request: Any, work: Awaitable) -> Any:
    """The result of `work`, which is cancelled when the client leaves."""

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(leave())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise Refused(499, "The client has gone.")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def streamed(
    request: Any, events: AsyncIterator, told: Callable[..., list[dict]], last: str = ""
) -> Any:
    """Server-sent events. What is refused before the first event has a status of its own."""
    from fastapi.responses import StreamingResponse

    first = await unless_gone(request, anext(events))

    def written(job: Job, event: Any) -> str:
        return "".join(f"data: {json.dumps(row)}\n\n" for row in told(job, event))

    async def body() -> AsyncIterator[str]:
        async with contextlib.aclosing(events):
            try:
                yield written(*first)
                async for event in events:
                    yield written(*event)
            except Refused as error:
                yield f"data: {json.dumps(refusal(request.url.path, error)[1])}\n\n"
            if last:
                yield f"data: {last}\n\n"

    return StreamingResponse(body(), media_type="text/event-stream")


def usage(job: Job, answers: list[Answer]) -> dict[str, int]:
    """Tokens read and written."""
    read, written = len(job.prompt_ids), sum(len(answer.ids) for answer in answers)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def finish_reason(answer: Answer) -> str:
    """In OpenAI's words."""
    return "length" if answer.truncated else "stop"


def chunks_of(common: dict, counts: bool) -> Callable[[Job, Piece | list[Answer]], list[dict]]:
    """What turns the events of a job into OpenAI's chunks."""
    begun: set[int] = set()

    def chunk(sample: int, delta: dict, reason: str | None = None) -> dict:
        choice = {"index": sample, "delta": delta, "finish_reason": reason, "logprobs": None}
        return {**common, "object": "chat.completion.chunk", "choices": [choice]}

    def told(job: Job, event: Piece | list[Answer]) -> list[dict]:
        if isinstance(event, Piece):
            role = {} if event.sample in begun else {"role": "assistant"}
            begun.add(event.sample)
            return [chunk(event.sample, {**role, "content": event.text})]
        ends = [chunk(i, {}, finish_reason(answer)) for i, answer in enumerate(event)]
        if counts:
            whole = {**common, "object": "chat.completion.chunk", "choices": []}
            ends.append({**whole, "usage": usage(job, event)})
        return ends

    return told


def add_errors(app: Any) -> None:
    """Whatever is refused is one sentence, in the shape of the API that was asked."""
    from fastapi import Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    from support.serving_shapes import Chat, Solve, sentence

    def answer(request: Request, error: Refused) -> JSONResponse:
        status, body, headers = refusal(request.url.path, error)
        return JSONResponse(body, status, headers)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return answer(request, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        shape = Chat if request.url.path.startswith("/v1/") else Solve
        return answer(request, Refused(400, sentence(error.errors(), shape)))

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        words = {400: "The body is not valid JSON.", 404: "There is nothing at this path."}
        words[405] = "This path does not take this method."
        return answer(request, Refused(error.status_code, words.get(error.status_code, "Refused.")))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return answer(request, Refused(500, f"The server failed ({type(error).__name__})."))
