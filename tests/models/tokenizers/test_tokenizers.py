"""What holds for every tokenizer of the folder; a new file is tested without being listed."""

import dataclasses

import numpy as np
import pytest

from cluster.errors import ConfigError, DataError
from cluster.plugins import plugin_config
from cluster.storage import Storage
from launch.commands.tokenize import tokenizer_files
from models.tokenizers.collisions import codes_of_new_items, tell_apart
from models.tokenizers.tokenizer import (
    Tokenizer,
    blocks,
    greedy_codes,
    load_tokenizer,
    path_points,
    reconstruction_error,
    save_tokenizer,
    take_sample,
)
from tests.models.tokenizers.clustered import clustered_vectors

SMALL = {
    "code_sizes": (8, 8, 4),
    "steps": 30,
    "batch_size": 64,
    "hidden": (16,),
    "values": (4, 2),
    "levels": 3,
}
VECTORS = clustered_vectors()
NAMES = sorted(tokenizer_files())


def config_of(name: str, **changes):
    """A small configuration of the tokenizer: whatever it has of the options above."""
    form = plugin_config("models.tokenizers", name)
    known = {entry.name for entry in dataclasses.fields(form)}
    return form(**{key: value for key, value in {**SMALL, **changes}.items() if key in known})


def fitted(name: str, vectors: np.ndarray = VECTORS, **changes) -> Tokenizer:
    tokenizer = config_of(name, **changes).build(dim=vectors.shape[1])
    tokenizer.fit(vectors)
    return tokenizer


def test_the_folder_has_the_tokenizers_of_the_field():
    assert {"rq-vae", "residual-kmeans", "balanced-kmeans", "finite-scalar", "random-codes"} <= set(NAMES)
    assert "tokenizer" not in NAMES and "collisions" not in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_codes_depend_on_vectors_and_seed_alone(name):
    first, again, other = fitted(name), fitted(name), fitted(name, seed=1)
    codes = first.assign(VECTORS)
    assert codes.dtype == np.int32 and codes.shape == (400, len(first.code_sizes))
    assert (codes >= 0).all() and (codes < np.array(first.code_sizes)).all()
    np.testing.assert_array_equal(codes, again.assign(VECTORS))
    assert (codes != other.assign(VECTORS)).any()


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_tokenizer_encodes_and_decodes_as_before(name, tmp_path):
    tokenizer = fitted(name)
    save_tokenizer(tokenizer, Storage(tmp_path))
    loaded = load_tokenizer(Storage(tmp_path))
    assert loaded.config == tokenizer.config and loaded.code_sizes == tokenizer.code_sizes
    codes = tokenizer.encode(VECTORS)
    np.testing.assert_array_equal(loaded.encode(VECTORS), codes)
    np.testing.assert_array_equal(loaded.decode(codes), tokenizer.decode(codes))


@pytest.mark.parametrize("name", NAMES)
def test_a_matrix_on_disk_in_half_precision_gives_the_codes_of_its_numbers(name, tmp_path):
    np.save(tmp_path / "vectors.npy", VECTORS.astype(np.float16))
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    in_memory = VECTORS.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(
        fitted(name, mapped).assign(mapped), fitted(name, in_memory).assign(in_memory)
    )


@pytest.mark.parametrize("method", ["extra-code", "reassign", "keep"])
@pytest.mark.parametrize("name", NAMES)
def test_new_items_leave_old_codes_alone_and_fit_beside_them(name, method):
    tokenizer, new = fitted(name), clustered_vectors(60, seed=5)
    old = VECTORS[:150]
    codes, sizes = tell_apart(
        tokenizer,
        old,
        tokenizer.assign(old),
        method=method,
        extra_codes=6 if method == "extra-code" else None,
    )
    before = codes.copy()
    added = codes_of_new_items(tokenizer, new, codes, method=method, code_sizes=sizes)
    np.testing.assert_array_equal(codes, before)
    together = np.concatenate([codes, added])
    assert added.shape == (60, len(sizes)) and added.dtype == np.int32
    assert (added >= 0).all() and (added < np.array(sizes)).all()
    if method != "keep":
        assert len(np.unique(together, axis=0)) == 210, "every item has a path of its own"


@pytest.mark.parametrize("name", NAMES)
def test_vectors_that_are_not_finite_are_named(name):
    vectors = VECTORS.copy()
    vectors[[7, 300], 2] = np.nan, np.inf
    with pytest.raises(DataError, match=r"2 of the 400 .* such as row 7, 300; mend the matrix"):
        fitted(name, vectors)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("random-codes", "finite-scalar")])
def test_codes_tell_more_than_the_mean_and_more_levels_tell_more(name):
    tokenizer = fitted(name, steps=300)
    codes = tokenizer.encode(VECTORS)
    errors = [reconstruction_error(tokenizer.decode, VECTORS, codes[:, :levels]) for levels in (1, 2, 3)]
    assert errors[0] < 0.8 and errors[2] < errors[1] < errors[0]


