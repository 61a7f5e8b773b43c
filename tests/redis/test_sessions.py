"""Sessions do what each operation promises, on real servers and with both faces."""

from __future__ import annotations

import copy
import logging
import pickle
from dataclasses import InitVar, dataclass
from datetime import timedelta
from itertools import takewhile
from typing import Any

import pytest
from pydantic import (
    BaseModel,
    Field,
    SecretBytes,
    SecretStr,
    field_validator,
    model_validator,
)
from typing_extensions import TypedDict

from stillroom import (
    InvalidArgument,
    InvalidKey,
    RedisRefused,
    SessionConflict,
    SessionDataRefused,
    SessionEnded,
    SessionNotFresh,
    SessionStoreUnavailable,
    SessionUnreadable,
    SettingsError,
    TooManySessions,
    ValueTooLarge,
)
from stillroom.scripts import session_hold
from stillroom.sessions import many
from stillroom.wire.server import ReplyError
from tests.support.monitor import sent
from tests.support.sessions import (
    age,
    end_grace,
    name_of,
    record_of,
    sessions_keys,
)

pytestmark = pytest.mark.usefixtures("bounded")
DAY = 86_400.0


class Cart(BaseModel):
    items: list[int] = []
    note: str = ""


@dataclass
class Plain:
    n: int


class Linked(BaseModel):
    """Data with the token of another service."""

    service: str = "a bank"
    token: SecretStr = SecretStr("of the bank")


class Renamed(BaseModel):
    """Is written under one name and read under another one."""

    total: int = Field(1, serialization_alias="sum")
    size: int = Field(validation_alias="length")


class Doubled(BaseModel):
    """Becomes another one each time it is read."""

    total: int

    @field_validator("total")
    @classmethod
    def double(cls, total: int) -> int:
        return 2 * total


class Hidden(BaseModel):
    shown: int = 1
    hidden: int = Field(0, exclude=True)


class Holding(BaseModel):
    cart: Cart


class GiftCart(Cart):
    wrapped: bool = True


@dataclass
class Seeded:
    seed: InitVar[int] = 1
    total: int = 0

    def __post_init__(self, seed: int) -> None:
        self.total = 2 * seed


class Signed(TypedDict):
    key: bytes
    name: str


# One session


def test_a_session_is_created_and_read(room: Any) -> None:
    """A created session is read with everything that was given and the server's times."""
    made = room.sessions.create(
        "u1",
        {"cart": [1], "big": 2**60, "none": None, "empty": {}},
        tags=["mobile"],
        meta={"ip": "::1"},
    )
    read = room.sessions.get(made.token)
    assert read == made
    assert read.data == {"cart": [1], "big": 2**60, "none": None, "empty": {}}
    assert (read.user_id, read.tags, read.meta, read.version) == (
        "u1",
        ("mobile",),
        {"ip": "::1"},
        1,
    )
    assert read.created == read.last_seen
    assert read.expires_at - read.created == pytest.approx(DAY)
    assert room.sessions.get(made) == room.sessions.get(made.id) == read


def test_nobody_has_a_session_before_the_login(room: Any) -> None:
    """An anonymous session belongs to no user and is in no user's list."""
    made = room.sessions.create(None, {"a": 1})
    assert made.user_id is None
    assert room.sessions.get(made).data == {"a": 1}
    assert room.sessions.count() == 1


def test_every_operation_is_one_round_trip(room: Any, client: Any) -> None:
    """Every operation is one round trip. Those on a user or a tag send one script for each shard, in one batch."""
    made = room.sessions.create("u1", {"a": 1}, tags=["t"])
    room.sessions.rotate(room.sessions.create("u1"))
    room.sessions.update(made, {"a": 2})
    room.sessions.touch(room.sessions.get(made))
    other = room.sessions.create("u1")
    room.sessions.destroy(room.sessions.create("u1"))
    room.state_stats.due = 1 << 62
    for act in (
        lambda: room.sessions.create("u1"),
        lambda: room.sessions.update(made, {"a": 2}),
        lambda: room.sessions.touch(made),
        lambda: room.sessions.rotate(made, grace=0),
        # Not the name that was just rotated: on a slow machine its end is asked for once more (see End.after).
        lambda: room.sessions.destroy(other),
    ):
        assert sent(client, act) == ["EVALSHA"]
    kept = room.sessions.create("u1")
    assert sent(client, lambda: room.sessions.get(kept)) == ["EXISTS", "TIME", "HGETALL"]


def test_what_is_no_token_costs_no_round_trip(room: Any, client: Any) -> None:
    """A malformed token is refused without a round trip."""
    wrong = [
        "",
        "x",
        "07." + "a" * 42,
        "07." + "a" * 43 + "\n",
        "07." + "\0" * 43,
    ]

    def act() -> None:
        for token in wrong:
            assert room.sessions.get(token) is None
            assert room.sessions.touch(token) is False
            assert room.sessions.destroy(token) is False
            with pytest.raises(SessionEnded):
                room.sessions.update(token, {"a": 1})
            with pytest.raises(SessionEnded):
                room.sessions.rotate(token)

    assert sent(client, act) == []


def test_what_can_be_no_session_is_refused(room: Any, client: Any) -> None:
    """A device of a list or a cookie's bytes are refused: a logout by them would end nothing."""
    made = room.sessions.create("u1")
    (device,) = room.sessions.list_for_user("u1")
    sessions = room.sessions

    def act() -> None:
        for wrong in (device, made.token.encode(), 7, {"id": made.id}):
            for use in (sessions.get, sessions.touch, sessions.destroy, sessions.rotate):
                with pytest.raises(InvalidArgument, match=r"its `id`, or the text of its cookie"):
                    use(wrong)
            with pytest.raises(InvalidArgument, match="text of its cookie"):
                sessions.create("u1", replaces=wrong)
            with pytest.raises(InvalidArgument, match="the `handle` that a list shows is text"):
                sessions.end("u1", wrong)
        assert sessions.get(None) is None
        assert sessions.destroy(None) is False

    assert sent(client, act) == []
    assert sessions.get(made) == made


def test_a_session_is_copied(room: Any) -> None:
    """A session can be copied and pickled, and its copy is frozen as it is."""
    made = room.sessions.create("u1", {"items": [1]})
    read = room.sessions.get(made)
    for session in (made, read):
        for again in (
            copy.copy(session),
            copy.deepcopy(session),
            pickle.loads(pickle.dumps(session)),
        ):
            assert again == session
            with pytest.raises(AttributeError, match="cannot assign"):
                again.token = "another"


