"""support/model_card.py: other programs ask the model as it was trained, and its README says how it came to be."""

import pytest
from conftest import FEW, metrics
from test_tags import copy_of_model
from transformers import AutoTokenizer, pipeline

import run
import train
from rollout import rollout
from support.config import Config
from support.data import Question
from support.generation import Sampling
from support.model import load_model, load_tokenizer
from support.model_card import START, short, template_with_prompt
from support.prompts import build_prompt, with_prompts

SYSTEM = 'Say "how many", <b>then</b> stop.\nBe short.'
QUESTION = "Tom has 5 apples. Tom finds 2. How many apples does Tom have?"
TEMPLATES = {
    "system role": "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}",
    "no system role": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}[{{ m.content }}]{% endfor %}"
        "{% if add_generation_prompt %}:{% endif %}"
    ),
    "drops it": "{% for m in messages %}{% if m.role == 'user' %}({{ m.content }}){% endif %}{% endfor %}{% if add_generation_prompt %}:{% endif %}",
    "no generation prompt": "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}",
    "macro first": "{% macro f(x) %}{{ x }}{% endmacro %}{% for m in messages %}{{ f(m.role) }}: {{ m.content }}\n{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_users_message_alone_makes_the_prompt_of_the_training(kind):
    tokenizer, config = load_tokenizer("tiny/model"), Config(system_prompt=SYSTEM)
    tokenizer.chat_template = TEMPLATES[kind]
    trained = build_prompt(QUESTION, tokenizer, SYSTEM)
    tokenizer.chat_template = template_with_prompt(tokenizer, config)
    assert build_prompt(QUESTION, tokenizer, "") == trained
    if kind == "system role":
        own = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "Q"}]
        asked = tokenizer.apply_chat_template(own, tokenize=False, add_generation_prompt=True)
        assert asked == "<system>Mine.<user>Q<a>", "a chat with a system prompt keeps its own"
        longer = [
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": "A"},
            {"role": "user", "content": "R"},
        ]
        asked = tokenizer.apply_chat_template(longer, tokenize=False)
        assert asked == f"<system>{SYSTEM}<user>Q<assistant>A<user>R"


def test_what_cannot_be_said_in_a_template_is_left():
    tokenizer = load_tokenizer("tiny/model")
    assert template_with_prompt(tokenizer, Config(system_prompt="")) is None
    tokenizer.chat_template = None
    assert template_with_prompt(tokenizer, Config(system_prompt=SYSTEM)) is None


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps under a system prompt, with its template."""
    folder = tmp_path_factory.mktemp("card")
    model = copy_of_model(folder / "base", template=lambda text: TEMPLATES["system role"])
    train.main([
        "--preset=tiny", "--device=cpu", "--steps=2", "--rollouts_per_step=2", "--group_size=4", "--train_batch_size=8",
        "--eval_interval=2", "--eval_questions=4", f"--model={model}", f"--dataset={FEW[0]}", "--system_prompt=Go: <answer>.",
        f"--run_dir={folder / 'run'}",
    ])  # fmt: skip
    return folder / "run"


def test_a_client_and_our_own_commands_see_the_same_prompt(trained, capsys):
    """transformers' own pipeline, given the user's message, answers as run.py does."""
    checkpoint = str(trained / "checkpoint-2")
    theirs = AutoTokenizer.from_pretrained(checkpoint)
    assert theirs.chat_template.startswith(START)
    ours = load_tokenizer(checkpoint)
    assert ours.chat_template == TEMPLATES["system role"], "here it is an option again"
    config = Config(system_prompt="Go: <answer>.", max_prompt_tokens=128)
    (question,), _ = with_prompts([Question(QUESTION, "7", "")], ours, config)
    model = load_model(checkpoint, "fp32")
    ((answer,),) = [
        g.completions for g in rollout(model, ours, [question], 1, Sampling(24, temperature=0.0))
    ]
    ask = pipeline("text-generation", model=checkpoint, tokenizer=theirs, device="cpu")
    said = ask(
        [{"role": "user", "content": QUESTION}],
        max_new_tokens=24,
        do_sample=False,
        return_full_text=False,
    )
    assert said[0]["generated_text"] == answer.text
    run.main(
        [f"--model={trained}", "--device=cpu", f"--question={QUESTION}", "--max_new_tokens=24"]
    )
    assert f"tokens     {len(answer.ids)}" in capsys.readouterr().out


def test_the_card(trained):
    card = (trained / "checkpoint-2" / "README.md").read_text()
    (row,) = [row for row in metrics(trained) if row["step"] == 2]
    for words in (
        "base_model: \"base\"", "2 of 2 steps", "objective grpo", "rewards: accuracy", "> Go: <answer>.",
        f"accuracy: {row['eval/accuracy']:.3f} (95 % interval {row['eval/accuracy_low']:.3f} to", "on 4 held-out questions",
    ):  # fmt: skip
        assert words in card, words
    assert str(trained.parent) not in card, "no path of this machine"


def test_names_in_a_card_mean_something_elsewhere(tmp_path):
    assert (
        short("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"
        and short(str(tmp_path / "mine")) == "mine"
    )
    assert short("tiny/task") == "task"
