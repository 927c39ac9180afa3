"""What stands before a service: who may ask, how much, and how slowly. And a line for the log.

The log says method, path, status and time, and nothing of what was asked or answered.
"""

import asyncio
import hmac
import ipaddress
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from support.monitor import log_line
from support.serving_queue import Refused

BODY_BYTES = 256 * 1024
BODY_SECONDS = 10.0  # for a whole body
HEADER_SECONDS = 10.0  # for the headers of a request
OPEN = ("/", "/health", "/favicon.ico")  # without a key: what tells nothing of a model

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def refusal(path: str, error: Refused, seconds: float = 0.0) -> tuple[int, dict, dict[str, str]]:
    """Status, body and headers of an answer that is none, in the shape of the API of this path."""
    headers = {"Retry-After": str(error.retry)} if error.retry else {}
    if path.startswith("/v1/"):
        kind = "invalid_request_error" if error.status < 500 else "server_error"
        body = {"message": str(error), "type": kind, "param": None, "code": error.status}
        return error.status, {"error": body}, headers
    body = {"code": error.status, "elapsed_milliseconds": round(1000 * seconds, 2), "data": {}}
    return error.status, {**body, "message": str(error)}, headers


class Gate:
    """ASGI: checks a request before the app sees it, and reads its body, which is short.

    Args:
        host: that the server is bound to. On this machine alone, only its names are taken as Host:
            another one is a page of the web whose name was made to lead here.
        api_key: that requests must bear; "" for none.
        paths: that are written into the log; others are "another path".
    """

    def __init__(self, app: Any, host: str, api_key: str, paths: set[str]) -> None:
        self.app, self.api_key, self.paths = app, api_key, paths
        self.names = {"localhost", "127.0.0.1", "[::1]", host} if is_loopback(host) else set()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer, and write the line of the log."""
        if scope["type"] == "websocket":  # there is none, and a refusal is what it gets
            await send({"type": "websocket.close", "code": 1000})
        if scope["type"] != "http":
            return await self.app(scope, receive, send) if scope["type"] == "lifespan" else None
        start, status = time.monotonic(), 499  # nobody was there to be answered

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            await send(message)

        try:
            try:
                self.check(scope)
                body = await read_body(scope, receive)
            except Refused as error:
                return await answer(note, *refusal(scope["path"], error))
            if body is None:
                return None
            await self.app(scope, replayed(body, receive), note)
        except Exception as error:  # it was answered; its words may be those of a request
            place = error.__traceback__
            while place and place.tb_next:
                place = place.tb_next
            where = f"{Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}"
            log_line(f"error: {type(error).__name__} at {where}")
        finally:
            path = scope["path"] if scope["path"] in self.paths else "another path"
            milliseconds = 1000 * (time.monotonic() - start)
            if path != "/health":
                log_line(f"{scope['method']} {path} {status} {milliseconds:.0f} ms")

    def check(self, scope: Message) -> None:
        """Refused for who may not ask."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if self.names and host.rsplit(":", 1)[0] not in self.names and host not in self.names:
            raise Refused(421, "This server answers to the names of its own machine alone.")
        if origin is not None and origin.partition("://")[2] != host:
            raise Refused(403, "Pages of other sites may not ask this server.")
        if scope["path"] == "/mcp" and scope["method"] != "POST":  # a stream without an end
            raise Refused(405, "Send MCP messages by POST; this server keeps no streams open.")
        scheme, _, given = headers.get(b"authorization", "").partition(" ")
        given = given.encode("latin-1") if scheme.lower() == "bearer" else b""
        right = not self.api_key or hmac.compare_digest(given, self.api_key.encode())
        if not right and scope["path"] not in OPEN:
            raise Refused(401, "Send the key of this server: Authorization: Bearer KEY.")


async def read_body(scope: Message, receive: Receive) -> bytes | None:
    """The body of a request; Refused if it is long or slow; None if the client has gone."""
    said = dict(scope["headers"]).get(b"content-length", b"0")
    too_long = Refused(413, f"The body has more than {BODY_BYTES // 1024} KiB; send less.")
    if not said.isdigit() or int(said[:20]) > BODY_BYTES:
        raise too_long

    async def read() -> bytes | None:
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > BODY_BYTES:
                raise too_long
            if not message.get("more_body"):
                return body

    try:
        return await asyncio.wait_for(read(), BODY_SECONDS)
    except asyncio.TimeoutError as error:
        raise Refused(408, f"The body has not come within {BODY_SECONDS:g} seconds.") from error


def replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body, and then what comes after it."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def answer(send: Send, status: int, body: dict, headers: dict[str, str]) -> None:
    """Send a JSON answer, and close the connection: the rest of a body may still be on its way."""
    data = json.dumps(body).encode()
    fields = {"content-type": "application/json", "content-length": str(len(data)), **headers}
    fields["connection"] = "close"
    encoded = [(name.lower().encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": data})


def patient_protocol() -> type:
    """uvicorn's HTTP protocol, which closes a connection whose headers do not come in time."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Protocol(H11Protocol):
        """Whoever sends a byte every few seconds would keep a connection for ever."""

        timer: Any = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.wait_for_headers()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.timer is None and (self.cycle is None or self.cycle.response_complete):
                self.wait_for_headers()

        def wait_for_headers(self) -> None:
            """Look again in a while, whether a request has begun since."""
            self.timer = self.loop.call_later(HEADER_SECONDS, self.look, self.cycle)

        def look(self, before: Any) -> None:
            """Close if nothing has begun."""
            self.timer = None
            if self.cycle is before and not self.transport.is_closing():
                self.transport.close()

    return Protocol
