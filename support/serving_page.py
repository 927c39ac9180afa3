"""The page of a service: ask, watch the answers come, and see what training would say of them."""

import re
from pathlib import Path
from typing import Any

from support.report_page import PAGE as REPORT
from support.report_page import page as filled

PAGE = Path(__file__).resolve().parent / "service"
BLOCK = re.compile(r"<(think|answer)>.*?</\1>", re.IGNORECASE | re.DOTALL)


def page(data: dict[str, Any]) -> str:
    """The whole page, in the style of a report's; it asks this server, and loads nothing."""
    return filled(data, PAGE, styles=[REPORT, PAGE], connect="'self'")


def outside_tags(text: str) -> str:
    """What a completion says beside its reasoning and its answer."""
    return BLOCK.sub("", text).strip()
