"""Models of every shape: the whole job, from the command line, for each family that people use; what cannot, says so.

`whole_job` is that of benchmarks/families.py, which does it with every causal language model type of transformers.
"""

import json

import pytest
from test_sharing import FAMILIES, OTHERS, family

from benchmarks.families import CLOSE, build, make_folder, run, whole_job

PEOPLE_USE = {  # the way each one must go
    "llama": "fast", "qwen2": "fast", "qwen3": "fast", "gemma3_text": "fast", "phi3": "fast", "mistral": "fast",
    "gpt2": "fast", "gpt_neox": "fast", "opt": "fast", "granite": "fast", "qwen3_moe": "fast", "mixtral": "fast",
    "gemma2": "plain", "falcon": "plain", "stablelm": "plain",
    "lfm2": "plain", "mamba": "plain", "openai-gpt": "plain",  # convolutions, a recurrent state, no cache at all
}  # fmt: skip
WHY_NOT = {
    "bert": "looks at the tokens that come after", "doge": "looks at the tokens that come after", "rwkv": "does not leave padding out",
    "deepseek_v4": "does not leave padding out", "git": "generates from other probabilities",
}  # fmt: skip


def small(name):
    """With windows shorter than the rows, and the vocabulary of the bundled tokenizer."""
    known = FAMILIES | OTHERS
    return (
        family(name, known[name] | {"vocab_size": 121, "pad_token_id": 1})
        if name in known
        else build(name)
    )


@pytest.mark.parametrize("name", PEOPLE_USE)
def test_the_whole_job(name, tmp_path, capsys):
    """Two steps, and a resume bit for bit; what was sampled and what is trained, against the plain forward pass."""
    make_folder(small(name), tmp_path)
    way, gap = whole_job(tmp_path, bf16=False)
    assert way == PEOPLE_USE[name] and gap < CLOSE
    said = capsys.readouterr().out
    assert ("slower, the numbers are the same" in said) == (way == "plain"), "and train.py says so"


@pytest.mark.parametrize("name", ["gemma3_text", "mamba"])
def test_a_step_in_bf16(name, tmp_path):
    make_folder(small(name), tmp_path)
    run(tmp_path, "bf16", "--steps=1", "--precision=bf16", "--gradient_checkpointing=true")


def refused(work, capsys, *flags):
    """The sentence; nothing may have been written."""
    with pytest.raises(SystemExit) as stopped:
        run(work, "run", *flags)
    assert stopped.value.code == 2 and not (work / "run").exists()
    sentence = capsys.readouterr().err.rpartition("error: ")[2].strip()
    assert sentence.endswith((".", ")")) and "\n" not in sentence
    return sentence


@pytest.mark.parametrize("name", WHY_NOT)
def test_what_cannot_work_says_so(name, tmp_path, capsys):
    make_folder(build(name), tmp_path)
    assert WHY_NOT[name] in refused(tmp_path, capsys)


def test_a_model_that_needs_more_than_text(tmp_path, capsys):
    """XMOD wants to be told a language before its first forward pass."""
    make_folder(build("xmod"), tmp_path)
    assert (
        "does not work as a language model of text alone (ValueError: Input language unknown"
        in refused(tmp_path, capsys)
    )


def test_a_model_without_gradient_checkpointing(tmp_path, capsys):
    make_folder(build("ctrl"), tmp_path)
    assert "give --gradient_checkpointing false" in refused(
        tmp_path, capsys, "--gradient_checkpointing=true"
    )


@pytest.mark.parametrize(
    "damage", [{"hidden_size": "many"}, {"num_attention_heads": 0}, {"rope_parameters": 3}]
)
def test_a_config_that_its_class_does_not_take(damage, tmp_path, capsys):
    """Each is an exception of another kind."""
    path = make_folder(small("llama"), tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    assert "Cannot load the" in refused(
        tmp_path, capsys
    )  # the tokenizer is first, and reads the config too
