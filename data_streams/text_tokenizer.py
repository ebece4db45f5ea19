"""Text as numbers: a tokenizer of the `tokenizers` library (extra `hf`), from a folder on disk or trained here."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch

from cluster.errors import ConfigError
from cluster.storage import Storage
from data_streams.jagged import Jagged

TOKENIZER = "tokenizer.json"
FEWEST_TOKENS = 256
"""Every byte has a token, so that there is none for the unknown."""
MOST_TEXTS = 200_000
"""Texts that a tokenizer is trained on: more of them change little and take long."""
_TEXTS_AT_A_TIME = 50_000


class TextTokenizer:
    """Cuts texts into tokens 0 .. size - 1, without any special ones; the same for the same file or texts."""

    def __init__(self, tokenizer: Any):
        """Of a `tokenizers.Tokenizer`, which must not cut or fill up texts by itself."""
        self._tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()

    @staticmethod
    def load(folder: str) -> "TextTokenizer":
        """That of `tokenizer.json` in a folder or at an address; no code that lies there is run.

        Raises: ConfigError where the library or the file is missing, or the file is none of a tokenizer.
        """
        library, storage = _library(), Storage(folder)
        if not storage.exists(TOKENIZER):
            raise ConfigError(
                f"{folder} must hold {TOKENIZER}, the tokenizer of the language model, and does not; copy it there "
                "from where the model comes from"
            )
        try:
            return TextTokenizer(library.Tokenizer.from_str(storage.read(TOKENIZER).decode()))
        except Exception as error:
            # The library raises nothing narrower.
            raise ConfigError(
                f"{storage.path(TOKENIZER)} must be a file of the tokenizers library, and cannot be read: {error}; "
                "copy it again"
            ) from error

    @staticmethod
    def train(texts: Sequence[str], size: int) -> "TextTokenizer":
        """Byte pairs of lower-case text, at most `size` tokens; the result depends on the texts alone.

        Raises: ConfigError where the library is missing or the size is too small.
        """
        if size < FEWEST_TOKENS:
            raise ConfigError(
                f"model.text.vocabulary-size must be at least {FEWEST_TOKENS}, one token for each byte, got {size}"
            )
        library = _library()
        from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

        tokenizer = library.Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            min_frequency=2,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        every = -(-len(texts) // MOST_TEXTS) or 1
        tokenizer.train_from_iterator(islice(texts, 0, None, every), trainer)
        return TextTokenizer(tokenizer)

    def save(self, folder: str) -> None:
        Storage(folder).write(TOKENIZER, self._json.encode())

    @cached_property
    def size(self) -> int:
        """One more than the last token, as numbers before it may stand for nothing."""
        return max(self._tokenizer.get_vocab().values(), default=-1) + 1

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the tokens and with how text is cut into them."""
        return hashlib.sha256(self._json.encode()).hexdigest()[:16]

    @cached_property
    def _json(self) -> str:
        return self._tokenizer.to_str()

    def encode(self, texts: Sequence[str], max_tokens: int) -> tuple[Jagged, int]:
        """The first tokens of each text, and how many texts were cut off. Shapes: int32 tokens, a row per text."""
        values, lengths, num_cut = [], [], 0
        for start in range(0, len(texts), _TEXTS_AT_A_TIME):
            part = self._tokenizer.encode_batch(
                list(texts[start : start + _TEXTS_AT_A_TIME]), add_special_tokens=False
            )
            for encoding in part:
                tokens = encoding.ids
                num_cut += len(tokens) > max_tokens
                values.append(np.array(tokens[:max_tokens], dtype=np.int32))
                lengths.append(len(values[-1]))
        joined = np.concatenate([np.zeros(0, dtype=np.int32), *values])
        rows = Jagged.from_lengths(torch.from_numpy(joined), torch.tensor(lengths, dtype=torch.int64))
        return rows, num_cut


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError(
            "a model that reads text needs the tokenizers library; install the extra: pip install -e '.[hf]'"
        ) from error
    return tokenizers
