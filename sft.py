"""Supervised warm start: teach a model the answer format, from worked solutions, before GRPO.

    python sft.py --model Qwen/Qwen2.5-0.5B --steps 200 --lr 1e-5 --run_dir runs/warm     then
    python train.py --model runs/warm/model

Each example is a question's prompt and the completion that the dataset's own solution makes:
`<think>` the solution `</think> <answer>` the final answer `</answer>`. A column `completion` in
the dataset is used as it stands instead. The loss is the mean negative log-likelihood of all
completion tokens of an optimizer step; the learning rate rises over warmup_steps and falls linearly
to 0. The options are those of train.py; those of rollout, reward, objective and evaluation do
nothing here.
"""

import re
from typing import Any

import torch
from accelerate.utils import set_seed
from safetensors import SafetensorError

from loss import sequences_log_probs
from objectives.equations import token_weights
from objectives.table import NAMES
from replay_buffer import Experience, batches, pad_batch
from support.checkpoint import new_run_dir
from support.command_line import parse_config
from support.config import Config, resolve_path
from support.data import Question, QuestionStream, load_questions
from support.errors import UserError, command, quoted
from support.files import open_to_readers, removed_on_failure
from support.model import build_accelerator, build_optimizer, load_to_train, load_tokenizer
from support.model_card import save_tokenizer
from support.monitor import progress
from support.policy import Policy
from support.preflight import check_model
from support.prompts import with_prompts

CALCULATOR = re.compile(r"<<[^<>]*>>")  # GSM8K's annotations: 48/2 = <<48/2=24>>24


def target(question: Question) -> str:
    """The completion to imitate; without the tag that the prompt has opened already."""
    if "completion" in question.columns:
        return question.columns["completion"]
    solution = CALCULATOR.sub("", question.solution)
    text = f"<think>{solution}</think>\n<answer>{question.reference}</answer>"
    return text.removeprefix(question.opened.strip())


def example(question: Question, tokenizer: Any, max_new_tokens: int) -> Experience:
    """Prompt and target as tokens, the end token included unless the target is cut off."""
    ids = tokenizer(target(question), add_special_tokens=False)["input_ids"]
    ids.append(tokenizer.eos_token_id)
    return Experience.of(question.prompt_ids, ids[:max_new_tokens])


def fit(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    tokenizer: Any,
    stream: QuestionStream,
    config: Config,
) -> None:
    """`config.steps` optimizer steps on the next questions of `stream`."""
    policy.train()
    bar = progress(range(config.steps), "supervised")
    for step in bar:
        rise, fall = (step + 1) / max(1, config.warmup_steps), 1 - step / config.steps
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, rise) * fall
        questions = stream.take(config.train_batch_size)
        examples = [example(question, tokenizer, config.max_new_tokens) for question in questions]
        weights = token_weights([e.num_actions for e in examples], "token-mean")
        total = 0.0
        # `auto` would be all of them, and nothing here halves it.
        for chosen in batches(
            list(zip(examples, weights, strict=True)), config.micro_batch_size or 4
        ):
            batch = pad_batch([e for e, _ in chosen])
            log_probs, *_ = policy(batch)
            per_sequence = torch.where(batch.action_mask.to(policy.device), log_probs, 0.0).sum(
                dim=-1
            )
            loss = -(torch.stack([w for _, w in chosen]).to(policy.device) * per_sequence).sum()
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_norm)
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, config.steps // 10) == 0 or step == config.steps - 1:
            bar.write(f"step {step + 1}/{config.steps} | loss {total:.3f}")
    policy.eval()


@command
def main(argv: list[str]) -> None:
    """Train on the solutions of `config.dataset`, then write <run_dir>/model."""
    config, others = parse_config(argv, __doc__, NAMES)
    if others["resume"]:
        raise UserError("sft.py cannot resume, it is short: start again, in another --run_dir.")
    accelerator = build_accelerator(config)
    questions = load_questions(resolve_path(config.dataset), "train", config)
    tokenizer = load_tokenizer(config.model)
    set_seed(config.seed)
    model = load_to_train(config)
    check_model(model, tokenizer, config, sequences_log_probs)
    policy = Policy(model, sequences_log_probs)
    questions, dropped = with_prompts(questions, tokenizer, config)
    for question in questions:
        if not isinstance(target(question), str) or not target(question).strip():
            raise UserError(
                f"The completion of {question.question[:60]!r} is empty or is not text; write it "
                "out."
            )
    print(
        f"{len(questions)} examples; {dropped} left out: prompt longer than "
        f"{config.max_prompt_tokens} tokens"
    )
    folder, _held = new_run_dir(config, resumable=False)
    policy = accelerator.prepare_model(policy)
    optimizer = build_optimizer(policy.model, config)
    with removed_on_failure(folder):
        fit(policy, optimizer, tokenizer, QuestionStream(questions, config.seed), config)
        try:
            model.save_pretrained(folder / "model")
            open_to_readers(folder)
            save_tokenizer(folder / "model", tokenizer, config)
            config.save(folder / "model" / "config.yaml")
        except (OSError, SafetensorError) as error:
            raise UserError(f"Cannot write {folder / 'model'}: {error}.") from error
    print(
        f"written: {folder / 'model'}   go on: python train.py --model {quoted(folder / 'model')} "
        "with the options of your run"
    )


if __name__ == "__main__":
    main()
