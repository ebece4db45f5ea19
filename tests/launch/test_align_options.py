"""Options of `grail align`: plug-ins by name, rewards as sections, and a file that says all of it again."""

import dataclasses
import re
from types import SimpleNamespace

import pytest

from cluster.errors import CheckpointError, ConfigError, DivergenceError
from cluster.reporter import StopSignal
from launch import cli
from launch.commands import align
from launch.config_document import to_document, to_yaml
from launch.run_directory import ALIGN, absolute, load_config, way_on, write_document
from models.decoder_only import DecoderOnly
from rl.advantages.binary import Binary
from rl.objectives.ecpo import Ecpo
from rl.objectives.grpo_sr import GrpoSr
from rl.reward_mix import RewardTerm
from rl.rewards.hybrid import Hybrid
from rl.rewards.legality import Legality
from tests.tiny_run import build_tiny_data
from trainer.configuration import PretrainConfig, TrainConfig
from trainer.settings import changed_settings


@pytest.fixture
def start(tmp_path):
    config = PretrainConfig(
        recipe="tiny",
        run_dir=str(tmp_path / "policy"),
        seed=4,
        model=DecoderOnly.Config(),
        train=TrainConfig(selection_metric="recall@10"),
    )
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.yaml").write_text(to_yaml(to_document(config)))
    return config


def test_without_options_it_is_grpo_sr_from_the_run_with_the_hybrid_reward(start):
    config = align.parse_config(start.run_dir, [])
    assert config.start == start.run_dir and config.run_dir == f"{start.run_dir}-aligned"
    assert isinstance(config.objective, GrpoSr.Config) and config.seed == 4
    assert [term.name for term in config.rewards] == ["hybrid"]
    assert config.train.selection_metric == "recall@10" and config.train.table_learning_rate == 0


def test_configurations_of_the_other_command_are_told_apart(start, tmp_path):
    with pytest.raises(
        ConfigError, match=r"is the configuration of a pretraining; give the folder of that run"
    ):
        align.parse_config(f"{start.run_dir}/config.yaml", [])
    (tmp_path / "align.yaml").write_text(to_yaml(to_document(align.parse_config(start.run_dir, []))))
    with pytest.raises(ConfigError, match=r"of an alignment; go on with it by `grail align .*align.yaml`"):
        load_config(str(tmp_path / "align.yaml"))


def test_names_choose_and_sections_set(start, tmp_path):
    line = (
        "--objective ecpo --objective.clip 0.3 --advantage=binary --rewards hybrid,legality,python-function "
        "--rewards.hybrid.preference.run reward --rewards.hybrid.no-gate --rewards.legality.direct "
        "--rewards.legality.weight 0.1 --rewards.python-function.path a.b:c --align.group-size 8 "
        "--search.deny deny.txt "
        "--align.stop-on entropy-collapse --rollout.workers 3 --reward.workers 2 --cluster.workers 4"
    )
    config = align.parse_config(start.run_dir, line.split())
    assert config.search.deny == absolute("deny.txt")
    assert config.objective == Ecpo.Config(clip=0.3) and config.advantage == Binary.Config()
    hybrid, legality, function = config.rewards
    assert isinstance(hybrid.reward, Hybrid.Config) and not hybrid.reward.gate
    assert hybrid.reward.preference.run == absolute("reward")
    assert legality == RewardTerm(name="legality", reward=Legality.Config(), weight=0.1, direct=True)
    assert function.name == "python-function" and function.reward.path == "a.b:c"
    assert config.align.group_size == 8 and config.align.stop_on == ("entropy-collapse",)
    assert (config.rollout.workers, config.reward.workers, config.cluster.workers) == (3, 2, 4)
    assert config.num_cpus() == 9
    (tmp_path / "align.yaml").write_text(to_yaml(to_document(config)))
    again = align.parse_config(str(tmp_path / "align.yaml"), ["--align.temperature", "1.5"])
    assert again == dataclasses.replace(config, align=dataclasses.replace(config.align, temperature=1.5))


def test_a_run_that_goes_on_with_another_start_or_objective_is_told_so(start):
    first, other = (
        align.parse_config(start.run_dir, options.split())
        for options in ("--rewards hit", "--rewards hit --objective ecpo")
    )
    elsewhere = dataclasses.replace(other, start="runs/other")
    saved, current = ({"align": align._learnt(to_document(config))} for config in (first, elsewhere))
    assert changed_settings(saved, saved) == []
    told = changed_settings(saved, current)
    assert f"align.start {start.run_dir} -> runs/other" in told
    assert any(line.startswith("align.objective") for line in told)


def test_an_alignment_at_an_address_goes_on_with_the_command_that_is_printed(start):
    config = align.parse_config(start.run_dir, ["--run-dir", "memory://bucket/aligned"])
    write_document(config.run_dir, ALIGN, to_document(config))
    command = way_on(config.run_dir, ALIGN, to_document(config)).split()
    assert command[-3:] == ["grail", "align", "memory://bucket/aligned/align.yaml"]
    assert align.parse_config(command[-1], []) == config


def test_help_names_what_can_be_chosen_and_errors_say_what_is_missing(capsys, start, tmp_path):
    assert align.run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("grpo-sr", "leave-one-out", "python-function"))
    with pytest.raises(ConfigError, match="directory of a pretrained run"):
        align.run([])
    with pytest.raises(CheckpointError, match="there is none"):
        align.parse_config(str(tmp_path / "missing.yaml"), [])
    with pytest.raises(ConfigError, match="did you mean 'grpo-sr'"):
        align.parse_config(start.run_dir, ["--objective", "grpo-rs"])


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ("hit,hit", r"each with a name of its own; got \['hit', 'hit'\]"),
        ("python-function --rewards.python-function.path no_such_module:reward", "cannot be imported"),
        (
            "relevance",
            "compares items by their vectors, and .* has none: name a matrix with --rewards.NAME.vectors",
        ),
        ("relevance --rewards.relevance.vectors missing.npy", "missing.npy"),
        (
            "preference --rewards.preference.run RUN",
            "policy holds a .*, and a preference is scored by a model of",
        ),
        ("hybrid --rewards.hybrid.preference.run RUN", "policy holds a .*, and a preference is scored by"),
        (
            "process --advantage step-wise --rewards.process.run RUN",
            "policy holds a .*, which does not score prefixes",
        ),
    ],
)
def test_a_reward_that_cannot_be_prepared_ends_the_command_before_any_worker(
    start, tmp_path, monkeypatch, capsys, rewards, message
):
    monkeypatch.setattr("cluster.ray_start.start_ray", lambda *_, **__: pytest.fail("workers were started"))
    data = build_tiny_data(tmp_path / "data")
    words = rewards.replace("RUN", start.run_dir).split()
    assert cli.run(["align", start.run_dir, "--data.path", data, "--rewards", *words]) in (1, 2)
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "policy-aligned").exists()


def test_the_room_of_the_pools_is_given_back_where_learners_fail(start, monkeypatch):
    given_back = []

    def fail(*_, **__):
        raise DivergenceError("loss and gradients must be finite")

    monkeypatch.setattr("cluster.ray_start.start_ray", lambda *_, **__: None)
    places = SimpleNamespace(remove=lambda: given_back.append(True))
    monkeypatch.setattr("rl.places.Places.reserve", lambda *_: places)
    monkeypatch.setattr("cluster.worker_group.run_gang", fail)
    with pytest.raises(DivergenceError):
        align._run(align.parse_config(start.run_dir, []), (), print, StopSignal())
    assert given_back
