"""The table of the alignment experiment, with commands that only pretend to train."""

import json
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import polars as pl
import pytest

from benchmarks.experiments import alignment
from cluster.errors import ConfigError
from data_streams.world import world_fingerprint

NUM_USERS = 40
REWARDS = {1: 0.2, 2: 0.4, 3: 0.9}


@pytest.fixture
def commands(monkeypatch):
    """What was given to `grail`; a policy's metrics are a tenth of the step that is evaluated."""
    given = []

    def grail(*words):
        given.append(words)
        option = dict(pairwise(words))
        if words[0] == "align":
            run_dir = Path(option["--run-dir"])
            run_dir.mkdir()
            (run_dir / "alignment.json").write_text(json.dumps({"step": 3, "best_step": 2}))
            lines = [
                json.dumps({"step": step, "align/reward": value}) + "\n" for step, value in REWARDS.items()
            ]
            (run_dir / "metrics.jsonl").write_text("".join(lines))
        if "--per-user" in option:
            step = {"best": 1}.get(option["--checkpoint"]) or int(option["--checkpoint"])
            names = [name for name in alignment.METRICS if "world" in given[0] or "utility" not in name]
            # Users come in any order.
            users = {"user_row": list(reversed(range(NUM_USERS))), **dict.fromkeys(names, step / 10)}
            pl.DataFrame(users).write_parquet(option["--per-user"])

    monkeypatch.setattr(alignment, "grail", grail)
    return given


def rows(folder):
    lines = [line for line in (folder / "table.md").read_text().splitlines() if line.startswith("| ")]
    head, _, *rest = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(head, cells, strict=True)) for cells in rest]


def test_the_start_stands_beside_the_last_and_the_best_step_of_each_world(commands, tmp_path):
    options = ["--out", str(tmp_path), "--worlds", "middle", "--seeds", "0", "1"]
    alignment.main([*options, "--variants", "GRPO", "GRPO-SR"])
    found = rows(tmp_path)
    assert [(row["policy"], row["step"], row["runs"]) for row in found] == [
        ("SFT", "best (0)", "1"),
        *[(name, step, "2") for name in ("GRPO", "GRPO-SR") for step in ("last (3)", "best (2)")],
    ]
    assert (
        found[0]["reward"] == "0.2000" and found[1]["reward"] == "0.5000" and found[2]["reward"] == "0.3000"
    )
    assert found[0]["utility@50 against SFT (95 %)"] == ""
    assert found[1]["utility@50 against SFT (95 %)"] == "+200.0% (+200.0% to +200.0%)"
    assert found[2]["recall@50 against SFT (95 %)"] == "+100.0% (+100.0% to +100.0%)"
    text = (tmp_path / "table.md").read_text()
    assert f"middle {world_fingerprint()}" in text and "vary the alignment only" in text
    assert (tmp_path / "picture.png").exists()
    done = len(commands)
    alignment.main([*options, "--variants", "GRPO", "GRPO-SR"])
    assert len(commands) == done


def test_what_was_made_of_another_world_is_not_taken_for_this_one(commands, tmp_path):
    (tmp_path / "small" / "clicks").mkdir(parents=True)
    manifest = tmp_path / "small" / "clicks" / "manifest.json"
    # Of before there was noise.
    source = {name: value for name, value in asdict(alignment.WORLDS["small"]).items() if name != "noise"}
    manifest.write_text(json.dumps({"source": {"name": "world", **source}}))
    with pytest.raises(ConfigError, match=r"must hold .*noise=1.4.* and holds .*noise=1.0.*another --out"):
        alignment.main(["--out", str(tmp_path), "--worlds", "small"])


def test_the_worlds_differ_in_size_and_noise():
    for name in ("num_users", "num_items", "mean_clicks", "noise"):
        assert len({getattr(world, name) for world in alignment.WORLDS.values()}) == 3, name


def test_on_data_of_ones_own_nothing_is_prepared(commands, tmp_path):
    own = ["--data", "shards/beauty", "--ids", "ids/beauty", "--policy-run", "runs/policy"]
    alignment.main(["--out", str(tmp_path), *own, "--seeds", "0"])
    assert {words[0] for words in commands} == {"align", "evaluate"}
    assert all("hit,rank" in words for words in commands if words[0] == "align")
    found = rows(tmp_path)
    assert {row["world"] for row in found} == {"beauty"} and len(found) == 5
    assert found[1]["ndcg@10 against SFT (95 %)"] == "+200.0% (+200.0% to +200.0%)"
    assert "utility@10" not in found[1]
    assert "Fingerprints" not in (tmp_path / "table.md").read_text()


def test_what_is_missing_or_unknown_is_said():
    with pytest.raises(ConfigError, match="given together"):
        alignment.Options(data="shards")
    with pytest.raises(ConfigError, match="must be of GRPO, "):
        alignment.Options(variants=("PPO",))
