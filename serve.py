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
import secrets
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from loss import sequences_log_probs
from objectives.equations import build_loss
from objectives.table import NAMES, objective_of
from reward import REWARDS
from rollout import complete
from support.checkpoint import find_model
from support.command_line import parse_run_config, quantize_of
from support.config import Config
from support.errors import UserError, command
from support.evaluation import held_out_questions
from support.generation import Sampling
from support.model import build_accelerator, load_model, load_tokenizer
from support.preflight import check_model
from support.serving import Service, opened
from support.serving_backend import Backend
from support.serving_events import (
    add_errors,
    chunks_of,
    finish_reason,
    streamed,
    unless_gone,
    usage,
)
from support.serving_gate import Gate, patient_protocol
from support.serving_options import Options, bind, check_packages, listen, read_options
from support.serving_page import page
from support.serving_queue import Answer, Job, ModelQueue, Piece, Refused

EXAMPLES = 50  # questions of the test set that the page offers
MESSAGE = "Question solved successfully"  # the tutorial's


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
    seed = secrets.randbits(48) if asked.seed is None else asked.seed  # the same for both models
    settings = {"sampling": sampling, "seed": seed, "count": asked.n}
    return [service.job(name, chat, streams=asked.stream, **settings) for name in names]


def solved(
    service: Service, asked: Any, jobs: list[Job], answers: list[list[Answer]], start: float
) -> dict[str, Any]:
    """The tutorial's response; with `answers` of several, and the seed where one was needed."""
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
        begun: set[tuple[Job, int]] = set()

        def told(job: Job, event: Piece | list[Answer]) -> list[dict]:
            if isinstance(event, Piece):
                first = "" if (job, event.sample) in begun else opened(job)
                begun.add((job, event.sample))
                return [{"model": job.model, "sample": event.sample, "text": first + event.text}]
            done[job] = event
            if len(done) < len(jobs):
                return []
            return [solved(service, asked, jobs, [done[job] for job in jobs], start)]

        return await streamed(request, service.listen(jobs), told)


def add_mcp(app: Any, service: Service) -> None:
    """/mcp, and what lives as long as the server: the thread of the model, MCP's tasks."""
    from support.serving_mcp import http_app

    server = mcp_server(service)
    app.router.routes.extend(http_app(server).routes)

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        service.answerer.start()
        try:
            async with server.session_manager.run():
                yield
        finally:
            service.answerer.stop()

    app.router.lifespan_context = lifespan


def mcp_server(service: Service) -> Any:
    """The MCP server with the tool `solve_question`."""
    from support.serving_mcp import build_mcp
    from support.serving_shapes import Solve

    async def solve(question: str) -> dict[str, Any]:
        (job,) = solve_jobs(service, Solve(question=question))
        (answers,) = await service.answers([job])
        return service.judged(job, answers, None)[0]

    return build_mcp(solve)


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
                {"question": q.question, "reference": q.reference}
                for q in service.examples
                if not service.options.api_key  # the page itself is open to all
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


def build_app(service: Service) -> Gate:
    """The whole service as an ASGI application."""
    from fastapi import FastAPI

    app = FastAPI(title="pocket-grpo", docs_url=None, redoc_url=None)
    for add in (add_page, add_solve, add_openai, add_mcp):
        add(app, service)
    add_errors(app)
    paths = {route.path for route in app.routes}
    return Gate(app, service.options.host, service.options.api_key, paths)


# ------------------------------------------------------------------------------------- the command


def build_service(config: Config, base: str | None, options: Options) -> Service:
    """Load the models and what the page shows; UserError if something does not work."""
    if options.backend:
        tokenizers = {"trained": load_tokenizer(config.model)}
        answerer = Backend(options.backend, options.backend_model, options.queue)
    else:
        models = {"trained": load(config.model, config, config.quantize)}
        if base and base != "none":
            models["base"] = load(find_model(base), config, quantize_of(base))
        tokenizers = {name: copy.deepcopy(tokenizer) for name, (_, tokenizer) in models.items()}
        answerer = ModelQueue(models, complete, options.queue, config.rollout_batch_size)
    try:
        examples = held_out_questions(config, tokenizers["trained"])[:EXAMPLES]
    except UserError as error:
        print(f"the page has no examples: {error}")
        examples = []
    names, weights = config.reward, config.reward_weights
    if not all(name in REWARDS for name in names):
        print(f"rewards are those of accuracy alone, not of {' '.join(names)}")
        names, weights = ["accuracy"], [1.0]
    folder = Path(config.model)
    return Service(
        config,
        f"{folder.parent.name}/{folder.name}".strip("/") if folder.is_dir() else config.model,
        options,
        answerer,
        tokenizers,
        examples,
        {name: REWARDS[name] for name in names},
        list(weights),
        build_loss(objective_of(config)).advantages,
    )


def load(name: str, config: Config, quantize: str) -> tuple[Any, Any]:
    """A model and its tokenizer, checked."""
    tokenizer = load_tokenizer(name)
    model = load_model(name, config.sampling_precision, quantize=quantize)
    check_model(model, tokenizer, replace(config, model=name), sequences_log_probs)
    return model.to(build_accelerator(config).device), tokenizer


async def serve_http(service: Service, socket: Any) -> None:
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
    listen(socket)
    host, port = socket.getsockname()[:2]
    print(f"serving {service.name} on http://{host}:{port}/ (Ctrl-C stops)", flush=True)
    await uvicorn.Server(settings).serve(sockets=[socket])


async def serve_stdio(service: Service) -> None:
    """Serve the program that has started this one, until it closes our standard input."""
    service.answerer.start()
    try:
        await mcp_server(service).run_stdio_async()
    finally:
        service.answerer.stop()


@command
def main(argv: list[str]) -> None:
    """Read the command line, load, and serve."""
    check_packages()
    # Over standard input and output, standard output is the protocol's.
    stdio = "--mcp=stdio" in argv or ("--mcp", "stdio") in zip(argv, argv[1:], strict=False)
    with contextlib.redirect_stdout(sys.stderr if stdio else sys.stdout):
        config, others = parse_run_config(argv, __doc__, NAMES, **Options.HELP)
        options = read_options(others)
        if stdio:
            service = build_service(config, "none", options)
    if stdio:
        asyncio.run(serve_stdio(service))
        return
    with bind(options.host, options.port) as socket:
        asyncio.run(serve_http(build_service(config, others["base"], options), socket))


if __name__ == "__main__":
    main()
