"""Rewards to copy from: credit for steps on the way, form as a gate, a model that is asked.

    python train.py --preset tiny --reward accuracy examples/rewards.py:steps_on_the_way \
        --reward_weights 1 0.5
    python train.py --preset tiny --reward accuracy examples/rewards.py:format_if_right \
        --reward_weights 1 0.2
    JUDGE=FOLDER python train.py --reward accuracy examples/rewards.py:asked_judge \
        --reward_weights 1 0.5

Their signature is TRL's, so they work there too. Columns of the dataset come under their own names
(`answer` is GSM8K's worked solution). None means "cannot be scored".
"""

import os
import re
from functools import cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from reward import accuracy, well_formed

STEP = re.compile(r"<<[^<>=]*=([^<>]*)>>")  # GSM8K's notes: 48/2 = <<48/2=24>>24
RESULT = re.compile(r"=\s*\$?(-?\d[\d,]*(?:\.\d+)?)")  # what stands behind a sign of equality
MARK = re.compile(r"\b(10|\d)\b")


def steps_on_the_way(
    prompts: list[str], completions: list[str], answer: list[str], **columns: Any
) -> list[float | None]:
    """The share of the solution's results, up to the first that the completion does not reach.

    In the solution's order. A completion that writes more equations than the solution is measured
    by its own number of them, so that to write every number down earns nothing. None where the
    solution has no equations.
    """
    scores: list[float | None] = []
    for completion, solution in zip(completions, answer, strict=True):
        wanted = [number(text) for text in STEP.findall(solution)]
        found = [number(text) for text in RESULT.findall(completion)]
        reached, rest = 0, iter(found)
        for result in wanted:
            # The next equation with this result; if there is none, later ones cannot be in order.
            if result not in rest:
                break
            reached += 1
        scores.append(reached / max(len(wanted), len(found)) if wanted else None)
    return scores


def format_if_right(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """1 for both tags in order, where the answer is right too: the empty form earns nothing.

    `reference` and `truncated` are columns that train.py adds, so this one needs them in TRL too.
    """
    right = accuracy(prompts, completions, **columns)
    form = well_formed(prompts, completions, **columns)
    return [a * b for a, b in zip(right, form, strict=True)]


def number(text: str) -> float:
    """A number as it is written, `1,250.00`; NaN, which equals nothing, for another text."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return float("nan")


ASKED = (
    "Question: {question}\n\nA student's answer:\n{answer}\n\nHow good is the reasoning, from 0 "
    "(wrong) to 10 (right and complete)? Reply with the number alone."
)


def asked_judge(prompts: list[list[dict]], completions: list[list[dict]], **columns: Any) -> list:
    """What the model in $JUDGE replies when it is asked for a mark from 0 to 10, as 0 … 1.

    Written for chat messages, as TRL's own. None where its reply has no mark. A judge that is asked
    in words is slow (it generates) and kind to confident nonsense: give it a small weight.
    """
    tokenizer, model = judge(os.environ["JUDGE"])
    questions = [prompt[-1]["content"] for prompt in prompts]
    answers = [completion[0]["content"] for completion in completions]
    chats = [
        [{"role": "user", "content": ASKED.format(question=question, answer=answer)}]
        for question, answer in zip(questions, answers, strict=True)
    ]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.no_grad():
        replies = model.generate(**inputs.to(model.device), max_new_tokens=6, do_sample=False)
    said = tokenizer.batch_decode(replies[:, inputs["input_ids"].shape[1] :])
    marks = [MARK.search(text) for text in said]
    return [int(mark[1]) / 10 if mark else None for mark in marks]


@cache
def judge(name: str) -> tuple[Any, Any]:
    """Tokenizer and model of the judge, loaded once."""
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, use_safetensors=True)
    return tokenizer, model.to(device).eval()
