"""The dense part on one process with plain torch: where DeepSpeed is not, and the reference for it."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sharding.state import Piece
from trainer.configuration import TrainConfig
from trainer.weight_average import make_average

MOMENTS = ("exp_avg", "exp_avg_sq")


class PlainEngine:
    """AdamW on the whole module; the interface of `trainer.dense_engine.DenseEngine`."""

    def __init__(self, module: nn.Module, config: TrainConfig):
        self.module = module
        self.config = config
        self.optimizer = make_optimizer((parameter for _, parameter in named_trainable(module)), config)
        self.steps = 0
        self.average = make_average(config.ema_decay, self.weights())

    def backward(self, *arguments: object) -> Tensor:
        """Forward and backward of one micro-batch; gradients add up until `step`."""
        loss = self.module(*arguments)
        loss.backward()
        return loss.detach()

    def step(self, learning_rate: float) -> None:
        if self.config.max_gradient_norm is not None:
            nn.utils.clip_grad_norm_(self.module.parameters(), self.config.max_gradient_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        if self.average:
            self.average.update(self.weights(), self.steps)

    def weights(self) -> list[Piece]:
        """Flat `dense/NAME` pieces, all of them on this rank."""
        kept = [*named_trainable(self.module), *named_state(self.module)]
        return [whole_piece(f"dense/{name}", tensor) for name, tensor in kept]

    def put(self, weights: list[Piece]) -> None:
        """Let the module compute with other values of `weights`."""
        for own, piece in zip(self.weights(), weights, strict=True):
            own.tensor.copy_(piece.tensor)

    def pieces(self) -> list[Piece]:
        """Flat `dense/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME` and, if averaged, `ema/NAME`, all on this rank."""
        found = []
        for name, parameter in named_trainable(self.module):
            state = moments(self.optimizer, parameter)
            for kind, tensor in (("dense", parameter.data), *((m, state[m]) for m in MOMENTS)):
                found.append(whole_piece(f"{kind}/{name}", tensor))
        found += [whole_piece(f"dense/{name}", tensor) for name, tensor in named_state(self.module)]
        return found + (self.average.parts if self.average else [])

    def restore(self, read_rows: Callable[[str, int, int], Tensor], steps: int) -> None:
        """Nothing beside the pieces needs restoring here, but for Adam's step count."""
        self.steps = steps
        set_adam_steps(self.optimizer, steps)

    def dense_shapes(self) -> Mapping[str, list[int]]:
        kept = [*named_trainable(self.module), *named_state(self.module)]
        return {name: list(tensor.shape) for name, tensor in kept}


def make_optimizer(parameters: Iterable[Any], config: TrainConfig) -> torch.optim.AdamW:
    """For parameters, or groups of them."""
    return torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=True
    )


def named_trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters by their name in the model, without the prefix of the wrapping module."""
    return [
        (name.removeprefix("module.").removeprefix("model."), parameter)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    ]


def named_state(module: nn.Module) -> list[tuple[str, Tensor]]:
    """What a model learns without gradients: its persistent buffers, named like `named_trainable`."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return [
        (name.removeprefix("module.").removeprefix("model."), tensor)
        for name, tensor in module.state_dict().items()
        if name not in parameters
    ]


def moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Adam's state of a parameter, created before the first step where need be, so that it can be restored."""
    state = optimizer.state[parameter]
    if MOMENTS[0] not in state:
        state["step"] = torch.zeros((), device=parameter.device)
        state.update({moment: torch.zeros_like(parameter) for moment in MOMENTS})
    return state


def set_adam_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """To be called once every parameter has its moments."""
    for state in optimizer.state.values():
        if MOMENTS[0] in state:
            state["step"] = torch.full_like(state["step"], float(steps))


def whole_piece(name: str, tensor: Tensor) -> Piece:
    """All of a tensor as one piece, flat and without a copy."""
    flat = tensor.detach().view(-1)
    return Piece(name=name, start=0, global_shape=(flat.shape[0],), tensor=flat)
