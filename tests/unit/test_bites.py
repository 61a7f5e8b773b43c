"""Large batches go in bites, each with its own time, whether they are many commands or few and large ones."""

from __future__ import annotations

import pytest

from stillroom import RedisUnavailable
from stillroom.cache.bites import BYTES_AT_ONCE, SCRIPTS_AT_ONCE, Bites
from stillroom.operation import Pause

TIMEOUT = RedisUnavailable("timeout")


@pytest.mark.parametrize(
    ("count", "size", "first"),
    [(SCRIPTS_AT_ONCE + 1, 10, SCRIPTS_AT_ONCE), (4, BYTES_AT_ONCE - 100, 1)],
    ids=["many", "large"],
)
def test_each_bite_has_its_own_time_and_is_tried_again(count: int, size: int, first: int) -> None:
    """Between two bites others get their turn, which begins a new deadline, and one that timed out goes again."""
    bites = Bites([(b"SET", b"x" * size)] * count, SCRIPTS_AT_ONCE)
    list(bites.turn())
    assert len(bites.next()) == first
    assert bites.again(TIMEOUT)
    bites.next()
    bites.done()
    taken = 0
    while bites.left:
        (pause,) = bites.turn()
        assert isinstance(pause, Pause)
        taken += len(bites.next())
        bites.done()
    assert 0 < taken < count


def test_what_fits_into_one_bite_has_the_time_of_one_call() -> None:
    """A few small commands are one call: nobody is let go first, and nothing is tried again."""
    bites = Bites([(b"SET", b"x")] * 5, SCRIPTS_AT_ONCE)
    assert list(bites.turn()) == []
    assert len(bites.next()) == 5
    assert not bites.again(TIMEOUT)
    bites.done()
    assert not bites.left
