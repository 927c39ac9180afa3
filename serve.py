"""Ask the trained model over HTTP: a page, the tutorial's API, OpenAI's API, and an MCP tool.

    python serve.py                        the newest run, on http://127.0.0.1:16020/
    python serve.py --model runs/NAME --port 8080
    python serve.py --mcp stdio            the MCP tool for a program that starts this one
    python serve.py --backend http://localhost:8000      the model is at a vLLM server, say

Prompt, budget, precision and adapters are those of the run. Every request is answered by the
rollout's own `complete`, together with others that wait (support/serving_queue.py); the event loop
only listens. docs/service.md has each route, with an example.
"""

import asyncio
import contextlib
import copy
import json
import os
import secrets
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loss import GRPOLoss, sequences_log_probs
from objectives.equations import build_loss
from objectives.table import NAMES, objective_of
from reward import REWARDS
from rollout import Completion, Group, complete
from support import serving_queue
from support.answers import find_answer, find_reasoning, is_correct
from support.checkpoint import find_model
from support.command_line import parse_run_config, quantize_of
from support.config import Config
from support.data import Question
from support.errors import UserError, command
from support.evaluation import held_out_questions
from support.generation import Sampling
from support.model import build_accelerator, load_model, load_tokenizer
from support.preflight import check_model
from support.serving_gate import Gate, is_loopback, patient_protocol, refusal
from support.serving_options import Options, bind, check_packages, read_options
from support.serving_page import outside_tags, page
from support.serving_prompts import prompt_of
from support.serving_queue import Answer, Answerer, Job, ModelQueue, Piece, Refused

EXAMPLES = 50  # questions of the test set that the page offers
MESSAGE = "Question solved successfully"  # the tutorial's


@dataclass
class Service:
    """What the routes need: the run, who answers, and what training would say of an answer."""

    config: Config
    name: str  # of the run or model, without where it is
    options: Options
    answerer: Answerer
    tokenizers: dict[str, Any]  # by the name of a model: of the event loop alone
    examples: list[Question]
    loss: GRPOLoss
    rewards: dict[str, Any]
    weights: list[float]

    def job(self, model: str, chat: list[dict[str, str]], **settings: Any) -> Job:
        """A job for one of the models; Refused if it cannot be asked that."""
        if model not in self.tokenizers:
            have = " and ".join(self.tokenizers)
            raise Refused(404, f"There is no model {model[:40]!r} here, only {have}.")
        prompt, ids = prompt_of(chat, self.tokenizers[model], self.config)
        seed = settings.pop("seed")
        seed = secrets.randbits(48) if seed is None else seed
        return Job(model, prompt, ids, seed=seed, messages=chat, **settings)

    def listen(self, jobs: list[Job]) -> AsyncIterator:
        """The events of jobs, within the time of a request."""
        return serving_queue.listen(self.answerer, jobs, self.options.timeout)

    async def answers(self, jobs: list[Job]) -> list[list[Answer]]:
        """The answers of jobs."""
        return await serving_queue.answers_of(self.answerer, jobs, self.options.timeout)

    def judged(self, job: Job, answers: list[Answer], reference: str | None) -> list[dict]:
        """Each answer in its parts; with a reference, what training would have said of it."""
        question = Question(job.messages[-1]["content"], reference or "", "", prompt=job.prompt)
        texts = [question.opened + answer.text for answer in answers]
        found = [
            {**parts(text, answer), "model": job.model}
            for text, answer in zip(texts, answers, strict=True)
        ]
        if reference:
            completions = [Completion([0] * a.tokens, a.text, a.truncated) for a in answers]
            returns, advantages = self.training_says(Group(question, completions))
            for i, (row, text) in enumerate(zip(found, texts, strict=True)):
                row["reward"] = returns[i]
                row["correct"] = is_correct(text, reference, answers[i].truncated)
                if advantages:
                    row["advantage"] = advantages[i]
        return found

    def training_says(self, group: Group) -> tuple[list[float], list[float]]:
        """The return of each completion; and, of several, the advantages of the group."""
        import torch

        from support.user_rewards import reward_arguments

        given = reward_arguments([group], self.config)
        asked = given.prompts, given.completions
        rows = [reward(*asked, **given.columns) for reward in self.rewards.values()]
        rewards = torch.tensor(rows).unsqueeze(1)  # (K, 1, n)
        returns = (torch.tensor(self.weights)[:, None, None] * rewards).sum(0)
        if len(group.completions) < 2:
            return returns[0].tolist(), []
        return returns[0].tolist(), self.loss.advantages(returns, rewards, self.weights)[0].tolist()


