"""Adapters against their formula."""

import torch
from torch import nn

from models.layers.adapter import Adapter


def test_an_adapter_adds_two_layers_with_a_relu_between_them_and_begins_as_nothing():
    torch.manual_seed(0)
    adapter, rows = Adapter(6, 4), torch.randn(2, 3, 6)
    assert torch.equal(adapter(rows), rows)
    for weights in (adapter.up.weight, adapter.up.bias):
        nn.init.normal_(weights)
    inner = (rows @ adapter.down.weight.T + adapter.down.bias).clamp(min=0)
    torch.testing.assert_close(adapter(rows), rows + inner @ adapter.up.weight.T + adapter.up.bias)
