"""The cache keeps its promises on a real server, with both faces."""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import dataclass
from itertools import takewhile
from typing import Any
from uuid import UUID, uuid4
from zlib import crc32

import pytest
from pydantic import BaseModel, Field, field_serializer

from stillroom import Freshness, InvalidArgument, InvalidKey, ValueTooLarge
from stillroom.cache import invalidation
from stillroom.cache.leases import FAILURES_KEPT_MS
from stillroom.codec import Unencodable
from stillroom.keys import sanitized
from stillroom.operation import Pause
from tests.support.entries import age
from tests.support.monitor import sent

HANDSHAKE = {"HELLO", "CLIENT", "MONITOR"}  # of the client that looks on


class Product(BaseModel):
    id: int
    name: str
    price: int = Field(alias="priceCents", default=0)

    model_config = {"populate_by_name": True}


@dataclass
class Thing:
    id: UUID
    size: int


def counts(room: Any) -> dict[str, int]:
    return dict(room.stats.counts)


# Get and set


def test_a_value_comes_back_as_the_type_asked_for(room: Any) -> None:
    """A pydantic model that was set is a pydantic model when it is read."""
    product = Product(id=7, name="Jam", priceCents=350)
    assert room.cache.set("product:7", product, ttl=60)
    assert room.cache.get("product:7", Product) == product
    assert room.cache.get("product:7") == {"id": 7, "name": "Jam", "priceCents": 350}


@pytest.mark.parametrize("value", [None, 0, "", [], {}, False, 1.5, "ünï\ncode", [1, {"a": None}]])
def test_any_json_value_comes_back(room: Any, value: Any) -> None:
    """Every JSON value survives, also those that are false."""
    missing = object()
    assert room.cache.set("k", value)
    assert room.cache.get("k", default=missing) == value


class Slow(BaseModel):
    """A value that takes longer to encode than a call may wait for Redis."""

    number: int

    @field_serializer("number")
    def _written(self, number: int) -> int:
        time.sleep(0.4)
        return number


def test_the_time_that_a_value_takes_to_encode_is_not_that_of_redis(make_room: Any) -> None:
    """A value that takes longer to encode than `call_timeout` is stored: Redis has not been asked yet."""
    room = make_room(call_timeout=0.3)
    assert room.cache.set("k", Slow(number=1))
    assert room.cache.set_many({"many": Slow(number=2)}) == {"many": True}
    assert room.cache.add("added", Slow(number=3))
    assert room.cache.get_many(["k", "many", "added"], Slow).keys() == {"k", "many", "added"}


def test_a_miss_is_the_default(room: Any) -> None:
    """A key that was never set gives the default."""
    assert room.cache.get("nothing") is None
    assert room.cache.get("nothing", int, 5) == 5
    assert room.cache.get_entry("nothing") is None


def test_a_value_of_another_type_is_a_miss_and_counted(room: Any) -> None:
    """A value that does not fit the type asked for is never returned."""
    room.cache.set("k", "not a number")
    assert room.cache.get("k", int, -1) == -1
    assert counts(room)["decode_errors"] == 1
    assert room.cache.get("k", str) == "not a number"


@pytest.mark.parametrize("read", ["get", "get_or_set", "call"])
def test_a_process_that_does_nothing_but_hit_writes_its_counts_down(
    room: Any, client: Any, read: str
) -> None:
    """What is due goes along with a hit, in whichever way that is asked for."""
    load = room.cache.cached("k", ttl=60, name="one")(lambda: 1)
    hit = {
        "get": lambda: room.cache.get("k"),
        "get_or_set": lambda: room.cache.get_or_set("k", lambda: 2),
        "call": load,
    }[read]
    load()
    room.stats.due = time.monotonic() + 3_600
    assert [hit(), hit()] == [1, 1]
    before = int(client.hget(room.keys.counts, "hits") or 0)
    room.stats.due = 0.0
    assert hit() == 1
    assert int(client.hget(room.keys.counts, "hits")) == before + 2


def test_an_entry_tells_its_freshness_and_tags(room: Any) -> None:
    """get_entry returns the value with its freshness and tags."""
    room.cache.set("k", [1], ttl=60, swr=60, tags=["a", "b c"])
    entry = room.cache.get_entry("k", list[int])
    assert (entry.value, entry.freshness, entry.tags) == ([1], Freshness.FRESH, ("a", "b c"))
    assert entry.loader is None


@pytest.mark.parametrize("tag", ["50%", "50%25", "a\nb", "\x00"])
def test_tags_are_told_as_they_were_given(room: Any, tag: str) -> None:
    """The tags that get_entry returns are those that were given, so they can be invalidated and given again."""
    room.cache.set("first", 1, tags=[tag])
    room.cache.incr("first")
    room.cache.touch("first", ttl=60)
    room.cache.set("again", 1, tags=room.cache.get_entry("first").tags)
    for key in ("first", "again"):
        assert room.cache.get_entry(key).tags == (tag,)
    room.cache.invalidate_by_tag(*room.cache.get_entry("again").tags)
    assert room.cache.get_many(["first", "again"]) == {}


def test_the_value_is_readable_in_redis(room: Any, client: Any) -> None:
    """GET shows one header line and the JSON."""
    room.cache.set("k", {"a": 1}, tags=["t"])
    header, payload = client.get(room.keys.entry(b"k")).split(b"\n")
    assert header.split(b"\t")[-3:] == [b"", b"k", b"t"]
    assert json.loads(payload) == {"a": 1}


def test_redis_forgets_an_entry_after_ttl_and_swr(room: Any, client: Any) -> None:
    """The TTL of an entry in Redis is ttl + swr."""
    room.cache.set("k", 1, ttl=10, swr=20)
    assert 29_000 < client.pttl(room.keys.entry(b"k")) <= 30_000


def test_a_large_value_is_compressed(room: Any, client: Any) -> None:
    """A value that is too large as it is is stored compressed, and reads the same."""
    room.cache.set("k", "jam " * 300_000)
    assert client.strlen(room.keys.entry(b"k")) < 40_000
    assert room.cache.get("k", str) == "jam " * 300_000


def test_a_value_that_fits_is_stored_as_it_is(room: Any, make_room: Any, client: Any) -> None:
    """A value that fits is stored uncompressed unless the app asks for compression. Both forms can be read."""
    thrifty = make_room(compress_above=4_096)
    room.cache.set("plain", "jam " * 25_000)
    thrifty.cache.set("packed", "jam " * 25_000)
    assert client.strlen(room.keys.entry(b"plain")) > 100_000
    assert client.strlen(room.keys.entry(b"packed")) < 4_000
    assert room.cache.get("packed", str) == thrifty.cache.get("plain", str) == "jam " * 25_000


