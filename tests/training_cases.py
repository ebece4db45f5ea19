"""A small model, made-up users, and a few steps of the real learner, for parity tests."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from cluster.process import Process
from data_streams.batch import CLICKED, EXPOSED, ORDERED, Pages, SequenceBatch
from data_streams.jagged import Jagged
from models.climber_pilot import ClimberPilot
from models.gru4rec import GRU4Rec
from models.hstu import HSTU, TIME
from models.mtgr import MTGR
from models.objectives.full_softmax import FullSoftmax
from models.objectives.gbce import GeneralisedBinaryCrossEntropy
from models.objectives.in_batch_softmax import InBatchSoftmax
from models.objectives.sampled_softmax import SampledSoftmax
from models.recommender import Recommender, StepContext
from models.sasrec import SASRec
from models.tables import Attributes
from models.urm import URM
from sharding.configuration import ShardingConfig
from sharding.lookup import ItemFeatures
from tests.generator_cases import GENERATORS, PAGE_WISE, TREES, make_generator
from tests.mixture_model import MixtureModel
from tests.text_cases import TEXT_MODELS, TEXT_RANKERS, make_text_model
from trainer.blocks import recompute_blocks
from trainer.configuration import TrainConfig
from trainer.dense_module import DenseModule
from trainer.learner import Learner
from trainer.plain_engine import PlainEngine
from trainer.step_input import StepInput, prepare_step, split_users

MODELS = {
    "sasrec": SASRec.Config,
    "hstu": partial(HSTU.Config, num_heads=2),
    "gru4rec": GRU4Rec.Config,
    "pilot": partial(ClimberPilot.Config, time_window_s=30_000.0),
    "conditioned-pilot": partial(ClimberPilot.Config, time_window_s=30_000.0, condition_column="group"),
    "mixture": MixtureModel.Config,
    "urm": partial(URM.Config, item_width=12, num_heads=2, feedforward_width=24, num_queries=3, positions=3),
    "mtgr": partial(MTGR.Config, hidden=24),
    "mtgr of drawn windows": partial(MTGR.Config, hidden=24, window="drawn", user_rows=50),
}
RANKERS = ("mtgr", "mtgr of drawn windows", *TEXT_RANKERS)
ACTIONS = ("cart", "click", "exposure")
OBJECTIVES = {
    "sampled": SampledSoftmax.Config(num_negatives=16, log_q=True),
    "full": FullSoftmax.Config(temperature=0.2),
    "in-batch": InBatchSoftmax.Config(temperature=0.2),
    # From scores of 0, so that a few steps lower the loss for certain.
    "gbce": GeneralisedBinaryCrossEntropy.Config(num_negatives=16, popularity_share=0.5, balanced=False),
}
NUM_ITEMS = 97
CPU = torch.device("cpu")
SEED = 5


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is varied between two trainings that must agree."""

    model: str = "sasrec"
    objective: str = "sampled"
    zero_stage: int = 1
    micro_batches: int = 1
    placement: str = "row_wise"
    steps: int = 20
    item_features: bool = False
    attributes: bool = False
    precision: torch.dtype = torch.float32
    ema_decay: float | None = None
    dropout: float = 0.0
    activation_checkpointing: bool = False
    expert_parallel: int = 1
    streams: int = 6
    favour_first_half: bool = False

    def train_config(self) -> TrainConfig:
        return TrainConfig(
            zero_stage=self.zero_stage,
            micro_batches=self.micro_batches,
            max_gradient_norm=0.5,
            weight_decay=0.01,
            ema_decay=self.ema_decay,
        )


