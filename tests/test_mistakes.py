"""Bad input is one sentence: through the real command line, exit code 2, no traceback, nothing made and nothing touched.

A row of the table is the flags, the words of the sentence, and what makes the bad input in the folder `{d}`. The tests
at the end are of what looks like a mistake and works.
"""

import io
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from conftest import FEW, ROOT
from filelock import FileLock
from safetensors.torch import load_file, save_file
from steps import forked

import check_data
import evaluate
import merge
import run
import sft
import train

TINY = ROOT / "tiny" / "model"
COMMANDS = {
    "check_data": check_data.main,
    "train": train.main,
    "evaluate": evaluate.main,
    "run": run.main,
    "sft": sft.main,
    "merge": merge.main,
}
SMALL = [
    "--device=cpu", "--steps=1", "--rollouts_per_step=2", "--group_size=2", "--train_batch_size=4",
    "--micro_batch_size=4", "--max_new_tokens=4", "--eval_interval=0", "--checkpoint_interval=1",
]  # fmt: skip
ROW = '{"question": "Tom has 5 apples.", "answer": "5 #### 5"}\n'
HUGE = "1" + "0" * 30
DEEP = "[" * 5000

Maker = Callable[[Path], None]


# What makes the bad input


def file(name: str, content: str | bytes) -> Maker:
    """A file of this content."""

    def make(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(
            content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
        )

    return make


def files(*makers: Maker) -> Maker:
    """Several of them."""

    def make(folder: Path) -> None:
        for maker in makers:
            maker(folder)

    return make


def parquet(*rows: dict, cut: int | None = None) -> Maker:
    """`x.parquet` of these rows, without its last `cut` bytes."""

    def make(folder: Path) -> None:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), folder / "x.parquet")
        content = (folder / "x.parquet").read_bytes()
        (folder / "x.parquet").write_bytes(content[: len(content) - (cut or 0)])

    return make


def latin_parquet(folder: Path) -> None:
    """Bytes that are not UTF-8 in a column of text, as careless writers leave them."""
    buffers = [
        None,
        pyarrow.py_buffer(bytes([0, 0, 0, 0, 4, 0, 0, 0])),
        pyarrow.py_buffer(b"caf\xe9"),
    ]
    column = pyarrow.Array.from_buffers(pyarrow.string(), 1, buffers)
    pyarrow.parquet.write_table(
        pyarrow.table({"question": column, "answer": ["#### 5"]}), folder / "x.parquet"
    )


def bundled(
    *without: str, config: dict | None = None, tokenizer: dict | None = None, **written: str | bytes
) -> Maker:
    """`m`, the bundled model with files taken out, settings changed (None: taken out) and files written (a_b is a.b)."""

    def make(folder: Path) -> None:
        shutil.copytree(TINY, folder / "m")
        for name in without:
            (folder / "m" / name).unlink()
        for name, changes in (("config.json", config), ("tokenizer_config.json", tokenizer)):
            settings = json.loads((TINY / name).read_text()) | (changes or {})
            (folder / "m" / name).write_text(
                json.dumps({k: v for k, v in settings.items() if v is not None})
            )
        for name, content in written.items():
            file("m/" + ".".join(name.rsplit("__", 1)), content)(folder)

    return make


def weights(change: Callable[[dict], dict]) -> Maker:
    """`m`, the bundled model with other weights."""

    def make(folder: Path) -> None:
        bundled()(folder)
        save_file(
            change(load_file(TINY / "model.safetensors")),
            folder / "m/model.safetensors",
            {"format": "pt"},
        )

    return make


def pickled(folder: Path) -> None:
    """`m`, the bundled model as such files were before safetensors."""
    bundled("model.safetensors")(folder)
    torch.save(load_file(TINY / "model.safetensors"), folder / "m" / "pytorch_model.bin")


def architecture(name: str, spread: float = 0.0, **settings: int | bool) -> Maker:
    """`m`, random weights of another architecture with the bundled tokenizer."""

    def make(folder: Path) -> None:
        bundled("model.safetensors", "config.json")(folder)
        kind = getattr(transformers, name)
        torch.manual_seed(0)
        network = kind(kind.config_class(vocab_size=121, **settings))
        for parameter in network.parameters():
            parameter.data += spread * torch.randn_like(parameter)
        network.save_pretrained(folder / "m")

    return make


BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
DISTIL = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}


def renamed(name: str) -> Maker:
    """`m` under the name of another head, so that only its arithmetic tells."""

    def make(folder: Path) -> None:
        config = json.loads((folder / "m/config.json").read_text()) | {"architectures": [name]}
        (folder / "m/config.json").write_text(json.dumps(config))

    return make


def a_run(*without: str, extra: str = "", **written: str | bytes) -> Maker:
    """`r`, a finished run of one step, with things taken out, and with lines added to its config."""

    def make(folder: Path) -> None:
        shutil.copytree(FINISHED[0], folder / "r")
        for name in without:
            path = folder / "r" / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if extra:
            with (folder / "r" / "config.yaml").open("a", encoding="utf-8") as config:
                config.write(extra)
        for name, content in written.items():
            file("r/" + name.replace("checkpoint_1_", "checkpoint-1/").replace("__", "."), content)(
                folder
            )

    return make


FINISHED: list[Path] = []


@pytest.fixture(scope="module", autouse=True)
def finished_run(tmp_path_factory):
    """The run of one step that `a_run` copies."""
    FINISHED[:] = [tmp_path_factory.mktemp("finished") / "run"]
    train.main(["--preset=tiny", f"--run_dir={FINISHED[0]}", f"--dataset={FEW[0]}", *SMALL])


# The table

Bad = tuple  # (flags, words of the sentence[, what makes the input][, the command])

