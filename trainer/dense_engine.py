"""The dense part under DeepSpeed: data-parallel, with optimizer state, gradients or parameters partitioned (ZeRO).

Written against DeepSpeed 0.19.8, whose flat partitions are read and written directly: its own checkpoints refuse
another world size, and its public accessors gather every full tensor on every rank.
"""

import logging
from collections.abc import Callable, Iterator, Mapping

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.process import Process
from sharding.state import Piece
from trainer.configuration import TrainConfig
from trainer.plain_engine import MOMENTS, make_optimizer, moments, named_trainable, set_adam_steps
from trainer.weight_average import make_average

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


class DenseEngine:
    """One micro-batch after the other through `backward`, then one `step`."""

    def __init__(self, module: nn.Module, config: TrainConfig, process: Process):
        self.config = config
        # Its shared-memory collective would be compiled for up to a minute at every start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)
        self._shapes = {name: list(parameter.shape) for name, parameter in named_trainable(module)}
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=make_optimizer(module, config),
            config=_deepspeed_config(config),
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
        """Flat ranges of `dense/NAME` that this rank keeps, where the optimizer updates them."""
        return [
            Piece(
                name=f"dense/{name}",
                start=start,
                global_shape=(self._numel(name),),
                tensor=flat.data.view(-1)[first : first + length],
            )
            for name, start, flat, first, length in self._fragments()
        ]

    def put(self, weights: list[Piece]) -> None:
        """Let the module compute with other values of `weights`; a collective call.

        Cost: below stage 3, one all-reduce of each parameter.
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
            whole = torch.zeros(parameter.numel(), device=parameter.device)
            if name in parts:
                whole[parts[name].start :][: parts[name].num_rows] = parts[name].tensor
            dist.all_reduce(whole)
            parameter.data.copy_(whole.view(parameter.shape))

    def pieces(self) -> list[Piece]:
        """Flat ranges of `dense/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME` and, if averaged, `ema/NAME` that this
        rank keeps."""
        found = []
        for name, start, flat, first, length in self._fragments():
            total = self._numel(name)
            state = moments(self._optimizer(), flat)
            for kind, source in (("dense", flat.data), *((m, state[m]) for m in MOMENTS)):
                part = source.view(-1)[first : first + length]
                found.append(Piece(name=f"{kind}/{name}", start=start, global_shape=(total,), tensor=part))
        return found + (self.average.parts if self.average else [])

    def _numel(self, name: str) -> int:
        return int(torch.tensor(self._shapes[name]).prod())

    def _fragments(self) -> Iterator[tuple[str, int, Tensor, int, int]]:
        """(parameter, start within it, flat tensor of this rank, position in that, length) of what it keeps."""
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
            low = self.rank * flat.numel()
            high = low + flat.numel()
            parameters = zero.round_robin_bit16_groups[group]
            for parameter, offset in zip(parameters, zero.round_robin_bit16_offsets[group], strict=True):
                first, last = max(low, offset), min(high, offset + self._numel(names[id(parameter)]))
                if first < last:
                    yield names[id(parameter)], first - offset, flat, first - low, last - first

    def _parameter_fragments(self) -> Iterator[tuple[str, int, Tensor, int, int]]:
        """Stage 3: every parameter is cut into ranks by itself; a sub-group joins the parts of one rank."""
        zero, names = self.engine.optimizer, self._names()
        for group, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
            position = 0
            for parameter in group:
                name, part = names[id(parameter)], parameter.partition_numel()
                start = min(self.rank * part, self._numel(name))
                length = min(part, self._numel(name) - start)
                yield name, start, flat, position, length
                position += part

    def _names(self) -> dict[int, str]:
        return {id(parameter): name for name, parameter in named_trainable(self.module)}

    def restore(self, read_full: Callable[[str], Tensor], steps: int) -> None:
        """Bring the working parameters in line once the pieces were filled.

        `read_full(name)` gives a whole flat `dense/NAME` on the host.
        """
        self.steps = steps
        set_adam_steps(self._optimizer(), steps)
        for name, parameter in named_trainable(self.module):
            whole = read_full(f"dense/{name}")
            if self.config.zero_stage == 3:
                part = parameter.partition_numel()
                own = whole[self.rank * part : (self.rank + 1) * part]
                parameter.ds_tensor.data.view(-1)[: own.shape[0]].copy_(own)
            else:
                parameter.data.copy_(whole.view(parameter.shape))


def _deepspeed_config(config: TrainConfig) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.micro_batches,
        "gradient_clipping": config.max_gradient_norm or 0.0,
        "zero_optimization": {
            "stage": config.zero_stage,
            "stage3_param_persistence_threshold": 0,
            # Overlap needs streams of an accelerator.
            "overlap_comm": torch.cuda.is_available(),
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
