from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cluster.errors import PlanError
from models.tables import TableSpec
from sharding.tables import fill_initial_rows, hash_twice
from sharding.unsharded import UnshardedTables
from tests.process_group import run_on_processes

ITEM = TableSpec(name="item", num_rows=1001, dim=32, features=("history",), placement="row_wise")
USER = TableSpec(name="user", num_rows=10**12, hash_rows=300, dim=16, features=("user",))
STEPS = 4


def ids_of(step, rank):
    generator = torch.Generator().manual_seed(step * 10 + rank)
    return {
        "item": torch.randint(1001, (50 + rank * 7,), generator=generator),
        "user": torch.randint(10**12, (5,), generator=generator),
    }


def gradient_of(rows):
    return {name: values.detach() * 2 + 1 for name, values in rows.items()}


def train_sharded(process, placement):
    from sharding.apply import ShardedTables
    from sharding.configuration import ShardingConfig

    tables = ShardedTables(
        [ITEM, USER],
        process=process,
        config=ShardingConfig(placement={"item": placement}),
        seed=3,
        learning_rate=0.1,
    )
    for step in range(STEPS):
        ids = ids_of(step, process.rank)
        tables.set_learning_rate(0.1 / (step + 1))
        rows = tables.lookup(ids)
        tables.update(ids, rows, gradient_of(rows))
    return [(p.name, p.start, p.tensor.clone()) for p in tables.pieces()], tables.placements


def train_in_rows(process, placement, num_rows):
    """As `train_sharded`, with the ids of a table cut into so many jagged rows, and the strides that this gave."""
    from unittest import mock

    from sharding import apply

    keyed, strides = apply._keyed, set()

    def observed(*arguments):
        features = keyed(*arguments)
        strides.add(features.stride())
        return features

    rows = {"cpu": num_rows}
    with mock.patch.object(apply, "LOOKUP_ROWS", rows), mock.patch.object(apply, "_keyed", observed):
        return train_sharded(process, placement)[0], strides


def train_unsharded(world_size):
    tables = UnshardedTables([ITEM, USER], seed=3, learning_rate=0.1, device=torch.device("cpu"))
    for step in range(STEPS):
        per_rank = [ids_of(step, rank) for rank in range(world_size)]
        ids = {name: torch.cat([part[name] for part in per_rank]) for name in ("item", "user")}
        tables.set_learning_rate(0.1 / (step + 1))
        rows = tables.lookup(ids)
        tables.update(ids, rows, {name: g / world_size for name, g in gradient_of(rows).items()})
    return {piece.name: piece.tensor for piece in tables.pieces()}


@pytest.mark.parametrize(("world_size", "placement"), [(1, "row_wise"), (2, "row_wise"), (3, "table_wise")])
def test_sharded_tables_equal_the_reference_with_fused_state(world_size, placement):
    expected = train_unsharded(world_size)
    results = run_on_processes(train_sharded, world_size, placement)
    covered = dict.fromkeys(expected, 0)
    for pieces, _ in results:
        for name, start, tensor in pieces:
            covered[name] += tensor.shape[0]
            torch.testing.assert_close(
                tensor, expected[name][start : start + tensor.shape[0]], atol=1e-6, rtol=1e-5
            )
    assert covered == {name: tensor.shape[0] for name, tensor in expected.items()}
    kinds = {placed.name: placed.kind for placed in results[0][1]}
    assert kinds["item"] == placement


@pytest.mark.parametrize("placement", ["row_wise", "table_wise"])
def test_ids_cut_into_rows_as_on_an_accelerator_train_the_same_bits(placement):
    for whole, cut in zip(
        *(run_on_processes(train_in_rows, 2, placement, num_rows) for num_rows in (1, 16)), strict=True
    ):
        assert (whole[1], cut[1]) == ({1}, {16})
        for (name, start, expected), (cut_name, cut_start, found) in zip(whole[0], cut[0], strict=True):
            assert (cut_name, cut_start) == (name, start) and torch.equal(found, expected)


def test_the_reference_is_row_wise_adagrad_on_numbers_worked_out_by_hand():
    spec = TableSpec(name="t", num_rows=2, dim=2, features=("f",))
    tables = UnshardedTables([spec], seed=0, learning_rate=0.5, device=torch.device("cpu"))
    tables.rows["t"].copy_(torch.tensor([[1.0, 1.0], [2.0, 2.0]]))
    ids = {"t": torch.tensor([1, 1])}
    rows = tables.lookup(ids)
    # The row was looked up twice: g = (3, 1) + (0, 3) = (3, 4), s = (9 + 16) / 2 = 12.5.
    tables.update(ids, rows, {"t": torch.tensor([[3.0, 1.0], [0.0, 3.0]])})
    step = 0.5 / 12.5**0.5
    torch.testing.assert_close(tables.rows["t"], torch.tensor([[1.0, 1.0], [2 - 3 * step, 2 - 4 * step]]))
    torch.testing.assert_close(tables.state["t"], torch.tensor([0.0, 12.5]))


