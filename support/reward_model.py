"""A learned reward: `--reward model:NAME`, a language model with one number as its answer.

The *judge* is a sequence classifier of transformers with one label, from the hub or a folder, as
TRL's RewardTrainer and most reward models on the hub are. It reads what TRL's GRPOTrainer would
give it: system prompt, question and completion as messages, in the judge's own chat template (with
the token that ends an answer) and not in the policy's.

It is on the policy's device, in bf16 on a GPU and in fp32 elsewhere. --reward_timeout counts for it
as for every reward: raise it for a large judge. The limit can only be kept between two operations
on a CPU, and on a GPU it is noticed when the work that is under way has been done.
"""

import math
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from support.config import check_place, resolve_path
from support.errors import UserError
from support.memory import MicroBatch

BATCH = 64  # texts in a forward pass; fewer where the memory is full


class RewardModel:
    """A reward function: the judge's number for each completion, None where it has none."""

    def __init__(self, name: str, device: Any = "cpu") -> None:
        self.tokenizer, self.judge = load_judge(name, torch.device(device))
        self.takes_system = takes_system(self.tokenizer)
        self.longest = getattr(self.judge.config, "max_position_embeddings", None) or math.inf
        self.batch = MicroBatch(BATCH)

    def __call__(
        self, prompts: list[list[dict]], completions: list[list[dict]], **columns: Any
    ) -> list[float | None]:
        """Scores of prompts and completions that are lists of messages.

        None for a text that is longer than the judge can read, and where it computes no number.
        """
        ids = self.tokens([[*p, *c] for p, c in zip(prompts, completions, strict=True)])
        readable = [i for i, row in enumerate(ids) if 0 < len(row) <= self.longest]
        readable.sort(key=lambda i: len(ids[i]))  # neighbours are of similar length
        scores: list[float | None] = [None] * len(ids)
        found = self.batch.halve_on_oom(lambda size: self.scores([ids[i] for i in readable], size))
        for i, value in zip(readable, found, strict=True):
            scores[i] = value if math.isfinite(value) else None
        return scores

    def tokens(self, chats: list[list[dict]]) -> list[list[int]]:
        """Chats as the judge reads them: in its own template, which writes the special tokens."""
        if not self.takes_system:
            chats = [without_system(chat) for chat in chats]
        texts = [self.tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def logits(self, rows: list[list[int]]) -> torch.Tensor:
        """The judge's number for each row of tokens, padded on the right, float32 (N,)."""
        inputs = self.tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
        return self.judge(**inputs.to(self.judge.device)).logits[:, 0].float()

    @torch.no_grad()
    def scores(self, ids: list[list[int]], size: int) -> list[float]:
        """The judge's numbers for rows of tokens, `size` rows at a time."""
        found = []
        for start in range(0, len(ids), size):
            found += self.logits(ids[start : start + size]).tolist()
        return found


def load_judge(name: str, device: torch.device) -> tuple[Any, Any]:
    """Tokenizer and model of a judge; UserError for what is none."""
    check_place(name, "--reward model:")
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # missing keys are said in a sentence
    try:
        config = AutoConfig.from_pretrained(resolve_path(name), trust_remote_code=False)
        check_judge(name, config)
        tokenizer = AutoTokenizer.from_pretrained(resolve_path(name), trust_remote_code=False)
        judge, found = AutoModelForSequenceClassification.from_pretrained(
            resolve_path(name),
            config=config,
            dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except UserError:
        raise
    except Exception as error:  # transformers raises many kinds for a damaged file
        raise UserError(
            f"Cannot load the reward model {name!r} ({' '.join(str(error).split())[:200]}); "
            "--reward model:NAME takes a hub name or a folder, with safetensors weights."
        ) from error
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
    if found["missing_keys"]:
        raise UserError(
            f"The reward model {name} lacks {min(found['missing_keys'])}, which would be random "
            "numbers; choose one that was saved whole."
        )
    if not tokenizer.chat_template:
        raise UserError(
            f"The reward model {name} has no chat template, so how it reads a question and its "
            "answer is not known; choose one whose tokenizer has a template."
        )
    # TRL's: the score is read at the last token that is not padding, also where the end pads.
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    judge.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return tokenizer, judge.to(device).requires_grad_(False)  # in eval mode


def takes_system(tokenizer: Any) -> bool:
    """Whether a chat template has a place for a system prompt; Gemma's, for one, has none."""
    chat = [{"role": role, "content": "a"} for role in ("system", "user", "assistant")]
    try:
        tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception:  # a template raises what it likes
        return False
    return True


def without_system(chat: list[dict]) -> list[dict]:
    """A chat whose system prompt stands at the beginning of the question instead."""
    if chat[0]["role"] != "system":
        return chat
    joined = f"{chat[0]['content']}\n\n{chat[1]['content']}"
    return [{"role": "user", "content": joined}, *chat[2:]]


def check_judge(name: str, config: Any) -> None:
    """UserError for a model that is no sequence classifier with one label."""
    kinds = config.architectures or ["an unknown kind"]
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise UserError(
            f"{name} is no reward model but {kinds[0]}, and would get a head of random numbers; "
            "--reward model:NAME takes a sequence classifier with one label."
        )
    if config.num_labels != 1:
        raise UserError(
            f"{name} has {config.num_labels} labels, and a reward is one number; --reward "
            "model:NAME takes a sequence classifier with one label."
        )
