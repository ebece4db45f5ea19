"""A model that generates, with tables and with experts spread over both workers, loses a worker and nothing else."""

import random

from launch.cli import run as grail
from launch.run_status import report_run
from tests.faults.training import ALONE, Training, assert_nothing_lost, recipe_line
from tests.tiny_run import build_tiny_data, save_semantic_ids

SEED = 20240301
SPREAD = ("--sharding.expert-parallel", "2")
EXPERTS = (
    "--model.num-heads 2 --model.num-dense-blocks 0 "
    "model.feedforward:mixture-config --model.feedforward.num-experts 4 --model.feedforward.hidden 16"
).split()


def test_a_killed_worker_with_half_of_the_experts_is_replaced_and_the_command_finishes(tmp_path):
    data = build_tiny_data(tmp_path / "data")
    table = save_semantic_ids(data, tmp_path / "ids")

    def line(name: str, *options: str) -> list[str]:
        given = ("--data.semantic-ids", table, "--train.checkpoint-every-steps", "4", *options, *EXPERTS)
        return recipe_line("onerec-v2-amazon", data, tmp_path / name, *given)

    assert grail(line("undisturbed", *ALONE)) == 0
    choice = random.Random(SEED)
    with Training(tmp_path / "run", line("run", *SPREAD)) as training:
        training.wait_for_step(choice.randrange(9, 20))
        workers = training.workers()
        assert len(workers) == 2
        victim = choice.choice(workers)
        victim.kill()
        assert training.exit_code() == 0, training.output()
        output = training.output()
    assert f"(pid {victim.pid}) died" in output and "restart 1 of 3" in output
    assert "restart 2" not in output
    report = report_run(str(tmp_path / "run"))
    assert (report.state, report.status.restarts, report.status.workers) == ("finished", 1, 2)
    assert "Going on from step" in (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert_nothing_lost(tmp_path / "run", tmp_path / "undisturbed")
