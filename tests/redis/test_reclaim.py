"""After an invalidation the memory is reclaimed and nothing alive is touched."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from stillroom import InvalidKey, RedisUnavailable, Settings, Stillroom
from stillroom.cache import Progress, reclaim
from stillroom.cache.ordering import TRIES_LIMIT
from stillroom.cache.reclaim import Run
from stillroom.errors import DispatchFailed
from tests.support.threads import together


def fill(room: Any, count: int, tag: str = "t", prefix: str = "k") -> None:
    room.cache.set_many({f"{prefix}:{n}": n for n in range(count)}, tags=[tag])


def entries(client: Any, room: Any) -> int:
    return len(client.keys(room.keys.entry_prefix + b"*"))


def let_pass(client: Any, room: Any, seconds: float) -> None:
    """Make work that is due in that many seconds due now."""
    for member, due in client.zrange(room.keys.todo, 0, -1, withscores=True):
        client.zadd(room.keys.todo, {member: due - seconds * 1000})


def age_globs(client: Any, room: Any, seconds: float) -> None:
    """Make the invalidated patterns that many seconds older."""
    for key, member in [(room.keys.globs, g) for g in client.zrange(room.keys.globs, 0, -1)]:
        client.zincrby(key, -seconds * 1e6, member)
        client.zincrby(room.keys.marks, -seconds * 1e6, b"p:" + member)
    if client.zscore(room.keys.marks, "?"):
        client.zincrby(room.keys.marks, -seconds * 1e6, "?")


class TestTags:
    def test_what_a_tag_killed_is_deleted_and_the_work_crossed_off(
        self, room: Any, client: Any
    ) -> None:
        """reclaim deletes the entries, the index and the todo line of an invalidated tag, and no other entries."""
        fill(room, 300)
        fill(room, 20, tag="other", prefix="o")
        room.cache.invalidate_by_tag("t")
        assert entries(client, room) == 320
        report = room.cache.reclaim()
        assert report["deleted"] == 300
        assert report["done"] == 1
        assert report["left"] == 0
        assert entries(client, room) == 20
        assert client.exists(room.keys.index(b"t"), room.keys.todo) == 0
        assert room.cache.get("o:3") == 3

    def test_an_entry_written_after_the_invalidation_lives(self, room: Any, client: Any) -> None:
        """An entry that was written after the invalidation lives and stays in the tag's index."""
        fill(room, 10)
        room.cache.invalidate_by_tag("t")
        room.cache.set("k:3", "new", tags=["t"])
        assert room.cache.reclaim()["deleted"] == 9
        assert room.cache.get("k:3") == "new"
        assert client.zrange(room.keys.index(b"t"), 0, -1) == [b"k:3"]

    def test_an_entry_that_lost_the_tag_lives(self, room: Any, client: Any) -> None:
        """An entry that was written again without the tag lives, and the tag's index is mended."""
        fill(room, 2)
        room.cache.set("k:0", "untagged", tags=["tt", "at"])
        room.cache.invalidate_by_tag("t")
        assert room.cache.reclaim()["deleted"] == 1
        assert room.cache.get("k:0") == "untagged"
        assert client.exists(room.keys.index(b"t")) == 0

    @pytest.mark.parametrize("place", ["key", "source"])
    def test_a_tag_that_looks_like_another_part_of_the_header_is_none(
        self, room: Any, client: Any, place: str
    ) -> None:
        """reclaim reads tags only where a header has its tags."""
        if place == "key":
            room.cache.set("t", 1, tags=["x"])
            key = "t"
        else:

            @room.cache.cached("named:{t}", name="t", tags=["x"])
            def load(t: str) -> int:
                return 1

            load("a")
            key = "named:a"
        room.cache.set("dead", 1, tags=["t"])
        client.zadd(room.keys.index(b"t"), {key: 9e15})
        room.cache.invalidate_by_tag("t")
        room.cache.reclaim()
        assert room.cache.get(key) == 1

    def test_an_index_that_is_missing_or_wrong_changes_nothing_but_memory(
        self, room: Any, client: Any
    ) -> None:
        """A missing, foreign or wrong index costs memory and nothing else."""
        for damage in (
            client.delete,
            lambda key: client.set(key, "text"),
            lambda key: client.zadd(key, {"nobody": 9e15, "\x00\xff": 1.0, "k:1": 5.0}),
        ):
            client.flushall()
            fill(room, 3)
            damage(room.keys.index(b"t"))
            room.cache.set("k:9", 9, tags=["t"])
            assert room.cache.get("k:9") == 9
            room.cache.invalidate_by_tag("t")
            assert [room.cache.get(f"k:{n}") for n in (0, 1, 2, 9)] == [None] * 4
            assert room.cache.reclaim()["left"] == 0

    def test_a_header_of_any_length_is_read_whole(self, room: Any) -> None:
        """A header of any length is read whole, with the longest key and more tags than its first piece holds."""
        tags = [f"tag-{n}-{'x' * 40}" for n in range(60)]
        room.cache.set("k" * 1024, 1, tags=[*tags, "last"])
        room.cache.set("alive", 1, tags=tags)
        room.cache.invalidate_by_tag("last")
        assert room.cache.reclaim()["deleted"] == 1
        assert room.cache.get("alive") == 1

    def test_keys_and_tags_of_any_text_are_reclaimed(self, room: Any, client: Any) -> None:
        """Keys and tags with globs, braces, newlines, percent signs and emoji are reclaimed."""
        texts = ["*", "{0}", "a\nb", "%0A", "[a-z]", "\\", "🍯", "a b", "t:", "+sweep", "x" * 1000]
        for text in texts:
            room.cache.set(text, 1, tags=[text])
        for text in texts:
            room.cache.invalidate_by_tag(text)
        assert room.cache.reclaim()["deleted"] == len(texts)
        assert entries(client, room) == 0

    def test_writes_trim_an_index_and_its_life_is_its_longest_entrys(
        self, room: Any, client: Any
    ) -> None:
        """Each write drops two expired members of an index, whose life is that of its longest entry."""
        index = room.keys.index(b"t")
        client.zadd(index, {f"old:{n}": n + 1 for n in range(5)})
        room.cache.set("a", 1, ttl=50, tags=["t"])
        assert client.zcard(index) == 4
        room.cache.set("b", 1, ttl=500, tags=["t"])
        room.cache.set("c", 1, ttl=5, tags=["t"])
        assert {b"a", b"b", b"c"} == set(client.zrange(index, 0, -1))
        assert 490_000 < client.pttl(index) <= 500_000

    def test_indexes_nobody_writes_are_trimmed_by_beat(self, room: Any, client: Any) -> None:
        """beat trims all unused indexes, in one pass or several, and leaves a foreign key alone."""
        for n in range(30):
            client.zadd(room.keys.index(b"t%d" % n), {"old": 1, "young": 9e15})
        client.set(room.keys.index(b"foreign"), "text")
        assert room.cache.trim_indexes(budget=30) == {"indexes": 31, "members": 30}
        assert client.zrange(room.keys.index(b"t3"), 0, -1) == [b"young"]
        assert client.get(room.keys.trimmed).endswith(b" 0")

    def test_a_load_that_ends_after_its_tag_was_invalidated_stores_nothing(
        self, room: Any, client: Any
    ) -> None:
        """A load that ends after its tag was invalidated stores nothing, because reclaim may be done already."""

        def load() -> int:
            other = Stillroom(room.settings)
            other.cache.invalidate_by_tag("t")
            other.close()
            return 1

        assert room.cache.get_or_set("k", load, tags=["t"]) == 1
        assert entries(client, room) == 0
        assert client.exists(room.keys.lease(b"k")) == 0