def test_encoding_is_greedy_down_the_levels():
    random = np.random.default_rng(0)
    points = random.normal(size=(50, 5)).astype(np.float32)
    code_vectors = [random.normal(size=(size, 5)).astype(np.float32) for size in (6, 4)]
    for point, codes in zip(points, greedy_codes(points, code_vectors), strict=True):
        rest = point
        for level, code in enumerate(codes):
            distances = [np.square(rest - vector).sum() for vector in code_vectors[level]]
            assert code == np.argmin(distances)
            rest = rest - code_vectors[level][code]
    codes = np.array([[5, 1]])
    np.testing.assert_allclose(path_points(codes, code_vectors)[0], code_vectors[0][5] + code_vectors[1][1])


def test_the_error_is_the_lost_share_of_the_variance():
    vectors, codes = np.array([[1.0], [3.0]], dtype=np.float32), np.zeros((2, 1), dtype=np.int32)
    assert reconstruction_error(lambda codes: np.zeros((2, 1)), vectors, codes) == pytest.approx(10 / 2)
    assert reconstruction_error(lambda codes: np.full((2, 1), 2.0), vectors, codes) == pytest.approx(1.0)
    assert reconstruction_error(lambda codes: vectors, vectors, codes) == 0.0


def test_samples_are_different_rows_in_their_order():
    matrix = np.arange(1000, dtype=np.float64)[:, None]
    sample = take_sample(matrix, 100, seed=3)
    assert sample.dtype == np.float32 and len(sample) == 100
    assert (np.diff(sample[:, 0]) > 0).all()
    np.testing.assert_array_equal(take_sample(matrix, 5000, seed=3), matrix)


def test_blocks_cover_the_matrix_once():
    matrix = np.arange(10, dtype=np.float32)[:, None]
    found = list(blocks(matrix, rows=4))
    assert [start for start, _ in found] == [0, 4, 8]
    np.testing.assert_array_equal(np.concatenate([block for _, block in found]), matrix)


def test_too_few_items_for_the_codes_are_refused():
    for name in ("residual-kmeans", "balanced-kmeans", "rq-vae"):
        with pytest.raises(ConfigError, match="8 codes need at least as many items, and there are 5"):
            fitted(name, VECTORS[:5])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("residual-kmeans", {"code_sizes": ()}, "--code-sizes must be one or more positive numbers"),
        ("random-codes", {"code_sizes": (4, 0)}, "--code-sizes must be one or more positive numbers"),
        ("residual-kmeans", {"sample_per_code": 0}, "--sample-per-code must be at least 1, got 0"),
        ("residual-kmeans", {"passes": -1}, "--passes must be at least 0, got -1"),
        ("balanced-kmeans", {"iterations": -1}, "--iterations must be at least 0, got -1"),
        ("rq-vae", {"steps": 0}, "--steps must be at least 1, got 0"),
        ("rq-vae", {"latent": 0}, "--latent must be at least 1, got 0"),
        ("rq-vae", {"hidden": (8, 0)}, r"--hidden must be at least 1, got \(8, 0\)"),
        ("rq-vae", {"learning_rate": 0.0}, "--learning-rate must be above 0"),
        ("rq-vae", {"learning_rate": float("nan")}, "--learning-rate must be above 0"),
        ("rq-vae", {"commitment": -1.0}, "--commitment must be at least 0, got -1.0"),
        ("rq-vae", {"code_sizes": (0,)}, "--code-sizes must be one or more positive numbers"),
        ("rq-vae", {"reset_until": 1.5}, "--reset-until must be in 0..1"),
        ("finite-scalar", {"values": (8, 1)}, "all --values at least 2"),
        ("finite-scalar", {"batch_size": 0}, "--batch-size must be at least 1, got 0"),
    ],
)
def test_options_that_cannot_work_are_named(name, options, message):
    with pytest.raises(ConfigError, match=message):
        plugin_config("models.tokenizers", name)(**options)


def test_a_missing_or_damaged_tokenizer_is_named(tmp_path):
    storage = Storage(tmp_path)
    with pytest.raises(DataError, match="must hold a tokenizer"):
        load_tokenizer(storage)
    save_tokenizer(fitted("random-codes"), storage)
    storage.write("tokenizer.safetensors", b"no tensors")
    with pytest.raises(DataError, match="cannot be read"):
        load_tokenizer(storage)


@pytest.mark.parametrize("other", ["residual-kmeans", "rq-vae"])
def test_options_of_one_tokenizer_beside_what_another_learnt_are_told(tmp_path, other):
    storage = Storage(tmp_path)
    save_tokenizer(fitted("random-codes"), storage)
    learnt = storage.read("tokenizer.safetensors")
    save_tokenizer(fitted(other), storage)
    storage.write("tokenizer.safetensors", learnt)
    with pytest.raises(DataError, match=r"the tokenizer in .* cannot be read: .*; copy the folder again"):
        load_tokenizer(storage)
