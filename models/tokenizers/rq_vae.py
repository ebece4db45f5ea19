"""RQ-VAE: an autoencoder whose latent is a sum of code vectors, one per level.

Source: TIGER (2023) for network and losses. It collapses to few codes unless it is helped: inputs are standardised
per dimension, codebooks start from residual k-means on the untrained encoder's latents, codes that nothing uses are
set on a random residual until two thirds of the training, and gradients pass the quantiser by the rotation trick
(Fifty et al., 2024).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from cluster.errors import ConfigError
from cluster.seeds import purpose_seed
from models.tokenizers.autoencoder import Autoencoder, Quantiser, Training
from models.tokenizers.clustering import kmeans, nearest
from models.tokenizers.tokenizer import Codebooks, require_at_least

_INITIAL_SAMPLE_PER_CODE = 64


class RqVae(Autoencoder):
    """The codebooks are learnt together with encoder and decoder."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Training, Codebooks):
        latent: int = 32
        """Width of the latent."""
        commitment: float = 0.25
        """Weight of pulling latents to their code vectors, beside 1 for the other way round."""
        rotation: bool = True
        """Pass gradients rotated and scaled from code vector to latent; off, unchanged (straight through)."""
        reset_every: int = 100
        """Steps after which codes that were not used since are set on random residuals."""
        reset_until: float = 2 / 3
        """Share of the training after which no code is reset, so that all settle."""

        def __post_init__(self):
            Training.__post_init__(self)
            Codebooks.__post_init__(self)
            require_at_least(self, latent=1)
            if not self.commitment >= 0:
                raise ConfigError(f"--commitment must be at least 0, got {self.commitment}")
            if not 0 <= self.reset_until <= 1 or self.reset_every < 1:
                raise ConfigError(
                    "--reset-until must be in 0..1 and --reset-every at least 1, got "
                    f"{self.reset_until} and {self.reset_every}"
                )

        def build(self, *, dim: int) -> "RqVae":
            return RqVae(self, dim, self.latent)

    def quantiser(self) -> "ResidualQuantiser":
        return ResidualQuantiser(self.config)

    def take_code_vectors(self, quantiser: Quantiser) -> list[np.ndarray]:
        return [codebook.detach().numpy().copy() for codebook in quantiser.codebooks]

    def sample_size(self) -> int:
        return max(self.config.code_sizes) * _INITIAL_SAMPLE_PER_CODE


class ResidualQuantiser(Quantiser):
    """Takes the nearest code vector of each level from what is left, and resets those that nothing uses."""

    def __init__(self, config: RqVae.Config):
        super().__init__()
        self.config = config
        self.codebooks = nn.ParameterList(
            nn.Parameter(torch.zeros(size, config.latent)) for size in config.code_sizes
        )
        self.generator = torch.Generator().manual_seed(purpose_seed(config.seed, "code resets"))
        self.used = [torch.zeros(size, dtype=torch.bool) for size in config.code_sizes]
        self.residuals: list[Tensor] = []

    @torch.no_grad()
    def start(self, latents: Tensor) -> None:
        residual = latents.numpy().copy()
        for level, codebook in enumerate(self.codebooks):
            seed = purpose_seed(self.config.seed, "k-means", level)
            centroids = kmeans(residual, len(codebook), seed=seed)
            codebook.copy_(torch.from_numpy(centroids))
            residual -= centroids[nearest(residual, centroids)]

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """||sg(r) - e||^2 + commitment * ||r - sg(e)||^2, summed over the levels, with residuals r."""
        quantised, loss = torch.zeros_like(latents), torch.zeros(len(latents))
        self.residuals = []
        for codebook, used in zip(self.codebooks, self.used, strict=True):
            residual = latents - quantised.detach()
            with torch.no_grad():
                codes = torch.cdist(residual, codebook).argmin(1)
                used[codes] = True
            self.residuals.append(residual.detach())
            chosen = codebook[codes]
            loss = loss + (residual.detach() - chosen).square().sum(1)
            loss = loss + self.config.commitment * (residual - chosen.detach()).square().sum(1)
            quantised = quantised + chosen
        quantised = quantised.detach()
        passed = (
            rotate(latents, quantised) if self.config.rotation else latents + (quantised - latents).detach()
        )
        return passed, loss

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if (step + 1) % self.config.reset_every:
            return
        for codebook, used, residual in zip(self.codebooks, self.used, self.residuals, strict=True):
            if step < self.config.reset_until * self.config.steps:
                unused = (~used).nonzero().squeeze(1)
                rows = torch.randint(len(residual), (len(unused),), generator=self.generator)
                codebook[unused] = residual[rows]
            used.zero_()


def rotate(source: Tensor, target: Tensor) -> Tensor:
    """`target`, with the gradient to `source` of the rotation and scaling that leads from one to the other.

    R = I - 2 r r' + 2 t s' with unit vectors s, t and r along s + t; R, and the scale, are constants.

    Shapes: [n, d] each -> [n, d].
    """
    with torch.no_grad():
        source_norm = source.norm(dim=1, keepdim=True).clamp(min=1e-6)
        scale = target.norm(dim=1, keepdim=True) / source_norm
        s, t = source / source_norm, target / target.norm(dim=1, keepdim=True).clamp(min=1e-6)
        r = nn.functional.normalize(s + t, dim=1)
    along_r = (source * r).sum(1, keepdim=True)
    along_s = (source * s).sum(1, keepdim=True)
    return scale * (source - 2 * along_r * r + 2 * along_s * t)
