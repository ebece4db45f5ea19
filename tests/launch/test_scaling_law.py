import numpy as np
import pytest

from launch.joint_law import fit_joint_law, num_amounts
from launch.scaling_law import fit_law


def test_the_law_of_a_report_is_found_in_points_that_follow_it():
    # OneRec-V2 Technical Report: 3.13 + 3660 / N^0.489.
    sizes = np.array([0.1, 0.2, 0.5, 1, 2, 4, 8]) * 1e9
    law = fit_law(sizes, 3.13 + 3660 / sizes**0.489)
    assert (law.floor, law.exponent) == (pytest.approx(3.13, abs=1e-3), pytest.approx(0.489, abs=1e-3))
    assert law.scale == pytest.approx(3660, rel=0.02)
    assert law.loss(sizes) == pytest.approx(3.13 + 3660 / sizes**0.489, rel=1e-4)
    assert law.largest_miss < 1e-4
    assert str(law).startswith("L(N) = 3.130 + ") and str(law).endswith("/ N^0.489")


def test_losses_that_do_not_bend_have_no_floor():
    sizes = np.array([1e3, 1e4, 1e5, 1e6])
    law = fit_law(sizes, 10 / sizes**0.05)
    assert law.floor == pytest.approx(0, abs=0.05) and law.exponent == pytest.approx(0.05, abs=2e-3)


def test_the_joint_law_of_a_paper_is_found_in_points_that_follow_it():
    # Hoffmann et al. (2022): 1.69 + 406.4 / N^0.34 + 410.7 / D^0.28, at 6 N operations per target.
    sizes, targets = (values.ravel() for values in np.meshgrid([1e7, 4e7, 1.6e8, 6.4e8], [2e8, 8e8, 3.2e9]))
    losses = 1.69 + 406.4 / sizes**0.34 + 410.7 / targets**0.28
    law = fit_joint_law(sizes, targets, losses, 6 * sizes)
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
    assert fit_joint_law(sizes, targets, losses, sizes) is not None
    assert fit_joint_law(sizes[:5], targets[:5], losses[:5], sizes[:5]) is None
    assert fit_joint_law(sizes[:6], targets[:6], losses[:6], sizes[:6]) is None, "two sizes"
    assert fit_joint_law(sizes, np.tile([1.0, 1.04, 1.08], 3), losses, sizes) is None, "one amount"
    assert fit_joint_law(sizes, targets, losses * 0, sizes) is None
    assert num_amounts([200, 100, 104]) == 2


def test_a_law_tells_how_far_it_is_off():
    sizes, targets = (values.ravel() for values in np.meshgrid([1.0, 2.0, 4.0, 8.0], [1.0, 10.0, 100.0]))
    losses = 2 + 1 / sizes + 1 / targets
    losses[5] *= 1.5
    assert fit_joint_law(sizes, targets, losses, sizes).largest_miss == pytest.approx(1 / 3, rel=0.05)
    line = fit_law([1, 2, 4, 8], [3, 2.5, 2.25, 2.5])
    assert line.largest_miss == pytest.approx(
        max(abs(line.loss(8.0) / 2.5 - 1), abs(line.loss(4.0) / 2.25 - 1))
    )
