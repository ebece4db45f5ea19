"""Puts a run's parts together from its configuration: data, model, tables, engine."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist

from cluster.errors import ConfigError
from cluster.process import Process
from cluster.seeds import purpose_seed
from cluster.storage import Storage
from data_streams.evaluation_stream import EvaluationStream
from data_streams.item_conditions import ItemConditions
from data_streams.item_table import ItemTable
from data_streams.manifest import Manifest
from data_streams.semantic_ids import SemanticIdTable
from models.generator import Generator
from models.node_scorer import NodeScorer
from models.recommender import Ranker, Recommender
from models.semantic_ids import SemanticIds
from models.tables import Lookup
from sharding.lookup import ItemFeatures, make_lookup
from sharding.tables import EmbeddingTables
from sharding.unsharded import UnshardedTables
from trainer.attributes import add_attributes, described_attributes
from trainer.blocks import compile_blocks, recompute_blocks
from trainer.conditions import conditional_search, load_conditions, model_conditions
from trainer.configuration import PretrainConfig
from trainer.dense_module import DenseModule, resolve_precision
from trainer.generative_search import GenerativeSearch, PrefixReward, check_prm
from trainer.item_lists import allowed_rows
from trainer.search import RetrievalSearch, Search
from trainer.texts import load_texts
from trainer.tree_search import TreeSearch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """The parts of a run on one rank."""

    config: PretrainConfig
    process: Process
    items: ItemTable
    item_features: ItemFeatures | None
    semantic_ids: SemanticIdTable | None
    """Of a model that generates."""
    model: Recommender
    tables: EmbeddingTables

    def lookup(self) -> Lookup:
        """For evaluation and serving; a collective call."""
        return make_lookup(self.model.all_tables(), self.tables, self.item_features, self.process.device)

    def search(
        self,
        precision: torch.dtype = torch.float32,
        *,
        width: int | None = None,
        prm: "Assembly | None" = None,
        recall_among: int | None = None,
    ) -> Search:
        """Search with the weights as they are now; a collective call.

        Of a model that generates, `width` is that of the beam, if not the configured one, `prm` has the process reward
        model that steers it, if not its own, and `recall_among` is how many prefixes HRecall looks at.

        Raises: ConfigError for a model that only scores given items, or a PRM that does not fit.
        """
        if isinstance(self.model, Ranker):
            raise ConfigError(
                f"{self.config.run_dir} holds a {type(self.model).__name__}, which scores given items and cannot find "
                "any; recommend with a run of another recipe"
            )
        parts = {
            "device": self.process.device,
            "process": self.process,
            "precision": precision,
            "allowed": allowed_rows(self.config.search, self.items),
        }
        if isinstance(self.model, Generator):
            config = self.config.search
            if width is not None:
                config = replace(config, width=width, earlier_widths=(), candidates=(), depth_candidates=())
            codes = torch.from_numpy(self.semantic_ids.codes)
            parts |= {"reward": self._prefix_reward(prm), "recall_among": recall_among}
            kind = TreeSearch if isinstance(self.model, NodeScorer) else GenerativeSearch
            search = kind.build(self.model, self.lookup(), codes, config=config, **parts)
        else:
            search = RetrievalSearch.build(
                self.model,
                self.lookup(),
                num_items=self.items.num_items,
                approximate=self.config.evaluation.index == "hnsw",
                **parts,
            )
        conditions = self.conditions()
        return (
            search if conditions is None else conditional_search(search, conditions, self.config.evaluation)
        )

    def _prefix_reward(self, prm: "Assembly | None") -> PrefixReward | None:
        if not self.config.search.prm:
            return None
        source = prm or self
        check_prm(source, self)
        return PrefixReward(model=source.model, lookup=source.lookup())

    def conditions(self) -> ItemConditions | None:
        """What evaluation and serving ask items to meet."""
        return load_conditions(self.config)

    def users(
        self,
        split: Literal["valid", "test", "serve"],
        *,
        rows: Sequence[int] | None = None,
        everyone: bool = False,
    ) -> EvaluationStream:
        """This rank's share of the users of a split, or everyone; of some user rows alone, where these are given."""
        return EvaluationStream(
            self.config.data,
            split=split,
            rank=0 if everyone else self.process.rank,
            world_size=1 if everyone else self.process.world_size,
            rows=rows,
            users_per_batch=self.config.evaluation.users_per_batch,
            user_share=self.config.evaluation.user_share,
            held_out_action=self.config.evaluation.held_out_action,
        )

    def module(self, wrap: Callable[[Recommender, torch.dtype], DenseModule] = DenseModule) -> DenseModule:
        """What the engine wraps, `wrap(model, precision)`; a collective call where experts are spread over ranks.

        Raises: ConfigError if an option asks for blocks or experts and the model has none.
        """
        if not self.config.cluster.in_process:
            from sharding.experts import shard_experts

            shard_experts(self.model, self.config.sharding.expert_parallel, self.process)
        if self.config.train.compile:
            compile_blocks(self.model)
        if self.config.train.activation_checkpointing:
            recompute_blocks(self.model)
        return wrap(self.model, resolve_precision(self.config.train.precision, self.process.device))


