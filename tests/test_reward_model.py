"""A learned reward: the judge reads messages in its own template, alone as in a batch, and nothing random scores."""

import json
import random
from dataclasses import replace

import pytest
import torch
from conftest import BARE
from steps import build, sample
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from reward import REWARDS, score
from rollout import Completion, Group
from support.data import Question
from support.errors import UserError
from support.reward_model import RewardModel
from support.user_rewards import call_reward, load_rewards, reward_arguments

TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
CONFIG = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "attention_dropout": 0.5,
}  # fmt: skip


@pytest.fixture
def judge(tmp_path):
    """Save a judge of random weights with the bundled tokenizer: call it with changes; returns its folder."""

    def make(kind=LlamaForSequenceClassification, pad="<|pad|>", template=TEMPLATE, **changes):
        words = AutoTokenizer.from_pretrained("tiny/model")
        words.pad_token, words.chat_template = pad, template
        start = (
            "<|user|>",
            words.convert_tokens_to_ids("<|user|>"),
        )  # added to a text that is no chat
        words.backend_tokenizer.post_processor = TemplateProcessing(
            "<|user|> $A", special_tokens=[start]
        )
        torch.manual_seed(1)
        model = kind(
            LlamaConfig(
                **(
                    {"vocab_size": len(words), "num_labels": 1, "pad_token_id": None}
                    | CONFIG
                    | changes
                )
            )
        )
        folder = tmp_path / "judge"
        model.save_pretrained(folder)
        words.save_pretrained(folder)
        return folder

    return make


CHATS = [
    ("Tom has 5 apples.", "5"),
    ("Ann has 12 pens. Ann buys 30 more.", "<think>12 + 30 = 42</think><answer>42</answer>"),
    ("Leo has 1.", "I do not know, but it may be 1 or 2 or 3."),
]


def messages(chats=CHATS, system="Answer."):
    prompts = [
        [{"role": "system", "content": system}, {"role": "user", "content": q}] for q, _ in chats
    ]
    return prompts, [[{"role": "assistant", "content": a}] for _, a in chats]


