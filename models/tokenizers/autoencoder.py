"""The network around a learnt quantiser, and its training: what RQ-VAE and finite scalar quantisation share.

Shapes: n items, D input width, d latent width.
"""

import logging
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from cluster.errors import ConfigError, DivergenceError
from cluster.seeds import purpose_seed
from models.tokenizers.tokenizer import Matrix, Tokenizer, blocks, require_at_least, take_sample

_SHOWN_EVERY = 20
_LINE_EVERY_S = 10.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Training:
    """Options of the network and its training."""

    hidden: tuple[int, ...] = (512, 256, 128)
    """Widths of the encoder's hidden layers; the decoder mirrors them."""
    steps: int = 5_000
    """Optimizer steps."""
    batch_size: int = 1024
    """Items drawn for each step."""
    learning_rate: float = 1e-3
    """Of AdamW, after a hundred steps of warm-up and down to zero on a cosine."""
    weight_decay: float = 0.01
    """Of AdamW, on the weights of the network."""

    def __post_init__(self):
        require_at_least(self, steps=1, batch_size=1, hidden=1)
        if not (self.learning_rate > 0 and self.weight_decay >= 0):
            raise ConfigError(
                "--learning-rate must be above 0 and --weight-decay at least 0, got "
                f"{self.learning_rate} and {self.weight_decay}"
            )


class Quantiser(nn.Module, ABC):
    """What stands between encoder and decoder while they are trained."""

    def start(self, latents: Tensor) -> None:
        """Set initial values from the untrained encoder's latents [n, d] of a sample."""

    @abstractmethod
    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """What the decoder gets [n, d], with a gradient to the latents, and a loss per item [n]."""

    def after_step(self, step: int) -> None:
        """Called when an optimizer step is done, the first with 0."""


class Autoencoder(Tokenizer):
    """Standardises each input dimension over the catalogue; errors are measured in that space while training."""

    def __init__(self, config: Training, dim: int, latent_width: int):
        super().__init__(config, dim)
        widths = (dim, *config.hidden, latent_width)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(purpose_seed(config.seed, "autoencoder"))
            self.encoder, self.decoder = _layers(widths), _layers(widths[::-1])
        self.mean, self.scale = np.zeros(dim, np.float32), np.ones(dim, np.float32)

    @abstractmethod
    def quantiser(self) -> Quantiser:
        """A new one, to be trained."""

    @abstractmethod
    def take_code_vectors(self, quantiser: Quantiser) -> list[np.ndarray]:
        """The code vectors of a trained quantiser."""

    def bound(self, latents: Tensor) -> Tensor:
        """From the encoder's output to the space of the code vectors."""
        return latents

    def sample_size(self) -> int:
        """Items whose latents the quantiser starts from."""
        return self.config.batch_size

    def fit(self, vectors: Matrix) -> None:
        self.mean, self.scale = _moments(vectors)
        quantiser = self.quantiser()
        sample = take_sample(vectors, self.sample_size(), purpose_seed(self.config.seed, "sample"))
        with torch.no_grad():
            quantiser.start(self.encoder(self._standardise(sample)))
        self._train(quantiser, vectors)
        self.code_vectors = self.take_code_vectors(quantiser)

    def project(self, vectors: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.bound(self.encoder(self._standardise(vectors))).numpy()

    def unproject(self, points: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.decoder(torch.from_numpy(points)).numpy() * self.scale + self.mean

    def arrays(self) -> dict[str, np.ndarray]:
        weights = {
            f"{part}.{name}": tensor.numpy()
            for part in ("encoder", "decoder")
            for name, tensor in getattr(self, part).state_dict().items()
        }
        return {"mean": self.mean, "scale": self.scale, **weights}

    def set_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        self.mean, self.scale = arrays["mean"], arrays["scale"]
        for part in ("encoder", "decoder"):
            module: nn.Module = getattr(self, part)
            module.load_state_dict(
                {name: torch.from_numpy(arrays[f"{part}.{name}"]) for name in module.state_dict()}
            )

    def _standardise(self, vectors: np.ndarray) -> Tensor:
        return torch.from_numpy((np.asarray(vectors, dtype=np.float32) - self.mean) / self.scale)

    def _train(self, quantiser: Quantiser, vectors: Matrix) -> None:
        """Mean over the batch of ||x - x'||^2 plus the quantiser's own loss, by AdamW."""
        config = self.config
        random = np.random.default_rng(purpose_seed(config.seed, "batches"))
        optimizer = torch.optim.AdamW(
            [
                {
                    "params": [*self.encoder.parameters(), *self.decoder.parameters()],
                    "weight_decay": config.weight_decay,
                },
                {"params": list(quantiser.parameters()), "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            fused=True,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, config.steps))
        with _TrainingProgress(config.steps) as progress:
            for step in range(config.steps):
                rows = np.sort(random.integers(0, vectors.shape[0], config.batch_size))
                target = self._standardise(vectors[rows])
                quantised, own_loss = quantiser(self.encoder(target))
                loss = ((self.decoder(quantised) - target).square().sum(1) + own_loss).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                quantiser.after_step(step)
                if (step + 1) % _SHOWN_EVERY == 0 or step + 1 == config.steps:
                    progress.show(step + 1, _finite(loss, step))


def _layers(widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _moments(vectors: Matrix) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each dimension; 1 where a dimension is constant."""
    total, squares = np.zeros(vectors.shape[1]), np.zeros(vectors.shape[1])
    for _, block in blocks(vectors):
        total += block.sum(axis=0, dtype=np.float64)
        squares += np.square(block, dtype=np.float64).sum(axis=0)
    mean = total / vectors.shape[0]
    variance = np.maximum(squares / vectors.shape[0] - mean**2, 0)
    is_constant = variance < 1e-12 * np.maximum(mean**2, 1e-12)
    return mean.astype(np.float32), np.where(is_constant, 1, np.sqrt(variance)).astype(np.float32)


def _rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / 100) * 0.5 * (1 + np.cos(np.pi * step / steps))


class _TrainingProgress:
    """A bar on a terminal, a line now and then anywhere else; a context manager around the training."""

    def __init__(self, steps: int):
        console = Console(stderr=True)
        self.steps, self.is_terminal = steps, console.is_terminal
        self.said_at = time.monotonic()
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("", total=steps, loss="")

    def __enter__(self) -> "_TrainingProgress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, step: int, loss: float) -> None:
        self.bar.update(self.task, completed=step, loss=f"{loss:.4f}")
        if not self.is_terminal and time.monotonic() - self.said_at > _LINE_EVERY_S:
            self.said_at = time.monotonic()
            logger.info("step %d/%d, loss %.4f", step, self.steps, loss)


def _finite(loss: Tensor, step: int) -> float:
    value = loss.item()
    if not np.isfinite(value):
        raise DivergenceError(f"the loss of the tokenizer is {value} at step {step}; lower --learning-rate")
    return value
