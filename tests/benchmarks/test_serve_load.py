"""The benchmark of serving under load: how it tells memory that grows from memory that is flat."""

import pytest
from serve_load import Watch


def test_memory_that_rises_to_a_level_is_flat_in_the_second_half() -> None:
    watch = Watch(0, samples=[(float(second), min(300.0 + second, 350.0)) for second in range(200)])
    found = watch.figures()
    assert found["second_half_mib_per_minute"] == 0
    assert found["resident_mib_low_median_high"] == [[300, 324.5, 349], *[[350, 350, 350]] * 3]


@pytest.mark.parametrize("per_second", [0.1, -0.1])
def test_memory_that_grows_has_its_slope(per_second: float) -> None:
    watch = Watch(
        0, samples=[(2.0 * second, 300 + 2 * per_second * second + 5 * (second % 2)) for second in range(200)]
    )
    found = watch.figures()
    assert found["second_half_mib_per_minute"] == pytest.approx(60 * per_second, abs=0.1)
    assert len(found["resident_mib_by_second"]) == 200
