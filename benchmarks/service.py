"""serve.py under load, alone and beside `transformers serve`: requests a second, waiting, memory.

    python benchmarks/service.py                               the bundled model
    python benchmarks/service.py --model FOLDER --beside       and transformers serve, in turns
    python benchmarks/service.py --write                       only the tables of results/service.md

Clients ask one greedy question after the other, without a pause, and honour Retry-After. Beside
them /health is asked every 50 ms, by a process of its own. Each answer is compared with the
one that the same question gets alone. `--beside` asks both servers over OpenAI's API for as many
tokens, turn about; it needs `pip install openai`, and starts transformers serve in fp32 as well.
Rows go to results/service.jsonl, one for each turn; the newest of each model and load is written
into results/service.md.
"""

import argparse
import asyncio
import http.client
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psutil
from common import (
    RESULTS,
    ROOT,
    command_line,
    machine,
    positive,
    put_between,
    read_jsonl,
    table,
    versions,
    write_jsonl,
)

from support.command_line import Parser
from support.data import load_questions
from support.errors import UserError, command

ROWS, PAGE = RESULTS / "service.jsonl", RESULTS / "service.md"
START_SECONDS = 600  # for a server to load its model
HEALTH_PAUSE = 0.05  # seconds
MIB = 2**20


@dataclass
class Server:
    """One of the servers, and how it is asked."""

    name: str
    argv: list[str]
    port: int
    path: str
    body: dict[str, Any]  # without the question
    asks: Any  # question → the rest of the body
    answer: Any  # response → its text
    process: Any = None
    alone: dict[str, str] = field(default_factory=dict)  # answers without other clients

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}"

    def memory(self) -> float:
        """Resident memory of the process and those that it started, in MiB."""
        root = psutil.Process(self.process.pid)
        return sum(p.memory_info().rss for p in [root, *root.children(recursive=True)]) / MIB


