"""The whole job with every model type of transformers that can be built small.

    python benchmarks/families.py                        then results/families.md; ten minutes
    python benchmarks/families.py --types gemma2 mamba   only these, into the same table

Each causal language model type gets a config made small by rules (`shrunken`), random weights far
from their usual start, so that logits differ, and the bundled tokenizer. Then, in a process of its
own: train.py from its command line with several optimizer steps for each rollout, a reference and a
checkpoint after each step; the same again from the first checkpoint on, equal bit for bit; what was
sampled, and log-probabilities in both ways, against a plain forward pass of each sequence alone by
the model as transformers loads it; greedy completions against a loop without a cache; and a step in
bf16 arithmetic with gradient checkpointing, as the preset for GPUs makes it.
tests/test_families.py does the same with the families that people use.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for tests/test_families.py

from common import (
    RESULTS,
    machine,
    metrics_of,
    positive,
    read_jsonl,
    table,
    versions,
    write_jsonl,
    write_lines,
)

import train
from loss import sequences_log_probs, token_log_probs
from replay_buffer import Experience, pad_batch
from rollout import complete
from support.command_line import Parser
from support.errors import check_choice, command
from support.generation import Sampling, with_seeds
from support.model import load_model, load_tokenizer
from support.shared_prompts import share_prompts, shared_log_probs

CLOSE = 1e-4  # of log-probabilities that should be the same
TOLERANCE = 0.05  # what support/preflight.py lets through
OUTCOMES = {
    "fast": "passed, the fast way: prompts shared, the head in pieces",
    "plain": "passed, the plain way",
    "apart": "passed, but the model's own forward with a cache and without one differ, "
    f"by more than {CLOSE}",
    "refused": "refused in one sentence",
    "not built": "transformers, or our shrinking, could not build it small",
    "FAULT": "a traceback, wrong numbers, or no end",
}
LARGEST = 10_000_000  # parameters; what is still larger has not been shrunken
QUESTIONS = [
    "Tom has 25 apples.",
    "Zoe has 7 books. Zoe gives 3 to Max.",
    "Mary has 4 eggs.",
    "Sam doubles 9.",
]
REWARD = """def even(prompts, completions, completion_ids, **columns):
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]
"""
FLAGS = (
    "--preset=tiny --device=cpu --rollouts_per_step=2 --group_size=3 --max_new_tokens=6 "
    "--max_prompt_tokens=64 --train_batch_size=3 --micro_batch_size=2 --epochs_per_step=2 "
    "--kl_weight=0.1 --temperature=0.8 --lr=1e-3 --eval_interval=0 --checkpoint_interval=1 "
    "--log_completions=1"
)

# ---------------------------------------------------------------------------------- small, by rules

# The first pattern that a number's name matches says its new value.
SIZES = {
    r"vocab_size.*|.*_vocab_size": 121, r"pad_token_id": 1, r"eos_token_id": 2, r"bos_token_id": 2,
    # 0: left out, since the class derives it
    r"qk_head_dim|chunk_size_feed_forward|num_kv_shared_layers": 0,
    r"index_topk": 64,  # as in use, more than there are tokens: few random ones are hard to rank
    r"num_layers_per.*|.*first_k_dense.*|num_dense_layers|n_groups?|.*period|.*stride|"
    r"(num_|n_)?(topk|expert)_groups?|n_shared_experts": 1,
    r".*hidden_layers|n_layers?|num_layers|(en|de)coder_layers|.*depth": 2,
    r".*experts_per.*|.*top_?k(_experts)?|moe_k": 2, r".*(experts|expert_count|expert_num)": 4,
    r"mamba_.*_?heads|mamba_heads": 8, r"mamba_d_ssm": 64,
    r".*(head_dim|head_size|d_head|d_kv)|kv_channels|.*rope_dim|rotary_dim|dim_head": 8,
    r".*(key_value|kv)_(n_)?heads?|n_kv": 2, r".*n?_?heads?|.*num_heads": 4,
    r".*rank": 16, r".*(state|conv)_?(size|dim)": 8,
    r"hidden_size.*|d_model|n_embd|.*embed(ding)?s?_?(dim|size)|dim|emb_dim|.*hidden_size|"
    r".*_width": 32,
    r".*(intermediate|ffn|inner|mlp|feed_forward).*|dim_ff": 48,
    r".*(position|n_ctx|seq_len|max_len).*": 256, r".*(window|chunk).*": 8,
    r".*image_size": 28, r".*patch_size": 14,
}  # fmt: skip
CONV = {"layer_types": ["conv", "full_attention"]}
MAMBA = {"layer_types": ["linear_attention", "full_attention"]}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
ZAMBA = {
    "layers_block_type": ["linear_attention", "hybrid"],
    "attention_hidden_size": 64,
    "attention_head_dim": 16,
}
# What the class leaves open, or where two sizes depend on each other.
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]}, "granitemoehybrid": MAMBA, "lfm2": CONV, "lfm2_moe": CONV,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "mamba2": {"num_heads": 8}, "deepseek_v2": EXPERTS, "dots1": EXPERTS,
    "hunyuan_v1_dense": {"head_dim": 8}, "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8}, "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "hrm_text": {"num_hidden_layers": 8}, "recurrent_gemma": {"num_hidden_layers": 3},
    "zaya": {"num_experts_per_tok": 1}, "gemma3n_text": {"num_kv_shared_layers": 0} | SLIDING,
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64,
        "indexer_compress_ratio": 1, "split_ngram_parts": 2, "ngram_vocab_size_base": 100,
    },
    "cohere_compass_text": {
        "rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), ROPE)
    },
    "zamba": ZAMBA | {"n_mamba_heads": 2},
    "zamba2": ZAMBA | {"mamba_headdim": 8, "n_mamba_heads": 8},
    "reformer": {
        "is_decoder": True, "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 16]
    },
}  # fmt: skip


def shrunken(default: PreTrainedConfig, given: dict[str, Any]) -> PreTrainedConfig:
    """A small config of the same class: sizes by their names, lists over layers cut to two of them.

    The configs inside it likewise. `given` is put in the place of what the rules say.
    """
    old, small = vars(default), {}
    layers = {v for k, v in old.items() if re.fullmatch(r".*hidden_layers|n_layers?|num_layers", k)}
    for name, value in old.items():
        if isinstance(value, PreTrainedConfig):
            small[name] = shrunken(value, given.get(name, {})).to_dict()
        elif type(value) is int:
            size = next((new for pattern, new in SIZES.items() if re.fullmatch(pattern, name)), 0)
            small |= {name: size} if size else {}
        elif isinstance(value, list) and len(value) in layers:  # the first two kinds of layers
            small[name] = (list({str(v): v for v in value}.values()) * 2)[:2]
    heads = [v for k, v in old.items() if re.fullmatch(r"num_attention_heads|n_heads?", k)]
    for name in {"num_key_value_heads", "num_kv_heads"} & old.keys():
        if old[name] in heads[:1]:  # no grouped queries
            small[name] = 4
    return type(default)(**(small | given))


@torch.no_grad()
def build(kind: str) -> nn.Module:
    """A small model with random weights: biases and scales not 0 and 1, and logits that differ."""
    config = shrunken(CONFIG_MAPPING[kind](), SPECIAL.get(kind, {}))
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"still {size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config).eval()
    for p in network.parameters():
        p += 0.2 * torch.randn_like(p)
    return network


def make_folder(network: nn.Module, work: Path) -> Path:
    """The model's folder, with the bundled tokenizer; beside it questions, and a reward to earn."""
    for part in (network, load_tokenizer("tiny/model")):
        part.save_pretrained(work / "model")
    rows = (json.dumps({"question": q, "answer": "#### 1"}) + "\n" for q in QUESTIONS)
    (work / "questions.jsonl").write_text("".join(rows), encoding="utf-8")
    (work / "even.py").write_text(REWARD, encoding="utf-8")
    return work / "model"


