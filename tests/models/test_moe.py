"""Experts against a naive loop over tokens and experts, and the numbers around them against hand-made ones."""

import pytest
import torch
import torch.nn.functional as F

from cluster.errors import ConfigError
from models.layers.feedforward import FeedForwardConfig
from models.layers.moe import MixtureConfig
from models.recommender import LossSum, StepContext
from trainer.expert_balance import balance_experts, with_router_losses

WIDTH, TOKENS = 8, 33


def make_layer(**options):
    torch.manual_seed(0)
    layer = MixtureConfig(**{"num_experts": 5, "hidden": 16, **options}).build(WIDTH, init_scale=0.3)
    layer.choice_bias.normal_(std=0.1)
    return layer


def naive(layer, hidden):
    """One token and one expert after the other."""
    logits = layer.router(hidden)
    scores = logits.softmax(-1) if layer.config.score == "softmax" else logits.sigmoid()
    outputs = []
    for token, score in zip(hidden, scores, strict=True):
        preferred = (score + layer.choice_bias).argsort(descending=True)[: layer.config.top_k]
        total = score[preferred].sum() if layer.config.normalise and layer.config.top_k > 1 else 1.0
        output = torch.zeros(WIDTH)
        for expert in preferred.tolist():
            gate, value = (token @ layer.experts.expand[expert]).chunk(2)
            output = output + score[expert] / total * (
                (F.silu(gate) * value) @ layer.experts.contract[expert]
            )
        outputs.append(output if layer.shared is None else output + layer.shared(token[None])[0])
    return torch.stack(outputs)


