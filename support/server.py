"""A server that is asked in JSON: again if it does not answer, and then one sentence."""

import http.client
import json
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from support.errors import UserError

PAUSES = (1.0, 2.0, 4.0)  # seconds before a request is made again


class NotNow(UserError):
    """A server that may answer when it is asked again."""


@dataclass(frozen=True)
class Server:
    """A server by its address. No proxy is asked: it would not know this machine's `localhost`."""

    url: str
    timeout: float  # seconds for one answer

    def ask(self, path: str, body: dict[str, Any] | None = None, again: bool = True) -> Any:
        """Its answer to GET or, with a body, to POST; text that is no JSON is returned as it is.

        Args:
            again: ask three times more if it cannot be reached, or fails inside (5xx).
        Raises:
            UserError: it is not there, refuses, or is too slow. Who was too slow once is not asked
                again.
        """
        for pause in PAUSES if again else ():
            with suppress(NotNow):
                return self.ask_once(path, body)
            time.sleep(pause)
        return self.ask_once(path, body)

    def ask_once(self, path: str, body: dict[str, Any] | None) -> Any:
        """The same, asked once; NotNow where it may help to ask again."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            request = urllib.request.Request(self.url + path, data, headers)
            with direct.open(request, timeout=self.timeout) as answer:
                return parsed(answer.read())
        except urllib.error.HTTPError as error:
            said = " ".join(reason_of(parsed(error.read())).split())[:200]
            kind = NotNow if error.code >= 500 else UserError
            raise kind(
                f"The server at {self.url} refuses {path} ({error.code}: {said})."
            ) from error
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", error)
            if isinstance(cause, TimeoutError):
                raise UserError(
                    f"The server at {self.url} has not answered {path} in {self.timeout:g} seconds."
                ) from error
            raise NotNow(
                f"The server at {self.url} cannot be reached, or has ended "
                f"({type(cause).__name__}: {cause}); start it (docs/served.md), or leave out "
                "--rollout_url."
            ) from error


def parsed(data: bytes) -> Any:
    """What JSON stands for; other text as it is."""
    text = data.decode(errors="replace")
    try:
        return json.loads(text)
    except ValueError:
        return text


def reason_of(answer: Any) -> str:
    """Why a server refuses: vLLM and OpenAI say it in `error.message`, FastAPI in `detail`."""
    if isinstance(answer, dict):
        inner = answer.get("error", answer)
        answer = inner.get("message") or inner if isinstance(inner, dict) else inner
    return str(answer)