def test_a_value_over_the_limit_is_refused_and_the_old_one_stays(room: Any) -> None:
    """set refuses a value over the limit, says the size and the limit, and leaves the old value in place."""
    room.cache.set("k", "old")
    said = r"'k': .* 9,000,002 bytes, the limit of STILLROOM_DECODED_LIMIT is 8,388,608"
    with pytest.raises(ValueTooLarge, match=said):
        room.cache.set("k", "x" * 9_000_000)
    with pytest.raises(ValueTooLarge, match=r"'k': .* the limit of STILLROOM_VALUE_LIMIT is "):
        room.cache.set_many({"fine": 1, "k": os.urandom(2_000_000)}, type=Any)
    with pytest.raises(Unencodable, match=r"^'odd': object: "):
        room.cache.set_many({"fine": 1, "odd": object()})
    assert room.cache.get("fine") is None
    assert room.cache.get("k") == "old"


def test_a_value_without_json_is_refused(room: Any) -> None:
    """A value without a JSON form raises, and nothing is stored."""
    with pytest.raises(Unencodable, match="object"):
        room.cache.set("k", object())
    with pytest.raises(Unencodable):
        room.cache.set("k", "text", type=int)
    assert room.cache.get("k") is None


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("", "1 to 1,024 bytes"),
        ("k" * 10_000, "has 10,000"),
        ("\ud800", "surrogate"),
        (7, "not int"),
    ],
)
def test_a_key_that_cannot_be_used_says_why(room: Any, key: Any, why: str) -> None:
    """A key that cannot be used raises before anything is sent."""
    for operation in (room.cache.get, room.cache.invalidate, room.cache.invalidate_by_tag):
        with pytest.raises(InvalidKey, match=why):
            operation(key)
    with pytest.raises(InvalidKey, match=why):
        room.cache.set(key, 1)


@pytest.mark.parametrize(
    "key", ["a b", "a\nb", "a\tb", "a%0Ab", "{x}", "*?[a]", "🍓", "a\x00b", "é" * 500]
)
def test_any_other_text_is_a_key_and_a_tag(room: Any, key: str) -> None:
    """Braces, globs, control characters and emoji are allowed in keys and tags and never meet another key."""
    others = [key + "x", key.replace("\n", "%0A") + "y"]
    for name in [key, *others]:
        room.cache.set(name, name, tags=[name])
    assert [room.cache.get(name) for name in [key, *others]] == [key, *others]
    room.cache.invalidate_by_tag(key)
    assert [room.cache.get(name) for name in [key, *others]] == [None, *others]


@pytest.mark.parametrize(
    "times", [{"ttl": 0}, {"ttl": -1}, {"swr": -1}, {"ttl": float("nan")}, {"ttl": 1e9}]
)
def test_times_out_of_range_are_refused(room: Any, times: Any) -> None:
    """A TTL of zero, below zero or over life_limit raises."""
    with pytest.raises(ValueError, match=r"ttl|swr"):
        room.cache.set("k", 1, **times)


# Invalidation


def test_invalidate_forgets_keys(room: Any) -> None:
    """invalidate deletes the keys and returns how many there were."""
    room.cache.set("a", 1)
    room.cache.set("b", 2)
    assert room.cache.invalidate("a", "b", "c") == 2
    assert room.cache.get("a") is None
    assert room.cache.invalidate() == 0


def test_a_tag_kills_every_entry_that_carries_it(room: Any, make_room: Any) -> None:
    """One invalidation of a tag ends every entry with that tag, for every process, and no other entry."""
    other = make_room()
    for n in range(20):
        room.cache.set(f"p:{n}", n, tags=["products", f"brand:{n % 2}"])
    assert other.cache.get("p:3") == 3
    room.cache.invalidate_by_tag("brand:1")
    for reader in (room, other):
        assert [n for n in range(20) if reader.cache.get(f"p:{n}") is not None] == list(
            range(0, 20, 2)
        )
    room.cache.set("p:3", "new", tags=["products", "brand:1"])
    assert other.cache.get("p:3") == "new"


def test_an_entry_has_a_thousand_tags_at_most(room: Any) -> None:
    """More tags than a script can write in time are refused at the call, or not kept where a value gives them."""
    many = [f"t{n}" for n in range(1_001)]
    assert room.cache.set("k", 1, tags=many[1:])
    room.cache.invalidate_by_tag("t1000")
    assert room.cache.get("k") is None
    for write in (
        lambda: room.cache.set("k", 1, tags=many),
        lambda: room.cache.set_many({"k": 1}, tags=many),
        lambda: room.cache.add("k", 1, tags=many),
        lambda: room.cache.get_or_set("k", lambda: 1, tags=many),
    ):
        with pytest.raises(InvalidArgument, match=r"1,001 were given, and an entry has 1,000"):
            write()
    assert room.cache.get_or_set("k", lambda: 1, tags=[lambda value: many]) == 1
    assert room.cache.get("k") is None


def test_a_tag_that_is_given_often_is_one(room: Any) -> None:
    """A tag that many parts of a value give is one tag of its entry."""
    often = [f"t{n % 3}" for n in range(1_500)]
    assert room.cache.set("k", 1, tags=often)
    assert room.cache.get_or_set("named", lambda: 1, tags=often) == 1
    assert room.cache.get_or_set("loaded", lambda: 1, tags=[lambda value: often]) == 1
    for key in ("k", "named", "loaded"):
        assert room.cache.get_entry(key).tags == ("t0", "t1", "t2")
    room.cache.invalidate_by_tag("t2")
    assert room.cache.get_many(["k", "named", "loaded"]) == {}


def test_a_soft_tag_leaves_the_value_stale(room: Any) -> None:
    """Softly invalidated entries are served, and say that they are stale."""
    room.cache.set("k", 1, ttl=60, tags=["t"])
    room.cache.invalidate_by_tag("t", soft=True)
    assert room.cache.get("k") == 1
    assert room.cache.get_entry("k").freshness is Freshness.STALE
    room.cache.set("k", 2, ttl=60, tags=["t"])
    assert room.cache.get_entry("k").freshness is Freshness.FRESH


@pytest.mark.parametrize("order", [(False, True), (True, False)])
def test_hard_wins_over_soft_in_any_order(room: Any, order: tuple[bool, bool]) -> None:
    """A hard invalidation is not undone by a soft one, before or after it."""
    room.cache.set("k", 1, tags=["t"])
    for soft in order:
        room.cache.invalidate_by_tag("t", soft=soft)
    assert room.cache.get("k") is None


