"""Does verl read what to_verl.py writes, and compute with it what train.py computes?

    python benchmarks/verl_handover.py --install    in an environment with verl 0.9.1
    python benchmarks/verl_handover.py              in an interpreter that has verl

verl is needed here and nowhere else in the project; no GPU and no inference engine. Exit code 1 if
one of these is not so. Results: results/verl_handover.md. What runs is verl's own code:

- `RLHFDataset` reads the Parquet files, and the builder of its agent loop makes the same prompt ids
  of each row as ours, for the bundled task without and with a system prompt;
- Hydra composes the flags that run.sh gives (bash expands them, to a stand-in for python3), and
  `validate_config` accepts them: every method that is handed over, FSDP and Megatron, vLLM and
  SGLang, adapters, precisions, 64 GPUs;
- its reward manager gives the rewards of `reward.score` on 100 completions;
- loss and gradient of each method, in float64, from the composed settings: `apply_kl_penalty`,
  `compute_rollout_correction_and_add_to_batch`, `compute_advantage`, the policy loss, `kl_penalty`
  and `agg_loss`, added up as in its `ppo_loss`, in two micro-batches;
- its learning rate of each rollout.

The inputs of the losses: 4 questions with 4 completions of 1 to 9 tokens; log π - log π_old uniform
in ±0.3 and in ±3, log π - log π_ref in ±1. Rewards are in 0 to 10⁶, so that the two guards of a
standard deviation (1e-4, and verl's 1e-6) are not felt; how much they are with rewards of 0 and 1
is a figure of its own.
"""

import argparse
import asyncio
import contextlib
import functools
import io
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from environment import go_on_in

CACHE = Path.home() / ".cache" / "pocket-grpo" / "verl"
TORCH = "torch==2.13.0"  # in the same command, so that nothing else chooses another
# Beside verl, what its agent loop and reward manager import.
VERL = ["verl==0.9.1", "cachetools", "fastapi", "uvicorn", "pyzmq", "msgspec"]
GROUP, LONGEST, TOLERANCE = 4, 9, 1e-6


go_on_in(CACHE, [TORCH, *VERL])  # before the imports that only the environment has

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
try:
    import numpy as np
    import torch
    import verl
    from hydra import compose, initialize_config_dir
    from omegaconf import open_dict
    from torch import Tensor
    from transformers import AutoTokenizer
    from verl import DataProto
    from verl.trainer.ppo import core_algos
    from verl.trainer.ppo.ray_trainer import apply_kl_penalty, compute_advantage
    from verl.trainer.ppo.reward import load_reward_manager
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_add_to_batch
    from verl.utils import torch_functional
    from verl.utils.config import omega_conf_to_dataclass, validate_config
    from verl.utils.dataset.rl_dataset import RLHFDataset
    from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder
except ImportError as error:
    sys.exit(f"{error}. This needs verl: python benchmarks/verl_handover.py --install")

from common import RESULTS, ROOT, machine, table, versions, write_lines  # noqa: E402

import to_verl  # noqa: E402
from objectives import equations  # noqa: E402
from objectives.table import OBJECTIVES, objective_of  # noqa: E402
from replay_buffer import Experience  # noqa: E402
from reward import REWARDS, score  # noqa: E402
from rollout import Completion, Group  # noqa: E402
from support.command_line import parse_config  # noqa: E402
from support.config import SYSTEM_PROMPT, Config  # noqa: E402
from support.data import Question  # noqa: E402
from support.model import load_tokenizer, set_learning_rate  # noqa: E402
from support.prompts import build_prompt  # noqa: E402
from support.user_rewards import load_rewards  # noqa: E402

