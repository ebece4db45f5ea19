import numpy as np
import pytest

from launch.joint_law import fit_joint_law, num_amounts
from launch.law_trust import trust_in
from launch.scaling_law import fit_law


def test_the_law_of_a_report_is_found_in_points_that_follow_it():
    # OneRec-V2 Technical Report: 3.13 + 3660 / N^0.489.
    sizes = np.array([0.1, 0.2, 0.5, 1, 2, 4, 8]) * 1e9
    law = fit_law(np.column_stack((sizes, 3.13 + 3660 / sizes**0.489)))
    assert (law.floor, law.exponent) == (pytest.approx(3.13, abs=1e-3), pytest.approx(0.489, abs=1e-3))
    assert law.scale == pytest.approx(3660, rel=0.02)
    assert law.loss(sizes) == pytest.approx(3.13 + 3660 / sizes**0.489, rel=1e-4)
    assert law.largest_miss < 1e-4
    assert str(law).startswith("L(N) = 3.130 + ") and str(law).endswith("/ N^0.489")


def test_losses_that_do_not_bend_have_no_floor():
    sizes = np.array([1e3, 1e4, 1e5, 1e6])
    law = fit_law(np.column_stack((sizes, 10 / sizes**0.05)))
    assert law.floor == pytest.approx(0, abs=0.05) and law.exponent == pytest.approx(0.05, abs=2e-3)


def test_the_joint_law_of_a_paper_is_found_in_points_that_follow_it():
    # Hoffmann et al. (2022): 1.69 + 406.4 / N^0.34 + 410.7 / D^0.28, at 6 N operations per target.
    sizes, targets = (values.ravel() for values in np.meshgrid([1e7, 4e7, 1.6e8, 6.4e8], [2e8, 8e8, 3.2e9]))
    losses = 1.69 + 406.4 / sizes**0.34 + 410.7 / targets**0.28
    law = fit_joint_law(np.column_stack((sizes, targets, 6 * sizes, losses)))
    assert law.floor == pytest.approx(1.69, rel=1e-3) and law.largest_miss < 1e-3
    assert (law.size_scale, law.size_exponent) == pytest.approx((406.4, 0.34), rel=1e-2)
    assert (law.data_scale, law.data_exponent) == pytest.approx((410.7, 0.28), rel=1e-2)
    # Their equation 4: the best size is G (C / 6)^(beta / (alpha + beta)).
    budget = 1e20
    best = law.best_split(budget, sizes.min())
    scale = (0.34 * 406.4 / (0.28 * 410.7)) ** (1 / 0.62)
    assert best.size == pytest.approx(scale * (budget / 6) ** (0.28 / 0.62), rel=1e-2)
    assert 6 * best.size * best.targets == pytest.approx(budget, rel=1e-6)
    assert best.loss == pytest.approx(float(law.loss(np.array(best.size), np.array(best.targets))))


def test_a_joint_law_needs_three_sizes_three_amounts_and_six_runs():
    sizes, targets = np.repeat([1.0, 2.0, 4.0], 3), np.tile([1.0, 10.0, 100.0], 3)
    losses = 1 + 1 / sizes + 1 / targets
    points = np.column_stack((sizes, targets, sizes, losses))
    assert fit_joint_law(points) is not None
    assert fit_joint_law(points[:5]) is None
    assert fit_joint_law(points[:6]) is None, "two sizes"
    alike = np.column_stack((sizes, np.tile([1.0, 1.04, 1.08], 3), sizes, losses))
    assert fit_joint_law(alike) is None, "one amount"
    assert fit_joint_law(points * [1, 1, 1, 0]) is None
    assert num_amounts([200, 100, 104]) == 2


def test_a_law_tells_how_far_it_is_off():
    sizes, targets = (values.ravel() for values in np.meshgrid([1.0, 2.0, 4.0, 8.0], [1.0, 10.0, 100.0]))
    losses = 2 + 1 / sizes + 1 / targets
    losses[5] *= 1.5
    points = np.column_stack((sizes, targets, sizes, losses))
    assert fit_joint_law(points).largest_miss == pytest.approx(1 / 3, rel=0.05)
    line = fit_law([(1, 3), (2, 2.5), (4, 2.25), (8, 2.5)])
    assert line.largest_miss == pytest.approx(
        max(abs(line.loss(8.0) / 2.5 - 1), abs(line.loss(4.0) / 2.25 - 1))
    )


def of_one(sizes, losses):
    points = np.column_stack((sizes, losses))
    law = fit_law(points)
    return law, trust_in(law, points, fit=fit_law, refit=fit_law)


def test_points_on_a_law_leave_no_doubt_and_foretell_the_largest_size():
    sizes = np.array([1e3, 4e3, 1.6e4, 6.4e4, 2.56e5])
    law, trust = of_one(sizes, 2 + 30 / sizes**0.3)
    for name, (low, high) in trust.intervals.items():
        assert low == pytest.approx(getattr(law, name), rel=0.02) == pytest.approx(high, rel=0.02)
    assert trust.largest == 2.56e5 and trust.miss_at_largest < 1e-3
    best = 2 + 30 / 6.4e4**0.3
    assert trust.best_of_smaller == pytest.approx(best / (2 + 30 / 2.56e5**0.3) - 1)


def test_intervals_of_noisy_points_hold_the_law_and_grow_with_the_noise():
    sizes, noise = np.geomspace(1e3, 1e6, 8), np.random.default_rng(1).normal(size=8)
    true = 2 + 30 / sizes**0.3
    widths = []
    for size in (0.002, 0.02):
        _, trust = of_one(sizes, true * np.exp(size * noise))
        (low, high), (least, most) = trust.intervals["exponent"], trust.intervals["floor"]
        assert low < 0.3 < high and least < 2 < most
        widths.append(high - low)
    assert widths[1] > 3 * widths[0]


def test_a_bend_that_smaller_sizes_do_not_show_is_told():
    sizes = np.array([1e3, 4e3, 1.6e4, 6.4e4, 2.56e5])
    losses = 10 / sizes**0.1
    losses[-1] = losses[-2]
    _, trust = of_one(sizes, losses)
    assert trust.miss_at_largest > 0.1 > trust.best_of_smaller == 0
    assert "fitted without 256,000 it is off there by 1" in str(trust)
    _, trust = of_one(sizes[:4], losses[:4])
    assert trust.miss_at_largest is None and "fitted without" not in str(trust)


def test_a_joint_law_has_intervals_and_is_tried_at_the_largest_size():
    sizes, targets = (values.ravel() for values in np.meshgrid([1e4, 4e4, 1.6e5, 6.4e5], [1e5, 1e6, 1e7]))
    losses = 2 + 30 / sizes**0.3 + 40 / targets**0.25
    losses *= np.exp(0.003 * np.random.default_rng(2).normal(size=len(losses)))
    points = np.column_stack((sizes, targets, 6 * sizes, losses))
    law = fit_joint_law(points)
    trust = trust_in(law, points, fit=fit_joint_law, refit=lambda drawn: fit_joint_law(drawn, near=law))
    for name, true in (("size_exponent", 0.3), ("data_exponent", 0.25)):
        low, high = trust.intervals[name]
        assert low < getattr(law, name) < high < low + 0.1 and abs((low + high) / 2 - true) < high - low
    assert trust.miss_at_largest < 0.05 and trust.best_of_smaller > 0.1