@pytest.mark.parametrize(
    "tags", ["products", lambda v: "products", [lambda v: "products"], {"products"}]
)
def test_one_text_is_one_tag(room: Any, tags: Any) -> None:
    """A single text given as tags is one tag, not a tag for each letter."""
    if not callable(tags) and not (isinstance(tags, list) and callable(tags[0])):
        room.cache.set("set", 1, tags=tags)
        room.cache.set_many({"many": 1}, tags=tags)
    room.cache.get_or_set("got", lambda: 1, tags=tags)
    room.cache.cached("loaded", ttl=60, tags=tags, name="one")(lambda: 1)()
    assert room.cache.get_entry("loaded").tags == ("products",)
    room.cache.invalidate_by_tag("products")
    assert room.cache.get_many(["set", "many", "got", "loaded"]) == {}


@pytest.mark.parametrize(
    ("glob", "key"), [("50?", "50%"), ("50[%]", "50%"), ("a?b", "a\tb"), ("a\nb", "a\nb")]
)
def test_a_pattern_matches_keys_as_they_were_written(room: Any, glob: str, key: str) -> None:
    """A pattern matches keys as the app writes them, whatever escapes Redis stores."""
    room.cache.set(key, 1)
    room.cache.invalidate_by_pattern(glob)
    assert room.cache.get(key) is None


@pytest.mark.parametrize(
    ("glob", "sign"),
    [
        ("^a:.*$", "^"),
        (r"a:\d", r"\d"),
        ("a:.+", ".+"),
        ("a:1|2", "|"),
        ("a:*$", "$"),
        ("a.*", None),
        ("[^a]:?", None),
    ],
)
def test_a_regular_expression_is_told_to_be_a_glob(
    room: Any, caplog: pytest.LogCaptureFixture, glob: str, sign: str | None
) -> None:
    """A pattern that looks like a regular expression is taken for the glob that it is, and the log says so once."""
    invalidation._warn_of_regex.cache_clear()
    room.cache.invalidate_by_pattern(glob)
    room.cache.invalidate_by_pattern(glob)
    told = [one.getMessage() for one in caplog.records if "is a glob" in one.getMessage()]
    assert len(told) == (sign is not None)
    assert sign is None or f"in which {sign} stands for itself" in told[0]


@pytest.mark.parametrize(
    ("glob", "dead"),
    [
        ("product:*", ["product:1", "product:2"]),
        ("product:?", ["product:1", "product:2"]),
        ("*:1", ["product:1", "user:1"]),
        ("[pu]*:[^1]", ["product:2", "user:2"]),
        ("user:1", ["user:1"]),
        ("\\*", ["*"]),
        ("*", ["*", "product:1", "product:2", "user:1", "user:2"]),
        ("nothing*", []),
    ],
)
def test_a_pattern_kills_every_key_it_matches(
    room: Any, make_room: Any, glob: str, dead: list[str]
) -> None:
    """A pattern ends every matching entry for every process. A value that is stored afterwards lives."""
    keys = ["*", "product:1", "product:2", "user:1", "user:2"]
    readers = [room, make_room(), make_room(marks_limit=100)]
    room.cache.set_many(dict.fromkeys(keys, 1))
    readers[1].cache.get("user:1")
    for n in range(150):
        room.cache.invalidate_by_tag(f"other:{n}")
    room.cache.invalidate_by_pattern(glob)
    for n in range(150):
        room.cache.invalidate_by_tag(f"more:{n}")
    for reader in readers:
        assert [key for key in keys if reader.cache.get(key) is None] == dead
        assert list(reader.cache.get_many(keys)) == [key for key in keys if key not in dead]
    room.cache.set_many(dict.fromkeys(keys, 2))
    assert all(reader.cache.get(key) == 2 for reader in readers for key in keys)


def test_more_patterns_than_there_may_be_begin_a_new_epoch(
    room: Any, make_room: Any, client: Any
) -> None:
    """A thousand patterns are kept. The next one begins an epoch with a cold cache and revives nothing."""
    other = make_room()
    room.cache.set("k:5", 1)
    room.cache.set("bystander", 1)
    for n in range(1_000):
        room.cache.invalidate_by_pattern(f"k:{n}")
    assert (other.cache.get("k:5"), other.cache.get("bystander")) == (None, 1)
    room.cache.invalidate_by_pattern("one more")
    assert client.exists(room.keys.globs) == 0
    assert [reader.cache.get("bystander") for reader in (room, other)] == [None, None]
    room.cache.set("k:5", 2)
    assert other.cache.get("k:5") == 2


def test_patterns_that_redis_has_lost_revive_nothing(
    room: Any, make_room: Any, client: Any
) -> None:
    """Where the patterns were evicted, the next one begins an epoch: nobody knows what the lost ones named."""
    room.cache.set("k:1", 1)
    room.cache.invalidate_by_pattern("k:*")
    client.delete(room.keys.globs)
    room.cache.invalidate_by_pattern("another:*")
    for start in range(0, 1_500, 100):  # more marks than a new process asks for
        room.cache.invalidate_by_tag(*[f"x:{n}" for n in range(start, start + 100)])
    assert make_room().cache.get("k:1") is None


@pytest.mark.parametrize("act", ["trim_marks", "invalidate_by_tag"])
def test_patterns_are_asked_for_so_that_a_full_cache_does_not_evict_them(
    room: Any, client: Any, act: str
) -> None:
    """Trimming and invalidations ask for the patterns, as a full cache takes first what nobody has asked for."""
    room.cache.invalidate_by_pattern("k:*")
    globs = room.keys.globs
    client.restore(globs, 0, client.dump(globs), replace=True, idletime=3_600)
    assert client.object("idletime", globs) >= 3_600
    {
        "trim_marks": room.cache.trim_marks,
        "invalidate_by_tag": lambda: room.cache.invalidate_by_tag("t"),
    }[act]()
    assert client.object("idletime", globs) < 60


def test_old_patterns_are_trimmed_with_the_marks(room: Any, client: Any) -> None:
    """Patterns older than the longest life of an entry are trimmed with the marks."""
    room.cache.invalidate_by_pattern("young*")
    client.zadd(room.keys.marks, {"p:old*": 1})
    client.zadd(room.keys.globs, {"old*": 1})
    assert room.cache.trim_marks()["dropped"] == 1
    assert client.zrange(room.keys.globs, 0, -1) == [b"young*"]