def test_a_token_that_a_client_chose_opens_nothing(room: Any, client: Any) -> None:
    """A well-formed token that was never given out finds nothing and creates nothing."""
    token = "07." + "a" * 43
    assert room.sessions.get(token) is None
    with pytest.raises(SessionEnded, match="missing"):
        room.sessions.update(token, {"admin": True})
    assert room.sessions.touch(token) is False
    assert client.keys("*:{s*") == []


def test_update_sets_and_removes_keys(room: Any) -> None:
    """update sets and removes its keys, leaves the others, and raises the version by one."""
    made = room.sessions.create("u1", {"a": 1, "b": 2})
    assert room.sessions.update(made, {"b": 3, "c": 4}, remove=["a", "gone"]) == 2
    read = room.sessions.get(made)
    assert (read.data, read.version) == ({"b": 3, "c": 4}, 2)
    assert room.sessions.update(made, remove=["b", "c"]) == 3
    assert room.sessions.get(made).data == {}
    room.sessions.update(made, {"cart": 1, "c": 2})
    room.sessions.update(made, remove="cart")
    assert room.sessions.get(made).data == {"c": 2}


def test_update_with_a_version(room: Any) -> None:
    """update with a version writes only if nobody wrote since. The conflict names the current version."""
    made = room.sessions.create("u1", {"a": 1})
    assert room.sessions.update(made, {"a": 2}, if_version=1) == 2
    with pytest.raises(SessionConflict) as caught:
        room.sessions.update(made, {"a": 3}, if_version=1)
    assert caught.value.current == 2
    assert room.sessions.get(made).data == {"a": 2}


def test_mutate_changes_what_is_there(room: Any) -> None:
    """mutate changes the data in place or returns new data, and removes the keys that are gone."""
    made = room.sessions.create("u1", {"a": 1, "b": 2})
    assert room.sessions.mutate(made, lambda data: data.update(a=5)).data == {"a": 5, "b": 2}
    changed = room.sessions.mutate(made, lambda data: {"c": data["a"]})
    assert (changed.data, changed.version) == ({"c": 5}, 3)


def test_mutate_tries_again_with_what_somebody_else_wrote(room: Any, client: Any) -> None:
    """mutate runs again when somebody wrote between reading and storing, and no write is lost."""
    made = room.sessions.create("u1", {"n": 0})
    seen: list[int] = []

    def change(data: dict[str, Any]) -> dict[str, Any]:
        seen.append(data["n"])
        if len(seen) == 1:
            client.hset(record_of(room, made.handle), mapping={"n": "10", "_v": "2"})
        return {"n": data["n"] + 1}

    assert room.sessions.mutate(made, change).data == {"n": 11}
    assert seen == [0, 10]


def test_data_may_have_a_type(room: Any, client: Any) -> None:
    """A model is stored and read as that model. Data that does not fit raises an error naming only the field."""
    made = room.sessions.create("u1", Cart(items=[1, 2]))
    assert made.data == Cart(items=[1, 2])
    assert room.sessions.get(made, Cart).data == Cart(items=[1, 2])
    room.sessions.update(made, {"note": "hi"})
    assert room.sessions.mutate(made, lambda cart: cart.items.append(3), Cart).data == Cart(
        items=[1, 2, 3], note="hi"
    )
    room.sessions.update(made, {"items": "canary"})
    with pytest.raises(SessionUnreadable, match="items") as caught:
        room.sessions.get(made, Cart)
    assert "canary" not in str(caught.value)
    plain = room.sessions.create("u1", Plain(3))
    assert room.sessions.get(plain, Plain).data == Plain(3)
    client.hset(record_of(room, made.handle), "items", b"\x80\x04K\x01.")  # a pickle
    with pytest.raises(SessionUnreadable):
        room.sessions.get(made)


def test_data_at_which_a_validator_stumbles_are_unreadable(room: Any) -> None:
    """A validator's KeyError at older data raises SessionUnreadable, which a request takes for an end."""

    class Hasty(BaseModel):
        @model_validator(mode="before")
        @classmethod
        def reads(cls, data: Any) -> Any:
            return {"total": data["canary"]}

    made = room.sessions.create("u1", {"items": []})
    with pytest.raises(SessionUnreadable, match="a validator raised KeyError") as caught:
        room.sessions.get(made, Hasty)
    assert "canary" not in str(caught.value)


def test_no_session_and_no_error_shows_its_token(room: Any, client: Any, caplog: Any) -> None:
    """A token is in no repr, log, exception, key or value, and MONITOR does not show it."""
    caplog.set_level(logging.DEBUG)
    shown: list[str] = []
    tokens: list[str] = []
    with client.monitor() as monitor:
        made = room.sessions.create("u1", {"a": 1}, tags=["t"])
        fresh = room.sessions.rotate(made)
        end_grace(client, room, made.handle)
        tokens += [made.token, fresh.token]
        shown += [repr(made), str(made), repr(fresh), f"{fresh.id}", repr(room.sessions.get(fresh))]
        shown += [repr(room.sessions.list_for_user("u1"))]
        assert room.sessions.get(made) is None
        for fail in (
            lambda: room.sessions.update(made, {"b": 1}),
            lambda: room.sessions.update(fresh, {"b": 1}, if_version=9),
            lambda: room.sessions.rotate(made),
        ):
            with pytest.raises((SessionEnded, SessionConflict)) as caught:
                fail()
            shown += [repr(caught.value)]
        client.echo("done")
        shown += [
            c["command"] for c in takewhile(lambda c: c["command"] != "ECHO done", monitor.listen())
        ]
    for key in client.keys("*"):
        shown += [repr(key), repr(client.dump(key))]
        if client.type(key) == b"hash":
            shown += [repr(client.hgetall(key))]
    shown += [record.getMessage() for record in caplog.records]
    for token in tokens:
        assert not [text for text in shown if token in text or token[3:] in text]


@pytest.mark.parametrize("key", ["_u", "_x", "", "1a", "a b", "a\n", "é", "a" * 65, 'a"', 7])
def test_keys_have_a_grammar(room: Any, key: Any) -> None:
    """Keys outside the grammar and reserved keys can be neither set nor removed."""
    made = room.sessions.create("u1", {"a": 1})
    with pytest.raises(SessionDataRefused):
        room.sessions.create("u1", {key: 1})
    with pytest.raises(SessionDataRefused):
        room.sessions.update(made, {key: 1})
    with pytest.raises(SessionDataRefused):
        room.sessions.update(made, remove=[key])
    assert room.sessions.get(made).version == 1


