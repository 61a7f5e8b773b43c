"""All sessions can end at once, logins are proofs for a while, and devices are remembered."""

from __future__ import annotations

import datetime
import decimal
import uuid
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any

import pytest
from pydantic import BaseModel

from stillroom import (
    SessionDataRefused,
    SessionEnded,
    SessionEvent,
    SessionNotFresh,
    SessionUnreadable,
    Stillroom,
)
from stillroom.together import together
from tests.support.sessions import age, record_of, sessions_keys
from tests.support.stepper import Stepper

pytestmark = pytest.mark.usefixtures("bounded")


def inner(room: Any) -> Any:
    """Return the operations of the sessions with either face."""
    return getattr(room, "inner", room)._sessions_body


# Everybody's


def test_all_sessions_end_at_once(room: Any) -> None:
    """revoke_all ends users' and anonymous sessions in every shard, and later sessions live."""
    made = [room.sessions.create(user, {"a": 1}, tags=["t"]) for user in ("u1", "u2", None) * 20]
    assert room.sessions.destroy_all() == 60
    assert [room.sessions.get(one) for one in made] == [None] * 60
    assert room.sessions.list_for_user("u1") == []
    assert room.sessions.count() == 0
    assert not any(room.sessions.touch(one) for one in made[:3])
    for act in (lambda one: room.sessions.update(one, {"b": 1}), room.sessions.rotate):
        with pytest.raises(SessionEnded):
            act(made[0])
    after = [room.sessions.create(user, {"a": 2}, tags=["t"]) for user in ("u1", None)]
    assert [room.sessions.get(one).data for one in after] == [{"a": 2}] * 2
    assert room.sessions.count() == 2
    assert room.sessions.destroy_for_user("u1") == 1
    assert room.sessions.destroy_all() == 1
    assert room.sessions.destroy_all() == 0


def test_it_costs_one_script_a_shard_however_many_there_are(room: Any, client: Any) -> None:
    """revoke_all is one script a shard. A worker frees the memory in bites and leaves new sessions alone."""
    for n in range(400):
        room.sessions.create(f"u{n % 7}", {"a": "x" * 100}, tags=["t"])
    batch = next(inner(room).destroy_all())
    assert len(batch) == room.settings.session_shards + 1  # how many shards there are is agreed on
    room.sessions.destroy_all()
    living = [room.sessions.create(f"u{n}", tags=["t"]) for n in range(7)]
    report = room.sessions.sweep(limit=10)
    assert (report["deleted"], report["done"]) == (400, True)
    assert all(room.sessions.get(one) for one in living)
    room.sessions.destroy_for_user("u0")
    for one in living:
        room.sessions.destroy(one)
    left = [key for key in sessions_keys(client) if not key.endswith(b":all")]
    assert left == []


USES: dict[str, Callable[[Any, Any], Any]] = {
    "get": lambda sessions, one: sessions.get(one),
    "touch": lambda sessions, one: sessions.touch(one),
    "update": lambda sessions, one: sessions.update(one, {"a": 1}),
    "rotate": lambda sessions, one: sessions.rotate(one),
}


@pytest.mark.parametrize("use", USES)
def test_a_session_in_use_ends_with_its_user_and_tag_though_redis_has_evicted_their_lists(
    room: Any, client: Any, use: str
) -> None:
    """The lists of a user's and a tag's sessions, which a server with volatile-lru takes before the sessions, come
    back as these are used.
    """
    sessions = room.sessions
    ends: list[Callable[[], int]] = [
        lambda: sessions.destroy_for_user("u1"),
        lambda: sessions.destroy_by_tag("t"),
    ]
    for end in ends:
        made = [sessions.create("u1", tags=["t"]) for _ in range(20)]
        for one in made:
            age(client, room, one.handle, 120)
        lists = [key for key in sessions_keys(client) if key.endswith((b":u:u1", b":g:t"))]
        assert client.delete(*lists) == 2
        for one in made:
            assert USES[use](sessions, one)
        assert len(sessions.list_for_user("u1")) == 20
        assert end() == 20
        assert [sessions.get(one) for one in made] == [None] * 20