def test_a_write_touches_no_index_but_those_of_its_tags(room: Any, client: Any) -> None:
    """The only sorted sets that a write leaves are the marks and the indexes of its tags."""
    room.cache.set("set", 1, ttl=60, tags=["t"])
    room.cache.add("added", 1, tags=["t"])
    room.cache.get_or_set("loaded", lambda: 1, tags=["t"])
    room.cache.incr("set")
    room.cache.touch("set", ttl=90)
    index = room.keys.index(b"t")
    found = {key for key in client.keys("*") if client.type(key) == b"zset"}
    assert found == {index, room.keys.marks}
    assert {*client.zrange(index, 0, -1)} == {b"set", b"added", b"loaded"}


def test_clear_kills_everything(room: Any, make_room: Any, client: Any) -> None:
    """clear ends every entry and every load under way, and drops the marks."""
    other = make_room()
    room.cache.set("k", 1, tags=["t"])
    room.cache.invalidate_by_tag("u")
    assert other.cache.get("k") == 1

    def load() -> str:
        other.cache.clear()
        return "loaded before"

    assert room.cache.get_or_set("loading", load) == "loaded before"
    assert [r.cache.get(k) for r in (room, other) for k in ("k", "loading")] == [None] * 4
    assert client.zcard(room.keys.marks) == 3  # the newest, the server's run, the agreement
    room.cache.set("k", 2)
    assert other.cache.get("k") == 2


def test_a_pattern_kills_what_is_being_loaded(room: Any, make_room: Any) -> None:
    """A load that began before a pattern was invalidated stores nothing."""
    other = make_room()

    def load() -> str:
        other.cache.invalidate_by_pattern("load*")
        return "old"

    assert room.cache.get_or_set("loading", load) == "old"
    assert [room.cache.get("loading"), other.cache.get("loading")] == [None, None]


# Loaders


def test_a_loader_is_called_once(room: Any) -> None:
    """A miss calls the loader once; after that the cache answers."""
    calls = []

    @room.cache.cached("product:{id}", ttl=60, tags=["products", "brand:{brand}"], ignore=["brand"])
    def load(id: int, brand: str = "acme") -> Product:
        calls.append((id, brand))
        return Product(id=id, name=brand)

    assert load(7) == load(id=7) == load(7, "acme") == Product(id=7, name="acme")
    assert calls == [(7, "acme")]
    assert room.cache.get("product:7", Product) == Product(id=7, name="acme")
    assert load.key(7) == "product:7"
    room.cache.invalidate_by_tag("brand:acme")
    load(7)
    assert len(calls) == 2
    assert load.invalidate(7) == 1
    load(7)
    assert len(calls) == 3


def test_a_loaded_none_is_a_value(room: Any) -> None:
    """A loaded None is a value, and the loader is not called again."""
    calls = []

    @room.cache.cached("k:{n}", ttl=60)
    def find(n: int) -> str | None:
        calls.append(n)
        return None

    assert find(1) is None
    assert find(1) is None
    assert calls == [1]


def test_tags_may_come_from_the_value(room: Any) -> None:
    """A tag that is made from the loaded value invalidates it like any other tag."""

    @room.cache.cached(
        "p:{id}", ttl=60, tags=[lambda p: [f"shelf:{shelf}" for shelf in p["shelves"]]]
    )
    def load(id: int) -> dict[str, Any]:
        return {"shelves": [1, 2]}

    load(7)
    assert room.cache.get_entry("p:7").tags == ("shelf:1", "shelf:2")
    room.cache.invalidate_by_tag("shelf:2")
    assert room.cache.get("p:7") is None


def test_arguments_and_values_keep_their_types(room: Any, dispatch: Any, client: Any) -> None:
    """A UUID argument is a UUID again in the worker, and a dataclass comes back as one."""

    seen: list[Any] = []

    @room.cache.cached("thing:{id}", ttl=60, swr=60, ignore=["size"])
    def load(id: UUID, size: int = 3) -> Thing:
        seen.append(id)
        return Thing(id, size)

    thing = uuid4()
    assert load(thing) == Thing(thing, 3)
    assert load(thing) == Thing(thing, 3)
    age(client, room.keys.entry(b"thing:%b" % str(thing).encode()), 61)
    load(thing)
    assert dispatch.run_all(room) == ["refreshed"]
    assert seen == [thing, thing]


def test_a_report_names_the_key_that_get_takes(room: Any, dispatch: Any, client: Any) -> None:
    """The report of a refresh names its key as the cached function does, whatever escapes Redis stores."""
    sale = room.cache.cached("sale:{name}", ttl=60, swr=60, name="sale")(lambda name: 1)
    sale("50%")
    age(client, room.keys.entry(sanitized(sale.key("50%"))), 61)
    sale("50%")
    assert room.cache.refresh(dispatch.orders[0])["key"] == sale.key("50%")


def test_the_loaders_error_reaches_its_caller_and_leaves_no_lease(room: Any, client: Any) -> None:
    """A loader's error reaches its caller and leaves no lease, so that the next caller loads at once."""
    failing = [True]

    @room.cache.cached("k", ttl=60)
    def load() -> int:
        if failing:
            raise LookupError("no such thing")
        return 1

    with pytest.raises(LookupError, match="no such thing"):
        load()
    assert client.get(room.keys.lease(b"k")) is None
    failing.clear()
    assert load() == 1


def test_a_value_that_cannot_be_stored_is_returned_all_the_same(room: Any, client: Any) -> None:
    """A loaded value that cannot be stored is returned; nothing is stored, and the lease is free."""
    assert len(room.cache.get_or_set("k", lambda: "x" * 9_000_000)) == 9_000_000
    assert client.keys("*:l:*") == []
    assert counts(room)["not_stored"] == 1


def test_a_loader_of_another_type_than_it_says_is_not_stored(room: Any) -> None:
    """A loaded value that does not fit the loader's return type is not stored."""

    @room.cache.cached("k", ttl=60)
    def load() -> int:
        return "seven"  # type: ignore[return-value]

    assert load() == "seven"
    assert room.cache.get("k") is None


def test_get_or_set_loads_what_is_missing(room: Any) -> None:
    """get_or_set loads a missing value with a function that has no name of its own."""
    assert room.cache.get_or_set("k", lambda: 5, ttl=60, tags=["t", lambda v: [f"v:{v}"]]) == 5
    assert room.cache.get_or_set("k", lambda: 6, ttl=60) == 5
    assert room.cache.get_entry("k").tags == ("t", "v:5")


# Stale while revalidate


