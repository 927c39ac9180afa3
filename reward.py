"""The rewards by name, and their weighted sum for each completion.

Every reward function, built in or yours, has the signature of TRL's for plain-text prompts:

    def my_reward(prompts: list[str], completions: list[str], **columns) -> list[float | None]

`columns` holds a list for every column of the dataset, and also `reference` (the final answers),
`completion_ids` (token ids), `truncated` (cut off?) and `max_new_tokens`. None means "cannot be
scored": it counts as 0 in the weighted sum. A completion that no function can score is neither
compared nor trained. How answers are read is in support/answers.py; how a function of your own is
loaded, timed and, if it fails, reported, in support/user_rewards.py.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from rollout import Group
from support.answers import find_answer, is_correct
from support.config import Config
from support.distributed import share_out
from support.errors import UserError
from support.user_rewards import RewardFunction, ask_rewards

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
OVERLONG_SHARE = 0.2  # of max_new_tokens; DAPO's is 4096 of 20480

Texts = list[str]
Scores = list[float | None]


def accuracy(
    prompts: Texts, completions: Texts, reference: Texts, truncated: list[bool], **columns: Any
) -> Scores:
    """1 if the last answer tag holds the reference, else 0. No credit for a part of it."""
    return [float(is_correct(*one)) for one in zip(completions, reference, truncated, strict=True)]


def well_formed(prompts: Texts, completions: Texts, **columns: Any) -> Scores:
    """1 for <think>…</think> and then <answer>…</answer>, each tag once, nothing around them."""

    def good(text: str) -> bool:
        places = [text.find(tag) for tag in TAGS]
        once = all(text.count(tag) == 1 for tag in TAGS) and places == sorted(places)
        between = text[places[1] + len(TAGS[1]) : places[2]].strip()
        around = text.strip().startswith(TAGS[0]) and text.strip().endswith(TAGS[3])
        return once and around and not between

    return [float(good(completion)) for completion in completions]


def length_penalty(
    prompts: Texts, completions: Texts, completion_ids: list, max_new_tokens: int, **columns: Any
) -> Scores:
    """Minus the share of max_new_tokens that the completion used: 0 … -1."""
    return [-len(ids) / max_new_tokens for ids in completion_ids]


def soft_overlong(
    prompts: Texts, completions: Texts, completion_ids: list, max_new_tokens: int, **columns: Any
) -> Scores:
    """0 up to 80 % of max_new_tokens, then linear down to -1 (DAPO, arXiv 2503.14476, eq. 13)."""
    buffer = OVERLONG_SHARE * max_new_tokens
    over = [(len(ids) - (max_new_tokens - buffer)) / buffer for ids in completion_ids]
    return [-min(1.0, max(0.0, share)) for share in over]


def repetition(prompts: Texts, completions: Texts, **columns: Any) -> Scores:
    """Minus the share of runs of three words that were there before (after arXiv 2502.03373)."""
    penalties = []
    for words in (completion.lower().split() for completion in completions):
        count = len(words) - 2
        different = len(set(zip(words, words[1:], words[2:], strict=False)))
        penalties.append(different / count - 1 if count > 0 else 0.0)
    return penalties


def tutorial(prompts: Texts, completions: Texts, reference: Texts, **columns: Any) -> Scores:
    """The tiny-grpo tutorial's: 1 the reference, 0.5 contains it, 0.01 another answer, 0 no tag.

    Kept for comparison: the credit for a part pays for answers such as `1 2 3 4`. The answer is
    stripped, as the tutorial's own code forgot to.
    """
    answers = zip(map(find_answer, completions), reference, strict=True)
    return [0.0 if a is None else 1.0 if a == r else 0.5 if r in a else 0.01 for a, r in answers]


REWARDS: dict[str, RewardFunction] = {
    "accuracy": accuracy,
    "format": well_formed,
    "length_penalty": length_penalty,
    "soft_overlong": soft_overlong,
    "repetition": repetition,
    "tutorial": tutorial,
}


def score(groups: list[Group], rewards: dict[str, RewardFunction], config: Config) -> list[Group]:
    """The groups with the rewards of each completion and their weighted sum, the return.

    Args:
        rewards: K functions by name.
        config: reward_weights, max_new_tokens, and reward_timeout: seconds for each function.
    Raises:
        UserError: a function failed, took too long, or did not return finite numbers or Nones.
    """
    table = torch.cat(share_out(groups, partial(ask_rewards, rewards, config)), dim=1)  # (K, Q × G)
    weighted = torch.tensor(config.reward_weights).unsqueeze(-1) * table
    returns = torch.where(table.isnan().all(dim=0), torch.nan, weighted.nansum(dim=0))
    if returns.isinf().any():
        raise UserError(
            "The weighted sum of the rewards is too large for float32; scale the rewards or their "
            "weights."
        )
    parts = zip(groups, table.chunk(len(groups), dim=1), returns.chunk(len(groups)), strict=True)
    return [replace(group, rewards=own, returns=total) for group, own, total in parts]
