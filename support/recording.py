"""What report.py shows of a run: some completions of each step, with all numbers of their tokens.

The numbers are those of the update itself: hooks on the policy and on the loss keep the rows of the
chosen completions, and autograd hands over the gradient of the loss at their log-probabilities.
Only the part of it that comes from the policy term is computed again, by the loss's own function.
On a GPU nothing here waits for it before the step is over.
"""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from support import recording_file as lines
from support.distributed import exchange
from support.recording_file import MOST_GROUPS, MOST_TOKENS, RecordingFile
from support.recording_numbers import cut_row, keep_gradient, numbers_of

Place = tuple[int, int]  # of a completion: its group, and its place in there


class Recording:
    """The completions of a step that are recorded. Each process notes its part of them."""

    def __init__(self, run: Any) -> None:
        self.run = run
        self.file: RecordingFile | None = None  # of the first process
        self.handles = [
            run.policy.register_forward_pre_hook(self.find),
            run.loss.register_forward_hook(self.note),
            run.optimizer.register_step_post_hook(self.count),
        ]
        self.forget()

    def open(self, run_dir: Path, start_step: int) -> None:
        """Write to the run's file; what a resumed run had written after `start_step` goes."""
        config = self.run.config
        self.file = RecordingFile(run_dir, start_step, config.steps, config.eval_interval)

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self.handles:
            handle.remove()

    def forget(self) -> None:
        """Begin a new step."""
        self.rollout: dict[str, Any] = {}  # what `choose` has found
        self.answers: list[dict[str, Any]] = []
        self.wanted: dict[tuple[int, int], list] = {}  # by the lengths of sequence and completion
        self.rows: list[tuple[int, int, Place]] = []  # of the present micro-batch
        self.noted: dict[tuple[Place, int], dict[str, Any]] = {}
        self.updates = 0  # optimizer steps so far

    # ------------------------------------------------------------------------- during the step

    def choose(self, groups: list[Any], advantages: Tensor, places: list[Place], step: int) -> None:
        """Before the updates of a step: record the completions at `places`, and what they met.

        Args:
            advantages: float (Q, G), of all completions of `groups`.
        """
        self.forget()
        if self.file is not None and not self.file.keeps("groups", step):
            return
        idle = [(q, 0) for q, row in enumerate(advantages) if not row.any()][:1]
        places = list(dict.fromkeys([*places, *idle]))  # one that teaches nothing, too
        shown = list(dict.fromkeys([*(q for q, _ in places), *range(len(groups))]))[:MOST_GROUPS]
        names = list(self.run.rewards)
        described = [lines.group_of(q, groups[q], advantages[q], names) for q in sorted(shown)]
        completions, room = {}, MOST_TOKENS
        for q, i in places:
            prompt, ids = groups[q].question.prompt_ids, groups[q].completions[i].ids
            room -= len(ids)
            if room < 0:
                break
            completions[q, i] = {"group": q, "index": i}
            completions[q, i] |= lines.completion_of(groups[q], i, self.run.tokenizer)
            wanted = (q, i), [*prompt, *ids], float(advantages[q, i])
            self.wanted.setdefault((len(prompt) + len(ids), len(ids)), []).append(wanted)
        self.rollout = {"groups": described, "all": len(groups), "completions": completions}

    def find(self, policy: Any, arguments: tuple[Any, ...]) -> None:
        """Before a forward pass: which rows of the micro-batch are recorded."""
        self.rows = []
        if not (self.wanted and torch.is_grad_enabled()):
            return
        batch = arguments[0]  # on the CPU
        start = batch.sequences.shape[-1] - batch.num_actions  # where the completions begin
        lengths = [mask.sum(dim=-1).tolist() for mask in (batch.attention_mask, batch.action_mask)]
        for i, (length, count) in enumerate(zip(*lengths, strict=True)):
            for place, ids, advantage in self.wanted.get((length, count), ()):
                tokens = batch.sequences[i, start + count - length : start + count].tolist()
                if tokens == ids and float(batch.advantages[i]) == advantage:
                    self.rows.append((i, count, place))

    def note(self, loss: Any, arguments: tuple[Any, ...], output: Any) -> None:
        """After the loss of a micro-batch: keep its rows, and their gradient when it comes."""
        log_probs, batch, _, entropies, *exact_kl = arguments
        rows, self.rows = self.rows, []
        for i, count, place in rows if log_probs.requires_grad else ():
            cut = partial(cut_row, i, count)
            fields = {name: cut(t) for name, t in vars(batch).items() if t is not None}
            noted = {"row": replace(batch, **fields), "log_probs": cut(log_probs)}
            noted |= {"entropies": cut(entropies), "exact_kl": [cut(kl) for kl in exact_kl]}
            # Written again where a micro-batch was too large for the memory, and came again.
            self.noted[place, self.updates] = noted
            log_probs.register_hook(partial(keep_gradient, noted, cut))

    def count(self, *arguments: Any) -> None:
        """After an optimizer step."""
        self.updates += 1

    def keep_answers(self, groups: list[Any]) -> None:
        """Of an evaluation: the greedy answers to its first questions."""
        found = groups[: self.run.config.log_completions]
        self.answers = [lines.question_of(g) | lines.completion_of(g, 0) for g in found]

    # -------------------------------------------------------------------------- after the step

    def write(self, step: int) -> None:
        """Write what was kept of a step; every process calls this, and the first one writes."""
        numbers: dict[tuple[Place, int], dict[str, Any]] = {}
        for part in exchange(self.take):
            numbers |= part
        rollout, answers = self.rollout, self.answers
        self.forget()
        if self.file is None:
            return
        if answers:
            self.file.append("answers", step, {"answers": answers})
        if rollout:
            completions = rollout["completions"]
            room = MOST_TOKENS
            for (place, update), found in sorted(numbers.items(), key=lambda each: each[0][::-1]):
                room -= len(found["log_probs"])
                updates = completions[place].setdefault("updates", [])
                updates += [{"update": update + 1, **found}] if room >= 0 else []
            rollout["completions"] = list(completions.values())
            self.file.append("groups", step, {"objective": asdict(self.run.objective), **rollout})

    def take(self) -> dict[tuple[Place, int], dict[str, Any]]:
        """The numbers that this process has noted."""
        return {key: numbers_of(self.run.loss, **noted) for key, noted in self.noted.items()}
