import pytest
import torch

from trainer.peak_rates import peak_of_name, utilisation

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA L40S", 362),
    ],
)
def test_accelerators_are_known_by_the_words_of_their_names(name, teraflops):
    assert peak_of_name(name) == teraflops * 1e12


def test_of_all_accelerators_together_a_share_of_their_peak_is_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-PCIE-40GB")
    assert utilisation(312e12, CUDA, 4) == pytest.approx(0.25)


def test_what_is_not_known_has_no_share(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A1000 Laptop GPU")
    assert utilisation(1e12, CUDA, 1) is None
    assert utilisation(1e12, torch.device("cpu"), 1) is None
