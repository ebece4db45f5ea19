"""Where the time of a step goes, and how it grows."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullFormatter
from torch.profiler import ProfilerActivity, profile

KINDS = {
    "matrix products": ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::linear"),
    "softmax and exponentials": ("softmax", "aten::exp", "aten::logsumexp", "aten::log"),
    "gates and activations": ("silu", "sigmoid", "relu", "threshold", "gelu"),
    "moving rows": ("index", "gather", "scatter", "embedding", "aten::cat", "aten::stack", "take"),
    "copies and casts": ("aten::copy_", "aten::_to_copy", "aten::clone", "aten::contiguous"),
    "random numbers and masks": ("random", "bernoulli", "aten::ge", "masked_fill", "dropout", "aten::eq"),
    "norms": ("layer_norm", "linalg_vector_norm"),
    "sums": ("aten::sum", "aten::mean"),
    "fills": ("aten::fill_", "aten::zero_"),
    "optimizers": ("fused_adam", "adagrad", "fbgemm", "split_embedding"),
    "elementwise": ("aten::add", "aten::mul", "aten::sub", "aten::div", "aten::neg", "aten::clamp"),
}


def time_shares(run: Callable[[], object]) -> dict[str, float]:
    """Share of the processor time of each kind of operator; `other` is Python, the engine and everything small."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    spent = dict.fromkeys((*KINDS, "other"), 0.0)
    for event in profiler.key_averages():
        spent[_kind(event.key.lower())] += event.self_cpu_time_total
    total = sum(spent.values())
    return {kind: time / total for kind, time in sorted(spent.items(), key=lambda entry: -entry[1])}


def collective_share(run: Callable[[], object]) -> float:
    """Share of the time that this rank spends in collectives, waiting for others included."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        started = time.perf_counter()
        run()
        elapsed_s = time.perf_counter() - started
    spent_us = sum(event.cpu_time_total for event in profiler.key_averages() if event.key.startswith("gloo:"))
    return spent_us / 1e6 / elapsed_s


def _kind(operator: str) -> str:
    for kind, names in KINDS.items():
        if any(name in operator for name in names):
            return kind
    return "other"


def draw_curves(
    path: Path, curves: Mapping[str, Mapping[str, Mapping[str, float]]]
) -> dict[str, dict[str, float]]:
    """One panel per varied size with a line per side, in seconds -> fitted exponents by size and side."""
    figure, panels = plt.subplots(1, len(curves), figsize=(4.2 * len(curves), 3.6), squeeze=False)
    exponents: dict[str, dict[str, float]] = {}
    for panel, (varied, sides) in zip(panels[0], curves.items(), strict=True):
        exponents[varied] = {}
        for side, points in sides.items():
            sizes, values = [int(size) for size in points], list(points.values())
            exponents[varied][side] = fitted_exponent(sizes, values)
            panel.plot(sizes, values, "o-", label=f"{side}: {varied}^{exponents[varied][side]:.2f}")
        panel.set(xscale="log", yscale="log", xlabel=varied, ylabel="seconds")
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.legend(fontsize=8)
        panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return exponents


def fitted_exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Slope of log value over log size by least squares, over the larger half, where fixed costs count less."""
    start = len(sizes) // 2 if len(sizes) > 3 else 0
    slope, _ = np.polyfit(np.log(sizes[start:]), np.log(values[start:]), 1)
    return float(slope)