class TestSweeps:
    def test_a_pattern_and_a_clear_leave_one_sweep(self, room: Any, client: Any) -> None:
        """Any number of patterns and clears leave one sweep."""
        fill(room, 10)
        fill(room, 10, prefix="o")
        for _ in range(3):
            room.cache.invalidate_by_pattern("k:*")
        assert client.zrange(room.keys.todo, 0, -1) == [b"sweep"]
        assert room.cache.reclaim()["deleted"] == 10
        room.cache.clear()
        assert room.cache.reclaim()["deleted"] == 10
        assert entries(client, room) == 0

    def test_a_sweep_takes_what_tags_killed_too(self, room: Any, client: Any) -> None:
        """A sweep deletes entries that tags ended, so that it can stand for all tags when too much work waits."""
        fill(room, 5)
        room.cache.set("alive", 1, tags=["u"])
        room.cache.invalidate_by_tag("t")
        client.delete(room.keys.todo)
        room.cache.invalidate_by_pattern("nothing")
        assert room.cache.reclaim()["deleted"] == 5
        assert room.cache.get("alive") == 1

    def test_too_much_work_becomes_one_sweep(self, room: Any, client: Any) -> None:
        """Too much waiting work becomes one sweep, so that todo does not grow without workers."""
        fill(room, 3)
        room.cache.invalidate_by_tag("t")
        client.zadd(room.keys.todo, {f"t:{n}": 9e15 for n in range(10_000)})
        room.cache.invalidate_by_tag("u")
        assert client.zrange(room.keys.todo, 0, -1) == [b"sweep"]
        assert room.cache.reclaim()["deleted"] == 3

    def test_foreign_keys_under_our_prefix_are_left_alone(self, room: Any, client: Any) -> None:
        """A sweep leaves a list, a text that is no entry, and another key's entry under the prefix alone."""
        fill(room, 2)
        client.rpush(room.keys.entry(b"list"), "x")
        client.set(room.keys.entry(b"text"), "x")
        client.copy(room.keys.entry(b"k:0"), room.keys.entry(b"copy"))
        room.cache.clear()
        assert room.cache.reclaim()["deleted"] == 2
        assert entries(client, room) == 3

    def test_a_pattern_is_dropped_when_swept_and_no_load_can_be_as_old(
        self, room: Any, client: Any
    ) -> None:
        """A pattern is dropped by a sweep after the longest lease, and not by the sweep that follows at once."""
        fill(room, 3)
        room.cache.invalidate_by_pattern("k:*")
        assert room.cache.reclaim()["patterns_dropped"] == 0
        assert client.zrange(room.keys.globs, 0, -1) == [b"k:*"]
        ((member, due),) = client.zrange(room.keys.todo, 0, -1, withscores=True)
        seconds, us = client.time()
        assert member == b"sweep"
        assert 0 <= seconds * 1000 + us // 1000 + room.settings.lease_limit * 1000 + 1 - due < 5_000
        age_globs(client, room, room.settings.lease_limit + 1)
        let_pass(client, room, room.settings.lease_limit)
        assert room.cache.reclaim()["patterns_dropped"] == 1
        assert client.exists(room.keys.globs, room.keys.todo) == 0
        assert client.zscore(room.keys.marks, "?") is None
        assert client.zscore(room.keys.marks, "p:k:*") is None
        room.cache.set("k:1", "new")
        assert room.cache.get("k:1") == "new"
        assert Stillroom(room.settings).cache.get("k:1") == "new"

    def test_a_younger_pattern_keeps_its_mark(self, room: Any, client: Any) -> None:
        """A younger pattern keeps its mark, and with it the time of the newest pattern."""
        room.cache.invalidate_by_pattern("old*")
        age_globs(client, room, room.settings.lease_limit + 1)
        room.cache.set("young", 1)
        room.cache.invalidate_by_pattern("young*")
        report = room.cache.reclaim()
        assert report["patterns_dropped"] == 1
        assert report["left"] == 1
        assert client.zrange(room.keys.globs, 0, -1) == [b"young*"]
        assert client.zscore(room.keys.marks, "?") == client.zscore(room.keys.globs, "young*")
        clock = client.get(room.keys.clock)
        room.cache.invalidate_by_pattern("third")
        assert client.get(room.keys.clock).split(b".")[0] == clock.split(b".")[0]

    def test_a_pattern_outlives_the_work_of_a_tag(self, room: Any, client: Any) -> None:
        """Only a sweep drops a pattern. The work of a tag has not looked at what the pattern ended."""
        room.cache.invalidate_by_pattern("k:*")
        age_globs(client, room, room.settings.lease_limit + 1)
        let_pass(client, room, -60)
        room.cache.invalidate_by_tag("t")
        report = room.cache.reclaim()
        assert (report["done"], report["left"], report["patterns_dropped"]) == (1, 1, 0)
        assert client.zrange(room.keys.globs, 0, -1) == [b"k:*"]
        assert client.zscore(room.keys.marks, "p:k:*") is not None

    def test_a_hundred_patterns_are_one_sweep(self, room: Any) -> None:
        """A hundred patterns are one sweep, and the pattern `*` takes every entry."""
        fill(room, 200)
        for n in range(100):
            room.cache.invalidate_by_pattern(f"k:{n}")
        report = room.cache.reclaim()
        assert (report["done"], report["seen"], report["deleted"]) == (1, 200, 100)
        room.cache.invalidate_by_pattern("*")
        assert room.cache.reclaim()["deleted"] == 100

    def test_a_lost_clock_deletes_nothing(self, room: Any, client: Any) -> None:
        """Without a clock nothing is deleted. The next write begins an epoch and asks for a sweep."""
        fill(room, 3)
        room.cache.invalidate_by_pattern("k:*")
        client.delete(room.keys.clock)
        assert room.cache.reclaim()["deleted"] == 0


