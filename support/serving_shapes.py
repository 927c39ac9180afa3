"""What a service is asked: the fields of its two APIs, and one sentence for what does not fit."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from support.errors import UserError, check_choice
from support.serving_queue import Refused

MOST_SAMPLES = 16
MOST_SEED = 2**63 - 1

# Fields of OpenAI's API that change no answer, or none at the values here: some clients send them.
IGNORED = {"user", "metadata", "safety_identifier", "prompt_cache_key", "stream_options"}
NEUTRAL: dict[str, tuple] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "store": (False,),
}


class Strict(BaseModel):
    """No number for a text, no text for a number, no field that is not there."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Solve(Strict):
    """The tutorial's request, `{"question": …}`, and what else can be said with it."""

    question: str = Field(description="the question, as in the dataset; not blank")
    reference: str | None = Field(None, max_length=320, description="the right answer: a reward")
    model: Literal["trained", "base", "both"] = "trained"
    max_new_tokens: int | None = Field(None, ge=1, description="at most (and without it) the run's")
    temperature: float = Field(0.0, ge=0, le=5, description="0: greedy")
    seed: int | None = Field(None, ge=0, le=MOST_SEED, description="the same samples again")
    n: int = Field(1, ge=1, le=MOST_SAMPLES, description="samples; with a reference: advantages")
    stream: bool = Field(False, description="server-sent events: pieces, then the whole answer")


class Message(Strict):
    """One message of a chat: text, or parts that are text."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]]
    name: str | None = None

    def text(self) -> str:
        """The content; Refused if a part is no text."""
        if isinstance(self.content, str):
            return self.content
        parts = [p.get("text") if p.get("type") == "text" else None for p in self.content]
        if not all(isinstance(part, str) for part in parts):
            raise Refused(400, "A message may have parts of text alone; leave out the others.")
        return "".join(parts)


class Chat(Strict):
    """The fields of OpenAI's chat completions that have a meaning here."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(1.0, ge=0, le=5)
    top_p: float | None = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=0, le=MOST_SEED)
    stop: str | list[str] | None = None
    n: int | None = Field(1, ge=1, le=MOST_SAMPLES)
    stream: bool | None = False
    stream_options: dict[str, Any] | None = None

    def stops(self) -> tuple[str, ...]:
        """The stop texts; Refused for more than four, or an empty one."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(given) > 4 or "" in given:
            raise Refused(400, "`stop` takes at most four texts, and none of them empty.")
        return tuple(given)

    def check_others(self) -> None:
        """Refused for a field that would have to change the answer, and cannot."""
        for name, value in (self.model_extra or {}).items():
            if value is None or name in IGNORED or value in NEUTRAL.get(name, ()):
                continue
            raise Refused(400, f"`{shown(name)}` is not supported here; leave it out.")


def shown(name: object) -> str:
    """A name that a client has chosen, as a sentence can bear it."""
    return str(name).encode("utf-8", "replace").decode()[:60]


def sentence(errors: Sequence[Any], model: type[BaseModel] | None = None) -> str:
    """What pydantic found, as one sentence about the first of it."""
    found = errors[0]
    place = [shown(part) for part in found["loc"] if part not in ("body", "str", "list[str]")]
    name, kind = ".".join(place), found["type"]
    if kind == "json_invalid":
        return "The body is not valid JSON."
    if not place or kind in ("model_attributes_type", "model_type"):
        where = f"`{name}` must be" if place else "The body must be"
        return f"{where} a JSON object; send it with the header Content-Type: application/json."
    if kind == "missing":
        return f"The request lacks `{name}`."
    if kind == "extra_forbidden" and model is not None:
        try:
            check_choice(name, model.model_fields, "field")
        except UserError as error:
            return str(error)
    return f"`{name}`: {shown(found['msg'][:1].lower() + found['msg'][1:])}."
