"""Hand a run over to verl, which trains on many GPUs: its data, rewards and settings, as verl's.

    python to_verl.py --config runs/NAME/config.yaml --out FOLDER
    python to_verl.py --config runs/NAME/config.yaml --out FOLDER --nodes 8 --gpus 8

FOLDER is new: train.parquet, test.parquet, reward.py, run.sh (`bash run.sh` starts verl) and
DIFFERENCES.md, which names what is not the same. verl starts with the newest checkpoint beside
config.yaml, or with --model. What verl cannot compute is refused. All options of train.py can be
given, and change what is handed over. verl itself is not needed here.
"""

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from transformers import AutoTokenizer

from objectives.table import NAMES, objective_of
from reward import REWARDS
from support import verl_files
from support.adapters import read_adapter
from support.checkpoint import checkpoints, find_model
from support.command_line import Extra, parse_config
from support.config import Config, resolve_path
from support.data import Question, QuestionStream
from support.errors import UserError, check_choice, command, quoted
from support.evaluation import held_out_questions
from support.files import new_folder, written_whole
from support.model import load_tokenizer
from support.prompts import TAGS, training_questions
from support.verl_flags import Cluster, always, entries
from support.verl_reward import check_rewards

PROJECT = Path(__file__).resolve().parent
FLAGS = {
    "out": "a new folder, for what verl needs",
    "nodes": "machines (default: 1)",
    "gpus": "GPUs of each machine (default: 8)",
    "tensor_parallel": "GPUs that share one copy of the model (default: 1)",
    "trainer": "fsdp or megatron: what verl trains with (default: fsdp)",
    "sampler": "vllm or sglang: what verl samples with (default: vllm)",
}


def read_cluster(given: Extra) -> Cluster:
    """The machines and engines of the command line; UserError for what is none."""
    found: dict[str, Any] = {}
    for name in ("nodes", "gpus", "tensor_parallel"):
        text = given[name]
        if text is not None and not (text.isdecimal() and 0 < int(text) <= 10**5):
            raise UserError(f"--{name} is {text!r}; it must be a whole number of 1 or more.")
        found |= {} if text is None else {name: int(text)}
    for name, choices in (("trainer", ("fsdp", "megatron")), ("sampler", ("vllm", "sglang"))):
        if given[name] is not None:
            found[name] = check_choice(given[name], choices, name)
    return Cluster(**found)


def read_settings(argv: list[str]) -> tuple[Config, Extra, str]:
    """The settings, the other flags and, in words, why verl starts with this model.

    It is the newest checkpoint beside config.yaml, if there is one and no --model is given.
    """
    config, others = parse_config(argv, __doc__, NAMES, **FLAGS)
    if others["resume"]:
        raise UserError("--resume is train.py's; say --config runs/NAME/config.yaml.")
    words = [word for argument in argv for word in argument.split("=", 1)]
    if not {"--config", "--preset"} & set(words):
        raise UserError("Say which run is to be handed over: --config runs/NAME/config.yaml.")
    file = words[words.index("--config") + 1] if "--config" in words else ""
    run = Path(file).expanduser().parent
    if "--model" in words or not file or not checkpoints(run):
        return config, others, "the model that the settings name"
    newest = find_model(str(run))
    base, argv = config.model, [*argv, f"--model={newest}"]
    config, others = parse_config(argv, __doc__, NAMES, **FLAGS)
    print(f"--model {newest}, the newest checkpoint of the run")
    return config, others, f"the newest checkpoint of the run, which began with {base}"


def place_of(name: str) -> str:
    """A model or a file as it is found from every folder; a hub name stays as it is."""
    path = Path(resolve_path(name)).expanduser()
    return str(path.resolve()) if path.exists() else name


def rewards_by_place(names: list[str]) -> list[str]:
    """The rewards, those of a file with its whole path."""
    parts = [name.rpartition(":") for name in names]
    return [
        f"{place_of(file)}:{function}" if colon else function for file, colon, function in parts
    ]


def read_questions(config: Config, tokenizer: Any) -> dict[str, list[Question]]:
    """The questions of the splits train and test; the former in the order of the run."""
    questions = training_questions(config, tokenizer)
    if len(questions) < config.rollouts_per_step:
        raise UserError(
            f"There are {len(questions)} questions, and verl cannot fill a step of "
            f"{config.rollouts_per_step} with them; give --rollouts_per_step a smaller number."
        )
    train = QuestionStream(questions, config.seed).take(len(questions))
    check_rewards(config, REWARDS, train, tokenizer)
    return {
        "train": train,
        # verl wants a file, also of a run without evaluation.
        "test": held_out_questions(config, tokenizer) if config.eval_interval else train[:1],
    }


def collect(config: Config, name: str, cluster: Cluster, since: str) -> dict[str, Any]:
    """The contents of the files: text, or the rows of a table.

    Raises:
        UserError: a part of the run has no equivalent in verl.
    """
    objective, adapter = objective_of(config), read_adapter(config.model)
    model = place_of(adapter["base_model_name_or_path"] if adapter else config.model)
    beside = place_of(config.model) if adapter else ""
    found = entries(config, objective, cluster, model, beside)
    splits = read_questions(config, load_tokenizer(config.model))
    load_tokenizer(model)  # for its sentence, if there is none
    seen_by_verl = AutoTokenizer.from_pretrained(model)
    verl_files.check_decoding([*TAGS.findall(config.system_prompt), "<answer>"], seen_by_verl)
    source, files = Path(config.dataset).name, {}
    for split, questions in splits.items():
        messages = verl_files.find_messages(questions, seen_by_verl, config.system_prompt)
        pairs = enumerate(zip(questions, messages, strict=True))
        files[f"{split}.parquet"] = [
            verl_files.row(*pair, index, split, source) for index, pair in pairs
        ]
    rewards, flags = rewards_by_place(config.reward), always(cluster, name)
    facts = {"name": verl_files.one_line(name), "model": model, "since": since}
    facts |= {"sampler": cluster.sampler, "trainer": cluster.trainer}
    every = flags | {k: v for entry in found.values() for k, v in entry.flags.items()}
    files["run.sh"] = verl_files.run_script(name, every)
    files["reward.py"] = verl_files.reward_script(name, config, rewards, str(PROJECT))
    files["DIFFERENCES.md"] = verl_files.differences(config, objective, found, flags, facts)
    return files


def write(folder: Path, files: dict[str, Any]) -> None:
    """All files or none: they are written beside the place of the folder, which is then renamed."""
    with written_whole(folder, "--out", (OSError, pyarrow.ArrowException)) as partial:
        for name, content in files.items():
            if isinstance(content, str):
                (partial / name).write_text(content, encoding="utf-8")
            else:
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), partial / name)


@command
def main(argv: list[str]) -> None:
    """Read the run, refuse what verl cannot do, write the folder."""
    config, others, since = read_settings(argv)
    folder, cluster = new_folder(others["out"], "--out", "the files are"), read_cluster(others)
    files = collect(config, folder.resolve().name, cluster, since)
    write(folder, files)
    print(f"written: {folder}; read DIFFERENCES.md there, then: bash {quoted(folder / 'run.sh')}")


if __name__ == "__main__":
    main()
