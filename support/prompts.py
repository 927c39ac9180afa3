"""Prompts: the text that a completion continues, from the model's chat template; and as tokens."""

import html
import json
import re
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any

from support.config import Config, resolve_path
from support.data import Question, check_references, load_questions
from support.errors import UserError

TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
SPACES = re.compile(r"\s+")
TAGS = re.compile(r"</?[a-z]+>")
SAID = "answer-of-the-assistant"  # in a rendered chat: where an answer would stand


def messages_of(question: str, system_prompt: str) -> list[dict[str, str]]:
    """A chat that asks the question, after the system prompt if there is one."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": question}]


def build_prompt(question: str, tokenizer: Any, system_prompt: str, date: str = "") -> str:
    """The text that the completion of one question continues; as chat_prompt."""
    return chat_prompt(messages_of(question, ""), tokenizer, system_prompt, date)[0]


def chat_prompt(
    turns: list[dict[str, str]], tokenizer: Any, system_prompt: str, date: str
) -> tuple[str, list[dict[str, str]]]:
    """The text that an answer continues, from the model's chat template; and as messages.

    Templates that know no system role, or leave it out, get the system prompt in front of the
    question; those that have no generation prompt, the words that they put in front of an answer.
    Without a chat template the prompt is the system prompt, the question and the word "Answer:",
    each in a paragraph of its own, and there are no messages.

    Args:
        turns: of user and assistant, beginning and ending with a user's: the question first.
        date: as 2026-11-25, for templates that print it; empty: today.
    Raises:
        UserError: the template cannot be used, or drops a text; or there is none for several turns.
    """
    question = turns[0]["content"]
    if not tokenizer.chat_template:
        if len(turns) > 1:
            raise UserError("A model without a chat template takes one question, and no chat.")
        parts = (system_prompt, f"Question: {question}", "Answer:")
        return "\n\n".join(part for part in parts if part), []
    joined = f"{system_prompt}\n\n{question}".strip()
    for first in (messages_of(question, system_prompt), messages_of(joined, "")):
        messages = [*first, *turns[1:]]
        try:
            prompt = render(messages, tokenizer, date)
        except Exception as error:  # a template raises what it likes
            problem = f"cannot be used ({error})"
            continue
        if all(holds(prompt, text) for text in (system_prompt, *(m["content"] for m in turns))):
            return prompt, messages
        problem = f"drops the question: it makes {prompt[:200]!r} of {question[:80]!r}"
    raise UserError(
        f"The chat template of the model {problem}; mend its chat_template.jinja, or remove it to "
        "go without one."
    )


def render(messages: list[dict[str, str]], tokenizer: Any, date: str) -> str:
    """Messages as the template writes them, up to where the answer begins."""
    template = with_date(tokenizer.chat_template, date)
    chat = partial(tokenizer.apply_chat_template, tokenize=False, chat_template=template)
    prompt = chat(messages, add_generation_prompt=True)
    if "add_generation_prompt" in str(tokenizer.chat_template):
        return prompt
    answered = [*messages, {"role": "assistant", "content": SAID}]
    try:
        answered = chat(answered)
    except Exception:  # a template raises what it likes
        return prompt
    start, said, _ = answered.partition(SAID)
    has_words = said and start.startswith(prompt) and start[len(prompt) :].strip()
    return start if has_words else prompt


def with_date(template: Any, date: str) -> Any:
    """A template that prints this date where it asks for today's."""
    now = datetime.fromisoformat(date) if date else datetime.now()
    if not isinstance(template, str):  # several, by name: the tokenizer chooses
        return None
    return TODAY.sub(lambda found: json.dumps(now.strftime(found[2]), ensure_ascii=False), template)


def without_end(ids: list[int], prompt: str, tokenizer: Any) -> list[int]:
    """The tokens of a prompt without an end token that the tokenizer appends to every text."""
    end = tokenizer.eos_token_id
    if ids and ids[-1] == end and not prompt.rstrip().endswith(tokenizer.eos_token or "\0"):
        return ids[:-1]
    return ids


def holds(prompt: str, text: str) -> bool:
    """Whether a prompt has a text, spaces aside. Templates trim, or escape as HTML or JSON."""
    text, prompt = SPACES.sub("", text), SPACES.sub("", prompt)
    escaped = json.dumps(text, ensure_ascii=False)[1:-1]
    return text in prompt or text in html.unescape(prompt) or escaped in prompt


def prompts_of(
    questions: list[Question], tokenizer: Any, config: Config
) -> tuple[list[str], list[list[int]]]:
    """The prompt of each question, as text and as tokens."""
    asked = config.system_prompt, config.prompt_date
    prompts = [build_prompt(question.question, tokenizer, *asked) for question in questions]
    return prompts, tokens_of(prompts, tokenizer)


def tokens_of(prompts: list[str], tokenizer: Any) -> list[list[int]]:
    """Prompts as tokens.

    A chat template writes its own special tokens; a model without one gets those of its tokenizer.
    """
    tokens = tokenizer(prompts, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    pairs = zip(tokens, prompts, strict=True)
    return [without_end(ids, prompt, tokenizer) for ids, prompt in pairs]


def with_prompts(
    questions: list[Question], tokenizer: Any, config: Config
) -> tuple[list[Question], int]:
    """Add each question's prompt; leave out those that are too long.

    Returns:
        the questions that fit, and how many did not.
    Raises:
        UserError: if none fits.
    """
    prompts, tokens = prompts_of(questions, tokenizer, config)
    check_tags(config.system_prompt, tokenizer)
    check_lengths(tokens, config)
    fitting = [
        replace(question, prompt=prompt, prompt_ids=ids)
        for question, prompt, ids in zip(questions, prompts, tokens, strict=True)
        if 0 < len(ids) <= config.max_prompt_tokens
    ]
    return fitting, len(questions) - len(fitting)


def check_lengths(tokens: list[list[int]], config: Config) -> None:
    """UserError if none of the prompts can be asked: all are empty, or all too long."""
    if not any(tokens):
        raise UserError(
            "Every prompt is empty: the model's chat template or tokenizer makes no tokens of a "
            "question."
        )
    if not any(0 < len(ids) <= config.max_prompt_tokens for ids in tokens):
        raise UserError(
            f"Every prompt is longer than --max_prompt_tokens {config.max_prompt_tokens} (the "
            f"shortest: {min(map(len, tokens))} tokens); raise it."
        )


def check_tags(system_prompt: str, tokenizer: Any) -> None:
    """UserError if the tags that a system prompt asks for do not survive tokens and decoding."""
    for tag in dict.fromkeys(TAGS.findall(system_prompt)):
        ids = tokenizer(f"so {tag} 1", add_special_tokens=False)["input_ids"]
        if tag not in tokenizer.decode(ids, skip_special_tokens=False):
            raise UserError(
                f"--system_prompt asks for {tag}, which this tokenizer cannot write; ask for "
                "another tag, or choose another model."
            )


def training_questions(config: Config, tokenizer: Any) -> list[Question]:
    """The questions that a run trains on, with prompts; says what is left out, and what is odd."""
    questions = load_questions(resolve_path(config.dataset), "train", config)
    check_references(questions, config.dataset)
    questions, dropped = with_prompts(questions, tokenizer, config)
    print(
        f"{len(questions)} questions; {dropped} left out: prompt longer than "
        f"{config.max_prompt_tokens} tokens"
    )
    return questions
