"""Shares of grades: largest remainder, shuffled by the seed."""

import pytest

from tilestream.synthesis import BALANCED_SHARES, EYEPACS_SHARES, grades


def counts(drawn: list[int]) -> list[int]:
    return [drawn.count(grade) for grade in range(5)]


def test_shares_of_eyepacs_come_back_exactly() -> None:
    assert counts(grades(35126, seed=0)) == [25810, 2443, 5292, 873, 708]
    assert sum(EYEPACS_SHARES) == pytest.approx(1)


def test_largest_remainder() -> None:
    assert counts(grades(10, 0, BALANCED_SHARES)) == [2, 2, 2, 2, 2]
    assert counts(grades(4, 0, (0.5, 0.3, 0.2, 0, 0))) == [2, 1, 1, 0, 0]
    assert [len(grades(n, 5)) for n in (0, 1, 7)] == [0, 1, 7]


def test_seed_shuffles() -> None:
    assert grades(50, 1) == grades(50, 1)
    assert grades(50, 1) != grades(50, 2)
    assert sorted(grades(50, 1)) == sorted(grades(50, 2))
    assert grades(50, 1) != sorted(grades(50, 1))


@pytest.mark.parametrize("shares", [(1.0,), (0.5, 0.6, 0, 0, 0), (1.5, -0.5, 0, 0, 0)])
def test_bad_shares_are_named(shares: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="must be five numbers"):
        grades(5, 0, shares)


def test_negative_count_is_named() -> None:
    with pytest.raises(ValueError, match="n=-1 is negative"):
        grades(-1, 0)