SMALL = ["--preset=tiny", "--device=cpu", "--eval_questions=20"]
STEP = ["--rollouts_per_step=4", f"--group_size={GROUP}", "--train_batch_size=16"]
STEP += ["--micro_batch_size=8", "--gpus=1"]
# What a row of objectives/table.py needs so that verl can compute it.
WITHOUT = {"dapo": ["--mask_truncated=false"]}
KL, TIS = "--kl_weight=0.5", "--sampler_cap=2"
# Columns in other choices than a row's.
CHOICES = [
    ["--objective=grpo", "--clip_ratio_c=3"],
    *(["--objective=grpo", KL, f"--kl_estimator={k}"] for k in ("k1", "abs", "k2", "k3+", "k1+")),
    *(["--objective=rloo", f"--kl_estimator={k}"] for k in ("k2", "k3", "abs")),
    ["--objective=grpo", KL, "--kl_in_reward", "--kl_estimator=k3"],
    ["--objective=grpo", "--advantage_std=none", "--entropy_weight=0.1"],
    ["--objective=grpo", "--advantage=pass-at-k"],
    ["--objective=gspo", KL, "--loss_agg_mode=token-mean"],
    ["--objective=gmpo", KL],
    ["--objective=grpo", "--loss_agg_mode=seq-mean-token-sum-norm", "--loss_scale_factor=7"],
    *(
        ["--objective=grpo", TIS, f"--sampler_correction={level}_{action}"]
        for level in ("token", "sequence")
        for action in ("truncate", "mask")
    ),
]
MEGATRON = ["--trainer=megatron", "--tensor_parallel=2", "--precision=bf16"]
# Machines, engines, precisions, adapters: their flags are composed.
PLACES = [
    ["--rollouts_per_step=32", "--group_size=12", "--train_batch_size=96", "--gpus=8", "--nodes=8"],
    [*MEGATRON, "--gradient_checkpointing=true", "--warmup_steps=5"],
    ["--sampler=sglang", "--precision=bf16", "--warmup_steps=10"],
    ["--precision=bf16-pure", "--optimizer=adamw_8bit", "--kl_weight=0.01"],
    ["--adapter_rank=16"],
    ["--adapter_rank=16", "--adapter_targets", "q_proj", "v_proj", "--sampler=sglang"],
    [*MEGATRON, "--adapter_rank=16"],
    ["--objective=dapo", "--mask_truncated=false", "--eval_interval=0"],
]
USER_REWARD = """
def short(prompts, completions, **columns):
    return [-len(completion) / 70 for completion in completions]
"""
WHOLE = "--dataset=tiny/task"
# The check of adapters asks vLLM which ranks it serves, and vLLM is not here.
RANKS = SimpleNamespace(get_vllm_max_lora_rank=int)
PACKAGE = "verl.workers.rollout.vllm_rollout"
NO_VLLM = {PACKAGE: SimpleNamespace(utils=RANKS), f"{PACKAGE}.utils": RANKS}


# --------------------------------------------------------------------- a hand-over, read back


def settings(folder: Path, flags: list[str]) -> list[str]:
    """All flags of a hand-over: a few questions, unless the whole task is asked for."""
    few = folder.parent / "few"
    if not few.exists():
        few.mkdir()
        for split, count in (("train", 200), ("test", 30)):
            text = (ROOT / "tiny" / "task" / f"{split}.jsonl").read_text(encoding="utf-8")
            (few / f"{split}.jsonl").write_text("\n".join(text.splitlines()[:count]))
    return [*SMALL, f"--dataset={few}", *flags]


def config_of(folder: Path, flags: list[str]) -> Config:
    """Our settings."""
    machines = {f"--{name}" for name in to_verl.FLAGS}
    ours = [flag for flag in settings(folder, flags) if flag.split("=")[0] not in machines]
    return parse_config(ours)[0]


def hand_over(folder: Path, flags: list[str]) -> None:
    """What to_verl.py writes for these flags; its UserError is a SystemExit here."""
    with contextlib.redirect_stdout(io.StringIO()):
        to_verl.main([*settings(folder, flags), f"--out={folder}"])


def given_flags(folder: Path) -> list[str]:
    """The arguments that run.sh gives to verl, as bash makes them."""
    stand_in = folder / "bin"
    stand_in.mkdir(exist_ok=True)
    python = stand_in / "python3"
    python.write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    env = os.environ | {"PATH": f"{stand_in}:{os.environ['PATH']}"}
    found = subprocess.run(
        ["bash", str(folder / "run.sh")], env=env, capture_output=True, text=True
    )
    words = found.stdout.split("\0")[:-1]
    assert words[:2] == ["-m", "verl.trainer.main_ppo"], found.stderr
    return words[2:]


@functools.cache
def composed(folder: Path) -> Any:
    """verl's configuration from run.sh, accepted by its own check."""
    place = Path(verl.__file__).parent / "trainer" / "config"
    with initialize_config_dir(str(place), version_base=None):
        config = compose("ppo_trainer", overrides=given_flags(folder))
    actor = config.actor_rollout_ref.actor
    has_reference = actor.use_kl_loss or config.algorithm.use_kl_in_reward
    with contextlib.redirect_stdout(io.StringIO()), mock.patch.dict(sys.modules, NO_VLLM):
        validate_config(config, has_reference, use_critic=False)
    for name in ("train_files", "val_files"):
        assert Path(config.data[name]).is_file(), config.data[name]
    return config


