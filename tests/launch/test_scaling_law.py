import numpy as np
import pytest

from launch.scaling_law import fit_law


def test_the_law_of_a_report_is_found_in_points_that_follow_it():
    # OneRec-V2 Technical Report: 3.13 + 3660 / N^0.489.
    sizes = np.array([0.1, 0.2, 0.5, 1, 2, 4, 8]) * 1e9
    law = fit_law(sizes, 3.13 + 3660 / sizes**0.489)
    assert (law.floor, law.exponent) == (pytest.approx(3.13, abs=1e-3), pytest.approx(0.489, abs=1e-3))
    assert law.scale == pytest.approx(3660, rel=0.02)
    assert law.loss(sizes) == pytest.approx(3.13 + 3660 / sizes**0.489, rel=1e-4)
    assert str(law).startswith("L(N) = 3.130 + ") and str(law).endswith("/ N^0.489")


def test_losses_that_do_not_bend_have_no_floor():
    sizes = np.array([1e3, 1e4, 1e5, 1e6])
    law = fit_law(sizes, 10 / sizes**0.05)
    assert law.floor == pytest.approx(0, abs=0.05) and law.exponent == pytest.approx(0.05, abs=2e-3)
