import numpy as np
import pytest
import torch

from cluster.errors import DivergenceError
from models.tokenizers.autoencoder import _rate
from models.tokenizers.finite_scalar import FiniteScalar, Rounding
from models.tokenizers.rq_vae import ResidualQuantiser, RqVae, rotate
from tests.models.tokenizers.clustered import clustered_vectors

SMALL = {"hidden": (16,), "batch_size": 64}


def test_the_quantiser_sums_its_losses_over_residuals():
    config = RqVae.Config(code_sizes=(3, 2), latent=2, commitment=0.5, rotation=False)
    quantiser = ResidualQuantiser(config)
    first = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    second = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    with torch.no_grad():
        quantiser.codebooks[0].copy_(first)
        quantiser.codebooks[1].copy_(second)
    latents = torch.tensor([[5.0, 0.5]], requires_grad=True)
    quantised, loss = quantiser(latents)
    # Residuals: (5, .5) -> code 1, leaves (1, .5) -> code 0, leaves (0, .5).
    assert quantised.tolist() == [[5.0, 0.0]]
    assert loss.item() == pytest.approx(1.5 * (1.25 + 0.25))
    (3 * quantised.sum()).backward()
    assert latents.grad.tolist() == [[3.0, 3.0]], "straight through"
    loss_again = quantiser(latents)[1].sum()
    to_latents, to_first, to_second = torch.autograd.grad(loss_again, [latents, *quantiser.codebooks])
    np.testing.assert_allclose(to_latents, [[0.5 * 2 * (1 + 0), 0.5 * 2 * (0.5 + 0.5)]])
    np.testing.assert_allclose(to_first, [[0, 0], [-2, -1], [0, 0]])
    np.testing.assert_allclose(to_second, [[0, -1], [0, 0]])


def test_rotation_keeps_the_value_and_turns_the_gradient():
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(6, 4, generator=generator, requires_grad=True)
    target, gradient = torch.randn(6, 4, generator=generator), torch.randn(6, 4, generator=generator)
    passed = rotate(source, target)
    torch.testing.assert_close(passed, target)
    (found,) = torch.autograd.grad(passed, source, gradient)
    scale = target.norm(dim=1) / source.detach().norm(dim=1)
    torch.testing.assert_close(found.norm(dim=1), scale * gradient.norm(dim=1))
    # A rotation keeps angles: between gradient and target before, between new gradient and source after.
    before = torch.cosine_similarity(gradient, target)
    torch.testing.assert_close(torch.cosine_similarity(found, source.detach()), before)


def test_codes_nobody_uses_are_set_on_residuals_until_the_last_third():
    config = RqVae.Config(code_sizes=(4,), latent=2, reset_every=2, reset_until=0.5, steps=8)
    quantiser = ResidualQuantiser(config)
    with torch.no_grad():
        quantiser.codebooks[0].copy_(torch.tensor([[0.0, 0.0], [90.0, 0.0], [0.0, 90.0], [90.0, 90.0]]))
    latents = 0.1 * torch.ones(5, 2)
    for step in (0, 1):
        assert quantiser.codebooks[0][3].tolist() == [90.0, 90.0]
        quantiser(latents)
        quantiser.after_step(step)
    assert quantiser.codebooks[0][0].tolist() == [0.0, 0.0], "what is used stays"
    torch.testing.assert_close(quantiser.codebooks[0][1:].detach(), latents[:3])
    with torch.no_grad():
        quantiser.codebooks[0][3] = 90.0
    for step in (2, 3, 4, 5):
        quantiser(latents)
        quantiser.after_step(step) if step > 3 else quantiser.used[0].fill_(True)
    assert quantiser.codebooks[0][3].tolist() == [90.0, 90.0], "no reset in the second half"