def gradients(layer, output, hidden):
    return torch.autograd.grad((output * torch.arange(WIDTH)).sum(), [hidden, *layer.parameters()])


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 1},
        {"top_k": 2, "num_shared": 2},
        {"top_k": 3, "score": "sigmoid", "normalise": False},
        {"top_k": 5, "score": "sigmoid"},
    ],
)
def test_experts_equal_a_loop_over_tokens_and_experts(options):
    layer, hidden = make_layer(**options), torch.randn(TOKENS, WIDTH, requires_grad=True)
    output, expected = layer(hidden), naive(layer, hidden)
    torch.testing.assert_close(output, expected)
    for found, wanted in zip(
        gradients(layer, output, hidden), gradients(layer, expected, hidden), strict=True
    ):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_bf16_chooses_the_same_experts_and_is_close():
    layer, hidden = make_layer(), torch.randn(TOKENS, WIDTH, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(hidden)
    expected = naive(layer, hidden)
    torch.testing.assert_close(output.float(), expected, atol=0.05, rtol=0.05)
    for found, wanted in zip(
        gradients(layer, output, hidden), gradients(layer, expected, hidden), strict=True
    ):
        assert (found - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tokens_and_experts_without_tokens_have_gradients_of_zero(dtype):
    layer = make_layer(top_k=1)
    layer.choice_bias[2] = 100.0
    for tokens in (0, 3):
        hidden = torch.randn(tokens, WIDTH, requires_grad=True)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype == torch.bfloat16):
            output = layer(hidden)
        assert output.shape == (tokens, WIDTH)
        _, _, expand, contract = gradients(layer, output, hidden)
        others = [0, 1, 3, 4]
        assert not expand[others].any() and not contract[others].any()
        assert bool(expand[2].any()) == bool(tokens)


def test_copies_of_a_prompt_count_once_when_weighted():
    layer = make_layer(num_shared=1)
    prompt, completions = torch.randn(7, WIDTH), torch.randn(6, WIDTH)
    layer(torch.cat((prompt, completions)))
    weights = torch.cat((torch.full((21,), 1 / 3), torch.ones(6)))
    copied = layer(torch.cat((prompt, prompt, prompt, completions)), weights)
    once, weighted = layer.routings
    for name in ("loads", "probabilities", "squared_log_sums", "entropy"):
        wanted = getattr(once, name)
        torch.testing.assert_close(getattr(weighted, name), wanted, rtol=1e-5, atol=1e-5)
    layer.eval()
    torch.testing.assert_close(copied[:7], layer(prompt))
    assert len(layer.routings) == 2, "only training is counted"


def routed(layer, logits):
    """Let tokens have these router outputs."""
    layer.router.weight.data.zero_()
    width = logits.shape[1]
    layer.router.weight.data[:width, :width] = torch.eye(width)
    layer(F.pad(logits, (0, WIDTH - width)))


def test_router_losses_and_metrics_are_those_worked_out_by_hand():
    layer = make_layer(num_experts=2, top_k=1, auxiliary_weight=0.5, z_weight=0.25)
    layer.choice_bias.zero_()
    # Probabilities 3/4 and 1/4 three times, 1/5 and 4/5 once.
    rows = torch.tensor([[3.0, 1.0], [3.0, 1.0], [3.0, 1.0], [1.0, 4.0]]).log()
    routed(layer, rows)
    loss = LossSum(sum=torch.tensor(10.0), count=8)
    outcome = with_router_losses(loss, [layer], StepContext(step=0, targets_per_rank=(8,)))
    mean_first = (3 * 0.75 + 0.2) / 4
    auxiliary = 2 * (0.75 * mean_first + 0.25 * (1 - mean_first))
    z_loss = (3 * torch.tensor(4.0).log() ** 2 + torch.tensor(5.0).log() ** 2) / 4
    expected = 8 * (0.5 * auxiliary + 0.25 * z_loss)
    torch.testing.assert_close(outcome.sum - 10.0, expected)
    means = {name: value / 8 for name, value in outcome.metrics.items()}
    torch.testing.assert_close(means["experts/router_loss"], expected / 8)
    torch.testing.assert_close(means["experts/0/load"], torch.tensor([0.75, 0.25]))
    torch.testing.assert_close(means["experts/0/load_entropy"], torch.tensor(0.811278))
    torch.testing.assert_close(means["experts/0/router_entropy"], torch.tensor((3 * 0.562335 + 0.500402) / 4))
    torch.testing.assert_close(means["experts/0/rank_imbalance"], torch.tensor(1.0))


def test_the_bias_moves_against_the_load_of_the_step_and_changes_choices_alone():
    layer = make_layer(num_experts=3, top_k=1, bias_rate=0.2)
    layer.choice_bias.zero_()
    rows = torch.tensor([[0.4, 0.3, 0.3], [0.5, 0.3, 0.2], [0.3, 0.6, 0.1]]).log()
    for micro_batch in (rows[:2], rows[2:]):
        routed(layer, micro_batch)
        with_router_losses(LossSum(sum=torch.zeros(()), count=1), [layer], StepContext(step=0))
    assert layer.step_loads.tolist() == [2, 1, 0]
    balance_experts([layer])
    torch.testing.assert_close(layer.choice_bias, torch.tensor([-0.2, 0.0, 0.2]))
    assert layer.step_loads.tolist() == [0, 0, 0]
    gates, chosen = layer._route(F.pad(rows, (0, WIDTH - 3)), None)
    assert chosen[:, 0].tolist() == [2, 2, 1], "0.4 - 0.2 < 0.3 + 0.2"
    torch.testing.assert_close(gates[:, 0], torch.tensor([0.3, 0.2, 0.6]))


def test_balancing_evens_out_the_loads():
    layer = make_layer(num_experts=4, top_k=1, bias_rate=0.02)
    hidden = torch.randn(512, WIDTH) + 1.0
    spread = []
    for _ in range(100):
        layer(hidden)
        loss = with_router_losses(LossSum(sum=torch.zeros(()), count=512), [layer], StepContext(step=0))
        balance_experts([layer])
        spread.append(float(loss.metrics["experts/0/load"].max() / 512))
    assert spread[0] > 0.45 and max(spread[-10:]) < 0.3


def test_sizes_are_known_on_the_meta_device():
    with torch.device("meta"):
        layer = MixtureConfig(num_experts=24, top_k=2, hidden=2816, num_shared=1).build(1024)
        dense = FeedForwardConfig(hidden=2816).build(1024)
    count = lambda module: sum(parameter.numel() for parameter in module.parameters())  # noqa: E731
    assert count(dense) == 3 * 1024 * 2816
    assert count(layer) == 25 * count(dense) + 24 * 1024


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top-k must lie in 1..5"),
        ({"top_k": 6}, "top-k must lie in 1..5"),
        ({"hidden": 20}, "must be a multiple of 8, got 20; use 24"),
        ({"z_weight": -1.0}, "must be 0 or more"),
        ({"hidden": 0}, "must be a multiple of 8, got 0; use 8"),
    ],
)
def test_impossible_mixtures_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        make_layer(**options)


def test_a_width_that_grouped_products_cannot_take_is_refused():
    with pytest.raises(ConfigError, match="width of a layer of experts must be a multiple of 8, got 12"):
        MixtureConfig().build(12)


def test_a_feed_forward_part_without_a_hidden_layer_is_refused():
    with pytest.raises(
        ConfigError, match="hidden layer of a feed-forward part must be at least 1 wide, got 0"
    ):
        FeedForwardConfig(hidden=0).build(8)
