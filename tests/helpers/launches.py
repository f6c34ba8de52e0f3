"""The kernel launches and waits that a GPU would have, counted on the meta device by torch's own dispatcher."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
SYNCHRONISING = {"_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "unique_dim", "_unique2"}
"""What a host cannot return from before the GPU has caught up: its values, or a size that follows from them."""
NOT_LAUNCHED = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "_unsafe_view"}
"""What allocates or renames memory without a kernel, beside the views."""


class Launches(TorchDispatchMode):
    """Counts the operations on the meta device that are kernels on a GPU, and those that make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        """Copies between host and device, which wait unless they are from pinned memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        moved = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        on_device = moved == META if not tensors else any(tensor.is_meta for tensor in tensors)
        if tensors and moved is not None and moved != tensors[0].device:
            self.copies[name] += 1
        elif on_device and (name in SYNCHRONISING or has_masks(name, args)):
            self.waits[name] += 1
            return stand_in(name, args)
        elif on_device and not func.is_view and name not in NOT_LAUNCHED:
            self.kernels[name] += 1
        return func(*args, **kwargs)


def has_masks(name: str, args: Any) -> bool:
    """Tell whether an operation indexes by booleans: a GPU first counts the true ones."""
    indexes = name in {"index", "index_put", "index_put_", "_index_put_impl_"}
    return indexes and any(isinstance(t, Tensor) and t.dtype in {torch.bool, torch.uint8} for t in args[1])


def stand_in(name: str, args: Any) -> Any:
    """Return a result for an operation whose result the meta device does not know."""
    if name in {"_local_scalar_dense", "item"}:
        return 1.0
    raise AssertionError(f"{name} makes the host wait for the GPU")