def test_a_stale_value_is_served_and_one_order_is_sent(
    room: Any, dispatch: Any, client: Any
) -> None:
    """A stale value is served and one task is sent for each stale period, however often it is read."""
    versions = iter(range(100))

    @room.cache.cached("k", ttl=60, swr=600)
    def load() -> int:
        return next(versions)

    key = room.keys.entry(b"k")
    assert load() == 0
    age(client, key, 61)
    before = client.get(key), client.pexpiretime(key)
    assert [load() for _ in range(10)] == [0] * 10
    assert room.cache.get("k", int) == 0
    assert (client.get(key), client.pexpiretime(key)) == before
    assert len(dispatch.orders) == 1
    assert dispatch.run_all(room) == ["refreshed"]
    assert load() == 1
    assert dispatch.orders == []
    age(client, key, 61)
    load()
    assert dispatch.run_all(room) == ["refreshed"]
    assert load() == 2


def test_a_plain_get_of_a_stale_value_asks_too(room: Any, dispatch: Any, client: Any) -> None:
    """A plain get of a stale value orders its refresh too, because the entry names its loader."""

    @room.cache.cached("k:{n}", ttl=60, swr=600)
    def load(n: int) -> int:
        return n

    load(3)
    age(client, room.keys.entry(b"k:3"), 61)
    assert room.cache.get("k:3") == 3
    assert [(o.loader, o.args, o.key) for o in dispatch.orders] == [("load", {"n": 3}, "k:3")]


def test_a_soft_invalidation_asks_for_a_refresh(room: Any, dispatch: Any) -> None:
    """After a soft invalidation the next reader gets the old value, and readers after the refresh get
    the new one.
    """
    versions = iter(range(100))

    @room.cache.cached("k", ttl=60, swr=600, tags=["t"])
    def load() -> int:
        return next(versions)

    load()
    room.cache.invalidate_by_tag("t", soft=True)
    assert load() == 0
    assert dispatch.run_all(room) == ["refreshed"]
    assert load() == 1
    assert dispatch.orders == []


def test_without_a_name_one_reader_refreshes_itself(room: Any, client: Any) -> None:
    """With a bare function in get_or_set the reader that gets the lease refreshes.

    An error serves the stale value.
    """
    room.cache.get_or_set("k", lambda: 1, ttl=60, swr=600)
    age(client, room.keys.entry(b"k"), 61)
    assert room.cache.get_or_set("k", lambda: 1 / 0, ttl=60, swr=600) == 1
    assert client.get(room.keys.lease(b"k")).startswith(b"backoff.")
    client.delete(room.keys.lease(b"k"))
    age(client, room.keys.entry(b"k"), 1)
    assert room.cache.get_or_set("k", lambda: 2, ttl=60, swr=600) == 2


def test_no_backoff_is_longer_than_its_limit(make_room: Any, client: Any, dispatch: Any) -> None:
    """A refresh that has failed forty times in a row is ordered again after `backoff_limit` seconds at most."""
    room = make_room(backoff=2.0, backoff_limit=3.0)
    loads = iter([1])
    load = room.cache.cached("k", ttl=60, swr=600, name="load")(lambda: next(loads))
    assert load() == 1
    age(client, room.keys.entry(b"k"), 61)
    client.set(room.keys.lease(b"k"), "backoff.1.40", px=FAILURES_KEPT_MS)
    assert load() == 1
    dispatch.run_all(room)
    _, delay, failures = client.get(room.keys.lease(b"k")).split(b".")
    assert 1_500 <= int(delay) <= 3_000
    assert int(failures) == 41


def test_a_failed_refresh_backs_off_twice_as_long_each_time(
    room: Any, dispatch: Any, client: Any
) -> None:
    """Each failed refresh doubles the backoff, the stale value is served meanwhile, and success resets it."""
    failing = [True]

    @room.cache.cached("k", ttl=60, swr=600)
    def load() -> int:
        if failing:
            raise LookupError
        return 1

    key, lease = room.keys.entry(b"k"), room.keys.lease(b"k")
    failing.clear()
    load()
    failing.append(True)
    delays = []
    for attempt in range(4):
        age(client, key, 61 if attempt == 0 else 1)
        assert load() == 1
        assert isinstance(dispatch.run_all(room)[0], LookupError)
        _, delay, failures = client.get(lease).split(b".")
        delays.append(int(delay) / 1000)
        assert client.pttl(lease) > FAILURES_KEPT_MS
        assert int(failures) == attempt + 1
        age(client, key, 1)
        load()
        assert dispatch.orders == []  # backing off: nobody asks
        client.pexpire(lease, FAILURES_KEPT_MS)  # the delay has passed
    assert 0 < delays[0] <= 1
    assert delays[3] > delays[0]
    failing.clear()
    age(client, key, 1)
    load()
    assert dispatch.run_all(room) == ["refreshed"]
    assert client.exists(lease) == 0


def test_a_refresh_done_twice_late_or_for_nothing_changes_nothing(
    room: Any, dispatch: Any, client: Any
) -> None:
    """A refresh is done only by the order that its lease names. Any other order does nothing."""
    versions = iter(range(100))

    @room.cache.cached("k", ttl=60, swr=600)
    def load() -> int:
        return next(versions)

    load()
    age(client, room.keys.entry(b"k"), 61)
    load()
    (order,) = dispatch.orders
    assert room.cache.refresh(order)["outcome"] == "refreshed"
    assert room.cache.refresh(order)["outcome"] == "superseded"  # twice
    age(client, room.keys.entry(b"k"), 61)
    load()
    assert (
        room.cache.refresh(order)["outcome"] == "superseded"
    )  # late: another order holds the lease
    late = dispatch.orders[-1]
    room.cache.invalidate("k")
    assert room.cache.refresh(late)["outcome"] == "superseded"
    assert load() == 2


def test_an_order_for_what_is_fresh_again_frees_the_lease(
    room: Any, dispatch: Any, client: Any
) -> None:
    """A worker that comes after the value was renewed does not load, and frees the lease."""
    calls = []

    @room.cache.cached("k", ttl=60, swr=600)
    def load() -> int:
        calls.append(1)
        return 1

    load()
    age(client, room.keys.entry(b"k"), 61)
    load()
    age(client, room.keys.entry(b"k"), -61)
    assert dispatch.run_all(room) == ["not needed"]
    assert client.exists(room.keys.lease(b"k")) == 0
    assert len(calls) == 1


def test_an_order_that_cannot_be_delivered_frees_its_lease(
    room: Any, dispatch: Any, client: Any
) -> None:
    """When the broker is away the stale value is served and the lease is freed, so that the next
    reader asks again.
    """

    @room.cache.cached("k", ttl=60, swr=600)
    def load() -> int:
        return 1

    load()
    age(client, room.keys.entry(b"k"), 61)
    dispatch.broken = True
    assert load() == 1
    assert client.exists(room.keys.lease(b"k")) == 0
    dispatch.broken = False
    assert load() == 1
    assert len(dispatch.orders) == 1
    dispatch.orders.clear()
    dispatch.ready = False
    age(client, room.keys.entry(b"k"), 1)
    client.delete(room.keys.lease(b"k"))
    assert load() == 1
    assert (
        client.exists(room.keys.lease(b"k")) == 0
    )  # known to be away: no lease is taken for nothing


