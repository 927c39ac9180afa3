"""The files that verl is given: rows of Parquet, run.sh, reward.py and DIFFERENCES.md, as text."""

import json
import re
import shlex
from dataclasses import fields
from typing import Any

from support.config import OBJECTIVE_COLUMNS, Config
from support.data import Question
from support.errors import UserError
from support.prompts import messages_of
from support.verl_flags import VERL, Entry, Here
from support.verl_reward import extra_info

PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_/.:-]*")
LONGEST_VALUE = 80  # characters, in the table of options
NO_TEXT = {"null", "true", "false", "nan", "inf"}  # what Hydra reads as something else

RUN = """\
#!/usr/bin/env bash
# The run {name} of pocket-grpo with verl {verl}. Written by to_verl.py; DIFFERENCES.md beside this
# file says what is not the same. Further flags of verl can be given:
#     bash run.sh trainer.total_training_steps=10
set -euo pipefail
HERE="$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)"
export TENSORBOARD_DIR="${{TENSORBOARD_DIR:-$HERE/tensorboard}}"
QUOTE="'"
HERE="${{HERE//$QUOTE/\\\\$QUOTE}}" # as text between quotes of Hydra
exec python3 -m verl.trainer.main_ppo \\
    {flags} \\
    "$@"
"""

REWARD = '''\
"""The rewards of the run {name} of pocket-grpo, as verl calls them.

Written by to_verl.py. They are functions of the project's own folder, PROJECT. On another machine
set the environment variable POCKET_GRPO to the place of that folder there, or change PROJECT.
"""

import importlib.util
import os
import sys

PROJECT = os.environ.get("POCKET_GRPO", {project})
REWARDS = {rewards}
WEIGHTS = {weights}
MAX_NEW_TOKENS = {max_new_tokens}
SYSTEM_PROMPT = {system_prompt}


def load():
    """The rewards; the names `reward`, `loss`, ... of the project are not left on the path."""
    sys.path.insert(0, PROJECT)
    try:
        file = os.path.join(PROJECT, "reward.py")
        spec = importlib.util.spec_from_file_location("pocket_grpo_reward", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        from support.user_rewards import load_rewards
        from support.verl_reward import OneByOne

        rewards = load_rewards(REWARDS, module.REWARDS)
        return OneByOne(rewards, WEIGHTS, MAX_NEW_TOKENS, SYSTEM_PROMPT)
    finally:
        sys.path.remove(PROJECT)


ONE_BY_ONE = load()


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **others):
    """`score`, the weighted sum that is trained on, and each reward by its name."""
    return ONE_BY_ONE(solution_str, ground_truth, extra_info)
'''

DIFFERENCES = """\
# {name}, handed over to verl {verl}

Start it with `bash run.sh`, in an environment with verl and its engines:
`pip install "verl[{sampler},{trainer}]=={verl}"`. It begins with `{model}`, {since}.

## What is not the same

{differences}

## On other machines

- Copy this folder, and the folder of pocket-grpo, to the same places on every node. If the second
  one is elsewhere there, set the variable `POCKET_GRPO` to it on every node before Ray is started,
  or change `PROJECT` in reward.py.{files}
- run.sh finds its files beside itself. The model is `{model}`. If that is a folder, copy it too,
  and give its place: `bash run.sh actor_rollout_ref.model.path=FOLDER`.

## Every option

An option without a flag of verl has its reason in the last column.

| option | the run | verl's flags | to say |
|---|---|---|---|
{options}

Flags that follow from no option: {always}.
"""

# What differs in silence, whatever the options are.
SILENT = (
    "Advantages are divided by std + 1e-6, the run's by std + 1e-4: with rewards of 0 and 1 "
    "and groups of 12, for example, a difference below 0.04 %. In a group of equal rewards the "
    "run's advantages are exactly 0; verl's may be rounding noise divided by 1e-6, where the "
    "rewards are not sums of powers of 2.",
    "A reward sees one completion at a time: no group, no token ids, and `truncated` is always "
    "false. So an answer that is cut off in the middle of its tag may count as one. What no reward "
    "can score has the reward 0 and is trained; the run leaves it out.",
    "A reward sees the completion without any special tokens of the tokenizer; the run leaves out "
    "end tokens only.",
    "The rows of train.parquet stand in the order of the run's first pass over the questions, and "
    "`data.shuffle` is off: the first pass asks the same questions in the same steps, from the "
    "first question on, also where verl starts with a checkpoint that has seen them. verl repeats "
    "this order in each pass and drops the questions that do not fill a step at its end; the run "
    "has another order in each pass, and drops none.",
    "The reference of the KL, if there is one, is the model that verl starts with (with adapters: "
    "without them). The state of the optimizer is not handed over, and the warm-up begins anew.",
    "Completions are sampled by {sampler}, whose arithmetic differs from the trainer's. verl logs "
    "the gap (`rollout_probs_diff_mean`); `--sampler_correction token_truncate` corrects for it.",
    "A validation logs the mean of the weighted reward and of each reward by its name. The run's "
    "`eval/accuracy` is verl's figure of the reward `accuracy`.",
)
GSPO = (
    "verl stops the logarithm of a sequence's ratio at 10 from above, the run at ±20. Neither is "
    "reached in a run that learns."
)


# ------------------------------------------------------------------------------- rows


def as_messages(question: str, system_prompt: str) -> list[list[dict[str, str]]]:
    """A question in the ways that chat templates take a system prompt in, the best first."""
    joined = f"{system_prompt}\n\n{question}".strip()
    return [
        messages_of(question, system_prompt),
        messages_of(joined, ""),
        messages_of(question, ""),
    ]


