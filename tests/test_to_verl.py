"""A hand-over to verl: nothing is forgotten, nothing is handed over that verl computes otherwise, and its files work.

verl itself is not needed: what it makes of the files is in benchmarks/verl_handover.py.
"""

import dataclasses
import importlib.util
import json
import shutil
import subprocess

import pyarrow.parquet
import pytest
import yaml

import to_verl
from objectives.table import OBJECTIVES, find_objective, objective_of
from reward import REWARDS, score
from rollout import Completion, Group
from support import verl_files
from support.config import Config
from support.data import QuestionStream, load_questions
from support.errors import UserError
from support.prompts import with_prompts
from support.user_rewards import load_rewards
from support.verl_flags import ACTOR, Cluster, entries, find_sizes

TINY = {
    "model": "tiny/model", "device": "cpu", "precision": "fp32", "system_prompt": "", "max_prompt_tokens": 128, "rollouts_per_step": 32,
    "group_size": 12, "train_batch_size": 96,
}  # fmt: skip


@pytest.fixture
def hand_over(tmp_path, few_questions):
    """Hand over a small run of the bundled task; returns the folder."""

    def run(*flags, out="out"):
        folder = tmp_path / out
        small = [
            "--preset=tiny",
            "--device=cpu",
            "--eval_questions=5",
            f"--dataset={few_questions}",
        ]
        to_verl.main([*small, f"--out={folder}", *flags])
        return folder

    return run


def flags_of(cluster=None, **settings):
    """verl's flags for some settings, name to value."""
    config = Config(**{**TINY, **settings})
    found = entries(config, objective_of(config), cluster or Cluster(), "MODEL", "")
    return {name: value for entry in found.values() for name, value in entry.flags.items()}