# What is in Redis may be anything


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-1],
        lambda raw: raw[:20],
        lambda raw: b"",
        lambda raw: b"\x00" * 100,
        lambda raw: b'{"foreign": 1}',
        lambda raw: raw.replace(b"k1", b"k2"),
        lambda raw: raw.replace(b"[12]", b"[13]"),
        lambda raw: b"2" + raw[1:],
        lambda raw: raw + b" ",
    ],
)
def test_damaged_bytes_are_a_miss_and_counted(room: Any, client: Any, damage: Any) -> None:
    """Cut, altered or foreign bytes are a counted miss, and the next load repairs them."""
    room.cache.set("k1", [12])
    key = room.keys.entry(b"k1")
    client.set(key, damage(client.get(key)))
    assert room.cache.get("k1") is None
    assert counts(room)["decode_errors"] == 1
    assert room.cache.get_or_set("k1", lambda: [14]) == [14]
    assert room.cache.get("k1") == [14]


def test_another_keys_entry_is_a_miss(room: Any, client: Any) -> None:
    """An entry under another key is a miss, because it carries its own key."""
    room.cache.set("a", "secret of a")
    client.copy(room.keys.entry(b"a"), room.keys.entry(b"b"))
    assert room.cache.get("b") is None


def test_a_decompression_bomb_is_a_miss(room: Any, client: Any) -> None:
    """An entry that would decompress to more than the limit is a miss."""
    import zlib

    from stillroom.cache.entry import body

    room.cache.set("k", 1)
    key = room.keys.entry(b"k")
    front = client.get(key).split(b"\t")[:4]
    bomb = zlib.compress(b'"' + b"x" * 50_000_000 + b'"')
    client.set(key, b"\t".join([*front, body(b"z", b"", b"k", [], bomb)]))
    assert room.cache.get("k") is None
    client.set(key, b"\t".join([*front, body(b"?", b"", b"k", [], b"1")]))
    assert room.cache.get("k") is None
    assert counts(room)["decode_errors"] == 2


def test_another_type_under_the_key_is_a_miss_and_counted(room: Any, client: Any) -> None:
    """A key of another type is a counted miss, and the next load replaces it."""
    client.rpush(room.keys.entry(b"k"), "x")
    assert room.cache.get("k") is None
    assert room.cache.get_or_set("k", lambda: 1) == 1
    assert counts(room)["decode_errors"] == 1
    assert room.cache.get("k") == 1


def test_a_foreign_clock_degrades_and_never_lies(room: Any, client: Any) -> None:
    """With a clock key of another type values are loaded and served, and nothing is stored or believed."""
    room.cache.set("k", "old")
    client.delete(room.keys.clock)
    client.rpush(room.keys.clock, "x")
    assert room.cache.get("k") is None
    assert room.cache.get_or_set("k", lambda: "new") == "new"
    assert room.cache.set("k", "new") is False


@pytest.mark.parametrize("score", ["inf", "-inf", "1.5", "1e300"])
def test_marks_that_no_clock_has_numbered_keep_nobody_from_reading(
    room: Any, client: Any, make_room: Any, score: str
) -> None:
    """Where another program wrote among the marks, values are read and stored, and what is invalidated is gone."""
    room.cache.set_many({"k": 1, "gone": 1}, tags=["t"])
    room.cache.invalidate_by_pattern("gon*")
    client.zadd(room.keys.marks, {"t:other": score, "s:other": score})
    client.zadd(room.keys.globs, {"other*": score})
    client.zadd(room.keys.named, {"k:other": score})
    late = make_room()
    for reader in (room, late):
        found = reader.cache.get_many(["k", "gone"]), reader.cache.get("k", near=2)
        assert found == ({"k": 1}, 1)
    assert late.cache.set("k", 2, tags=["t"])
    assert room.upkeep.explain("k").outcome == "hit"
    room.cache.invalidate_by_tag("t")
    room.upkeep.reclaim()
    assert [reader.cache.get("k") for reader in (room, late, make_room())] == [None] * 3


def test_a_clock_that_was_lost_begins_behind_marks_that_no_clock_has_numbered(
    room: Any, client: Any
) -> None:
    """Where the clock is lost and another program wrote a mark ahead of any clock, values are stored again."""
    client.zadd(room.keys.marks, {"t:other": "1e300"})
    client.delete(room.keys.clock)
    assert room.cache.set("k", 1)
    room.cache.invalidate("other")
    assert room.cache.get("k") == 1


def test_a_stale_value_is_served_whose_source_is_nested_too_deep(room: Any, client: Any) -> None:
    """A stale value whose arguments nobody can read is served, counted, and not refreshed."""

    @room.cache.cached("k:{id}", tags=["t"])
    def load(id: int) -> int:
        return id

    load(1)
    depth = 100_000  # a newer Python reads what is nested less deep
    place = room.keys.entry(b"k:1")
    head, _, rest = client.get(place).partition(b"load {")
    start, _, codec = head.rpartition(b"\t")[0].rpartition(b"\t")
    deep = b'load {"id":' + b"[" * depth + b"]" * depth + b"}" + rest.partition(b"}")[2]
    whole = b"%b\t%b" % (codec, deep)
    fields = [*start.split(b"\t")[:3], b"1", b"%d" % crc32(whole), whole]
    client.set(place, b"\t".join(fields), ex=60)
    assert room.cache.get("k:1") == 1
    assert counts(room)["decode_errors"] == 1
    assert room.upkeep.explain("k:1").outcome == "stale"


@pytest.mark.parametrize("lost", ["clock", "marks", "both", "all"])
def test_lost_clocks_and_marks_are_a_miss(
    room: Any, client: Any, make_room: Any, lost: str
) -> None:
    """When clock or marks were lost, every entry stored before is a miss for every process."""
    other = make_room()
    room.cache.set("k", 1, tags=["t"])
    room.cache.invalidate_by_tag("unrelated")
    assert other.cache.get("k") == 1
    room.cache.invalidate_by_tag("t")
    doomed = {"clock": ["clock"], "marks": ["marks"], "both": ["clock", "marks"], "all": []}[lost]
    client.delete(*[getattr(room.keys, name) for name in doomed]) if doomed else client.flushall()
    room.cache.invalidate_by_tag("another")
    fresh = make_room()
    assert [reader.cache.get("k") for reader in (room, other, fresh)] == [None] * 3
    room.cache.set("k", 2, tags=["t"])
    assert [reader.cache.get("k") for reader in (room, other, fresh)] == [2] * 3