# ------------------------------------------------------------------------------------ the whole job


def whole_job(work: Path, bf16: bool = True) -> tuple[str, float]:
    """All that a user does with the model in `work`; AssertionError for wrong numbers.

    Returns:
        the way it went, and the largest gap between two log-probabilities that should be the same.
    """
    run(work, "whole", "--steps=2")
    check_update(work)
    check_resume(work)
    way, gap = check_numbers(work / "model")
    if bf16:
        again = AutoModelForCausalLM.from_pretrained(work / "model").supports_gradient_checkpointing
        run(work, "bf16", "--steps=1", "--precision=bf16", f"--gradient_checkpointing={again}")
    return way, gap


def run(work: Path, name: str, *flags: str) -> None:
    """train.main with these flags, in this process, which begins anew for accelerate."""
    own = [f"--model={work}/model", f"--dataset={work}/questions.jsonl", f"--run_dir={work / name}"]
    AcceleratorState._reset_state(reset_partial_state=True)
    train.main([*FLAGS.split(), *own, f"--reward={work}/even.py:even", *flags])


def check_update(work: Path) -> None:
    """Rewards that differ, finite losses, and weights that have moved."""
    rows = metrics_of(work / "whole")
    assert len(rows) == 2 and any(row["train/grad_norm"] > 0 for row in rows), "no gradient"
    skipped = any(row["train/skipped_steps"] for row in rows)
    assert not skipped, "a loss or a gradient that is not finite"
    before, after = weights(work / "model"), weights(work / "whole/checkpoint-2")
    shared = before.keys() & after.keys()
    assert any((before[k] != after[k]).any() for k in shared), "no weight has moved"
    assert all(after[k].isfinite().all() for k in shared), "weights that are not finite"