def test_a_session_may_not_slip_through(make_room: Callable[..., Stillroom]) -> None:
    """A session operation under way at any step of revoke_all ends up either ended or newer."""
    for name in ("create", "rotate", "update", "touch", "get"):
        for steps in range(4):
            one, two = make_room(session_shards=1), make_room(session_shards=1)
            before = one.sessions.create("u1", {"a": 1})
            body = one._sessions_body
            acts: dict[str, Callable[[], Any]] = {
                "create": lambda body=body, before=before: body.create("u1", replaces=before),
                "rotate": lambda body=body, before=before: body.rotate(before),
                "update": lambda body=body, before=before: body.update(before, {"b": 2}),
                "touch": lambda body=body, before=before: body.touch(before),
                "get": lambda body=body, before=before: body.get(before),
            }
            stepper = Stepper(one, acts[name]())
            for _ in range(steps):
                if not stepper.done:
                    stepper.step()
            is_done = stepper.done
            two.sessions.destroy_all()
            stepper.run()
            assert two.sessions.get(before) is None
            made = stepper.result if name in ("create", "rotate") else None
            if made is not None and is_done:
                assert two.sessions.get(made) is None
            two.sessions.destroy_all()


def test_memory_that_was_lost_brings_nobody_back(room: Any, client: Any) -> None:
    """When the list of sessions was lost, all of them stay ended."""
    made = room.sessions.create("u1")
    shard = int(made.handle[:2], 16)
    client.delete(room.keys.due_sessions(shard))
    assert room.sessions.destroy_all() == 0
    assert room.sessions.get(made) is None
    later = room.sessions.create("u1")
    assert room.sessions.get(later) is not None


def test_ending_all_twice_forgets_none(room: Any, client: Any) -> None:
    """After two revoke_all before any sweep, each older session is dead for as long as it could live."""
    long = room.sessions.create("u1", absolute=30 * 86_400, idle=30 * 86_400)
    room.sessions.destroy_all()
    room.sessions.create("u1", absolute=60, idle=60)
    room.sessions.destroy_all()
    shard = int(long.handle[:2], 16)
    assert client.ttl(room.keys.shard(shard) + b"all") > 29 * 86_400
    assert room.sessions.get(long) is None
    assert room.sessions.sweep()["deleted"] == 2


def test_a_user_s_revocation_counts_only_who_lived(room: Any) -> None:
    """Revoking a user counts only the sessions that lived, not those that revoke_all ended."""
    for _ in range(150):
        room.sessions.create("u1")
    room.sessions.destroy_all()
    for _ in range(3):
        room.sessions.create("u1")
    assert room.sessions.destroy_for_user("u1") == 3


# Proofs


def test_a_login_is_a_proof_for_a_while(room: Any, client: Any) -> None:
    """A login is a proof by the server's clock; `get(fresh=…)` refuses an older one and says its age."""
    made = room.sessions.create("u1", {"a": 1})
    assert made.authenticated_at == made.created
    assert made.is_fresh(0)
    age(client, room, made.handle, 599)
    assert room.sessions.get(made, fresh=600).data == {"a": 1}
    age(client, room, made.handle, 2)
    with pytest.raises(SessionNotFresh, match="601 s ago; this asks for the last 600 s") as caught:
        room.sessions.get(made, fresh=600)
    assert caught.value.within == 600
    assert caught.value.age == pytest.approx(601, abs=1)
    found = room.sessions.get(made)
    assert not found.is_fresh(600)
    assert found.is_fresh(602)
    assert room.sessions.get("00." + "A" * 43, fresh=600) is None


def test_a_proof_is_measured_to_the_second_between_two_touches(room: Any, client: Any) -> None:
    """The age of a proof is exact to the second, though a touch is written down once a minute."""
    made = room.sessions.create("u1")
    client.hincrby(record_of(room, made.handle), "_c", -50_000_000)
    client.hincrby(record_of(room, made.handle), "_l", -50_000_000)
    found = room.sessions.get(made)
    assert found.read_at - found.authenticated_at == pytest.approx(50, abs=1)
    assert found.last_seen == found.created
    with pytest.raises(SessionNotFresh):
        room.sessions.get(made, fresh=45)


def test_what_a_confirmed_session_holds_has_its_type(room: Any) -> None:
    """confirm gives the data as the type that is asked for, as rotate does, and otherwise as a dict."""
    cart = Cart(
        items=("tea",), at=datetime.datetime.now(datetime.UTC), price=decimal.Decimal("1.50")
    )
    confirmed = room.sessions.confirm(room.sessions.create("u1", cart), Cart)
    assert (confirmed.data, confirmed.is_fresh(10)) == (cart, True)
    assert room.sessions.confirm(confirmed).data["items"] == ["tea"]


