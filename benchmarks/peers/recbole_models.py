"""The peers of long sequences from RecBole: SASRec and GRU4Rec, which train on one target per row.

Runs as `python -m benchmarks.peers.recbole_models FOLDER THREADS`; see benchmarks/setting/peer_process.py. RecBole
makes a row of every prefix of a user; each answer is one optimizer step on some of them.
"""

import json
import sys
import time
from collections import UserDict
from pathlib import Path
from typing import Any

import torch
from recbole.model.sequential_recommender import SASRec
from recbole.model.sequential_recommender.gru4rec import GRU4Rec
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.peers.answers import answer_questions

MODELS = {"SASRec": SASRec, "GRU4Rec": GRU4Rec}


class Settings(UserDict):
    """RecBole's config object gives None for what is not set."""

    def __missing__(self, key: str) -> None:
        return None


class Catalogue:
    """What RecBole's models ask of a data set."""

    def __init__(self, num_items: int):
        self.num_items = num_items

    def num(self, field: str) -> int:
        return self.num_items + 1


class RecBolePeer:
    def __init__(self, folder: Path):
        shape = json.loads((folder / "shape.json").read_text())
        data = load_file(folder / "inputs.safetensors")
        self.shape, self.catalogue = shape, Catalogue(shape["num_items"])
        self.rows, self.lengths, self.targets = _prefixes(
            data["items"], data["targets"], data["lengths"], shape["max_length"]
        )
        self.running: dict[str, tuple[torch.nn.Module, torch.optim.Optimizer]] = {}
        self.generator = torch.Generator().manual_seed(0)

    def step(self, model: str, num_rows: int) -> None:
        """Forward, backward and update on random prefixes."""
        if model not in self.running:
            built = MODELS[model](self._settings(), self.catalogue)
            self.running[model] = built, torch.optim.Adam(built.parameters(), lr=1e-3)
        network, optimizer = self.running[model]
        chosen = torch.randint(len(self.targets), (num_rows,), generator=self.generator)
        loss = network.calculate_loss(
            {
                "item_id_list": self.rows[chosen],
                "item_length": self.lengths[chosen],
                "item_id": self.targets[chosen],
            }
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def _settings(self) -> Settings:
        shape = self.shape
        return Settings(
            USER_ID_FIELD="user_id",
            ITEM_ID_FIELD="item_id",
            LIST_SUFFIX="_list",
            ITEM_LIST_LENGTH_FIELD="item_length",
            NEG_PREFIX="neg_",
            MAX_ITEM_LIST_LENGTH=shape["max_length"],
            device=torch.device("cpu"),
            loss_type="CE",
            n_layers=shape["num_blocks"],
            n_heads=shape["num_heads"],
            hidden_size=shape["width"],
            inner_size=shape["width"],
            hidden_dropout_prob=0.2,
            attn_dropout_prob=0.2,
            hidden_act="gelu",
            layer_norm_eps=1e-12,
            initializer_range=0.02,
            embedding_size=shape["width"],
            num_layers=1,
            dropout_prob=0.2,
        )


def _prefixes(
    items: Tensor, targets: Tensor, lengths: Tensor, max_length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Every prefix as a padded row. Shapes: items, targets [T], lengths [U] -> [T, max_length], [T], [T]."""
    starts = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    counts = torch.arange(len(items)) - starts + 1
    places = torch.arange(max_length)
    is_real = places < counts[:, None]
    rows = torch.where(is_real, items[(starts[:, None] + places).clamp(max=len(items) - 1)] + 1, 0)
    return rows, counts, targets + 1


def main(folder: Path, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    peer = RecBolePeer(folder)

    def answer(**question: Any) -> dict[str, Any]:
        started = time.process_time()
        peer.step(**question)
        return {"cpu_s": time.process_time() - started}

    answer_questions(answer)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