def find_messages(
    questions: list[Question], tokenizer: Any, system_prompt: str
) -> list[list[dict[str, str]]]:
    """The messages of each question from which verl makes the tokens that the run has.

    Args:
        tokenizer: with the chat template that verl will find beside the model.
    Raises:
        UserError: there are none.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "The model has no chat template, and verl makes its prompts with one; choose an "
            "instruction-tuned model, or put a chat_template.jinja into its folder."
        )
    for way in range(3):
        found = [as_messages(q.question, system_prompt)[way] for q in questions]
        pairs = zip(found, questions, strict=True)
        if all(token_ids(messages, tokenizer) == q.prompt_ids for messages, q in pairs):
            return found
    raise UserError(
        "verl would make other prompts of these questions than the run does: the model's chat "
        "template changes what a system message or the beginning of an answer looks like, or "
        "prints today's date; put another chat_template.jinja into the model's folder."
    )


def token_ids(messages: list[dict[str, str]], tokenizer: Any) -> list[int] | None:
    """The prompt as verl makes it; None where the template refuses the messages."""
    try:
        found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    except Exception:  # a template raises what it likes
        return None
    return list(found) if isinstance(found, list) else list(found["input_ids"])


def check_decoding(tags: list[str], tokenizer: Any) -> None:
    """UserError for a tag that verl takes away before a reward sees the completion."""
    for tag in tags:
        ids = tokenizer(f"so {tag} 1", add_special_tokens=False)["input_ids"]
        if tag not in tokenizer.decode(ids, skip_special_tokens=True):
            raise UserError(
                f"{tag} is a special token of this model, and verl takes those away before a "
                "reward sees the completion; ask for another tag, or choose another model."
            )


def row(
    question: Question, messages: list[dict[str, str]], index: int, split: str, source: str
) -> dict[str, Any]:
    """One row of a Parquet file, with the columns that verl's RLHFDataset reads."""
    return {
        "data_source": source,
        "prompt": messages,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": question.reference},
        "extra_info": extra_info(question, index, split),
    }


# ------------------------------------------------------------------------------- run.sh


def hydra_value(value: Any) -> str:
    """A value in Hydra's grammar, in which a comma or a bracket in a bare word means something."""
    if value is None:
        return "null"
    if isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, list):
        return "[" + ",".join(map(hydra_value, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{hydra_value(v)}" for k, v in value.items()) + "}"
    if PLAIN.fullmatch(value) and value.lower() not in NO_TEXT:
        return value
    doubled = re.sub(r"(\\*)(?='|$)", r"\1\1", value)  # before a quote a backslash is two
    return "'" + doubled.replace("'", r"\'").replace("${", r"\${") + "'"


def flag(name: str, value: Any) -> str:
    """One flag, as bash takes it."""
    if isinstance(value, Here):
        return f"{name}=\"'$HERE/{value.name}'\""
    return shlex.quote(f"{name}={hydra_value(value)}")


def run_script(name: str, flags: dict[str, Any]) -> str:
    """run.sh."""
    lines = " \\\n    ".join(flag(*pair) for pair in flags.items())
    return RUN.format(name=one_line(name), verl=VERL, flags=lines)


def one_line(text: str) -> str:
    """A name in a comment: a line break would end the comment."""
    return " ".join(text.replace('"""', "").replace("\\", "/").split())


# ------------------------------------------------------------------------------- reward.py


def reward_script(name: str, config: Config, rewards: list[str], project: str) -> str:
    """reward.py."""
    return REWARD.format(
        name=one_line(name),
        project=repr(project),
        rewards=repr(rewards),
        weights=repr(config.reward_weights),
        max_new_tokens=config.max_new_tokens,
        system_prompt=repr(config.system_prompt),
    )


# ------------------------------------------------------------------------------- DIFFERENCES.md


def differences(
    config: Config,
    objective: Any,
    entries: dict[str, Entry],
    always: dict[str, Any],
    facts: dict[str, str],
) -> str:
    """DIFFERENCES.md.

    Args:
        always: the flags that follow from no option.
        facts: `name` of the run, `model`, `since` (why that model), `sampler`, `trainer`.
    """
    sentences = [f"`ppo_mini_batch_size` {entries['train_batch_size'].note}."]
    if not config.eval_interval:
        sentences.append("The run has no evaluation: test.parquet is one training question.")
    sentences += [sentence.format(**facts) for sentence in SILENT]
    if objective.ratio_level != "token":
        sentences.append(GSPO)
    options = []
    for option in (f.name for f in fields(Config)):
        owner = objective if option in OBJECTIVE_COLUMNS else config
        options.append(option_row(option, getattr(owner, option), entries[option]))
    files = [n.rpartition(":")[0] for n in config.reward if ":" in n]
    copied = f" Copy {', '.join(files)} too, and write the new places in REWARDS." if files else ""
    return DIFFERENCES.format(
        verl=VERL,
        differences="\n".join(f"- {sentence}" for sentence in sentences),
        options="\n".join(options),
        always=", ".join(f"`{k}={shown(v)}`" for k, v in always.items()),
        files=copied,
        **facts,
    )


def option_row(option: str, value: Any, entry: Entry) -> str:
    """One line of the table of options."""
    assert entry.flags or entry.note, f"{option} is neither a flag nor explained"
    flags = " ".join(f"`{name}={shown(v)}`" for name, v in entry.flags.items())
    words = json.dumps(value, ensure_ascii=False)
    words = words if len(words) <= LONGEST_VALUE else words[:LONGEST_VALUE] + "…"
    cells = (f"`--{option}`", words, flags or "–", entry.note)
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def shown(value: Any) -> str:
    """A value in the table."""
    return value.name if isinstance(value, Here) else hydra_value(value)
