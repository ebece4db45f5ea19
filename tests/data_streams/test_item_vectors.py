import numpy as np
import pytest

from cluster.errors import ConfigError, DataError
from data_streams.item_vectors import FusedVectors, Fusion, read_matrix

RANDOM = np.random.default_rng(0)
WIDE = (RANDOM.normal(size=(200, 6)) * [9, 5, 3, 1, 0.5, 0.1] + 4).astype(np.float32)
NARROW = (100 * RANDOM.normal(size=(200, 2))).astype(np.float16)


def fuse(matrices, **options) -> np.ndarray:
    chosen = {"widths": [3, 2][: len(matrices)], "weights": [1.0] * len(matrices), "whiten": True, **options}
    return FusedVectors(Fusion.fit(matrices, **chosen), matrices)[:]


def test_a_matrix_is_mapped_and_must_fit_the_catalogue(tmp_path):
    path = str(tmp_path / "m.npy")
    np.save(path, NARROW)
    assert isinstance(read_matrix(path, 200), np.memmap)
    with pytest.raises(DataError, match=r"for each of the 201 items.* is float16 \(200, 2\)"):
        read_matrix(path, 201)
    np.save(path, np.zeros((200, 2), dtype=np.int32))
    with pytest.raises(DataError, match="real numbers"):
        read_matrix(path, 200)
    np.save(path, np.array([None] * 200), allow_pickle=True)
    with pytest.raises(DataError, match="is not a plain NumPy array"):
        read_matrix(path, 200)
    for absent in (tmp_path / "absent.npy", tmp_path):
        with pytest.raises(DataError, match=r"must be an existing .npy file"):
            read_matrix(str(absent), 200)


def test_an_archive_of_matrices_is_refused(tmp_path):
    path = tmp_path / "m.npz"
    np.savez(path, vectors=NARROW)
    with pytest.raises(
        DataError, match=r"the \.npy file of one matrix, and .*m\.npz is an archive of several"
    ):
        read_matrix(str(path), 200)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="is not a plain NumPy array"):
        read_matrix(str(path), 200)


def test_whitened_axes_are_uncorrelated_and_every_input_weighs_alike():
    fused = fuse([WIDE, NARROW])
    assert fused.shape == (200, 5) and fused.dtype == np.float32
    np.testing.assert_allclose(fused.mean(0), 0, atol=1e-3)
    expected = np.diag([1 / 3] * 3 + [1 / 2] * 2)
    covariance = np.cov(fused.T, bias=True)
    np.testing.assert_allclose(covariance[:3, :3], expected[:3, :3], atol=1e-3)
    np.testing.assert_allclose(covariance[3:, 3:], expected[3:, 3:], atol=1e-3)
    weighted = fuse([WIDE, NARROW], weights=[1.0, 3.0])
    np.testing.assert_allclose(weighted[:, :3], fused[:, :3], atol=1e-5)
    np.testing.assert_allclose(weighted[:, 3:], 3 * fused[:, 3:], atol=1e-5)


def test_without_whitening_distances_keep_their_proportions():
    fused = fuse([WIDE], widths=[6], whiten=False)
    assert np.square(fused).sum() / 200 == pytest.approx(1.0, rel=1e-3)
    before = np.linalg.norm(WIDE[:50] - WIDE[50:100], axis=1)
    after = np.linalg.norm(fused[:50] - fused[50:100], axis=1)
    np.testing.assert_allclose(after / before, (after / before)[0], rtol=1e-3)


def test_an_axis_without_variance_stays_empty():
    flat = WIDE.copy()
    flat[:, 5] = flat[:, 0]
    fused = fuse([flat], widths=[6])
    assert np.isfinite(fused).all() and np.abs(fused[:, 5]).max() == 0
    assert np.square(fused).sum() / 200 == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_an_input_whose_vectors_are_all_equal_is_refused(value):
    for whiten in (True, False):
        with pytest.raises(DataError, match="all 200 of an input of width 3 are equal; leave that input out"):
            fuse([WIDE, np.full((200, 3), value, dtype=np.float32)], whiten=whiten)


def test_rows_are_fused_when_they_are_read_and_alike_later():
    fusion = Fusion.fit([WIDE, NARROW], widths=[3, 2], weights=[1, 1], whiten=True)
    again = Fusion.from_arrays(fusion.arrays())
    vectors, later = FusedVectors(fusion, [WIDE, NARROW]), FusedVectors(again, [WIDE[:20], NARROW[:20]])
    np.testing.assert_allclose(vectors[np.array([3, 7])], vectors[:][[3, 7]], atol=1e-6)
    np.testing.assert_allclose(later[5:9], vectors[5:9], atol=1e-6)
    with pytest.raises(DataError, match=r"must have the widths \[6, 2\] .* and have \[2, 6\]"):
        FusedVectors(fusion, [NARROW, WIDE])


def test_options_and_numbers_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="one positive number for each of 2 inputs"):
        fuse([WIDE, NARROW], weights=[1.0])
    with pytest.raises(
        ConfigError, match=r"--embeddings.width must be 1 to the width of the input, 2, got 5"
    ):
        fuse([NARROW], widths=[5])
    bad = WIDE.copy()
    bad[42, 1] = np.inf
    with pytest.raises(DataError, match="row 42 is not"):
        fuse([bad])
