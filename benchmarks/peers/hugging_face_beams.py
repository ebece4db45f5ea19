"""The peer of beam search: `generate` of Hugging Face transformers with `prefix_allowed_tokens_fn`.

Runs as `python -m benchmarks.peers.hugging_face_beams FOLDER THREADS`; see benchmarks/setting/peer_process.py.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.peers.answers import answer_questions
from benchmarks.peers.nested_trie import allowed_codes, build_nested_trie


class HuggingFaceBeams:
    """A GPT-2 of the sizes of its weights, and a trie of the catalogue."""

    def __init__(self, folder: Path):
        shape = json.loads((folder / "shape.json").read_text())
        self.inputs = load_file(folder / "inputs.safetensors")
        self.num_levels = shape["num_levels"]
        self.trie = build_nested_trie(self.inputs["codes"].tolist())
        config = GPT2Config(
            vocab_size=shape["num_codes"],
            n_positions=shape["max_positions"],
            n_embd=shape["width"],
            n_layer=shape["num_layers"],
            n_head=shape["num_heads"],
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.model = GPT2LMHeadModel(config).eval()
        self.model.load_state_dict(load_file(folder / "weights.safetensors"))

    @torch.no_grad()
    def search(self, beams: int) -> tuple[Tensor, Tensor]:
        """Shapes: -> paths [B, beams, L], log-probabilities [B, beams]."""
        prompts = self.inputs["prompts"]
        length = prompts.shape[1]
        found = self.model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=self.num_levels,
            min_new_tokens=self.num_levels,
            num_beams=beams,
            num_return_sequences=beams,
            do_sample=False,
            length_penalty=0.0,
            pad_token_id=0,
            prefix_allowed_tokens_fn=lambda _, tokens: allowed_codes(self.trie, tokens[length:].tolist()),
            return_dict_in_generate=True,
            output_scores=True,
        )
        shape = (prompts.shape[0], beams)
        return found.sequences[:, length:].unflatten(0, shape), found.sequences_scores.view(shape)


def main(folder: Path, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    answer_questions(partial(_answer, HuggingFaceBeams(folder)))


def _answer(peer: HuggingFaceBeams, beams: int, tell: bool) -> dict[str, Any]:
    started = time.process_time()
    paths, log_probs = peer.search(beams)
    told = {"paths": paths.tolist(), "log_probs": log_probs.tolist()} if tell else {}
    return {"cpu_s": time.process_time() - started, **told}


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