def check_resume(work: Path) -> None:
    """As if the run had been killed after its first checkpoint: the same numbers and weights."""
    shutil.copytree(work / "whole", work / "killed")
    shutil.rmtree(work / "killed" / "checkpoint-2")
    AcceleratorState._reset_state(reset_partial_state=True)
    train.main([f"--resume={work / 'killed'}"])
    one, other = (metrics_of(work / name) for name in ("whole", "killed"))
    differ = set(one[-1].items()) ^ set(other[-1].items())
    assert one == other, f"resumed with other numbers: {differ}"
    one, other = (weights(work / name / "checkpoint-2") for name in ("whole", "killed"))
    same = one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert same, "resumed to other weights"


@torch.no_grad()
def check_numbers(folder: Path) -> tuple[str, float]:
    """What the sampler and the trainer say of tokens, and greedy completions, against `model(...)`.

    Returns as `whole_job`.
    """
    tokenizer, model = load_tokenizer(str(folder)), load_model(str(folder), "fp32")
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts = [tokenizer(question)["input_ids"] for question in QUESTIONS for _ in range(2)]
    torch.manual_seed(0)
    sampled = complete(model, tokenizer, with_seeds(prompts), Sampling(8, 0.8, batch_size=6))
    rows = [(prompt, c.ids) for prompt, c in zip(prompts, sampled, strict=True)]
    expected = torch.cat([plain_log_probs(plain, *row, 0.8) for row in rows])
    drawn = torch.tensor([value for c in sampled for value in c.log_probs])
    gaps = [largest_gap("the sampler's log-probabilities", drawn, expected)]
    e = pad_batch([Experience.of(*row) for row in rows])
    arguments = e.sequences, e.attention_mask, e.num_actions, 0.8
    ways = sequences_log_probs, partial(shared_log_probs, token_log_probs=token_log_probs)
    for way, log_probs in zip(("plain", "fast"), ways, strict=True):
        if way == "fast" and not share_prompts(model, "it", 72, *ways):
            return "plain", max(gaps)
        found = log_probs(model, *arguments)[0][e.action_mask]
        gaps.append(largest_gap(f"log-probabilities, the {way} way,", found, expected))
        greedy = complete(model, tokenizer, with_seeds(prompts), Sampling(6, 0.0))
        gaps += [check_greedy(plain, p, c.ids) for p, c in zip(prompts, greedy, strict=True)]
    return "fast", max(gaps)


def plain_log_probs(
    model: nn.Module, prompt: list[int], ids: list[int], temperature: float
) -> Tensor:
    """Of one sequence alone, without padding or cache, the shift written out."""
    logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return (logits.float() / temperature).log_softmax(-1)[torch.arange(len(ids)), ids]


def check_greedy(model: nn.Module, prompt: list[int], ids: list[int]) -> float:
    """Each token is the most likely one, by a forward pass of what is before it, and of that alone.

    Returns by how much another one was better, since two can be as good; AssertionError if by too
    much.
    """
    worst = 0.0
    for t, token in enumerate(ids):
        logits = model(input_ids=torch.tensor([prompt + ids[:t]])).logits[0, -1]
        worst = max(worst, float(logits.max() - logits[token]))
        assert worst < TOLERANCE, f"greedy token {t} is {token}, not {int(logits.argmax())}"
    return worst


def largest_gap(what: str, found: Tensor, expected: Tensor) -> float:
    """Between log-probabilities of the same tokens; AssertionError if they differ."""
    gap = float((found - expected).abs().max())
    assert gap < TOLERANCE, f"{what} are off by {gap:.2g}"
    return gap


def weights(folder: Path) -> dict[str, Tensor]:
    """The tensors in a model's folder."""
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


# ---------------------------------------------------------------------------- one type, one process


