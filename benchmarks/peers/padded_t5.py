"""The peer of TIGER: a T5 of Hugging Face transformers that trains on padded rows, one per prefix of a user.

Runs as `python -m benchmarks.peers.padded_t5 FOLDER THREADS`; see benchmarks/setting/peer_process.py.
"""

import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from benchmarks.peers.answers import answer_questions

PADDING = 0


class PaddedT5:
    """Source: the sizes of TIGER in T5's own implementation; AdamW on every row once."""

    def __init__(self, folder: Path):
        self.shape = json.loads((folder / "shape.json").read_text())
        self.inputs = load_file(folder / "inputs.safetensors")
        torch.manual_seed(0)
        self.model = T5ForConditionalGeneration(
            T5Config(
                vocab_size=self.shape["vocabulary"],
                d_model=self.shape["width"],
                d_kv=self.shape["head_width"],
                d_ff=self.shape["feedforward_width"],
                num_layers=self.shape["num_encoder_blocks"],
                num_decoder_layers=self.shape["num_decoder_blocks"],
                num_heads=self.shape["num_heads"],
                dropout_rate=self.shape["dropout"],
                pad_token_id=PADDING,
                decoder_start_token_id=PADDING,
                eos_token_id=None,
                use_cache=False,
            )
        ).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.num_weights = sum(weight.numel() for weight in self.model.parameters())

    def train(self, trimmed: bool, precision: str) -> None:
        """Every prefix once, in steps of so many rows."""
        bf16 = precision == "bfloat16"
        for rows, mask, labels in self._batches(trimmed):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                loss = self.model(input_ids=rows, attention_mask=mask, labels=labels).loss
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    def _batches(self, trimmed: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Padded to the longest row of the step, or to the maximum length as published code does."""
        users, codes, lengths, targets = (
            self.inputs[name] for name in ("users", "codes", "lengths", "targets")
        )
        parts = codes.split(lengths.tolist())
        for first in range(0, len(users), self.shape["rows"]):
            some = slice(first, first + self.shape["rows"])
            length = 1 + int(lengths[some].max()) if trimmed else self.shape["max_length"]
            mask = torch.arange(length) < 1 + lengths[some][:, None]
            rows = torch.full(mask.shape, PADDING)
            rows[:, 0] = users[some]
            rows[:, 1:][mask[:, 1:]] = torch.cat(parts[some])
            yield rows, mask.long(), targets[some]


def main(folder: Path, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    answer_questions(partial(_answer, PaddedT5(folder)))


def _answer(peer: PaddedT5, trimmed: bool, precision: str) -> dict[str, Any]:
    started = time.process_time()
    peer.train(trimmed, precision)
    return {"cpu_s": time.process_time() - started, "num_weights": peer.num_weights}


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