def assemble(config: PretrainConfig, process: Process, items: ItemTable | None = None) -> Assembly:
    """Build model and sharded tables with their initial values; a collective call."""
    items = items or ItemTable.load(config.data.path)
    features = load_item_features(config, items)
    semantic_ids = load_semantic_ids(config, items)
    model = build_model(config, items, features, semantic_ids).to(process.device)
    return Assembly(
        config=config,
        process=process,
        items=items,
        item_features=features,
        semantic_ids=semantic_ids,
        model=model,
        tables=_make_tables(model, config, process),
    )


def _make_tables(model: Recommender, config: PretrainConfig, process: Process) -> EmbeddingTables:
    """Spread over the workers, or whole in the command's own process; a collective call."""
    rates = {"seed": config.seed, "learning_rate": config.train.table_learning_rate}
    if config.cluster.in_process:
        return UnshardedTables(model.all_tables(), device=process.device, **rates)
    from sharding.apply import spread_tables

    return spread_tables(model.all_tables(), process=process, config=config.sharding, **rates)


def load_semantic_ids(config: PretrainConfig, items: ItemTable) -> SemanticIdTable | None:
    """The table of a model that generates; it must be of exactly this catalogue."""
    if not getattr(config.model, "needs_semantic_ids", False):
        return None
    return SemanticIdTable.load(config.data.semantic_ids, items.item_ids)


def build_model(
    config: PretrainConfig,
    items: ItemTable,
    features: ItemFeatures | None,
    semantic_ids: SemanticIdTable | None,
) -> Recommender:
    """The dense part with its initial weights, which depend on the configuration alone."""
    torch.manual_seed(purpose_seed(config.seed, "initial weights"))
    parts: dict[str, Any] = model_conditions(config)
    if config.objective is not None:
        counts = {"item_counts": items.train_counts} if config.objective.needs_item_counts else {}
        parts["objective"] = config.objective.build(num_items=items.num_items, **counts)
    if getattr(config.model, "needs_actions", False):
        parts["actions"] = tuple(Manifest.load(Storage(config.data.path)).actions)
    if getattr(config.model, "has_objectives", False):
        parts["asked"] = config.evaluation.objective
    elif config.evaluation.objective:
        raise ConfigError(
            f"evaluation.objective {config.evaluation.objective} needs a model of several objectives (grail pretrain "
            f"urm), and this is a {type(config.model).__qualname__.split('.')[0]}; leave it out"
        )
    if getattr(config.model, "exits", ()):
        parts["exit_confidence"] = config.evaluation.exit_confidence
    elif config.evaluation.exit_confidence < 1:
        raise ConfigError(
            f"evaluation.exit-confidence {config.evaluation.exit_confidence} needs a model that was trained with exits "
            "(grail pretrain m6-rec-ranking --model.exits ...); leave it out"
        )
    if (texts := load_texts(config)) is not None:
        parts["texts"] = texts
    if semantic_ids is not None:
        codes = torch.from_numpy(semantic_ids.codes).long()
        parts["semantic_ids"] = SemanticIds(codes=codes, code_sizes=semantic_ids.code_sizes)
    model = config.model.build(
        num_items=items.num_items,
        max_length=config.data.max_length,
        item_feature_dim=features.dim if features else 0,
        **parts,
    )
    add_attributes(model, config.data)
    return model


def load_item_features(config: PretrainConfig, items: ItemTable) -> ItemFeatures | None:
    """The items' embedding matrix where the model uses it.

    Raises: ConfigError if the model asks for item features and the data set has none.
    """
    if not getattr(config.model, "item_features", False):
        return None
    if items.embeddings is None:
        raise ConfigError(
            f"model.item-features needs an embedding per item, and {config.data.path} has none: build the data "
            "with --embeddings FILE.npy, or leave --model.item-features out"
        )
    return ItemFeatures(items.embeddings)


def describe_model(assembly: Assembly) -> dict[str, Any]:
    """What must stay the same for a checkpoint to belong to the run."""
    config, table = assembly.config, assembly.semantic_ids
    described = {
        "model": _describe(config.model),
        "objective": _describe(config.objective),
        "max_length": config.data.max_length,
        "num_items": assembly.items.num_items,
        **described_attributes(config.data),
    }
    if (texts := getattr(assembly.model, "texts", None)) is not None:
        described["tokenizer"] = texts.fingerprint
    return described if table is None else {**described, "semantic_ids": table.fingerprint}


def _describe(part: Any) -> dict[str, Any]:
    fields = asdict(part) if is_dataclass(part) else {}
    return {"type": type(part).__qualname__, **fields}


def agree_on(number: int, process: Process) -> int:
    """Rank 0's number, on all ranks."""
    shared = torch.tensor([number])
    dist.broadcast(shared, 0, group=process.host_group)
    return int(shared.item())
