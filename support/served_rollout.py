"""Completions from a vLLM server, which is given the policy's adapters under a new name each time.

    python train.py --adapter_rank 16 --rollout_url http://localhost:8000       (docs/served.md)

`ServedModel` stands where a rollout has its model. Before a rollout the adapters are written to a
folder, and the server loads them beside its own copy of the base model. The name is new each time:
vLLM keeps an adapter by its name, and goes on with the weights that it has. Then a few tokens are
sampled and the policy is asked about them, so no step is trained on completions of other weights.
A request states everything that shapes the distribution, since a server fills what is left open
from the model's own generation settings.

Not reproducible: which tokens the server draws depends on what it computes together. The sampled
distribution is the same, and each completion has the log-probabilities that it was drawn with.
"""

import math
import shutil
import tempfile
import uuid
import weakref
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from support.alarms import FP32_GAP
from support.config import Config
from support.distributed import on_main
from support.errors import UserError, is_of_the_disk
from support.model import pad_rows
from support.server import Server

PROMPTS, TOKENS = 4, 16  # that a hand-over is measured on, and tokens of each completion
# Nats for a token. Rounding is 1e-6 in fp32; in bf16 0.05, and two programs round differently.
GAP = {"fp32": FP32_GAP, "bf16": 0.3, "bf16-pure": 0.3}
# In place of the model's own settings; and only our end tokens end a completion.
PLAIN = {
    **{"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0},
    **{"frequency_penalty": 0.0, "min_tokens": 0, "ignore_eos": True, "return_token_ids": True},
}
Row = tuple[list[int], list[float]]  # the tokens of a completion, and their log-probabilities


class ServedModel:
    """The policy as a server has it.

    Args:
        policy: its adapters are handed over, and it is asked about a few tokens after that.
    Raises:
        UserError: there is no such server, or it reads fewer tokens than the run needs.
    """

    def __init__(self, policy: Any, config: Config) -> None:
        url = config.rollout_url.rstrip("/").removesuffix("/v1")
        self.policy, self.server = policy, Server(url, config.rollout_timeout)
        self.limit = GAP[config.precision] / min(1.0, config.temperature)  # nats
        self.name = self.checked = ""  # the adapter that is asked, and the last one that was tried
        self.given: list[torch.Tensor] = []  # its weights
        self.run, self.count = uuid.uuid4().hex[:8], 0  # not by the seed: that repeats itself
        self.tokens = policy.model.get_input_embeddings().num_embeddings
        self.folder = Path(tempfile.mkdtemp(prefix="adapters-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        needed = config.max_prompt_tokens + config.max_new_tokens
        try:
            found = self.server.ask("/v1/models", again=False)["data"][0]
            most = found.get("max_model_len") or needed
        except (LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"There is no vLLM server at {url}; --rollout_url needs one."
            ) from error
        if most < needed:
            raise UserError(
                f"The server at {url} reads {most} tokens at the most, and --max_prompt_tokens and "
                f"--max_new_tokens are {needed} together; start it with --max-model-len {needed}."
            )

    @property
    def generation_config(self) -> Any:
        """The policy's, which has the end tokens."""
        return self.policy.model.generation_config

    def with_present_weights(self) -> "ServedModel":
        """Hand the adapters over if they have changed; the first of several processes does it."""
        self.name = on_main(self.hand_over)
        return self

    def hand_over(self) -> str:
        """The name of an adapter at the server that is the policy's; the one before is unloaded."""
        model, old = self.policy.model, self.name
        weights = [p.detach().cpu().clone() for p in model.parameters() if p.requires_grad]
        if old and all(map(torch.equal, weights, self.given)):
            return old
        self.count += 1
        name = f"{self.run}-{self.count}"
        folder = self.folder / name
        try:
            model.save_pretrained(folder)
        except Exception as error:  # safetensors has a kind of its own for a full disk
            if not is_of_the_disk(error):
                raise
            raise UserError(
                f"Cannot write the adapters to {folder} ({error}); make room there, or name "
                "another place in TMPDIR."
            ) from error
        load(self.server, name, folder)
        if old:
            self.unload()
            shutil.rmtree(self.folder / old, ignore_errors=True)
        self.given, self.unload = weights, weakref.finalize(self, unload, self.server, name)
        return name

    def generate(
        self, batch: list[tuple[list[int], Any]], sampling: Any, settings: Any
    ) -> list[Row]:
        """As `generate` of support/generation.py; the seeds in the batch are not used."""
        prompts, ends = [prompt for prompt, _ in batch], settings.eos_token_id
        if self.checked != self.name:
            ranked = sorted(prompts, key=len)
            self.check([*ranked[: PROMPTS // 2], *ranked[-PROMPTS // 2 :]], sampling, ends)
            self.checked = self.name
        return self.complete(prompts, sampling, ends)

    def complete(self, prompts: list[list[int]], sampling: Any, ends: list[int]) -> list[Row]:
        """One completion for each prompt (token ids); log-probabilities unless it is greedy."""
        greedy, most = sampling.temperature == 0, sampling.max_new_tokens
        body = {"model": self.name, "prompt": prompts, "max_tokens": most, "stop_token_ids": ends}
        body |= {"temperature": float(sampling.temperature), "top_p": sampling.top_p, **PLAIN}
        if not greedy:
            body["logprobs"] = 0  # of the sampled token alone
        try:
            answer = self.server.ask("/v1/completions", body)
        except UserError as error:
            if f"`{self.name}` does not exist" not in str(error):
                raise
            raise UserError(
                f"{error} It was started again, or another program has unloaded the adapter."
            ) from error
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            found = [[] if greedy else c["logprobs"]["token_logprobs"] for c in choices]
            rows = list(zip((c["token_ids"] for c in choices), found, strict=True))
            faults = [find_fault(*row, greedy, most, ends, self.tokens) for row in rows]
        except (LookupError, TypeError, AttributeError) as error:
            rows, faults = [], [f"they are not in vLLM's format ({type(error).__name__}: {error})"]
        if len(rows) != len(prompts):
            faults.append(f"there are {len(rows)} for {len(prompts)} prompts")
        for fault in filter(None, faults):
            raise UserError(
                f"The completions of the server at {self.server.url} cannot be trained on: "
                f"{fault}; look into its log (docs/served.md)."
            )
        return rows

    def check(self, prompts: list[list[int]], sampling: Any, ends: list[int]) -> None:
        """Sample a few tokens and ask the policy about them; UserError if it does not agree.

        With the policy's own temperature and without a nucleus, which it does not know of.
        """
        few, temperature = min(TOKENS, sampling.max_new_tokens), self.policy.temperature
        settings = replace(sampling, max_new_tokens=few, temperature=temperature, top_p=1.0)
        rows = self.complete(prompts, settings, ends)
        padded = pad_rows([(prompt, ids) for prompt, (ids, _) in zip(prompts, rows, strict=True)])
        batch = dict(zip(("sequences", "attention_mask", "num_actions"), padded, strict=True))
        with torch.no_grad():
            said = self.policy(SimpleNamespace(**batch))[0].float().cpu()
        gaps = [
            (own[: len(drawn)] - torch.tensor(drawn)).abs()
            for own, (_, drawn) in zip(said, rows, strict=True)
        ]
        gap = torch.cat(gaps).mean().item()
        if not gap <= self.limit:
            raise UserError(
                f"The server at {self.server.url} samples from other weights than it was given, or "
                f"in another way: its log-probabilities are {gap:.2g} nats per token from the "
                f"policy's, and at most {self.limit:.2g} would be rounding. It needs the base "
                "model and the precision of this run, and --logprobs-mode processed_logprobs "
                "(docs/served.md)."
            )


def find_fault(
    ids: list, log_probs: list, greedy: bool, most: int, ends: list[int], tokens: int
) -> str:
    """What is wrong with a completion, in a few words; or "".

    Args:
        most: tokens that were asked for. tokens: how many different ones the model knows.
    """
    if not 0 < len(ids) <= most:
        return f"one has {len(ids)} tokens, where 1 to {most} were asked for"
    if not all(isinstance(token, int) and 0 <= token < tokens for token in ids):
        return f"one has a token that is none of this model's {tokens}"
    if len(ids) < most and ids[-1] not in ends:
        return f"one has stopped after {len(ids)} of {most} tokens without an end token"
    if not greedy and len(log_probs) != len(ids):
        return f"one has {len(ids)} tokens and {len(log_probs)} log-probabilities"
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in log_probs):
        return "a log-probability is not a finite number"
    return ""


def load(server: Server, name: str, folder: Path) -> None:
    """Let a server load the adapter in a folder."""
    try:
        server.ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
    except UserError as error:
        if f"'{name}' has already been loaded" in str(error):
            return  # by the same request before, whose answer was lost
        raise UserError(
            f"{error} The adapters cannot be handed over: it must have been started with "
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, --enable-lora and --max-lora-rank, and see the "
            "folder of the adapters (docs/served.md)."
        ) from error


def unload(server: Server, name: str) -> None:
    """Let a server forget an adapter; where it does not, it only remembers one more."""
    with suppress(UserError):
        soon = replace(server, timeout=min(server.timeout, 10.0))
        soon.ask("/v1/unload_lora_adapter", {"lora_name": name}, again=False)
