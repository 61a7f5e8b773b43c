"""Sessions and bans are taken along from one server to a cluster, and back."""

from __future__ import annotations

import itertools
import json
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

import redis
import stillroom.moving as moving_module
from stillroom import (
    AUTH,
    NoDispatch,
    RedisUnavailable,
    Settings,
    SettingsError,
    Stillroom,
    StillroomError,
)
from stillroom.cli import app
from stillroom.embedded import EmbeddedServer
from stillroom.errors import SessionStoreUnavailable
from stillroom.moving import ARRIVING, LEFT, SHARDS, Moving, Side, shut_shards
from stillroom.scripts import session_shut
from stillroom.wire import Command, slot_of, words_of
from tests.support.bounded import assert_bounded
from tests.support.celery_process import until
from tests.support.cluster import RedisCluster, begin_move, migrate
from tests.support.crowd import PATIENT
from tests.support.growing import ENDED, Logins
from tests.support.history import stale_reads

IP = "203.0.113.7"
ROOT = Path(__file__).parent.parent.parent
Attempt = Callable[..., Result]
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def old_server(single_server: EmbeddedServer) -> EmbeddedServer:
    """Return the one server that sessions and limits were on, without data."""
    return single_server


@pytest.fixture
def old_settings(old_server: EmbeddedServer) -> Settings:
    return Settings(**PATIENT | {"redis_url": old_server.url})


@pytest.fixture
def old(old_settings: Settings) -> Iterator[Stillroom]:
    """Return a process with the old settings."""
    with Stillroom(old_settings, dispatch=NoDispatch()) as room:
        yield room


@pytest.fixture
def new(settings: Settings) -> Iterator[Stillroom]:
    """Return a process with the settings of the cluster."""
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        yield room


@pytest.fixture(autouse=True)
def bounded(client: Any, old_server: EmbeddedServer) -> Iterator[None]:
    """Check after every test that each key has a TTL, on both sides."""
    yield
    assert_bounded(client)
    with redis.Redis.from_url(old_server.url) as one:
        assert_bounded(one)


def moving(here: Stillroom, there: Stillroom) -> Moving:
    return Moving(Side(here.keys, here.state.run), Side(there.keys, there.state.run))


def begun(here: Stillroom, there: Stillroom) -> Moving:
    """Return a move that has shut the shards there."""
    one = moving(here, there)
    one.begin()
    return one


def move(here: Stillroom, there: Stillroom) -> int:
    """Move everything. Return how many keys were moved."""
    return sum(begun(here, there).shards())


@pytest.fixture
def attempt(
    monkeypatch: pytest.MonkeyPatch,
    settings: Settings,
    old_server: EmbeddedServer,
) -> Attempt:
    """Return a function that runs the command as an operator would."""

    def attempt(*options: str, who: str = "") -> Result:
        monkeypatch.setenv("REDIS_URL", settings.redis_url.replace("redis://", f"redis://{who}"))
        monkeypatch.setenv("STILLROOM_CACHE_URL", str(settings.cache_url))
        monkeypatch.setenv("STILLROOM_BROKER_URL", str(settings.broker_url))
        monkeypatch.setenv("STILLROOM_STATE_CLUSTER", "1")
        before = old_server.url.replace("redis://", f"redis://{who}")
        return CliRunner().invoke(app, ["move-state", "--from", before, *options])

    return attempt


@pytest.fixture
def run(attempt: Attempt) -> Run:
    """Return a function that runs the command to its end, and returns what it says."""

    def run(who: str = "") -> dict[str, Any]:
        result = attempt("--json", who=who)
        assert result.exit_code == 0, result.output
        found: dict[str, Any] = json.loads(result.output)
        return found

    return run


@pytest.mark.parametrize(("side", "name"), [("new", "REDIS_URL"), ("old", "--from")])
def test_a_move_beside_another_one_says_what_may_hold_it(
    side: str, name: str, old: Stillroom, new: Stillroom, attempt: Attempt, run: Run
) -> None:
    """While another move has one of the servers, the same way or the other, or has not been dead for long, the
    command says so and moves nothing.
    """
    session = old.sessions.create("ann")
    with (new if side == "new" else old).lock("stillroom:move-state"):
        result = attempt()
    assert (
        f"another move to or from {name} is under way, or one was killed in the last 30 s"
        in str(result.exception)
    )
    assert old.sessions.get(session.token)
    assert run()["keys"]


