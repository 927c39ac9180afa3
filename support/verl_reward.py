"""Our rewards as verl asks for them: one completion at a time, as text, without its token ids."""

import json
from dataclasses import dataclass
from typing import Any

import torch

from support.config import Config
from support.data import Question
from support.errors import UserError
from support.prompts import messages_of
from support.user_rewards import Arguments, RewardFunction, call_reward, load_rewards

# What a reward is not told by verl. `truncated` is told, and always false.
UNKNOWN = "completion_ids"
WORDS = "one two three"  # a completion without an answer


@dataclass(frozen=True)
class OneByOne:
    """The rewards of a run, called for one completion after the other."""

    rewards: dict[str, RewardFunction]
    weights: list[float]
    max_new_tokens: int
    system_prompt: str

    def __call__(self, completion: str, reference: str, extra_info: dict) -> dict[str, float]:
        """`score`, the weighted sum, and each reward by its name; 0 for what cannot be scored.

        Args:
            extra_info: of the row in the Parquet file, as `extra_info` below writes it.
        Raises:
            UserError: a reward failed.
        """
        alone = arguments_of_one(
            completion, reference, extra_info, self.max_new_tokens, self.system_prompt
        )
        values = {name: call_reward(name, f, alone, 0) for name, f in self.rewards.items()}
        weighted = [w * value for w, value in zip(self.weights, values.values(), strict=True)]
        found = {name: float(value.nan_to_num()) for name, value in values.items()}
        return {**found, "score": float(torch.stack(weighted).nansum())}


def extra_info(question: Question, index: int, split: str) -> dict[str, Any]:
    """What reward.py needs of a question, for a row of the Parquet file.

    Raises:
        UserError: a column of the dataset cannot be written as JSON.
    """
    try:
        columns = json.dumps(question.columns, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"A column of the dataset cannot be handed over ({error}); remove the column, or "
            "write it as text."
        ) from error
    return {
        "split": split,
        "index": index,
        "question": question.question,
        "prompt_text": question.prompt,
        "opened": question.opened,
        "columns": columns,
    }


def arguments_of_one(
    completion: str, reference: str, info: dict, max_new_tokens: int, system_prompt: str
) -> Arguments:
    """What the reward functions are given of one completion."""
    columns = {name: [value] for name, value in json.loads(info["columns"]).items()}
    for name in ("prompts", "completions"):
        columns.pop(name, None)
    columns |= {"reference": [reference], "truncated": [False], "max_new_tokens": max_new_tokens}
    chats = [messages_of(info["question"], system_prompt)]
    return Arguments([info["prompt_text"]], [info["opened"] + completion], columns, chats)


def check_rewards(
    config: Config, built_in: dict[str, RewardFunction], questions: list[Question], tokenizer: Any
) -> None:
    """Try each reward on a few completions, all at once as in a run, and one by one as in verl.

    Raises:
        UserError: a reward says something else then, or fails, so verl would train on another one.
    """
    for name in config.reward:
        if name.startswith("model:"):
            raise UserError(
                f"The reward {name} cannot be handed over: verl runs a reward model on GPUs of its "
                "own (reward.reward_model); give the other rewards alone, and set it there."
            )
    rewards = load_rewards(config.reward, built_in)
    alone = OneByOne(rewards, config.reward_weights, config.max_new_tokens, config.system_prompt)
    pairs = [(question, text) for question in questions[:2] for text in trial_texts(question)]
    together = join([one_of_pair(alone, *pair) for pair in pairs])
    texts = [text for _, text in pairs]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    together.columns[UNKNOWN] = [tokens or [0] for tokens in ids]
    for name, function in rewards.items():
        expected = call_reward(name, function, together, config.reward_timeout)
        for pair, value in zip(pairs, expected, strict=True):
            check_alone(name, function, one_of_pair(alone, *pair), value)


def trial_texts(question: Question) -> list[str]:
    """Completions of several kinds: right, wrong, long, repeating itself, without an answer."""
    thought = f"<think>{question.solution or WORDS}</think>\n"
    right = f"<answer>{question.reference}</answer>"
    return [thought + right, right, "<answer>-7</answer>", f"{WORDS} " * 20, WORDS]


def one_of_pair(alone: OneByOne, question: Question, completion: str) -> Arguments:
    """One completion of a question, as verl would give it."""
    info = extra_info(question, 0, "train")
    settings = alone.max_new_tokens, alone.system_prompt
    return arguments_of_one(completion, question.reference, info, *settings)


def join(parts: list[Arguments]) -> Arguments:
    """The arguments of several completions as those of one call."""
    names = {name for part in parts for name in part.columns}
    columns: dict[str, Any] = {
        name: [part.columns.get(name, [None])[0] for part in parts]
        for name in sorted(names - {"max_new_tokens"})
    }
    columns["max_new_tokens"] = parts[0].columns["max_new_tokens"]
    return Arguments(
        [part.prompts[0] for part in parts],
        [part.completions[0] for part in parts],
        columns,
        [part.messages[0] for part in parts],
    )


def check_alone(name: str, function: RewardFunction, alone: Arguments, value: Any) -> None:
    """UserError if a reward of one completion is not what it was among others."""
    try:
        found = call_reward(name, function, alone, 0)[0]
        same = bool(torch.equal(found.nan_to_num(torch.inf), value.nan_to_num(torch.inf)))
        why = f"it gives {float(found):g} instead of {float(value):g}"
    except UserError as error:
        same, why = False, f"it does not run ({error})"
    if not same:
        raise UserError(
            f"The reward {name} cannot be handed over: verl gives a reward one completion, without "
            f"its group and its token ids, and so {why}; leave it out."
        )
