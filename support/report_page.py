"""The page of a report: template, style, script and data as one file that loads nothing else."""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent / "report"


def as_json(data: dict[str, Any]) -> str:
    """JSON that cannot end the element it stands in, whatever a completion says."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    escape = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}
    return text.translate(escape).encode("utf-8", "replace").decode()


def page(
    data: dict[str, Any],
    folder: Path = PAGE,
    styles: Sequence[Path] = (PAGE,),
    connect: str = "'none'",
) -> str:
    """The whole file. Its policy lets only this script and this style in, and nothing be loaded.

    Args:
        folder: of template and script. styles: folders of styles, one after the other.
        connect: what the script may ask.
    """
    style = "".join(place.joinpath("page.css").read_text("utf-8") for place in styles)
    # Its words, if they are a file of their own, come first.
    scripts = (folder / name for name in ("words.js", "page.js"))
    script = "".join(path.read_text("utf-8") for path in scripts if path.is_file())
    parts = {"style": style, "script": script, "data": as_json(data)}
    style, script = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (style, script)
    )
    parts["policy"] = (
        f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; "
        f"connect-src {connect}; base-uri 'none'; form-action 'none'"
    )
    html = folder.joinpath("page.html").read_text("utf-8").replace("{{name}}", "A name in braces")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], html)
