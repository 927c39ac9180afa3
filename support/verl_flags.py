"""A run's options in verl's words: its flags, and for an option that has none, why.

Written for verl 0.9.1 (`python -m verl.trainer.main_ppo`). results/verl_handover.md says what was
compared with verl's own code. A new option of support/config.py needs an entry in one of the
functions below; tests/test_to_verl.py fails without it.
"""

from dataclasses import dataclass, field
from typing import Any

from support.config import Config
from support.errors import UserError

VERL = "0.9.1"
ACTOR, ROLLOUT, MODEL = (f"actor_rollout_ref.{part}" for part in ("actor", "rollout", "model"))
REF, REWARD_KL = "actor_rollout_ref.ref", "algorithm.kl_ctrl"
# verl clamps log r at 20, and e^20 is 4.9e8: no ratio comes up to this, so there is no dual clip.
NO_DUAL_CLIP = 1e9
DPPO_RATIO_LIMIT = 20.0  # as in objectives/equations.py
# By our ratio_level and surrogate. GSPO's gradient is the same for `sequence` and for
# `sequence-token`, since all tokens of a completion have one advantage.
LOSS_MODES = {
    ("token", "clip"): "vanilla",
    ("token", "cispo"): "cispo",
    ("token", "sapo"): "sapo",
    ("token", "gmpo"): "geo_mean",
    ("token", "reinforce"): "gpg",
    ("token", "dppo"): "dppo_tv",
    ("sequence", "clip"): "gspo",
    ("sequence-token", "clip"): "gspo",
}
ESTIMATORS = {"group": "grpo", "leave-one-out": "rloo", "pass-at-k": "grpo_passk"}
DTYPES = {  # the weights, and the arithmetic
    "bf16": ("fp32", "bfloat16"),
    "bf16-pure": ("bf16", "bfloat16"),
    "fp32": ("fp32", "float32"),
}
LARGEST_RANK = 512  # of an adapter that vLLM serves


@dataclass(frozen=True)
class Here:
    """A file of the folder that is written, wherever that folder will be."""

    name: str


