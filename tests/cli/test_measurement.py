import time

import pytest

from sparse_rtrl.cli.measurement import median_seconds, peak_growth


def test_peak_growth_sees_a_peak_that_is_freed_again():
    megabyte = 2**20

    def work():
        block = bytearray(64 * megabyte)  # zero-filled by touching every page
        block[::4096] = b"x" * len(block[::4096])
        del block

    small, large = peak_growth(lambda: None), peak_growth(work)
    assert small < 4 * megabyte
    assert 60 * megabyte < large < 80 * megabyte
    # The mark is reset: the peak of before does not count again.
    assert peak_growth(lambda: None) < 4 * megabyte


def test_median_seconds_ignores_warm_up_and_outliers():
    pauses = iter([0.2, 0.01, 0.2, 0.01])
    assert median_seconds(lambda: time.sleep(next(pauses)), repeats=3, warm_ups=1) < 0.1
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        median_seconds(lambda: None, repeats=0)
