"""What accelerators compute at most, to tell how much of it a training makes use of."""

import torch

PEAK_TERAFLOPS = {
    "B200": 2250.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "GH200": 989.0,
    "A100": 312.0,
    "A30": 165.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L4": 121.0,
}
"""Products of dense matrices in bf16, by the words of the device's name; figures of NVIDIA's data sheets."""


def utilisation(operations_per_s: float, device: torch.device, num_devices: int) -> float | None:
    """Share of what accelerators like `device` compute at most; None for processors and for what is not known.

    Hardware FLOPs utilisation (Chowdhery et al., PaLM, 2022, appendix B): what is computed anew for the way back counts
    too, so it is the model's (MFU) only where no activations are recomputed.
    """
    peak = peak_of_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if peak is None else operations_per_s / (peak * num_devices)


def peak_of_name(name: str) -> float | None:
    """Example: "NVIDIA A100-SXM4-80GB" -> 3.12e14."""
    words = f" {name.replace('-', ' ')} "
    for known, teraflops in PEAK_TERAFLOPS.items():
        if f" {known} " in words:
            return teraflops * 1e12
    return None
