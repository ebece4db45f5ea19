"""Whole small runs: PROMISE, a PRM trained alone on its frozen encoder, and what their searches find and cost."""

import io
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from cluster.errors import ConfigError
from cluster.process import Process
from cluster.storage import Storage
from data_streams.item_table import ItemTable
from data_streams.semantic_ids import SemanticIdTable
from launch.plots import write_scaling
from launch.served_run import asked_alike
from models.decoder_only import DecoderOnly
from models.path_reward import ProcessRewardConfig
from models.process_reward import ProcessReward
from models.promise import Promise
from tests.process_group import run_on_processes
from tests.tiny_run import build_tiny_data, run, tiny_config
from trainer.configuration import LogConfig, PretrainConfig, SearchConfig
from trainer.metric_log import read_metrics
from trainer.search_scaling import render_scaling

CODE_SIZES = (4, 5, 4)
WIDTH = 10
ENCODER = {"width": 16, "num_blocks": 1, "num_heads": 2, "feedforward_width": 32, "dropout": 0.0}


def make_configs(folder: Path) -> dict[str, PretrainConfig]:
    """A run of PROMISE and one of another generator, and of each one of a PRM that starts from it."""
    data = build_tiny_data(folder)
    item_ids = ItemTable.load(data).item_ids
    paths = np.random.default_rng(0).permutation(np.prod(CODE_SIZES))[: len(item_ids)]
    codes = np.stack(np.unravel_index(paths, CODE_SIZES), axis=1).astype(np.int32)
    SemanticIdTable(item_ids=item_ids, codes=codes, code_sizes=CODE_SIZES).save(Storage(str(folder / "ids")))
    prm = ProcessRewardConfig(feedforward_width=32, num_negatives=16)
    config = replace(
        tiny_config(data, folder / "promise", max_steps=30, epochs=9, learning_rate=1e-2),
        model=Promise.Config(**ENCODER, num_decoder_blocks=1, prm=prm),
        objective=None,
        search=SearchConfig(width=WIDTH, validation_width=WIDTH, prm=True),
        log=LogConfig(every_steps=5),
    )
    config = replace(config, data=replace(config.data, semantic_ids=str(folder / "ids")))
    shared = {entry.name: getattr(config.model, entry.name) for entry in fields(ProcessReward.Config)}
    decoder = replace(
        config,
        run_dir=str(folder / "decoder"),
        model=DecoderOnly.Config(**ENCODER, num_depth_blocks=1),
        train=replace(config.train, max_steps=2),
        search=replace(config.search, prm=False),
    )
    alone = {
        f"prm of {name}": replace(
            config,
            run_dir=str(folder / f"prm-of-{name}"),
            init_from=str(folder / name),
            model=ProcessReward.Config(**shared),
            train=replace(config.train, max_steps=2),
        )
        for name in ("promise", "decoder")
    }
    return {"promise": config, "decoder": decoder, **alone}


def train_and_compare(process: Process, folder: Path) -> dict:
    from trainer.assembly import assemble
    from trainer.checkpoint_reader import CheckpointReader
    from trainer.frozen import load_frozen
    from trainer.run_state import load_weights
    from trainer.search_scaling import beams_beside, compare_searches

    def load(config: PretrainConfig):
        assembly = assemble(config, process)
        load_weights(CheckpointReader(Storage(f"{config.run_dir}/checkpoints"), "latest"), assembly)
        assembly.model.eval()
        return assembly

    configs = make_configs(folder)
    results = {name: run(process, config)[0] for name, config in configs.items()}
    config, alone = configs["promise"], configs["prm of decoder"]
    searched = replace(config, search=replace(config.search, candidates=(10, 20, 40)))
    own = compare_searches(load(searched), prm=None, split="test")
    other = compare_searches(load(searched), prm=load(alone), split="test")
    larger = load(asked_alike(configs["decoder"], searched))
    fingerprint = larger.semantic_ids.fingerprint
    beside = beams_beside(larger, fingerprint=fingerprint, split="test")
    refused = _refusal(lambda: beams_beside(larger, fingerprint="of others", split="test"))
    of_codes = _refusal(lambda: beams_beside(load(alone), fingerprint=fingerprint, split="test"))
    wide = load(replace(config, search=replace(config.search, candidates=(10, 400))))
    too_wide = _refusal(lambda: compare_searches(wide, prm=None, split="test"))
    frozen = load_frozen(alone, "latest")
    batch = next(iter(load(config).users("test").batches())).select(0, 3)
    paths = frozen.model.item_codes[torch.arange(6).view(3, 2)]
    rows = frozen.lookup(frozen.model.prefix_ids(batch, paths))
    scores = frozen.model.prefix_scores(rows, batch, paths)
    moved = {name: _moved(configs[name], configs[f"prm of {name}"]) for name in ("promise", "decoder")}
    found = {"own": own, "other": other, "beside": beside, "refused": refused, "too_wide": too_wide}
    found |= {"of_codes": of_codes}
    return {**found, "results": results, "scores": scores, "moved": moved}


