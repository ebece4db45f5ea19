"""Signs that a policy learns to please its reward instead of its users; each is a warning that may end the run."""

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

logger = logging.getLogger(__name__)

Alarm = Literal["reward-hacking", "entropy-collapse", "hallucination"]

METRIC_DROP = 0.1
"""Share of the start's held-out metric that may be lost while the reward rises."""
ENTROPY_LEFT = 0.3
"""Share of the first completions' entropy below which a policy has collapsed."""
HALLUCINATION_RISE = 0.05
"""How far the share of illegal completions may rise above that of the first ones."""
MEMORY = 0.9
"""How slowly the running means of reward, entropy and illegal completions follow."""


@dataclass(kw_only=True)
class Guards:
    """Compares running means with those of the first steps; what it knows is kept in checkpoints.

    RECONSTRUCTED: the limits. The entropy is that of whole paths, estimated by -log p of the completions.
    """

    first: dict[str, float]
    """Reward, entropy and hallucination rate of the first step, held-out metric of the start."""
    now: dict[str, float]
    raised: list[str]
    """Alarms that were given; each is given once."""

    @staticmethod
    def of(saved: Mapping[str, Any] | None) -> "Guards":
        return Guards(**saved) if saved else Guards(first={}, now={}, raised=[])

    def observe(self, **numbers: float) -> None:
        """Take in a step's reward, entropy and hallucination rate."""
        for name, value in numbers.items():
            if not math.isfinite(value):
                continue  # a running mean would never be a number again
            self.first.setdefault(name, value)
            self.now[name] = MEMORY * self.now.get(name, value) + (1 - MEMORY) * value

    def observe_held_out(self, value: float) -> None:
        """Take in a validation; the first is that of the policy alignment starts from."""
        self.first.setdefault("held_out", value)
        self.now["held_out"] = value

    def observe_held_out_again(self, values: Iterable[float]) -> None:
        """Take in all validations so far anew, by the metric that is compared from here on."""
        self.first.pop("held_out", None)
        self.now.pop("held_out", None)
        for value in values:
            self.observe_held_out(value)

    def new_alarms(self) -> list[Alarm]:
        """What has gone wrong since the last call, each logged as a warning once."""
        found = [alarm for alarm, text in self._texts().items() if text and alarm not in self.raised]
        for alarm in found:
            logger.warning("%s: %s", alarm, self._texts()[alarm])
        self.raised += found
        return found

    def _texts(self) -> dict[Alarm, str]:
        first, now, texts = self.first, self.now, dict.fromkeys(("reward-hacking", "entropy-collapse"), "")
        texts["hallucination"] = ""
        if {"reward", "held_out"} <= now.keys():
            dropped = now["held_out"] < (1 - METRIC_DROP) * first["held_out"]
            if dropped and now["reward"] > first["reward"]:
                texts["reward-hacking"] = (
                    f"the reward rose from {first['reward']:.4f} to {now['reward']:.4f} while the held-out metric fell "
                    f"from {first['held_out']:.4f} to {now['held_out']:.4f}"
                )
        if "entropy" in now and now["entropy"] < ENTROPY_LEFT * first["entropy"]:
            texts["entropy-collapse"] = (
                f"the entropy of completions fell from {first['entropy']:.3f} to {now['entropy']:.3f} nats"
            )
        if "hallucination" in now and now["hallucination"] > first["hallucination"] + HALLUCINATION_RISE:
            texts["hallucination"] = (
                f"illegal completions rose from {first['hallucination']:.2%} to {now['hallucination']:.2%}"
            )
        return texts
