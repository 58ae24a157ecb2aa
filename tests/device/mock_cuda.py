"""A mock CUDA device: CPU tensors that report the device `cuda:0`, and errors where a real GPU would raise
them.

The mock keeps the set of storages that are on it. `_DeviceQueries` handles Python calls that ask for the
device of a tensor, move a tensor, or create one. `_DeviceChecks` sees every torch operation, those of a
backward pass too: it raises if an operation mixes tensors of both devices, and puts results on the device of
the inputs. As in torch, three kinds of mixing are allowed: copy_, CPU scalars, and indexing with CPU
integers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
INDEXED = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default)
MEMORY_BYTES = 2**40


class _Place:
    """The storages on the mock CUDA device. A weak reference keeps an address from being used again."""

    def __init__(self) -> None:
        self.there: dict[int, StorageWeakRef] = {}
        self.moved = 0

    def has(self, tensor: Tensor) -> bool:
        return StorageWeakRef(tensor.untyped_storage()).cdata in self.there

    def put(self, tensor: Tensor, there: bool = True) -> Tensor:
        reference = StorageWeakRef(tensor.untyped_storage())
        if there:
            self.there[reference.cdata] = reference
            self.moved += 1
        else:
            self.there.pop(reference.cdata, None)
        return tensor


PLACE = _Place()  # shared by all mocks, since ops cache tables per device


class _DeviceQueries(TorchFunctionMode):
    """Answers Python's queries for the device of a tensor."""

    def __init__(self, place: _Place) -> None:
        super().__init__()
        self.place = place

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return CUDA if self.place.has(args[0]) else func(*args)
        if func == Tensor.is_cuda.__get__:
            return self.place.has(args[0])
        if func == Tensor.to:
            return self.moved(*args, **kwargs)
        if func == Tensor.cpu:
            return self.moved(args[0], CPU)
        if func == Tensor.pin_memory:
            return args[0]
        if func == Tensor.numpy and self.place.has(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func == Tensor.backward:
            with self:  # the backward's queries are answered too; torch.autograd.backward would recurse
                engine, gradient = torch.autograd.Variable._execution_engine, torch.ones_like(args[0])
                return engine.run_backward(
                    (args[0],), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True
                )
        kwargs.pop("pin_memory", None)
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            return self.place.put(func(*args, **kwargs | {"device": CPU}))
        return func(*args, **kwargs)

    def moved(self, tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        """Tensor.to."""
        if args and isinstance(args[0], Tensor):
            device, dtype = CUDA if self.place.has(args[0]) else CPU, args[0].dtype
        else:
            device, dtype = torch._C._nn._parse_to(*args, **kwargs)[:2]
        if tensor.is_meta or (device is not None and device.type == "meta"):
            return tensor.to(*args, **kwargs)
        result, here = tensor if dtype is None else tensor.to(dtype), self.place.has(tensor)
        there = here if device is None else device.type == "cuda"
        return self.place.put(result.clone(), there) if copy or there != here else result


class _DeviceChecks(TorchDispatchMode):
    """Raises for operations that mix devices, as torch does."""

    def __init__(self, place: _Place) -> None:
        super().__init__()
        self.place = place

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # or `_DeviceQueries` would be asked
            kwargs = kwargs or {}
            if func is torch.ops.aten.copy_.default:
                return func(*args, **kwargs)
            asked = (args[0], *args[2:]) if func in INDEXED and self.place.has(args[0]) else (args, kwargs)
            tensors = [leaf for leaf in tree_leaves(asked) if isinstance(leaf, Tensor) and not leaf.is_meta]
            there = [tensor for tensor in tensors if self.place.has(tensor)]
            here = [tensor for tensor in tensors if tensor.ndim and not self.place.has(tensor)]
            if there and here:
                shapes = [[list(tensor.shape) for tensor in some] for some in (there, here)]
                raise RuntimeError(
                    f"{func}: tensors on the mock CUDA device {shapes[0]} meet tensors of the CPU {shapes[1]}"
                )
            result = func(*args, **kwargs)
            if there:
                for leaf in tree_leaves(result):
                    if isinstance(leaf, Tensor):
                        self.place.put(leaf)
            return result


@contextmanager
def mock_cuda_device() -> Iterator[list[int]]:
    """Inside the context, "cuda" is a usable device.

    On exit the list gets the number of tensors that were put on it.

    No kernel runs on it: set NANOHYBRID_KERNELS to torch or reference.
    """
    place, before = PLACE, PLACE.moved
    count: list[int] = []
    there = {
        "Event": lambda *_, **__: SimpleNamespace(record=lambda: None, synchronize=lambda: None),
        "synchronize": lambda *_: None,
        "is_available": lambda: True,
        "set_device": lambda *_: None,
        "mem_get_info": lambda *_: (MEMORY_BYTES, MEMORY_BYTES),
        "memory_reserved": lambda *_: 0,
        "memory_allocated": lambda *_: 0,
        "get_device_name": lambda *_: "mock CUDA device",
        "get_device_properties": lambda *_: SimpleNamespace(total_memory=MEMORY_BYTES),
    }
    with mock.patch.multiple(torch.cuda, **there), _DeviceChecks(place), _DeviceQueries(place):
        yield count
    count.append(place.moved - before)