def given(folder):
    """The flags that run.sh gives to verl, as bash makes them."""
    stand_in = folder.parent / "bin"
    stand_in.mkdir()
    python = stand_in / "python3"
    python.write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
    python.chmod(0o755)
    path = f"{stand_in}:/usr/bin:/bin"
    done = subprocess.run(
        ["bash", folder / "run.sh", "more=1"],
        env={"PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    words = done.stdout.split("\0")[:-1]
    assert words[:2] == ["-m", "verl.trainer.main_ppo"] and words[-1] == "more=1"
    return dict(word.split("=", 1) for word in words[2:])


# ------------------------------------------------------------------------------- nothing is forgotten


@pytest.mark.parametrize("objective", ["grpo", "rloo", "dppo", "sapo"])
@pytest.mark.parametrize(
    "cluster", [Cluster(), Cluster(trainer="megatron")], ids=["fsdp", "megatron"]
)
def test_every_option_is_a_flag_or_explained(objective, cluster):
    """A new option of Config fails here until support/verl_flags.py has an entry for it."""
    config = Config(**{**TINY, "precision": "bf16"}, objective=objective, adapter_rank=8)
    found = entries(config, objective_of(config), cluster, "MODEL", "")
    assert set(found) == {field.name for field in dataclasses.fields(Config)}
    for name, entry in found.items():
        assert entry.flags or entry.note, name


OTHER = {
    "seed": 7, "steps": 5, "precision": "bf16", "adapter_rank": 4, "gradient_checkpointing": False, "max_prompt_tokens": 99,
    "rollouts_per_step": 64, "group_size": 24, "max_new_tokens": 99, "temperature": 0.9, "top_p": 0.9, "advantage": "leave-one-out",
    "advantage_std": "none", "surrogate": "cispo", "ratio_level": "sequence", "clip_eps": 0.1, "clip_eps_high": 0.3,
    "clip_ratio_c": 5.0, "loss_agg_mode": "token-mean", "kl_weight": 0.2, "kl_estimator": "k1", "kl_in_reward": True,
    "entropy_weight": 0.1, "dynamic_sampling": 3, "sampler_correction": "token_mask", "train_batch_size": 48,
    "micro_batch_size": 6, "epochs_per_step": 2, "optimizer": "adamw_8bit", "lr": 1e-5, "warmup_steps": 3, "weight_decay": 0.1,
    "max_norm": 2.0, "eval_interval": 7, "checkpoint_interval": 7, "keep_checkpoints": 7,
}  # fmt: skip
BESIDE = {"advantage": {"advantage_std": "none"}}


@pytest.mark.parametrize("option", OTHER)
def test_an_option_changes_a_flag(option):
    beside = BESIDE.get(option, {})
    assert flags_of(**beside, **{option: OTHER[option]}) != flags_of(**beside)


def test_the_table_has_every_option(hand_over):
    text = (hand_over("--warmup_steps=3") / "DIFFERENCES.md").read_text()
    for field in dataclasses.fields(Config):
        assert text.count(f"| `--{field.name}` |") == 1, field.name


# ------------------------------------------------------------------------------- what differs in silence


def test_no_dual_clip_unless_the_run_has_one():
    """verl's default is 3; its ratio is at most e^20."""
    assert flags_of()[f"{ACTOR}.clip_ratio_c"] > 4.9e8
    assert flags_of(clip_ratio_c=4.0)[f"{ACTOR}.clip_ratio_c"] == 4
    assert flags_of(objective="dppo")[f"{ACTOR}.clip_ratio_c"] == 20


def test_a_mini_batch_is_whole_questions_that_all_gpus_share():
    def mini(gpus=1, **settings):
        config = Config(**{**TINY, **settings})
        return find_sizes(config, objective_of(config), Cluster(1, gpus)).mini_batch

    assert mini() == 8  # × 12 = 96
    assert mini(train_batch_size=16) == 1  # 12 or 24: the nearer one
    assert mini(train_batch_size=100) == 8  # 9 questions do not divide 32
    assert mini(gpus=64) == 16  # 96 sequences cannot be shared out among 64
    with pytest.raises(UserError, match="384 sequences of a rollout out evenly, and 5 copies"):
        mini(gpus=5)


@pytest.mark.parametrize("objective", ["grpo", "gmpo"])
def test_micro_batches_divide_what_a_gpu_has(objective):
    """verl stops otherwise; and its geo_mean is right with one micro-batch alone."""
    for gpus in (1, 4, 8, 32):
        for micro in (1, 5, 16, None):
            config = Config(**TINY, objective=objective, micro_batch_size=micro)
            sizes = find_sizes(config, objective_of(config), Cluster(1, gpus))
            share = sizes.mini_batch * 12 // gpus
            assert share % sizes.micro_batch == 0 and 384 // gpus % sizes.log_prob_batch == 0
            assert sizes.micro_batch <= max(config.micro_batch, share * (objective == "gmpo"))
            assert objective != "gmpo" or sizes.micro_batch == share


def test_what_is_changed_is_said(hand_over):
    text = (
        hand_over("--group_size=12", "--train_batch_size=16", "--gpus=1") / "DIFFERENCES.md"
    ).read_text()
    assert "1 × 12 = 12 sequences instead of 16" in text
    for words in (
        "1e-6",
        "data.shuffle",
        "one completion at a time",
        "token ids",
        "special tokens",
    ):
        assert words in text, words


# ------------------------------------------------------------------------------- what is refused

REFUSED = [
    (["--objective=reinforce"], "--advantage raw"),
    (["--objective=lite_ppo"], "--advantage_std batch"),
    (["--objective=gdpo"], "normalize_then_sum"),
    (["--objective=reinforce_plus_plus_baseline"], "--whiten_advantages"),
    (["--objective=dapo"], "--mask_truncated"),
    (["--objective=gspo", "--surrogate=cispo"], "--ratio_level sequence with --surrogate cispo"),
    (["--objective=sapo", "--loss_agg_mode=token-mean"], "--loss_agg_mode token-mean with --surrogate sapo"),
    (["--kl_weight=0.1", "--kl_estimator=full"], "--kl_estimator full"),
    (["--entropy_target=1"], "--entropy_target"),
    (["--top_entropy=0.2"], "--top_entropy"),
    (["--baseline_reward_weight=0.5"], "--baseline_reward_weight"),
    (["--adapter_rank=8", "--quantize=4bit"], "weights in 4 bits; give --quantize none"),
    (["--adapter_rank=8", "--adapter_alpha=0.5"], "whole number"),
    (["--adapter_rank=8", "--adapter_targets=q_proj", "--trainer=megatron", "--precision=bf16"], "--adapter_targets"),
    (["--trainer=megatron"], "computes in 16 bits only"),  # the preset is in fp32
    (["--reward=length_penalty"], "without its group and its token ids"),
    (["--reward=soft_overlong"], "without its group and its token ids"),
    (["--reward=model:judge"], "reward model on GPUs of its own"),
    (["--gpus=0"], "--gpus is '0'"),
    (["--nodes=two"], "--nodes is 'two'"),
    (["--gpus=7"], "evenly"),
    (["--tensor_parallel=3"], "does not divide the 8 GPUs"),
    (["--trainer=deepspeed"], "There is no trainer 'deepspeed'"),
    (["--rollouts_per_step=256"], "cannot fill a step of 256"),
    (["--resume=runs/x"], "no run to resume"),
    (["--config=nowhere/config.yaml"], "There is no config nowhere/config.yaml"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "words"),
    REFUSED,
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_verl_cannot_do_is_refused_by_name(flags, words, hand_over, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        hand_over(*flags)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and words in said and said.count("\n") == 1
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*partial"))


def test_each_method_is_handed_over_or_refused():
    """A new row of the table is decided on here."""
    refused = set()
    for name in OBJECTIVES:
        try:
            flags_of(objective=name)
        except UserError:
            refused.add(name)
    assert refused == {"dapo", "lite_ppo", "reinforce", "reinforce_plus_plus_baseline", "gdpo"}
    assert find_objective("dapo", mask_truncated=False)
    assert flags_of(objective="dapo", mask_truncated=False)["algorithm.filter_groups.enable"]


GROUP_REWARD = """
def longest(prompts, completions, **columns):
    most = max(map(len, completions))
    return [float(len(c) == most) for c in completions]

def by_ids(prompts, completions, **columns):
    return [float(len(ids)) for ids in columns["completion_ids"]]

def short(prompts, completions, name, **columns):
    return [None if "no" in c else -len(c) / 70 + (name[0] == "ada") for c in completions]
"""


@pytest.mark.parametrize("name", ["longest", "by_ids"])
def test_a_reward_that_needs_the_group_or_the_ids_is_refused(name, hand_over, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(GROUP_REWARD)
    with pytest.raises(SystemExit):
        hand_over("--reward", f"{tmp_path}/mine.py:{name}")
    assert f"The reward {name} cannot be handed over" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["there", "file/below"])
def test_a_place_that_cannot_be_written(out, hand_over, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "note.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        hand_over(out=out)
    assert stopped.value.code == 2 and "choose another --out" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "there").iterdir()] == ["note.txt"]


def test_a_run_must_be_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        to_verl.main([f"--out={tmp_path}/x"])
    assert "Say which run is to be handed over" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        to_verl.main(["--preset=tiny"])
    assert "--out FOLDER" in capsys.readouterr().err


def test_a_model_without_a_chat_template_is_refused(tokenizer, few_questions):
    questions = load_questions(str(few_questions), "train")
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(UserError, match="no chat template"):
            verl_files.find_messages(questions, tokenizer, "")
    finally:
        tokenizer.chat_template = template


def test_a_tag_that_is_a_special_token_is_refused(tokenizer):
    verl_files.check_decoding(["<answer>"], tokenizer)
    with pytest.raises(UserError, match=r"<\|end\|> is a special token"):
        verl_files.check_decoding(["<|end|>"], tokenizer)


# ------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("system_prompt", ["", "Answer in <answer> and </answer>."])
def test_the_rows_are_our_prompts_in_our_order(system_prompt, hand_over, few_questions, tokenizer):
    folder = hand_over(f"--system_prompt={system_prompt}", "--seed=3")
    rows = pyarrow.parquet.read_table(folder / "train.parquet").to_pylist()
    config = Config(system_prompt=system_prompt, max_prompt_tokens=128)
    questions, _ = with_prompts(load_questions(str(few_questions), "train"), tokenizer, config)
    questions = QuestionStream(questions, 3).take(len(questions))
    assert len(rows) == len(questions) == 200
    for row, question in zip(rows, questions, strict=True):
        assert list(row) == ["data_source", "prompt", "ability", "reward_model", "extra_info"]
        assert verl_files.token_ids(row["prompt"], tokenizer) == question.prompt_ids
        assert row["reward_model"] == {"style": "rule", "ground_truth": question.reference}
        assert json.loads(row["extra_info"]["columns"]) == question.columns
        assert [m["content"] for m in row["prompt"]][:-1] == [system_prompt] * bool(system_prompt)
    assert pyarrow.parquet.read_table(folder / "test.parquet").num_rows == 5


def test_run_sh_survives_any_name(hand_over):
    folder = hand_over("--kl_weight=0.1", out='it\'s $a "b"')
    found = given(folder)
    escaped = str(folder).replace("'", r"\'")
    assert found["data.train_files"] == f"'{escaped}/train.parquet'"
    assert found["reward.custom_reward_function.path"] == f"'{escaped}/reward.py'"
    assert found["data.shuffle"] == "False" and found[f"{ACTOR}.use_kl_loss"] == "True"
    assert found["trainer.n_gpus_per_node"] == "8"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "True"),
        (None, "null"),
        (1e-6, "1e-06"),
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("null", "'null'"),
        ("3", "'3'"),
        ("a, b", "'a, b'"),
        ("it's", r"'it\'s'"),
        ("a\\", "'a\\\\'"),
        (["q", "v"], "[q,v]"),
        ({"a": "b"}, "{a:b}"),
    ],
)
def test_values_in_the_grammar_of_hydra(value, text):
    assert verl_files.hydra_value(value) == text


