"""Prompts of a service: a question, or a chat, as the run would have asked it; or a sentence."""

from typing import Any

from support.config import Config
from support.errors import UserError, is_text
from support.prompts import chat_prompt, tokens_of
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
        prompt, messages = chat_prompt(turns, tokenizer, system, config.prompt_date)
    except UserError as error:
        template = "The model's chat template cannot write this chat"
        problem = template if tokenizer.chat_template else "This model has no chat template"
        raise Refused(400, f"{problem}; send one question alone.") from error
    ids = tokens_of([prompt], tokenizer)[0]
    if not 0 < len(ids) <= config.max_prompt_tokens:
        raise Refused(
            400,
            f"The prompt has {len(ids)} tokens, and {config.max_prompt_tokens} at the most are "
            "read; ask a shorter question.",
        )
    return prompt, ids, messages