def test_to_confirm_is_a_new_proof_under_a_new_token(room: Any, client: Any) -> None:
    """confirm makes a new proof under a new token and keeps all data.

    The old token works through the grace, if any.
    """
    made = room.sessions.create("u1", {"a": 1}, tags=["t"], meta={"m": 1})
    age(client, room, made.handle, 3_600)
    fresh = room.sessions.confirm(made, grace=0)
    assert fresh.token != made.token
    assert room.sessions.get(made) is None
    found = room.sessions.get(fresh, fresh=10)
    assert (found.user_id, found.data, found.tags, found.meta) == ("u1", {"a": 1}, ("t",), {"m": 1})
    assert found.authenticated_at - found.created == pytest.approx(3_600, abs=1)
    assert [device.authenticated_at for device in room.sessions.list_for_user("u1")] == [
        found.authenticated_at
    ]
    again = room.sessions.rotate(fresh)
    assert again.authenticated_at == found.authenticated_at
    with pytest.raises(SessionEnded):
        room.sessions.confirm("00." + "A" * 43)


def test_what_proves_nothing_is_not_fresh(room: Any) -> None:
    """An anonymous session, and one that a "remember me" cookie began, are no proof."""
    for made in (room.sessions.create(None), room.sessions.create("u1", fresh=False)):
        assert made.authenticated_at is None
        assert not made.is_fresh(10)
        with pytest.raises(
            SessionNotFresh, match="nobody has proved in this session who they are; this asks for"
        ) as caught:
            room.sessions.get(made, fresh=10)
        assert caught.value.age is None
    assert room.sessions.confirm(made).is_fresh(10)
    assert room.sessions.get(room.sessions.create("u1", fresh=False)).authenticated_at is None


def test_a_session_may_have_as_many_keys_with_a_proof_as_without(make_room: Any) -> None:
    """A session with a proof may hold as many keys as one without."""
    room = make_room(session_keys_limit=3)
    made = room.sessions.create("u1", {"a": 1, "b": 2}, fresh=False)
    room.sessions.update(made, {"c": 3})
    with pytest.raises(Exception, match="4 keys"):
        room.sessions.update(made, {"d": 4})
    assert room.sessions.get(made).data == {"a": 1, "b": 2, "c": 3}


# Devices


def test_a_new_device_is_told(room: Any, client: Any) -> None:
    """A new device is reported, except the first one and a known one. Its name is stored nowhere."""
    told: list[SessionEvent] = []
    room.sessions.on_event.append(told.append)
    made = [room.sessions.create("u1", device=name) for name in ("phone", "phone", "laptop")]
    room.sessions.create("u1")
    room.sessions.create("u2", device="laptop")
    room.sessions.create("u1", device="laptop")
    assert [(event.kind, event.handle, event.user_id) for event in told] == [
        ("new_device", made[2].handle, "u1")
    ]
    dumped = b"".join(client.dump(key) or b"" for key in client.keys("*"))
    assert b"laptop" not in dumped
    for one in room.sessions.list_for_user("u1"):
        room.sessions.end("u1", one.handle)
    room.sessions.create("u1", device="phone")
    assert len(told) == 1


def test_a_new_device_is_told_where_the_server_lost_scripts(room: Any, client: Any) -> None:
    """A login tells of a new device, and of who made room, also where the server has lost one of its scripts."""
    told: list[SessionEvent] = []
    first = room.sessions.create("u1", device="phone")
    visits = [room.sessions.create(None) for _ in range(20)]
    visit = next(one for one in visits if one.token[:2] != first.token[:2])
    client.script_flush()
    room.sessions.create("u2")
    room.sessions.on_event.append(told.append)
    made = room.sessions.create("u1", device="laptop", max_per_user=1, replaces=visit)
    assert {(event.kind, event.handle) for event in told} == {
        ("new_device", made.handle),
        ("evicted", first.handle),
    }
    assert room.sessions.get(visit) is None


def test_each_device_is_forgotten_by_itself(make_room: Any, client: Any) -> None:
    """A device whose last login was too long ago is new, although the user has logged in on another one since."""
    room, told = make_room(session_device_memory=1_000), []
    room.sessions.on_event.append(told.append)
    for name in ("phone", "laptop"):
        room.sessions.create("u1", device=name)
    (key,) = client.keys("*:d:u1")
    phone, laptop = client.zrange(key, 0, -1)
    for ago_s, count in ((999, 1), (1_001, 2)):
        client.zincrby(key, -ago_s * 1_000_000, phone)
        for name in ("laptop", "phone"):
            room.sessions.create("u1", device=name)
        assert [event.kind for event in told] == ["new_device"] * count
    for device in (phone, laptop):
        client.zincrby(key, -1_001_000_000, device)
    room.sessions.create("u1", device="tablet")
    assert len(told) == 2, "the only one that is known is no news"
    assert client.zcard(key) == 1


