"""Early exit is measured at each certainty that is asked for."""

from benchmarks.experiments.m6rec_exits import main
from launch.cli import run as grail

WORLD = "--num-users 60 --num-items 40 --num-clusters 4 --mean-clicks 5 --keep-exposures --page-actions cart purchase"
SMALL = (
    "--train.max-steps 2 --model.width 8 --model.feedforward-width 8 --model.text.vocabulary-size 300 "
    "--data.num-streams 2 --cluster.workers 1 --cluster.in-process"
)


def test_a_less_certain_answer_needs_no_more_layers(tmp_path, capsys):
    data, run = str(tmp_path / "shards"), str(tmp_path / "run")
    assert grail(["data", "build", "world", "--out", data, *WORLD.split()]) == 0
    line = ["pretrain", "m6-rec-ranking", "--data.path", data, "--run-dir", run, *SMALL.split()]
    assert grail([*line, "--model.exits", "2"]) == 0
    capsys.readouterr()
    main(["--run", run, "--confidences", "1", "0.7", "0.5", "--repeats", "1"])
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.strip().splitlines()[2:]]
    layers = [float(line[3]) for line in lines]
    assert [line[0] for line in lines] == ["1", "0.7", "0.5"]
    assert layers[0] == 3 and layers[-1] == 2 and layers == sorted(layers, reverse=True)