def test_reward_py_gives_our_rewards_from_any_folder(
    hand_over, tmp_path, monkeypatch, few_questions, tokenizer
):
    (tmp_path / "mine.py").write_text(
        GROUP_REWARD.replace("name,", "").replace(' + (name[0] == "ada")', "")
    )
    names, weights = ["accuracy", "format", "mine.py:short"], [1.0, 0.5, 2.0]
    monkeypatch.chdir(tmp_path)
    folder = hand_over("--reward", *names, "--reward_weights", *map(str, weights))
    monkeypatch.chdir(folder)
    spec = importlib.util.spec_from_file_location("handed_over", folder / "reward.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = pyarrow.parquet.read_table(folder / "train.parquet").to_pylist()[:20]
    questions = {q.question: q for q in load_questions(str(few_questions), "train")}
    config = Config(
        reward=["accuracy", "format", f"{tmp_path}/mine.py:short"], reward_weights=weights
    )
    rewards = load_rewards(config.reward, REWARDS)
    for i, row in enumerate(rows):
        question, reference = (
            questions[row["extra_info"]["question"]],
            row["reward_model"]["ground_truth"],
        )
        text = [f"<answer>{reference}</answer>", f"<think>a</think><answer>{i}</answer>", "no"][
            i % 3
        ]
        found = module.compute_score(row["data_source"], text, reference, row["extra_info"])
        (group,) = score([Group(question, [Completion([0], text, False)])], rewards, config)
        assert found["score"] == float(group.returns[0])
        assert found["accuracy"] == float(i % 3 == 0 or (i % 3 == 1 and reference == str(i)))


def test_a_checkpoint_is_the_start_model(hand_over, tmp_path, few_questions, capsys):
    run = tmp_path / "runs" / "first"
    shutil.copytree("tiny/model", run / "checkpoint-2")
    settings = {
        "preset": "tiny",
        "device": "cpu",
        "dataset": str(few_questions),
        "model": "tiny/model",
    }
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    argv = [f"--config={run}/config.yaml", f"--out={tmp_path}/out"]
    to_verl.main([*argv, "--rollouts_per_step=8"])
    assert "checkpoint-2, the newest checkpoint of the run" in capsys.readouterr().out
    assert given(tmp_path / "out")["actor_rollout_ref.model.path"] == str(run / "checkpoint-2")
    assert "which began with tiny/model" in (tmp_path / "out" / "DIFFERENCES.md").read_text()
    to_verl.main(
        [argv[0], f"--out={tmp_path}/other", "--rollouts_per_step=8", "--model=tiny/model"]
    )
    assert "checkpoint-2" not in (tmp_path / "other" / "run.sh").read_text()


def test_an_adapter_is_handed_over_beside_its_base():
    config = Config(**{**TINY, "precision": "bf16"}, adapter_rank=8)
    found = entries(config, objective_of(config), Cluster(), "BASE", "ADAPTER")["model"].flags
    assert [*found.values()] == ["BASE", "ADAPTER"]
    with pytest.raises(UserError, match="cannot read the adapter in ADAPTER; merge it"):
        entries(config, objective_of(config), Cluster(trainer="megatron"), "BASE", "ADAPTER")


def test_engines_and_adapters_have_their_lines(hand_over):
    lora = flags_of(adapter_rank=16, adapter_targets=["q_proj", "v_proj"])
    assert lora["actor_rollout_ref.model.lora_rank"] == 16
    assert lora["actor_rollout_ref.model.target_modules"] == ["q_proj", "v_proj"]
    assert lora["actor_rollout_ref.rollout.load_format"] == "safetensors"
    cluster = Cluster(2, 8, "megatron", "sglang", 2)
    megatron = flags_of(cluster, adapter_rank=16, precision="bf16")
    assert megatron["actor_rollout_ref.model.lora.rank"] == 16
    assert not [name for name in megatron if "fsdp" in name]
    folder = hand_over(
        "--trainer=megatron",
        "--precision=bf16",
        "--sampler=sglang",
        "--tensor_parallel=2",
        "--nodes=2",
    )
    found = given(folder)
    assert (
        found["model_engine"] == "megatron" and found["actor_rollout_ref.rollout.name"] == "sglang"
    )
    assert (
        found[f"{ACTOR}.megatron.tensor_model_parallel_size"] == "2"
        and found["trainer.nnodes"] == "2"
    )