def outcome(kind: str, seconds: int) -> dict:
    """What became of one type, in a process of its own; one that hangs or crashes is a FAULT."""
    start, (answer, pipe) = time.perf_counter(), multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=send_outcome, args=(kind, pipe), daemon=True)
    child.start()
    pipe.close()
    found = {"outcome": "FAULT", "why": f"no end in {seconds} s"}
    try:
        if answer.poll(seconds):
            found = answer.recv()
    except EOFError:
        child.join(5)
        found["why"] = f"the process died, exit code {child.exitcode}"
    child.kill()
    child.join()
    return {"type": kind, **found, "seconds": round(time.perf_counter() - start, 1)}


def send_outcome(kind: str, pipe: Connection) -> None:
    """Build one type, do the whole job, and send {"outcome", "why", ...}."""
    with (
        tempfile.TemporaryDirectory() as work,
        contextlib.redirect_stdout(io.StringIO()) as said,
        contextlib.redirect_stderr(said),
    ):
        pipe.send(attempt(kind, Path(work), said))


def attempt(kind: str, work: Path, said: io.StringIO) -> dict:
    """What `send_outcome` sends; `said` is what is printed meanwhile."""
    try:
        network = build(kind)
        network(input_ids=torch.tensor([[5, 6, 7]]))  # or its sizes do not fit together
        make_folder(network, work)
    except Exception as error:  # a config may raise anything; what it needs is not known here
        return {"outcome": "not built", "why": short(error, work)}
    try:
        way, gap = whole_job(work)
    except SystemExit:
        sentence = said.getvalue().rpartition("error: ")[2].strip()
        return {"outcome": "refused", "why": sentence.replace(str(work), "…")}
    except Exception as error:
        trace = "".join(traceback.format_exception(error))
        return {"outcome": "FAULT", "why": short(error, work), "trace": trace}
    why = re.findall(r"\((.*)\): slower, the numbers are the same", said.getvalue())
    way = way if gap < CLOSE else "apart"
    return {"outcome": way, "gap": f"{gap:.0e}", "why": why[0] if why else ""}


def short(error: Exception, work: Path) -> str:
    """An exception in a line, without the places of folders."""
    text = " ".join(str(error).replace(str(work), "…").split())
    text = re.sub(r"(/[\w.-]+){2,}/", "…/", text)
    return f"{type(error).__name__}: {text[:160]}"


def report(rows: list[dict], out: Path) -> None:
    """families.md: how many of each outcome, then every type; families.jsonl: the same rows."""
    counts = Counter(row["outcome"] for row in rows)
    lines = [
        f"`python benchmarks/families.py` on {machine()}, one thread each; {versions()}.",
        "",
        f"{len(rows)} of the {len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)} causal language model types "
        "of transformers, each with a tiny config and random weights: run, checkpoint and resume "
        "bit for bit, greedy completions, a step in bf16, and the gap between the "
        "log-probabilities of sampler, trainer and a plain forward pass.",
        "",
        *table(["outcome", "types", "meaning"], [[k, counts[k], v] for k, v in OUTCOMES.items()]),
        "",
        *table(["type", "outcome", "largest gap", "seconds", "why"], map(cells, rows)),
    ]
    write_lines(out / "families.md", lines)
    write_jsonl(out / "families.jsonl", rows)


def cells(row: dict) -> list[str]:
    """A row of the table."""
    values = (row.get(name, "") for name in ("type", "outcome", "gap", "seconds", "why"))
    return [str(value).replace("|", "\\|") for value in values]


@command
def main(argv: list[str]) -> None:
    """Every type; the table is written anew after each."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--types", nargs="+", metavar="TYPE", help="their rows are made anew; else all are")
    flag("--seconds", type=positive, default=90, help="the most that one type may take")
    flag("--jobs", type=positive, default=1, help="types at a time, each on one thread")
    flag("--out", type=Path, default=RESULTS)
    flag("--traces", action="store_true", help="print the traceback of a FAULT")
    args = parser.parse_args(argv)
    known = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    kinds = [check_choice(k, known, "causal language model type") for k in args.types or known]
    earlier = read_jsonl(args.out / "families.jsonl") if args.types else []
    rows = {row["type"]: row for row in earlier}
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with ThreadPoolExecutor(args.jobs) as pool:
        for row in pool.map(partial(outcome, seconds=args.seconds), kinds):
            trace = row.pop("trace", "")
            rows[row["type"]] = row
            report([rows[k] for k in known if k in rows], args.out)
            name, gap, seconds = row["type"], row.get("gap", ""), row["seconds"]
            print(
                f"{name:28} {row['outcome']:10} {gap:6} {seconds:5.1f} s  {row['why']}", flush=True
            )
            if args.traces and trace:
                print(trace, flush=True)


if __name__ == "__main__":
    main()
