import json

import pytest

from benchmarks.setting import commands
from benchmarks.setting.commands import pretrain_once
from cluster.errors import ConfigError


def test_a_finished_run_is_not_repeated_and_not_taken_for_one_of_other_options(tmp_path, monkeypatch):
    given, states = [], iter(("stopped", "finished"))

    def grail(*words):
        given.append(words)
        (tmp_path / "run" / "status.json").write_text(json.dumps({"state": next(states)}))

    monkeypatch.setattr(commands, "grail", grail)
    for _ in range(3):
        assert pretrain_once(tmp_path / "run", "sasrec", "--data.path", "beauty") == tmp_path / "run"
    words = ("pretrain", "sasrec", "--run-dir", str(tmp_path / "run"), "--data.path", "beauty")
    assert given == [words, words]
    with pytest.raises(
        ConfigError, match=r"--data.path ml-1m, and is of sasrec --data.path beauty; name another --out"
    ):
        pretrain_once(tmp_path / "run", "sasrec", "--data.path", "ml-1m")
    (tmp_path / "run" / "command.json").unlink()
    with pytest.raises(
        ConfigError, match=r"status.json must be of .* and is of others that were not written down"
    ):
        pretrain_once(tmp_path / "run", "sasrec", "--data.path", "beauty")
