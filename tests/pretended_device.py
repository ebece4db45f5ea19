"""Tensors that say they lie on an accelerator and are computed on the processor.

With these a machine without an accelerator finds what would fail there: tensors of two devices in one operation, and
data read back by the host without being asked to. Values, autocast and speed say nothing about a real device.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

NAME = "pretended"


class _Backend(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
PRETENDED = torch.device("cpu") if HAS_CUDA else torch.device(NAME, 0)
no_real_device = pytest.mark.skipif(
    HAS_CUDA,
    reason="a real accelerator is here, and backward passes over it fail where a pretended one is known too",
)
CROSSING = {"aten.copy_", "aten._to_copy", "aten.index", "aten.index_put", "aten.index_put_", "aten.set_"}
"""Operations that may read tensors of both: copies, and indexing, whose indices may lie on the host."""
WAITING = {
    "aten._local_scalar_dense",
    "aten.bincount",
    "aten.equal",
    "aten.nonzero",
    "aten._unique2",
    "aten.unique_dim",
    "aten.masked_select",
}
"""Operations that return to the host what, or how much, the device computed."""
COPIES = {"aten._to_copy": 0, "aten.copy_": 1}
"""Operations that copy, and which of their arguments."""
SENT = "sent from the host"
"""In `waits`: copies of what lies on the host, where a step finds it too late to be sent ahead."""


class PretendedTensor(torch.Tensor):
    """A tensor on the pretended device; `inner` holds its values."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=PRETENDED, requires_grad=False,
        )  # fmt: skip

    def __init__(self, inner: Tensor):
        self.inner = inner

    def __repr__(self) -> str:
        return f"PretendedTensor({self.inner})"

    def tolist(self) -> list:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {}, Counter())


class PretendedDevice(TorchDispatchMode):
    """While inside, tensors can lie on the pretended device; `waits` counts what makes the host wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {}, self.waits)


def compute(function: Callable, args: tuple, kwargs: dict[str, Any], waits: Counter[str]) -> Any:
    """Call an operation on the values. Raises: RuntimeError where tensors of two devices meet."""
    name = str(function).rsplit(".", 1)[0]
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    pretended = [tensor for tensor in tensors if isinstance(tensor, PretendedTensor)]
    if pretended and name not in CROSSING:
        _require_one_device(name, [tensor for tensor in tensors if not isinstance(tensor, PretendedTensor)])
    if pretended and name == "aten._fused_sdp_choice":
        return torch.nn.attention.SDPBackend.MATH.value
    target = kwargs.get("device")
    on_device = target.type == NAME if target is not None else _result_is_pretended(name, args, pretended)
    if pretended and (name in WAITING or (not on_device and name in COPIES)):
        waits[name] += 1
    if on_device and name in COPIES and not isinstance(args[COPIES[name]], PretendedTensor):
        waits[SENT] += 1
    inner_args, inner_kwargs = tree_map_only(PretendedTensor, lambda t: t.inner, (args, kwargs))
    if target is not None:
        inner_kwargs = {**inner_kwargs, "device": torch.device("cpu")}
    result = function(*inner_args, **inner_kwargs)
    if not on_device:
        return result
    # A tensor that only says it is a conjugate would lose that by being wrapped.
    result = tree_map_only(Tensor, lambda t: PretendedTensor(t.resolve_conj().resolve_neg()), result)
    return return_and_correct_aliasing(function, args, kwargs, result) if pretended else result


def _require_one_device(name: str, on_host: list[Tensor]) -> None:
    """A single number of the host may stand beside tensors of a device, but for fused operations."""
    refused = [
        tuple(t.shape) for t in on_host if t.dim() or name.startswith(("aten._fused", "aten._foreach"))
    ]
    if refused:
        raise RuntimeError(f"{name} met tensors of two devices, on the host those of shapes {refused}")


def _result_is_pretended(name: str, args: tuple, pretended: list) -> bool:
    """Indexing and copying in place give a tensor of the device of what is indexed or overwritten."""
    if name in CROSSING and args and isinstance(args[0], Tensor):
        return isinstance(args[0], PretendedTensor)
    return bool(pretended)