NAMES: list[Bad] = [
    ("--lrr 1", "There is no flag '--lrr'; did you mean --lr?"),
    ("--group_sizes=3", "did you mean --group_size?"),
    ("--Steps 3", "did you mean --steps?"),
    (["--steps ", "3"], "There is no flag '--steps '; did you mean --steps?"),
    ("-steps 3", "There is no flag '-steps'; did you mean --steps?"),
    ("–-steps 3", "did you mean --steps?"),
    ("---lr 3", "There is no flag '---lr'; did you mean --lr?"),
    ("fast", "I do not know what to do with 'fast'"),
    (
        "steps=3",
        "I do not know what to do with 'steps=3'; every setting is a flag, as in --steps 10.",
    ),
    ([""], "I do not know what to do with ''"),
    ("--no_gradient_checkpointing x", "I do not know what to do with 'x'"),
    ("--preset tinny", "There is no preset 'tinny'; did you mean tiny?"),
    (
        "--preset ''",
        "There is no preset ''; choose one of: gsm8k, gsm8k-24gb, gsm8k-7b-24gb, gsm8k-zh, tutorial, laptop, tiny.",
    ),
    ("--preset", "--preset: expected one argument"),
    ("--objective grop", "There is no objective 'grop'; did you mean grpo?"),
    ("--objective GRPO", "did you mean grpo?"),
    ("--loss_agg_mode mean", "There is no loss_agg_mode 'mean'"),
    ("--advantage_std groups", "There is no advantage_std 'groups'; did you mean group?"),
    ("--kl_estimator k4", "There is no kl_estimator 'k4'"),
    ("--sampler_correction truncate", "There is no sampler_correction 'truncate'"),
    ("--precision fp16", "There is no precision 'fp16'"),
    (["--precision", "bf16\r"], "There is no precision 'bf16\\r'; did you mean bf16?"),
    ("--device gpu", "There is no device 'gpu'"),
    ("--optimizer sgd", "There is no optimizer 'sgd'"),
    ("--run_dir --lr", "expected one argument"),
    ("--system_prompt \udcff", "with a character that is not text"),
    (["--model", "a\0b"], "--model is 'a\\x00b', with a character that is not text"),
    ("--dataset_config \ud800", "--dataset_config is '\\ud800'"),
]

NUMBERS: list[Bad] = [
    ("--lr fast", "invalid float value: 'fast'"),
    ("--lr", "expected one argument"),
    ("--lr=", "invalid float value: ''"),
    ("--lr=1e-5 --lr=a", "invalid float value: 'a'"),
    ("--steps 2.5", "invalid int value"),
    ("--steps 1e3", "invalid int value: '1e3'"),
    ("--steps 1e400", "invalid int value: '1e400'"),
    ("--steps 0", "--steps is 0; it must be 1 or more"),
    ("--steps=-3", "--steps is -3; it must be 1 or more"),
    (f"--steps {HUGE}", f"--steps is {HUGE}; it must be 1000000000 or less."),
    ("--seed -1", "--seed is -1"),
    ("--seed 4294967296", "--seed is 4294967296; it must be 4294967295 or less."),
    ("--lr 0", "--lr is 0.0; it must be more than 0"),
    ("--lr nan", "--lr is nan"),
    ("--lr=-inf", "--lr is -inf; it must be more than 0"),
    ("--lr 1e400", "--lr is inf; it must be more than 0"),
    ("--lr 2", "--lr is 2.0; it must be 1 or less."),
    ("--weight_decay 1e300", "--weight_decay is 1e+300; it must be 1000000000 or less."),
    ("--max_norm 0", "--max_norm is 0.0; it must be more than 0"),
    ("--max_norm inf", "--max_norm is inf"),
    ("--kl_weight -1", "--kl_weight is -1.0; it must be 0 or more"),
    ("--kl_weight inf", "--kl_weight is inf"),
    ("--entropy_weight 1e308", "--entropy_weight is 1e+308; it must be 1000000000 or less."),
    ("--group_size 1", "--group_size is 1; it must be 2 or more"),
    ("--group-size 1", "--group_size is 1; it must be 2 or more"),
    (
        "--group_size 1000000",
        "is more than 1000000 sequences in one rollout; make one of them smaller.",
    ),
    (f"--rollouts_per_step {HUGE}", "it must be 1000000000 or less."),
    ("--temperature 0", "--temperature is 0.0; it must be 0.01 or more."),
    ("--temperature 1e-40", "--temperature is 1e-40; it must be 0.01 or more."),
    ("--temperature 1e30", "--temperature is 1e+30; it must be 100 or less."),
    ("--top_p 0", "--top_p is 0.0; it must be more than 0"),
    ("--top_p 1.5", "it is a share"),
    ("--top_entropy 1.5", "it is a share"),
    ("--clip_eps 0", "--clip_eps is 0.0; it must be more than 0"),
    ("--clip_eps_high nan", "--clip_eps_high is nan; it must be 0 or more"),
    ("--sampler_cap 0.5", "--sampler_cap is 0.5; it must be 1 or more"),
    ("--max_new_tokens 0", "--max_new_tokens is 0; it must be 1 or more"),
    (
        "--micro_batch_size banana",
        "--micro_batch_size is 'banana'; it must be a whole number or auto.",
    ),
    ("--micro_batch_size 0", "--micro_batch_size is 0; it must be 1 or more"),
    ("--micro_batch_size=", "--micro_batch_size is ''; it must be a whole number or auto."),
    ("--epochs_per_step 0", "--epochs_per_step is 0; it must be 1 or more"),
    ("--keep_checkpoints 0", "--keep_checkpoints is 0; it must be 1 or more"),
    ("--keep_best true --eval_interval 0", "--keep_best compares evaluations, and there are none"),
    ("--eval_interval -1", "--eval_interval is -1; it must be 0 or more"),
    ("--gradient_checkpointing maybe", "got maybe but expected one of yes/no, true/false"),
    ("--reward_weights a", "invalid float value: 'a'"),
    ("--reward_weights nan", "each must be a finite number"),
    ("--reward_weights 0", "--reward_weights are [0.0]; one must not be 0"),
    ("--reward_weights 1e39", "none above 1000000000"),
]

