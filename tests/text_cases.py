"""Small models that read text, and made-up texts for them."""

from collections.abc import Sequence
from functools import partial

import torch

from data_streams.jagged import Jagged
from models.m6rec import M6Rec
from models.m6rec_infilling import M6RecInfilling
from models.m6rec_ranking import M6RecRanking
from models.objectives.retrieval import RetrievalObjective
from models.recommender import Recommender
from models.texts import Texts

WORDS = 40
SMALL = {
    "width": 16,
    "num_blocks": 3,
    "num_heads": 2,
    "feedforward_width": 24,
    "dropout": 0.0,
    "init_scale": 0.5,
    "separate_blocks": 1,
}
TEXT_MODELS = {
    "m6-rec": partial(M6Rec.Config, **SMALL, region="behaviours"),
    "m6-rec as published": partial(M6Rec.Config, **SMALL, positions=2),
    "m6-rec-infilling": partial(M6RecInfilling.Config, **SMALL),
    "m6-rec-ranking": partial(
        M6RecRanking.Config, **SMALL, region="behaviours", window="span", likeness=True
    ),
    "m6-rec-ranking as published": partial(M6RecRanking.Config, **SMALL, language_weight=0.5),
    "m6-rec-ranking of adapters": partial(
        M6RecRanking.Config, **SMALL, tuning="option-adapter", num_soft_prompts=6, adapter_width=4
    ),
}
TEXT_RANKERS = tuple(name for name in TEXT_MODELS if "ranking" in name)


def make_texts(num_items: int, num_users: int = 0) -> Texts:
    """Items of one to five words, and users of none to three where there are any."""
    generator = torch.Generator().manual_seed(3)

    def rows(count: int, fewest: int) -> Jagged:
        lengths = fewest + torch.arange(count) * 7 % (6 - fewest)
        values = torch.randint(WORDS, (int(lengths.sum()),), generator=generator)
        return Jagged.from_lengths(values.int(), lengths)

    return Texts(
        items=rows(num_items, 1),
        users=rows(num_users, 0) if num_users else None,
        encode=by_letters,
        vocabulary_size=WORDS,
        fingerprint="made up",
    )


def by_letters(texts: Sequence[str]) -> Jagged:
    """A token per letter."""
    values = [ord(letter) % WORDS for text in texts for letter in text]
    return Jagged.from_lengths(torch.tensor(values).int(), torch.tensor([len(text) for text in texts]))


def make_text_model(
    name: str,
    seed: int,
    *,
    num_items: int,
    objective: RetrievalObjective | None = None,
    actions: tuple[str, ...] = (),
    num_users: int = 0,
    **options,
) -> Recommender:
    torch.manual_seed(seed)
    parts = {"actions": actions} if name in TEXT_RANKERS else {"objective": objective}
    return TEXT_MODELS[name](**options).build(texts=make_texts(num_items, num_users), **parts)
