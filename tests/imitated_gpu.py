"""A GPU imitated on the CPU: every tensor's storage is marked as being here or "there", and what mixes the two is refused.

Most mistakes with devices show only on a machine that has two: a batch that was never moved, a mask made on the CPU, `.numpy()`
of something on the GPU. While `ImitatedGpu` is active, tensors can be sent there (`x.to("cuda")`, `device="cuda"`,
`model.to("cuda")`); they say that they are on cuda:0, and an operation whose operands are not all in one place raises the
RuntimeError that CUDA would. The numbers are computed on the CPU. What depends on CUDA itself (kernels, streams, memory) is not
imitated, nor does `torch.cuda.is_available()` say yes.
"""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA = torch.device("cuda", 0)


class _Generator(torch.Generator):
    """Of the CPU, whatever device it is made for: the numbers are drawn here."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


def _is_cuda(device) -> bool:
    return device is not None and not isinstance(device, bool) and torch.device(device).type == "cuda"


class _Places(TorchDispatchMode):
    """Which storages are there. What an operation makes is where its operands are."""

    def __init__(self):
        super().__init__()
        self.there: dict[int, weakref.ref] = {}
        self.anywhere: dict[int, weakref.ref] = {}  # made by a backward formula, for what it meets first
        self.fetching = False

    def is_there(self, tensor: torch.Tensor) -> bool:
        return self._listed(self.there, tensor)

    @staticmethod
    def _listed(places: dict[int, weakref.ref], tensor: torch.Tensor) -> bool:
        storage = tensor.untyped_storage()
        kept = places.get(storage._cdata)
        return kept is not None and kept() is storage  # and not one that had this address before

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self.anywhere.pop(storage._cdata, None)
        self.there[storage._cdata] = weakref.ref(storage)
        return tensor

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.fetching:
            return func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        there = [self.is_there(t) for t in tensors]
        # A number is taken from anywhere; an index may be on the CPU; copying is how tensors get from one place to the other.
        unbound = [t for t in tensors if self._listed(self.anywhere, t)]
        free = {id(t) for t in tensors if t.dim() == 0} | {id(t) for t in unbound}
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default):
            free |= {id(t) for t in args[1] if t is not None and there[0]}
        bound = {place for t, place in zip(tensors, there, strict=True) if id(t) not in free}
        if len(bound) > 1 and func is not torch.ops.aten.copy_.default:
            shapes = ", ".join(f"{tuple(t.shape)} on {'cuda' if p else 'cpu'}" for t, p in zip(tensors, there, strict=True))
            raise RuntimeError(f"Expected all tensors to be on the same device: {func} of {shapes}")
        if True in bound:
            tree_map_only(torch.Tensor, self.send, unbound)
        out = func(*args, **(kwargs or {}))
        if not tensors and torch._C._current_graph_task_id() != -1:
            for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
                self.anywhere[storage._cdata] = weakref.ref(storage)
        made_there = True in bound or (not bound and any(there))
        if func is torch.ops.aten.copy_.default:
            made_there = there[0]
        if made_there:
            tree_map_only(torch.Tensor, self.send, out)
        return out


class _Again(TorchFunctionMode):
    """A mode once more: torch switches function modes off in a backward pass."""

    def __init__(self, mode: TorchFunctionMode):
        super().__init__()
        self.mode = mode

    def __torch_function__(self, *args, **kwargs):
        return self.mode.__torch_function__(*args, **kwargs)


class ImitatedGpu(TorchFunctionMode):
    """`with ImitatedGpu() as gpu:` … `gpu.is_there(tensor)` says where a tensor is."""

    def __init__(self):
        super().__init__()
        self.places = _Places()
        self.is_there = self.places.is_there

    def __enter__(self):
        self.places.__enter__()
        self.patch = patch.object(torch, "Generator", _Generator)
        self.patch.start()
        return super().__enter__()

    def again(self) -> tuple:
        """For `context_fn` of checkpointing: what is recomputed in the backward pass must see the imitation, too."""
        return nullcontext(), _Again(self)

    def __exit__(self, *error):
        super().__exit__(*error)
        self.patch.stop()
        self.places.__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if name == "__get__" and first is not None:
            if func == torch.Tensor.device.__get__:
                return CUDA if self.is_there(first) else func(*args)
            if func == torch.Tensor.is_cuda.__get__:
                return self.is_there(first)
            return func(*args)
        if func is torch.Tensor.numpy and self.is_there(first):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        if func in (torch.Tensor.cpu, torch.Tensor.cuda):
            return self._move(first, func is torch.Tensor.cuda)
        if func is torch.Tensor.to:
            return self._to(first, *args[1:], **kwargs)
        if _is_cuda(kwargs.get("device")):  # a factory, or a `_like` with a device
            kwargs["device"] = "cpu"
            return tree_map_only(torch.Tensor, lambda t: self._move(t, True), func(*args, **kwargs))
        if kwargs.get("device") is not None and first is not None and self.is_there(first):  # zeros_like(x, device="cpu")
            return self._move(func(*args, **kwargs), False)
        return func(*args, **kwargs)

    def _to(self, tensor, *args, **kwargs):
        device, rest = kwargs.pop("device", None), list(args)
        if rest and isinstance(rest[0], torch.Tensor):
            device, rest[0] = CUDA if self.is_there(rest[0]) else torch.device("cpu"), rest[0].dtype
        elif rest and isinstance(rest[0], str | torch.device | int):
            device = rest.pop(0)
        dtype = kwargs.get("dtype") or next((r for r in rest if isinstance(r, torch.dtype)), None)
        if device is not None and torch.device(device).type == "meta":
            return tensor.to(device=device, dtype=dtype)
        moved = tensor if device is None else self._move(tensor, _is_cuda(device))
        return moved if dtype is None else moved.type(dtype)  # waiting, copying and strides make no difference here

    def _move(self, tensor: torch.Tensor, there: bool) -> torch.Tensor:
        if self.is_there(tensor) == there:
            return tensor
        if there:
            copy = tensor.clone()
            self.places.send(copy)
            return copy
        self.places.fetching = True  # the copy is made here
        try:
            return tensor.clone()
        finally:
            self.places.fetching = False
