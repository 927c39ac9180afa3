"""Prompts of a service: a question, or a chat, as the run would have asked it; or a sentence."""

from typing import Any

from support.config import Config
from support.errors import UserError, is_text
from support.prompts import build_prompt, holds, messages_of, render, tokens_of
from support.serving_queue import Refused

CHARACTERS = 20  # for each token of the longest prompt; more is not even counted

Chat = list[dict[str, str]]


def prompt_of(chat: Chat, tokenizer: Any, config: Config) -> tuple[str, list[int], Chat]:
    """The prompt of a chat whose last message asks: as text, as tokens, and as a chat.

    The run's system prompt is in front of it, unless the chat brings one. For one question it is
    the prompt of the training. The chat is empty where the model has no chat template.

    Raises:
        Refused: blank, too long, or a chat that the model has no words for.
    """
    system, turns = config.system_prompt, chat
    if chat[0]["role"] in ("system", "developer"):
        system, turns = chat[0]["content"], chat[1:]
    roles = [message["role"] for message in turns]
    if roles != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise Refused(
            400, "After a system message, messages of user and assistant take turns; a user ends."
        )
    if not turns[-1]["content"].strip():
        raise Refused(400, "The question is blank; write one.")
    most = CHARACTERS * config.max_prompt_tokens
    if sum(len(message["content"]) for message in chat) > most:
        raise Refused(400, f"The question has more than {most} characters; ask a shorter one.")
    if not all(is_text(message["content"]) for message in chat):
        raise Refused(400, "The question holds half of a character (a lone surrogate); mend it.")
    try:
        prompt, messages = chat_prompt(turns, system, tokenizer, config.prompt_date)
    except UserError as error:
        raise Refused(400, str(error)) from error
    ids = tokens_of([prompt], tokenizer)[0]
    if not 0 < len(ids) <= config.max_prompt_tokens:
        raise Refused(
            400,
            f"The prompt has {len(ids)} tokens, and {config.max_prompt_tokens} at the most are "
            "read; ask a shorter question.",
        )
    return prompt, ids, messages


def chat_prompt(turns: Chat, system: str, tokenizer: Any, date: str) -> tuple[str, Chat]:
    """The text that an answer continues, and its messages; as build_prompt, and for longer chats.

    Raises:
        UserError: where the template has no place for the chat.
    """
    if not tokenizer.chat_template:
        if len(turns) > 1:
            raise UserError("This model has no chat template; send one question alone.")
        return build_prompt(turns[0]["content"], tokenizer, system, date), []
    first = {"role": "user", "content": f"{system}\n\n{turns[0]['content']}".strip()}
    for messages in ([*messages_of("", system)[:-1], *turns], [first, *turns[1:]]):
        try:
            prompt = render(messages, tokenizer, date)
        except Exception:  # a template raises what it likes
            continue
        if all(holds(prompt, message["content"]) for message in messages):
            return prompt, messages
    raise UserError("The model's chat template cannot write this chat; send one question alone.")