def test_scripts_are_loaded_again_after_a_flush(room: Any, client: Any) -> None:
    """SCRIPT FLUSH costs one more round trip and nothing else."""
    room.cache.set("k", 1)
    client.script_flush()
    assert room.cache.get_or_set("new", lambda: 2) == 2
    client.script_flush()
    room.cache.invalidate_by_tag("t")
    assert room.cache.get("k") == 1


def test_flushdb_in_the_middle_of_a_load_stores_nothing(room: Any, client: Any) -> None:
    """A load that a FLUSHDB interrupts stores nothing, and its caller has the value."""

    def load() -> int:
        client.flushall()
        return 1

    assert room.cache.get_or_set("k", load) == 1
    assert client.keys("*:e:*") == []
    assert room.cache.get_or_set("k", lambda: 2) == 2


# Marks


def test_marks_are_trimmed_only_past_the_longest_life(room: Any, client: Any) -> None:
    """Trimming keeps young marks. An entry older than the trimmed marks is dead without a mark."""
    room.cache.set("k", 1, tags=["t"])
    for n in range(10):
        room.cache.invalidate_by_tag(f"other:{n}")
    assert room.cache.trim_marks()["dropped"] == 0
    ancient = {f"t:old:{n}": n + 1 for n in range(12_000)}
    client.zadd(room.keys.marks, ancient)
    assert room.cache.trim_marks() == {"dropped": 12_000, "left": 14}
    assert room.cache.get("k") == 1
    assert client.zscore(room.keys.marks, "!") is not None


def test_marks_do_not_grow_for_ever_where_nobody_trims_them(room: Any, client: Any) -> None:
    """Each invalidation drops some of the marks that are too old to matter."""
    room.cache.invalidate_by_tag("first")
    client.zadd(room.keys.marks, {f"t:old:{n}": n + 1 for n in range(40)})
    for n in range(40):
        room.cache.invalidate_by_tag(f"new:{n}")
    tags = [member for member in client.zrange(room.keys.marks, 0, -1) if member[:2] == b"t:"]
    assert sorted(tags) == sorted([b"t:first", *[b"t:new:%d" % n for n in range(40)]])


def test_an_entry_older_than_the_trimmed_marks_is_dead(
    room: Any, client: Any, make_room: Any
) -> None:
    """An entry older than the trimmed marks is a miss, because its tags may have been invalidated."""
    room.cache.set("k", 1, tags=["t"])
    room.cache.invalidate_by_tag("other")
    newest = client.zscore(
        room.keys.marks, "~" + client.get(room.keys.clock).decode().partition(".")[0]
    )
    client.zadd(room.keys.marks, {"!": newest})
    assert make_room().cache.get("k") is None


def test_a_process_that_remembers_little_asks_for_the_rest(room: Any, make_room: Any) -> None:
    """A process that keeps fewer marks than there are decides the same, by asking for the tags of old entries."""
    room.cache.set("dead", 1, tags=["t:0"])
    room.cache.set("alive", 2, tags=["never"])
    room.cache.set("soft", 3, ttl=60, tags=["s"])
    for n in range(250):
        room.cache.invalidate_by_tag(f"t:{n}")
    room.cache.invalidate_by_tag("s", soft=True)
    for n in range(150):
        room.cache.invalidate_by_tag(f"u:{n}")
    forgetful = make_room(marks_limit=100)
    for _ in range(2):
        assert forgetful.cache.get("dead") is None
        assert forgetful.cache.get("alive") == 2
        assert forgetful.cache.get_entry("soft").freshness is Freshness.STALE
    room.cache.invalidate_by_tag("never")
    assert forgetful.cache.get("alive") is None


def test_a_new_process_asks_for_few_marks(room: Any, make_room: Any, client: Any) -> None:
    """A new process reads a thousand marks at most, and asks for each tag of older entries once."""
    keys = [f"k:{n}" for n in range(40)]
    for n, key in enumerate(keys):
        room.cache.set(key, n, tags=[f"old:{n}"])
    room.cache.invalidate_by_tag(*[f"old:{n}" for n in range(20)])
    room.cache.invalidate_by_tag("old:20", soft=True)
    for start in range(0, 3_000, 100):
        room.cache.invalidate_by_tag(*[f"x:{n}" for n in range(start, start + 100)])
    make_room().cache.get(keys[0])  # now the server has the scripts
    new = make_room()
    new.stats.due = 1 << 62  # no counts ride along
    before = client.info("stats")["total_net_output_bytes"]
    assert new.cache.get(keys[0]) is None
    brought = client.info("stats")["total_net_output_bytes"] - before
    assert brought < 60_000  # all 3,000 marks would be more than 100,000 bytes
    assert [new.cache.get(key) for key in keys] == [None] * 20 + list(range(20, 40))
    assert new.cache.get_entry(keys[20]).freshness is Freshness.STALE
    assert sent(client, lambda: [new.cache.get(key) for key in keys[21:]]) == ["MGET"] * 19


@pytest.mark.parametrize("is_moving", [False, True])
def test_a_process_far_behind_asks_for_few_marks(
    room: Any, make_room: Any, client: Any, is_moving: bool
) -> None:
    """A process that others leave far behind reads a thousand marks at most, also while they invalidate, and judges
    as one that has read all.
    """
    reader = make_room()
    tags = {"dead": "t", "by tag": "u", "soft": "s", "alive": "v", "by glob:1": "v", "late": "w"}
    for key, tag in tags.items():
        room.cache.set(key, key, tags=[tag], ttl=60)
    room.cache.invalidate_by_tag("t")
    assert [reader.cache.get(key) for key in ("dead", "by glob:1")] == [None, "by glob:1"]
    if is_moving:  # then the marks ride along with each read
        room.cache.invalidate_by_tag("something")
        assert reader.cache.get("alive") == "alive"
    room.cache.invalidate_by_tag("u")
    room.cache.invalidate_by_tag("s", soft=True)
    room.cache.invalidate_by_pattern("by glob:*")
    for start in range(0, 4_000, 100):
        room.cache.invalidate_by_tag(*[f"x:{n}" for n in range(start, start + 100)])
    reader.stats.due = 1 << 62  # no counts ride along
    before = client.info("stats")["total_net_output_bytes"]
    assert reader.cache.get("alive") == "alive"
    brought = client.info("stats")["total_net_output_bytes"] - before
    assert brought < 60_000 * (1 + is_moving)  # all 4,000 marks would be more than 140,000 bytes
    assert [reader.cache.get(key) for key in tags] == [None, None, "soft", "alive", None, "late"]
    assert reader.cache.get_entry("soft").freshness is Freshness.STALE
    room.cache.invalidate_by_tag("w")
    assert reader.cache.get("late") is None