def make_model(case: Case) -> Recommender:
    if case.model in {**GENERATORS, **PAGE_WISE, **TREES}:
        return make_generator(case.model, SEED)
    torch.manual_seed(SEED)
    counts = {"item_counts": np.arange(NUM_ITEMS)} if OBJECTIVES[case.objective].needs_item_counts else {}
    objective = OBJECTIVES[case.objective].build(num_items=NUM_ITEMS, **counts)
    if case.model in TEXT_MODELS:
        parts = {"num_items": NUM_ITEMS, "objective": objective, "actions": ACTIONS}
        return make_text_model(case.model, SEED, **parts)
    options = {"favour_first_half": True} if case.favour_first_half else {}
    config = MODELS[case.model](
        width=16,
        num_blocks=2,
        dropout=case.dropout,
        init_scale=0.1,
        item_features=case.item_features,
        **options,
    )
    parts = {}
    if case.model == "conditioned-pilot":
        parts = {
            "condition_table": np.arange(NUM_ITEMS, dtype=np.int32)[:, None] % 4,
            "condition_names": tuple("abcd"),
        }
    if case.model in RANKERS:
        parts = {"actions": ACTIONS}
    model = config.build(num_items=NUM_ITEMS, max_length=12, item_feature_dim=6, objective=objective, **parts)
    if case.attributes:
        model.item_attributes = Attributes(ids=make_attributes(NUM_ITEMS), hash_rows=11)
    return model


def make_attributes(num_rows: int) -> Jagged:
    """None to three values of a row, of seven in all."""
    lengths = torch.arange(num_rows) % 4
    return Jagged.from_lengths(torch.arange(int(lengths.sum())) * 5 % 7, lengths)


def make_features(case: Case) -> ItemFeatures | None:
    if not case.item_features:
        return None
    return ItemFeatures(np.random.default_rng(0).normal(size=(NUM_ITEMS, 6)).astype(np.float32))


def make_users(step: int, streams: int = 6) -> list[list[Tensor]]:
    """Users of each canonical stream in a step; stream 1 is exhausted from step 10 on."""
    generator = torch.Generator().manual_seed(1000 + step)
    users = []
    for stream in range(streams):
        lengths = torch.randint(2, 13, (3,), generator=generator).tolist()
        sequences = [torch.randint(NUM_ITEMS, (length + 1,), generator=generator) for length in lengths]
        users.append([] if stream % streams == 1 and step >= 10 else sequences)
    return users


def make_batch(sequences: Sequence[Tensor], first_user: int = 0) -> SequenceBatch:
    empty = torch.zeros(0, dtype=torch.int64)
    lengths = torch.tensor([len(sequence) - 1 for sequence in sequences], dtype=torch.int64)
    return SequenceBatch(
        user_ids=torch.arange(first_user, first_user + len(sequences)),
        items=Jagged.from_lengths(torch.cat([s[:-1] for s in sequences] or [empty]), lengths),
        targets=torch.cat([s[1:] for s in sequences] or [empty]),
        features={TIME: torch.cat([s.cumsum(0)[:-1] * 1000 for s in sequences] or [empty])},
        target_features={TIME: torch.cat([s.cumsum(0)[1:] * 1000 for s in sequences] or [empty])},
    )


def prepare(
    case: Case, model: Recommender, step: int, rank: int, world_size: int, device: torch.device = CPU
) -> StepInput:
    """This rank's share of a step: streams are dealt out, c % world_size."""
    batches = [
        _numbered(make_batch(list(chain.from_iterable(make_users(step, case.streams)[r::world_size]))))
        for r in range(world_size)
    ]
    if case.model in PAGE_WISE:
        batches = [with_pages(batch) for batch in batches]
    if case.model in RANKERS:
        batches = [with_exposures(batch) for batch in batches]
    context = StepContext(step=step, seed=SEED, rank=rank, world_size=world_size)
    prepared = prepare_step(model, batches[rank], context, case.micro_batches, make_features(case), device)
    parts = [split_users(model.training_batch(batch, context), case.micro_batches) for batch in batches]
    return prepared.with_counts([[model.num_targets(p[i]) for p in parts] for i in range(case.micro_batches)])


def with_pages(batch: SequenceBatch) -> SequenceBatch:
    """After every third event of a user, the next three as a page: one ordered, one clicked, one only shown."""
    begins = (batch.items.places() % 3 == 0) & (
        batch.items.places() + 2 < batch.items.lengths[batch.items.row_index()]
    )
    first, users = begins.nonzero()[:, 0], batch.items.row_index()[begins]
    per_user = torch.zeros_like(batch.items.lengths).index_add_(0, users, torch.ones_like(users))
    items = batch.targets[first[:, None] + torch.arange(3)].flatten()
    pages = Pages(
        items=Jagged.from_lengths(items, torch.full_like(first, 3)),
        strengths=torch.tensor([ORDERED, CLICKED, EXPOSED]).repeat(len(first)),
        positions=torch.full_like(items, -1),
        history_lengths=Jagged.from_lengths(batch.items.places()[begins] + 1, per_user),
        times_s=torch.full_like(first, -1),
    )
    return replace(batch, pages=pages)


