"""A feed-forward part made of experts, of which every token visits a few: dropless, in grouped matrix products.

Experts see exactly the tokens that chose them; nothing is padded to a capacity and nothing is dropped. Loads are
balanced by a bias that only chooses (Wang et al., Auxiliary-Loss-Free Load Balancing Strategy for
Mixture-of-Experts, 2024; OneRec does so), by the classic auxiliary loss (Fedus et al., Switch Transformers, 2021),
or by both. Whoever trains has to fetch `Mixture.routings` after each forward (trainer/expert_balance.py does).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cluster.errors import ConfigError
from models.kernels.expert_products import expert_products
from models.layers.expert_rows import collect_rows, dispatch_rows, group_rows
from models.layers.feedforward import FeedForward
from models.layers.linear import matmul_dtype, without_autocast

_ALIGNED = 8
"""Grouped products need rows of a multiple of 16 bytes, in bf16 too."""


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """Options of a feed-forward part made of experts."""

    num_experts: int = 8
    """Routed experts of a layer."""
    top_k: int = 2
    """Routed experts that a token visits."""
    num_shared: int = 0
    """Experts that every token visits beside its routed ones."""
    hidden: int = 256
    """Size of the gated hidden layer of one expert."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """How the router's outputs become the weights of experts."""
    normalise: bool = True
    """Let the weights of a token's experts sum to 1; with a single expert its weight stays as it is, or the router
    would not learn."""
    bias_rate: float = 1e-3
    """Step of the loss-free balancing: how much an expert's bias moves after each optimizer step; 0 is none."""
    auxiliary_weight: float = 0.0
    """Weight of the classic auxiliary loss, experts x sum(load share x mean probability); 0 is none."""
    z_weight: float = 0.0
    """Weight of the router z-loss, the mean squared log-sum-exp of the router's outputs; 0 is none."""

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(
                f"top-k must lie in 1..{self.num_experts}, the number of experts, got {self.top_k}; lower it or "
                "raise num-experts"
            )
        if self.hidden < 1 or self.hidden % _ALIGNED:
            raise ConfigError(
                f"the hidden size of an expert must be a multiple of {_ALIGNED}, got {self.hidden}; use "
                f"{max(self.hidden + -self.hidden % _ALIGNED, _ALIGNED)}"
            )
        if min(self.bias_rate, self.auxiliary_weight, self.z_weight, self.num_shared) < 0:
            raise ConfigError(
                "bias-rate, auxiliary-weight, z-weight and num-shared must be 0 or more, got "
                f"{self.bias_rate}, {self.auxiliary_weight}, {self.z_weight} and {self.num_shared}"
            )

    def build(self, width: int, init_scale: float = 0.02) -> "Mixture":
        return Mixture(self, width, init_scale)


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What the tokens of one forward chose, as sums over them, so that ranks can be added up."""

    loads: Tensor
    """[E] float64: tokens that visited each expert. Exact, so that every world size sees the same."""
    probabilities: Tensor
    """[E] float32, with gradient: router probabilities."""
    squared_log_sums: Tensor
    """Scalar float32, with gradient: squared log-sum-exp of the router's outputs."""
    entropy: Tensor
    """Scalar float32: entropy of the router's probabilities, in nats."""


