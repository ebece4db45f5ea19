"""The dense part under DeepSpeed: data-parallel, with optimizer state, gradients or parameters partitioned (ZeRO).

Written against DeepSpeed 0.19.8, whose flat partitions are read and written directly: its own checkpoints refuse
another world size, and its public accessors gather every full tensor on every rank.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.process import Process
from sharding.experts import expert_part, parameter_groups, start_deepspeed
from sharding.state import Piece
from trainer.configuration import TrainConfig
from trainer.plain_engine import (
    MOMENTS,
    make_optimizer,
    moments,
    named_state,
    named_trainable,
    set_adam_steps,
    whole_piece,
)
from trainer.weight_average import make_average

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

MOST_REDUCED = 500_000_000
"""Gradients that are summed over the ranks at a time; DeepSpeed's own number."""


class DenseEngine:
    """One micro-batch after the other through `backward`, then one `step`."""

    def __init__(self, module: nn.Module, config: TrainConfig, process: Process):
        self.config = config
        start_deepspeed()
        trainable = named_trainable(module)
        self._places = {name: _Place.of(parameter) for name, parameter in trainable}
        self._shapes = {name: _global_shape(parameter) for name, parameter in trainable}
        self._shapes |= {name: list(tensor.shape) for name, tensor in named_state(module)}
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=make_optimizer(parameter_groups(parameter for _, parameter in trainable), config),
            config=_deepspeed_config(config, sum(parameter.numel() for _, parameter in trainable), process),
            dist_init_required=False,
        )
        self.module = module
        self.rank, self.world_size = process.rank, process.world_size
        self.steps = 0
        self.average = make_average(config.ema_decay, self.weights())

    def backward(self, *arguments: object) -> Tensor:
        """Forward and backward of one micro-batch; gradients add up until `step`."""
        loss = self.engine(*arguments)
        # The learner has divided by the count of the whole step, so micro-batches must not be averaged again.
        self.engine.backward(loss * self.config.micro_batches)
        last = self.engine.is_gradient_accumulation_boundary()
        if not last:
            self.engine.step()
        return loss.detach()

    def step(self, learning_rate: float) -> None:
        for group in self._optimizer().param_groups:
            group["lr"] = learning_rate
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        self.steps += 1
        if self.average:
            self.average.update(self.weights(), self.steps)

    def _optimizer(self) -> torch.optim.Optimizer:
        """The AdamW below DeepSpeed's wrapper."""
        return self.engine.optimizer.optimizer if self.config.zero_stage else self.engine.optimizer

    def dense_shapes(self) -> Mapping[str, list[int]]:
        return self._shapes

    def weights(self) -> list[Piece]:
        """Flat ranges of `dense/NAME` that this rank keeps, where they are updated."""
        return [
            self._piece("dense", name, start, flat.data.view(-1)[first : first + length])
            for name, start, flat, first, length in self._fragments()
        ] + self._state_pieces()

    def put(self, weights: list[Piece]) -> None:
        """Let the module compute with other values of `weights`; a collective call.

        Cost: below stage 3, one all-reduce of each parameter over the ranks that hold it.
        """
        parts = {piece.name.split("/", 1)[1]: piece for piece in weights}
        if self.config.zero_stage == 3:
            # A parameter that is still gathered would keep its values.
            self.engine.optimizer.parameter_offload.partition_all_parameters()
        for name, parameter in named_trainable(self.module):
            if self.config.zero_stage == 3:
                part = parts[name].tensor
                parameter.ds_tensor.data.view(-1)[: part.shape[0]].copy_(part)
                continue
            self._put_whole(parameter.data, self._places[name], parts.get(name))
        for name, tensor in named_state(self.module):
            self._put_whole(tensor, _Place(first=0, numel=tensor.numel(), group=None), parts.get(name))

    def _put_whole(self, tensor: Tensor, place: "_Place", part: Piece | None) -> None:
        whole = torch.zeros(place.numel, device=tensor.device)
        if part is not None:
            whole[part.start - place.first :][: part.num_rows] = part.tensor
        dist.all_reduce(whole, group=place.group)
        tensor.copy_(whole.view(tensor.shape))

    def pieces(self) -> list[Piece]:
        """Flat ranges of `dense/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME` and, if averaged, `ema/NAME` that this
        rank keeps."""
        found = []
        for name, start, flat, first, length in self._fragments():
            state = moments(self._optimizer(), flat)
            for kind, source in (("dense", flat.data), *((m, state[m]) for m in MOMENTS)):
                found.append(self._piece(kind, name, start, source.view(-1)[first : first + length]))
        return found + self._state_pieces() + (self.average.parts if self.average else [])

    def _piece(self, kind: str, name: str, start: int, tensor: Tensor) -> Piece:
        """`start` counts within what this rank holds of the parameter."""
        total = math.prod(self._shapes[name])
        first = self._places[name].first
        return Piece(name=f"{kind}/{name}", start=first + start, global_shape=(total,), tensor=tensor)

    def _state_pieces(self) -> list[Piece]:
        """What is not a parameter is the same on all ranks; the first one keeps it."""
        if self.rank > 0:
            return []
        return [whole_piece(f"dense/{name}", tensor) for name, tensor in named_state(self.module)]

    def _fragments(self) -> Iterator[tuple[str, int, Tensor, int, int]]:
        """(parameter, start within what this rank holds of it, flat tensor of this rank, position in that, length)
        of what it keeps."""
        if self.config.zero_stage == 0:
            return self._replicated_fragments()
        if self.config.zero_stage == 3:
            return self._parameter_fragments()
        return self._partition_fragments()

    def _replicated_fragments(self) -> Iterator[tuple[str, int, Tensor, int, int]]:
        """Every rank holds everything; each saves its own share of it."""
        for name, parameter in named_trainable(self.module):
            share = -(-parameter.numel() // self.world_size)
            start = min(self.rank * share, parameter.numel())
            length = min(share, parameter.numel() - start)
            yield name, start, parameter, start, length

    def _partition_fragments(self) -> Iterator[tuple[str, int, Tensor, int, int]]:
        """Stages 1 and 2: the parameters of a group lie one after another in one flat tensor cut into ranks."""
        zero, names = self.engine.optimizer, self._names()
        for group, flat in enumerate(zero.single_partition_of_fp32_groups):
            low = dist.get_rank(zero.real_dp_process_group[group]) * flat.numel()
            high = low + flat.numel()
            parameters = zero.round_robin_bit16_groups[group]
            for parameter, offset in zip(parameters, zero.round_robin_bit16_offsets[group], strict=True):
                first, last = max(low, offset), min(high, offset + parameter.numel())
                if first < last:
                    yield names[id(parameter)], first - offset, flat, first - low, last - first

    def _parameter_fragments(self) -> Iterator[tuple[str, int, Tensor, int, int]]:
        """Stage 3: every parameter is cut into ranks by itself; a sub-group joins the parts of one rank."""
        zero, names = self.engine.optimizer, self._names()
        for group, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
            position = 0
            for parameter in group:
                name, part = names[id(parameter)], parameter.partition_numel()
                numel = self._places[name].numel
                start = min(self.rank * part, numel)
                length = min(part, numel - start)
                yield name, start, flat, position, length
                position += part

    def _names(self) -> dict[int, str]:
        return {id(parameter): name for name, parameter in named_trainable(self.module)}

    def restore(self, read_rows: Callable[[str, int, int], Tensor], steps: int) -> None:
        """Bring the working parameters in line once the pieces were filled.

        `read_rows(name, start, stop)` gives that range of a flat `dense/NAME` on the host.
        """
        self.steps = steps
        set_adam_steps(self._optimizer(), steps)
        for name, parameter in named_trainable(self.module):
            first, numel = self._places[name].first, self._places[name].numel
            if self.config.zero_stage == 3:
                part = parameter.partition_numel()
                start, stop = (min(index * part, numel) for index in (self.rank, self.rank + 1))
                own = read_rows(f"dense/{name}", start, stop)
                parameter.ds_tensor.data.view(-1)[: own.shape[0]].copy_(own)
            else:
                whole = read_rows(f"dense/{name}", first, first + numel)
                parameter.data.copy_(whole.view(parameter.shape))
        for name, tensor in named_state(self.module):
            tensor.copy_(read_rows(f"dense/{name}", 0, tensor.numel()).view(tensor.shape))


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Which flat range of a global tensor this rank computes with, and the ranks that do so too."""

    first: int
    numel: int
    group: dist.ProcessGroup | None
    """None is all ranks."""

    @staticmethod
    def of(parameter: nn.Parameter) -> "_Place":
        part, numel = expert_part(parameter), parameter.numel()
        if part is None:
            return _Place(first=0, numel=numel, group=None)
        return _Place(first=part.index * numel, numel=numel, group=part.data_group)


def _global_shape(parameter: nn.Parameter) -> list[int]:
    part, (first, *rest) = expert_part(parameter), parameter.shape
    return [first if part is None else first * part.count, *rest]


def _deepspeed_config(config: TrainConfig, num_weights: int, process: Process) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.micro_batches,
        "gradient_clipping": config.max_gradient_norm or 0.0,
        "zero_optimization": {
            "stage": config.zero_stage,
            "stage3_param_persistence_threshold": 0,
            # Overlap needs streams of an accelerator. Ray 2.60 shows one to workers on the processor too.
            "overlap_comm": process.device.type == "cuda",
            # Buffers of this size are made, two of them for overlap, however few gradients there are to fill them.
            "reduce_bucket_size": min(MOST_REDUCED, num_weights),
        },
        # It would wait for the accelerator twice in each step, to measure what nobody reads.
        "timers": {"throughput": {"enabled": False}},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
