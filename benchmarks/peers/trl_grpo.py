"""The peer of alignment: `GRPOTrainer` of TRL on a GPT-2 with the same weights, prompts, group size and reward.

Runs as `python -m benchmarks.peers.trl_grpo FOLDER THREADS`; see benchmarks/setting/peer_process.py.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.peers.answers import answer_questions

END, PADDING = -2, -1
"""Words of the vocabulary that no prompt has, counted from its end."""


class StepTimes(TrainerCallback):
    """When each optimizer step ended, by wall clock and by processor time."""

    def __init__(self):
        self.ends: list[tuple[float, float]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append((time.perf_counter(), time.process_time()))


def reward(completions: list[str], **_: Any) -> list[float]:
    """The sum of the words' numbers."""
    return [sum(float(word[1:]) for word in completion.split()) for completion in completions]


def train(folder: Path, prompt: int, group: int, steps: int) -> list[tuple[float, float]]:
    """Seconds and processor seconds of each step but the first."""
    shape = json.loads((folder / "shape.json").read_text())
    words = [f"w{number}" for number in range(shape["num_codes"])]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(words), eos_token=words[END], pad_token=words[PADDING]
    )
    prompts = load_file(folder / f"prompts-{prompt}.safetensors")["prompts"]
    texts = [" ".join(words[word] for word in row) for row in prompts.tolist()]
    times = StepTimes()
    trainer = GRPOTrainer(
        model=_model(folder, shape),
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=len(texts) * group,
            num_generations=group,
            max_completion_length=shape["num_levels"],
            generation_kwargs={"min_new_tokens": shape["num_levels"]},
            max_steps=steps + 1,
            beta=0.0,
            learning_rate=1e-4,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer,
        callbacks=[times],
    )
    trainer.train()
    return [
        (wall - wall_before, cpu - cpu_before)
        for (wall_before, cpu_before), (wall, cpu) in zip(times.ends, times.ends[1:], strict=False)
    ]


def _tokenizer(words: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return tokenizer


def _model(folder: Path, shape: dict[str, int]) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=shape["num_codes"],
        n_positions=shape["max_positions"],
        n_embd=shape["width"],
        n_layer=shape["num_layers"],
        n_head=shape["num_heads"],
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=shape["num_codes"] + END,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config)
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    return model


def main(folder: Path, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)  # those of the benchmark's own process group
    answer_questions(lambda **question: {"steps": train(folder, **question)})


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
