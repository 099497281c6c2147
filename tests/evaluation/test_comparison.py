import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raycomplete.evaluation.comparison import paired_bootstrap

SHARES = st.dictionaries(st.text(max_size=4), st.floats(0, 1), min_size=1, max_size=30)


@settings(deadline=None)
@given(first=SHARES, second=SHARES)
def test_difference_lies_in_its_interval_and_turns_around(first: dict[str, float], second: dict[str, float]) -> None:
    common = first.keys() & second.keys()
    if not common:
        with pytest.raises(ValueError, match="both models"):
            paired_bootstrap(first, second)
        return
    there, back = (paired_bootstrap(*pair, resamples=200) for pair in ((first, second), (second, first)))
    assert there.n == len(common)
    assert there.difference == pytest.approx(-back.difference)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low), abs=1e-9)


def test_pairing_leaves_out_what_is_hard_for_both() -> None:
    """Behaviours differ a lot, the models by 0.1 on each: the interval has no width, an unpaired one would."""
    first = {f"b{n}": 0.1 + 0.9 * (n % 2) for n in range(50)}
    second = {name: share - 0.1 for name, share in first.items()}
    found = paired_bootstrap(first, second)
    assert (found.difference, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))


def test_interval_covers_the_truth() -> None:
    """Simulated models: 0.6 and 0.4 on behaviours of shared difficulty; near 95 % of the intervals hold 0.2."""
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        hard = generator.random(80)
        first = {str(n): float(value < 0.6) for n, value in enumerate(hard)}
        second = {str(n): float(value < 0.4) for n, value in enumerate(hard)}
        found = paired_bootstrap(first, second, resamples=400)
        covered += found.low <= 0.2 <= found.high
    assert 0.9 <= covered / 300 <= 0.99


def test_the_same_input_gives_the_same_interval() -> None:
    first, second = {"a": 1.0, "b": 0.0, "c": 1.0}, {"a": 0.0, "b": 0.0, "c": 1.0, "d": 1.0}
    found = paired_bootstrap(first, second)
    assert found == paired_bootstrap(first, second)
    assert (found.n, found.resamples) == (3, 10_000)
    assert found.to_json()["low"] == 0.0
