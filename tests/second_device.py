"""A second device without a GPU: tensors that say that they are on `cuda`, and are looked after.

Every tensor is really on the CPU. `Says` answers for devices as a GPU would: `.device`, `.to`, `.cpu`, factories. `Minds` sees
each operation below: where tensors of both devices meet it raises, as CUDA does; where a value is brought to the host, which
on a GPU waits for all work before it, it notes the line of the project. Kernels, memory, speed and rounding are not looked at.
"""

import collections
import contextlib
import traceback
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
# Of these operations only the first tensor must be where the result is: indices may come from the host.
INDEXING = ("index.Tensor", "index_put", "_index_put_impl_", "_unsafe_index")
READS = ("_local_scalar_dense", "nonzero", "equal.", "is_nonzero", "_unique2", "unique_dim")
COPIES = ("copy_.", "_to_copy.")


class Ledger:
    """Which storages are on the second device, and which lines of the project have waited for it."""

    def __init__(self):
        self.storages = {}  # held, so that no other tensor gets the address of one
        self.waits = collections.Counter()

    def on(self, tensor):
        """Whether a tensor is on the second device."""
        with torch._C.DisableTorchFunction():
            return not tensor.is_meta and tensor.untyped_storage()._cdata in self.storages

    def put(self, tensor):
        """From now on it is."""
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
        self.storages[storage._cdata] = storage
        return tensor

    def take(self, tensor):
        """From now on it is on the host: a copy of one that was not."""
        with torch._C.DisableTorchFunction():
            self.storages.pop(tensor.untyped_storage()._cdata, None)
        return tensor

    def wait(self, what):
        """A value is brought to the host: by which line of the project?"""
        frames = [
            f
            for f in traceback.extract_stack()
            if Path(f.filename).is_relative_to(ROOT) and "tests" not in f.filename
        ]
        own = [f for f in frames if "site-packages" not in f.filename]
        place = f"{Path(own[-1].filename).name}: {own[-1].line}" if own else "?"
        self.waits[f"{what} {place}"] += 1


class Minds(TorchDispatchMode):
    """Each operation's tensors are on one device, single numbers from the host aside."""

    def __init__(self, ledger):
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, on = str(function).removeprefix("aten."), self.ledger.on
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        anywhere = any(map(on, tensors))
        if anywhere and not name.startswith(COPIES):
            strict = tensors[:1] if name.startswith(INDEXING) else [t for t in tensors if t.dim()]
            strict += [t for t in tensors if on(t)]
            if len({on(t) for t in strict}) > 1:
                where = [(tuple(t.shape), "cuda" if on(t) else "cpu") for t in tensors]
                raise RuntimeError(f"Expected all tensors to be on the same device: {name} {where}")
            if name.startswith(READS):
                self.ledger.wait(name.partition(".")[0])
        seen = {id(t) for t in tensors}
        out = function(*args, **(kwargs or {}))
        if anywhere:
            for result in tree_leaves(out):
                if (
                    isinstance(result, Tensor)
                    and id(result) not in seen
                    and not name.startswith("copy_.")
                ):
                    self.ledger.put(result)
        return out


class Says(TorchFunctionMode):
    """What a tensor says of its device, and what moves it there and back."""

    def __init__(self, ledger):
        super().__init__()
        self.ledger = ledger

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, ledger = dict(kwargs or {}), self.ledger
        owner = getattr(function, "__self__", None)
        if getattr(function, "__name__", "") == "__get__" and not args[0].is_meta:
            if owner is Tensor.device:
                return CUDA if ledger.on(args[0]) else CPU
            if owner in (Tensor.is_cuda, Tensor.is_cpu):
                return ledger.on(args[0]) == (owner is Tensor.is_cuda)
        if function is Tensor.get_device:
            return 0 if ledger.on(args[0]) else -1
        if function is Tensor.tolist and ledger.on(args[0]):
            ledger.wait("tolist")
        if function in (Tensor.numpy, Tensor.__array__) and ledger.on(args[0]):
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first"
            )
        if function in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self.move(function, *args, **kwargs)
        device = kwargs.get("device")
        there = device is not None and torch.device(device).type == "cuda"
        if there:
            kwargs["device"] = CPU
        out = function(*args, **kwargs)
        if there:
            for result in tree_leaves(out):
                if isinstance(result, Tensor):
                    ledger.put(result)
        return out

    def move(self, function, tensor, *others, **kwargs):
        """`to`, `cpu`, `cuda`: a copy on the other device, or the tensor itself."""
        ledger, now = self.ledger, self.ledger.on(tensor)
        wanted = {Tensor.cpu: False, Tensor.cuda: True}.get(function)
        others, dtype = [*others], kwargs.get("dtype")
        for other in (*others, kwargs.get("device"), kwargs.get("other")):
            if isinstance(other, Tensor):
                wanted, dtype = ledger.on(other), other.dtype
            elif isinstance(other, torch.dtype):
                dtype = other
            elif isinstance(other, str | torch.device):
                if torch.device(other).type == "meta":
                    return function(tensor, *others, **kwargs)
                wanted = torch.device(other).type == "cuda"
        wanted = now if wanted is None else wanted
        out = tensor if dtype in (None, tensor.dtype) else tensor.to(dtype)
        if wanted == now:
            return out
        if now:
            ledger.wait("cpu")
        fresh = out.clone() if out is tensor else out
        return ledger.put(fresh) if wanted else ledger.take(fresh)


@contextlib.contextmanager
def second_device(patch):
    """Inside, torch says that there is a GPU; yields the ledger.

    Args:
        patch: pytest's monkeypatch, or anything with its `setattr`.
    """
    nothing = lambda *a, **k: None  # noqa: E731
    answers = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0, "is_bf16_supported": lambda *a, **k: True,
        "max_memory_allocated": lambda *a: 1, "memory_allocated": lambda *a: 1, "get_device_capability": lambda *a: (9, 0),
        "get_device_name": lambda *a: "second device", "get_rng_state": lambda *a: torch.get_rng_state(), "set_rng_state": nothing,
        "get_rng_state_all": lambda *a: [torch.get_rng_state()], "set_rng_state_all": nothing, "is_current_stream_capturing": lambda *a: False,
        "mem_get_info": lambda *a: (70 << 30, 80 << 30),
    }  # fmt: skip
    quiet = (
        "synchronize",
        "empty_cache",
        "set_device",
        "manual_seed",
        "manual_seed_all",
        "init",
        "_lazy_init",
        "ipc_collect",
    )
    for name, answer in (answers | dict.fromkeys(quiet, nothing)).items():
        patch.setattr(torch.cuda, name, answer)
    begin, enabled, dtype = (
        torch.autocast.__init__,
        torch.is_autocast_enabled,
        torch.get_autocast_dtype,
    )
    patch.setattr(
        torch.autocast,
        "__init__",
        lambda self, device_type=None, *a, **k: begin(self, "cpu", *a, **k),
    )
    patch.setattr(torch, "is_autocast_enabled", lambda *a: enabled("cpu"))
    patch.setattr(torch, "get_autocast_dtype", lambda *a: dtype("cpu"))
    ledger = Ledger()
    with Says(ledger), Minds(ledger):
        yield ledger
