"""A cache that grows in place, beside the one that the rollout has: is it faster?

    python benchmarks/growing_cache.py                                        the bundled model
    python benchmarks/growing_cache.py --model FOLDER --dataset GSM8K --questions 4 --tokens 32

transformers' dynamic cache makes new tensors for all keys and values at each token. `GrowingLayer`
writes a new token behind the old ones, and copies only when its room is used up. The two take
turns, each time in a process of its own (what one leaves of the memory changes the other); a turn's
first rollout is not counted. Seconds are those of the process, so that other work does not count.
The tokens and their log-probabilities must be the same, bit for bit.
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from common import machine, positive, table, versions
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from rollout import rollout
from support import generation
from support.config import Config, resolve_path
from support.errors import UserError, command
from support.generation import Sampling
from support.model import load_model, load_tokenizer
from support.prompts import training_questions

ROOM = 64  # tokens that fit in before all is copied again


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer, as the front part of larger tensors."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The keys and values, (B, heads, tokens, size), with those of new tokens behind them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffers: dict[str, Tensor] = {}
        self.keys = self.append("keys", self.keys, key_states)
        self.values = self.append("values", self.values, value_states)
        return self.keys, self.values

    def append(self, name: str, held: Tensor, new: Tensor) -> Tensor:
        """`new` written behind `held`, in the same memory where there is room."""
        if held.numel() == 0:
            return new
        before, after = held.shape[-2], held.shape[-2] + new.shape[-2]
        buffer = self.buffers.get(name)
        own = buffer is not None and buffer.data_ptr() == held.data_ptr()  # else rows were taken
        if not own or buffer.shape[-2] < after:
            buffer = held.new_empty((*held.shape[:-2], after + ROOM, held.shape[-1]))
            buffer[..., :before, :] = held
            self.buffers[name] = buffer
        buffer[..., before:after, :] = new
        return buffer[..., :after, :]


def turn(args: argparse.Namespace, growing: bool) -> None:
    """Some rollouts in this process; prints their seconds and a hash of what was sampled."""
    if growing:
        prompt_cache = generation.prompt_cache

        def grown(*arguments: Any) -> Any:
            cache = prompt_cache(*arguments)
            for layer in cache.layers:
                if type(layer) is DynamicLayer:
                    layer.__class__, layer.buffers = GrowingLayer, {}
            return cache

        generation.prompt_cache = grown
    torch.set_num_threads(args.threads)
    config = Config(model=args.model, dataset=resolve_path(args.dataset), system_prompt="")
    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model, args.precision).eval()
    questions = training_questions(config, tokenizer)[: args.questions]
    seconds, said = [], hashlib.sha256()
    for _ in range(args.rollouts + 1):
        torch.manual_seed(0)
        start = time.process_time()
        sampling = Sampling(args.tokens, batch_size=384)
        groups = rollout(model, tokenizer, questions, args.group_size, sampling)
        seconds.append(time.process_time() - start)
        said.update(repr([(c.ids, c.log_probs) for g in groups for c in g.completions]).encode())
    print(json.dumps({"seconds": seconds[1:], "said": said.hexdigest()}))


@command
def main(argv: list[str]) -> None:
    """Turns of both, and their table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny/model")
    parser.add_argument("--dataset", default="tiny/task")
    parser.add_argument("--precision", default="fp32", help="fp32 or bf16-pure")
    parser.add_argument("--questions", type=positive, default=32)
    parser.add_argument("--group_size", type=positive, default=8)
    parser.add_argument("--tokens", type=positive, default=48)
    parser.add_argument("--rollouts", type=positive, default=5, help="in a turn")
    parser.add_argument("--turns", type=positive, default=5)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--only", choices=("cat", "grow"), help="one turn, in this process")
    args = parser.parse_args(argv)
    if args.only:
        turn(args, args.only == "grow")
        return
    found: dict[str, list[float]] = {"cat": [], "grow": []}
    said = set()
    for _ in range(args.turns):
        for name, values in found.items():
            line = [sys.executable, __file__, *argv, "--only", name]
            out = subprocess.run(line, check=True, capture_output=True, text=True).stdout
            row = json.loads(out.splitlines()[-1])
            values.append(statistics.median(row["seconds"]))
            said.add(row["said"])
    if len(said) != 1:
        raise UserError("The two have sampled different tokens, or other log-probabilities.")
    ratios = [a / b for a, b in zip(found["cat"], found["grow"], strict=True)]
    rows = [
        [name, f"{statistics.median(values):.3f}", f"{min(values):.3f}–{max(values):.3f}"]
        for name, values in found.items()
    ]
    print(f"{machine()}; {versions()}; {args.threads} thread\n")
    print("\n".join(table(["cache", "seconds of a rollout, median", "of the turns"], rows)))
    low, high = min(ratios), max(ratios)
    print(f"\ncat ÷ grow: {statistics.median(ratios):.2f} ({low:.2f}–{high:.2f}); same tokens")


if __name__ == "__main__":
    main()