def parts(text: str, answer: Answer) -> dict[str, Any]:
    """The fields of the tutorial's `data`, read as the trainer reads; and length and end."""
    return {
        "assistant_response": text,
        "reasoning_process": find_reasoning(text) or "",
        "final_answer": find_answer(text, answer.truncated) or "",
        "clean_response": outside_tags(text),
        "tokens": answer.tokens,
        "truncated": answer.truncated,
    }


# ---------------------------------------------------------------- the tutorial's API, and the page


def solve_jobs(service: Service, asked: Any) -> list[Job]:
    """The jobs of a request to /solve_question."""
    most = service.config.max_new_tokens
    if (asked.max_new_tokens or 0) > most:
        raise Refused(400, f"`max_new_tokens` is {most} at the most; start serve.py with more.")
    if asked.n > 1 and asked.temperature == 0:
        raise Refused(400, "Several greedy answers are all the same; give a `temperature` too.")
    names = ["trained", "base"] if asked.model == "both" else [asked.model]
    sampling = Sampling(asked.max_new_tokens or most, asked.temperature)
    chat = [{"role": "user", "content": asked.question}]
    settings = {"sampling": sampling, "seed": asked.seed, "count": asked.n}
    return [service.job(name, chat, streams=asked.stream, **settings) for name in names]


def solved(
    service: Service, asked: Any, jobs: list[Job], answers: list[list[Answer]], start: float
) -> dict[str, Any]:
    """The tutorial's response; `answers`, where there are several; the seed, where it is sampled."""
    rows = [
        row
        for job, own in zip(jobs, answers, strict=True)
        for row in service.judged(job, own, asked.reference)
    ]
    found: dict[str, Any] = {"code": 200, "elapsed_milliseconds": milliseconds_since(start)}
    found["data"] = {name: value for name, value in rows[0].items() if name != "model"}
    found["message"] = MESSAGE
    if len(rows) > 1:
        found["answers"] = rows
    if asked.temperature > 0:
        found["seed"] = jobs[0].seed
    return found


def milliseconds_since(start: float) -> float:
    """As the tutorial writes them."""
    return round(1000 * (time.monotonic() - start), 2)


def add_solve(app: Any, service: Service) -> None:
    """POST /solve_question."""
    from fastapi import Request

    from support.serving_shapes import Solve

    @app.post("/solve_question", operation_id="solve_question")
    async def solve_question(asked: Solve, request: Request) -> Any:
        """Solve a question: reasoning, answer and, with a `reference`, the reward of training."""
        start = time.monotonic()
        jobs = solve_jobs(service, asked)
        if not asked.stream:
            answers = await unless_gone(request, service.answers(jobs))
            return solved(service, asked, jobs, answers, start)
        done: dict[Job, list[Answer]] = {}

        def told(job: Job, event: Piece | list[Answer]) -> list[dict]:
            if isinstance(event, Piece):
                return [{"model": job.model, "sample": event.sample, "text": event.text}]
            done[job] = event
            if len(done) < len(jobs):
                return []
            return [solved(service, asked, jobs, [done[job] for job in jobs], start)]

        return await streamed(request, service.listen(jobs), told)


def add_page(app: Any, service: Service) -> None:
    """GET / and /health."""
    from fastapi import Request
    from fastapi.responses import HTMLResponse, Response

    config = service.config
    html = page(
        {
            "name": service.name,
            "models": list(service.tokenizers),
            "examples": [
                {"question": q.question, "reference": q.reference} for q in service.examples
            ],
            "samples": min(config.group_size, 16),
            "temperature": config.temperature or 1.0,
            "tokens": config.max_new_tokens,
            "rewards": list(service.rewards),
            "key": bool(service.options.api_key),
        }
    )
    health = {"message": f"pocket-grpo serves {service.name}", "status": "healthy"}

    @app.get("/")
    async def index(request: Request) -> Any:
        """The page for a browser; for others that the service is there, as the tutorial's."""
        if "text/html" in request.headers.get("accept", ""):
            return HTMLResponse(html)
        return health

    @app.get("/health")
    async def healthy() -> dict[str, str]:
        """Answered at once, whatever the model is doing."""
        return health

    @app.get("/favicon.ico", include_in_schema=False)
    async def favicon() -> Any:
        return Response(status_code=204)


# ------------------------------------------------------------------------------------- OpenAI's API


def chat_job(service: Service, asked: Any) -> Job:
    """The job of a request to /v1/chat/completions."""
    asked.check_others()
    most = service.config.max_new_tokens
    budget = min(most, asked.max_completion_tokens or asked.max_tokens or most)
    temperature = 1.0 if asked.temperature is None else asked.temperature
    return service.job(
        asked.model,
        [{"role": message.role, "content": message.text()} for message in asked.messages],
        sampling=Sampling(budget, temperature, asked.top_p or 1.0),
        seed=asked.seed,
        count=asked.n or 1,
        stop=asked.stops(),
        streams=bool(asked.stream),
    )


