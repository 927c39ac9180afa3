"""The options of serve.py beside those of a run: where it listens, and how much it takes."""

import os
import socket
from dataclasses import dataclass
from typing import Any, ClassVar

from support.errors import UserError
from support.serving_gate import is_loopback

PACKAGES = ("fastapi", "uvicorn", "mcp.server.mcpserver")


def check_packages() -> None:
    """UserError if what serve.py needs beside requirements.txt is not installed."""
    import importlib

    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"serve.py needs packages of its own ({error}): "
                "pip install -r requirements-serve.txt."
            ) from error


@dataclass(frozen=True)
class Options:
    """Checked."""

    host: str = "127.0.0.1"
    port: int = 16020
    api_key: str = ""
    backend: str = ""
    backend_model: str = ""
    mcp: str = "http"
    queue: int = 64
    timeout: float = 120.0

    HELP: ClassVar[dict[str, str]] = {
        "host": "the address to listen on (default: 127.0.0.1, this machine alone)",
        "port": "the port to listen on (default: 16020, the tutorial's)",
        "base": "the model to compare with, not the one the run started from; none: no other",
        "api_key": "a key that requests must bear, needed with --host (or in SERVE_API_KEY)",
        "backend": "an OpenAI-compatible server that has the model, instead of loading it here",
        "backend_model": "the name of the model at the backend (default: the first that it lists)",
        "mcp": "http: a tool at /mcp (default); stdio: a tool for the program that starts this one",
        "queue": "completions that may wait; more are refused (default: 64)",
        "timeout": "seconds that a request may take, waiting included (default: 120)",
    }


def read_options(given: dict[str, Any]) -> Options:
    """The options from the flags' texts; UserError for one that cannot be."""
    host = given["host"] or Options.host
    key = given["api_key"] or os.environ.get("SERVE_API_KEY", "")
    if not is_loopback(host) and not key:
        raise UserError(
            f"--host {host} lets other machines in, and there is no --api_key; give one, or leave "
            "--host out."
        )
    if not key.isascii() or any(c.isspace() for c in key):
        raise UserError("--api_key must be ASCII without spaces, as an HTTP header is.")
    if given["mcp"] not in (None, "http", "stdio"):
        raise UserError(f"--mcp is {given['mcp']!r}; it must be http or stdio.")
    return Options(
        host,
        int(number(given["port"], "port", Options.port, 0, 65535)),
        key,
        (given["backend"] or "").rstrip("/").removesuffix("/v1"),
        given["backend_model"] or "",
        given["mcp"] or "http",
        int(number(given["queue"], "queue", Options.queue, 1, 100_000)),
        number(given["timeout"], "timeout", Options.timeout, 1, 86_400, whole=False),
    )


def number(
    text: str | None, name: str, default: float, low: int, high: int, whole: bool = True
) -> float:
    """A flag's number between two others, both allowed."""
    if text is None:
        return default
    try:
        value = int(text) if whole else float(text)
        if low <= value <= high:
            return value
    except ValueError:
        pass
    kind = "a whole number" if whole else "a number"
    raise UserError(f"--{name} is {text[:40]!r}; it must be {kind} from {low} to {high}.")


def bind(host: str, port: int) -> socket.socket:
    """A socket with this address, which does not listen yet; UserError if it cannot be had."""
    found = None
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind)
        if os.name == "posix":  # elsewhere it would let two programs have the same port
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        if found is not None:
            found.close()
        raise cannot_listen(host, port, error) from error
    return found


def listen(found: socket.socket) -> None:
    """Listen; UserError if another server has begun to since the socket was bound."""
    try:
        found.listen(512)
    except OSError as error:
        raise cannot_listen(*found.getsockname()[:2], error) from error


def cannot_listen(host: str, port: int, error: OSError) -> UserError:
    """What to say of an address that cannot be had."""
    return UserError(
        f"Cannot listen on {host}, port {port} ({error.strerror or error}); is a server running "
        "there? --port chooses another."
    )
