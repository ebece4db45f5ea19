import numpy as np
import pytest

from cluster.errors import ConfigError
from models.tokenizers import tokenizer as tokenizer_file
from models.tokenizers.clustering import group_sums, kmeans, nearest, squared_distances
from models.tokenizers.residual_kmeans import ResidualKMeans
from models.tokenizers.tokenizer import greedy_codes, path_points, reconstruction_error
from tests.models.tokenizers.clustered import clustered_vectors


def test_nearest_and_distances_equal_the_naive_ones():
    random = np.random.default_rng(0)
    points, centroids = random.normal(size=(40, 5)).astype("f"), random.normal(size=(7, 5)).astype("f")
    naive = np.array([[np.square(point - centroid).sum() for centroid in centroids] for point in points])
    np.testing.assert_allclose(squared_distances(points, centroids), naive, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(nearest(points, centroids), naive.argmin(1))


def test_group_sums_equal_a_loop():
    random = np.random.default_rng(0)
    points, groups = random.normal(size=(30, 3)).astype("f"), random.integers(0, 4, 30)
    sums, counts = group_sums(points, groups, 6)
    for group in range(6):
        np.testing.assert_allclose(sums[group], points[groups == group].sum(0), atol=1e-5)
        assert counts[group] == (groups == group).sum()


def test_kmeans_finds_separated_clusters_and_refuses_too_few_points():
    centres = np.array([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]], dtype=np.float32)
    points = np.repeat(centres, 50, axis=0) + np.random.default_rng(0).normal(size=(150, 2)).astype("f")
    found = kmeans(points, 3, seed=1)
    assert sorted(nearest(centres, found).tolist()) == [0, 1, 2]
    np.testing.assert_allclose(np.sort(found, 0), np.sort(points.reshape(3, 50, 2).mean(1), 0), atol=0.3)
    with pytest.raises(ConfigError, match="lower --code-sizes"):
        kmeans(points[:2], 3, seed=1)


def test_a_pass_moves_the_last_level_to_the_means_of_what_it_is_nearest_to(monkeypatch):
    monkeypatch.setattr(tokenizer_file.blocks, "__defaults__", (37,))
    vectors = clustered_vectors(300)
    options = {"code_sizes": (6, 5), "sample_per_code": 10}
    before = ResidualKMeans.Config(passes=0, **options).build(dim=12)
    before.fit(vectors)
    first_level = before.code_vectors[0]
    after = ResidualKMeans.Config(passes=1, **options).build(dim=12)
    after.fit(vectors)
    codes = greedy_codes(vectors, [first_level])[:, 0]
    for code in np.unique(codes):
        np.testing.assert_allclose(after.code_vectors[0][code], vectors[codes == code].mean(0), atol=1e-4)


def test_passes_over_all_vectors_make_up_for_a_small_sample():
    vectors = clustered_vectors(4000)
    errors = []
    for passes in (0, 5):
        config = ResidualKMeans.Config(code_sizes=(16,), sample_per_code=2, passes=passes)
        tokenizer = config.build(dim=12)
        tokenizer.fit(vectors)
        errors.append(reconstruction_error(tokenizer.decode, vectors, tokenizer.assign(vectors)))
    assert errors[1] < 0.9 * errors[0]


def test_each_level_clusters_what_the_level_before_left():
    vectors = clustered_vectors(500)
    tokenizer = ResidualKMeans.Config(code_sizes=(6, 36)).build(dim=12)
    tokenizer.fit(vectors)
    codes = tokenizer.assign(vectors)
    residual = vectors - path_points(codes[:, :1], tokenizer.code_vectors)
    spread_before, spread_after = np.square(vectors - vectors.mean(0)).sum(), np.square(residual).sum()
    left = np.square(residual - tokenizer.code_vectors[1][codes[:, 1]]).sum()
    assert left < 0.2 * spread_after < 0.2 * spread_before


def test_rounds_of_clustering_are_as_many_as_asked_for():
    vectors, errors = clustered_vectors(300), []
    for iterations in (0, 25):
        tokenizer = ResidualKMeans.Config(code_sizes=(16,), iterations=iterations).build(dim=vectors.shape[1])
        tokenizer.fit(vectors)
        errors.append(reconstruction_error(tokenizer.decode, vectors, tokenizer.assign(vectors)))
    assert errors[1] < 0.9 * errors[0]
