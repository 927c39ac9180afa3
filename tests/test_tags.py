"""What a model says reaches its reward: tags that are special tokens, and tags that the prompt has opened."""

import json
import shutil

import pytest
from conftest import BARE, FEW, ROOT, metrics

import run
import sft
import train
from reward import REWARDS, score
from rollout import Completion, Group, trim_at_eos
from support.config import SYSTEM_PROMPT, SYSTEM_PROMPT_ZH, Config
from support.data import Question
from support.errors import UserError
from support.model import load_tokenizer
from support.prompts import check_tags, with_prompts

TINY = ROOT / "tiny" / "model"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
SMALL = [
    "--preset=tiny", "--device=cpu", "--steps=1", "--rollouts_per_step=8", "--group_size=8", "--train_batch_size=64",
    "--eval_interval=0", "--checkpoint_interval=1",
]  # fmt: skip


def copy_of_model(folder, **changes):
    """The bundled model with another tokenizer.json or chat template."""
    shutil.copytree(TINY, folder)
    for name, change in changes.items():
        path = folder / {"tokenizer": "tokenizer.json", "template": "chat_template.jinja"}[name]
        path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    return folder


def make_special(text):
    """The four tags as special tokens, as in models that were trained with them."""
    tokenizer = json.loads(text)
    for token in tokenizer["added_tokens"]:
        token["special"] = token["special"] or token["content"] in TAGS
    return json.dumps(tokenizer)


def open_think(text):
    """A generation prompt that ends in `<think>`, as that of DeepSeek-R1's distils."""
    return text + "{% if add_generation_prompt %}<think>{% endif %}"


def test_tags_that_are_special_tokens_are_seen(tmp_path):
    """They were left out of the text: the success was 0 where it is 0.38, and nobody said so."""
    special = copy_of_model(tmp_path / "m", tokenizer=make_special)
    for name, model in (("plain", TINY), ("special", special)):
        own = [f"--model={model}", f"--dataset={FEW[0]}", f"--run_dir={tmp_path / name}"]
        train.main([*SMALL, *own])
    plain, found = (metrics(tmp_path / name)[0] for name in ("plain", "special"))
    assert plain == found and plain["rollout/success_rate"] > 0.2


def test_end_and_padding_are_no_text():
    tokenizer = load_tokenizer("tiny/model")
    ids = tokenizer("<think>1+1=2</think><answer>2</answer>", add_special_tokens=False)["input_ids"]
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    found = trim_at_eos([*ids, end, pad, pad], [0.0] * (len(ids) + 3), [end], tokenizer)
    assert found.ids == [*ids, end] and found.text == "<think>1+1=2</think><answer>2</answer>"
    assert trim_at_eos(ids, [], [end], tokenizer).truncated


def test_a_tag_that_the_prompt_has_opened_counts(tmp_path):
    """Each reward, and whoever looks, sees the completion with it; else `format` is 0 for every one."""
    tokenizer = load_tokenizer(str(copy_of_model(tmp_path / "m", template=open_think)))
    (question,), _ = with_prompts([Question("Tom has 5 apples.", "5", "")], tokenizer, BARE)
    assert question.prompt.endswith("<think>") and question.opened == "<think>"
    group = Group(question, [Completion([1], "5</think><answer>5</answer>", truncated=False)])
    (scored,) = score(
        [group], REWARDS, Config(reward=list(REWARDS), reward_weights=[1.0] * len(REWARDS))
    )
    by_name = dict(zip(REWARDS, scored.rewards[:, 0].tolist(), strict=True))
    assert by_name["format"] == by_name["accuracy"] == 1.0
    assert Question("q", "1", "", prompt="<|user|>q<|assistant|>").opened == ""
    assert Question("q", "1", "", prompt="What is <b>").opened == ""


def test_commands_with_a_tag_that_the_prompt_has_opened(tmp_path, capsys):
    """run.py finds the reasoning; sft.py does not teach `<think><think>`."""
    model = copy_of_model(tmp_path / "m", template=open_think)
    run.main([f"--model={model}", "--preset=tiny", "--device=cpu", "--question=Tom has 5 apples."])
    assert "said       <think>" in capsys.readouterr().out, "the bundled model does not close it"
    (question,), _ = with_prompts([Question("Q", "2", "1+1=2")], load_tokenizer(str(model)), BARE)
    assert sft.target(question) == "1+1=2</think>\n<answer>2</answer>"
    assert sft.target(Question("Q", "2", "1+1=2")) == "<think>1+1=2</think>\n<answer>2</answer>"


def test_tags_that_a_tokenizer_cannot_write_are_said():
    """Of what the system prompt asks for, before anything is sampled."""
    tokenizer = load_tokenizer("tiny/model")
    check_tags("Answer inside <answer> and </answer>.", tokenizer)
    with pytest.raises(UserError, match="asks for <zzz>, which this tokenizer cannot write"):
        check_tags("Answer inside <zzz>.", LosesTag(tokenizer))
    for tag in TAGS:
        assert tag in SYSTEM_PROMPT and tag in SYSTEM_PROMPT_ZH


class LosesTag:
    """A tokenizer that has no letters for a tag."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text, **settings):
        return self.tokenizer(text.replace("<zzz>", ""), **settings)

    def decode(self, ids, **settings):
        return self.tokenizer.decode(ids, **settings)


def test_what_was_said_is_shown_whenever_a_tag_is_missing():
    said = run.describe("m", Completion([1], "<think>a</think> so 72", truncated=False), "72")
    assert "(no <answer> tag)" in said and "said       <think>a</think> so 72" in said
    whole = run.describe("m", Completion([1], "<think>a</think><answer>72</answer>", False), "72")
    assert "said" not in whole


def test_a_continued_line_is_no_label():
    shown = run.side_by_side("reasoning  " + "answer " * 9, "answer     72", 60)
    first, *others = (line.split("|")[0] for line in shown.splitlines())
    assert first.startswith("reasoning  answer") and all(
        line.startswith(" " * 11) for line in others
    )
