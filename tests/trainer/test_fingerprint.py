import json
from dataclasses import asdict, dataclass, field

import pytest

from cluster.errors import CheckpointError
from trainer.fingerprint import compare_fingerprint, model_fingerprint, option_defaults

SHAPES = {"table/item": (100, 64), "dense/encoder.weight": (64, 64)}
MODEL = {"type": "sasrec", "num_blocks": 2, "widths": (64, 128)}


def test_the_same_model_passes_also_after_a_trip_through_json():
    saved = json.loads(json.dumps(model_fingerprint(SHAPES, MODEL)))
    compare_fingerprint(saved, model_fingerprint(dict(reversed(SHAPES.items())), MODEL))


def test_another_model_is_refused_with_a_list_of_what_differs():
    shapes = {"table/item": (120, 64), "dense/head.weight": (3,)}
    with pytest.raises(CheckpointError) as caught:
        compare_fingerprint(
            model_fingerprint(SHAPES, MODEL), model_fingerprint(shapes, {**MODEL, "num_blocks": 4})
        )
    message = str(caught.value)
    for line in (
        "model.num_blocks: 2 saved, 4 now",
        "shapes.table/item: [100, 64] saved, [120, 64] now",
        "shapes.dense/encoder.weight: [64, 64] saved, absent now",
        "shapes.dense/head.weight: absent saved, [3] now",
    ):
        assert line in message
    assert "widths" not in message and "--init-from" in message and "may change on resume" in message


def test_of_another_kind_of_model_only_the_kind_is_told():
    saved, now = ({"model": {"type": name, "width": width}} for name, width in (("Tiger", 4), ("TDM", 8)))
    with pytest.raises(CheckpointError) as caught:
        compare_fingerprint(model_fingerprint(SHAPES, saved), model_fingerprint({}, now))
    message = str(caught.value)
    assert "model.model.type: Tiger saved, TDM now\n  and more that follows from it" in message
    assert "width" not in message and "shapes." not in message


def test_a_long_list_of_differences_is_cut():
    many = {f"dense/{index}": (index,) for index in range(50)}
    with pytest.raises(CheckpointError, match="and 30 more"):
        compare_fingerprint(model_fingerprint({}, {}), model_fingerprint(many, {}))


@dataclass(frozen=True, kw_only=True)
class Part:
    size: int = 3
    names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Options:
    width: int
    depth: int = 2
    part: Part | None = field(default_factory=Part)
    parts: tuple[Part, ...] = (Part(size=1),)


def test_an_option_that_a_checkpoint_is_too_old_to_know_had_its_default():
    def now(**options) -> dict:
        return model_fingerprint(SHAPES, {"model": asdict(Options(width=8, **options))})

    defaults = {"model": option_defaults(Options(width=8, depth=5, part=Part(size=4)))}
    assert json.loads(json.dumps(defaults)) == {
        "model": {"depth": 2, "part": {"size": 3, "names": []}, "parts": [{"size": 1, "names": []}]}
    }
    old = model_fingerprint(SHAPES, {"model": {"width": 8, "part": {"size": 3}}})
    compare_fingerprint(old, now(), defaults)
    with pytest.raises(CheckpointError, match=r"model.model.depth: 2 saved, 5 now"):
        compare_fingerprint(old, now(depth=5), defaults)
    with pytest.raises(CheckpointError, match=r"model.model.part.names: \[\] saved, \['a'\] now"):
        compare_fingerprint(old, now(part=Part(names=("a",))), defaults)
    compare_fingerprint(model_fingerprint(SHAPES, {"model": {"width": 8}}), now(), defaults)
    # A part that may be left out had all of its defaults.
    without = {"model": option_defaults(Options(width=8, part=None))}
    assert json.dumps(without) == json.dumps(defaults)