# --------------------------------------------------------------------- prompts


def equal_prompts(folder: Path, flags: list[str]) -> tuple[int, int]:
    """Rows in both files, and those whose prompt ids are ours."""
    config = config_of(folder, flags)
    ours_of = load_tokenizer(config.model)
    theirs = composed(folder)
    tokenizer = AutoTokenizer.from_pretrained(theirs.actor_rollout_ref.model.path)
    builder = create_continuous_token_builder(tokenizer, hf_model_type="llama")
    count = equal = 0
    with open_dict(theirs):
        theirs.data.cache_dir = str(folder / "cache")
    for file in (theirs.data.train_files, theirs.data.val_files):
        with contextlib.redirect_stdout(io.StringIO()):
            dataset = RLHFDataset([file], tokenizer, theirs.data)
        rows = [dataset[i] for i in range(len(dataset))]
        asked = [json.loads(row["extra_info"]["columns"])["question"] for row in rows]
        for row, question in zip(rows, asked, strict=True):
            prompt = build_prompt(question.strip(), ours_of, config.system_prompt)
            ids = ours_of(prompt, add_special_tokens=False)["input_ids"]
            count += 1
            equal += list(builder.build_initial_tokens(list(row["raw_prompt"]))) == ids
    return count, equal


# --------------------------------------------------------------------- rewards


def text_for(question: Question, i: int) -> str:
    """A completion: right, wrong, without a tag, with working, repeating itself.

    In words of the bundled vocabulary: `<|unknown|>` is a special token, which verl takes away.
    """
    kinds = (
        f"<answer>{question.reference}</answer>",
        f"<answer>{i}</answer>",
        f"<think>{i} + 3 = {question.reference}</think><answer>{question.reference}</answer>",
        question.reference,
        f"{question.question} {question.question}<answer> {question.reference}</answer>",
    )
    return kinds[i % len(kinds)]


def same_rewards(folder: Path, flags: list[str], count: int = 100) -> tuple[int, int]:
    """Completions, and those for which verl's reward manager gives our weighted sum exactly."""
    config = config_of(folder, flags)
    theirs, tokenizer = composed(folder), load_tokenizer(config.model)
    with open_dict(theirs):
        theirs.data.cache_dir = str(folder / "cache")
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = RLHFDataset([theirs.data.train_files], tokenizer, theirs.data, max_samples=count)
    questions = to_verl.read_questions(config, tokenizer)["train"][:count]
    groups, single = [], []
    for i, question in enumerate(questions):
        ids = tokenizer(text_for(question, i), add_special_tokens=False)["input_ids"]
        ids.append(tokenizer.eos_token_id)
        text = tokenizer.decode(ids[:-1])
        assert text == tokenizer.decode(ids, skip_special_tokens=True), text
        groups.append(Group(question, [Completion(ids, text, False)]))
        row, prompt = dataset[i], question.prompt_ids
        tensors = {
            "prompts": torch.tensor([prompt]),
            "responses": torch.tensor([ids]),
            "attention_mask": torch.ones(1, len(prompt) + len(ids), dtype=torch.long),
        }
        kept = ("data_source", "reward_model", "extra_info")
        other = {name: np.array([row[name]], dtype=object) for name in kept}
        single.append(DataProto.from_dict(tensors=tensors, non_tensors=other))
    ours = score(groups, load_rewards(config.reward, REWARDS), config)

    async def ask() -> list[dict]:
        manager = load_reward_manager(theirs, tokenizer)
        manager.loop = asyncio.get_running_loop()
        return [await manager.run_single(data) for data in single]

    found = asyncio.run(ask())
    pairs = zip(ours, found, strict=True)
    equal = sum(float(group.returns[0]) == one["reward_score"] for group, one in pairs)
    return len(found), equal


# --------------------------------------------------------------------- losses