def test_there_is_a_limit_to_what_a_session_holds(room: Any) -> None:
    """A session holds 64 KiB and 64 keys at most, and a change beyond that changes nothing."""
    with pytest.raises(ValueTooLarge):
        room.sessions.create("u1", {"a": "x" * 65_536})
    with pytest.raises(SessionDataRefused, match="65 keys"):
        room.sessions.create("u1", {f"k{n}": n for n in range(65)})
    made = room.sessions.create("u1", {"a": "x" * 40_000})
    with pytest.raises(ValueTooLarge) as caught:
        room.sessions.update(made, {"b": "x" * 30_000})
    assert (caught.value.size, caught.value.limit) == (70_006, 65_536)
    assert caught.value.setting == "STILLROOM_SESSION_DATA_LIMIT"
    assert room.sessions.update(made, {"a": "", "b": "x" * 30_000}) == 2
    assert room.sessions.update(made, {"a": "x" * 35_000}) == 3
    assert room.sessions.update(made, remove=["b"]) == 4
    assert room.sessions.update(made, {f"k{n}": n for n in range(63)}) == 5
    with pytest.raises(SessionDataRefused, match="65 keys"):
        room.sessions.update(made, {"more": 1})
    assert room.sessions.update(made, {"more": 1}, remove=["k0"]) == 6


def test_what_has_no_json_is_refused(room: Any) -> None:
    """A value without a JSON form raises at the call, and nothing is stored."""
    for data in ({"a": object()}, [1], "text", 7, {"a": 1}.items(), object()):
        with pytest.raises(SessionDataRefused):
            room.sessions.create("u1", data)
    with pytest.raises(SessionDataRefused, match="17 tags"):
        room.sessions.create("u1", tags=[str(n) for n in range(17)])
    with pytest.raises(ValueTooLarge):
        room.sessions.create("u1", meta={"a": "x" * 5_000})
    with pytest.raises(SessionUnreadable):  # Python writes a longer number than it reads
        room.sessions.create("u1", {"a": 10**5_000})
    assert room.sessions.count() == 0
    with pytest.raises(InvalidKey):
        room.sessions.create("")
    with pytest.raises(InvalidKey):
        room.sessions.create(7)


@pytest.mark.parametrize(
    "data",
    [
        Linked(),
        {"token": SecretStr("x")},
        {"linked": [{"tokens": (SecretBytes(b"x"),)}]},
        {"linked": Linked()},
    ],
)
def test_a_secret_is_refused(room: Any, data: Any) -> None:
    """A secret, which would be stored as stars, is refused wherever it stands. A visitor's stars are kept."""
    made = room.sessions.create("u1", {"note": "**********"})
    for use in (
        lambda: room.sessions.create("u1", data),
        lambda: room.sessions.update(made, data),
        lambda: room.sessions.mutate(made, lambda _: data),
    ):
        with pytest.raises(SessionDataRefused, match="get_secret_value"):
            use()
    assert room.sessions.get(made).data == {"note": "**********"}


MODELS: dict[str, tuple[Any, type[Exception], str]] = {
    "other names": (Renamed(length=1), SessionUnreadable, "length .missing."),
    "validators that change it": (Doubled(total=1), SessionDataRefused, "total comes back as"),
    "a field that is not written": (Hidden(hidden=7), SessionDataRefused, "hidden comes back as"),
    "a subclass": (Holding(cart=GiftCart()), SessionDataRefused, "cart comes back as Cart"),
    "what only its init knows": (Seeded(5), SessionDataRefused, "total comes back as another int"),
}


@pytest.mark.parametrize(("data", "error", "said"), MODELS.values(), ids=MODELS)
def test_a_model_that_would_not_come_back_is_refused(
    room: Any, data: Any, error: type[Exception], said: str
) -> None:
    """A model that could not be read again, or would be another one, is refused where it is written."""
    made = room.sessions.create("u1", {"a": 1})
    for use in (
        lambda: room.sessions.create("u1", data),
        lambda: room.sessions.update(made, data),
        lambda: room.sessions.mutate(made, lambda _: data),
    ):
        with pytest.raises(error, match=said):
            use()
    assert room.sessions.get(made).data == {"a": 1}
    assert room.sessions.count() == 1


@pytest.mark.parametrize("data", [Hidden(), Holding(cart=Cart(note="x")), Seeded(), Plain(7)])
def test_a_model_that_comes_back_is_kept(room: Any, data: Any) -> None:
    """A model or a dataclass comes back as it was given."""
    made = room.sessions.create("u1", data)
    assert room.sessions.get(made, type(data)).data == data


def test_mutate_may_replace_a_model_that_is_not_written(room: Any) -> None:
    """Only what `change` returns has to come back as it is. What it was given is not written."""
    made = room.sessions.create("u1", {"shown": 1, "hidden": 7})

    def more(read: Hidden) -> dict[str, int]:
        return {"shown": 2, "hidden": read.hidden}

    assert room.sessions.mutate(made, more, Hidden).data == Hidden(shown=2, hidden=7)


def test_a_session_that_has_grown_too_large_may_shrink(room: Any, make_room: Any) -> None:
    """mutate reads a session that is larger than the limit is now, and stores it once it is smaller."""
    made = room.sessions.create("u1", {"a": "a" * 2_000, "b": 1})
    smaller = make_room(session_data_limit=1_000)
    assert smaller.sessions.mutate(made, lambda data: {"b": data["b"]}).data == {"b": 1}


def test_a_dataclass_is_looked_at_once(room: Any) -> None:
    """The schema of a dataclass is made with the first write. It takes longer than the write."""
    schemas: list[Any] = []

    @dataclass
    class Counted:
        total: int = 0

        @classmethod
        def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
            schemas.append(source)
            return handler(source)

    made = room.sessions.create("u1", Counted())
    room.sessions.update(made, Counted(1))
    assert len(schemas) == 1


@pytest.mark.parametrize("data", [{"key": b"\xff", "name": "a"}, {"key": b"a", "name": "\ud800"}])
def test_what_utf8_can_not_write_is_read_with_a_type_as_well(room: Any, data: Any) -> None:
    """Bytes that are no text, and half of a surrogate pair that a client sent, are read with a type, too."""
    made = room.sessions.create("u1", data)
    assert room.sessions.get(made).data == room.sessions.get(made, Signed).data == data


