"""What a checkpoint tells other programs: its system prompt in the chat template, a README.md.

`transformers serve`, vLLM and others send the user's message alone. A model that was trained under
a system prompt answers otherwise without it, so the saved template puts it there where a chat
brings none. `load_tokenizer` takes that part away again: here the prompt is an option.
"""

import json
from pathlib import Path
from typing import Any

from support.config import Config
from support.prompts import build_prompt

START, END = "{# pocket-grpo: the system prompt of the training #}", "{# pocket-grpo: end #}"
PROBE = "How many apples are left?"


def template_with_prompt(tokenizer: Any, config: Config) -> str | None:
    """The chat template that adds the system prompt itself; None where that cannot be done."""
    template, text = tokenizer.chat_template, config.system_prompt
    if not text or not isinstance(template, str):
        return None
    wanted = build_prompt(PROBE, tokenizer, text, config.prompt_date)
    words = json.dumps(text, ensure_ascii=False)
    as_system = f"[{{'role': 'system', 'content': {words}}}] + messages"
    joined = f"{words} + '\\n\\n' + messages[0]['content']"
    as_user = f"[{{'role': 'user', 'content': {joined}}}] + messages[1:]"
    for messages in (as_system, as_user):
        condition = "messages and messages[0]['role'] == 'user'"
        added = f"{{% if {condition} %}}{{% set messages = {messages} %}}{{% endif %}}"
        tokenizer.chat_template = START + added + END + template
        try:
            if build_prompt(PROBE, tokenizer, "", config.prompt_date) == wanted:
                return tokenizer.chat_template
        except Exception:  # a template raises what it likes
            continue
        finally:
            tokenizer.chat_template = template
    return None


def without_prompt(template: Any) -> Any:
    """A template as it was before `template_with_prompt`."""
    if isinstance(template, str) and template.startswith(START):
        return template.partition(END)[2]
    return template


def save_tokenizer(folder: Path, tokenizer: Any, config: Config) -> None:
    """The tokenizer, with a chat template that other programs can use as it is."""
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = template_with_prompt(tokenizer, config) or template
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = template


def short(name: str) -> str:
    """A hub name as it is; of a folder the last name, since the path means nothing elsewhere."""
    return name if name.count("/") == 1 and not Path(name).exists() else Path(name).name


def write_card(
    folder: Path, config: Config, step: int, objective: str, row: dict[str, float]
) -> None:
    """README.md of a checkpoint, as the hub shows it.

    Args:
        objective: in a line.
        row: the newest metrics of an evaluation; empty if there was none.
    """
    base, data = short(config.model), short(config.dataset)
    accuracy = "not evaluated"
    if "eval/accuracy" in row:
        low, high = row["eval/accuracy_low"], row["eval/accuracy_high"]
        accuracy = (
            f"{row['eval/accuracy']:.3f} (95 % interval {low:.3f} to {high:.3f}), greedy, on "
            f"{config.eval_questions or 'all'} held-out questions"
        )
    library = "peft" if config.adapter_rank else "transformers"
    lines = ["---", f"library_name: {library}", "pipeline_tag: text-generation", "tags: [grpo]"]
    if config.model != base or "/" in base:
        lines.append(f"base_model: {json.dumps(base)}")
    adapter, kind = "", f" (in {config.quantize})" if config.quantize != "none" else ""
    if config.adapter_rank:
        adapter = f"{kind}, frozen; this folder holds adapters of rank {config.adapter_rank} alone"
    lines += [
        "---",
        "",
        f"# {base}, trained with GRPO",
        "",
        f"Trained by pocket-grpo for {step} of {config.steps} steps.",
        "",
        f"- base: {base}{adapter}",
        f"- data: {data}",
        f"- {objective}",
        f"- {config.arithmetic}",
        f"- rewards: {', '.join(config.reward)}; learning rate {config.lr:g}; seed {config.seed}",
        f"- accuracy: {accuracy}",
        "- the same again: `python train.py --config config.yaml` (every setting is in it)",
        "",
    ]
    if config.system_prompt:
        lines += [
            "It was trained under this system prompt, which its chat template adds where a chat "
            "brings none:",
            "",
            *(f"> {line}" for line in config.system_prompt.splitlines()),
            "",
        ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
