"""Several processes, one for each GPU: each does a part of the work, and all know every result.

    torchrun --nproc_per_node 4 train.py            four GPUs; with --device cpu, four processes

`share_out` splits a list, and gives every process the results of all parts, in order. That is how
completions are sampled and scored, how log-probabilities are computed, and gradients. All that
follows from them (advantages, token weights, the order of mini-batches) each process computes from
the same numbers. So the loss is the mean over all completions however they were split, and nothing
in a checkpoint depends on the number of processes.

Beside gradients only one thing is exchanged: a result with an error, of every process. So an error
in one of them reaches the others wherever they are, and none waits for it. It is not done with
`DistributedDataParallel`, which takes the mean of local means: wrong by some percent where the
parts are unequal, and they always are (completions without a gradient are left out).
"""

import atexit
import hashlib
import io
import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import distributed as dist
from torch import nn

from support.config import Config
from support.errors import UserError, is_launched, silence

Item, Result = TypeVar("Item"), TypeVar("Result")

LAUNCHER = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LONGEST = timedelta(hours=2)  # that one process works alone, rewards not counted


class SharedError(UserError):
    """An error that every process has raised; the first one says it."""

    shared = True


def num_processes() -> int:
    """How many processes there are in the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


@contextmanager
def processes(config: Config) -> Iterator[None]:
    """Connect the processes that a launcher has started, if it has; a UserError of one ends all.

    Raises:
        UserError: there are fewer GPUs than processes, or no launcher has started them.
    """
    if not is_launched():
        yield
        return
    if not dist.is_initialized():
        connect(config)
    try:
        try:
            yield
            gather((None, None))  # an error at the end of another process must find this one here
        except SharedError:
            raise
        except UserError as error:
            gather((None, str(error)))
    except SharedError:
        atexit.register(farewell)
        raise


def connect(config: Config) -> None:
    """Open the process group; only the first process prints from here on."""
    missing = [name for name in LAUNCHER if not os.environ.get(name)]
    if missing or not os.environ["WORLD_SIZE"].isdecimal():
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and {' '.join(missing) or 'the rest'} is "
            "not set as a launcher does it; start several processes with torchrun "
            "--nproc_per_node N train.py, or unset WORLD_SIZE."
        )
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if on_gpu and here > gpus:
        raise UserError(
            f"{here} processes were started, and this machine has {gpus} GPUs: start one for each "
            f"GPU (torchrun --nproc_per_node {gpus} train.py)."
        )
    # Objects travel over gloo also where there are GPUs, and gradients over NCCL. The others wait
    # while one process asks its rewards, or the first one writes a checkpoint.
    rewards = len(config.reward) * (config.reward_timeout or timedelta(days=30).total_seconds())
    patience = LONGEST + timedelta(seconds=rewards)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=patience)
    atexit.register(dist.destroy_process_group)  # another run of this process may come before
    if not is_main():
        silence()


def farewell() -> None:
    """Wait for the others before this process ends with an error.

    A launcher ends all processes as soon as one has failed, also the first one while it saves.
    """
    with suppress(Exception):  # they may have ended already
        dist.all_gather_object([None] * num_processes(), None)


def share_out(
    items: list[Item],
    work: Callable[[list[Item]], list[Result]],
    costs: list[int] | None = None,
    together: int = 1,
) -> list[Result]:
    """`work(items)`, of which each process does a part; every process gets all results, in order.

    A result's tensors come from another process on the CPU.

    Args:
        work: gives any number of results for some neighbouring items; it is not called for none.
        costs: of each item, to give each process about the same sum; None: all alike.
        together: so many neighbours stay in one part.
    Raises:
        UserError: `work` failed in any of the processes.
    """
    if num_processes() == 1:
        return work(items)
    costs = costs or [1] * (len(items) // together)
    mine = my_part(costs, dist.get_rank(), num_processes())
    part = items[mine.start * together : mine.stop * together]
    results = exchange(lambda: work(part) if part else [])
    return [result for some in results for result in some]


def my_part(costs: list[int], rank: int, count: int) -> slice:
    """Which items process `rank` of `count` does: those whose middle lies in its share of the sum.

    Neighbours, so that completions of one prompt mostly stay together. Each item is in one part.
    """
    total = sum(costs)
    middles = [end - cost / 2 for end, cost in zip(accumulate(costs), costs, strict=True)]
    owners = [int(count * middle / total) for middle in middles]
    return slice(bisect_left(owners, rank), bisect_right(owners, rank))


def exchange(work: Callable[[], Result]) -> list[Result]:
    """What `work` returns in each process; UserError in all of them if it fails in one."""
    if num_processes() == 1:
        return [work()]
    try:
        return gather((work(), None))
    except SharedError:
        raise
    except UserError as error:
        return gather((None, str(error)))


def on_main(work: Callable[[], Result]) -> Result:
    """What `work` returns in the first process, which alone does it; UserError in all."""
    return exchange(work if is_main() else lambda: None)[0]


def gather(mine: tuple[Any, str | None]) -> list[Any]:
    """A result and an error of each process: all results, or UserError with the first error."""
    buffer, parts = io.BytesIO(), [b""] * num_processes()
    torch.save(mine, buffer)
    with others_alive():
        dist.all_gather_object(parts, buffer.getvalue())
    # Made by this program a moment ago, so it may hold more than tensors.
    found = [torch.load(io.BytesIO(part), map_location="cpu", weights_only=False) for part in parts]
    for _, error in found:
        if error:
            raise SharedError(error)
    return [result for result, _ in found]


@contextmanager
def others_alive() -> Iterator[None]:
    """Around what waits for the other processes: a sentence if one of them has ended."""
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        reason = " ".join(str(error).split())[:120]
        raise SharedError(
            f"Another process has ended, or has not answered for hours ({reason}); the reason "
            "stands above, or in its own output. If a checkpoint was saved, go on with --resume."
        ) from error


def add_up_gradients(model: nn.Module) -> None:
    """Replace each gradient by its sum over the processes, which is the same in all of them.

    A parameter that no process has a gradient for keeps none, as in a single process.
    """
    if num_processes() == 1:
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    present = exchange(lambda: [p.grad is not None for p in parameters])
    wanted = [p for p, *there in zip(parameters, *present, strict=True) if any(there)]
    for parameter in wanted:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    with others_alive():
        for work in [dist.all_reduce(p.grad, async_op=True) for p in wanted]:
            work.wait()


def in_any(flag: bool) -> bool:
    """Whether the flag is true in any of the processes."""
    return any(exchange(lambda: flag))


def check_equal(what: str, find: Callable[[], Any]) -> None:
    """UserError if the processes do not find the same numbers or texts, bit for bit."""
    first, *others = exchange(lambda: repr(find())) if num_processes() > 1 else [""]
    if any(numbers != first for numbers in others):  # as text, where NaN is NaN
        raise UserError(
            f"The processes differ in {what}, so they would not train one model: the same options, "
            "files, packages and kind of GPU are needed in all of them."
        )


def check_alike(run: Any) -> None:
    """UserError if the processes of a run would not do the same, before any of them begins."""
    config = {name: value for name, value in vars(run.config).items() if name != "device"}
    check_equal("their options", lambda: sorted(config.items()))
    check_equal("the step to go on from", lambda: (run.start_step, run.questions.position))
    asked = [q.prompt_ids for q in (*run.questions.questions, *run.held_out)]
    check_equal("the questions", lambda: hashlib.sha256(repr(asked).encode()).hexdigest())
    check_equal("the weights to begin with", lambda: weight_sums(run.policy.model))


def weight_sums(model: nn.Module) -> list[float]:
    """The sum of each trained tensor, to be compared between processes."""
    trained = (p.detach() for p in model.parameters() if p.requires_grad)
    return [weights.sum(dtype=torch.float64).item() for weights in trained]