def test_settings_out_of_range_say_what_is_allowed(room: Any) -> None:
    """A setting out of range is refused with the given value and the allowed ones."""
    for options in ({"idle": 0}, {"absolute": -1}, {"max_per_user": 0}, {"on_cap": "x"}):
        with pytest.raises(SettingsError, match=next(iter(options))):
            room.sessions.create("u1", **options)
    with pytest.raises(SettingsError, match="max_per_user needs a user_id"):
        room.sessions.create(None, max_per_user=1)
    with pytest.raises(SettingsError, match="grace"):
        room.sessions.rotate(room.sessions.create("u1"), grace=-1)


def test_times_may_be_timedeltas(room: Any) -> None:
    """Times may be timedeltas."""
    hour = timedelta(hours=1)
    made = room.sessions.create("u1", idle=hour, absolute=2 * hour)
    assert made.expires_at == pytest.approx(made.read_at + 3600)
    assert room.sessions.get(made, fresh=hour) is not None
    assert made.is_fresh(hour)
    with pytest.raises(SettingsError, match="grace='5': a number of seconds"):
        room.sessions.rotate(made, grace="5")
    rotated = room.sessions.rotate(made, grace=hour)
    assert room.sessions.get(made.token) is not None
    assert rotated.token != made.token
    with pytest.raises(SessionNotFresh):
        room.sessions.get(room.sessions.create("u1", fresh=False), fresh=hour)


NASTY = [
    "{}", "{s00}", "}{", ":", "a:b", "a\nb", "a\r\nb", "\0", "%0A", "%", "*", "é", "日本", "🍯",
    "s:x", "u:", "x", "rev", "-", "a-b", "%w", " ",
]  # fmt: skip


def test_users_and_tags_are_any_text(room: Any, client: Any) -> None:
    """Users and tags may be any text: each stays in its slot, meets no other, and is listed and ended alone."""
    made = {user: room.sessions.create(user, tags=[f"t{user}"]) for user in NASTY}
    prefixes = {room.keys.shard(n) for n in range(16)}
    assert all(key[: len(b"stillroom:{s00}:")] in prefixes for key in client.keys("*:{s*"))
    for user, session in made.items():
        read = room.sessions.get(session)
        assert (read.user_id, read.tags) == (user, (f"t{user}",))
        assert [device.handle for device in room.sessions.list_for_user(user)] == [session.handle]
    for user in NASTY[::2]:
        assert room.sessions.destroy_for_user(user) == 1
    for user in NASTY[1::2]:
        assert room.sessions.destroy_by_tag(f"t{user}") == 1
    assert sessions_keys(client) == []


# Time


def test_a_session_ends_when_it_is_idle(room: Any, client: Any) -> None:
    """A session ends after a day without a request; then it answers nothing and takes nothing."""
    made = room.sessions.create("u1", {"a": 1})
    age(client, room, made.handle, DAY - 1)
    assert room.sessions.get(made, touch=False) is not None
    age(client, room, made.handle, 1)
    assert room.sessions.get(made) is None
    assert room.sessions.touch(made) is False
    for write in (lambda: room.sessions.update(made, {"a": 2}), lambda: room.sessions.rotate(made)):
        with pytest.raises(SessionEnded, match="expired"):
            write()
    assert room.sessions.list_for_user("u1") == []
    assert room.sessions.destroy(made) is False
    assert sessions_keys(client) == []


def test_a_session_that_is_used_lives_on_to_its_absolute_end(room: Any, client: Any) -> None:
    """Each request gives a session another day, and none passes the seventh."""
    made = room.sessions.create("u1")
    for day in range(8):
        read = room.sessions.get(made)
        assert read is not None
        assert read.expires_at - read.last_seen == pytest.approx(
            DAY if day < 7 else 7 * DAY - 8 * 79_200 + 79_200, abs=1
        )
        assert read.expires_at <= read.created + 7 * DAY
        age(client, room, made.handle, 79_200)
    assert room.sessions.get(made) is None


@pytest.mark.parametrize("by", ["idle", "absolute"])
def test_the_end_is_exact(room: Any, client: Any, by: str) -> None:
    """A session has ended at the microsecond of its deadline and not before."""
    made = room.sessions.create("u1", idle=1_000, absolute=1_000)
    key = record_of(room, made.handle)
    seconds, us = client.time()
    now = seconds * 1_000_000 + us
    field, length = ("_l", 1_000_000_000) if by == "idle" else ("_x", 0)
    client.hset(key, field, now - length + 60_000_000)
    assert room.sessions.get(made, touch=False).expires_at == (now + 60_000_000) / 1e6
    client.hset(key, field, now - length)
    assert room.sessions.get(made, touch=False) is None


def test_touch_is_written_down_once_a_minute(room: Any, client: Any) -> None:
    """touch, get and update write a touch down once a minute, and touch=False writes none."""
    made = room.sessions.create("u1")
    age(client, room, made.handle, 59)
    assert room.sessions.touch(made)
    assert room.sessions.get(made).last_seen == pytest.approx(made.created - 59, abs=0.5)
    age(client, room, made.handle, 1.5)
    assert room.sessions.get(made, touch=False).last_seen == pytest.approx(
        made.created - 60.5, abs=0.5
    )
    assert room.sessions.touch(made)
    assert room.sessions.get(made).last_seen == pytest.approx(made.created, abs=5)
    short = room.sessions.create("u1", idle=20)
    age(client, room, short.handle, 1.5)
    assert room.sessions.get(short).last_seen == pytest.approx(short.created, abs=1)


def test_a_touch_writes_no_index(room: Any, client: Any) -> None:
    """A touch leaves every index as it is."""
    made = room.sessions.create("u1", tags=["t"])
    age(client, room, made.handle, 100)
    shard = int(made.handle[:2], 16)
    indexes = [
        room.keys.due_sessions(shard),
        room.keys.user_sessions(shard, b"u1"),
        room.keys.shard(shard) + b"g:t",
    ]
    before = [client.zrange(key, 0, -1, withscores=True) for key in indexes]
    assert room.sessions.touch(made)
    assert before == [client.zrange(key, 0, -1, withscores=True) for key in indexes]


