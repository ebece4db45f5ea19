"""The second half of the demo up to the moment at which something would be trained."""

from dataclasses import fields
from pathlib import Path

import pytest

from launch.commands import align, evaluate, pretrain
from launch.config_document import to_document, to_yaml
from launch.demo_alignment import SIZES, AlignmentDemo
from launch.reward_parts import reward_setting
from models.coded_history import CodedHistoryConfig
from rl.configuration import check_alignment


@pytest.fixture
def trained(monkeypatch):
    """Configurations of what was to be trained, by the folder of the run, and of the alignment."""
    found = {}

    def train(config):
        folder = Path(config.run_dir)
        folder.mkdir()
        (folder / "config.yaml").write_text(to_yaml(to_document(config)))
        found[folder.name] = config
        return 0

    monkeypatch.setattr(pretrain, "train", train)
    monkeypatch.setattr(align, "align", lambda config: found.update(aligned=config) or 0)
    monkeypatch.setattr(evaluate, "evaluate", lambda config: None)
    return found


@pytest.mark.parametrize("scale", SIZES)
def test_a_generator_its_prm_and_an_alignment_by_both_rewards(trained, tmp_path, scale):
    demo = AlignmentDemo(out=str(tmp_path), seed=0, scale=scale)
    assert demo.pretrain() == 0 and demo.align() == 0
    policy, prm, aligned = trained["policy"], trained["prm"], trained["aligned"]
    for entry in fields(CodedHistoryConfig):
        assert getattr(prm.model, entry.name) == getattr(policy.model, entry.name), entry.name
    assert prm.init_from == policy.run_dir and prm.data.semantic_ids == policy.data.semantic_ids
    hybrid, process = aligned.rewards
    assert (hybrid.name, hybrid.weight, hybrid.direct) == ("hybrid", 1.0, False)
    assert process.reward.run == prm.run_dir and process.direct and 0 < process.weight < 0.2
    check_alignment(aligned, policy)
    setting = reward_setting(aligned.rewards, data_path=aligned.data.path)
    assert {Path(name).name for name in setting.runs} == {"reward", "prm"}
