"""Experts spread over ranks: tokens travel to the ranks that hold the experts they chose, and back.

Ranks form expert-parallel groups of neighbours; each group holds all experts once. Ranks that hold the same experts
form an expert-data-parallel group, over which the experts' gradients are summed and their optimizer state is
partitioned. Written against DeepSpeed 0.19.8, which recognises such parameters by attributes and crashes in ZeRO
unless they belong to a subclass of its own layer.
"""

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime import compiler
from deepspeed.utils import groups
from torch import Tensor, nn

from cluster.errors import ConfigError
from cluster.process import Process
from models.layers.expert_rows import collect_rows, dispatch_rows, group_rows
from models.layers.linear import matmul_dtype
from models.layers.moe import Experts, Mixture, run_experts


def start_deepspeed() -> None:
    """Let DeepSpeed use the process group there is; may be called again."""
    # Finding out what could be compiled here runs compilers, and the shared-memory collective, the only one of these
    # operators that is asked for, would then be compiled for up to a minute; both at every start.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    _import_muon_uncompiled()
    deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)


def _import_muon_uncompiled() -> None:
    """DeepSpeed asks of every optimizer whether it is a Muon; grail has none, so that only its class is needed.

    Importing it compiles functions, and that loads torch's whole compiler: seconds of every worker's start.
    """
    with mock.patch.object(compiler, "compile", lambda: compiler.dummy_decorator):
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")


@dataclass(frozen=True, kw_only=True)
class ExpertPart:
    """Which part of a stack of experts a parameter holds: the `index`-th of `count` along dimension 0."""

    index: int
    count: int
    data_group: dist.ProcessGroup
    """Ranks that hold the same part."""


def expert_part(parameter: nn.Parameter) -> ExpertPart | None:
    """None for parameters that all ranks hold whole."""
    return getattr(parameter, "expert_part", None)


def shard_experts(model: nn.Module, size: int, process: Process) -> None:
    """Replace the experts of every layer by this rank's part of them, in place; a collective call.

    With `size` 1 every rank keeps all experts and DeepSpeed treats them like any other parameter.

    Raises: ConfigError if there are no experts, or if they or the ranks cannot be cut into `size` parts.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, Mixture)]
    if size == 1:
        return
    if not layers:
        raise ConfigError(
            f"sharding.expert-parallel {size} needs a model with experts, and {type(model).__name__} has none; "
            "leave the option out"
        )
    if process.world_size % size:
        raise ConfigError(
            f"sharding.expert-parallel must divide the number of workers, and {size} does not divide "
            f"{process.world_size}; use a multiple of {size} workers"
        )
    start_deepspeed()
    name = f"ep_size_{size}"
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(size)
    for layer in layers:
        layer.experts = ParallelExperts(layer.experts, size, name)


def parameter_groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Parameter groups for the optimizer, apart by the ranks their gradients are summed over."""
    return split_params_into_different_moe_groups_for_optimizer({"params": list(parameters), "name": "dense"})


class ParallelExperts(MoE):
    """The experts `index * E / size` and following of a layer, for the tokens of all ranks of its group.

    Cost: a rank sends each of its rows once per chosen expert that lies elsewhere, and gets as many back; the same
    in the backward pass. Split sizes are read on the host, the one sync of a layer.
    """

    def __init__(self, whole: Experts, size: int, group_name: str):
        # Not MoE's own, which would build its gate and its experts.
        nn.Module.__init__(self)
        num_experts = whole.expand.shape[0]
        if num_experts % size:
            raise ConfigError(
                f"sharding.expert-parallel must divide the number of experts, and {size} does not divide "
                f"{num_experts}; use one of {[part for part in range(1, num_experts) if num_experts % part == 0]}"
            )
        self.num_experts, self.ep_size, self.num_local_experts = num_experts, size, num_experts // size
        self.expert_group_name = group_name
        self.group = groups._get_expert_parallel_group(group_name)
        part = ExpertPart(
            index=dist.get_rank(self.group),
            count=size,
            data_group=groups._get_expert_data_parallel_group(group_name),
        )
        self.expand = _own_part(whole.expand, part, group_name)
        self.contract = _own_part(whole.contract, part, group_name)

    @property
    def num_parts(self) -> int:
        return self.ep_size

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """The groups are there already."""

    def forward(self, hidden: Tensor, chosen: Tensor) -> Tensor:
        """Shapes: hidden [T, D], chosen [T, k] -> [T, k, D]."""
        grouping = group_rows(chosen.flatten(), self.num_experts, fill=False)
        sent = grouping.ends.long().diff(prepend=grouping.ends.new_zeros(1))
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        outgoing, incoming = torch.stack((sent, received)).view(2, self.ep_size, -1).sum(2).tolist()
        rows = dispatch_rows(hidden.to(matmul_dtype(hidden)), grouping)
        rows = _Exchange.apply(rows, outgoing, incoming, self.group)
        local = torch.arange(self.num_local_experts, device=hidden.device).repeat(self.ep_size)
        local = local.repeat_interleave(received, output_size=sum(incoming))
        outputs = run_experts(rows, local[:, None], self.expand, self.contract).squeeze(1)
        outputs = _Exchange.apply(outputs, incoming, outgoing, self.group)
        return collect_rows(outputs, grouping).view(*chosen.shape, hidden.shape[1])


def _own_part(whole: nn.Parameter, part: ExpertPart, group_name: str) -> nn.Parameter:
    own = nn.Parameter(whole.detach().chunk(part.count)[part.index].clone())
    own.allreduce = False
    own.group_name = group_name
    own.expert_part = part
    return own


class _Exchange(torch.autograd.Function):
    """All-to-all of rows; the gradients take the way back."""

    @staticmethod
    def forward(ctx, rows: Tensor, outgoing: Sequence[int], incoming: Sequence[int], group) -> Tensor:
        ctx.outgoing, ctx.incoming, ctx.group = outgoing, incoming, group
        return _all_to_all(rows, outgoing, incoming, group)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _all_to_all(gradient, ctx.incoming, ctx.outgoing, ctx.group), None, None, None


def _all_to_all(rows: Tensor, outgoing: Sequence[int], incoming: Sequence[int], group) -> Tensor:
    received = rows.new_empty(sum(incoming), rows.shape[1])
    dist.all_to_all_single(received, rows.contiguous(), list(incoming), list(outgoing), group=group)
    return received