@pytest.mark.parametrize("step", [5, -5])
def test_a_step_of_the_servers_clock_ends_nothing(room: Any, client: Any, step: int) -> None:
    """A clock step of five seconds ends no session, keeps their order, and revives no revoked one."""
    made = room.sessions.create("u1", tags=["t"])
    shard = int(made.handle[:2], 16)
    us = step * 1_000_000
    for field in ("_l", "_x", "_c", "_s"):
        client.hincrby(record_of(room, made.handle), field, -us)
    client.incrby(room.keys.shard(shard) + b"clock", -us)
    seen = room.sessions.get(made, touch=False).last_seen
    assert room.sessions.touch(made)
    assert room.sessions.update(made, {"a": 1}) == 2
    assert room.sessions.get(made).last_seen >= seen
    client.zadd(
        room.keys.shard(shard) + b"rev",
        {"u:u1": int(client.get(room.keys.shard(shard) + b"clock"))},
    )
    client.expire(room.keys.shard(shard) + b"rev", 100)
    assert room.sessions.get(made) is None
    assert room.sessions.get(room.sessions.create("u1")) is not None


def test_a_clock_that_was_lost_has_an_end_again(
    room: Any, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A revocation gives a lost clock its TTL again, and the revoked session stays so."""
    monkeypatch.setattr(many, "BITE", 2)
    made = [room.sessions.create("u1") for _ in range(4)]
    clock = room.keys.shard(int(made[0].handle[:2], 16)) + b"clock"
    client.delete(clock)
    assert room.sessions.destroy_for_user("u1") == 4
    assert client.ttl(clock) > 0
    assert [room.sessions.get(one) for one in made] == [None] * 4


# Rotation


def test_the_old_token_works_for_a_moment(room: Any) -> None:
    """A request with the old token reaches the same session for a moment, also after two rotations,
    and can end it.
    """
    first = room.sessions.create("u1", {"a": 1}, tags=["t"])
    second = room.sessions.rotate(first)
    third = room.sessions.rotate(second)
    assert len({first.token, second.token, third.token}) == 3
    assert first.last_seen < second.last_seen < third.last_seen
    assert room.sessions.get(first).handle == third.handle
    assert room.sessions.update(first, {"b": 2}) == 2
    assert room.sessions.get(third).data == {"a": 1, "b": 2}
    assert [device.handle for device in room.sessions.list_for_user("u1")] == [third.handle]
    assert room.sessions.destroy(first) is True
    assert [room.sessions.get(one) for one in (first, second, third)] == [None] * 3


def test_a_token_used_after_its_grace_is_a_replay(room: Any, client: Any) -> None:
    """A token after its grace opens nothing and is reported as a replay with its user. The session lives."""
    events: list[Any] = []
    room.sessions.on_event.append(events.append)
    first = room.sessions.create("u1")
    second = room.sessions.rotate(first)
    end_grace(client, room, first.handle)
    assert room.sessions.get(first) is None
    assert room.sessions.destroy(first) is False
    with pytest.raises(SessionEnded, match="replayed"):
        room.sessions.update(first, {"a": 1})
    assert [(event.kind, event.handle, event.user_id) for event in events] == [
        ("replayed", second.handle, "u1")
    ] * 2
    assert room.sessions.get(second) is not None
    assert room.state_stats.counts["sessions_replayed"] == 2


def test_a_session_that_ended_is_counted_once(room: Any, client: Any) -> None:
    """A session that expired or was revoked is counted once, however often its token is shown afterwards."""
    expired, revoked = room.sessions.create("u1"), room.sessions.create("u2")
    age(client, room, expired.handle, DAY + 1)
    assert room.sessions.destroy_for_user("u2") == 1
    for session in (expired, revoked) * 3:
        assert room.sessions.get(session) is None
    assert room.sessions.sweep()["expired"] == 1
    counts = room.state_stats.counts
    assert (counts["sessions_expired"], counts["sessions_revoked"]) == (1, 1)


def test_a_replay_names_the_session_that_can_be_ended(room: Any, client: Any) -> None:
    """A replay names the current session, however often it was rotated, so that an app can end it."""
    events: list[Any] = []
    room.sessions.on_event.append(events.append)
    first = room.sessions.create("u1")
    second = room.sessions.rotate(first)
    third = room.sessions.rotate(second)
    for old in (first, second):
        end_grace(client, room, old.handle)
    assert room.sessions.get(first) is None
    assert [event.handle for event in events] == [third.handle]
    assert room.sessions.end("u1", events[0].handle) is True
    assert room.sessions.get(third) is None
    assert room.sessions.get(first) is None
    assert events[1].handle != first.handle


def test_a_rotation_without_grace(room: Any) -> None:
    """After a rotation without grace the old token opens nothing."""
    first = room.sessions.create("u1", {"a": 1})
    second = room.sessions.rotate(first, grace=0)
    assert room.sessions.get(first) is None
    assert room.sessions.get(second).data == {"a": 1}


def test_a_rotated_token_rotates_no_more(room: Any) -> None:
    """Only the first rotation of a token wins. A later one raises."""
    first = room.sessions.create("u1")
    room.sessions.rotate(first)
    with pytest.raises(SessionConflict) as caught:
        room.sessions.rotate(first)
    assert caught.value.current is None


def test_a_rotated_session_is_revoked_like_any(room: Any, client: Any) -> None:
    """A rotated session is revoked by user, by tag and by time like any other."""
    for end in (
        lambda: room.sessions.destroy_for_user("u1"),
        lambda: room.sessions.destroy_by_tag("t"),
    ):
        second = room.sessions.rotate(room.sessions.create("u1", tags=["t"]))
        assert end() == 1
        assert room.sessions.get(second) is None
    third = room.sessions.rotate(room.sessions.create("u1", tags=["t"]))
    age(client, room, third.handle, DAY + 1)
    assert room.sessions.get(third) is None
    assert room.sessions.sweep()["expired"] == 1


# The login


def test_a_login_ends_the_session_before_it(room: Any) -> None:
    """A login ends the session before it, so that a planted token opens nothing and its data is not copied."""
    planted = room.sessions.create(None, {"admin": False})
    session = room.sessions.create("u1", {"a": 1}, replaces=planted.token)
    assert room.sessions.get(planted) is None
    assert room.sessions.get(session).data == {"a": 1}
    assert room.sessions.create("u1", replaces="whatever a cookie holds") is not None


def test_a_login_that_is_refused_ends_nothing(room: Any) -> None:
    """A refused login ends nothing, and the replaced session makes room for its own successor."""
    visitor = room.sessions.create(None, {"cart": [1]})
    mine = [room.sessions.create("u1", max_per_user=2) for _ in range(2)]
    full = {"max_per_user": 2, "on_cap": "reject"}
    with pytest.raises(TooManySessions):
        room.sessions.create("u1", replaces=visitor, **full)
    assert room.sessions.get(visitor).data == {"cart": [1]}
    again = room.sessions.create("u1", replaces=mine[1], **full)
    assert [room.sessions.get(one) is not None for one in (*mine, again)] == [True, False, True]
    room.sessions.destroy(mine[0])
    assert room.sessions.create("u1", replaces=visitor, **full)
    assert room.sessions.get(visitor) is None


def test_who_replaces_its_own_session_evicts_nobody(room: Any) -> None:
    """A login that replaces a session evicts no other, also when it gives the old token."""
    events: list[Any] = []
    room.sessions.on_event.append(events.append)
    made = [room.sessions.create("u1", max_per_user=3) for _ in range(3)]
    rotated = room.sessions.rotate(made[1])
    again = room.sessions.create("u1", replaces=made[1], max_per_user=3)
    left = [room.sessions.get(one) is not None for one in (made[0], rotated, made[2], again)]
    assert left == [True, False, True, True]
    assert events == []


def test_what_a_login_finds_expired_is_told(room: Any, client: Any) -> None:
    """An expired session that a login finds is reported once, and not by the sweep again."""
    events: list[Any] = []
    room.sessions.on_event.append(events.append)
    made = room.sessions.create("u1", max_per_user=2)
    client.hincrby(record_of(room, made.handle), "_l", -round((DAY + 1) * 1e6))
    room.sessions.create("u1", max_per_user=2)
    assert [(event.kind, event.handle) for event in events] == [("expired", made.handle)]
    age(client, room, made.handle, DAY + 1)
    assert room.sessions.sweep()["expired"] == 0
    assert len(events) == 1


def test_a_user_may_have_so_many(room: Any, client: Any) -> None:
    """A login past the cap ends the oldest session or is refused. Expired sessions do not count."""
    made = [room.sessions.create("u1", max_per_user=3) for _ in range(3)]
    more = room.sessions.create("u1", max_per_user=3)
    assert [room.sessions.get(one) is None for one in [*made, more]] == [True, False, False, False]
    with pytest.raises(TooManySessions) as caught:
        room.sessions.create("u1", max_per_user=3, on_cap="reject")
    assert (caught.value.count, caught.value.limit) == (3, 3)
    age(client, room, made[1].handle, DAY + 1)
    last = room.sessions.create("u1", max_per_user=3, on_cap="reject")
    assert {d.handle for d in room.sessions.list_for_user("u1")} == {
        made[2].handle,
        more.handle,
        last.handle,
    }
    assert (
        room.sessions.create("u1", max_per_user=1).handle
        == room.sessions.list_for_user("u1")[0].handle
    )
    assert room.sessions.count("u1") == 1


# Many


def test_a_users_sessions_are_listed(room: Any) -> None:
    """A user's sessions are listed with the last seen first, each with its meta."""
    one = room.sessions.create("u1", {"secret": 1}, meta={"agent": "Firefox"})
    two = room.sessions.create("u1", meta={"agent": "Safari"})
    room.sessions.create("u2")
    room.sessions.update(one, {"a": 1})
    devices = room.sessions.list_for_user("u1")
    assert [device.meta["agent"] for device in devices] == ["Firefox", "Safari"]
    assert [device.handle for device in devices] == [one.handle, two.handle]
    assert not hasattr(devices[0], "data")
    assert (room.sessions.count("u1"), room.sessions.count("nobody"), room.sessions.count()) == (
        2,
        0,
        3,
    )


def test_a_user_ends_one_of_their_own(room: Any) -> None:
    """A user ends one of their own sessions by its handle; another user's handle does nothing."""
    mine, other = room.sessions.create("u1"), room.sessions.create("u2")
    assert room.sessions.end("u1", other.handle) is False
    assert room.sessions.end("u1", "nonsense") is False
    assert room.sessions.end("u1", mine.handle) is True
    assert room.sessions.end("u1", mine.handle) is False
    assert room.sessions.get(mine) is None
    assert room.sessions.get(other) is not None


def test_a_handle_outlives_rotations(room: Any) -> None:
    """A handle ends its session after rotations too, and opens nothing."""
    listed = room.sessions.create("u1")
    rotated = room.sessions.rotate(room.sessions.rotate(listed, grace=0), grace=0)
    assert room.sessions.end("u2", listed.handle) is False
    assert room.sessions.get(rotated) is not None
    assert room.sessions.end("u1", listed.handle) is True
    assert room.sessions.get(rotated) is None


@pytest.mark.parametrize("by", ["session", "token", "handle"])
def test_all_but_this_one(room: Any, by: str) -> None:
    """After a change of the password all sessions of a user but the current one are ended."""
    made = [room.sessions.create("u1") for _ in range(5)]
    keep = {"session": made[2], "token": made[2].token, "handle": made[2].handle}[by]
    assert room.sessions.destroy_for_user("u1", keep=keep) == 4
    assert [room.sessions.get(one) is not None for one in made] == [
        False,
        False,
        True,
        False,
        False,
    ]
    with pytest.raises(SessionEnded):
        room.sessions.destroy_for_user("u1", keep="a mistake")
    assert room.sessions.get(made[2]) is not None


def test_the_one_to_keep_may_have_been_rotated_a_moment_ago(room: Any) -> None:
    """The session to keep may be named by its old token within the grace, and not after it."""
    first, other = room.sessions.create("u1"), room.sessions.create("u1")
    second = room.sessions.rotate(first)
    assert room.sessions.destroy_for_user("u1", keep=first) == 1
    assert room.sessions.get(other) is None
    assert room.sessions.get(second) is not None
    third = room.sessions.rotate(second, grace=0)
    assert room.sessions.destroy_for_user("u1", keep=second) == 1
    assert room.sessions.get(third) is None


def test_what_was_revoked_is_not_kept(room: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A revoked session that is named as the one to keep stays revoked."""
    monkeypatch.setattr(many, "BITE", 2)
    made = [room.sessions.create("u1", tags=["t"]) for _ in range(9)]
    assert room.sessions.destroy_by_tag("t") == 9
    room.sessions.destroy_for_user("u1", keep=made[-1])
    assert [room.sessions.get(one) for one in made] == [None] * 9
    assert room.sessions.destroy_for_user("u1", keep=made[-1]) == 0
    assert room.sessions.get(made[-1]) is None
    assert room.sessions.sweep()["deleted"] == 3


def test_only_who_lived_is_counted(room: Any, client: Any) -> None:
    """A revocation counts the sessions that lived, not those expired or ended before."""
    made = [room.sessions.create("u1") for _ in range(5)]
    client.hincrby(record_of(room, made[0].handle), "_l", -round((DAY + 1) * 1e6))
    assert room.sessions.destroy_for_user("u1") == 4
    assert room.sessions.destroy_for_user("u1") == 0


def test_a_tag_ends_across_users(room: Any) -> None:
    """revoke_tags ends all sessions with one of the tags, whoever owns them."""
    made = {n: room.sessions.create(f"u{n}", tags=["mobile", f"v{n % 3}"]) for n in range(30)}
    web = room.sessions.create("u1", tags=["web"])
    assert room.sessions.destroy_by_tag("v0", "v1") == 20
    assert [n for n in made if room.sessions.get(made[n])] == [n for n in made if n % 3 == 2]
    assert room.sessions.destroy_by_tag("mobile") == 10
    assert room.sessions.get(web) is not None
    assert room.sessions.destroy_by_tag(*(f"other:{n}" for n in range(40))) == 0  # any number
    assert room.sessions.destroy_by_tag() == 0


def test_many_are_dead_at_once_and_deleted_by_a_worker(
    room: Any, dispatch: Any, client: Any
) -> None:
    """A thousand revoked sessions are dead at once, and a worker deletes them later; the kept and the new ones
    live.
    """
    made = [room.sessions.create("u1", tags=["t"]) for _ in range(1_000)]
    kept = made[0]
    assert room.sessions.destroy_for_user("u1", keep=kept) == 999
    assert dispatch.woken == ["stillroom.sweep_sessions"]
    new = room.sessions.create("u1", tags=["t"])
    left = [one for one in made if client.exists(record_of(room, one.handle))]
    assert len(left) > 700
    assert [one.handle for one in made if room.sessions.get(one)] == [kept.handle]
    assert {d.handle for d in room.sessions.list_for_user("u1")} == {kept.handle, new.handle}
    with pytest.raises(SessionEnded, match="revoked"):
        room.sessions.update(left[-1], {"a": 1})
    report = room.sessions.sweep()
    assert (report["deleted"], report["done"]) == (len(left) - 1, True)
    assert room.sessions.sweep()["deleted"] == 0
    assert client.keys("*:rev") == []
    assert room.sessions.destroy_by_tag("t") == 2
    assert sessions_keys(client) == []


# The sweep


def test_the_sweep_deletes_the_expired_and_tells(room: Any, client: Any) -> None:
    """The sweep deletes expired sessions oldest first in bites, reports them, and finds nothing the second time."""
    events: list[Any] = []
    room.sessions.on_event.append(events.append)
    made = [room.sessions.create(f"u{n}", tags=["t"]) for n in range(50)]
    for n, one in enumerate(made):
        age(client, room, one.handle, DAY + 100 + n if n % 2 else DAY - 10)
    alive = [one for n, one in enumerate(made) if n % 2 == 0]
    assert all(room.sessions.touch(one) for one in alive)
    for one in alive:
        client.zadd(
            room.keys.due_sessions(int(one.handle[:2], 16)),
            {
                next(
                    m
                    for m in client.zrange(room.keys.due_sessions(int(one.handle[:2], 16)), 0, -1)
                    if m.startswith(name_of(one.handle))
                ): 1
            },
        )
    report = room.sessions.sweep(limit=2)
    assert (report["expired"], report["deleted"], report["done"]) == (25, 0, True)
    assert report["lag_s"] > 149
    assert sorted(event.user_id for event in events) == sorted(f"u{n}" for n in range(1, 50, 2))
    assert {event.kind for event in events} == {"expired"}
    assert all(room.sessions.get(one) for one in alive)
    assert room.sessions.sweep()["expired"] == 0
    assert room.sessions.destroy_by_tag("t") == 25
    assert sessions_keys(client) == []


def test_a_worker_that_was_off_for_a_day_catches_up(room: Any, client: Any) -> None:
    """After a day without a worker the sweep leaves nothing in any index, also where the records are gone."""
    made = [room.sessions.create(f"u{n}", tags=["t"]) for n in range(300)]
    for one in made:
        age(client, room, one.handle, 2 * DAY)
        client.delete(record_of(room, one.handle))
    assert room.sessions.list_for_user("u1") == []
    assert not client.exists(room.keys.user_sessions(int(made[1].handle[:2], 16), b"u1"))
    report = room.sessions.sweep()
    assert report["expired"] == 300
    assert report["lag_s"] == pytest.approx(DAY, abs=60)
    assert sessions_keys(client) == []


def test_sessions_do_not_pile_up_without_a_worker(room: Any, client: Any) -> None:
    """Each new session deletes two overdue ones, so that sessions do not pile up without a worker."""
    for _ in range(200):
        made = room.sessions.create("u1", tags=["t"])
        age(client, room, made.handle, DAY + 1)
    assert room.sessions.count() <= 2


def test_a_sweep_stops_when_its_time_is_up(room: Any, client: Any) -> None:
    """A sweep stops when its seconds are over, and the next one goes on."""
    for _ in range(100):
        age(client, room, room.sessions.create("u1", tags=["t"]).handle, DAY + 1)
    assert room.sessions.sweep(seconds=0)["done"] is False
    for limit in (0, -1, 1_001):
        with pytest.raises(SettingsError, match="limit"):
            room.sessions.sweep(limit)


def test_the_lag_is_also_that_of_a_revocation(
    room: Any, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lag of the sweep includes revoked sessions, whose memory still waits."""
    monkeypatch.setattr(many, "BITE", 2)
    made = [room.sessions.create("u1") for _ in range(4)]
    room.sessions.destroy_for_user("u1")
    revoked = room.keys.revocations(int(made[0].handle[:2], 16))
    client.zincrby(revoked, -100_000_000, "u:u1")
    assert room.sessions.sweep(seconds=10)["lag_s"] == pytest.approx(100, abs=10)


def test_nothing_is_left_of_ten_thousand(make_room: Any, client: Any, is_full: bool) -> None:
    """After ten thousand sessions (in short two thousand) were created and destroyed only rotated names are left,
    each with a TTL.
    """
    sessions = make_room().sessions
    many = 10_000 if is_full else 2_000
    for n in range(many):
        session = sessions.create(f"u{n % 50}", {"n": n}, tags=["a", f"b{n % 7}"])
        if n % 100 == 0:
            session = sessions.rotate(session)
        assert sessions.destroy(session)
    left = sessions_keys(client)
    assert len(left) == many // 100
    assert all(client.hexists(key, "_to") for key in left)


# Secrets


def test_a_pepper_is_changed_without_logging_anybody_out(make_room: Any) -> None:
    """With the new pepper first and the old one behind it nobody is logged out. Without the old one they are."""
    old, new = "o" * 32, "n" * 32
    before = make_room(session_peppers=old)
    during = make_room(session_peppers=f"{new},{old}")
    after = make_room(session_peppers=new)
    session = before.sessions.create("u1", {"a": 1})
    other = before.sessions.create("u1")
    assert during.sessions.get(session.token).data == {"a": 1}
    assert during.sessions.update(session.token, {"b": 2}) == 2
    assert during.sessions.destroy_for_user("u1", keep=session.token) == 1
    assert during.sessions.get(other.token) is None
    assert after.sessions.get(session.token) is None
    rotated = during.sessions.rotate(session.token)
    assert after.sessions.get(rotated.token).data == {"a": 1, "b": 2}
    assert during.sessions.get(session.token).handle == rotated.handle
    assert during.sessions.destroy(rotated.token) is True


def test_production_needs_a_pepper(make_room: Any, caplog: Any) -> None:
    """Production without a pepper raises; a developer's machine uses a random one and says so once."""
    with pytest.raises(SettingsError, match="STILLROOM_SESSION_PEPPERS"):
        make_room(session_peppers=(), production=True).sessions.create("u1")
    room = make_room(session_peppers=())
    session = room.sessions.create("u1")
    assert room.sessions.get(session) == session
    assert [r.levelname for r in caplog.records if "PEPPERS" in r.getMessage()] == ["WARNING"]
    assert make_room(session_peppers=(), production=True).sessions.sweep()["done"] is True


# Redis away, and full


def test_a_full_server_ends_sessions_and_begins_none(room: Any, client: Any) -> None:
    """On a full server create and update raise and leave nothing; get, touch, destroy and revoke work."""
    made = [room.sessions.create("u1", {"a": 1}) for _ in range(300)]
    other = room.sessions.create("u2", {"a": 1})
    age(client, room, other.handle, 100)
    stays = room.sessions.create("u4", {"a": 1})
    due = room.keys.due_sessions(int(stays.handle[:2], 16))
    for member in client.zrange(due, 0, -1):  # the sweep finds it alive
        client.zadd(due, {member: 1})
    keys = set(client.keys("*:{s*"))
    client.config_set("maxmemory", 1)
    client.config_set("maxmemory-policy", "noeviction")
    try:
        with pytest.raises(SessionStoreUnavailable, match="oom"):
            room.sessions.create("u3", tags=["t"])
        with pytest.raises(SessionStoreUnavailable, match="oom"):
            room.sessions.update(other, {"b": 1})
        assert set(client.keys("*:{s*")) == keys
        assert room.sessions.get(other).data == {"a": 1}
        assert room.sessions.get(other).last_seen > made[0].created
        assert room.sessions.destroy(other) is True
        assert room.sessions.destroy_for_user("u1") == 300
        assert room.sessions.get(made[-1]) is None
        assert room.sessions.sweep()["deleted"] == 200
        assert room.sessions.get(room.sessions.rotate(stays)).data == {"a": 1}
        assert room.sessions.destroy_for_user("u4") == 1
    finally:
        client.config_set("maxmemory", 0)
    assert len(sessions_keys(client)) == 1  # the name that was rotated away


def test_scripts_that_the_server_lost_are_sent_again(room: Any, client: Any) -> None:
    """A script that the server lost, by SCRIPT FLUSH or a failover, is sent again unnoticed."""
    made = room.sessions.create("u1", {"a": 1})
    client.script_flush()
    assert room.sessions.get(made) == made
    for act in (
        lambda: room.sessions.update(made, {"a": 2}),
        lambda: room.sessions.rotate(made),
        lambda: room.sessions.create("u1"),
        lambda: room.sessions.touch(made),
        room.sessions.sweep,
    ):
        client.script_flush()
        assert act()
    client.script_flush()
    assert room.sessions.destroy_for_user("u1") == 2


def test_a_create_that_was_sent_twice_is_one_session(room: Any, client: Any) -> None:
    """A create that the wire sends twice makes one session."""
    body = getattr(room, "inner", room)._sessions_body
    operation = body.create("u1", {"a": 1}, max_per_user=1)
    command = next(operation)[-1]
    first, second = _asked(client, command), _asked(client, command)
    assert first[:2] == second[:2]
    assert room.sessions.count("u1") == 1
    operation.close()


def test_a_login_that_finds_its_scripts_lost_twice_leaves_no_session(
    room: Any, client: Any
) -> None:
    """A login that began a session in a batch that lacked another script is undone where scripts are lost again."""
    body, old = getattr(room, "inner", room)._sessions_body, room.sessions.create("u1")
    while True:  # until the two sessions are in different shards
        operation = body.create("u2", replaces=old.token)
        *rest, hold, create = next(operation)
        if hold[1] == session_hold.text.sha:
            break
        operation.close()
    lost, done = ReplyError("NOSCRIPT No matching script."), [b"" for _ in rest]
    begun = _asked(client, create)
    operation.throw(RedisRefused("NOSCRIPT", "", [*done, lost, begun]))
    held = _asked(client, hold)
    with pytest.raises(SessionStoreUnavailable):
        operation.throw(RedisRefused("NOSCRIPT", "", [*done, held, lost]))
    room.upkeep.deliver_logouts()
    assert room.sessions.count("u2") == 0


def _asked(client: Any, command: Any) -> Any:
    """Have the server run the script of a command, which it may lack."""
    from stillroom.scripts import BY_SHA

    name, sha, *given = command
    client.script_load(BY_SHA[sha].source)
    return client.execute_command(name.decode(), sha, *given)