@pytest.mark.parametrize("rotation", [True, False])
def test_an_rq_vae_uses_its_codes_where_raw_inputs_make_it_collapse(rotation):
    # Far from the origin, and dimensions of very different size.
    vectors = 50 + clustered_vectors(500) * np.geomspace(0.01, 10, 12, dtype=np.float32)
    config = RqVae.Config(
        code_sizes=(16, 16), latent=8, steps=400, reset_every=20, rotation=rotation, **SMALL
    )
    tokenizer = config.build(dim=12)
    tokenizer.fit(vectors)
    codes = tokenizer.encode(vectors)
    for level in range(2):
        assert len(np.unique(codes[:, level])) >= 0.8 * 16
    standard = (vectors - vectors.mean(0)) / vectors.std(0)
    decoded = (tokenizer.decode(codes) - vectors.mean(0)) / vectors.std(0)
    assert np.square(standard - decoded).mean() < 0.6, "the mean alone gives 1"


def test_finite_scalars_are_the_nearest_values_of_the_grid():
    tokenizer = FiniteScalar.Config(values=(3, 2), levels=2, steps=1, **SMALL).build(dim=12)
    vectors = clustered_vectors(100)
    tokenizer.fit(vectors)
    assert tokenizer.code_sizes == (6, 6)
    points, codes = tokenizer.project(vectors), tokenizer.encode(vectors)
    assert (np.abs(points) <= 1).all()
    for point, path in zip(points, codes, strict=True):
        for level in (0, 1):
            three, two = point[2 * level : 2 * level + 2]
            expected = (
                2 * np.abs(np.array([-1, 0, 1]) - three).argmin() + np.abs(np.array([-1, 1]) - two).argmin()
            )
            assert path[level] == expected


def test_unused_codes_are_reset_until_the_last_part_of_the_training():
    config = RqVae.Config(code_sizes=(4,), latent=2, steps=100, reset_every=10, reset_until=0.5)
    for step, is_reset in ((8, False), (9, True), (49, True), (59, False)):
        quantiser = ResidualQuantiser(config)
        with torch.no_grad():
            quantiser.codebooks[0][1:] = 99.0
        quantiser(torch.tensor([[0.1, 0.2], [0.3, 0.1]]))
        quantiser.after_step(step)
        assert bool((quantiser.codebooks[0][1:] < 1).all()) == is_reset
        assert quantiser.codebooks[0][0].tolist() == [0.0, 0.0], "a code that is used stays"


def test_weight_decay_keeps_the_weights_of_the_network_small():
    sizes = []
    for weight_decay in (0.0, 5.0):
        config = RqVae.Config(code_sizes=(4,), steps=200, weight_decay=weight_decay, **SMALL)
        tokenizer = config.build(dim=12)
        tokenizer.fit(clustered_vectors(100))
        sizes.append(sum(float(weight.square().sum()) for weight in tokenizer.encoder.parameters()))
    assert sizes[1] < 0.9 * sizes[0]


def test_the_learning_rate_rises_for_a_hundred_steps_and_falls_to_zero():
    rates = [_rate(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01) and rates[49] == pytest.approx(0.5, rel=0.01)
    assert rates[500] == pytest.approx(0.5) and rates[-1] < 1e-5
    assert rates[99:] == sorted(rates[99:], reverse=True)


def test_rounding_passes_the_gradient_of_the_bound():
    tokenizer = FiniteScalar.Config(values=(3, 2), levels=1, **SMALL).build(dim=12)
    latents = torch.tensor([[0.2, 0.2]], requires_grad=True)
    quantised, loss = Rounding(tokenizer)(latents)
    assert quantised.tolist() == [[0.0, 1.0]] and loss.tolist() == [0.0]
    quantised.sum().backward()
    slope = 1.001 * (1 - np.tanh(0.2) ** 2)
    np.testing.assert_allclose(latents.grad, [[slope, slope]], rtol=1e-5)


def test_a_loss_that_is_not_finite_ends_the_training():
    config = RqVae.Config(code_sizes=(4,), steps=40, learning_rate=1e30, **SMALL)
    with pytest.raises(DivergenceError, match="lower --learning-rate"):
        config.build(dim=12).fit(clustered_vectors(100))


def test_a_constant_dimension_does_no_harm():
    vectors = clustered_vectors(100)
    vectors[:, 3] = 7.0
    tokenizer = FiniteScalar.Config(values=(3,), levels=2, steps=20, **SMALL).build(dim=12)
    tokenizer.fit(vectors)
    decoded = tokenizer.decode(tokenizer.encode(vectors))
    assert np.isfinite(decoded).all() and np.abs(decoded[:, 3] - 7).max() < 5
