"""URM as a run: one model over clicks, carts and purchases, evaluated by an objective and asked in words."""

import json

from tests.launch.test_in_process import grail

WORLD = (
    "--num-users 120 --num-items 80 --num-clusters 8 --mean-clicks 10 --sequence-actions click cart purchase"
)
TOLD = "--model.by-action --model.reads-text --model.text.vocabulary-size 300"
SMALL = "--train.max-steps 4 --data.tokens-per-step 256 --objective.num-negatives 32 --cluster.workers 1"


def test_a_run_of_several_objectives_is_evaluated_by_one_and_asked_in_words(tmp_path):
    shown = grail(
        tmp_path,
        f"data build world {WORLD} --ray never --out shards",
        f"pretrain urm --data.path shards --run-dir run {TOLD} {SMALL} --cluster.in-process",
        "evaluate run --evaluation.objective purchase --evaluation.held-out-action purchase",
        "recommend run --users 1 --k 5 --evaluation.objective basket",
        blocked=True,
    )
    assert "Finished at step 4" in shown and "recommended" in shown
    written = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert written["settings"]["evaluation"]["objective"] == "purchase"
    assert 0 < written["num_users"] < 120