def test_a_listener_that_nobody_would_await_is_told(
    room: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A coroutine function among the listeners is an error in the log with each event; the others hear of it."""
    told: list[SessionEvent] = []

    async def tell(event: SessionEvent) -> None:
        raise AssertionError(event)

    room.sessions.on_event.append(tell)
    room.sessions.on_event.append(told.append)
    for device in ("phone", "laptop"):
        room.sessions.create("u1", device=device)
    assert len(told) == 1
    assert "on_event=tell: a plain function; this one has to be awaited" in caplog.text


def test_a_new_device_is_told_once_where_others_are_ahead_of_the_clock(
    room: Any, client: Any
) -> None:
    """A device that is new after the server's clock was set back an hour is known with its next login."""
    told: list[SessionEvent] = []
    for n in range(50):
        room.sessions.create("u1", device=f"d{n}")
    (key,) = client.keys("*:d:u1")
    for device in client.zrange(key, 0, -1):
        client.zincrby(key, 3_600_000_000, device)
    room.sessions.on_event.append(told.append)
    for _ in range(3):
        room.sessions.create("u1", device="phone")
    assert [event.kind for event in told] == ["new_device"]
    assert client.zcard(key) == 50


def test_devices_are_bounded_and_forgotten(make_room: Any, client: Any) -> None:
    """A user has fifty devices at most, which expire `session_device_memory` after the last login."""
    room = make_room(session_device_memory=1_000)
    for n in range(60):
        room.sessions.create("u1", device=f"d{n}")
    (key,) = client.keys("*:d:u1")
    assert client.zcard(key) == 50
    assert 990 < client.ttl(key) <= 1_000
    client.delete(key)
    told: list[SessionEvent] = []
    room.sessions.on_event.append(told.append)
    room.sessions.create("u1", device="d59")
    assert told == []


# Values


class Cart(BaseModel):
    """A cart as an app may define it."""

    items: tuple[str, ...]
    at: datetime.datetime
    price: decimal.Decimal


def test_values_keep_their_type(room: Any) -> None:
    """create, get, update and mutate keep the types of values, and return a model where one is asked for."""
    at = datetime.datetime(2026, 1, 2, 3, 4, 5, 6, datetime.UTC)
    data = {"items": ("tea", "jam"), "at": at, "price": decimal.Decimal("1.10")}
    made = room.sessions.create("u1", data)
    assert made.data == data
    assert room.sessions.get(made).data == data
    assert room.sessions.get(made, Cart).data == Cart(**data)
    room.sessions.update(made, {"id": uuid.UUID(int=7), "raw": b"\xff", "deep": [{"s": {1, 2}}]})

    def change(data: dict[str, Any]) -> None:
        data["items"] += ("rye",)

    found = room.sessions.mutate(made, change)
    assert found.data["items"] == ("tea", "jam", "rye")
    assert (found.data["raw"], found.data["deep"]) == (b"\xff", [{"s": {1, 2}}])


def test_meta_keeps_its_types_too(room: Any) -> None:
    """What lists of devices show keeps its types as the data does. A login with an address or a model goes on."""
    at = datetime.datetime(2026, 1, 2, 3, 4, 5, 6, datetime.UTC)
    meta = {"at": at, "where": ("de", 7), "id": uuid.UUID(int=7), "raw": b"\xff", "!": "tuple"}
    made = room.sessions.create("u1", meta=meta)
    assert room.sessions.get(made).meta == meta
    assert [device.meta for device in room.sessions.list_for_user("u1")] == [meta]
    assert room.sessions.get(room.sessions.rotate(made)).meta == meta
    plain = {
        "from": ip_address("2001:db8::7"),
        "cart": Cart(items=(), at=at, price=decimal.Decimal(1)),
    }
    made = room.sessions.create("u1", plain, meta=plain)
    found = room.sessions.get(made)
    assert found.meta == found.data
    assert found.meta["from"] == "2001:db8::7"
    with pytest.raises(SessionDataRefused, match="meta: "):
        room.sessions.create("u1", meta={"cart": object()})


def test_a_mark_that_is_broken_is_told(room: Any, client: Any) -> None:
    """A value that was broken by hand raises SessionUnreadable, which names no contents."""
    made = room.sessions.create("u1", {"a": 1})
    for bad in ('{"!":"UUID","v":"secret"}', '{"!":"Decimal","v":"x"}', '{"!":"date","v":7}'):
        client.hset(record_of(room, made.handle), "a", bad)
        with pytest.raises(SessionUnreadable) as caught:
            room.sessions.get(made)
        assert "secret" not in str(caught.value)


def test_a_request_with_its_limits_is_one_batch(make_room: Any) -> None:
    """Reading a session together with limits takes one batch."""
    room = make_room()
    made = room.sessions.create("u1")
    operation = together(room._sessions_body.get(made.token))
    assert len(next(operation)) == 3  # plain commands
    operation.close()
