"""Options by the names of the tiny-grpo tutorial, TRL and verl: one sentence names ours.

Where the unit differs, the sentence says so.
"""

from support.errors import UserError

# Name: ours, and what differs.
TUTORIAL = {
    "num_rollouts": ("--group_size", ""),
    "max_length": (
        "--max_new_tokens",
        "completion tokens alone; --max_prompt_tokens are those of the prompt",
    ),
    "model_name": ("--model", ""),
    "gsm8k_path": ("--dataset", ""),
    "clip_epsilon": ("--clip_eps", ""),
    "grpo_epochs": ("--epochs_per_step", ""),
    "use_group_normalization": ("--advantage_std", "group or none"),
    "checkpoint_path": ("--run_dir", ""),
    "device_index": ("--device", "cuda, cpu or auto; CUDA_VISIBLE_DEVICES chooses the card"),
}
TRL = {
    "model_name_or_path": ("--model", ""),
    "dataset_name": ("--dataset", ""),
    "output_dir": ("--run_dir", ""),
    "num_generations": ("--group_size", ""),
    "num_generations_eval": ("--eval_samples", ""),
    "max_completion_length": ("--max_new_tokens", ""),
    "max_prompt_length": ("--max_prompt_tokens", "longer questions are left out, not cut"),
    "generation_batch_size": (
        "--rollouts_per_step",
        "which counts questions: completions divided by --group_size",
    ),
    "steps_per_generation": (
        "--train_batch_size",
        "sequences per optimizer step: rollouts_per_step × group_size divided by the steps",
    ),
    "per_device_train_batch_size": (
        "--micro_batch_size",
        "sequences per forward pass; --train_batch_size is all of an optimizer step",
    ),
    "gradient_accumulation_steps": (
        "--train_batch_size",
        "sequences per optimizer step: the steps times --micro_batch_size",
    ),
    "num_iterations": ("--epochs_per_step", ""),
    "beta": ("--kl_weight", ""),
    "epsilon": ("--clip_eps", ""),
    "epsilon_high": (
        "--clip_eps_high",
        "for TRL's cispo, whose epsilon_high is the cap itself, it is the cap minus 1",
    ),
    "delta": ("--clip_ratio_c", ""),
    "loss_type": ("--objective", "or --loss_agg_mode for the mean over tokens alone"),
    "scale_rewards": ("--advantage_std", "group, batch or none"),
    "importance_sampling_level": ("--ratio_level", ""),
    "mask_truncated_completions": ("--mask_truncated", ""),
    "top_entropy_quantile": ("--top_entropy", ""),
    "use_bias_correction_kl": ("--kl_estimator", "k3-ratio"),
    **dict.fromkeys(
        ("use_vllm", "vllm_mode", "vllm_server_base_url"),
        ("--rollout_url", "the address of a server, with adapters only; docs/served.md"),
    ),
    "vllm_importance_sampling_correction": ("--sampler_correction", ""),
    "vllm_importance_sampling_cap": ("--sampler_cap", ""),
    "reward_funcs": ("--reward", "names from reward.py, FILE.py:FUNCTION or model:NAME"),
    "learning_rate": ("--lr", ""),
    "max_grad_norm": ("--max_norm", ""),
    "warmup_ratio": ("--warmup_steps", "a number of steps"),
    "lr_scheduler_type": ("--warmup_steps", "after it the learning rate is constant"),
    "optim": ("--optimizer", "adamw or adamw_8bit"),
    "bf16": ("--precision", "bf16, bf16-pure or fp32"),
    "fp16": ("--precision", "bf16, bf16-pure or fp32"),
    "use_peft": ("--adapter_rank", "0 trains all weights"),
    "lora_r": ("--adapter_rank", ""),
    "lora_alpha": ("--adapter_alpha", ""),
    "lora_target_modules": ("--adapter_targets", ""),
    "load_in_4bit": ("--quantize", "4bit; NF4 with double quantization"),
    "max_steps": ("--steps", "rollouts, not optimizer steps"),
    "num_train_epochs": ("--steps", "rollouts of --rollouts_per_step questions"),
    "eval_steps": ("--eval_interval", "in rollouts, not optimizer steps"),
    "save_steps": ("--checkpoint_interval", "in rollouts, not optimizer steps"),
    "save_total_limit": ("--keep_checkpoints", ""),
    "num_completions_to_print": ("--log_completions", ""),
    "resume_from_checkpoint": ("--resume", "the folder of the run"),
}
VERL = {
    "data.train_batch_size": (
        "--rollouts_per_step",
        "questions; ours --train_batch_size counts sequences",
    ),
    "gen_batch_size": ("--rollouts_per_step", "questions"),
    "rollout.n": ("--group_size", ""),
    "rollout.name": (
        "--rollout_url",
        "the address of a vLLM server, with adapters only; docs/served.md",
    ),
    "rollout.temperature": ("--temperature", ""),
    "rollout.top_p": ("--top_p", ""),
    "max_response_length": ("--max_new_tokens", ""),
    "ppo_mini_batch_size": (
        "--train_batch_size",
        "which counts sequences: verl's questions times --group_size",
    ),
    "ppo_micro_batch_size_per_gpu": ("--micro_batch_size", "sequences"),
    "log_prob_micro_batch_size_per_gpu": (
        "--micro_batch_size",
        "sequences; ours takes 4 times as many",
    ),
    "ppo_epochs": ("--epochs_per_step", ""),
    "clip_ratio": ("--clip_eps", ""),
    "clip_ratio_low": ("--clip_eps", ""),
    "clip_ratio_high": ("--clip_eps_high", ""),
    "kl_loss_coef": ("--kl_weight", ""),
    "kl_coef": ("--kl_weight", "with --kl_in_reward"),
    "use_kl_loss": ("--kl_weight", "0 is no KL"),
    "kl_loss_type": ("--kl_estimator", ""),
    "kl_penalty": ("--kl_estimator", "with --kl_in_reward; a number is --kl_weight"),
    "use_kl_in_reward": ("--kl_in_reward", ""),
    "entropy_coeff": ("--entropy_weight", ""),
    "norm_adv_by_std_in_grpo": ("--advantage_std", "group or none"),
    "adv_estimator": ("--objective", ""),
    "policy_loss.loss_mode": ("--objective", ""),
    "optim.lr": ("--lr", ""),
    "lr_warmup_steps": ("--warmup_steps", ""),
    "grad_clip": ("--max_norm", ""),
    "model.path": ("--model", ""),
    "lora_rank": ("--adapter_rank", ""),
    "model.target_modules": ("--adapter_targets", ""),
    "train_files": ("--dataset", "a file, or a folder with train.* and test.*"),
    "val_files": ("--eval_dataset", ""),
    "total_training_steps": ("--steps", ""),
    "total_epochs": ("--steps", "rollouts of --rollouts_per_step questions"),
    "test_freq": ("--eval_interval", ""),
    "save_freq": ("--checkpoint_interval", ""),
    "default_local_dir": ("--run_dir", ""),
    "enable_gradient_checkpointing": ("--gradient_checkpointing", ""),
}
# GRPO-Zero, nano-aha-moment, nanochat, and whoever wrote PPO before.
OTHERS = {
    "num_answers_per_question": ("--group_size", ""),
    "num_samples": ("--group_size", ""),
    "num_questions_per_batch": ("--rollouts_per_step", ""),
    "batch_size": ("--train_batch_size", "sequences per optimizer step"),
    "num_epochs": ("--steps", "rollouts; --epochs_per_step are passes over one of them"),
    "epochs": ("--steps", "rollouts; --epochs_per_step are passes over one of them"),
    "num_steps": ("--steps", "rollouts, not optimizer steps"),
    "eps": ("--clip_eps", ""),
    "clip_range": ("--clip_eps", ""),
    "cliprange": ("--clip_eps", ""),
    "entropy_coef": ("--entropy_weight", ""),
    "data_path": ("--dataset", ""),
    "output": ("--run_dir", ""),
    "run_name": ("--run_dir", "a folder"),
}
OWNERS = {"the tutorial": TUTORIAL, "TRL": TRL, "verl": VERL, "another trainer": OTHERS}
# What others have and this project does not: why, or what to do.
DRAWN = "tokens are drawn from softmax(logits / --temperature), as they are trained; see --top_p"
ABSENT = {
    **dict.fromkeys(("top_k", "min_p", "repetition_penalty"), DRAWN),
    **dict.fromkeys(
        ("gamma", "lam", "vf_coef", "cliprange_value", "critic_warmup"),
        "GRPO has no value function",
    ),
    "lora_dropout": "the log-probabilities of sampling and of training would differ at random",
    **dict.fromkeys(("deepspeed", "fsdp"), "each GPU has the whole model; to_verl.py hands over"),
    **dict.fromkeys(("n_gpus_per_node", "nnodes"), "that is an option of torchrun"),
    **dict.fromkeys(
        ("report_to", "logging_steps", "wandb", "wandb_project", "logger"),
        "each step goes to TensorBoard and to a file",
    ),
}


def explain_foreign_option(argument: str) -> None:
    """UserError with our name for an option of the tutorial, of TRL or of verl; else nothing.

    Args:
        argument: as it was typed: `--num_generations=8`, `actor_rollout_ref.rollout.n=8`.
    """
    name = argument.split("=")[0].lstrip("-–—+").replace("-", "_")
    parts = name.split(".")
    # verl's names are paths; the last parts of them say enough.
    for ending in (".".join(parts[i:]) for i in range(len(parts))):
        for owner, options in OWNERS.items():
            if ending in options:
                ours, note = options[ending]
                note = f" ({note})" if note else ""
                raise UserError(f"{name} is the name that {owner} uses; here it is {ours}{note}.")
        if ending in ABSENT:
            raise UserError(f"There is no option {name} here: {ABSENT[ending]}; leave it out.")
