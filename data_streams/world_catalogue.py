"""The items of the synthetic world: their names, how they look, and which kinds follow each other."""

from dataclasses import dataclass

import numpy as np
import polars as pl

STYLES = ("Rustic", "Modern", "Vintage", "Minimal", "Playful", "Elegant", "Nordic", "Royal")
MATERIALS = (
    "Oak",
    "Steel",
    "Linen",
    "Copper",
    "Bamboo",
    "Glass",
    "Wool",
    "Clay",
    "Marble",
    "Cork",
    "Silk",
    "Slate",
)
DEPARTMENTS = {
    "Kitchen": ("Kettle", "Pan", "Mug", "Bowl", "Knife", "Tray"),
    "Living": ("Lamp", "Sofa", "Rug", "Shelf", "Cushion", "Clock"),
    "Garden": ("Bench", "Planter", "Lantern", "Hose", "Rake", "Birdhouse"),
    "Office": ("Desk", "Chair", "Notebook", "Pen", "Organizer", "Stapler"),
    "Travel": ("Backpack", "Suitcase", "Pillow", "Bottle", "Adapter", "Wallet"),
    "Sports": ("Mat", "Racket", "Helmet", "Gloves", "Ball", "Tent"),
    "Music": ("Guitar", "Drum", "Speaker", "Flute", "Stand", "Tuner"),
    "Fashion": ("Scarf", "Jacket", "Belt", "Boots", "Hat", "Watch"),
    "Toys": ("Puzzle", "Kite", "Robot", "Train", "Blocks", "Doll"),
    "Care": ("Soap", "Brush", "Towel", "Candle", "Mirror", "Comb"),
}
STYLE_DIM = 6
STYLE_NOISE = 0.2
NUM_SUCCESSORS = 2
POPULARITY_EXPONENT = 0.8
"""Zipf exponent of the shares in which items are shown as popular."""


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """Shapes: N items in C clusters of at most M items."""

    cluster: np.ndarray
    """[N] cluster of each item."""
    members: np.ndarray
    """[C, M] items of each cluster, -1 where it has fewer."""
    style: np.ndarray
    """[N, STYLE_DIM] how an item looks."""
    look: np.ndarray
    """[N] named style an item is called by."""
    archetypes: np.ndarray
    """[len(STYLES), STYLE_DIM] the named styles, of length 1."""
    quality: np.ndarray
    """[N] appeal to everyone, standard normal."""
    popularity: np.ndarray
    """[N] share of each item among those shown as popular; sums to 1."""
    duration_s: np.ndarray
    """[N] how long an item can be looked at."""
    successors: np.ndarray
    """[C, NUM_SUCCESSORS] clusters that people turn to after a cluster, by their temper."""

    @staticmethod
    def draw(num_items: int, num_clusters: int, seed: int) -> "Catalogue":
        """The catalogue depends on the seed and the two sizes only."""
        rng = np.random.default_rng([seed, 1])
        cluster = rng.permutation(np.arange(num_items) % num_clusters)
        archetypes = rng.standard_normal((len(STYLES), STYLE_DIM))
        archetypes /= np.linalg.norm(archetypes, axis=1, keepdims=True)
        look = rng.integers(len(STYLES), size=num_items)
        style = archetypes[look] + STYLE_NOISE * rng.standard_normal((num_items, STYLE_DIM))
        quality = rng.standard_normal(num_items)
        rank = np.argsort(np.argsort(-(quality + rng.standard_normal(num_items))))
        popularity = (rank + 10.0) ** -POPULARITY_EXPONENT
        return Catalogue(
            cluster=cluster,
            members=_members(cluster, num_clusters),
            style=style,
            look=look,
            archetypes=archetypes,
            quality=quality,
            popularity=popularity / popularity.sum(),
            duration_s=np.exp(rng.normal(3.5, 0.6, num_items)).astype(np.float32),
            successors=_successors(num_clusters, rng),
        )

    def table(self) -> pl.DataFrame:
        """The item table with readable titles; the id of an item is its row."""
        kinds = [(department, noun) for department, nouns in DEPARTMENTS.items() for noun in nouns]
        names, categories, taken = [], [], {}
        for item, cluster in enumerate(self.cluster.tolist()):
            department, noun = kinds[cluster % len(kinds)]
            series = f" {cluster // len(kinds) + 1}" if cluster >= len(kinds) else ""
            name = f"{STYLES[self.look[item]]} {MATERIALS[item % len(MATERIALS)]} {noun}{series}"
            taken[name] = taken.get(name, 0) + 1
            names.append(name if taken[name] == 1 else f"{name} No. {taken[name]}")
            categories.append([department, f"{noun}{series}"])
        return pl.DataFrame(
            {
                "item_id": np.arange(len(names)),
                "title": names,
                "categories": categories,
                "duration_s": self.duration_s,
            }
        )


def _members(cluster: np.ndarray, num_clusters: int) -> np.ndarray:
    sizes = np.bincount(cluster, minlength=num_clusters)
    members = np.full((num_clusters, sizes.max()), -1)
    members[np.arange(sizes.max()) < sizes[:, None]] = np.argsort(cluster, kind="stable")
    return members


def _successors(num_clusters: int, rng: np.random.Generator) -> np.ndarray:
    """Each cluster has successors of its own, and none follows itself: shifts of one random cycle."""
    cycle = rng.permutation(num_clusters)
    place = np.argsort(cycle)
    shifts = 1 + rng.permutation(num_clusters - 1)[:NUM_SUCCESSORS]
    return np.stack([cycle[(place + shift) % num_clusters] for shift in shifts], axis=1)
