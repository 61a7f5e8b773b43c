"""Open an app's database beside the room."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.catalogue import Catalogue


@pytest.fixture(params=["sync", "async"])
def catalogue(request: pytest.FixtureRequest, tmp_path: Path, room: Any) -> Iterator[Catalogue]:
    """Open the catalogue with sessions of each kind; they share the event loop of an async room."""
    loop = getattr(room, "_loop", None)
    own = None if loop else asyncio.new_event_loop()
    catalogue = Catalogue(tmp_path, request.param, loop or own)
    yield catalogue
    catalogue.close()
    if own:
        own.close()
