"""The table of costs of OneRec, and the comparison of its variants."""

import polars as pl
import pytest

from benchmarks.experiments import onerec, onerec_flops
from benchmarks.setting.flops import dense_of_active_size
from cluster.errors import ConfigError


def test_costs_are_printed_beside_those_of_the_report(capsys):
    onerec_flops.main(["--sizes", "0.1b", "4b-a0.5b", "--contexts", "512"])
    lines = capsys.readouterr().out.splitlines()
    assert "(1.98)" in lines[2] and "(25.64)" in lines[2] and "0.120B" in lines[2]
    # Experts cost what the dense model of the size they use costs.
    assert lines[3].startswith("| 4b-a0.5b | 512 | 4.138B | 9.8")


@pytest.mark.parametrize("sizes", onerec.VARIANTS)
def test_experts_are_compared_with_a_dense_layer_of_the_size_that_a_token_visits(sizes):
    options = onerec.Options(data="x", ids="y", sizes=sizes)
    models = {name: onerec._config(options, variant).model for name, variant in options.chosen().items()}
    of_onerec, of_lazy = (
        dense_of_active_size(models[f"{name}, {onerec.EXPERTS}"]) for name in (onerec.ONEREC, onerec.LAZY)
    )
    assert models[f"{onerec.LAZY}, {onerec.EXPERTS}"] != of_lazy
    assert of_onerec == models[onerec.ONEREC]
    assert of_lazy.feedforward == of_lazy.dense_feedforward == models[onerec.LAZY].feedforward


def test_variants_are_compared_over_the_seeds_that_both_have():
    runs = [pl.DataFrame({"user_row": [0, 1], "recall@10": [1.0, 0.5], "ndcg@10": [1.0, 0.5]})] * 2
    found = {onerec.DECODER: runs, onerec.LAZY: runs[:1], f"{onerec.LAZY}, {onerec.EXPERTS}": runs}
    rows = onerec.compared(found, onerec.Options(data="x", ids="y"))
    assert [row[:4] for row in rows[::2]] == [
        [onerec.DECODER, onerec.LAZY, "recall@10", "1"],
        [onerec.LAZY, f"{onerec.LAZY}, {onerec.EXPERTS}", "recall@10", "1"],
    ]


def test_equal_operations_give_fewer_steps_of_a_dearer_model():
    cost = onerec.Cost(parameters=2, active=1, step_flops=4e9, steps_per_epoch=10)
    assert (cost.steps(4e10), cost.steps(1.0)) == (10, 1)


def test_unknown_variants_are_refused():
    with pytest.raises(ConfigError, match="variants must be of"):
        onerec.Options(data="x", ids="y", variants=("OneRec-V3",))
