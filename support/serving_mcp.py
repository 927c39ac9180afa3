"""The trained model as a tool: an MCP server with `solve_question`, over HTTP or standard input."""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from pydantic import BaseModel, Field

from support.serving_queue import Refused

DESCRIPTION = (
    "Solve a mathematical word problem with a small language model that was trained for it. The "
    "answer is the model's own and may be wrong; the reasoning shows how it came to it."
)


class Solved(BaseModel):
    """What the tool returns."""

    final_answer: str = Field(description="the answer; empty if the model gave none")
    reasoning_process: str = Field(description="the steps that led to it; may be empty")
    assistant_response: str = Field(description="all that the model wrote")
    tokens: int = Field(description="its length in tokens")
    truncated: bool = Field(description="whether it was cut off before its end")


def build_mcp(solve: Callable[[str], Awaitable[dict[str, Any]]]) -> Any:
    """The MCP server.

    Args:
        solve: a question → the `data` of /solve_question; Refused with a sentence.
    """
    from mcp.server.mcpserver import MCPServer
    from mcp.server.mcpserver.exceptions import ToolError

    server = MCPServer("pocket-grpo", log_level="CRITICAL")  # a log would hold questions

    @server.tool(description=DESCRIPTION)
    async def solve_question(
        question: Annotated[str, Field(description="the problem in words, with all its numbers")],
    ) -> Solved:
        try:
            found = await solve(question)
        except Refused as error:
            raise ToolError(str(error)) from error
        return Solved(**{name: found[name] for name in Solved.model_fields})

    return server


def http_app(server: Any) -> Any:
    """Its routes: /mcp, without sessions, one JSON answer for each request.

    Host and Origin are checked for every route by support/serving_gate.py.
    """
    from mcp.server.transport_security import TransportSecuritySettings

    return server.streamable_http_app(
        streamable_http_path="/mcp",
        stateless_http=True,
        json_response=True,
        transport_security=TransportSecuritySettings(enable_dns_rebinding_protection=False),
    )