@pytest.mark.parametrize("pad", ["<|pad|>", "<|end|>", None], ids=["pad", "pad = eos", "no pad"])
def test_a_batch_scores_as_each_text_alone(judge, pad):
    """To 1e-6, in any order and any size of batch; and as the model says it of the template's tokens."""
    folder = judge(pad=pad)
    reward = RewardModel(str(folder))
    together = reward(*messages())
    alone = [reward(*messages([chat]))[0] for chat in CHATS]
    assert together == pytest.approx(alone, abs=1e-6) and len(set(together)) == 3
    assert reward(*messages(CHATS[::-1])) == pytest.approx(alone[::-1], abs=1e-6)
    reward.batch.size = 2
    assert reward(*messages()) == pytest.approx(alone, abs=1e-6)
    words = AutoTokenizer.from_pretrained(folder)
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    for (question, answer), value in zip(CHATS, together, strict=True):
        text = f"<|system|>Answer.<|end|><|user|>{question}<|end|><|assistant|>{answer}<|end|>"
        ids = words(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        if pad != "<|pad|>":  # as in TRL: what pads is not read at the end
            ids = ids[:, :-1]
        with torch.no_grad():
            assert value == pytest.approx(model(ids).logits.item(), abs=1e-6)


def test_texts_are_sorted_by_length_and_padded_on_the_right(judge, monkeypatch):
    reward = RewardModel(str(judge()))
    reward.batch.size, seen = 4, []
    forward = reward.judge.forward
    monkeypatch.setattr(
        reward.judge, "forward", lambda **inputs: seen.append(inputs) or forward(**inputs)
    )
    chats = [("Tom.", "5" * random.Random(i).randint(1, 60)) for i in range(8)]
    reward(*messages(chats))
    masks = [inputs["attention_mask"] for inputs in seen]
    lengths = [mask.sum(dim=-1).tolist() for mask in masks]
    assert len(set(sum(lengths, []))) > 4
    assert sum(lengths, []) == sorted(sum(lengths, [])) and [len(row) for row in lengths] == [4, 4]
    assert all((mask.diff(dim=-1) <= 0).all() for mask in masks)


def test_the_judge_gets_the_question_and_not_the_policys_prompt(judge):
    """System prompt and question as messages, the tag that the prompt has opened before the completion."""
    rewards = load_rewards([f"model:{judge()}", "length_penalty"], REWARDS)
    assert list(rewards) == ["judge", "length_penalty"]
    question = Question("Tom has 5.", "5", "", prompt="<policy>Tom has 5.<go><think>")
    texts = "5</think>", "6"
    group = Group(question, [Completion([1, 2], text, truncated=False) for text in texts])
    config = replace(
        BARE, system_prompt="Think.", reward=["judge", "length_penalty"], reward_weights=[1.0, 0.5]
    )
    found = call_reward("judge", rewards["judge"], reward_arguments([group], config))
    chats = [("Tom has 5.", "<think>5</think>"), ("Tom has 5.", "<think>6")]
    expected = rewards["judge"].function(*messages(chats, system="Think."))
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    (scored,) = score([group], rewards, config)
    assert scored.rewards[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert scored.returns.tolist() == pytest.approx(
        (scored.rewards[0] + 0.5 * scored.rewards[1]).tolist(), abs=1e-6
    )


def test_a_template_without_a_system_prompt(judge):
    """The system prompt stands before the question then."""
    gemma = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + TEMPLATE
    )
    folder = judge(template=gemma)
    chats = [(f"Answer.\n\n{question}", answer) for question, answer in CHATS]
    found = RewardModel(str(folder))(*messages())
    prompts, completions = messages(chats)
    expected = RewardModel(str(judge()))([prompt[1:] for prompt in prompts], completions)
    assert found == pytest.approx(expected, abs=1e-6)


def test_what_cannot_be_scored_is_none(judge):
    """A text that is longer than the judge can read; and all of them, where it computes no number."""
    reward = RewardModel(str(judge(max_position_embeddings=35)))
    scores = reward(*messages())
    assert [value is None for value in scores] == [False, True, False]
    assert scores[0] == pytest.approx(reward(*messages(CHATS[:1]))[0], abs=1e-6)
    reward.judge.score.weight.data.fill_(torch.nan)
    assert reward(*messages()) == [None, None, None]


def test_a_run_with_a_judge(judge, tmp_path, few_questions):
    """The reward of a rollout, and its weighted sum with a rule's."""
    flags = f"--reward=model:{judge()}", "length_penalty", "--reward_weights", "1", "0.5"
    trainer = build(
        tmp_path / "log", few_questions, "--reward", *flags[0].split("=")[1:], *flags[1:]
    )
    groups = sample(trainer, 1)
    learned, rule = groups[0].rewards
    assert learned.unique().numel() > 1 and learned.isfinite().all()
    assert torch.allclose(groups[0].returns, learned + 0.5 * rule)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kind": LlamaForCausalLM}, "is no reward model but LlamaForCausalLM, and would get a head of random numbers"),
        ({"num_labels": 3}, "has 3 labels, and a reward is one number"),
        ({"template": None}, "has no chat template, so how it reads a question and its answer is not known"),
    ],
)  # fmt: skip
def test_what_is_no_judge_is_refused(judge, changes, says):
    with pytest.raises(UserError, match=says):
        load_rewards([f"model:{judge(**changes)}"], REWARDS)


def test_a_head_that_is_missing_is_refused(judge):
    """Weights of a language model beside the config of a classifier."""
    folder = judge()
    config = json.loads((folder / "config.json").read_text())
    judge(kind=LlamaForCausalLM)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"lacks score.weight, which would be random numbers"):
        RewardModel(str(folder))


@pytest.mark.parametrize("name", ["no/such-judge", "tiny/task"])
def test_a_judge_that_is_not_there(name):
    with pytest.raises(UserError, match=f"Cannot load the reward model '{name}'"):
        load_rewards([f"model:{name}"], REWARDS)