def test_a_full_server_can_be_left(
    old: Stillroom, new: Stillroom, old_server: EmbeddedServer, run: Run
) -> None:
    """A server that takes no lock, since its memory is full, keeps nobody from moving away from it."""
    session = old.sessions.create("ann")
    with redis.Redis.from_url(old_server.url) as one:
        one.config_set("maxmemory", 1)
        try:
            run()
        finally:
            one.config_set("maxmemory", 0)
    assert new.sessions.get(session.token)


def test_a_move_that_is_interrupted_says_what_is_unavailable(
    old: Stillroom, new: Stillroom, monkeypatch: pytest.MonkeyPatch, attempt: Attempt, run: Run
) -> None:
    """Whoever presses Ctrl-C amid a move reads how many shards are shut, and what opens them."""
    session = old.sessions.create("ann")
    with monkeypatch.context() as patch:
        patch.setattr(Moving, "_clear", lambda *_: signal.raise_signal(signal.SIGINT))
        result = attempt()
    assert result.exit_code == 130
    assert "the move broke off: 256 shards of sessions did not arrive" in result.stderr
    run()
    assert new.sessions.get(session.token)


def test_everybody_stays_logged_in(old: Stillroom, new: Stillroom, run: Run) -> None:
    """The command takes along sessions with data and lifetime, names before a rotation, devices, and bans."""
    made = [old.sessions.create(f"user:{n}", {"n": n}, tags=["phone"]) for n in range(50)]
    first = old.sessions.create("ann", {"n": 1}, device="a phone")
    second = old.sessions.rotate(first.token)
    old.abuse.ban(IP, 600, "spam")
    old.abuse.ban("198.51.100.0/24", 600)
    found = run()
    assert (found["shards"], found["bans"]) == (len(SHARDS), 2)
    for number, session in enumerate(made):
        there = new.sessions.get(session.token)
        assert there is not None
        assert there.data == {"n": number}
        assert there.ends_by == session.ends_by
    assert new.sessions.get(first.token) is not None
    assert [one.handle for one in new.sessions.list_for_user("ann")] == [second.handle]
    assert new.sessions.destroy_by_tag("phone") == 50
    assert new.limits.check(IP, [AUTH]).banned
    assert new.limits.check("198.51.100.9", [AUTH]).banned
    assert new.abuse.bans()[-1].reason in ("spam", "")
    again = run()
    assert again == {"shards": 0, "keys": 0, "bans": 0}
    assert new.sessions.get(made[0].token) is None


@pytest.fixture
def mover(cluster: RedisCluster, old_server: EmbeddedServer) -> Iterator[str]:
    """Return the login of a user with the rights that docs/explanation/scaling.md gives."""
    page = (ROOT / "docs" / "explanation" / "scaling.md").read_text(encoding="utf-8")
    words = re.findall(r"ACL SETUSER mover (.*)", page)[0].split()
    with redis.Redis.from_url(old_server.url) as one:
        clients = [one, *map(cluster.client, cluster.nodes)]
        for client in clients:
            client.execute_command("ACL", "SETUSER", "mover", *words)
        yield "mover:a-password@"
        for client in clients:
            client.execute_command("ACL", "DELUSER", "mover")


def test_a_user_for_the_move_has_all_rights_it_takes(
    old: Stillroom, new: Stillroom, mover: str, run: Run
) -> None:
    """A user with the rights that the guide gives can move everything."""
    session = old.sessions.create("ann", {})
    old.abuse.ban(IP, 600, "spam")
    assert run(mover)["bans"] == 1
    assert new.sessions.get(session.token) is not None


def test_what_has_ended_stays_ended(old: Stillroom, new: Stillroom) -> None:
    """Revocations that no worker has carried out yet hold on the new server, of a user and of everybody."""
    many = [old.sessions.create("bob", {}) for _ in range(300)]
    one = old.sessions.create("ann", {})
    former = old.sessions.rotate(old.sessions.create("eve", {}).token)
    old.sessions.destroy_for_user("bob")
    old.sessions.destroy(former.token)
    move(old, new)
    assert not any(new.sessions.get(session.token) for session in many)
    assert new.sessions.get(former.token) is None
    assert new.sessions.get(one.token) is not None
    new.sessions.sweep()
    assert new.sessions.count() == 1
    move(new, old)
    old.sessions.destroy_all()
    move(old, new)
    assert new.sessions.get(one.token) is None
    assert new.sessions.get(new.sessions.create("ann", {}).token) is not None


