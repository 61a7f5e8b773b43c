"""Abuse: events in, patterns and bans out, on real servers, with both faces."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.abuse import CLIENT, assert_bounded, lines, patterns


@pytest.fixture(autouse=True)
def bounded(client: Any) -> Any:
    """After every test here each key that is left has an end."""
    yield
    assert_bounded(client)


def test_a_scanner_is_seen(room: Any, client: Any, caplog: Any) -> None:
    """Many pages that do not exist are one pattern: a line in the log, an entry of the stream."""
    for n in range(25):
        assert room.abuse.report("not_found", ip=CLIENT, route=f"/wp-{n}.php") is True
    report = room.abuse.scan()
    assert report == {
        "events": 25,
        "patterns": 1,
        "bans": 0,
        "aside": 0,
        "late": 0,
        "done": True,
    }
    (line,) = lines(caplog)
    (entry,) = patterns(client, room)
    assert (line["rule"], line["subject"]) == ("scanner", CLIENT)
    assert (entry["rule"], entry["subject"]) == ("scanner", CLIENT)
    assert (line["shadow"], line["action"], line["count"], line["threshold"]) == (
        True,
        "ban",
        25,
        20,
    )