CONTRADICTIONS: list[Bad] = [
    ("--reward accuracy format", "--reward has 2 names and --reward_weights 1 numbers"),
    (
        "--reward accuracy accuracy --reward_weights 1 1",
        "have the same name; each must have its own.",
    ),
    ("--train_batch_size 5", "--train_batch_size 5 is larger than the 4 sequences of a rollout"),
    ("--surrogate sapo --clip_eps 0.3", "--surrogate sapo does not clip"),
    ("--objective grpo --clip_ratio_c 1.1", "it must be more than 1 + clip_eps_high = 1.2"),
    ("--objective dr_grpo --kl_estimator k2", "mean nothing without a KL"),
    (
        "--max_new_tokens 10000",
        "reads 512 tokens at the most; --max_prompt_tokens 128 and --max_new_tokens 10000",
    ),
    (
        "--dataset tiny/task/train.jsonl --eval_interval 1",
        "is one file, without held-out questions; give --eval_dataset",
    ),
    (
        "--config {d}/r/config.yaml --preset gsm8k",
        "was made from the preset tiny; leave out --preset gsm8k",
        a_run(),
    ),
    ("--config {d}/r/config.yaml --resume {d}/r", "leave out --config", a_run()),
    ("--resume {d}/r --preset gsm8k", "leave out --preset gsm8k", a_run()),
    ("--resume {d}/r --run_dir {d}/other", "--resume goes on in the folder", a_run()),
]

DATA = "--dataset {d}/x.jsonl"
DATASETS: list[Bad] = [
    ("--dataset nowhere.jsonl", "There is no file or folder nowhere.jsonl; give --dataset a file"),
    ("--dataset /nowhere/at/all", "There is no file or folder /nowhere/at/all"),
    ("--dataset ''", "--dataset is empty; give it a folder or a hub name."),
    ("--dataset ' '", "--dataset is ' ': a name of spaces only"),
    (f"--dataset {'x' * 300}", "longer than a file name can be"),
    ("--dataset ~nobody-of-that-name/x", "but there is no such user"),
    ("--dataset no/such-dataset", "Cannot load the train split of the dataset 'no/such-dataset' from the hub"),
    ("--eval_dataset nope.jsonl --eval_interval 1", "There is no file or folder nope.jsonl"),
    ("--dataset tiny/model", "must hold one train.jsonl, .parquet, .json or .csv; it holds none."),
    (DATA, "x.jsonl holds no questions", file("x.jsonl", "")),
    (DATA, "x.jsonl holds no questions", file("x.jsonl", "\n \r\n\n")),
    (DATA, "line 2: not valid JSON (Unterminated string", file("x.jsonl", ROW + ROW[:20])),
    (DATA, "line 1: not valid JSON (Expecting value); each line must be one whole object.", file("x.jsonl", "hello")),
    (DATA, "line 1: not valid JSON", file("x.jsonl", '{"question": "a",\n"answer": "#### 5"}\n')),
    (DATA, "line 1: not valid JSON", file("x.jsonl", "{'question': 'a', 'answer': '#### 5'}")),
    (DATA, "line 1: not valid JSON", file("x.jsonl", "version https://git-lfs.github.com/spec/v1\n")),
    (DATA, "line 1: not valid JSON (maximum recursion depth", file("x.jsonl", DEEP * 20)),
    (DATA, "line 1: not valid JSON (Exceeds the limit", file("x.jsonl", '{"n": ' + "9" * 5000 + "}")),
    (DATA, "cannot be read as UTF-8 text", file("x.jsonl", ROW.encode("utf-16"))),
    (DATA, "line 1: not valid JSON", file("x.jsonl", ROW.encode("utf-16-le"))),
    (DATA, "save it again, as UTF-8.", file("x.jsonl", ROW.replace("Tom", "Zoë").encode("latin-1"))),
    (DATA, "line 2: not valid JSON", file("x.jsonl", ROW.encode() + bytes(100))),
    (DATA, "line 1: a row must be an object", file("x.jsonl", '[{"question": "a", "answer": "#### 5"}]')),
    (DATA, "line 1: a row must be an object", file("x.jsonl", "null\n")),
    (DATA, "line 2: the column question holds half a character", file("x.jsonl", ROW + ROW.replace("Tom", "\\ud800"))),
    (DATA, "the column answer holds half a character", file("x.jsonl", ROW.replace("#### 5", "#### \\udfff"))),
    (DATA, "line 1: the column question is missing or empty, or is not text", file("x.jsonl", ROW.replace('"Tom has 5 apples."', "5"))),
    (DATA, "line 1: the column images would not be seen, since the model reads text alone", file("x.jsonl", ROW.replace("{", '{"images": ["a.png"], ', 1))),
    (DATA, "(the row has: Question, answer)", file("x.jsonl", ROW.replace("question", "Question"))),
    (DATA, "line 1: the column answer is missing or is not text", file("x.jsonl", ROW.replace('"5 #### 5"', "null"))),
    (DATA, "answer has no '#### ' line", file("x.jsonl", ROW.replace("####", "##"))),
    (DATA, "the final answer is empty", file("x.jsonl", ROW.replace("#### 5", "####"))),
    (DATA, "answer_only is {'x': 1}; it must be a text or a number.", file("x.jsonl", '{"question": "a", "answer_only": {"x": 1}}')),
    (DATA, "answer_only is nan", file("x.jsonl", '{"question": "a", "answer_only": NaN}')),
    (DATA, "answer_only is True", file("x.jsonl", '{"question": "a", "answer_only": true}')),
    (DATA, "Every prompt is longer than --max_prompt_tokens 128", file("x.jsonl", ROW.replace("Tom", "Tom " * 500))),
    ("--max_prompt_tokens 3", "Every prompt is longer than --max_prompt_tokens 3 (the shortest: "),
    ("--dataset {d}/x.xlsx", "is neither .jsonl, .parquet, .json nor .csv; convert it", file("x.xlsx", "question,answer\na,#### 5\n")),
    ("--dataset {d}", "it holds train.xlsx.", file("train.xlsx", "question,answer\na,#### 5\n")),
    ("--dataset {d}/x.csv", "x.csv, row 1: the column question is missing", file("x.csv", "problem,answer\na,#### 5\n")),
    ("--dataset {d}", "must hold one train.jsonl, .parquet, .json or .csv; it holds none.", file("test.jsonl", ROW)),
    ("--dataset {d}", "it holds train.jsonl, train.parquet.", files(file("train.jsonl", ROW), file("train.parquet", ""))),
    ("--dataset {d}", "train.jsonl cannot be read: Is a directory.", file("train.jsonl/x", "")),
    ("--dataset {d} --eval_interval 1", "must hold one test.jsonl, .parquet, .json or .csv", file("train.jsonl", ROW)),
    ("--dataset {d} --eval_interval 1", "test.jsonl holds no questions", files(file("train.jsonl", ROW), file("test.jsonl", ""))),
    (DATA, "There is no file or folder", lambda d: (d / "x.jsonl").symlink_to("nowhere")),
    ("--dataset {d}/x.parquet", "cannot be read as Parquet", parquet({"question": "a", "answer": "#### 5"}, cut=10)),
    ("--dataset {d}/x.parquet", "cannot be read as Parquet", file("x.parquet", "")),
    ("--dataset {d}/x.parquet", "cannot be read as Parquet", file("x.parquet", ROW)),
    ("--dataset {d}/x.parquet", "cannot be read as Parquet", latin_parquet),
    ("--dataset {d}/x.parquet", "row 1: the column question is missing", parquet({"prompt": "a", "answer": "#### 5"})),
    ("--dataset {d}/x.parquet", "row 2: the column question is missing", parquet({"question": "a", "answer": "#### 5"}, {"question": None})),
    ("--dataset {d}/x.parquet", "or is not text", parquet({"question": b"a", "answer": "#### 5"})),
]  # fmt: skip