def test_what_is_moved_lives_as_long_as_before(old: Stillroom, new: Stillroom) -> None:
    """Each key arrives with the rest of its lifetime, and an index of several pages with all of its members."""
    sessions = [old.sessions.create("ann", {}) for _ in range(20)]
    one = moving(old, new)
    sides = (one._here, one._there)
    keys = [key for shard in SHARDS for key in moving_module._keys_of(one._here, shard)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moving_module, "PAGE", 1)
        move(old, new)
    here, there = ([int(side.ask([(b"PTTL", key)])[0]) for key in keys] for side in sides)
    assert keys
    assert all(0 < left < ms + 10_000 for left, ms in zip(there, here, strict=True))
    assert {s.handle for s in new.sessions.list_for_user("ann")} == {s.handle for s in sessions}


@pytest.mark.parametrize("why", [LEFT, ARRIVING])
def test_a_shard_that_is_elsewhere_is_not_moved(old: Stillroom, new: Stillroom, why: bytes) -> None:
    """A shard that is shut on both servers is on a third one: the move is refused, and shuts nothing."""
    one = moving(old, new)
    for side in (one._here, one._there):
        side.ask([session_shut([side.keys.revocations(7)], why)])
    with pytest.raises(SettingsError, match="shard 7 of the sessions is on neither"):
        one.begin()
    assert sum(shut_shards(one._here)) == sum(shut_shards(one._there)) == 1