def servers(given: argparse.Namespace) -> list[Server]:
    """serve.py; and, where it is compared, transformers serve with the same model."""
    settings = ["--preset", "tiny", "--max_new_tokens", str(given.max_new_tokens)]
    if given.model != "tiny/model":
        settings += ["--model", given.model, "--max_prompt_tokens", "256"]
    port = given.port
    ours = [sys.executable, str(ROOT / "serve.py"), *settings, "--base", "none"]
    ours += ["--port", str(port), "--queue", str(given.queue), "--timeout", "600"]
    if not given.beside:
        own = {"max_new_tokens": given.max_new_tokens}
        return [
            Server(
                "serve.py", ours, port, "/solve_question", own,
                lambda question: {"question": question},
                lambda found: found["data"]["assistant_response"],
            )
        ]  # fmt: skip
    theirs = [str(Path(sys.executable).with_name("transformers")), "serve", given.model]
    theirs += ["--dtype", "float32", "--device", "cpu", "--port", str(port + 1)]

    def chat(question: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": question}]}

    def said(found: dict) -> str:
        return found["choices"][0]["message"]["content"]

    body = {"max_tokens": given.max_new_tokens, "temperature": 0.0}
    path = "/v1/chat/completions"
    return [
        Server("serve.py", ours, port, path, {**body, "model": "trained"}, chat, said),
        Server(
            "transformers serve", theirs, port + 1, path, {**body, "model": given.model}, chat, said
        ),
    ]


@contextmanager
def started(every: list[Server]) -> Iterator[None]:
    """The servers, once they answer; ended afterwards."""
    try:
        for server in every:
            server.process = subprocess.Popen(
                server.argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
            )
        end = time.monotonic() + START_SECONDS
        for server in every:
            while not is_up(server):
                if server.process.poll() is not None or time.monotonic() > end:
                    raise UserError(f"{server.name} did not start: {' '.join(server.argv)}.")
                time.sleep(0.5)
        yield
    finally:
        for server in every:
            if server.process:
                server.process.terminate()
                server.process.wait(30)


def is_up(server: Server) -> bool:
    """Whether it answers."""
    with suppress(httpx2.HTTPError):
        return httpx2.get(f"{server.url}/health", trust_env=False).status_code == 200
    return False


@dataclass
class Turn:
    """What one turn has seen."""

    seconds: list[float] = field(default_factory=list)  # of each answer
    health: list[float] = field(default_factory=list)
    refused: int = 0  # 429
    failed: int = 0  # anything else
    differ: int = 0  # from the answer without other clients


async def ask(client: httpx2.AsyncClient, server: Server, question: str) -> httpx2.Response:
    """One request."""
    body = {**server.body, **server.asks(question)}
    return await client.post(server.url + server.path, json=body)


async def one_client(server: Server, turn: Turn, questions: list[str], end: float) -> None:
    """Question after question, until the end."""
    async with httpx2.AsyncClient(timeout=600, trust_env=False, verify=False) as client:
        place = 0
        while time.monotonic() < end:
            question, start = questions[place % len(questions)], time.monotonic()
            try:
                response = await ask(client, server, question)
            except httpx2.HTTPError:
                turn.failed += 1
                continue
            if response.status_code == 429:
                turn.refused += 1
                await asyncio.sleep(float(response.headers.get("Retry-After", 1)))
                continue
            place += 1
            if response.status_code != 200:
                turn.failed += 1
                continue
            turn.seconds.append(time.monotonic() - start)
            turn.differ += server.answer(response.json()) != server.alone[question]


def watch_health(port: int, seconds: float) -> list[float]:
    """How long each /health takes; in a process of its own, which has nothing else to do."""
    connection, found = http.client.HTTPConnection("127.0.0.1", port, timeout=600), []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        start = time.monotonic()
        connection.request("GET", "/health")
        connection.getresponse().read()
        found.append(time.monotonic() - start)
        time.sleep(HEALTH_PAUSE)
    return found


async def take_turn(
    server: Server, questions: list[str], clients: int, seconds: float
) -> dict[str, Any]:
    """One load, as a row."""
    turn, start, before = Turn(), time.monotonic(), server.memory()
    end = start + seconds
    shifted = [questions[i:] + questions[:i] for i in range(clients)]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        health = pool.submit(watch_health, server.port, seconds)
        await asyncio.gather(*(one_client(server, turn, own, end) for own in shifted))
        took = time.monotonic() - start
        turn.health = await asyncio.wrap_future(health)
    return {
        "server": server.name,
        "clients": clients,
        "requests_per_second": len(turn.seconds) / took,
        "p50": quantile(turn.seconds, 0.5),
        "p99": quantile(turn.seconds, 0.99),
        "health_p99": quantile(turn.health, 0.99),
        "answers": len(turn.seconds),
        "refused": turn.refused,
        "failed": turn.failed,
        "differ": turn.differ,
        "memory": [before, server.memory()],
    }


def quantile(values: list[float], share: float) -> float | None:
    """The value that this share of them does not pass."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


async def warm_up(server: Server, questions: list[str]) -> None:
    """The answers that questions get alone."""
    async with httpx2.AsyncClient(timeout=600, trust_env=False, verify=False) as client:
        for question in questions:
            response = await ask(client, server, question)
            if response.status_code != 200:
                raise UserError(f"{server.name} refuses: {response.text[:200]}")
            server.alone[question] = server.answer(response.json())


def measure(given: argparse.Namespace) -> None:
    """Every load, turn about, each row written when it is there."""
    questions = [q.question for q in load_questions(str(ROOT / "tiny/task"), "test")]
    questions = questions[: given.questions]
    every = servers(given)
    common = {
        "model": "bundled" if given.model == "tiny/model" else Path(given.model).name,
        "beside": given.beside,
        "queue": given.queue,
        "seconds": given.seconds,
        "max_new_tokens": given.max_new_tokens,
        "command": command_line(sys.argv[1:]),
        "machine": f"{machine()}; {versions()}",
    }
    with started(every):
        for server in every:
            asyncio.run(warm_up(server, questions))
        for clients in given.clients:
            for turn in range(given.turns):
                for server in every:
                    row = asyncio.run(take_turn(server, questions, clients, given.seconds))
                    row = {**common, "turn": turn, **row}
                    print(shown(row), flush=True)
                    write_jsonl(ROWS, [*(r for r in read_jsonl(ROWS) if key(r) != key(row)), row])


def key(row: dict[str, Any]) -> tuple:
    """What a row is about: a newer one about the same takes its place."""
    return tuple(row[k] for k in ("model", "server", "beside", "queue", "clients", "turn"))


HEAD = ["model", "server", "clients", "queue", "turn", "requests/s", "p50 s", "p99 s"]
HEAD += ["health p99 ms", "answers", "429", "failed", "other than alone", "MiB before, after"]


def shown(row: dict[str, Any]) -> str:
    """A row as cells."""

    def number(value: float | None, digits: int) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    cells = [row["model"], row["server"], row["clients"], row["queue"], row["turn"] + 1]
    cells += [number(row["requests_per_second"], 2), number(row["p50"], 2), number(row["p99"], 2)]
    cells += [number(row["health_p99"] and 1000 * row["health_p99"], 1), row["answers"]]
    cells += [row["refused"], row["failed"], row["differ"]]
    return " | ".join(map(str, [*cells, ", ".join(f"{m:.0f}" for m in row["memory"])]))


def write_tables() -> None:
    """The rows between `<!-- load -->` and `<!-- /load -->` of results/service.md."""
    rows = sorted(read_jsonl(ROWS), key=key)
    lines = []
    for beside in (False, True):
        own = [row for row in rows if row["beside"] == beside]
        if own:
            commands = dict.fromkeys(f"`{row['command']}`" for row in own)
            about = f"{', '.join(commands)}; {own[-1]['machine']}; turns of {own[-1]['seconds']} s."
            lines += [about, "", *table(HEAD, [shown(row).split(" | ") for row in own]), ""]
    put_between(PAGE, "load", lines[:-1])


@command
def main(argv: list[str]) -> None:
    """Measure, and write the tables."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny/model", help="a folder (default: the bundled one)")
    parser.add_argument("--clients", nargs="+", type=positive, default=[1, 8, 32])
    parser.add_argument("--seconds", type=positive, default=60, help="of each turn")
    parser.add_argument("--turns", type=positive, default=1)
    parser.add_argument("--max_new_tokens", type=positive, default=48)
    parser.add_argument("--queue", type=positive, default=64)
    parser.add_argument("--questions", type=positive, default=16, help="different ones")
    parser.add_argument("--port", type=positive, default=16030)
    parser.add_argument("--beside", action="store_true", help="transformers serve in turns")
    parser.add_argument("--write", action="store_true", help="measure nothing")
    given = parser.parse_args(argv)
    if not given.write:
        measure(given)
    write_tables()


if __name__ == "__main__":
    main()
