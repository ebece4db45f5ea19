"""The module that the engine wraps: the dense part of a model together with its objective."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from data_streams.batch import SequenceBatch
from models.recommender import LossSum, Recommender, StepContext
from models.tables import Rows
from trainer.expert_balance import forget_routings, mixtures, with_router_losses


class DenseModule(nn.Module):
    """Runs a model in the chosen precision and returns its loss, already divided by the global count.

    Autocast is entered here, inside what DeepSpeed calls: an outer one would survive its forward on a processor
    and be switched off on an accelerator.
    """

    def __init__(self, model: Recommender, precision: torch.dtype):
        super().__init__()
        self.model = model
        self.precision = precision
        self.last: LossSum | None = None
        self.mixtures = mixtures(model)

    def forward(self, rows: Rows, batch: SequenceBatch, context: StepContext, scale: float) -> Tensor:
        device = batch.user_ids.device.type
        forget_routings(self.mixtures)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.precision == torch.bfloat16):
            loss = self.loss(rows, batch, context)
        self.last = with_router_losses(loss, self.mixtures, context)
        return self.last.sum * scale

    def loss(self, rows: Rows, batch: SequenceBatch, context: StepContext) -> LossSum:
        """What is trained: the model's own loss, unless a subclass says otherwise."""
        return self.model(rows, batch, context)


class GradientCheck:
    """Watches the gradients of dense parameters for values that are not finite, as they are computed.

    ZeRO reduces and frees gradients during backward, so each is looked at in a hook. A sum is not finite exactly
    if an element is not, or if it overflows, which is divergence too.
    """

    def __init__(self, module: nn.Module):
        self._sums: list[Tensor] = []
        for parameter in _trainable(module):
            parameter.register_hook(self._watch)

    def _watch(self, gradient: Tensor) -> None:
        self._sums.append(gradient.sum(dtype=torch.float32))

    def watch(self, tensors: Iterator[Tensor]) -> None:
        """Include further tensors, such as the loss and the gradients of looked-up rows."""
        for tensor in tensors:
            self._watch(tensor)

    def take(self) -> Tensor:
        """1 where everything since the last call was finite, else 0, still on the device."""
        sums, self._sums = self._sums, []
        return torch.stack(sums).isfinite().all().to(torch.int32)


def _trainable(module: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for parameter in module.parameters() if parameter.requires_grad)


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 where the machine computes it natively, fp32 elsewhere."""
    if precision == "auto":
        return torch.bfloat16 if _has_bf16(device) else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