def with_exposures(batch: SequenceBatch) -> SequenceBatch:
    """Every three events are a page that shows two items; then the first is clicked if its number is even, else the
    second is put in the cart if its number is."""
    places, items = batch.items.places(), batch.items.values.clone()
    answers = (places % 3 == 2).nonzero()[:, 0]
    clicked = items[answers - 2] % 2 == 0
    items[answers] = torch.where(clicked, items[answers - 2], items[answers - 1] // 2 * 2)
    action = torch.full_like(items, ACTIONS.index("exposure"))
    action[answers] = torch.where(clicked, ACTIONS.index("click"), ACTIONS.index("cart"))
    columns = {"action": action, "page_id": places // 3, "timestamp_s": places * 1000}
    return replace(batch, items=batch.items.with_values(items), features=columns)


def _numbered(batch: SequenceBatch) -> SequenceBatch:
    """User ids that do not depend on how users are dealt to ranks."""
    sums = torch.zeros(batch.num_users, dtype=torch.int64)
    sums.index_add_(0, batch.items.row_index(), (batch.items.places() + 1) * batch.items.values)
    return replace(batch, user_ids=sums)


def make_learner(case: Case, process: Process | None, device: torch.device = CPU) -> Learner:
    """The sharded learner on a process group, or the unsharded reference without one."""
    model = make_model(case).to(device)
    if process is not None:
        from sharding.experts import shard_experts

        shard_experts(model, case.expert_parallel, process)
    if case.activation_checkpointing:
        recompute_blocks(model)
    module = DenseModule(model, case.precision)
    if process is None:
        from sharding.unsharded import UnshardedTables

        tables = UnshardedTables(model.all_tables(), seed=SEED, learning_rate=0.1, device=device)
        engine = PlainEngine(module, case.train_config())
        return Learner(module, engine, tables, seed=SEED, rank=0, world_size=1)
    from sharding.apply import spread_tables
    from trainer.dense_engine import DenseEngine

    tables = spread_tables(
        model.all_tables(),
        process=process,
        config=ShardingConfig(placement={"item": case.placement}),
        seed=SEED,
        learning_rate=0.1,
    )
    engine = DenseEngine(module, case.train_config(), process)
    return Learner(module, engine, tables, seed=SEED, rank=process.rank, world_size=process.world_size)


def run_steps(
    case: Case, process: Process | None, learner: Learner, first: int, count: int, device: torch.device = CPU
) -> list[float]:
    """Mean loss of each step over all ranks."""
    import torch.distributed as dist

    rank, world_size = (process.rank, process.world_size) if process else (0, 1)
    losses = []
    for step in range(first, first + count):
        prepared = prepare(case, learner.module.model, step, rank, world_size, device)
        total = learner.step(prepared, learning_rate=1e-2, table_learning_rate=0.1 / (1 + step)).loss_sum
        if process:
            dist.all_reduce(total)
        losses.append(total.item() / prepared.global_count)
    return losses


def train(
    process: Process | None, case: Case, device: torch.device = CPU
) -> tuple[list[float], list[tuple[str, int, Tensor]]]:
    """Losses, and this rank's pieces of the whole state after the last step."""
    torch.set_num_threads(1)
    learner = make_learner(case, process, device)
    losses = run_steps(case, process, learner, 0, case.steps, device)
    return losses, state_of(learner)


def state_of(learner: Learner) -> list[tuple[str, int, Tensor]]:
    pieces = [*learner.tables.pieces(), *learner.engine.pieces()]
    return [(piece.name, piece.start, piece.tensor.detach().clone()) for piece in pieces]


def join_pieces(per_rank: Sequence[list[tuple[str, int, Tensor]]]) -> dict[str, Tensor]:
    """Global tensors from the pieces of all ranks."""
    pieces: dict[str, list[tuple[int, Tensor]]] = {}
    for rank in per_rank:
        for name, start, tensor in rank:
            pieces.setdefault(name, []).append((start, tensor))
    return {
        name: torch.cat([tensor for _, tensor in sorted(parts, key=lambda part: part[0])])
        for name, parts in pieces.items()
    }
