"""Processes that must agree on a setting find out when they do not."""

from __future__ import annotations

from typing import Any

import pytest

from stillroom import Stillroom
from stillroom.agreed import FIELDS_LIMIT, Agreed, Rule
from stillroom.errors import RedisUnavailable, SettingsDiffer


def another(room: Any) -> Agreed:
    """Make the settings comparison of another process in the same namespace."""
    return Agreed(room.keys, room.wire.server)


def test_the_first_value_is_the_agreed_one(room: Any) -> None:
    """The second process is told the agreed value and which process set it."""
    one, two = another(room), another(room)
    one.require("fruits", 1)
    two.require("fruits", 4)
    assert one.is_due
    room.state.run(one.compare())
    room.state.run(two.compare())
    assert not one.is_due
    one.check("fruits")
    with pytest.raises(SettingsDiffer) as raised:
        two.check("fruits")
    error = raised.value
    assert (error.setting, error.mine, error.agreed) == ("fruits", "4", "1")
    assert "STILLROOM_FRUITS is 4 in this process and 1 in the others" in str(error)
    assert "(process " in error.who
    assert isinstance(error, RedisUnavailable)
    assert error.reason == "settings"


def test_what_another_process_wrote_is_told_on_one_line(room: Any, client: Any) -> None:
    """The agreed value and its process are shown as text, because whoever may write there chose them."""
    one = another(room)
    one.require("fruits", 1)
    evil = "\x1b[2J\r\nFORGED\u202e".encode()
    client.hset(room.keys.agreed, "fruits", b"\t".join([b"4" + evil, b"1", evil]))
    room.state.run(one.compare())
    with pytest.raises(SettingsDiffer) as raised:
        one.check("fruits")
    assert str(raised.value).isprintable()
    assert raised.value.agreed == "4\\x1b[2J\\r\\nFORGED\\u202e"


def test_nothing_is_checked_before_it_could_be_compared(room: Any) -> None:
    """A process that cannot reach the state's server goes on without a comparison."""
    one = another(room)
    one.require("fruits", 1)
    one.check("fruits")
    assert one.of("fruits") is None


def test_the_largest_number_is_agreed(room: Any) -> None:
    """The largest number is agreed: it only grows, and every process is told the largest one."""
    agreed = []
    for value in (5, 30, 7, 9.5):
        one = another(room)
        one.require("lease_limit", value, Rule.LARGEST)
        agreed.append(room.state.run(one.compare())["lease_limit"].agreed)
    assert agreed == ["5", "30", "30", "30"]


def test_a_change_is_another_agreement(room: Any) -> None:
    """A changed value is a new agreement with a new id, and the other processes differ from then on."""
    one, two = another(room), another(room)
    one.require("fruits", 1)
    two.require("fruits", 4)
    before = room.state.run(one.compare())["fruits"]
    after = room.state.run(two.change("fruits"))["fruits"]
    assert (after.agreed, after.id > before.id) == ("4", True)
    two.check("fruits")
    room.state.run(one.compare())
    with pytest.raises(SettingsDiffer):
        one.check("fruits")
    assert room.state.run(two.change("fruits"))["fruits"].id == after.id  # nothing has changed
    assert room.state.run(one.change("fruits"))["fruits"].id > after.id  # and back is not as before


def test_several_settings_are_one_script(room: Any, client: Any) -> None:
    """Several settings are compared by one script in one round trip, each by its own rule."""
    one = another(room)
    one.require("a", "x y")
    one.require("b", 2, Rule.LARGEST)
    room.state.run(one.compare())
    told = room.state.run(one.compare())
    assert {name: known.agreed for name, known in told.items()} == {"a": "x y", "b": "2"}
    assert client.hlen(room.keys.agreed) == 2


def test_the_number_of_settings_is_bounded(make_room: Any, client: Any) -> None:
    """Past the limit a new setting is not kept, and its process goes on with its own value."""
    room: Stillroom = make_room()
    client.hset(room.keys.agreed, mapping={f"s{n}": "x" for n in range(FIELDS_LIMIT)})
    one = another(room)
    one.require("fruits", 1)
    room.state.run(one.compare())
    one.check("fruits")
    assert client.hlen(room.keys.agreed) == FIELDS_LIMIT


def test_it_is_due_again_on_another_run_of_the_server(make_room: Any) -> None:
    """A comparison is due again when the server was restarted, because it may have lost the agreements."""
    room: Stillroom = make_room()
    one = another(room)
    one.require("fruits", 1)
    room.state.run(one.compare())
    assert not one.is_due
    room.wire.server.run = b"another"
    assert one.is_due
