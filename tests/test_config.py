"""support/config.py and the command line: presets, files, flags, and one sentence for whatever is wrong."""

import dataclasses
import importlib

import pytest
import torch
import yaml

from objectives.table import CHOICES, NAMES, OBJECTIVES, Objective
from support import command_line
from support.command_line import SECTIONS, check_change
from support.config import PRESETS, Config
from support.errors import UserError


def parse_config(argv):
    return command_line.parse_config(argv, "A command.", NAMES)


def test_presets_and_flags():
    config, _ = parse_config([])
    assert config == Config() and config.model == "Qwen/Qwen2.5-0.5B-Instruct"
    for name in PRESETS:
        assert parse_config(["--preset", name])[0].preset == name
    config, _ = parse_config(
        [
            "--preset",
            "tiny",
            "--lr",
            "1e-5",
            "--reward",
            "accuracy",
            "format",
            "--reward_weights",
            "1",
            "0.5",
        ]
    )
    assert (config.lr, config.reward, config.reward_weights, config.group_size) == (
        1e-5,
        ["accuracy", "format"],
        [1.0, 0.5],
        8,
    )
    assert parse_config(["--no_gradient_checkpointing"])[0].gradient_checkpointing is False
    assert parse_config(["--gradient-checkpointing", "false"])[0].gradient_checkpointing is False


def test_another_objective_is_its_whole_row(tmp_path):
    """Whatever a preset or a saved config chose for single columns, unless it is chosen again; the same one keeps it."""
    assert parse_config(["--preset", "tiny"])[0].kl_weight == 0.0
    assert parse_config(["--preset", "tiny", "--objective", "rloo"])[0].kl_weight is None
    run = tmp_path / "run"
    run.mkdir()
    parse_config(["--objective", "dapo", "--clip_eps_high", "0.35", "--run_dir", str(run)])[0].save(
        run / "config.yaml"
    )
    for flag in (["--config", str(run / "config.yaml")], ["--resume", str(run)]):
        assert parse_config(flag)[0].clip_eps_high == 0.35
        assert parse_config([*flag, "--objective", "dapo"])[0].clip_eps_high == 0.35
        assert parse_config([*flag, "--objective", "gspo"])[0].clip_eps_high is None
        assert (
            parse_config([*flag, "--objective", "gspo", "--clip_eps_high", "0.1"])[0].clip_eps_high
            == 0.1
        )


def test_every_column_of_an_objective_is_an_option():
    """And is the row's own choice unless it is given."""
    defaults = Config()
    assert all(getattr(defaults, column.name) is None for column in dataclasses.fields(Objective))


def test_the_tutorials_numbers():
    c = parse_config(["--preset", "tutorial"])[0]
    assert (c.reward, c.reward_weights, c.precision, c.warmup_steps) == (
        ["tutorial"],
        [1.0],
        "bf16-pure",
        0,
    )
    assert (c.seed, c.lr, c.train_batch_size, c.group_size, c.rollouts_per_step) == (
        42,
        5e-6,
        16,
        12,
        32,
    )
    row = OBJECTIVES[c.objective]
    assert (c.epochs_per_step, c.temperature, c.top_p, c.max_norm) == (1, 1.0, 1.0, 1.0)
    assert (row.clip_eps, row.eps_high, row.kl_weight, row.kl_estimator) == (0.2, 0.2, 0.01, "k3")
    assert c.max_prompt_tokens + c.max_new_tokens == 1024 and c.checkpoint_interval == 20
    assert (
        c.arithmetic
        == "32 questions × 12 completions = 384 sequences; 24 optimizer steps of 16 in 1 micro-batch of 16"
    )
    assert Config().arithmetic.endswith("4 optimizer steps of 96 in 6 micro-batches of 16")