M = "--model {d}/m"
MODELS: list[Bad] = [
    ("--model tiny/task", "Cannot load the tokenizer 'tiny/task' (there is no tokenizer in it)"),
    ("--model no/such-model", "Cannot load the tokenizer 'no/such-model'"),
    ("--model ''", "--model is empty; give it a folder or a hub name."),
    ("--model README.md", "Cannot load the tokenizer 'README.md'"),
    ("--model https://huggingface.co/a/b", "--model takes a hub name, or a Hugging Face folder"),
    (M, "Cannot load the tokenizer", lambda d: (d / "m").mkdir()),
    (M, "does not describe a LoRA adapter (KeyError: 'peft_type'); copy the folder again", bundled(adapter_config__json="{}")),
    (M, "holds an adapter (IA3), and only plain LoRA can be trained here; merge it", bundled("model.safetensors", "config.json", config={}, adapter_config__json='{"peft_type": "IA3", "base_model_name_or_path": "tiny/model", "r": 4, "lora_alpha": 8, "target_modules": []}')),
    (M, "has quantized weights, and only the few others would be trained", bundled(config={"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}})),
    (M, "config.json' is not a valid JSON file", bundled(config__json="{not json")),
    (M, "config.json' is not a valid JSON file", bundled(config__json=b"\xff\xfe\0")),
    (M, "Cannot load the tokenizer", bundled(config__json="[]")),
    (M, "Should have a `model_type` key", bundled("config.json", "model.safetensors", config={}, config__json="{}")),
    (M, "has model type `nope`", bundled(config={"model_type": "nope"})),
    (M, "contains custom code", bundled(config={"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}})),
    (M, "Field 'hidden_size' expected int", bundled(config={"hidden_size": "big"})),
    (M, "is not a multiple of the number of attention heads", bundled(config={"num_attention_heads": 3})),
    (M, "do not match its config.json: model.embed_tokens.weight is (121, 128) in the file and (10, 128)",
     bundled(config={"vocab_size": 10})),
    (M, "lacks 27 of the weights of a causal language model", bundled(config={"num_hidden_layers": 7})),
    (M, "reads 16 tokens at the most", bundled(config={"max_position_embeddings": 16})),
    (M, "KeyError: 'nope'", bundled(config={"hidden_act": "nope"})),
    (M, "no attribute 'float7'", bundled(config={"dtype": "float7"})),
    (M, "incomplete metadata, file not fully covered",
     bundled(model__safetensors=(TINY / "model.safetensors").read_bytes()[:-1000])),
    (M, "header too small", bundled(model__safetensors=b"")),
    (M, "no file named model.safetensors", bundled("model.safetensors")),
    (M, "has pickled weights only (pytorch_model.bin), and a pickle may run any code. If you trust it, convert", pickled),
    (M, "computes NaN: its weights are damaged", weights(lambda w: {k: v * torch.nan for k, v in w.items()})),
    (M, "of the weights of a causal language model", weights(lambda w: {"x": torch.zeros(2)})),
    (M, "Cannot load the tokenizer", bundled(tokenizer__json="{")),
    (M, "Cannot load the tokenizer", bundled(tokenizer__json="{}")),
    (M, "Cannot load the tokenizer", bundled(tokenizer_config__json="[]")),
    (M, "there is no tokenizer in it", bundled("tokenizer.json", "tokenizer_config.json", tokenizer_config__json="{}")),
    (M, "has no end-of-sequence token", bundled(tokenizer={"eos_token": None})),
    (M, "has 122 tokens, the model only 121: no match. Give the model its own", bundled(tokenizer={"eos_token": "<zz>"})),
    (M, "The chat template of the model cannot be used (unexpected", bundled(chat_template__jinja="{% for")),
    (M, "cannot be used ('x' is undefined); mend its chat_template.jinja", bundled(chat_template__jinja="{{ x.y.z }}")),
    (M, "cannot be used (unsupported operand", bundled(chat_template__jinja="{{ 1 + messages }}")),
    (M, "The chat template of the model drops the question: it makes '' of", bundled(chat_template__jinja="{{ '' }}")),
    (M, "is an encoder (BertForMaskedLM); choose a causal language model.", architecture("BertForMaskedLM", **BERT)),
    (M, "looks at the tokens that come after, as an encoder does",
     files(architecture("BertForMaskedLM", 0.5, **BERT), renamed("BertLMHeadModel"))),
    (M, "lacks 6 of the weights of a causal language model (cls.predictions.bias", architecture("BertModel", **BERT)),
    (M, "not that of a causal language model", architecture("DistilBertModel", **DISTIL)),
    (M, "is an encoder-decoder; choose a causal language model.", architecture("T5ForConditionalGeneration", **T5)),
    (M, "lm_head.weight, …); choose a model with its language head",
     architecture("LlamaForSequenceClassification", **BERT)),
]  # fmt: skip

C = "--config {d}/c.yaml"
CONFIGS: list[Bad] = [
    ("--config nowhere.yaml", "There is no config nowhere.yaml"),
    ("--config ''", "--config is empty; give it the config.yaml of a run, or leave it out."),
    (["--config", "a\0b"], "with a character that is not text"),
    ("--config {d}", "Is a directory"),
    ("--config tests/test_config.py", "is not"),
    (C, "is not a config: it must be a list of `name: value` lines", file("c.yaml", "")),
    (C, "is not a config", file("c.yaml", "- a")),
    (C, "is not a config", file("c.yaml", "lr=1")),
    (C, "Cannot read the config", file("c.yaml", b"\x89PNG\xff")),
    (C, "it must be a text file in UTF-8.", file("c.yaml", "lr: 1".encode("utf-16"))),
    (C, "is not valid YAML (line 1: ", file("c.yaml", "a: [")),
    (C, "is not valid YAML (line 2: found character '\\t'", file("c.yaml", "steps: 1\n\tlr: 1")),
    (C, "is not valid YAML", file("c.yaml", DEEP)),
    (C, "is not valid YAML (Exceeds the limit", file("c.yaml", "lr: 1" + "0" * 5000)),
    (C, "could not determine a constructor", file("c.yaml", "lr: !!python/object/apply:os.getcwd []")),
    (C, "'lrr'; did you mean lr? Mend the line, or remove it if another version wrote it.", file("c.yaml", "lrr: 1\r\n")),
    (C, "'quantum_weight'; did you mean", file("c.yaml", "preset: tiny\nquantum_weight: 1")),
    (C, "lr in", file("c.yaml", "lr: fast")),
    (C, "it must be of type float", file("c.yaml", "lr: 1" + "0" * 400)),
    (C, "steps in", file("c.yaml", "steps: 1e3")),
    (C, "is None; it must be of type str", file("c.yaml", "model:")),
    (C, "is 1; it must be of type bool", file("c.yaml", "mask_truncated: 1")),
    (C, "must be a list", file("c.yaml", "reward: accuracy")),
    (C, "--reward is empty", file("c.yaml", "reward: []\nreward_weights: []")),
    (C, "There is no preset 'tinyy'", file("c.yaml", "preset: tinyy")),
    (C, "--group_size is 1", file("c.yaml", "group_size: 1")),
    (C, "--lr is nan", file("c.yaml", "lr: .nan")),
    (C, "--system_prompt is '\\ud800'", file("c.yaml", 'system_prompt: "\\ud800"')),
]  # fmt: skip

F = "--reward {d}/f.py:f"
REWARDS: list[Bad] = [
    ("--reward acuracy", "There is no reward 'acuracy'; did you mean accuracy?"),
    ("--reward accuracy,format", "There is no reward 'accuracy,format'; did you mean accuracy?"),
    ("--reward", "expected at least one argument"),
    ("--reward mine.py", "names a file but no function; write mine.py:FUNCTION"),
    ("--reward mine.py:f", "There is no file mine.py"),
    (f"--reward {'x' * 300}.py:f", "longer than a file name can be"),
    ("--reward ~nobody-of-that-name/a.py:f", "but there is no such user"),
    ("--reward {d}:f", "write --reward FILE.py:FUNCTION"),
    ("--reward {d}/f.txt:f", "f.txt is not a Python file", file("f.txt", "def f(): pass")),
    (F, "cannot be run: SyntaxError", file("f.py", "def f(")),
    (F, "cannot be run: ModuleNotFoundError: No module named 'nothing_here'", file("f.py", "import nothing_here")),
    (F, "cannot be run: ValueError: no (f.py, line 1)", file("f.py", "raise ValueError('no')")),
    (F, "There is no function in", file("f.py", "f = 5")),
    (F, "did you mean ff?", file("f.py", "def ff(): pass")),
    (F, "The reward f does not take what a reward is given (got an unexpected keyword", file("f.py", "def f(x): pass")),
    (F, "does not take what a reward is given", file("f.py", "def f(prompts, completions): pass")),
    (F, "(missing a required argument: 'colour'); what it is given: prompts, completions", file("f.py", "def f(colour, **columns): pass")),
    (F, "that is TRL's trainer, which is not here; give it the default None", file("f.py", "def f(trainer_state, **columns): pass")),
    (F, "cannot be run: SystemExit: 0 (f.py, line 1)", file("f.py", "import sys; sys.exit(0)")),
]  # fmt: skip

R = "--resume {d}/r --steps=2"
RUNS: list[Bad] = [
    ("--run_dir {d}/r", "is not empty; choose another --run_dir", a_run()),
    ("--run_dir .", "is not empty; choose another --run_dir"),
    ("--run_dir {d}/x", "Cannot write to the run folder", file("x", "")),
    ("--run_dir {d}/x/y", "Not a directory; choose another --run_dir", file("x", "")),
    ("--run_dir /dev/null/x", "Not a directory; choose another --run_dir"),
    ("--run_dir /proc/x", "Cannot write to the run folder /proc/x"),
    (f"--run_dir {{d}}/{'x' * 300}", "longer than a file name can be"),
    (["--run_dir", "\0"], "with a character that is not text"),
    ("--run_dir \udcff", "with a character that is not text"),
    ("--run_dir ' '", "--run_dir is ' ': a name of spaces only"),
    ("--run_dir ~nobody-of-that-name/x", "but there is no such user"),
    ("--resume", "Say which run to continue: --resume runs/NAME."),
    ("--resume nowhere", "There is no run to resume in nowhere"),
    (f"--resume {'x' * 300}", "longer than a file name can be"),
    ("--resume tiny/model", "There is no run to resume in tiny/model: it has no config.yaml."),
    ("--resume {d}/x", "There is no run to resume", file("x", "")),
    ("--resume {d}/r/checkpoint-1", "is a checkpoint; --resume takes the folder of its run", a_run()),
    ("--resume {d}/r", "already at step 1 of 1; raise --steps to go on", a_run()),
    ("--resume {d}/r --steps=0", "--steps is 0", a_run()),
    (R, "checkpoint-1 is damaged: trainer_state.pt is missing; remove it (rm -r", a_run("checkpoint-1/trainer_state.pt")),
    (R, "trainer_state.pt is not what was written", a_run(checkpoint_1_trainer_state__pt="x")),
    (R, "model.safetensors is not what was written", a_run(checkpoint_1_model__safetensors="x")),
    (R, "config.yaml is not a config", a_run(config__yaml="")),
    (R, "There is no option", a_run(extra="option_of_next_year: 1\n")),
    (R + " --model no/such-model", "trains tiny/model; to begin with another model", a_run()),
    (R, "metrics.jsonl, line 2 is not what was written; mend or remove that line", a_run(metrics__jsonl='{"step": 0}\nx\n')),
    (R, "metrics.jsonl, line 1 is not what was written", a_run(metrics__jsonl="[]\n")),
    (R, "metrics.jsonl, line 1 is not what was written", a_run(metrics__jsonl=b"\xff\n")),
    (R, "SHA256SUMS cannot be read", a_run("checkpoint-1/SHA256SUMS")),
]  # fmt: skip

OTHERS: list[Bad] = [
    ("--model nowhere", "Cannot load the tokenizer 'nowhere'", None, "evaluate"),
    ("--model {d}/r", "has no checkpoint; a model is in checkpoint-STEP", a_run("checkpoint-1"), "evaluate"),
    ("--model {d}/r", "config.yaml is not what was written", a_run(checkpoint_1_config__yaml="a: ["), "evaluate"),
    ("--resume {d}/r", "--resume is train.py's; to look at a run say --model", a_run(), "evaluate"),
    (M, "no match", bundled(tokenizer={"eos_token": "<zz>"}), "evaluate"),
    ("--eval_question=3", "did you mean --eval_questions?", None, "evaluate"),
    ("--question x", "There is no flag '--question'", None, "evaluate"),
    ("--dataset tiny/task/test.jsonl", "is one file, without held-out questions", None, "evaluate"),
    ("--model nowhere --question x", "Cannot load", None, "run"),
    ("--question ''", "--question is empty; write one", None, "run"),
    ("--question '" + "Tom " * 500 + "'", "longer than --max_prompt_tokens 128", None, "run"),
    ("--question \udcff", "--question is '\\udcff', with a character that is not text", None, "run"),
    ("--question x --base no/such-model", "Cannot load the tokenizer 'no/such-model'", None, "run"),
    ("--baes x", "There is no flag '--baes'; did you mean --base?", None, "run"),
    ("--lr=-1", "--lr is -1", None, "sft"),
    (DATA, "the column question is missing", file("x.jsonl", '{"problem": "a"}'), "check_data"),
    ("--resume {d}/r", "sft.py cannot resume", a_run(), "sft"),
    ("", "Say where the merged model is to be written: --output FOLDER.", None, "merge"),
    ("--output {d}/r", "is there already; choose another --output.", a_run(), "merge"),
    ("--output {d}/new", "tiny/model holds no adapter, so there is nothing to merge.", None, "merge"),
    ("--output {d}/new --model {d}/nothere", "/nothere; give --model", None, "merge"),
    ("--model {d}/nothere", "/nothere; give --model", None, "evaluate"),
    ("--model {d}/r", "r is the folder of a run; its models are in checkpoint-STEP", a_run()),
    ("--eval_interval 1 --eval_dataset {d}/nothere", "/nothere; give --eval_dataset"),
    ("--reward model:{d}/nothere", "/nothere; give --reward model:"),
    ("--adapter_targets q_proj", "--adapter_targets names layers for adapters, and there are none"),
    (
        "--reward {d}/x.py:steps",
        "x.py: 'steps'; choose one of: mine.",
        file("x.py", "from pathlib import Path\n\n\ndef mine(prompts, completions, **columns):\n    return []\n"),
    ),
    (
        "--dataset {d}/x.csv",
        "x.csv has ; between its cells; save it with commas.",
        file("x.csv", "question;answer\nTom has 5.;#### 5\n"),
    ),
    (
        "--resume {d}/r",
        "r holds a model and no run that could go on; begin a run with it: --model /",
        a_run("checkpoint-1", model__safetensors="x"),
    ),
    ("--run_dir {d}/r", "is not empty", a_run(), "sft"),
    (M, "no match", bundled(tokenizer={"eos_token": "<zz>"}), "sft"),
    (DATA, "The completion of 'a' is empty or is not text", file("x.jsonl", '{"question": "a", "answer": "#### 5", "completion": 5}'), "sft"),
]  # fmt: skip

TABLE = NAMES + NUMBERS + CONTRADICTIONS + DATASETS + MODELS + CONFIGS + REWARDS + RUNS + OTHERS


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below, byte for byte; the lock of a run is empty, and whoever looks takes it."""
    found = {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }
    return {name: content for name, content in found.items() if not name.endswith(".lock")}


def visible() -> set[str]:
    """What lies in the working folder, where a run without a --run_dir would go."""
    return {name for name in os.listdir() if not name.startswith(".")}


def command_line(row: Bad, folder: Path) -> tuple[list[str], str, str]:
    """The arguments of a row, its words and its command; makes its input."""
    flags, words, make, command = (*row, *(None, "train")[len(row) - 2 :])
    if make:
        make(folder)
    flags = [
        f.replace("{d}", str(folder))
        for f in (shlex.split(flags) if isinstance(flags, str) else flags)
    ]
    given = {f.split("=")[0].replace("-", "_").strip("_") for f in flags}
    of_a_run = command == "evaluate" and "--model {d}/r" in row[0]  # which has settings of its own
    start = (
        []
        if of_a_run or given & {"preset", "config", "resume"} and command == "train"
        else ["--preset=tiny"]
    )
    start += SMALL if start else ["--device=cpu"]
    # Few questions, unless the dataset is what the row is about: those of the preset take long to read.
    start += [f"--dataset={FEW[0]}"] if "--preset=tiny" in start and "dataset" not in given else []
    start += (
        []
        if given & {"run_dir", "resume"} and "other" not in given
        else [f"--run_dir={folder}/run"]
    )
    return [*start, *flags], words, command


def test_the_table_is_large_and_has_no_row_twice():
    assert len(TABLE) >= 200 and len({(str(row[0]), row[1], str(row[3:])) for row in TABLE}) > 190


@pytest.mark.parametrize(
    "row", TABLE, ids=lambda row: f"{row[3] if len(row) > 3 else ''} {row[0]!a:.60} {row[1]:.40}"
)
def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, capfd, row):
    folder = tmp_path / "d"
    folder.mkdir()
    argv, words, command = command_line(row, folder)
    before, here = contents(folder), visible()
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        COMMANDS[command](argv)
    out, error = capfd.readouterr()
    assert caught.value.code == 2, error
    assert words in error and error.startswith("error: ") and error.count("\n") == 1, error
    assert "Traceback" not in out + error
    assert contents(folder) == before and visible() == here


def test_a_run_that_another_process_has(tmp_path, capsys):
    a_run()(tmp_path)
    with FileLock(tmp_path / "r" / ".lock"), pytest.raises(SystemExit) as caught:
        train.main(["--resume", str(tmp_path / "r"), "--steps=2"])
    assert (
        caught.value.code == 2
        and "is in use by another process; wait for it" in capsys.readouterr().err
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path, capsys):
    tmp_path.chmod(0o555)
    with pytest.raises(SystemExit) as caught:
        train.main(["--preset=tiny", *SMALL, f"--run_dir={tmp_path}/run"])
    assert (
        caught.value.code == 2
        and "Permission denied; choose another --run_dir" in capsys.readouterr().err
    )


def test_gsm8k_without_a_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for flags, words in [
        ([], "--preset tiny runs on any machine"),
        (["--preset=tiny", "--device=cuda"], "or choose cpu"),
    ]:
        with pytest.raises(SystemExit) as caught:
            train.main([f"--run_dir={tmp_path}/run", *flags])
        assert caught.value.code == 2 and words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_as_a_process_of_its_own(tmp_path):
    """The same through the shell: arguments as bytes, a pipe for stderr, an interpreter that ends."""
    argv = ["train.py", "--preset=tiny", "--device=cpu", f"--run_dir={tmp_path}/run"]
    done = subprocess.run(
        [sys.executable, *argv, b"--dataset=\xff"], cwd=ROOT, capture_output=True, timeout=120
    )
    assert done.returncode == 2 and b"with a character that is not text" in done.stderr
    assert done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") == 1
    assert not list(tmp_path.iterdir())


def no_space() -> None:
    """In the child: a file of more than 1000 bytes cannot be written, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


def test_no_room_for_the_config(tmp_path):
    argv = ["--preset=tiny", *SMALL, f"--dataset={FEW[0]}", f"--run_dir={tmp_path}/full"]
    code, _, error = forked(lambda: (no_space(), train.main(argv)))
    assert code == 2 and "Cannot write to the run folder" in error, error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not list(tmp_path.rglob("*.*")), "no file"


# What looks like a mistake and works


@pytest.mark.parametrize(
    "make",
    [
        bundled("chat_template.jinja"),
        bundled(tokenizer={"pad_token": None}, config={"pad_token_id": None}),
        bundled(tokenizer={"pad_token": "<|end|>"}, config={"pad_token_id": 2}),
        bundled("generation_config.json"),
    ],
    ids=["no chat template", "no pad token", "pad = eos", "no generation config"],
)
def test_models_as_they_come(tmp_path, make, capsys):
    """Without a chat template the prompt is plain paragraphs; without a pad token, lengths make the masks anyway."""
    make(tmp_path)
    own = [f"--model={tmp_path}/m", f"--dataset={FEW[0]}", "--kl_weight=0.1"]
    train.main(["--preset=tiny", *SMALL, *own, f"--run_dir={tmp_path}/run"])
    assert "done with step 1" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoint-1" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + ROW.encode(),
        ROW.replace("\n", "\r\n").encode(),
        ROW.replace("Tom", "T\\u0000m\\u2028").encode(),
    ],
    ids=["BOM", "Windows line ends", "NUL and odd line ends in a question"],
)
def test_files_as_they_come(tmp_path, content):
    (tmp_path / "x.jsonl").write_bytes(content)
    train.main(
        ["--preset=tiny", *SMALL, f"--dataset={tmp_path}/x.jsonl", f"--run_dir={tmp_path}/run"]
    )
    assert (tmp_path / "run" / "checkpoint-1").is_dir()


def test_a_run_of_an_older_version_goes_on(tmp_path, capsys):
    """An option that its config.yaml does not have is at its default."""
    a_run()(tmp_path)
    config = tmp_path / "r" / "config.yaml"
    config.write_text(
        "".join(line for line in config.open() if not line.startswith(("keep_", "top_entropy")))
    )
    train.main(["--resume", str(tmp_path / "r"), "--steps=2"])
    assert (
        "done with step 2" in capsys.readouterr().out
        and "keep_checkpoints: 3" in config.read_text()
    )


def test_the_last_of_a_flag_given_twice_counts(tmp_path):
    own = [f"--run_dir={tmp_path}/run", f"--dataset={FEW[0]}"]
    train.main(["--preset=tiny", *SMALL, *own, "--lr=1e-5", "--lr=2e-5"])
    assert "lr: 2.0e-05" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_home_folder_in_a_flag(tmp_path, monkeypatch):
    """The shell does not expand `--model=~/m`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    bundled()(tmp_path)
    own = ["--model=~/m", f"--dataset={FEW[0]}", "--run_dir=~/run"]
    train.main(["--preset=tiny", *SMALL, *own])
    train.main(["--resume=~/run", "--steps=2"])
    train.main(["--config=~/run/config.yaml", "--run_dir=~/again"])
    assert (tmp_path / "run" / "checkpoint-2").is_dir() and (
        tmp_path / "again/checkpoint-1"
    ).is_dir()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_a_console_without_our_letters(tmp_path, monkeypatch, encoding):
    """`32 questions × 8 completions`, and whatever a model says."""
    console = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", console)
    train.main(["--preset=tiny", *SMALL, f"--dataset={FEW[0]}", f"--run_dir={tmp_path}/run"])
    run.main([f"--model={tmp_path}/run", "--device=cpu", "--question=Zoë has 3 × 4 apples 🍎."])
    console.flush()
    said = console.buffer.getvalue().decode(encoding)
    assert "questions" in said and "done with step 1" in said and "apples ?" in said


def test_a_run_in_a_thread_and_another_after_it(tmp_path):
    """As in a notebook: no signals there, and another precision in the same process."""
    same = ["--preset=tiny", *SMALL, f"--dataset={FEW[0]}"]
    thread = threading.Thread(target=train.main, args=[[*same, f"--run_dir={tmp_path}/a"]])
    thread.start()
    thread.join()
    train.main([*same, f"--run_dir={tmp_path}/b", "--precision=bf16"])
    assert all((tmp_path / name / "checkpoint-1").is_dir() for name in "ab")


def test_printed_commands_can_be_copied(tmp_path, capsys):
    """A space in a name: without quotes `rm -r /my runs/…` would remove `/my`."""
    folder = tmp_path / "my runs"
    train.main(["--preset=tiny", *SMALL, f"--dataset={FEW[0]}", f"--run_dir={folder}"])
    said = capsys.readouterr().out
    assert f"python train.py --resume '{folder}' --steps 2" in said
    (folder / "checkpoint-1" / "model.safetensors").write_text("x")
    with pytest.raises(SystemExit):
        train.main([f"--resume={folder}", "--steps=2"])
    assert f"(rm -r '{folder}/checkpoint-1')" in capsys.readouterr().err


def test_sums_of_another_program_are_not_ours(tmp_path, capsys):
    """A healthy model with a SHA256SUMS in another format; and a damaged copy of a checkpoint, which is not to be removed."""
    bundled()(tmp_path)
    (tmp_path / "m" / "SHA256SUMS").write_text("SHA256 (model.safetensors) = 0123\n")
    own = [f"--model={tmp_path}/m", f"--dataset={FEW[0]}"]
    train.main(["--preset=tiny", *SMALL, *own, f"--run_dir={tmp_path}/run"])
    shutil.copytree(tmp_path / "run" / "checkpoint-1", tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").write_text("x")
    with pytest.raises(SystemExit):
        evaluate.main([f"--model={tmp_path}/copy"])
    error = capsys.readouterr().err
    assert "is damaged" in error and "rm -r" not in error and "copy it again" in error