def test_initial_rows_depend_on_seed_table_and_row_alone():
    whole, part = torch.empty(1001, 32), torch.empty(200, 32)
    fill_initial_rows(whole, ITEM, 0, seed=1)
    fill_initial_rows(part, ITEM, 700, seed=1)
    assert torch.equal(whole[700:900], part)
    fill_initial_rows(part, ITEM, 700, seed=2)
    assert not torch.equal(whole[700:900], part)


class LargestMade(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that an operation has made and not only looked at."""

    num_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and not function.is_view:
            self.num_bytes = max(self.num_bytes, made.nbytes)
        return made


def test_checksums_take_little_memory_beside_the_tables():
    spec = replace(ITEM, num_rows=200_000)
    tables = UnshardedTables([spec], seed=0, learning_rate=0.1, device=torch.device("cpu"))
    with LargestMade() as largest:
        checksums = tables.checksums()
    assert 0 < largest.num_bytes < tables.rows["item"].nbytes / 4
    assert checksums["table/item[0]"] == pytest.approx(tables.rows["item"].double().sum().item())


def test_double_hashing_spreads_unbounded_ids_and_is_fixed_for_ever():
    rows = hash_twice(torch.arange(100_000), 1000)
    first, second = rows.view(2, -1)
    assert rows.min() >= 0 and rows.max() < 1000
    for hashed in (first, second):
        counts = torch.bincount(hashed, minlength=1000)
        assert counts.min() > 50 and counts.max() < 160
    assert (first == second).float().mean() < 0.003
    # Trained tables depend on these numbers.
    known = [280931, 55944, 454294, 610897, 436617, 835468]
    assert hash_twice(torch.tensor([0, 1, 10**17]), 1_000_000).tolist() == known


def plan_with(process, placement):
    from sharding.apply import ShardedTables
    from sharding.configuration import ShardingConfig

    try:
        ShardedTables([ITEM], process=process, config=ShardingConfig(**placement), seed=0, learning_rate=0.1)
    except PlanError as error:
        return str(error)
    return "no error"


def test_a_placement_of_an_unknown_table_names_the_tables_there_are():
    (message,) = run_on_processes(plan_with, 1, {"placement": {"items": "row_wise"}})
    assert "names items" in message and "item" in message and "use one of these" in message


def test_tables_that_do_not_fit_are_a_plan_error():
    (message,) = run_on_processes(plan_with, 1, {"hbm_gib_per_worker": 0.000001})
    assert "do not fit on 1 workers" in message and "more workers" in message


def plan_on_machines(process, per_machine):
    """Devices of the shards in the order of the ranks, of workers that pretend to have accelerators."""
    from torchrec.distributed.embedding import EmbeddingCollectionSharder

    from sharding.apply import _Collections
    from sharding.configuration import ShardingConfig
    from sharding.plan import make_plan

    local_ranks = [index for workers in per_machine for index in range(workers)]
    there = replace(process, device=torch.device("cuda", local_ranks[process.rank]))
    config = ShardingConfig(hbm_gib_per_worker=1.0)
    plan = make_plan(_Collections([ITEM]), [ITEM], EmbeddingCollectionSharder(), config, there).plan
    (parameter,) = [parameter for module in plan.values() for parameter in module.values()]
    return [str(shard.placement) for shard in parameter.sharding_spec.shards]


@pytest.mark.parametrize("per_machine", [(1, 1), (1, 2)])
def test_shards_name_the_accelerators_of_their_own_machines(per_machine):
    (named, *others) = run_on_processes(plan_on_machines, sum(per_machine), per_machine)
    local_ranks = [index for workers in per_machine for index in range(workers)]
    assert named == [f"rank:{rank}/cuda:{index}" for rank, index in enumerate(local_ranks)]
    assert all(other == named for other in others)


def plan_with_memory(process, memory_bytes):
    from torchrec.distributed.embedding import EmbeddingCollectionSharder

    from sharding import apply, plan
    from sharding.configuration import ShardingConfig

    plan.usable_memory_bytes = lambda: memory_bytes[process.rank]
    try:
        plan.make_plan(
            apply._Collections([ITEM]), [ITEM], EmbeddingCollectionSharder(), ShardingConfig(), process
        )
    except PlanError as error:
        return str(error)
    return "no error"


def test_tables_must_fit_into_the_memory_that_the_machine_reports():
    (message,) = run_on_processes(plan_with_memory, 1, (20_000,))
    assert "do not fit on 1 workers as asked, each of 0.00 GiB (sharding.hbm-gib-per-worker)" in message
    assert run_on_processes(plan_with_memory, 2, (2**30, 2**30)) == ["no error"] * 2


def test_rows_of_a_size_that_the_kernels_do_not_know_are_refused():
    from sharding.plan import collections

    with pytest.raises(PlanError, match=r"multiple of 4 numbers, and those of item have 50; give .* width"):
        collections([replace(ITEM, dim=50)])
