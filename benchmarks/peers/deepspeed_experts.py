"""The expert layer of DeepSpeed with SwiGLU experts."""

from collections.abc import Mapping
from typing import Any

from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from models.layers.feedforward import FeedForward

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "dropless": {"drop_tokens": False},
    "capacity 1": {"capacity_factor": 1.0},
    "capacity 2": {"capacity_factor": 2.0},
}
"""Without dropping, every expert computes as many rows as the one with the longest queue. With a capacity, tokens
beyond it are dropped; at capacity 1 that is every token which makes its expert's load larger than the mean."""
PEER = "capacity 2"
"""The setting in which DeepSpeed's layer was measured when the bar was set: hardly a token is dropped, and sizes are
known before the router has run. Its dropless setting computes what ours does and has a bar of its own."""


class DeepSpeedExperts(nn.Module):
    def __init__(self, setting: str, *, width: int, hidden: int, num_experts: int, top_k: int, size: int):
        super().__init__()
        self.layer = MoE(
            width,
            _Expert(width, hidden),
            num_experts=num_experts,
            ep_size=size,
            k=top_k,
            use_rts=False,
            top2_2nd_expert_sampling=False,
            **SETTINGS[setting],
        )
        self.layer.set_deepspeed_parallelism()

    def forward(self, hidden: Tensor) -> Tensor:
        """Shapes: [T, D] -> [T, D]."""
        output, _, _ = self.layer(hidden)
        return output


class _Expert(FeedForward):
    def forward(self, hidden: Tensor) -> Tensor:
        """Shapes: [ranks, 1, C, D] -> [ranks, 1, C, D]."""
        return super().forward(hidden.flatten(0, -2)).view_as(hidden)