@dataclass(frozen=True)
class Entry:
    """What becomes of an option: verl's flags, and what there is to say."""

    flags: dict[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Cluster:
    """The machines that verl is to use, and its engines."""

    nodes: int = 1
    gpus: int = 8  # of each node
    trainer: str = "fsdp"  # or megatron
    sampler: str = "vllm"  # or sglang
    tensor_parallel: int = 1  # GPUs that share one copy of the model: to sample; Megatron: to train

    @property
    def megatron(self) -> bool:
        """Whether Megatron trains, instead of FSDP."""
        return self.trainer == "megatron"

    @property
    def data_parallel(self) -> int:
        """Among how many the sequences of an optimizer step are shared out."""
        return self.nodes * self.gpus // (self.tensor_parallel if self.megatron else 1)

    @property
    def engine(self) -> str:
        """Where the actor's settings of the training engine stand, and the reference's."""
        return "megatron" if self.megatron else "fsdp_config"


@dataclass(frozen=True)
class Sizes:
    """How a rollout is cut into optimizer steps and forward passes."""

    mini_batch: int  # questions in an optimizer step
    micro_batch: int  # sequences on one GPU at a time, with a gradient
    log_prob_batch: int  # without one


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is not above `most`."""
    return max(d for d in range(1, min(number, most) + 1) if number % d == 0)


def find_sizes(config: Config, objective: Any, cluster: Cluster) -> Sizes:
    """The sizes nearest to the run's that verl can compute with.

    An optimizer step of verl is a number of questions with all their completions. It is shared out
    evenly, without a smaller last one, which verl would fill up with padding.

    Raises:
        UserError: a rollout cannot be shared out evenly among the GPUs.
    """
    group, parallel = config.group_size, cluster.data_parallel
    if cluster.gpus % cluster.tensor_parallel:
        raise UserError(
            f"--tensor_parallel {cluster.tensor_parallel} does not divide the {cluster.gpus} GPUs "
            "of a node; choose a divisor."
        )
    if config.sequences_per_step % parallel:
        raise UserError(
            f"verl shares the {config.sequences_per_step} sequences of a rollout out evenly, and "
            f"{parallel} copies of the model do not divide them; change --nodes, --gpus, "
            "--rollouts_per_step or --group_size."
        )
    questions = config.rollouts_per_step
    possible = [
        m for m in range(1, questions + 1) if questions % m == 0 and m * group % parallel == 0
    ]
    mini = min(possible, key=lambda m: abs(m * group - config.train_batch_size))
    share = mini * group // parallel
    # verl's geo_mean divides by the micro-batch, so there must be one micro-batch only.
    whole = objective.surrogate == "gmpo"
    return Sizes(
        mini,
        share if whole else largest_divisor(share, config.micro_batch),
        largest_divisor(config.sequences_per_step // parallel, 4 * config.micro_batch),
    )


# ------------------------------------------------------------------------------- what is refused


def check_method(o: Any) -> None:
    """UserError that names the part of an objective which verl cannot compute.

    Args:
        o: an Objective of objectives/table.py.
    """
    for refuse in (refuse_advantages, refuse_policy_term, refuse_tokens):
        found = refuse(o)
        if found:
            raise UserError(f"verl {VERL} has no equivalent of {found}.")


def refuse_advantages(o: Any) -> str | None:
    """What a completion is compared with."""
    if o.advantage not in ESTIMATORS:
        return f"--advantage {o.advantage}: it compares each completion with its group"
    if o.advantage_std == "batch":
        return "--advantage_std batch: it divides by the std of a group, or by nothing"
    if o.advantage == "leave-one-out" and o.advantage_std != "none":
        return "--advantage leave-one-out with --advantage_std group: its rloo divides by nothing"
    if o.multi_objective_aggregation == "normalize_then_sum":
        return (
            "--multi_objective_aggregation normalize_then_sum: its gdpo also whitens the "
            "advantages, and counts tokens there instead of completions"
        )
    if o.whiten_advantages:
        return (
            "--whiten_advantages: its whitening counts tokens, so a long completion counts more; "
            "give --whiten_advantages false to hand the rest over"
        )
    if o.relative_reward_weight != 1 or o.baseline_reward_weight != 0:
        return "--relative_reward_weight other than 1 and --baseline_reward_weight other than 0"
    return None


def refuse_policy_term(o: Any) -> str | None:
    """Ratio, surrogate, clip and mean."""
    if (o.ratio_level, o.surrogate) not in LOSS_MODES:
        return f"--ratio_level {o.ratio_level} with --surrogate {o.surrogate}"
    if o.clip_ratio_c is not None and o.ratio_level != "token":
        return f"--clip_ratio_c with --ratio_level {o.ratio_level}: its gspo has no dual clip"
    if o.surrogate in ("sapo", "gmpo") and o.loss_agg_mode != "seq-mean-token-mean":
        return f"--loss_agg_mode {o.loss_agg_mode} with --surrogate {o.surrogate}"
    if o.surrogate == "gmpo" and o.sampler_correction != "none":
        return "--sampler_correction with --surrogate gmpo: it takes a geometric mean of weights"
    if o.loss_scale_factor is not None and o.loss_scale_factor != int(o.loss_scale_factor):
        return f"--loss_scale_factor {o.loss_scale_factor:g}: it takes whole numbers"
    return None


def refuse_tokens(o: Any) -> str | None:
    """KL, entropy, and what takes part."""
    if o.kl_weight > 0 and o.kl_estimator in ("k3-ratio", "full"):
        return f"--kl_estimator {o.kl_estimator}; k3 or k3+ can be handed over"
    if o.entropy_target is not None:
        return "--entropy_target: its entropy bonus does not adapt"
    if o.top_entropy < 1:
        return "--top_entropy: it trains all tokens"
    if o.mask_truncated:
        return (
            "--mask_truncated: it trains on completions that were cut off; give --mask_truncated "
            "false to hand the rest over"
        )
    return None


def check_training(config: Config, cluster: Cluster, adapter: str) -> None:
    """UserError for a way of training that verl does not have: adapters, 4 bits, precision."""
    if config.quantize != "none":
        raise UserError(
            f"verl {VERL} does not train adapters beside weights in 4 bits; give --quantize none "
            "and --model with the base model, to begin again without them."
        )
    if config.adapter_rank and config.adapter_alpha != int(config.adapter_alpha):
        raise UserError(
            f"verl takes a whole number for --adapter_alpha, not {config.adapter_alpha:g}; choose "
            "one."
        )
    if config.adapter_rank > LARGEST_RANK:
        raise UserError(
            f"--adapter_rank {config.adapter_rank} is above {LARGEST_RANK}, the largest that "
            "verl's samplers serve; choose a smaller one."
        )
    if config.adapter_rank and cluster.megatron and config.adapter_targets != ["all-linear"]:
        raise UserError(
            "Megatron's layers have other names than those of --adapter_targets "
            f"{' '.join(config.adapter_targets)}; give --adapter_targets all-linear, or "
            "--trainer fsdp."
        )
    if adapter and cluster.megatron:
        raise UserError(
            f"Megatron cannot read the adapter in {adapter}; merge it into its base model (python "
            "merge.py) and give --model the merged one, or give --trainer fsdp."
        )
    if config.precision == "fp32" and cluster.megatron:
        raise UserError(
            "verl's Megatron computes in 16 bits only; give --precision bf16, or --trainer fsdp."
        )
    if config.optimizer == "adamw_8bit" and cluster.megatron:
        raise UserError(
            "Megatron has no --optimizer adamw_8bit; give --optimizer adamw, or --trainer fsdp."
        )


# ------------------------------------------------------------------------------- the options


def entries(
    config: Config, objective: Any, cluster: Cluster, model: str, adapter: str
) -> dict[str, Entry]:
    """Every option of Config, name to what becomes of it.

    Args:
        objective: the Objective of the config.
        model, adapter: where verl starts; the folder of an adapter, or "".
    Raises:
        UserError: something has no equivalent in verl.
    """
    check_method(objective)
    check_training(config, cluster, adapter)
    sizes = find_sizes(config, objective, cluster)
    return {
        **of_run(config, objective, cluster),
        **of_model(config, cluster, model, adapter),
        **of_questions(config),
        **of_rollout(config),
        **of_advantages(objective),
        **of_policy_term(config, objective),
        **of_kl(objective),
        **of_tokens(objective),
        **of_update(config, objective, cluster, sizes),
        **of_evaluation(config),
    }


def of_run(config: Config, objective: Any, cluster: Cluster) -> dict[str, Entry]:
    """The run."""
    seeds = {
        "data.seed": config.seed,
        f"{ACTOR}.data_loader_seed": config.seed,
        f"{ACTOR}.{cluster.engine}.seed": config.seed,
        f"{ROLLOUT}.seed": config.seed,
    }
    steps = {
        "trainer.total_training_steps": config.steps,
        # Never the reason to stop: an epoch has one step at least.
        "trainer.total_epochs": config.steps * objective.dynamic_sampling,
    }
    return {
        "preset": Entry(note="a name for the values in this table"),
        "run_dir": Entry({"trainer.default_local_dir": Here("checkpoints")}),
        "seed": Entry(seeds, "the questions come in the run's order; what is sampled is another"),
        "steps": Entry(steps, "counted from the model that verl starts with, whatever it has done"),
        "device": Entry({"trainer.device": "cuda"}, "verl trains on GPUs"),
    }


def of_model(config: Config, cluster: Cluster, model: str, adapter: str) -> dict[str, Entry]:
    """The model, its precision and its adapters."""
    start = {f"{MODEL}.path": model}
    if adapter:
        start[f"{MODEL}.lora_adapter_path"] = adapter
    rank, alpha, targets = {}, {}, {}
    if config.adapter_rank:
        kept = f"{MODEL}.lora." if cluster.megatron else f"{MODEL}.lora_"
        rank = {f"{kept}rank": config.adapter_rank, f"{ROLLOUT}.load_format": "safetensors"}
        alpha = {f"{kept}alpha": int(config.adapter_alpha)}
    if config.adapter_rank and not cluster.megatron:
        names = config.adapter_targets
        targets[f"{MODEL}.target_modules"] = names[0] if names == ["all-linear"] else names
    none = "" if config.adapter_rank else "there are no adapters"
    of_layers = "all linear layers, under Megatron's names" if cluster.megatron else ""
    return {
        "model": Entry(start),
        "precision": Entry(precision_flags(config.precision, cluster), precision_note(config)),
        "adapter_rank": Entry(rank, none),
        "adapter_alpha": Entry(alpha, none),
        "adapter_targets": Entry(targets, none or of_layers),
        "quantize": Entry(note="nothing is stored in 4 bits"),
        "gradient_checkpointing": Entry(checkpointing_flags(config, cluster)),
    }


def precision_flags(precision: str, cluster: Cluster) -> dict[str, Any]:
    """Weights and arithmetic of actor and reference, and of the sampler."""
    weights, arithmetic = DTYPES[precision]
    flags = {f"{ROLLOUT}.dtype": arithmetic}
    if cluster.megatron:  # its optimizer has weights in fp32 beside those in bf16
        return flags | {f"{part}.megatron.dtype": arithmetic for part in (ACTOR, REF)}
    for part in (ACTOR, REF):
        flags[f"{part}.fsdp_config.dtype"] = arithmetic
        flags[f"{part}.fsdp_config.model_dtype"] = weights if part == ACTOR else arithmetic
        if precision == "fp32":
            kinds = ("param_dtype", "reduce_dtype", "buffer_dtype")
            flags[f"+{part}.fsdp_config.mixed_precision"] = dict.fromkeys(kinds, "fp32")
    return flags


def precision_note(config: Config) -> str:
    """What is stored otherwise than in the run."""
    if config.adapter_rank and config.precision == "bf16":
        return (
            "FSDP keeps frozen weights and adapters alike, so both are in fp32 here; with "
            "model_dtype=bf16 both are in bf16"
        )
    return ""


def checkpointing_flags(config: Config, cluster: Cluster) -> dict[str, Any]:
    """Whether activations are computed again in the backward pass."""
    flags: dict[str, Any] = {
        f"{MODEL}.enable_gradient_checkpointing": config.gradient_checkpointing
    }
    if cluster.megatron and config.gradient_checkpointing:
        kept = f"{ACTOR}.megatron.override_transformer_config"
        flags[f"{kept}.recompute_granularity"] = "full"
        flags[f"{kept}.recompute_method"] = "uniform"
        flags[f"{kept}.recompute_num_layers"] = 1
    return flags


def of_questions(config: Config) -> dict[str, Entry]:
    """What is in the Parquet files already."""
    rows = "its rows are in train.parquet and test.parquet"
    train = {"data.train_files": Here("train.parquet")}
    test = {"data.val_files": Here("test.parquet")}
    longest = {
        "data.max_prompt_length": config.max_prompt_tokens,
        "data.filter_overlong_prompts": True,
        "data.truncation": "error",
    }
    return {
        "dataset": Entry(train, rows),
        "dataset_config": Entry(note=rows),
        "question_column": Entry(note="it is the last message of `prompt`"),
        "answer_column": Entry(note="the final answer is `reward_model.ground_truth`"),
        "eval_dataset": Entry(test),
        "system_prompt": Entry(note="it is in `prompt`, in each row; empty: none"),
        "prompt_date": Entry(note="a chat template that prints the day prints verl's own day"),
        "max_prompt_tokens": Entry(longest, "longer prompts are not in the files either"),
    }


def of_rollout(config: Config) -> dict[str, Entry]:
    """Sampling, and the rewards."""
    drawn = {f"{ROLLOUT}.temperature": config.temperature, f"{ROLLOUT}.do_sample": True}
    nucleus = {f"{ROLLOUT}.top_p": config.top_p, f"{ROLLOUT}.top_k": -1}
    return {
        "rollouts_per_step": Entry({"data.train_batch_size": config.rollouts_per_step}),
        "group_size": Entry({f"{ROLLOUT}.n": config.group_size}),
        "max_new_tokens": Entry({"data.max_response_length": config.max_new_tokens}),
        "temperature": Entry(drawn),
        "top_p": Entry(nucleus),
        "rollout_batch_size": Entry(
            note="vLLM and SGLang choose it by their memory (gpu_memory_utilization)"
        ),
        "rollout_url": Entry(note="verl has samplers of its own"),
        "rollout_timeout": Entry(note="it belongs to --rollout_url"),
        "reward": Entry(
            {
                "reward.custom_reward_function.path": Here("reward.py"),
                "reward.custom_reward_function.name": "compute_score",
                "reward.reward_manager.name": "naive",
            }
        ),
        "reward_weights": Entry(note="they are in reward.py"),
        "reward_timeout": Entry(note="verl has no time limit: a reward that hangs stops the run"),
    }


def of_advantages(o: Any) -> dict[str, Entry]:
    """What a completion is compared with."""
    by_std = {"algorithm.norm_adv_by_std_in_grpo": o.advantage_std == "group"}
    same = "verl computes nothing else here"
    return {
        "objective": Entry(note="a name for the parts that follow"),
        "advantage": Entry({"algorithm.adv_estimator": ESTIMATORS[o.advantage]}),
        "advantage_std": Entry(by_std, "verl adds 1e-6 to the std, the run 1e-4"),
        "multi_objective_aggregation": Entry(note="reward.py adds the rewards up"),
        "relative_reward_weight": Entry(note=same),
        "baseline_reward_weight": Entry(note=same),
        "whiten_advantages": Entry(note=same),
    }


def of_policy_term(config: Config, o: Any) -> dict[str, Entry]:
    """Ratio, surrogate, clip and mean over tokens."""
    mode = LOSS_MODES[o.ratio_level, o.surrogate]
    surrogate = {f"{ACTOR}.policy_loss.loss_mode": mode}
    if mode == "sapo":
        surrogate |= {f"{ACTOR}.tau_pos": 1.0, f"{ACTOR}.tau_neg": 1.05}
    low: dict[str, Any] = {}
    high: dict[str, Any] = {}
    cap: dict[str, Any] = {}
    if mode not in ("sapo", "gpg"):
        low = {f"{ACTOR}.clip_ratio": o.clip_eps, f"{ACTOR}.clip_ratio_low": o.clip_eps}
        high = {f"{ACTOR}.clip_ratio_high": o.eps_high}
    if mode == "vanilla":
        cap = {f"{ACTOR}.clip_ratio_c": o.clip_ratio_c or NO_DUAL_CLIP}
    if mode == "dppo_tv":
        cap = {f"{ACTOR}.clip_ratio_c": DPPO_RATIO_LIMIT}
    unused = f"the loss {mode} has no use for it"
    scale: dict[str, Any] = {}
    if o.loss_agg_mode == "seq-mean-token-sum-norm":
        scale = {f"{ACTOR}.loss_scale_factor": int(o.loss_scale_factor or config.max_new_tokens)}
    return {
        "ratio_level": Entry(note="it is in policy_loss.loss_mode"),
        "surrogate": Entry(surrogate),
        "clip_eps": Entry(low, "" if low else unused),
        "clip_eps_high": Entry(high, "" if high else unused),
        "clip_ratio_c": Entry(cap, cap_note(o, mode) if cap else unused),
        "loss_agg_mode": Entry({f"{ACTOR}.loss_agg_mode": o.loss_agg_mode}),
        "loss_scale_factor": Entry(scale, "" if scale else "this mean has no constant"),
    }


def cap_note(o: Any, mode: str) -> str:
    """Why clip_ratio_c is written although the run has none."""
    if mode == "dppo_tv":
        return "verl's dppo_tv cuts the ratio here, by default at 3; the paper and the run at 20"
    if o.clip_ratio_c is None:
        return "the run has no dual clip; verl's is 3 by default, and never reached at 1e9"
    return ""


def of_kl(o: Any) -> dict[str, Entry]:
    """The KL to the reference, which verl calls ref."""
    flags: dict[str, Any] = {
        f"{ACTOR}.use_kl_loss": o.kl_in_loss,
        "algorithm.use_kl_in_reward": o.subtracts_kl,
    }
    weight: dict[str, Any] = {}
    estimator: dict[str, Any] = {}
    if o.kl_in_loss:
        weight, estimator = {f"{ACTOR}.kl_loss_coef": o.kl_weight}, {}
        estimator[f"{ACTOR}.kl_loss_type"] = o.kl_estimator
    if o.subtracts_kl:
        weight = {f"{REWARD_KL}.type": "fixed", f"{REWARD_KL}.kl_coef": o.kl_weight}
        estimator["algorithm.kl_penalty"] = o.kl_estimator
    none = "" if weight else "there is no KL"
    return {
        "kl_weight": Entry(weight, none),
        "kl_estimator": Entry(estimator, none),
        "kl_in_reward": Entry(flags),
    }


def of_tokens(o: Any) -> dict[str, Entry]:
    """Entropy, and which completions and tokens take part."""
    refill: dict[str, Any] = {"algorithm.filter_groups.enable": o.dynamic_sampling > 1}
    limit = ""
    if o.dynamic_sampling > 1:
        refill["algorithm.filter_groups.metric"] = "reward"
        limit = (
            f"the run goes on after {o.dynamic_sampling} rollouts; verl samples until all groups "
            "have rewards that differ"
        )
    level, _, action = o.sampler_correction.partition("_")
    kept = "algorithm.rollout_correction"
    correction: dict[str, Any] = {f"{kept}.rollout_is": None if level == "none" else level}
    cap: dict[str, Any] = {}
    if level != "none":
        low = "" if action == "truncate" else "1e-9_"
        cap = {f"{kept}.rollout_is_threshold": f"{low}{o.sampler_cap}"}
        correction[f"{ROLLOUT}.calculate_log_probs"] = True
    all_tokens = "verl trains all tokens"
    return {
        "entropy_weight": Entry({f"{ACTOR}.entropy_coeff": o.entropy_weight}),
        "entropy_target": Entry(note="verl's bonus does not adapt, nor does the run's"),
        "top_entropy": Entry(note=all_tokens),
        "dynamic_sampling": Entry(refill, limit),
        "mask_truncated": Entry(note=all_tokens),
        "sampler_correction": Entry(correction),
        "sampler_cap": Entry(cap, "" if cap else "there is no correction to cap"),
    }


def of_update(config: Config, o: Any, cluster: Cluster, sizes: Sizes) -> dict[str, Entry]:
    """Optimizer steps and what they are made of."""
    written = sizes.mini_batch * config.group_size
    size_note = "counts questions, each with all its completions: "
    size_note += f"{sizes.mini_batch} × {config.group_size} = {written} sequences"
    if written != config.train_batch_size:
        size_note += f" instead of {config.train_batch_size}, which verl cannot have"
    micro = {
        f"{ACTOR}.ppo_micro_batch_size_per_gpu": sizes.micro_batch,
        f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu": sizes.log_prob_batch,
        f"{REF}.log_prob_micro_batch_size_per_gpu": sizes.log_prob_batch,
    }
    micro_note = "on each GPU"
    if o.surrogate == "gmpo":
        micro_note += ": all it has, since verl's geo_mean adds up the means of micro-batches"
    optim, weights = f"{ACTOR}.optim", {}
    if not cluster.megatron:
        weights = {f"{optim}.optimizer": "AdamW", f"{optim}.optimizer_impl": "torch.optim"}
    if config.optimizer == "adamw_8bit":
        weights = {f"{optim}.optimizer": "AdamW8bit"}
        weights |= {f"{optim}.optimizer_impl": "bitsandbytes.optim"}
    return {
        "train_batch_size": Entry({f"{ACTOR}.ppo_mini_batch_size": sizes.mini_batch}, size_note),
        "micro_batch_size": Entry(micro | {f"{ACTOR}.use_dynamic_bsz": False}, micro_note),
        "epochs_per_step": Entry(
            {f"{ACTOR}.ppo_epochs": config.epochs_per_step, f"{ACTOR}.shuffle": True}
        ),
        "optimizer": Entry(weights, "" if weights else "Megatron's own Adam, with decoupled decay"),
        "lr": Entry({f"{optim}.lr": config.lr}),
        "warmup_steps": warmup(config, cluster),
        "weight_decay": Entry({f"{optim}.weight_decay": config.weight_decay}),
        "max_norm": Entry({f"{optim}.clip_grad": config.max_norm}),
        "max_skipped_steps": Entry(
            note="verl leaves out a step whose gradient is not finite too, and never stops for it"
        ),
    }


def warmup(config: Config, cluster: Cluster) -> Entry:
    """The learning rate of each rollout.

    The run's rises from lr / warmup_steps; verl's constant schedule from 0, one rollout later. Its
    cosine schedule can begin at 1, and without a cycle it stays constant.
    """
    steps, optim = config.warmup_steps, f"{ACTOR}.optim"
    flags = {f"{optim}.lr_warmup_steps": steps, f"{optim}.lr_warmup_steps_ratio": 0.0}
    if cluster.megatron:
        flags |= {f"{optim}.lr_decay_style": "constant"}
        return Entry(flags, "Megatron's rate is 0 in the first rollout, the run's is not")
    if not steps:
        return Entry(flags | {f"{optim}.lr_scheduler_type": "constant"})
    flags |= {
        f"{optim}.lr_scheduler_type": "cosine",
        f"{optim}.num_cycles": 0.0,
        f"{optim}.zero_indexed_step": False,
    }
    return Entry(flags, "a cosine without a cycle is constant; verl's `constant` begins with 0")


def of_evaluation(config: Config) -> dict[str, Entry]:
    """Evaluation, checkpoints and logs."""
    off, val = -1, f"{ROLLOUT}.val_kwargs"
    tested = {
        "trainer.test_freq": config.eval_interval or off,
        "trainer.val_before_train": config.eval_interval > 0,
        f"{val}.do_sample": False,
        f"{val}.temperature": 0,
        f"{val}.n": 1,
    }
    samples = "test.parquet is answered greedily"
    if config.eval_samples:
        samples += f"; for samples: {val}.n={config.eval_samples} {val}.do_sample=True"
    return {
        "eval_interval": Entry(tested, "the figure is the weighted reward, each reward beside it"),
        "eval_questions": Entry({"data.val_max_samples": -1}, "test.parquet has only these"),
        "eval_samples": Entry(note=samples),
        "checkpoint_interval": Entry(
            {"trainer.save_freq": config.checkpoint_interval or off},
            "started again, run.sh goes on from verl's newest checkpoint",
        ),
        "keep_checkpoints": Entry({"trainer.max_actor_ckpt_to_keep": config.keep_checkpoints}),
        "keep_best": Entry(
            note="verl keeps the newest alone; keep all: max_actor_ckpt_to_keep=null"
        ),
        "log_completions": Entry(note="trainer.rollout_data_dir=FOLDER writes all of them"),
    }


def always(cluster: Cluster, name: str) -> dict[str, Any]:
    """The flags that follow from no option: the machines, the engines, and defaults that differ.

    Args:
        name: of the run, for its log.
    """
    flags: dict[str, Any] = {
        "model_engine": "megatron" if cluster.megatron else "dp",
        "trainer.nnodes": cluster.nodes,
        "trainer.n_gpus_per_node": cluster.gpus,
        "trainer.project_name": "pocket-grpo",
        "trainer.experiment_name": name,
        "trainer.logger": ["console", "tensorboard"],
        "trainer.use_v1": True,
        "data.shuffle": False,
        "data.prompt_key": "prompt",
        f"{ROLLOUT}.name": cluster.sampler,
        f"{ROLLOUT}.tensor_model_parallel_size": cluster.tensor_parallel,
        f"{ROLLOUT}.gpu_memory_utilization": 0.5,
    }
    if cluster.megatron:
        for part in (ACTOR, REF):
            flags[f"{part}.megatron.tensor_model_parallel_size"] = cluster.tensor_parallel
    return flags
