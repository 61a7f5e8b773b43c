"""No accident lets a read of a session without a script show a session that had ended."""

from __future__ import annotations

from typing import Any

import pytest

from stillroom.sessions import many, reading
from stillroom.sessions.reading import read_plain
from tests.explorer.explorer import Broken, explore, maker
from tests.explorer.mutants import replaced
from tests.explorer.sessions import SessionsModel
from tests.explorer.world import World

RUNS = {True: 750, False: 60}
FINDS_WITHIN = 1_000


@pytest.fixture(autouse=True)
def revocations_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each user with several sessions leave a revocation, whose records a worker deletes."""
    monkeypatch.setattr(many, "BITE", 1)


def _finds_no_revocation(names: Any, replies: list[Any], touch_us: int) -> Any:
    return read_plain(names, [0, *replies[1:]], touch_us)


@pytest.mark.long
def test_no_accident_shows_a_session_that_had_ended(world: World, is_full: bool) -> None:
    """No session that had ended is shown, with revocations, deleting workers, rotations and two peppers."""
    runs = RUNS[is_full]
    assert explore(world, range(runs), maker(SessionsModel)) == runs


@pytest.mark.long
def test_a_read_that_looks_for_no_revocations_is_found(world: World) -> None:
    """A variant that reads without looking for revocations is found: it shows a revoked session."""
    with (
        replaced(reading, "read_plain", _finds_no_revocation),
        pytest.raises(Broken, match="in spite of"),
    ):
        explore(world, range(FINDS_WITHIN), maker(SessionsModel))