# Bounds


def test_every_key_has_a_ttl_or_a_bound(
    room: Any, dispatch: Any, client: Any, state_client: Any
) -> None:
    """Each key but the clock, the marks and the agreements has a TTL after every operation."""

    @room.cache.cached("k:{n}", ttl=60, swr=60, tags=["t"])
    def load(n: int) -> int:
        return n

    room.cache.set("a", 1, tags=["t"])
    room.cache.get_or_set("b", lambda: 1)
    load(1)
    age(client, room.keys.entry(b"k:1"), 61)
    load(1)
    room.cache.invalidate_by_tag("t", soft=True)
    dispatch.run_all(room)
    room.cache.invalidate_by_tag("t")
    room.cache.invalidate_by_pattern("b*")
    room.cache.invalidate("a")
    room.cache.get_or_set_many(["c", "d"], lambda keys: dict.fromkeys(keys, 1))
    room.cache.flush_stats()
    endless = {key for key in client.scan_iter() if client.pttl(key) < 0}
    endless |= {key for key in state_client.scan_iter() if state_client.pttl(key) < 0}
    assert endless == {room.keys.clock, room.keys.marks, room.keys.globs, room.keys.agreed}


def test_a_glob_in_the_place_of_a_key_is_told_once(room: Any, caplog: Any) -> None:
    """`invalidate("product:*")` forgets that one key. Where it holds nothing, the log says what was meant."""
    invalidation._warn_of_glob.cache_clear()
    room.cache.set("product:7", 1)
    room.cache.set("odd:*", 1)
    assert room.cache.invalidate("odd:*") == 1
    for _ in range(2):
        assert room.cache.invalidate("product:*") == 0
        assert room.cache.invalidate_many(["product:*"]) == {"product:*": False}
    told = [one.getMessage() for one in caplog.records if "as one key" in one.getMessage()]
    assert len(told) == 1
    assert "invalidate_by_pattern('product:*')" in told[0]
    assert room.cache.get("product:7") == 1


def test_what_visitors_type_fills_no_log_with_globs(room: Any, caplog: Any) -> None:
    """Of keys with an asterisk in them, such as those of visitors' searches, a hundred at most are told."""
    invalidation._warn_of_glob.cache_clear()
    room.cache.invalidate(*[f"search:{n}*" for n in range(150)])
    room.cache.invalidate("search:0*", "search:another*")
    assert len(caplog.records) == 100


def test_counts_of_all_processes_add_up(room: Any, make_room: Any, client: Any) -> None:
    """Hits, misses and loads of all processes are added up in the minute's hash, which has a TTL."""
    other = make_room()
    room.cache.get_or_set("k", lambda: 1)
    other.cache.get("k")
    other.cache.get("gone")
    room.cache.flush_stats()
    other.cache.flush_stats()
    total: dict[bytes, int] = {}
    for key in client.keys("stillroom:*stats:*"):
        assert 0 < client.ttl(key) <= 7200
        for field, n in client.hgetall(key).items():
            total[field] = total.get(field, 0) + int(n)
    assert total[b"hits"] == 1
    assert total[b"misses"] == 2
    assert total[b"loads"] == 1


@pytest.mark.parametrize("is_own", [True, False])
def test_a_hit_is_one_round_trip(room: Any, make_room: Any, client: Any, is_own: bool) -> None:
    """A read stays one round trip while others invalidate, because it brings new marks along; its process's own
    marks it knows.
    """
    invalidating = room if is_own else make_room()
    room.cache.set("k", 1, tags=["t"])
    for n in range(2):  # a clock that moves twice has marks ride along
        invalidating.cache.invalidate_by_tag(f"y:{n}")
        room.cache.get("k")  # catches up
    room.stats.due = 1 << 62  # no counts ride along
    with client.monitor() as monitor:
        for n in range(3):
            invalidating.cache.invalidate_by_tag(f"x:{n}")
            assert room.cache.get("k") == 1
        client.echo("done")
        seen = list(takewhile(lambda c: c["command"] != "ECHO done", monitor.listen()))
    names = [c["command"].split()[0] for c in seen if c["client_type"] != "lua"]
    asked = ["EVALSHA", "MGET"] if is_own else ["EVALSHA", "MGET", "ZRANGE"]
    assert [name for name in names if name not in HANDSHAKE] == asked * 3


def test_nothing_of_a_value_or_password_is_logged(room: Any, caplog: Any) -> None:
    """A log line about a bad entry names its key and never its content."""
    room.cache.set("k", "canary-value")
    with caplog.at_level(logging.DEBUG):
        room.cache.get("k", int)
    assert caplog.records
    assert "canary" not in caplog.text


def test_a_full_server_refuses_to_count_and_still_answers(room: Any, client: Any) -> None:
    """A full server may refuse the counts that are sent with a read, and the read still answers."""
    room.cache.set("k", 1)
    room.cache.get("k")
    client.config_set("maxmemory", 1)
    try:
        for _ in range(3):
            room.stats.due = 0
            assert room.cache.get("k") == 1
    finally:
        client.config_set("maxmemory", 0)
    assert counts(room).get("fallbacks", 0) == 0


def test_a_function_that_returns_an_awaitable_is_awaited(room: Any) -> None:
    """A loader that returns an awaitable, such as a lambda around a coroutine, is awaited."""

    async def fetch() -> int:
        return 5

    assert room.cache.get_or_set("k", lambda: fetch()) == 5  # noqa: PLW0108 (as one writes it)
    assert room.cache.get("k") == 5


def test_numbers_json_has_no_word_for_survive(room: Any) -> None:
    """Infinity, which JSON cannot write, comes back as infinity."""
    room.cache.set("k", [float("inf"), -1.5])
    assert room.cache.get("k", list[float]) == [float("inf"), -1.5]


def test_waiting_does_not_use_up_the_call(make_room: Any) -> None:
    """Each look of a waiting caller has a deadline of its own."""
    room = make_room(call_timeout=0.3)

    def wait() -> Any:
        looks, spent = 0, 0.0
        while spent < 0.6:  # together longer than one call may take
            yield Pause(0)
            began = time.perf_counter()
            yield [(b"PING",)]
            spent += time.perf_counter() - began
            looks += 1
        return looks

    assert room.cache._driver.run(wait()) > 1