def test_a_shard_that_came_in_part_is_not_opened(
    old: Stillroom, new: Stillroom, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy with fewer sessions than there were ends the move: the shard stays shut, and may be moved again."""
    session, one = old.sessions.create("ann", {}), moving(old, new)
    one.begin()
    with monkeypatch.context() as patch:
        patch.setattr(one, "_copy", lambda shard: 0)
        with pytest.raises(StillroomError, match="did not arrive whole: move again"):
            list(one.shards())
    assert sum(shut_shards(one._there)) > 0
    assert move(old, new) > 0
    assert new.sessions.get(session.token) is not None


def test_a_ban_that_was_lifted_on_the_new_server_is_left_alone(
    old: Stillroom, new: Stillroom, run: Run
) -> None:
    """A move that is repeated bans nobody again whom somebody has let go there meanwhile."""
    old.abuse.ban(IP, 600, "spam")
    assert run()["bans"] == 1
    assert new.abuse.lift(IP)
    assert run()["bans"] == 0
    assert not list(new.abuse.bans())


def test_a_shard_is_open_on_one_side(old: Stillroom, new: Stillroom) -> None:
    """Until it has arrived a shard is unavailable there, and from then on here: nothing is taken for ended."""
    session = old.sessions.create("ann", {"n": 1})
    one = begun(old, new)
    assert old.sessions.get(session.token) is not None
    refused(new, session.token, "are still on their way to this server")
    shards = one.shards()
    while not _is_shut(old, session.token):
        next(shards)
    refused(old, session.token)
    with pytest.raises(SessionStoreUnavailable, match="have moved to another server"):
        old.sessions.get(session.token)
    assert new.sessions.get(session.token) is not None
    assert [*shards]
    assert new.sessions.destroy(session.token)
    refused(old, session.token)


def _is_shut(room: Stillroom, token: str) -> bool:
    key = room.keys.revocations(int(token[:2], 16))
    return _asked(room, (b"ZSCORE", key, LEFT)) is not None


def _asked(room: Stillroom, command: Any) -> Any:
    return Side(room.keys, room.state.run).ask([command])[0]


def refused(room: Stillroom, token: str, why: str = "of this shard") -> None:
    """Check that nothing can be done with a session, and that none can be begun."""
    acts: list[Callable[[], object]] = [
        lambda: room.sessions.get(token),
        lambda: room.sessions.touch(token),
        lambda: room.sessions.update(token, {"n": 2}),
        lambda: room.sessions.rotate(token),
        lambda: room.sessions.destroy(token),
        lambda: room.sessions.list_for_user("ann"),
        lambda: room.sessions.destroy_for_user("ann"),
        room.sessions.destroy_all,
        lambda: room.sessions.create("ann", {}),
        lambda: room.sessions.get(token[:3] + "A" * 43),  # a name that opens nothing
    ]
    for act in acts:
        with pytest.raises(SessionStoreUnavailable, match=why):
            act()


def test_a_logout_that_waits_for_its_shard_holds_nobody_up(old: Stillroom, new: Stillroom) -> None:
    """A logout that is deferred, since its shard is being moved, keeps no other session from its process, on either
    side.
    """
    made = [old.sessions.create(f"user:{n}", {"n": n}) for n in range(64)]
    one = begun(old, new)
    shards = one.shards()
    while not any(_is_shut(old, session.token) for session in made):
        next(shards)
    gone = next(session for session in made if _is_shut(old, session.token))
    stays = [session for session in made if not _is_shut(old, session.token)]
    assert old.sessions.destroy(gone.token, defer=True)
    assert all(old.sessions.get(session.token) for session in stays)
    assert old.sessions.deliver() == 1
    here = [session for session in made if session not in stays and session is not gone]
    assert new.sessions.destroy(stays[0].token, defer=True)
    assert all(new.sessions.get(session.token) for session in here)
    assert sum(shards) > 0
    assert new.sessions.get(stays[1].token) is not None
    assert new.sessions.deliver() == 0
    assert new.sessions.get(stays[0].token) is None


def test_a_sweep_leaves_out_what_is_being_moved(old: Stillroom, new: Stillroom) -> None:
    """A shard that is shut keeps no other one from being swept."""
    for number in range(64):
        old.sessions.create(f"user:{number}", idle=0.001)
    due = old.sessions.count()
    one = begun(old, new)
    shards = one.shards()
    while not (there := _arrived(new)):
        next(shards)
    assert old.upkeep.sweep_sessions()["expired"] == due - there > 0
    assert new.upkeep.sweep_sessions()["expired"] == there
    assert sum(shards) > 0
    assert new.sessions.count() == 0


def _arrived(room: Stillroom) -> int:
    return sum(int(_asked(room, (b"ZCARD", room.keys.due_sessions(shard)))) for shard in SHARDS)


def test_a_move_that_broke_off_is_repeated(old: Stillroom, new: Stillroom) -> None:
    """What has arrived is not moved again, and a copy that was cut short begins anew."""
    made = [old.sessions.create(f"user:{n}", {"n": n}) for n in range(64)]
    one = begun(old, new)
    shards = one.shards()
    while next(shards) == 0 or not any(_is_shut(old, session.token) for session in made[:8]):
        pass
    arrived = [session for session in made if _is_shut(old, session.token)]
    assert new.sessions.destroy(arrived[0].token)
    # The next one breaks off in the middle: shut here, and with a part of its keys there.
    shard = next(int(s.token[:2], 16) for s in made if s not in arrived)
    one._shut(one._here, [shard], LEFT)
    one._copy(shard)
    assert move(old, new) > 0
    assert new.sessions.get(arrived[0].token) is None
    assert all(new.sessions.get(session.token) for session in made if session is not arrived[0])
    assert moving(old, new).begin() == 0


@pytest.mark.parametrize("at", ["a shard", "the middle of one", "a write"])
def test_a_move_that_stood_still_changes_nothing_behind_the_next_one(
    old: Stillroom, new: Stillroom, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """A move that was stopped and goes on behind the next one ends: nobody is back, and nobody is logged out."""
    made = [old.sessions.create(f"user:{n}", {"n": n}) for n in range(8)]
    gone, *living = made
    one = begun(old, new)
    shards = one.shards()

    def the_next_one(*_: Any) -> None:
        monkeypatch.undo()
        move(old, new)
        assert new.sessions.destroy(gone.token)
        new.sessions.update(living[0].token, {"n": "newer"})

    if at == "a shard":
        next(shards)
        the_next_one()
    elif at == "a write":
        ask = Side.ask

        def ask_late(self: Side, commands: Sequence[Command]) -> Any:
            if self.keys is new.keys and any(b"user:1" in words_of(one) for one in commands):
                the_next_one()
            return ask(self, commands)

        monkeypatch.setattr(Side, "ask", ask_late)
    else:
        right = Moving._clear
        monkeypatch.setattr(Moving, "_clear", lambda self, n: (the_next_one(), right(self, n)))
    with pytest.raises(StillroomError, match="another move has gone on with it"):
        list(shards)
    assert new.sessions.get(gone.token) is None
    found = [new.sessions.get(session.token) for session in living]
    assert [one and one.data["n"] for one in found] == ["newer", *range(2, 8)]


@pytest.mark.parametrize("is_whole", [True, False], ids=["moved", "on its way"])
def test_a_slot_that_moves_while_its_shard_is_copied_leaves_no_session_behind(
    old: Stillroom,
    make_room: Callable[..., Stillroom],
    cluster: RedisCluster,
    monkeypatch: pytest.MonkeyPatch,
    is_whole: bool,
) -> None:
    """A SCAN that another node goes on with, or that finds a part of the keys, breaks the move off.

    Once the slot has arrived, the move is repeated and takes everybody along.
    """
    new = make_room(session_shards=1)
    made = [new.sessions.create(f"user:{n}", {"n": n}) for n in range(64)]
    slot = slot_of(new.keys.revocations(0))
    first = cluster.owner(new.keys.revocations(0))
    second = next(node for node in cluster.nodes if node is not first)
    scanning, pages = moving_module._scanning, itertools.count(1)

    def let_it_go() -> None:
        begin_move(cluster, slot, first, second)
        keys, client = cluster.keys_in(slot, first, 1_000), cluster.client(first)
        migrate(cluster, first, second, [key for key in keys if client.type(key) == b"hash"][:40])
        if is_whole:
            cluster.reshard(slot, second)

    def scanning_while_it_moves(side: Side, shard: int, *page: Any) -> list[Command]:
        if shard == 0 and side.keys is new.keys and next(pages) == (3 if is_whole else 2):
            let_it_go()
        return scanning(side, shard, *page)

    with monkeypatch.context() as patch:
        patch.setattr(moving_module, "SCANNED", 10)
        patch.setattr(moving_module, "_scanning", scanning_while_it_moves)
        with pytest.raises((StillroomError, RedisUnavailable)):
            move(new, old)
    if not is_whole:
        cluster.reshard(slot, second)
    move(new, old)
    assert sum(old.sessions.get(session.token) is not None for session in made) == len(made)
    cluster.reshard(slot, first)


def test_a_move_is_turned_back(old: Stillroom, new: Stillroom) -> None:
    """Moving the other way brings back what has arrived, opens what has not, and revives none that ended."""
    made = [old.sessions.create(f"user:{n}", {"n": n}) for n in range(64)]
    one = begun(old, new)
    shards = one.shards()
    while sum(_is_shut(old, session.token) for session in made) < 2:
        next(shards)
    changed, gone, *_ = [session for session in made if _is_shut(old, session.token)]
    new.sessions.update(changed.token, {"n": -1})
    new.sessions.destroy(gone.token)
    shard = next(int(s.token[:2], 16) for s in made if not _is_shut(old, s.token))
    one._shut(one._here, [shard], LEFT)
    move(new, old)
    living = [session for session in made if session is not gone]
    assert {old.sessions.get(session.token) is not None for session in living} == {True}
    back = old.sessions.get(changed.token)
    assert back is not None
    assert back.data == {"n": -1}
    assert old.sessions.get(gone.token) is None
    refused(new, changed.token)
    move(old, new)
    assert all(new.sessions.get(session.token) for session in living)
    assert new.sessions.get(gone.token) is None


def test_a_move_that_broke_off_is_turned_back_before_it_goes_elsewhere(
    old: Stillroom, new: Stillroom, settings: Settings
) -> None:
    """A shard that has left for one server is not taken for one that arrived on another: its sessions would end."""
    made = [old.sessions.create(f"user:{n}") for n in range(30)]
    with EmbeddedServer() as third:
        places = settings.model_copy(update={"redis_url": third.url, "state_cluster": False})
        with Stillroom(places, dispatch=NoDispatch()) as elsewhere:
            broken = begun(old, elsewhere)
            next(broken.shards())
            with pytest.raises(SettingsError, match=r"1 shard of the sessions left .*Turn it back"):
                move(old, new)
            move(elsewhere, old)
    move(old, new)
    assert all(new.sessions.get(one.token) for one in made)


def test_a_server_is_not_moved_to_itself(old: Stillroom, old_settings: Settings) -> None:
    """One server under two names is refused before anything is lost, and stays open."""
    session = old.sessions.create("ann", {})
    with Stillroom(old_settings, dispatch=NoDispatch()) as same:
        with pytest.raises(SettingsError, match="the same server"):
            move(old, same)
        assert same.sessions.get(session.token) is not None


def test_sessions_in_use_are_not_replaced_by_mistake(old: Stillroom, new: Stillroom) -> None:
    """A move that takes one server for the other is refused before it ends anybody's session; with `replace` it
    is not.
    """
    made = [old.sessions.create(f"user:{n}", {"n": n}) for n in range(20)]
    with pytest.raises(SettingsError, match="20, and 0 on the other one"):
        moving(new, old).begin()
    assert all(old.sessions.get(session.token) for session in made)
    assert all(new.sessions.get(session.token) is None for session in made)
    early = new.sessions.create("ann", {})
    with pytest.raises(SettingsError, match="1, and 20 on the other one"):
        moving(old, new).begin()
    assert new.sessions.get(early.token) is not None
    one = moving(old, new)
    one.begin(replace=True)
    assert sum(one.shards()) > 0
    assert all(new.sessions.get(session.token) for session in made)
    assert new.sessions.get(early.token) is None


def in_an_old_process(monkeypatch: pytest.MonkeyPatch, old_server: EmbeddedServer) -> None:
    """Set the environment of an old process, which knows one server for everything."""
    for name in ("STILLROOM_CACHE_URL", "STILLROOM_BROKER_URL", "STILLROOM_STATE_CLUSTER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("REDIS_URL", old_server.url)


def test_the_way_back_takes_the_settings_of_an_old_process(
    old: Stillroom,
    new: Stillroom,
    settings: Settings,
    old_server: EmbeddedServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sessions are moved back from the cluster in the environment of an old process."""
    session = old.sessions.create("ann", {})
    move(old, new)
    in_an_old_process(monkeypatch, old_server)
    back = CliRunner().invoke(app, ["move-state", "--from", settings.redis_url, "--from-cluster"])
    assert back.exit_code == 0, back.output
    assert old.sessions.get(session.token) is not None


@pytest.mark.parametrize(
    ("before", "more", "sentence"),
    [
        ("localhost:6379", [], "--from='localhost:6379': a Redis URL starts with one of"),
        ("redis://127.0.0.1:1", [], "nothing answers at the address in --from"),
        ("redis://:wrong@{server}", [], "Correct user and password in --from"),
        ("redis://{server}", ["--from-cluster"], "leave --from-cluster out"),
        ("redis://{node}", [], "add --from-cluster"),
    ],
)
def test_a_mistake_about_the_old_server_is_told_by_the_option(
    before: str,
    more: list[str],
    sentence: str,
    settings: Settings,
    old_server: EmbeddedServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is wrong with the server that is left is not told as being wrong with REDIS_URL."""
    places = {
        "server": old_server.url.partition("://")[2],
        "node": settings.redis_url.partition("://")[2],
    }
    in_an_old_process(monkeypatch, old_server)
    monkeypatch.setenv("REDIS_URL", f"{old_server.url}/1")
    told = CliRunner().invoke(app, ["move-state", "--from", before.format(**places), *more])
    assert isinstance(told.exception, StillroomError)
    assert sentence in str(told.exception)
    assert "REDIS_URL" not in str(told.exception)


def test_one_server_under_two_names_is_no_move_under_way(
    old: Stillroom, old_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that is given one server twice says so, and does not tell of another move."""
    session = old.sessions.create("ann", {})
    in_an_old_process(monkeypatch, old_server)
    named = old_server.url.replace("127.0.0.1", "localhost")
    told = CliRunner().invoke(app, ["move-state", "--from", named])
    assert isinstance(told.exception, SettingsError)
    assert "are the same server" in str(told.exception)
    assert "broke off" not in told.output
    assert old.sessions.get(session.token) is not None


def test_nothing_is_shut_for_a_user_who_may_not_scan(
    old: Stillroom, new: Stillroom, old_server: EmbeddedServer
) -> None:
    """A right that is missing is found out before any session is unavailable."""
    session = old.sessions.create("ann", {})
    with redis.Redis.from_url(old_server.url) as one:
        one.execute_command("ACL", "SETUSER", "default", "-scan")
        try:
            with pytest.raises(RedisUnavailable, match="scan"):
                moving(old, new).begin()
        finally:
            one.execute_command("ACL", "SETUSER", "default", "+scan")
    assert old.sessions.get(session.token) is not None
    assert new.sessions.get(session.token) is None


def test_the_new_server_learns_how_many_shards_there_are(
    old_settings: Settings, new: Stillroom, old_server: EmbeddedServer
) -> None:
    """Acts on all of a user's sessions reach those in shards that no process has any more."""
    with Stillroom(
        old_settings.model_copy(update={"session_shards": 200}),
        dispatch=NoDispatch(),
    ) as old:
        made = [old.sessions.create(f"user:{n}", {}, tags=["phone"]) for n in range(60)]
        move(old, new)
    assert new.sessions.destroy_by_tag("phone") == 60
    assert not any(new.sessions.get(session.token) for session in made)


def test_devices_are_taken_along_where_nobody_is_logged_in(
    old: Stillroom, new: Stillroom, old_server: EmbeddedServer
) -> None:
    """A shard is known to have keys for as long as it knows devices, which is longer than sessions live."""
    session = old.sessions.create("ann", {}, device="a phone")
    shard = int(session.token[:2], 16)
    old.sessions.destroy(session.token)
    with redis.Redis.from_url(old_server.url) as one:
        (devices,) = one.scan_iter(b"*:d:*")
        assert one.pttl(old.keys.session_stamps(shard)) >= one.pttl(devices)
    move(old, new)
    told: list[str] = []
    new.sessions.on_event.append(lambda event: told.append(event.kind))
    new.sessions.create("ann", {}, device="a phone")
    new.sessions.create("ann", {}, device="a desk")
    assert told == ["new_device"]


def test_a_shard_is_shut_on_as_many_replicas_as_acts_wait_for(
    old: Stillroom, new: Stillroom, old_settings: Settings
) -> None:
    """Where a failover could open a shard again it is not copied: the sessions would live on both sides."""
    session = old.sessions.create("ann", {"n": 1})
    one = begun(old, new)
    key = old.keys.revocations(SHARDS[-1])
    Side(old.keys, old.state.run).ask([session_shut([key], LEFT), (b"ZREM", key, LEFT)])
    one._here = one._here._replace(replicas=1)  # it has lost it since
    with pytest.raises(StillroomError, match="0 of 1 replicas"):
        [*one.shards()]
    assert old.sessions.get(session.token) is not None or _is_shut(old, session.token)
    move(old, new)
    assert new.sessions.get(session.token) is not None


def test_a_server_without_replicas_is_moved_from_once_that_is_said(
    old: Stillroom, new: Stillroom, attempt: Attempt
) -> None:
    """Too few replicas are found out before anything is shut, and `--from-replicas` says how many there are."""
    session = old.sessions.create("ann", {"n": 1})
    with pytest.raises(SettingsError, match="0 of 1 replicas"):
        Moving(Side(old.keys, old.state.run, 1), Side(new.keys, new.state.run)).begin()
    with pytest.raises(SettingsError, match="0 of 1 replicas"):
        Moving(Side(old.keys, old.state.run), Side(new.keys, new.state.run, 1)).begin()
    assert shut_shards(Side(old.keys, old.state.run)) == (0, 0)
    assert shut_shards(Side(new.keys, new.state.run)) == (0, 0)
    said = attempt("--from-replicas", "1")
    assert "0 of 1 replicas" in str(said.exception or said.output)
    assert attempt("--from-replicas", "0").exit_code == 0
    assert new.sessions.get(session.token) is not None


def test_nobody_is_back_while_everybody_moves(
    old_settings: Settings,
    settings: Settings,
    cluster: RedisCluster,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Old and new processes go on while sessions move, there and back: none is back after its end, none lost."""
    with (
        Stillroom(old_settings, dispatch=NoDispatch()) as here,
        Stillroom(settings, dispatch=NoDispatch()) as there,
    ):
        moving(here, there).begin()
        with Logins([old_settings, settings]) as logins:
            for source, target in ((here, there), (there, here), (here, there)):
                seen = len(logins.reads)
                until(lambda: len(logins.reads) > seen + 200, "reads")  # noqa: B023
                one = begun(source, target)
                for _ in islice(one.shards(), old_settings.session_shards):
                    seen = len(logins.reads) + logins.refused
                    until(lambda: len(logins.reads) + logins.refused > seen, "calls")  # noqa: B023
                [*one.shards()]
            seen = len(logins.reads)
            until(lambda: len(logins.reads) > seen + 200, "reads")
            logins.read_again()
    with capsys.disabled():
        print(f"\n{len(logins.reads):,} reads, {logins.ends} ends, {logins.refused} refused")
    assert stale_reads(logins.reads, logins.floors) == []
    assert logins.lost == []
    assert logins.ends > 0
    assert all(read.version < ENDED for read in logins.reads)
