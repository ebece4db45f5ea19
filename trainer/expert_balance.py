"""What a step makes of the choices of its routers: losses, metrics, and after the step the balancing bias.

Loads are added up over all ranks before anything depends on them, so every world size balances alike.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from models.layers.moe import Mixture, Routing
from models.recommender import LossSum, StepContext
from sharding.collectives import sum_over_ranks


def mixtures(module: nn.Module) -> tuple[Mixture, ...]:
    """All layers of experts, in the order of the model."""
    return tuple(layer for layer in module.modules() if isinstance(layer, Mixture))


def forget_routings(layers: Sequence[Mixture]) -> None:
    """To be called before a forward; recomputing activations in the backward pass routes once more."""
    for layer in layers:
        layer.routings.clear()


def with_router_losses(loss: LossSum, layers: Sequence[Mixture], context: StepContext) -> LossSum:
    """Add router losses and metrics of the forward that made `loss`; a collective call if there are experts.

    Router losses are means over the tokens of all ranks, weighted by the targets of the micro-batch like any loss.
    """
    if not layers:
        return loss
    routings = [_joined(layer) for layer in layers]
    loads = torch.cat([routing.loads for routing in routings])
    all_loads = sum_over_ranks(loads, context.world_size).split([len(routing.loads) for routing in routings])
    targets = sum(context.targets_per_rank) or loss.count
    total, metrics = loss.sum, {}
    for number, (layer, routing, all_load) in enumerate(zip(layers, routings, all_loads, strict=True)):
        layer.step_loads += all_load
        tokens = (all_load.sum() / layer.config.top_k).clamp_min(1.0)
        per_token = (targets / tokens).float()
        total = total + per_token * _router_loss(layer, routing, all_load)
        for name, value in _metrics(layer, routing, all_load, per_token, targets / context.world_size):
            metrics[f"experts/{number}/{name}"] = value
    metrics["experts/router_loss"] = (total - loss.sum).detach()
    return replace(loss, sum=total, metrics={**loss.metrics, **metrics})


def balance_experts(layers: Sequence[Mixture]) -> None:
    """Move the biases by the loads of the step that was just taken; equal on all ranks without a collective."""
    for layer in layers:
        layer.balance()


def _joined(layer: Mixture) -> Routing:
    """The sums of all forward passes of a layer; `loads` are a fresh tensor. Then forgets them."""
    routings, count = list(layer.routings), layer.config.num_experts
    layer.routings.clear()
    zeros = layer.router.weight.new_zeros(())
    return Routing(
        loads=sum((routing.loads for routing in routings), torch.zeros_like(layer.step_loads)),
        probabilities=sum((routing.probabilities for routing in routings), zeros.new_zeros(count)),
        squared_log_sums=sum((routing.squared_log_sums for routing in routings), zeros),
        entropy=sum((routing.entropy for routing in routings), zeros),
    )


def _router_loss(layer: Mixture, routing: Routing, all_load: Tensor) -> Tensor:
    """This rank's part of the sum over tokens."""
    config = layer.config
    share = (all_load / all_load.sum().clamp_min(1.0)).float()
    auxiliary = config.num_experts * (share * routing.probabilities).sum()
    return config.auxiliary_weight * auxiliary + config.z_weight * routing.squared_log_sums


def _metrics(
    layer: Mixture, routing: Routing, all_load: Tensor, per_token: Tensor, targets_per_rank: float
) -> Iterator[tuple[str, Tensor]]:
    """Parts of sums over targets, as metrics are: what all ranks know alike, each gives a share of."""
    shares = all_load / all_load.sum().clamp_min(1.0)
    entropy = -(shares * shares.clamp_min(1e-20).log()).sum() / math.log(max(len(shares), 2))
    by_part = shares.view(layer.experts.num_parts, -1).sum(1)
    yield "load", shares.float() * targets_per_rank
    yield "load_entropy", entropy.float() * targets_per_rank
    yield "router_entropy", routing.entropy * per_token
    yield "rank_imbalance", (by_part.max() * len(by_part)).float() * targets_per_rank