def _refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as caught:
        call()
    return str(caught.value)


def _moved(config: PretrainConfig, alone: PretrainConfig) -> float:
    """How far the encoder's position vectors have moved in two warm-up steps of the PRM alone."""
    from trainer.checkpoint_reader import CheckpointReader

    first, second = (
        CheckpointReader(Storage(f"{run_dir}/checkpoints"), which).read_rows("dense/positions.weight", 0, 160)
        for run_dir, which in ((config.run_dir, "best"), (alone.run_dir, "latest"))
    )
    return float((first - second).abs().max())


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("promise")
    return folder, run_on_processes(train_and_compare, 1, folder, timeout_s=300)[0]


def test_promise_learns_and_a_prm_alone_starts_from_the_encoder_of_a_generator(outcome):
    folder, found = outcome
    assert {result["status"] for result in found["results"].values()} == {"finished"}
    losses = [line["train/loss"] for line in read_metrics(str(folder / "promise")) if "train/loss" in line]
    assert losses[-1] < losses[0] - 0.5
    assert 0 < max(found["moved"].values()) < 0.03
    assert found["scores"].shape == (3, 2, 3) and found["scores"].isfinite().all()


def test_more_candidates_cost_the_prm_alone_and_the_table_names_each_search(outcome):
    folder, found = outcome
    assert [(line["kind"], line["number"]) for line in found["own"]] == [
        *[("plain", number) for number in (10, 20, 40)],
        *[("prm", number) for number in (10, 20, 40)],
    ]
    plain, guided = found["own"][:3], found["own"][3:]
    costs = [line["gflop_per_user"] for line in guided]
    assert costs[0] < costs[1] < costs[2]
    assert costs[0] > plain[0]["gflop_per_user"]
    assert guided[0][f"hrecall3@{WIDTH}"] == pytest.approx(plain[0][f"hrecall3@{WIDTH}"])
    assert {"recall@10", "ndcg@5", "ms_per_user"} <= guided[0].keys()
    assert found["other"][3]["gflop_per_user"] > costs[0], (
        "a PRM with an encoder of its own encodes once more"
    )
    assert Path(write_scaling(str(folder), found["own"])).stat().st_size > 10_000


def test_plain_beams_of_another_run_stand_beside(outcome):
    folder, found = outcome
    beside, plain = found["beside"], found["own"][:3]
    assert [(line["kind"], line["number"]) for line in beside] == [
        ("beside", line["number"]) for line in plain
    ]
    assert {line["run"] for line in beside} == {str(folder / "decoder")}
    assert {*beside[0]} == {*plain[0], "run"}, "both are measured alike"
    assert beside[0]["gflop_per_user"] != plain[0]["gflop_per_user"]
    assert "must generate the same semantic IDs, of others, and" in found["refused"]
    assert "must not exceed the 60 items of the catalogue, and 400 do" in found["too_wide"]
    assert "proposes no codes" in found["of_codes"]
    table = io.StringIO()
    Console(file=table, width=400).print(render_scaling([*found["own"], *beside], 400))
    assert table.getvalue().count(f"plain, {folder / 'decoder'}") == 3
    alone = Path(write_scaling(str(folder), found["own"])).read_bytes()
    assert Path(write_scaling(str(folder), [*found["own"], *beside])).read_bytes() != alone


def test_every_search_is_shown_in_a_narrow_console():
    numbers = range(50, 200, 10)
    lines = [
        {"kind": "plain", "number": number, "gflop_per_user": 0.0012, "ms_per_user": 1.0, "recall@10": 0.5}
        for number in numbers
    ]
    shown = io.StringIO()
    Console(file=shown, width=80).print(render_scaling(lines, 80))
    text = shown.getvalue()
    assert all(f" {number} " in text for number in numbers)
    assert text.count("0.5000") == text.count("0.0012") == len(lines)