def draw(spread: float, seed: int, scale: float) -> dict[str, Tensor]:
    """Random inputs, float64: N completions of up to LONGEST tokens; the padding holds junk."""
    g, n = torch.Generator().manual_seed(seed), GROUP * GROUP

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=g, dtype=torch.float64)

    lengths = torch.randint(1, LONGEST + 1, (n,), generator=g)
    lengths[0], lengths[1] = 1, LONGEST
    log_ratio = uniform(-spread, spread, n, LONGEST)
    below = uniform(0.01, 2.0, n, LONGEST)
    now, old = -below + log_ratio.clamp(max=0), -below - log_ratio.clamp(min=0)
    rewards = uniform(0.0, 1.0, n)
    return {
        "lengths": lengths,
        "mask": torch.arange(LONGEST) < lengths[:, None],
        "rewards": rewards * scale if scale > 1 else rewards.round(),
        "now": now.requires_grad_(),
        "old": old,
        "ref": now.detach() - uniform(-1, 1, n, LONGEST),
        "sampler": old - uniform(-1, 1, n, LONGEST),
        "entropies": uniform(0.0, 2.0, n, LONGEST).requires_grad_(),
    }


def with_gradient(total: Tensor, drawn: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The value, and its gradient by log π and by the entropies."""
    leaves = [drawn["now"], drawn["entropies"]]
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    zero = torch.zeros_like(drawn["now"])
    return total.detach(), torch.stack([zero if f is None else f for f in found])


def our_loss(config: Any, drawn: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """As in train.py."""
    objective = objective_of(config)
    module, mask = equations.build_loss(objective), drawn["mask"]
    returns = drawn["rewards"]
    if objective.subtracts_kl:
        kl = equations.kl_divergence(drawn["old"], drawn["ref"], objective.kl_estimator)
        returns = returns - objective.kl_weight * torch.where(mask, kl, 0.0).sum(-1)
    returns = returns.view(-1, GROUP)
    corrects = objective.sampler_correction != "none"
    batch = Experience(
        sequences=drawn["lengths"],
        attention_mask=mask,
        action_mask=mask,
        returns=drawn["rewards"],
        advantages=module.advantages(returns, returns[None], [1.0]).flatten(),
        action_log_probs=drawn["old"],
        log_probs_ref=drawn["ref"],
        sampler_log_probs=drawn["sampler"] if corrects else None,
    )
    weights = module.token_weights(drawn["lengths"].tolist(), config.max_new_tokens)
    total, _ = module(drawn["now"], batch, weights.double(), drawn["entropies"])
    return with_gradient(total, drawn)


def verl_batch(theirs: Any, drawn: dict[str, Tensor]) -> DataProto:
    """The batch with advantages and sampler weights, as its `_compute_advantage` makes them."""
    mask = drawn["mask"].double()
    last = (drawn["lengths"] - 1)[:, None]
    scores = torch.zeros_like(mask).scatter_(1, last, drawn["rewards"][:, None])
    tensors = {
        "response_mask": mask,
        "token_level_scores": scores,
        "token_level_rewards": scores,
        "old_log_probs": drawn["old"],
        "ref_log_prob": drawn["ref"],
        "rollout_log_probs": drawn["sampler"],
    }
    uid = np.repeat([str(i) for i in range(GROUP)], GROUP).astype(object)
    data = DataProto.from_dict(tensors=tensors, non_tensors={"uid": uid})
    algorithm = theirs.algorithm
    if algorithm.use_kl_in_reward:
        control = core_algos.get_kl_controller(algorithm.kl_ctrl)
        data, _ = apply_kl_penalty(data, kl_ctrl=control, kl_penalty=algorithm.kl_penalty)
    data, _ = compute_rollout_correction_and_add_to_batch(data, algorithm.rollout_correction)
    return compute_advantage(
        data,
        adv_estimator=algorithm.adv_estimator,
        num_repeat=theirs.actor_rollout_ref.rollout.n,
        norm_adv_by_std_in_grpo=algorithm.norm_adv_by_std_in_grpo,
        config=algorithm,
    )


def verl_loss(theirs: Any, drawn: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """verl's functions, added up as in its `ppo_loss`, over the micro-batches of its settings."""
    actor = omega_conf_to_dataclass(theirs.actor_rollout_ref.actor)
    batch = verl_batch(theirs, drawn).batch
    mask = batch["response_mask"]
    actor.global_batch_info.update(
        dp_size=1,
        batch_num_tokens=int(mask.sum()),
        global_batch_size=actor.ppo_mini_batch_size * theirs.actor_rollout_ref.rollout.n,
        loss_scale_factor=actor.loss_scale_factor,
    )
    mode, info = actor.loss_agg_mode, actor.global_batch_info
    policy = core_algos.get_policy_loss_fn(actor.policy_loss.loss_mode)
    total = torch.zeros((), dtype=torch.float64)
    for rows in torch.arange(len(mask)).split(actor.ppo_micro_batch_size_per_gpu):
        now, kept = drawn["now"][rows], mask[rows]
        weights = batch["rollout_is_weights"][rows] if "rollout_is_weights" in batch else None
        part, _ = policy(
            old_log_prob=batch["old_log_probs"][rows],
            log_prob=now,
            advantages=batch["advantages"][rows],
            response_mask=kept,
            loss_agg_mode=mode,
            config=actor,
            rollout_is_weights=weights,
        )
        entropy = core_algos.agg_loss(drawn["entropies"][rows], kept, mode, **info)
        total = total + part - actor.entropy_coeff * entropy
        if actor.use_kl_loss:
            kl = core_algos.kl_penalty(now, batch["ref_log_prob"][rows], actor.kl_loss_type)
            total = total + actor.kl_loss_coef * core_algos.agg_loss(kl, kept, mode, **info)
    return with_gradient(total, drawn)


def loss_difference(folder: Path, flags: list[str], scale: float) -> tuple[float, float]:
    """The largest relative difference of value and of gradient, over 2 spreads and 5 seeds.

    Relative to the sum of the absolute gradients, and to the largest one: both are sums of terms of
    both signs, and may be close to 0.
    """
    config = config_of(folder, flags)
    theirs, worst = composed(folder), [0.0, 0.0]
    for spread in (0.3, 3.0):
        for seed in range(5):
            drawn = draw(spread, seed, scale)
            value, gradient = our_loss(config, drawn)
            other, their_gradient = verl_loss(theirs, drawn)
            size = gradient.abs()  # 0 where no group teaches anything
            largest, total = size.max().clamp(min=1e-30), size.sum().clamp(min=1e-30)
            in_value = (value - other).abs() / torch.maximum(value.abs(), total)
            in_gradient = (gradient - their_gradient).abs().max() / largest
            for i, found in enumerate((in_value, in_gradient)):
                worst[i] = max(worst[i], float(found.nan_to_num(nan=torch.inf)))
    return worst[0], worst[1]


# --------------------------------------------------------------------- learning rate


def rate_difference(folder: Path, flags: list[str], steps: int = 20) -> float:
    """The largest difference between verl's learning rate of a rollout and ours, over lr."""
    config = config_of(folder, flags)
    optim = omega_conf_to_dataclass(composed(folder).actor_rollout_ref.actor.optim)
    ours, theirs = (torch.optim.SGD([torch.zeros(1)], lr=config.lr) for _ in range(2))
    if optim.lr_scheduler_type == "constant":
        schedule = torch_functional.get_constant_schedule_with_warmup(theirs, optim.lr_warmup_steps)
    else:
        schedule = torch_functional.get_cosine_schedule_with_warmup(
            theirs,
            num_warmup_steps=optim.lr_warmup_steps,
            num_training_steps=config.steps,
            min_lr_ratio=optim.min_lr_ratio,
            num_cycles=optim.num_cycles,
            zero_indexed_step=optim.zero_indexed_step,
        )
    worst = 0.0
    for step in range(1, steps + 1):
        worst = max(worst, abs(set_learning_rate(ours, config, step) - schedule.get_last_lr()[0]))
        theirs.step()
        schedule.step()
    return worst / config.lr


# --------------------------------------------------------------------- all of it


def methods(folder: Path) -> tuple[list[list[str]], list[str], list[str]]:
    """Rows of the table of losses, the sentences of what is refused, and what is wrong."""
    rows, refused, wrong = [], [], []
    choices = [[f"--objective={name}"] for name in OBJECTIVES]
    choices += [[f"--objective={name}", *more] for name, more in WITHOUT.items()]
    for i, choice in enumerate([*choices, *CHOICES]):
        place, words = folder / f"method-{i}", " ".join(f.removeprefix("--") for f in choice)
        flags = [*STEP, *choice]
        try:
            with contextlib.redirect_stderr(io.StringIO()) as said:
                hand_over(place, flags)
        except SystemExit:
            refused.append(f"`{words}`: {said.getvalue().removeprefix('error: ').strip()}")
            continue
        value, gradient = loss_difference(place, flags, 1e6)
        with_guard = max(loss_difference(place, flags, 1.0))
        actor = composed(place).actor_rollout_ref.actor
        figures = [f"{figure:.0e}" for figure in (value, gradient, with_guard)]
        rows.append([words, actor.policy_loss.loss_mode, *figures])
        print(*rows[-1], flush=True)
        if max(value, gradient) > TOLERANCE:
            wrong.append(f"{words}: differs by {max(value, gradient):.1e}")
    return rows, refused, wrong


def main() -> None:
    """Hand over, read back, compare, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--install", action="store_true", help="make an environment, run there")
    parser.add_argument("--env", type=Path, default=CACHE, help="the folder of that environment")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as made:
        lines, wrong = report(Path(made))
    print("\n".join(lines))
    write_lines(args.out / "verl_handover.md", lines)
    sys.exit(1 if wrong else 0)


def report(folder: Path) -> tuple[list[str], list[str]]:
    """The whole of results/verl_handover.md, and what is not as it should be."""
    said, lines, wrong = [], [], []
    for i, flags in enumerate(PLACES):
        # A quote, a space and a dollar: what run.sh must survive.
        place = folder / f"it's $place {i}"
        hand_over(place, flags)
        composed(place)  # or an exception
        lines.append("- `" + " ".join(f.removeprefix("--") for f in flags) + "`")
        print(lines[-1], flush=True)
    system = [f"--system_prompt={SYSTEM_PROMPT}", "--max_prompt_tokens=600"]
    for kind, flags in (("without", [WHOLE]), ("with", [WHOLE, *system])):
        hand_over(folder / kind, flags)
        count, equal = equal_prompts(folder / kind, flags)
        said.append(f"Prompt ids, {kind} a system prompt: {equal} of {count} rows equal ours.")
        wrong += [] if count == equal else [said[-1]]
    own = folder / "own.py"
    own.write_text(USER_REWARD, encoding="utf-8")
    flags = ["--reward", "accuracy", "format", "repetition", f"{own}:short"]
    flags += ["--reward_weights", "1", "0.5", "0.25", "0.1"]
    hand_over(folder / "rewards", flags)
    count, equal = same_rewards(folder / "rewards", flags)
    said.append(
        f"Rewards (accuracy, format, repetition and one of a user's file, weighted): {equal} of "
        f"{count} completions, without special tokens in them, have exactly our weighted sum."
    )
    wrong += [] if count == equal else [said[-1]]
    for steps in (0, 10):
        flags = [f"--warmup_steps={steps}"]
        hand_over(folder / f"warm-{steps}", flags)
        found = rate_difference(folder / f"warm-{steps}", flags)
        said.append(f"Learning rate of 20 rollouts, warm-up {steps}: difference {found:.0e}.")
        wrong += [] if found < TOLERANCE else [said[-1]]
    print(*said, sep="\n", flush=True)
    rows, refused, differ = methods(folder)
    wrong += differ
    return page(rows, refused, wrong, said, lines), wrong


def page(
    rows: list[list[str]], refused: list[str], wrong: list[str], said: list[str], lines: list[str]
) -> list[str]:
    """The report as Markdown."""
    head = ["what is handed over", "verl's loss", "value", "gradient", "rewards of 0 and 1"]
    return [
        f"`python benchmarks/verl_handover.py` on {machine()}, no GPU; {versions()}, verl "
        f"{verl.__version__}",
        "",
        f"Not as it should be: {len(wrong)}.",
        *(f"- {sentence}" for sentence in wrong),
        "",
        *said,
        "",
        "## Losses",
        "",
        "Largest relative difference between verl's loss, with the settings of run.sh, and ours; "
        f"the limit is {TOLERANCE:.0e}. Rewards are in 0 to 10⁶; in the last column they are 0 and "
        "1, where the two guards of the standard deviation are felt (ours 1e-4, verl's 1e-6).",
        "",
        *table(head, rows),
        "",
        "## Flags",
        "",
        f"verl's Hydra configuration composes and its `validate_config` accepts run.sh of the "
        f"{len(rows)} rows above, and of:",
        "",
        *lines,
        "",
        "## Refused",
        "",
        *(f"- {sentence}" for sentence in refused),
    ]


if __name__ == "__main__":
    main()
