"""One world for all models: its servers are emptied before each run."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from stillroom.wire.breaker import Breaker
from tests.explorer.explorer import worlds
from tests.explorer.world import World


@pytest.fixture(scope="session")
def shared_world() -> Iterator[World]:
    with worlds() as world:
        yield world


@pytest.fixture
def world(shared_world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A world; what the services log of its accidents is not shown.

    Nobody reminds a process of what waits for Redis: that is a thread, which knows nothing of this world's time.
    """
    monkeypatch.setattr(Breaker, "remind", lambda _: None)
    logging.disable(logging.CRITICAL)
    yield shared_world
    logging.disable(logging.NOTSET)