@pytest.mark.parametrize(
    "found, cuda, expected",
    [({"avx512_bf16": True}, False, "bf16"), ({"amx_bf16": True}, False, "bf16"), ({"avx2": True}, False, "fp32"),
     ({}, False, "fp32"), ({}, True, "bf16")],
)  # fmt: skip
def test_precision_auto_is_what_the_machine_multiplies_fast(monkeypatch, found, cuda, expected):
    """And is decided once: a resumed run keeps it."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert Config(precision="auto", device="auto").precision == expected
    assert Config(precision="auto", device="cpu").precision == ("fp32" if cuda else expected)
    assert Config(precision="fp32").precision == "fp32"


def test_a_resumed_run_may_ask_for_auto_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    parse_config(["--preset=laptop", "--device=cpu"])[0].save(tmp_path / "config.yaml")
    again = ["--resume", str(tmp_path), "--precision"]
    assert parse_config([*again, "auto"])[0].precision == "fp32"
    assert capsys.readouterr().out == "", "it is what it was"
    parse_config([*again, "bf16"])
    assert "changed on resume: precision from fp32 to bf16" in capsys.readouterr().out


def test_a_smaller_rollout_makes_a_smaller_optimizer_step():
    """Unless a size was asked for, which then does not fit."""
    assert parse_config(["--group_size=2"])[0].train_batch_size == 64
    assert parse_config(["--rollouts_per_step=4"])[0].train_batch_size == 48
    assert parse_config(["--group_size=24"])[0].train_batch_size == 96
    with pytest.raises(UserError, match="train_batch_size 96 is larger than the 64 sequences"):
        parse_config(["--group_size=2", "--train_batch_size=96"])
    with pytest.raises(UserError, match="--group_size is 0"):
        parse_config(["--group_size=0"])


def test_a_saved_config_runs_again(tmp_path):
    config, _ = parse_config(
        ["--preset", "tiny", "--lr", "3e-5", "--clip_eps_high", "0.3", "--run_dir", "runs/x"]
    )
    config.save(tmp_path / "config.yaml")
    again, _ = parse_config(["--config", str(tmp_path / "config.yaml"), "--seed", "7"])
    assert again == dataclasses.replace(config, seed=7, run_dir="")
    resumed, others = parse_config(["--run_dir", str(tmp_path), "--resume"])
    assert resumed == dataclasses.replace(config, run_dir=str(tmp_path)) and others[
        "resume"
    ] == str(tmp_path)
    assert parse_config(["--resume", str(tmp_path)])[0] == resumed
    (tmp_path / "hand.yaml").write_text("preset: tiny\nlr: 1e-5\nkl_weight: 0\n")
    by_hand, _ = parse_config(["--config", str(tmp_path / "hand.yaml")])
    assert (by_hand.lr, by_hand.kl_weight) == (1e-5, 0.0), (
        "YAML reads 1e-5 as text and 0 as an integer"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lrr: 1", "c.yaml: There is no option 'lrr'; did you mean lr"),
        ("lr: fast", "lr in .* is 'fast'; it must be of type float"),
        ("steps: 2.5", "must be of type int"),
        ("steps: true", "must be of type int"),
        ("reward: accuracy", "must be a list"),
        ("- a", "is not a config"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_broken_config_file(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        parse_config(["--config", str(tmp_path / "c.yaml")])


def test_contradictions(tmp_path):
    Config(preset="tiny").save(tmp_path / "config.yaml")
    with pytest.raises(UserError, match="leave out --preset gsm8k"):
        parse_config(["--config", str(tmp_path / "config.yaml"), "--preset", "gsm8k"])
    with pytest.raises(UserError, match="leave out --config"):
        parse_config(["--config", str(tmp_path / "config.yaml"), "--resume", str(tmp_path)])
    (tmp_path / "trainer_state.pt").write_text("")
    with pytest.raises(UserError, match="is a checkpoint; --resume takes the folder of its run"):
        parse_config(["--resume", str(tmp_path)])
    with pytest.raises(UserError, match="Say which run to continue"):
        parse_config(["--resume"])
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["preset"] == "tiny"


def test_a_full_disk_leaves_the_saved_config_whole(tmp_path, monkeypatch):
    Config(preset="tiny").save(tmp_path / "config.yaml")
    before = (tmp_path / "config.yaml").read_text()

    def full(self, text, encoding):
        self.open("w").write(text[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_text", full)
    with pytest.raises(OSError, match="No space"):
        Config(preset="tiny", seed=7).save(tmp_path / "config.yaml")
    assert (tmp_path / "config.yaml").read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_auto_in_a_file(tmp_path):
    (tmp_path / "c.yaml").write_text("preset: tiny\nmicro_batch_size: auto\n")
    assert parse_config(["--config", str(tmp_path / "c.yaml")])[0].micro_batch_size is None


def test_a_micro_batch_larger_than_the_batch_is_the_batch():
    """The README's recipe for several optimizer steps on the bundled task, whose preset has micro-batches of 128."""
    config, _ = parse_config(["--preset=tiny", "--train_batch_size=64"])
    assert config.arithmetic.endswith("4 optimizer steps of 64 in 1 micro-batch of 64")


