"""URM as a run: one model over clicks, carts and purchases, evaluated and asked by objective."""

import json

from tests.launch.test_in_process import grail

WORLD = (
    "--num-users 120 --num-items 80 --num-clusters 8 --mean-clicks 10 --sequence-actions click cart purchase"
)
SMALL = "--train.max-steps 4 --data.tokens-per-step 256 --objective.num-negatives 32 --cluster.workers 1"


def test_a_run_of_several_objectives_is_evaluated_and_asked_by_one(tmp_path):
    shown = grail(
        tmp_path,
        f"data build world {WORLD} --ray never --out shards",
        f"pretrain urm --data.path shards --run-dir run --model.by-action {SMALL} --cluster.in-process",
        "evaluate run --evaluation.objective purchase --evaluation.held-out-action purchase",
        "recommend run --users 1 --k 5 --evaluation.objective cart",
        blocked=True,
    )
    assert "Finished at step 4" in shown and "recommended" in shown
    written = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert written["settings"]["evaluation"]["objective"] == "purchase"
    assert 0 < written["num_users"] < 120
    refused = grail(tmp_path, "evaluate run --evaluation.objective like", blocked=False, fails=True)
    assert "must be an action" in refused and "got like" in refused
