"""The times of late interaction are told for every number of separate layers."""

from benchmarks.experiments.m6rec_latency import main


def test_every_number_of_separate_layers_has_a_line(capsys):
    sizes = "--width 16 --layers 2 --events 3 --candidates 4 --tokens 2 --repeats 1"
    main(sizes.split())
    lines = [line.split(" | ")[:2] for line in capsys.readouterr().out.strip().splitlines()[2:]]
    assert lines == [["| all", "0"], ["| all", "1"], ["| all", "2"], ["| last", "1"], ["| last", "2"]]
