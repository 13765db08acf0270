"""A GPU that is not there: its tensors say ``cuda`` and hold their values on the CPU.

An operation on tensors of both devices fails as on CUDA. What crosses between them, what makes the program wait for the
GPU and how much memory is held are counted, and memory runs out where a test says so.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.cuda._utils import _get_device_index
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CARD = torch.device("cuda", 0)
GIB = 2**30
aten = torch.ops.aten

WAITS = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten._local_scalar_dense.default}
"""Operations whose result the program has to wait for."""


REFUSED = {torch.uint16, torch.uint32, torch.uint64}
"""Types in which CUDA computes hardly anything."""


class OnCard(torch.Tensor):
    """A tensor of the GPU; ``held`` has its values."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnCard:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="meta",  # of which every PyTorch knows that there is nothing to switch to
        )

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CARD

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnCard{tuple(self.shape)}"

    @classmethod
    def __torch_dispatch__(cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{function} outside of a Gpu")


class Gpu(TorchDispatchMode):
    """What happened on the GPU: ``counts`` and ``bytes`` of uploads, downloads and waits, ``peak`` bytes held."""

    def __init__(self, total: int = 10 * GIB) -> None:
        super().__init__()
        self.total, self.room = total, total
        self.counts: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.live, self.peak, self.allocations = 0, 0, 0
        self.fails_at: set[int] = set()
        self._holders: Counter[int] = Counter()

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        here = [one for one in tensors if isinstance(one, OnCard)]
        device = kwargs.get("device")
        goes = None if device is None else {"meta": "cuda"}.get(torch.device(device).type, torch.device(device).type)
        pinned = kwargs.pop("pin_memory", False)
        if not here and goes != "cuda":
            found = function(*args, **kwargs)
            if pinned:
                found.is_pinned_here = True
            return found
        self._note(function, args, kwargs, here, tensors, goes)
        if goes is not None:
            kwargs["device"] = torch.device("cpu")
        found = function(*tree_map(_bare, args), **tree_map(_bare, kwargs))
        same = {id(one.held): one for one in here}
        if function is aten._to_copy.default and found is _bare(args[0]):
            found = found.clone()
        on_card = goes == "cuda" or (bool(here) and goes != "cpu")
        if function is aten.copy_.default:
            return args[0]
        return tree_map(lambda one: self._wrapped(one, same) if on_card else one, found)

    def _note(self, function: Any, args: Any, kwargs: Any, here: list[Any], tensors: list[Any], goes: Any) -> None:
        moves = function in (aten._to_copy.default, aten.copy_.default)
        strangers = [one for one in tensors if not isinstance(one, OnCard) and one.dim() > 0]
        if function is aten.index.Tensor and here:  # an index from the CPU goes over, and is waited for
            self.counts.update({"uploads": len(strangers), "waits": len(strangers)})
            strangers = []
        if here and strangers and not moves:
            raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu ({function})")
        if function in WAITS:
            self.counts["waits"] += 1
        if not moves:
            return
        source = args[0] if function is aten._to_copy.default else args[1]
        into_card = goes == "cuda" if function is aten._to_copy.default else isinstance(args[0], OnCard)
        from_card = isinstance(source, OnCard)
        leaves_card = from_card and (goes == "cpu" if function is aten._to_copy.default else not into_card)
        free = kwargs.get("non_blocking", False) or (len(args) > 2 and args[2])
        kind = "uploads" if into_card and not from_card else "downloads" if leaves_card else None
        if kind is not None:
            self.counts[kind] += 1
            self.bytes[kind] += source.numel() * source.element_size()
            if kind == "downloads" or not (free and getattr(source, "is_pinned_here", False)):
                self.counts["waits"] += 1

    def put(self, made: torch.Tensor) -> OnCard:
        """A tensor that was made on the GPU."""
        return self._wrapped(made, {})

    def upload(self, tensor: torch.Tensor, dtype: torch.dtype, *, free: bool) -> OnCard:
        """A copy on the GPU; the program waits for it unless ``free`` and pinned, in the same type."""
        if dtype in REFUSED:
            raise NotImplementedError(f"{dtype} on CUDA")
        self.counts["uploads"] += 1
        self.bytes["uploads"] += tensor.numel() * dtype.itemsize
        if not (free and dtype == tensor.dtype and getattr(tensor, "is_pinned_here", False)):
            self.counts["waits"] += 1
        return self._wrapped(tensor.detach().to(dtype, copy=True), {})

    def _wrapped(self, found: Any, same: dict[int, OnCard]) -> Any:
        if not isinstance(found, torch.Tensor):
            return found
        if id(found) in same:
            return same[id(found)]
        self._hold(found)
        made = OnCard(found)
        storage = found.untyped_storage()
        weakref.finalize(made, self._release, storage.data_ptr(), storage.nbytes()).atexit = False
        return made

    def _hold(self, found: torch.Tensor) -> None:
        storage = found.untyped_storage()
        if not self._holders[storage.data_ptr()]:
            self.allocations += 1
            if self.allocations in self.fails_at or self.live + storage.nbytes() > self.room:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {storage.nbytes()} bytes")
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
        self._holders[storage.data_ptr()] += 1

    def _release(self, pointer: int, size: int) -> None:
        self._holders[pointer] -= 1
        if not self._holders[pointer]:
            del self._holders[pointer]
            self.live -= size


class _Bindings(TorchFunctionMode):
    """Python's calls that name the GPU, which a PyTorch without CUDA refuses before anything can look at them."""

    def __init__(self, found: Gpu) -> None:
        super().__init__()
        self._gpu = found

    def __torch_function__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if not any(map(_names_card, (*args[1:], kwargs.get("device")))):
            return function(*args, **kwargs)
        kwargs.pop("device", None)
        name = getattr(function, "__name__", "")
        if name in ("tensor", "as_tensor"):  # of numbers on the CPU
            made = function(*args, device="cpu", **kwargs)
            return self._gpu.upload(made, made.dtype, free=False)
        if name != "to":
            return self._gpu.put(function(*args, device="cpu", **kwargs))
        tensor, *others = args
        more = [one for one in others if not _names_card(one)]
        free = kwargs.pop("non_blocking", False) or any(one is True for one in more)
        kinds = [one for one in more if isinstance(one, torch.dtype)]
        dtype = kwargs.pop("dtype", None) or (kinds[0] if kinds else tensor.dtype)
        copied = kwargs.pop("copy", False)
        assert not kwargs
        if isinstance(tensor, OnCard):
            return tensor.to(dtype, copy=copied)
        return self._gpu.upload(tensor, dtype, free=free)


def _names_card(value: Any) -> bool:
    return (isinstance(value, torch.device) and value.type == "cuda") or (
        isinstance(value, str) and value.startswith("cuda")
    )


def _bare(value: Any) -> Any:
    return value.held if isinstance(value, OnCard) else value


@contextmanager
def gpu(total: int = 10 * GIB) -> Iterator[Gpu]:
    """A block in which PyTorch finds one GPU of ``total`` bytes; of one thread."""
    found = Gpu(total)
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    answers = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: "a pretended GPU",
        "is_bf16_supported": lambda *_: True,
        "get_device_capability": lambda device=None: (9, 0),
        "mem_get_info": lambda device=None: (found.room - found.live, found.total),
        "memory_reserved": lambda device=None: found.live,
        "memory_allocated": lambda device=None: found.live,
        "set_per_process_memory_fraction": lambda share, device=0: _get_device_index(device) * 0,
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: found.counts.update(["waits"]),
    }
    try:
        with (
            patch.multiple(torch.cuda, **answers),
            patch.object(torch, "inference_mode", torch.no_grad),
            found,
            _Bindings(found),
        ):
            yield found
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
