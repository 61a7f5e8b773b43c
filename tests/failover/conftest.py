"""A primary, two replicas and three Sentinels, formed once for a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.conftest import SERVERS, binary_of
from tests.support.faces import FACES, opening_rooms
from tests.support.healing import heal_once
from tests.support.sentinels import Sentinels

# Deadlines for a busy machine, and yet shorter than what a Sentinel waits before it gives a primary up.
UNHURRIED: dict[str, Any] = {
    "session_peppers": "a-pepper-for-tests-long-enough-to-be-one",
    "connect_timeout": 0.3,
    "command_timeout": 0.3,
    "call_timeout": 0.5,
}


@pytest.fixture(scope="module", params=SERVERS)
def formed(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Sentinels]:
    folder = tmp_path_factory.mktemp("sentinels")
    with Sentinels(folder, binary=binary_of(request), proxied=True) as formed:
        yield formed


@pytest.fixture
def sentinels(formed: Sentinels) -> Sentinels:
    """All of them well: what a test before this one broke has healed."""
    heal_once(formed, formed.await_replicas)
    formed.client(formed.primary).flushall()
    return formed


@pytest.fixture(params=FACES)
def face(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make(face: str) -> Iterator[Callable[..., Any]]:
    """Makes rooms with this face, closed at the end. Each stands for a process."""
    with opening_rooms(**UNHURRIED) as make:
        yield lambda url, **changes: make(face, redis_url=url, **changes)