def usage(job: Job, answers: list[Answer]) -> dict[str, int]:
    """Tokens read and written."""
    read, written = len(job.prompt_ids), sum(answer.tokens for answer in answers)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def finish_reason(answer: Answer) -> str:
    """In OpenAI's words."""
    return "length" if answer.truncated else "stop"


def add_openai(app: Any, service: Service) -> None:
    """GET /v1/models and POST /v1/chat/completions."""
    from fastapi import Request

    from support.serving_shapes import Chat

    began = int(time.time())

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The models that can be asked."""
        rows = [
            {"id": name, "object": "model", "created": began, "owned_by": service.name}
            for name in service.tokenizers
        ]
        return {"object": "list", "data": rows}

    @app.post("/v1/chat/completions")
    async def chat_completions(asked: Chat, request: Request) -> Any:
        """A chat's next message; with `stream`, in pieces."""
        job = chat_job(service, asked)
        common = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time())}
        common["model"] = job.model
        if asked.stream:
            counts = bool((asked.stream_options or {}).get("include_usage"))
            told = chunks_of(common, counts)
            return await streamed(request, service.listen([job]), told, "[DONE]")
        (answers,) = await unless_gone(request, service.answers([job]))
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "finish_reason": finish_reason(answer),
                "logprobs": None,
            }
            for i, answer in enumerate(answers)
        ]
        counted = usage(job, answers)
        return {**common, "object": "chat.completion", "choices": choices, "usage": counted}


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


# -------------------------------------------------------------------------- what the routes share


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


def build_app(service: Service) -> Gate:
    """The whole service as an ASGI application."""
    from fastapi import FastAPI

    app = FastAPI(title="pocket-grpo", docs_url=None, redoc_url=None)
    for add in (add_page, add_solve, add_openai):
        add(app, service)
    add_errors(app)
    paths = {route.path for route in app.routes}
    return Gate(app, service.options.host, service.options.api_key, paths)


# ------------------------------------------------------------------------------------- the command


def build_service(config: Config, base: str | None, options: Options) -> Service:
    """Load the models and what the page shows; UserError if something does not work."""
    models = {"trained": load(config.model, config, config.quantize)}
    if base and base != "none":
        models["base"] = load(find_model(base), config, quantize_of(base))
    for model, _ in models.values():
        model.to(build_accelerator(config).device)
    tokenizers = {name: copy.deepcopy(tokenizer) for name, (_, tokenizer) in models.items()}
    answerer = ModelQueue(models, complete, options.queue, config.rollout_batch_size)
    try:
        examples = held_out_questions(config, tokenizers["trained"])[:EXAMPLES]
    except UserError as error:
        print(f"the page has no examples: {error}")
        examples = []
    known = all(name in REWARDS for name in config.reward)
    names, weights = (config.reward, config.reward_weights) if known else (["accuracy"], [1.0])
    rewards = {name: REWARDS[name] for name in names}
    loss = build_loss(objective_of(config))
    folder = Path(config.model)
    name = f"{folder.parent.name}/{folder.name}" if folder.is_dir() else config.model
    return Service(
        config, name, options, answerer, tokenizers, examples, loss, rewards, list(weights)
    )


def load(name: str, config: Config, quantize: str) -> tuple[Any, Any]:
    """A model and its tokenizer, checked."""
    tokenizer = load_tokenizer(name)
    model = load_model(name, config.sampling_precision, quantize=quantize)
    check_model(model, tokenizer, replace(config, model=name), sequences_log_probs)
    return model, tokenizer


async def serve(service: Service, socket: Any) -> None:
    """Answer until Ctrl-C (or SIGTERM)."""
    import uvicorn

    settings = uvicorn.Config(
        build_app(service),
        http=patient_protocol(),
        ws="none",
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=2,
    )
    service.answerer.start()
    socket.listen(512)
    host, port = socket.getsockname()[:2]
    print(f"serving {service.name} on http://{host}:{port}/ (Ctrl-C stops)", flush=True)
    try:
        await uvicorn.Server(settings).serve(sockets=[socket])
    finally:
        service.answerer.stop()


@command
def main(argv: list[str]) -> None:
    """Read the command line, load, and serve."""
    check_packages()
    config, others = parse_run_config(argv, __doc__, NAMES, **Options.HELP)
    options = read_options(others)
    with bind(options.host, options.port) as socket:
        service = build_service(config, others["base"], options)
        asyncio.run(serve(service, socket))


if __name__ == "__main__":
    main()
