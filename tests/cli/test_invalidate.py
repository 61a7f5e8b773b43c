"""`stillroom invalidate` works as an operator runs it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from stillroom import NoDispatch, Settings, Stillroom
from stillroom.embedded import EmbeddedServer
from tests.support import nursery
from tests.support.crowd import PATIENT
from tests.support.processes import STILLROOM, run_to_end


@pytest.fixture
def room(own_server: EmbeddedServer) -> Iterator[Stillroom]:
    settings = Settings(**{"redis_url": own_server.url} | PATIENT)
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        room.cache.set_many({f"k:{n}": n for n in range(500)}, tags=["t"])
        room.cache.set("other", 1, tags=["u"])
        yield room


def run(room: Stillroom, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"REDIS_URL": room.settings.redis_url}
    return nursery.run_text([STILLROOM, "invalidate", *arguments], environment)


def test_a_tag_is_invalidated_and_with_wait_its_memory_is_freed(room: Stillroom) -> None:
    """A tag is invalidated, and with --wait and no worker the command frees the memory itself and says so."""
    done = run(room, "--tag", "t", "--wait")
    assert done.returncode == 0, done.stderr
    assert "no reader sees the old values" in done.stdout
    assert "no worker takes it: reclaiming here" in done.stdout
    assert "reclaimed" in done.stdout
    ((_, keys),) = room.wire.execute(
        [(b"SCAN", b"0", b"COUNT", b"5000", b"MATCH", room.keys.entry_prefix + b"*")], 5.0
    )
    assert keys == [room.keys.entry(b"other")]


def test_a_pause_of_refreshes_is_not_waited_for(room: Stillroom) -> None:
    """With --soft and --wait the command ends in a pause, which may last for a day, and says what happens next."""
    room.upkeep.pause("refresh", 600)
    done = run(room, "--tag", "t", "--soft", "--wait")
    assert done.returncode == 0, done.stderr
    assert "refreshes are paused: workers load these values after that" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        (["k:1", "k:2", "nobody"], 499),
        (["--pattern", "k:1*"], 390),
        (["--tag", "t", "--tag", "u"], 0),
        (["--all"], 0),
        (["--tag", "t", "--soft"], 501),
    ],
)
def test_keys_patterns_tags_and_all_of_it(room: Stillroom, arguments: list[str], left: int) -> None:
    """Keys, patterns, tags and everything are invalid for every reader when the command ends."""
    done = run(room, *arguments)
    assert done.returncode == 0, done.stderr
    names = [*(f"k:{n}" for n in range(500)), "other"]
    assert len(room.cache.get_many(names)) == left
    if "nobody" in arguments:
        assert "2 of 3 keys held a value" in done.stdout


@pytest.mark.parametrize("arguments", [[], ["--soft", "k"], ["--tag", ""], ["x" * 2000]])
def test_a_mistake_is_a_sentence(room: Stillroom, arguments: list[str]) -> None:
    """A mistake exits with 2 and a sentence, and invalidates nothing."""
    done = run(room, *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert room.cache.get("k:1") == 1


def test_redis_away_is_a_sentence(room: Stillroom, monkeypatch: pytest.MonkeyPatch) -> None:
    """When Redis is away the command names the setting for how long it tries."""
    monkeypatch.setenv("STILLROOM_CONNECT_ATTEMPTS", "1")
    done = run_to_end(
        [STILLROOM, "invalidate", "k"], env=os.environ | {"REDIS_URL": "redis://127.0.0.1:1"}
    )
    assert done.returncode == 2
    assert "Redis is unavailable (refused)" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_has_to_be_loaded_is_left_to_workers(room: Stillroom) -> None:
    """With --soft, --wait and no worker the work stays written down, and nobody's order to load fails meanwhile."""
    room.upkeep.order_load("product", {"id": 7})
    done = run(room, "--tag", "t", "--soft", "--pattern", "k:1*", "--wait", "--json")
    assert done.returncode == 0, done.stderr
    assert "no worker takes it: the next one that starts loads the values" in done.stderr
    assert "UnknownLoader" not in done.stderr
    assert '"freed": false' in done.stdout
    assert room.upkeep.pending(b"s:t") == {b"s:t": None}
    orders, tries = room.wire.execute(
        [(b"ZCARD", room.keys.orders), (b"HLEN", room.keys.order_tries)], 5.0
    )
    assert (orders, tries) == (1, 0)
    keys = room.wire.execute([(b"EXISTS", room.keys.entry(b"k:1"))], 5.0)
    assert keys == [0], "memory is freed here all the same"
