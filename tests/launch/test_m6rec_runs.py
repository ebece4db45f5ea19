"""M6-Rec as runs: trained, resumed, evaluated, recommending titles, tuned from another run, and as ranker."""

import json

import polars as pl

from tests.launch.test_in_process import grail

WORLD = "--num-users 60 --num-items 80 --num-clusters 8 --mean-clicks 10 --ray never"
PAGES = "--keep-exposures --page-actions cart purchase"
SMALL = (
    "--model.width 16 --model.num-heads 2 --model.num-blocks 2 --model.separate-blocks 1 --cluster.workers 1 "
    "--cluster.in-process"
)
STEPS = "--data.tokens-per-step 256 --objective.num-negatives 16 --train.max-steps"


def test_runs_of_text_are_resumed_evaluated_asked_and_tuned_from_each_other(tmp_path):
    retrieve = f"pretrain m6-rec --data.path shards {SMALL} {STEPS}"
    infill = f"pretrain m6-rec-infilling --data.path shards {SMALL} --train.max-steps 2"
    rank = f"pretrain m6-rec-ranking --data.path pages {SMALL} --train.max-steps 2"
    shown = grail(
        tmp_path,
        f"data build world {WORLD} --out shards",
        f"{infill} --run-dir filled",
        f"{retrieve} 2 --run-dir run --init-from filled",
        f"{retrieve} 3 --run-dir run --init-from filled",
        "evaluate run",
        "recommend run --users 1 --k 5",
        f"{retrieve} 2 --run-dir tuned --init-from run --model.tuning option-adapter --model.adapter-width 4",
        f"data build world {WORLD} {PAGES} --out pages",
        f"{rank} --run-dir spoken --model.joint-tokens all --model.scoring likelihood",
        "evaluate spoken",
        blocked=True,
    )
    assert "Finished at step 3" in shown
    # Whatever a language model finds as a retriever, the last step has read the most.
    assert "Best validation step: 2" in shown
    # The second command began with the third step.
    assert any("steps-00000002-00000002" in file.name for file in (tmp_path / "run" / "audit").iterdir())
    titles = pl.read_parquet(tmp_path / "shards" / "items.parquet")["title"]
    assert sum(title in shown for title in titles) >= 5
    assert shown.count("Finished at step 2") == 4
    written = [json.loads((tmp_path / run / "evaluation.json").read_text()) for run in ("run", "spoken")]
    assert 0 <= written[0]["metrics"]["recall@10"] <= 1 and 0 < written[1]["metrics"]["gauc/purchase"] < 1
    tokenizers = [(tmp_path / run / "tokenizer.json").read_text() for run in ("run", "tuned")]
    assert tokenizers[0] == tokenizers[1]


def test_users_who_have_taken_every_item_are_told_of(tmp_path):
    events = [("a", "x", second) for second in range(4)]
    pl.DataFrame(events, schema=["user_id", "item_id", "timestamp_s"], orient="row").write_parquet(
        tmp_path / "events.parquet"
    )
    pl.DataFrame({"item_id": ["x"], "title": ["Красный лак 💅"]}).write_parquet(tmp_path / "items.parquet")
    build = "data build events --events events.parquet --items items.parquet --out shards --ray never"
    grail(
        tmp_path, build, f"pretrain m6-rec --data.path shards {SMALL} {STEPS} 1 --run-dir run", blocked=True
    )
    told = grail(tmp_path, "recommend run --all --out all.parquet", blocked=False, fails=True)
    assert "items they have not taken" in told and not (tmp_path / "all.parquet").exists()
    everything = "recommend run --all --out all.parquet --evaluation.no-filter-seen"
    assert "for 1 users" in grail(tmp_path, everything, blocked=False)
