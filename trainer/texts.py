"""The text side of a run: its tokenizer, which stays with the run directory, and the items and users in its tokens."""

import logging

from cluster.storage import Storage
from data_streams.jagged import Jagged
from data_streams.text_lines import item_lines, user_lines
from data_streams.text_tokenizer import TOKENIZER, TextTokenizer
from models.texts import Texts
from trainer.configuration import PretrainConfig

logger = logging.getLogger(__name__)


def load_texts(config: PretrainConfig) -> Texts | None:
    """What a model that reads text is built with; None for others.

    Raises: ConfigError where there is no text, or no way to cut it into tokens.
    """
    if not getattr(config.model, "needs_texts", False):
        return None
    text = config.model.text
    lines = item_lines(config.data.path, text.columns) if config.model.reads_item_texts else None
    tokenizer = find_tokenizer(config, lines)
    profiles = user_lines(config.data.path) if text.profiles else None
    return Texts(
        items=None if lines is None else _encode(tokenizer, lines, text.max_tokens, "items"),
        users=None if profiles is None else _encode(tokenizer, profiles, text.max_tokens, "users"),
        encode=lambda texts: tokenizer.encode(texts, text.max_tokens)[0],
        vocabulary_size=tokenizer.size,
        fingerprint=tokenizer.fingerprint,
    )


def find_tokenizer(config: PretrainConfig, lines: list[str] | None) -> TextTokenizer:
    """That of the run directory; else of the run it starts from, of the language model, or trained on the lines of the
    items, which are read where they are not given.

    The last three are written to the run directory, so that the run keeps it. Training depends on the lines alone:
    ranks that train at the same time write the same file, each whole.
    """
    for folder in filter(None, (config.run_dir, config.init_from)):
        if Storage(folder).exists(TOKENIZER):
            tokenizer = TextTokenizer.load(folder)
            break
    else:
        pretrained, text = config.model.pretrained, config.model.text
        if pretrained:
            tokenizer = TextTokenizer.load(pretrained)
        else:
            lines = item_lines(config.data.path, text.columns) if lines is None else lines
            tokenizer = TextTokenizer.train(lines, text.vocabulary_size)
    if config.run_dir and not Storage(config.run_dir).exists(TOKENIZER):
        Storage(config.run_dir).make_directory()
        tokenizer.save(config.run_dir)
    return tokenizer


def _encode(tokenizer: TextTokenizer, lines: list[str], max_tokens: int, whose: str) -> Jagged:
    rows, num_cut = tokenizer.encode(lines, max_tokens)
    logger.info(
        "Texts of %d %s in %d tokens; %d of them were cut off at %d tokens (model.text.max-tokens).",
        *(len(lines), whose, len(rows.values), num_cut, max_tokens),
    )
    return rows