class Mixture(nn.Module):
    """Takes the place of a `FeedForward`: [T, D] -> [T, D].

    `experts` is all that differs between one process and experts spread over ranks (sharding/experts.py).
    """

    def __init__(self, config: MixtureConfig, width: int, init_scale: float = 0.02):
        super().__init__()
        if width % _ALIGNED:
            raise ConfigError(
                f"the width of a layer of experts must be a multiple of {_ALIGNED}, got {width}"
            )
        self.config = config
        self.router = nn.Linear(width, config.num_experts, bias=False)
        nn.init.normal_(self.router.weight, std=init_scale)
        self.experts: nn.Module = Experts(config.num_experts, width, config.hidden, init_scale)
        shared = config.num_shared * config.hidden
        # The sum of several experts that all tokens visit is one of their joint hidden size.
        self.shared = FeedForward(width, shared, init_scale) if shared else None
        self.register_buffer("choice_bias", torch.zeros(config.num_experts))
        self.register_buffer(
            "step_loads", torch.zeros(config.num_experts, dtype=torch.float64), persistent=False
        )
        self.routings: list[Routing] = []
        """Of the forward passes in training since they were last fetched."""

    def forward(self, hidden: Tensor, token_weights: Tensor | None = None) -> Tensor:
        """`token_weights` count a token more or less than once in loads and router losses: a prompt that was copied
        to each of its G completions counts once with weight 1 / G. They do not change the output.

        Shapes: hidden [T, D], token_weights [T] -> [T, D].
        """
        gates, chosen = self._route(hidden, token_weights)
        outputs = self.experts(hidden, chosen)
        weighted = outputs * gates.to(outputs.dtype)[..., None]
        mixed = weighted.sum(1) if self.config.top_k > 1 else weighted.squeeze(1)
        return mixed if self.shared is None else mixed + self.shared(hidden)

    def _route(self, hidden: Tensor, token_weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights and experts of each token. Shapes: [T, D] -> [T, k] and [T, k]."""
        # In fp32 whatever the rest computes in: close choices should not hang on rounding.
        with without_autocast(hidden):
            logits = self.router(hidden.float())
            scores = logits.softmax(-1) if self.config.score == "softmax" else logits.sigmoid()
            chosen = (scores.detach() + self.choice_bias).topk(self.config.top_k, sorted=False).indices
            gates = scores.gather(1, chosen)
            if self.config.normalise and self.config.top_k > 1:
                gates = gates / gates.sum(-1, keepdim=True)
            if self.training:
                self.routings.append(_describe(logits, scores, chosen, token_weights))
        return gates, chosen

    def balance(self) -> None:
        """Make overloaded experts a little less likely to be chosen, after the loads of a whole step of all ranks."""
        off = (self.step_loads.mean() - self.step_loads).sign()
        self.choice_bias += self.config.bias_rate * off.to(self.choice_bias.dtype)
        self.step_loads.zero_()


def _describe(logits: Tensor, scores: Tensor, chosen: Tensor, token_weights: Tensor | None) -> Routing:
    weights = logits.new_ones(len(logits)) if token_weights is None else token_weights.to(logits.dtype)
    probabilities = scores / scores.sum(-1, keepdim=True)
    entropy = -(probabilities.detach() * probabilities.detach().clamp_min(1e-20).log()).sum(-1)
    visits = weights.double()[:, None].expand(chosen.shape)
    loads = visits.new_zeros(logits.shape[1]).scatter_add_(0, chosen.flatten(), visits.flatten())
    return Routing(
        loads=loads,
        probabilities=weights @ probabilities,
        squared_log_sums=weights @ logits.logsumexp(-1).square(),
        entropy=weights @ entropy,
    )


class Experts(nn.Module):
    """All experts of a layer in this process, their weights stacked."""

    num_parts = 1
    """Processes that the experts are spread over."""

    def __init__(self, num_experts: int, width: int, hidden: int, init_scale: float):
        super().__init__()
        self.expand = nn.Parameter(torch.empty(num_experts, width, 2 * hidden))
        self.contract = nn.Parameter(torch.empty(num_experts, hidden, width))
        nn.init.normal_(self.expand, std=init_scale)
        nn.init.normal_(self.contract, std=init_scale)

    def forward(self, hidden: Tensor, chosen: Tensor) -> Tensor:
        """What each token's experts make of it. Shapes: hidden [T, D], chosen [T, k] -> [T, k, D]."""
        return run_experts(hidden, chosen, self.expand, self.contract)


def run_experts(hidden: Tensor, chosen: Tensor, expand: Tensor, contract: Tensor) -> Tensor:
    """Shapes: hidden [T, D], chosen [T, k], expand [E, D, 2 H], contract [E, H, D] -> [T, k, D]."""
    dtype = matmul_dtype(hidden)
    # There, the products of every new group size would be compiled, as in layers/linear.py.
    compiles = hidden.device.type == "cpu" and dtype == torch.bfloat16
    grouping = group_rows(chosen.flatten(), expand.shape[0], fill=compiles)
    rows = dispatch_rows(hidden.to(dtype), grouping)
    outputs = expert_products(rows, expand, contract, grouping.ends)
    return collect_rows(outputs, grouping).view(*chosen.shape, hidden.shape[1])