def test_auto_is_called_auto_on_resume(capsys):
    check_change("runs/x", "micro_batch_size", 64, None)
    check_change("runs/x", "clip_eps", None, 0.3)
    check_change("runs/x", "lr", 1e-5, 1e-5)
    said = "micro_batch_size from 64 to auto\nchanged on resume: clip_eps from the objective's own to 0.3\n"
    assert capsys.readouterr().out == "changed on resume: " + said


def test_a_smaller_rollout_on_resume_says_that_the_batch_shrinks(tmp_path, capsys):
    config, _ = parse_config(["--preset=tiny"])
    config.save(tmp_path / "config.yaml")
    config, _ = parse_config([f"--resume={tmp_path}", "--group_size=4"])
    said = capsys.readouterr().out
    assert config.train_batch_size == 128
    assert "changed on resume: group_size from 8 to 4\n" in said
    assert "changed on resume: train_batch_size from 256 to 128\n" in said
    assert said.count("changed on resume") == 2


LIMITED = [f for f in dataclasses.fields(Config) if f.metadata["help"].limits]


@pytest.mark.parametrize("option", LIMITED, ids=lambda f: f.name)
def test_each_limit_from_both_sides(option):
    """The last number that is allowed, and the first one that is not."""
    limits = option.metadata["help"].limits
    whole = isinstance(option.default, int) or "int" in str(option.type)
    step = 1 if whole else 1e-6
    good, bad = [], []
    if "at_least" in limits:
        good, bad = [limits["at_least"]], [limits["at_least"] - step]
    if "above" in limits:
        good, bad = [*good, limits["above"] + step], [*bad, limits["above"]]
    most = 1 if limits.get("share") else limits.get("at_most", 10**9)
    good, bad = [*good, most], [*bad, most + max(step, most * 1e-9)]
    for value in bad:
        value = int(value) if whole else float(value)
        with pytest.raises(UserError, match=f"^--{option.name} is "):
            Config(**{option.name: value})
    for value in good:
        try:
            Config(**{option.name: int(value) if whole else float(value)})
        except UserError as error:  # another option's limit may come first: so many sequences, say
            assert not str(error).startswith(f"--{option.name} is "), error


def test_help_names_what_an_option_takes(capsys):
    """Each objective, and each choice of its columns, as --help prints them."""
    with pytest.raises(SystemExit) as caught:
        parse_config(["--help"])
    assert caught.value.code == 0
    words = capsys.readouterr().out.replace(",", " ").split()
    for names in (OBJECTIVES, *CHOICES.values()):
        assert set(names) <= set(words)


@pytest.mark.parametrize("name", ["train", "run", "evaluate", "sft", "merge", "check_data"])
def test_help_is_grouped_and_fits_80_columns(name, capsys):
    """A command's own flags first, then the options by concern; a looking command's defaults are those of the run."""
    with pytest.raises(SystemExit):
        importlib.import_module(name).main(["--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    heads = [
        line
        for line in text.splitlines()
        if line.endswith(":") and line[0] != " " and line[:-1] in (*SECTIONS.values(), "options")
    ]
    assert heads == ["options:", *(f"{title}:" for title in SECTIONS.values())]
    looks, text = name in ("run", "evaluate", "merge"), " ".join(text.split())
    assert ("(default: the newest run in runs/)" in text) == looks
    assert ("(default: 233)" in text) != looks and "--run-dir" not in text
    assert ("--resume" in text) != looks