class TestRuns:
    """A run has a budget and bites, and the next run goes on where it stopped."""

    def test_a_run_goes_on_where_the_last_one_stopped(
        self, make_room: Callable[..., Stillroom], client: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two runs keep the cursor and the counts, and together look at no more entries than one."""
        room = make_room()
        fill(room, 2_000)
        monkeypatch.setattr(Run, "FIRST", 100)
        monkeypatch.setattr(Run, "LARGEST", 100)
        monkeypatch.setattr(reclaim, "SAVE_EVERY_S", 0.0)
        room.cache.invalidate_by_pattern("k:1*")
        seen: list[int] = []

        def tell(progress: Progress) -> None:
            seen.append(progress.seen)
            if progress.seen > 700:
                monkeypatch.setattr(Run, "left", property(lambda run: 0.0))

        first = room.cache.reclaim(progress=tell)
        monkeypatch.undo()
        assert 700 < first["seen"] < 1_900
        assert client.zrange(room.keys.todo, 0, -1) == [b"+sweep"]
        second = room.cache.reclaim()
        assert first["seen"] + second["seen"] == 2_000
        assert first["deleted"] + second["deleted"] == 1_111

    @pytest.mark.parametrize("how", ["in parts", "put off"])
    def test_what_is_left_of_the_work_has_an_end(
        self, room: Any, client: Any, monkeypatch: pytest.MonkeyPatch, how: str
    ) -> None:
        """What is left to do is not kept for ever, also where it is all there is: its entries end by themselves."""

        def stop(_: Progress) -> None:
            monkeypatch.setattr(Run, "left", property(lambda run: 0.0))

        fill(room, 200)
        room.cache.invalidate_by_tag("t", soft=how == "put off")
        longest = client.pttl(room.keys.todo)
        monkeypatch.setattr(reclaim, "SAVE_EVERY_S", 0.0)
        room.upkeep.reclaim(progress=stop, loads=how != "put off")
        assert client.zrange(room.keys.todo, 0, -1) == [b"+t:t" if how == "in parts" else b"s:t"]
        assert 0 < client.pttl(room.keys.todo) <= longest

    def test_after_a_restart_of_the_server_it_begins_anew(self, room: Any, client: Any) -> None:
        """After a restart of the server a run begins anew, because an old cursor would miss entries."""
        fill(room, 50)
        room.cache.invalidate_by_pattern("*")
        state = Progress(cursor="12345", run="another run", seen=7, deleted=7)
        client.set(room.keys.at(b"sweep"), state.model_dump_json())
        report = room.cache.reclaim()
        assert (report["seen"], report["deleted"]) == (50, 50)

    def test_work_whose_worker_died_is_due_again(self, room: Any, client: Any) -> None:
        """Work whose worker died is due again, because it was only postponed."""
        fill(room, 5)
        room.cache.invalidate_by_tag("t")
        now = room.cache.reclaim  # a worker takes it …
        client.zadd(room.keys.todo, {"t:t": client.zscore(room.keys.todo, "t:t") + 60_000})
        assert now()["done"] == 0  # … and while it is held nobody else does it
        let_pass(client, room, 60)  # the worker died
        assert now()["deleted"] == 5

    def test_a_tag_invalidated_again_while_it_is_reclaimed_is_reclaimed_again(
        self, make_room: Callable[..., Stillroom], client: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A tag that is invalidated again while it is reclaimed is reclaimed again."""
        room, other = make_room(), make_room()
        fill(room, 50)
        room.cache.invalidate_by_tag("t")
        other.cache.set("late", 1, tags=["t"])
        monkeypatch.setattr(reclaim, "SAVE_EVERY_S", 0.0)
        again = iter([True])

        def tell(_: Progress) -> None:
            if next(again, False):
                other.cache.invalidate_by_tag("t")

        report = room.cache.reclaim(progress=tell)
        assert report["deleted"] == 51
        assert report["left"] == 0
        assert entries(client, room) == 0

    def test_a_clear_while_a_sweep_is_under_way_is_swept(
        self, make_room: Callable[..., Stillroom], client: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A clear during a sweep asks for another sweep."""
        room, other = make_room(), make_room()
        fill(room, 500)
        room.cache.invalidate_by_pattern("k:1*")
        monkeypatch.setattr(Run, "FIRST", 20)
        monkeypatch.setattr(Run, "LARGEST", 20)
        monkeypatch.setattr(reclaim, "SAVE_EVERY_S", 0.0)

        cleared: list[Progress] = []

        def tell(progress: Progress) -> None:
            if progress.seen > 200 and not cleared:
                cleared.append(progress)
                other.cache.clear()

        room.cache.reclaim(progress=tell)
        room.cache.reclaim()
        assert cleared
        assert entries(client, room) == 0

    def test_two_workers_at_once_do_no_harm(
        self, make_room: Callable[..., Stillroom], client: Any
    ) -> None:
        """Two workers at once delete everything dead once, keep everything alive, and finish all work."""
        rooms = [make_room() for _ in range(3)]
        for n in range(20):
            fill(rooms[0], 30, tag=f"t{n}", prefix=f"k{n}")
        for n in range(0, 20, 2):
            rooms[0].cache.invalidate_by_tag(f"t{n}")
        rooms[0].cache.invalidate_by_pattern("k1:*")
        reports = together(*[room.cache.reclaim for room in rooms])
        assert sum(report["deleted"] for report in reports) == 330
        assert entries(client, rooms[0]) == 270
        assert client.zrange(rooms[0].keys.todo, 0, -1) == [b"sweep"]  # the pattern's last one

    def test_bites_are_as_large_as_redis_can_do_in_a_moment(self) -> None:
        """A bite shrinks when it held Redis for long, and grows when it did not, however long the way there is."""
        run = Run(20, None)

        def took(us: int, way: float = 0.0) -> float:
            assert run.measure([[b"7", b"999000"], b"x", [b"7", b"%d" % (999_000 + us)]]) == [b"x"]
            return run.took(us / 1e6 + way)

        took(90)
        assert run.bite == 25
        took(90, way=0.3)
        assert run.bite == 31
        took(500)
        assert run.bite == 15
        for _ in range(9):
            took(500)
        assert run.bite == Run.SMALLEST
        for _ in range(99):
            took(90, way=0.3)
        assert run.bite == Run.LARGEST

    def test_pauses_are_slept_once_they_are_long_enough(self) -> None:
        """Pauses are a tenth of the time that bites took. Short ones are put together, long ones are bounded."""
        run = Run(20, None)
        bites = 25
        pauses = [run.took(0.000_4) for _ in range(bites)]
        assert pauses[: bites - 1] == [0.0] * (bites - 1)
        assert pauses[-1] == pytest.approx(Run.PAUSED * bites * 0.000_4)
        assert run.took(0.1) == pytest.approx(Run.PAUSED * 0.1)
        assert run.took(60) == Run.LONGEST

    @pytest.mark.parametrize("kind", ["tag", "sweep", "soft", "indexes"])
    def test_each_kind_of_bite_is_measured(
        self, kind: str, room: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A bite of any kind knows for how long it held Redis: less than it took, and not nothing."""
        fill(room, 30)
        if kind == "tag":
            room.cache.invalidate_by_tag("t")
        elif kind == "sweep":
            room.cache.invalidate_by_pattern("*")
        elif kind == "soft":
            room.cache.invalidate_by_tag("t", soft=True)
        bites: list[tuple[float, float]] = []

        def took(run: Run, seconds: float) -> float:
            bites.append((run.held, seconds))
            return as_it_is(run, seconds)

        as_it_is = Run.took
        monkeypatch.setattr(Run, "took", took)
        (room.cache.trim_indexes if kind == "indexes" else room.cache.reclaim)()
        assert 0 < sum(held for held, _ in bites) < sum(seconds for _, seconds in bites)

    def test_what_holds_redis_in_parts_adds_up(self) -> None:
        """A bite of several batches holds Redis for as long as all of them; a clock put back counts for nothing."""
        run = Run(20, None)
        for began, ended in ((b"0", b"120"), (b"500", b"100"), (b"0", b"120")):
            run.measure([[b"7", began], [b"7", ended]])
        run.took(0.01)
        assert run.bite == 10

    def test_a_bite_that_failed_is_not_held_against_the_next_one(self) -> None:
        """What was measured of a bite that was not answered in time does not make the next one smaller."""
        run = Run(20, None)
        run.bite = Run.LARGEST
        run.measure([[b"7", b"0"], [b"7", b"500"]])
        run.failed(RedisUnavailable("timeout"))
        assert run.bite == Run.LARGEST // 4
        run.measure([[b"7", b"0"], [b"7", b"200"]])
        run.took(0.01)
        assert run.bite == Run.LARGEST // 4

    def test_progress_can_be_seen_by_others(self, room: Any, client: Any) -> None:
        """The progress of work can be read while it waits and while it is done, and not afterwards."""
        fill(room, 30)
        room.cache.invalidate_by_tag("t")
        assert room.cache.pending(b"t:t", b"t:u") == {b"t:t": None}
        told: list[Progress] = []
        room.cache.reclaim(progress=told.append)
        assert told[-1].total == 30
        assert room.cache.pending(b"t:t") == {}
        done = Progress.model_validate_json(client.get(room.keys.at(b"t:t")))
        assert (done.seen, done.deleted, done.done) == (30, 30, True)


class TestSoft:
    def test_entries_with_a_loader_are_loaded_again_the_hottest_first(
        self, room: Any, client: Any
    ) -> None:
        """Invalidated entries with a loader are loaded again, the hottest first, so that no reader waits."""
        loaded: list[int] = []

        @room.cache.cached("n:{n}", swr=100, tags=["t"])
        def load(n: int) -> int:
            loaded.append(n)
            return n * (1 + loaded.count(n))

        for n in range(5):
            load(n)
        room.cache.set("plain", "kept", swr=100, tags=["t"])
        client.config_set("maxmemory-policy", "allkeys-lfu")
        try:
            for n in (2, 4):
                for _ in range(60 * n):
                    client.get(room.keys.entry(b"n:%d" % n))
            room.cache.invalidate_by_tag("t", soft=True)
            loaded.clear()
            loaded += range(5)
            report = room.cache.reclaim()
        finally:
            client.config_set("maxmemory-policy", "noeviction")
        assert report["refreshed"] == 5
        assert sorted(loaded[5:7]) == [2, 4]
        assert room.cache.get_entry("n:3").freshness.value == "fresh"
        assert room.cache.get("n:3") == 9
        assert room.cache.get_entry("plain").freshness.value == "stale"
        assert report["left"] == 0

    @pytest.mark.parametrize(
        "error", [OSError("no database"), RedisUnavailable("refused", "another server of the app")]
    )
    def test_more_than_fit_one_pass_are_loaded_in_several(
        self, room: Any, client: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        """More keys than one pass takes are loaded in several, and a failing loader does not stop the others."""
        monkeypatch.setattr(reclaim, "HOTTEST", 3)
        failing: set[int] = set()

        @room.cache.cached("n:{n}", swr=100, tags=["t"])
        def load(n: int) -> int:
            if n in failing:
                raise error
            return n

        for n in range(8):
            load(n)
        failing.add(5)
        room.cache.invalidate_by_tag("t", soft=True)
        assert room.cache.reclaim()["refreshed"] == 7
        assert room.cache.get_entry("n:5").freshness.value == "stale"
        assert client.exists(room.keys.todo) == 0

    def test_a_run_loads_until_its_time_is_up(
        self, room: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The next run loads what a run had no time for."""
        loaded: list[int] = []

        @room.cache.cached("n:{n}", swr=100, tags=["t"])
        def load(n: int) -> int:
            loaded.append(n)
            if len(loaded) == 5 + 2:
                monkeypatch.setattr(Run, "left", property(lambda run: 0.0))
            return n

        for n in range(5):
            load(n)
        room.cache.invalidate_by_tag("t", soft=True)
        first = room.cache.reclaim()
        assert (first["refreshed"], first["left"]) == (2, 1)
        monkeypatch.undo()
        second = room.cache.reclaim()
        assert (second["refreshed"], second["left"]) == (3, 0)

    def test_a_worker_without_the_loader_leaves_it_to_another(
        self, make_room: Any, client: Any
    ) -> None:
        """A worker of the release before, which lacks a loader, leaves the soft invalidation to one that has it."""
        app, before, after = make_room(), make_room(), make_room()
        values = iter(range(9))
        loads = [
            one.cache.cached("k", ttl=60, swr=600, tags=["t"], name="load")(lambda: next(values))
            for one in (app, after)
        ]
        assert loads[0]() == 0
        app.cache.set("of no loader", 1, tags=["t"])
        app.cache.invalidate_by_tag("t", soft=True)
        assert before.upkeep.reclaim()["left"] == 1
        assert before.upkeep.reclaim()["due"] == 0  # not at once, again and again
        let_pass(client, app, 15)
        report = after.upkeep.reclaim()
        assert (report["refreshed"], report["left"]) == (1, 0)
        assert app.cache.get("k") == 1

    def test_a_loader_that_is_gone_is_not_waited_for_without_end(
        self, room: Any, make_room: Any, client: Any
    ) -> None:
        """Where no worker has the loader the work is given up after some minutes. Reads serve what is stale."""

        def load() -> int:
            return 1

        assert make_room().cache.cached("k", ttl=60, swr=600, tags=["t"])(load)() == 1
        room.cache.invalidate_by_tag("t", soft=True)
        runs = 1
        while room.upkeep.reclaim()["left"]:
            runs += 1
            let_pass(client, room, 300)
        assert runs == 1 + reclaim.LEFT_LIMIT
        assert room.cache.get("k") == 1

    def test_an_index_of_names_whose_entries_are_gone_is_no_hindrance(self, room: Any) -> None:
        """reclaim sends no command for an index whose entries are all gone."""
        room.cache.set("k", 1, tags=["t"])
        room.cache.invalidate("k")
        room.cache.invalidate_by_tag("t", soft=True)
        assert room.cache.reclaim()["left"] == 0


class TestOrders:
    def test_an_order_is_written_down_before_a_task_is_sent_and_carried_out(
        self, room: Any, client: Any, state_client: Any, dispatch: Any
    ) -> None:
        """An order by keys, tags or pattern is stored before its task is sent, and the same order twice is one."""
        fill(room, 4)
        fill(room, 4, tag="u", prefix="o")
        room.cache.set("p:1", 1)
        room.tasks.invalidate_keys("k:0", "k:1")
        room.tasks.invalidate_keys("k:0", "k:1")
        room.tasks.invalidate_tags("u")
        room.tasks.invalidate_pattern("p:*")
        assert state_client.zcard(room.keys.orders) == 3
        assert room.cache.get("k:0") == 0
        assert "stillroom.reclaim" in dispatch.woken
        room.cache.reclaim()
        assert room.cache.get_many(["k:0", "k:1", "k:2", "o:1", "p:1"]) == {"k:2": 2}
        assert client.zrange(room.keys.todo, 0, -1) == [b"sweep"]
        assert state_client.exists(room.keys.orders, room.keys.order_tries) == 0

    def test_a_load_is_ordered_by_the_call_it_is_for(self, room: Any) -> None:
        """An order to load loads the given call, also over a fresh value."""
        values = iter([1, 2])

        @room.cache.cached("n:{n}", tags=["t"])
        def load(n: int) -> int:
            return next(values)

        assert load(7) == 1
        function = getattr(load, "_inner", load)
        room.tasks.load(function, 7)
        assert load(7) == 1
        room.cache.reclaim()
        assert load(7) == 2

    def test_orders_of_any_number_are_split(self, room: Any, state_client: Any) -> None:
        """An order of any size is split: a thousand keys or a hundred tags are one piece."""
        room.tasks.invalidate_keys(*(f"k:{n}" for n in range(2_500)))
        room.tasks.invalidate_tags(*(f"t:{n}" for n in range(101)))
        room.tasks.invalidate_keys()
        assert state_client.zcard(room.keys.orders) == 5
        assert (
            room.cache.reclaim()["done"] == 5 + 101 + 1
        )  # the tags' own work follows, and a first epoch sweeps

    def test_bad_orders_are_refused_at_the_call(self, room: Any, state_client: Any) -> None:
        """A bad order raises at the call, and nothing is stored."""
        with pytest.raises(InvalidKey):
            room.tasks.invalidate_keys("good", "")
        with pytest.raises(InvalidKey):
            room.tasks.invalidate_tags("x" * 1025)
        with pytest.raises(TypeError, match=r"room\.cache\.cached"):
            room.tasks.load(print, 7)

        @room.cache.cached("n:{n}")
        def load(n: int) -> int:
            return n

        function = getattr(load, "_inner", load)
        with pytest.raises(ValueError, match="load: n: Input should be a valid integer"):
            room.tasks.load(function, "seven")
        with pytest.raises(TypeError, match="missing a required argument: 'n'"):
            room.tasks.load(function)
        assert state_client.exists(room.keys.orders) == 0

    @pytest.mark.parametrize(
        "member",
        [
            b"no_such {}",
            b"invalidate_keys not json",
            b"invalidate_keys " + json.dumps({"keys": ["a"], "more": 1}).encode(),
            b"load " + json.dumps({"loader": "nobody", "args": {}}).encode(),
            b"\xff\xfe",
            b"nonsense",
        ],
    )
    def test_an_order_that_never_can_be_carried_out_becomes_a_dead_letter(
        self, room: Any, state_client: Any, member: bytes, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An impossible order is tried later each time, logged, and becomes a dead letter.

        Other work is done at once.
        """
        state_client.zadd(room.keys.orders, {member: 1})
        fill(room, 2)
        room.cache.invalidate_by_tag("t")
        report = room.cache.reclaim()
        assert (report["deleted"], report["left"], report["dead"]) == (2, 1, 0)
        delays = []
        for _ in range(TRIES_LIMIT - 1):
            ((_, due),) = state_client.zrange(room.keys.orders, 0, -1, withscores=True)
            seconds, us = state_client.time()
            delays.append(round((due - seconds * 1e6 - us) / 15e6))
            state_client.zadd(room.keys.orders, {member: 1})
            report = room.cache.reclaim()
        assert delays == [0, 1, 2, 4, 8, 16, 20]
        assert (report["left"], report["dead"]) == (0, 1)
        assert state_client.exists(room.keys.orders, room.keys.order_tries) == 0
        (letter,) = room.state.run(room.dead_letters.list())
        assert (letter.kind, letter.tries) == ("order", TRIES_LIMIT)
        assert letter.reason
        assert "an order failed" in caplog.text

    def test_too_many_orders_are_refused(self, room: Any, state_client: Any) -> None:
        """Too many orders raise at the call and none is dropped. A waiting order may be given again."""
        waiting = {f'invalidate_keys {{"keys":["{n}"]}}': 9e17 for n in range(10_000)}
        state_client.zadd(room.keys.orders, waiting)
        with pytest.raises(DispatchFailed, match="10,000"):
            room.tasks.invalidate_keys("k")
        assert state_client.zcard(room.keys.orders) == 10_000
        room.tasks.invalidate_keys("7")
        assert state_client.zcard(room.keys.orders) == 10_000


@pytest.mark.parametrize("clock", [b"stranger", b"1.2.3", b"a.nan", b"\xff.7"])
def test_a_sweep_ends_under_a_clock_that_somebody_else_wrote(
    room: Any, client: Any, clock: bytes
) -> None:
    """A sweep is done once, and not begun again and again, where the clock can't be read."""
    fill(room, 3)
    room.cache.invalidate_by_pattern("k:*")
    client.set(room.keys.clock, clock)
    report = room.cache.reclaim()
    assert (report["done"], report["due"]) == (1, 0)
    room.cache.invalidate_by_pattern("k:*")
    assert room.cache.reclaim()["due"] == 0
    assert entries(client, room) == 0


def test_every_key_has_an_end(room: Any, client: Any) -> None:
    """Every key of the keyspace has a TTL, except the clock, the marks, the globs and the agreements."""
    random.seed(7)
    fill(room, 20)
    room.cache.get_or_set("x", lambda: 1, tags=["u"])
    room.tasks.invalidate_tags("later")
    room.cache.invalidate_by_tag("t", "v")
    room.cache.invalidate_by_pattern("x*")
    room.cache.trim_indexes()
    room.cache.reclaim()
    room.cache.invalidate_by_tag("u", soft=True)
    endless = {key for key in client.keys("*") if client.ttl(key) == -1}
    assert endless <= {room.keys.clock, room.keys.marks, room.keys.globs, room.keys.agreed}
    assert client.exists(room.keys.todo) == 1


def test_a_lease_may_not_outlive_what_patterns_wait_for(
    make_room: Callable[..., Stillroom],
) -> None:
    """A lease longer than the life of a pattern's mark is refused where it is given."""
    room = make_room()
    with pytest.raises(ValueError, match="lease_limit allows 300 s"):
        room.cache.cached("k:{n}", lease=301)(lambda n: n)
    with pytest.raises(ValueError, match="STILLROOM_LEASE_LIMIT allows 300 s"):
        Settings(lease=400)
