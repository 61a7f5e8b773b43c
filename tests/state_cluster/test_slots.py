"""A check over several slots, slots that move, and nodes that are away."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from stillroom import AUTH, DEFAULT, Limit, NoDispatch, RedisUnavailable, Settings, Stillroom
from stillroom.abuse import spreading
from stillroom.embedded import EmbeddedServer
from stillroom.errors import SessionStoreUnavailable
from stillroom.keys import HOUSE, Keys
from stillroom.limits.over_shards import HELD_MS
from stillroom.limits.settling import BITE
from stillroom.operation import Operation
from stillroom.scripts import ban_spread
from stillroom.wire import Command, slot_of
from tests.support.celery_process import until
from tests.support.cluster import HURRIED, NODES, RedisCluster, begin_move, give_away, migrate
from tests.support.crowd import PATIENT, Crowd
from tests.support.entries import Recording
from tests.support.faces import FACES, open_room
from tests.support.limits import forget_denials
from tests.support.processes import Program
from tests.support.sessions import record_of
from tests.support.threads import repeated

pytestmark = pytest.mark.usefixtures("bounded")
IP = "203.0.113.7"
KEYS = Keys("stillroom", state_in_cluster=True)
BY_USER = Limit("by-user", 5, 300, by="user", away="strict")
Make = Callable[..., Stillroom]


def home_of_ip(ip: str = IP) -> bytes:
    return KEYS.home("ip", ip)


def ip_on(cluster: RedisCluster, node: EmbeddedServer, *, other: bool = False) -> str:
    """Return an address whose limits are on this node, or on another one."""
    addresses = (f"198.51.100.{number}" for number in range(256))
    return next(ip for ip in addresses if (cluster.owner(home_of_ip(ip)) is node) is not other)


# Over two slots


@pytest.mark.parametrize("quotas", [(500, 500), (500, 5_000), (5_000, 500)])
def test_many_processes_admit_exactly_the_quota_of_two_kinds(
    places: dict[str, Any], server: EmbeddedServer, quotas: tuple[int, int], make_room: Make
) -> None:
    """Four processes with 16 threads each want 1,280 hits by address and by user, and together get the quota."""
    parts = make_room()._limits_body._requests.make(
        {"ip": IP, "user": "ann"}, [AUTH, BY_USER], 1, ""
    )
    assert len(parts.parts) == 2, "both limits are in one slot"
    crowd = Crowd(server.url)
    source = f"""
        from tests.support.crowd import hit_by_two_kinds
        hit_by_two_kinds({server.url!r}, {places!r}, 16, 20, {quotas!r})
    """
    with ExitStack() as stack:
        programs = [stack.enter_context(Program(source, within=90)) for _ in range(4)]
        crowd.await_ready(64)
        crowd.give("go", 64)
        admitted = [int(program.read_word("admitted ")) for program in programs]
    crowd.close()
    assert sum(admitted) == min(quotas)


def test_a_denial_by_one_kind_is_given_back_to_the_other(room: Any) -> None:
    """What a denied request consumed in another slot is there again when the decision returns."""
    for _ in range(5):
        assert room.limits.check({"ip": IP, "user": "ann"}, [DEFAULT, BY_USER])
    for _ in range(3):
        forget_denials(room)
        denied = room.limits.check({"ip": IP, "user": "ann"}, [DEFAULT, BY_USER])
        assert [limit.name for limit in denied.violated] == ["by-user"]
        assert denied.standings[-1].remaining in (95, 0)
    assert room.limits.peek(IP, [DEFAULT]).remaining == 95


def test_the_headers_are_those_of_one_server(room: Any) -> None:
    """An admitted request has the standing of every limit, whatever slot it is in."""
    decision = room.limits.check({"ip": IP, "user": "ann"}, [DEFAULT, BY_USER])
    assert {one.limit.name: one.remaining for one in decision.standings} == {
        "default": 99,
        "by-user": 4,
    }


def test_a_ban_of_the_address_consumes_nothing_of_the_user(room: Any) -> None:
    """The address's slot is asked first, so a banned client uses up nobody's quota."""
    room.abuse.ban(IP, 60)
    assert room.limits.check({"ip": IP, "user": "ann"}, [DEFAULT, BY_USER]).banned
    assert room.limits.peek({"ip": "198.51.100.1", "user": "ann"}, [BY_USER]).remaining == 5


def test_a_ban_of_a_network_holds_in_all_slots(make_room: Make) -> None:
    """A network's addresses are in many slots; its ban holds in each, and ends in each."""
    room, other = make_room(), make_room()
    addresses = [f"203.0.113.{number}" for number in range(0, 256, 5)]
    assert len({home_of_ip(ip) for ip in addresses}) > 20
    room.abuse.ban("203.0.113.0/24", 60)
    for one in (room, other):
        assert all(one.limits.check(ip, [DEFAULT]).banned for ip in addresses)
    room.abuse.lift("203.0.113.0/24")
    for one in (room, other):
        forget_denials(one)
        assert not any(one.limits.check(ip, [DEFAULT]).banned for ip in addresses)


def test_a_ban_that_a_shard_missed_is_written_again(
    make_room: Make, client: Any, monkeypatch: pytest.MonkeyPatch, rules: Path
) -> None:
    """A rule's ban whose shard was away holds there once workers have looked again, and a lifted one does not.

    Another program's words among the bans change nothing.
    """
    room = make_room(abuse_rules=rules)
    for number in range(25):
        assert room.abuse.report("not_found", ip=IP, route=f"/{number}")
    with monkeypatch.context() as patch:
        patch.setattr(spreading, "_spreading", shard_is_away)
        assert room.abuse.scan()["bans"] == 1
    assert not room.limits.check(IP, [DEFAULT]).banned
    client.zadd(KEYS.bans, {"no network": 9e12, b"\xff": 9e12})
    room._abuse_body._spreads_at = 0.0
    room.abuse.scan()
    assert room.limits.check(IP, [DEFAULT]).banned
    assert room.abuse.lift(IP)
    forget_denials(room)
    room._abuse_body._spreads_at = 0.0
    room.abuse.scan()
    assert not room.limits.check(IP, [DEFAULT]).banned


def test_a_late_copy_of_a_lifted_ban_does_not_hold(room: Any, client: Any) -> None:
    """What a worker read before a ban was lifted, and writes after it, bans nobody."""
    room.abuse.ban(IP, 60)
    text = client.get(KEYS.ban(IP))
    room.abuse.lift(IP)
    home = home_of_ip()
    keys = [KEYS.ban_at(home, IP), KEYS.widths(home), KEYS.lifted_at(home, IP)]
    assert room.state.run(sending(ban_spread(keys, text, 60_000, "", ""))) == [0]
    forget_denials(room)
    assert not room.limits.check(IP, [DEFAULT]).banned


def test_a_ban_holds_though_the_clock_stepped_back_behind_a_lift(room: Any, client: Any) -> None:
    """An operator's ban holds in each shard, also where an earlier one was lifted by a clock that stood ahead."""
    network = "203.0.113.0/24"
    for subject in (IP, network):
        room.abuse.ban(subject, 60)
        assert room.abuse.lift(subject)
        ahead = int(client.get(KEYS.ban_lifted(subject))) + 600_000
        for key in [KEYS.ban_lifted(subject), *client.keys(f"*:{subject}}}:!lifted")]:
            client.set(key, ahead, keepttl=True)
        forget_denials(room)
        assert not room.limits.check(IP, [DEFAULT]).banned
        room.abuse.ban(subject, 60)
        assert room.limits.check(IP, [DEFAULT]).banned
        room.abuse.lift(subject)


def test_a_ban_whose_shard_is_away_is_not_lifted_by_half(
    make_room: Make, cluster: RedisCluster
) -> None:
    """A lift that can't end a ban in its shard lifts nothing: the ban stays on the list, and a next try ends it."""
    room, other = make_room(**HURRIED), make_room()
    home = cluster.owner(HOUSE)
    ip = ip_on(cluster, home, other=True)
    shard = cluster.owner(home_of_ip(ip))
    room.abuse.ban(ip, 3_600)
    with cluster.frozen(shard), pytest.raises(RedisUnavailable):
        room.abuse.lift(ip)
    until(lambda: other.limits.check(ip, [DEFAULT]).banned, "the shard")
    assert [ban.subject for ban in other.abuse.bans()] == [ip]
    assert other.abuse.lift(ip)
    forget_denials(other)
    assert not other.limits.check(ip, [DEFAULT]).banned
    assert other.abuse.bans() == []


def sending(command: Command) -> Operation[list[Any]]:
    return (yield [command])


def shard_is_away(*_: Any) -> Any:
    raise RedisUnavailable("breaker", "timeout")


def test_a_reservation_over_slots_is_settled_once(room: Any) -> None:
    """A refund gives back what is in each slot, once; a committed reservation stays."""
    subject, limits = {"ip": IP, "user": "ann"}, [AUTH, BY_USER]
    held = room.limits.reserve(subject, limits)
    assert (room.limits.refund(held), room.limits.refund(held)) == (True, False)
    assert room.limits.peek(subject, limits).remaining == 5
    kept = room.limits.reserve(subject, limits)
    assert (room.limits.commit(kept), room.limits.refund(kept)) == (True, False)
    assert room.limits.peek(subject, limits).remaining == 4


def test_what_a_check_holds_for_a_moment_is_not_kept(room: Any, client: Any) -> None:
    """The notes that let a check be given back in one slot are gone after two seconds."""
    assert room.limits.check({"ip": IP, "user": "ann"}, [AUTH, BY_USER])
    notes = client.keys("*!held}*")
    assert len(notes) == 1
    assert client.pttl(notes[0]) <= HELD_MS


# When slots move


def test_a_slot_that_has_moved_is_followed(room: Any, cluster: RedisCluster) -> None:
    """The quota, the sessions and the bans of a slot go on where it has moved to."""
    room.limits.check(IP, [AUTH], cost=3)
    session = room.sessions.create("ann", {"n": 1})
    shard = KEYS.due_sessions(int(session.token[:2], 16))
    for key in (home_of_ip(), shard):
        slot, old = slot_of(key), cluster.owner(key)
        new = next(node for node in cluster.nodes[:NODES] if node is not old)
        give_away(cluster, slot, old, new, keys_in(cluster, slot, old))
        try:
            assert room.limits.check(IP, [AUTH], cost=0).remaining == 2
            assert room.sessions.get(session.token).data == {"n": 1}
        finally:
            give_away(cluster, slot, new, old, keys_in(cluster, slot, new))
    assert room.limits.check(IP, [AUTH], cost=2)
    forget_denials(room)
    assert not room.limits.check(IP, [AUTH])
    assert room.sessions.destroy(session.token)


@pytest.mark.parametrize("face", FACES)
def test_a_node_without_its_files_takes_no_other_node_away(settings: Settings, face: str) -> None:
    """A node that came back empty is in no cluster and names no slots: the other nodes are believed, and go on."""
    empty = EmbeddedServer(options={"cluster-enabled": "yes"})
    with open_room(face, settings, Recording()) as room, empty:
        session = room.sessions.create("ann", {})
        topology = getattr(room, "inner", room).state_wire.topology
        topology._nodes = (("127.0.0.1", empty.port), *topology.nodes)  # it is asked first
        topology._is_doubted, topology._ask_at = True, 0.0
        assert room.sessions.get(session.token) is not None
        assert len(topology.owners) == NODES


def gone_ahead(cluster: RedisCluster, key: bytes) -> tuple[int, EmbeddedServer, EmbeddedServer]:
    """Send the keys of this key's slot to another node, which does not own it yet.

    Return the slot, and both nodes.
    """
    slot, old = slot_of(key), cluster.owner(key)
    new = next(node for node in cluster.nodes[:NODES] if node is not old)
    begin_move(cluster, slot, old, new)
    migrate(cluster, old, new, keys_in(cluster, slot, old))
    return slot, old, new


def test_a_slot_on_its_way_is_redis_being_away(room: Any, cluster: RedisCluster) -> None:
    """While keys of a slot are on two nodes its subjects are decided here, and its sessions are unavailable."""
    room.limits.check(IP, [AUTH], cost=3)
    session = room.sessions.create("ann", {"n": 1})
    shard = KEYS.due_sessions(int(session.token[:2], 16))
    for key in (home_of_ip(), shard):
        slot, old, new = gone_ahead(cluster, key)
        if key is shard:
            with pytest.raises(SessionStoreUnavailable):
                room.sessions.get(session.token)
        else:
            decisions = [room.limits.check(IP, [AUTH]) for _ in range(5)]
            assert {one.degraded for one in decisions if one} <= {"tryagain"}
            assert sum(map(bool, decisions)) <= 2
        cluster.move(slot, new)
        assert room.sessions.get(session.token) is not None
        give_away(cluster, slot, new, old, keys_in(cluster, slot, new))
    forget_denials(room)
    assert not room.limits.check(IP, [AUTH], cost=3)


def test_a_slot_that_two_nodes_send_to_each_other_is_on_its_way(
    room: Any, cluster: RedisCluster
) -> None:
    """Between two steps of a move neither node owns the slot. Redis is away then, and nothing is misconfigured."""
    room.limits.check(IP, [AUTH], cost=3)
    session = room.sessions.create("ann", {"n": 1})
    shard = KEYS.due_sessions(int(session.token[:2], 16))
    for key in (home_of_ip(), shard):
        slot, old, new = gone_ahead(cluster, key)
        cluster.client(old).execute_command("CLUSTER SETSLOT", slot, "NODE", cluster.id_of(new))
        if key is shard:
            with pytest.raises(SessionStoreUnavailable, match="tryagain"):
                room.sessions.get(session.token)
        else:
            assert room.limits.check(IP, [AUTH]).degraded == "tryagain"
            assert codes(room).isdisjoint({"degraded"})
        cluster.move(slot, new)
        assert room.sessions.get(session.token) is not None
        give_away(cluster, slot, new, old, keys_in(cluster, slot, new))


def codes(room: Any) -> set[str]:
    return {one.code for one in room.health.check().advice}


def test_no_quota_is_exceeded_while_slots_move(make_room: Make, cluster: RedisCluster) -> None:
    """While the slots of address and user go from node to node under load, no more than the quota is admitted."""
    quota = Limit("by-user", 200, 3_600, by="user", away="strict")
    rooms = [make_room(limits_strict_503=True) for _ in range(2)]
    part = rooms[0]._limits_body._requests.make({"ip": IP, "user": "ann"}, [quota], 1, "")
    slots = [slot_of(key) for key in part.logs]
    admitted: list[int] = []
    with hammering(rooms, [Limit("crowd", 5_000, 3_600), quota], admitted):
        for _ in range(10):
            for slot, key in zip(slots, part.logs, strict=True):
                old = cluster.owner(key)
                new = next(node for node in cluster.nodes[:NODES] if node is not old)
                begin_move(cluster, slot, old, new)
                while keys := keys_in(cluster, slot, old):
                    migrate(cluster, old, new, keys)
                cluster.move(slot, new)
    assert 0 < len(admitted) <= 200
    for slot, key in zip(slots, part.logs, strict=True):
        home = next(node for node in cluster.nodes[:NODES] if slot in slots_of(cluster, node))
        if (old := cluster.owner(key)) is not home:
            give_away(cluster, slot, old, home, keys_in(cluster, slot, old))


def test_no_session_is_back_after_its_end_while_slots_move(
    make_room: Make, cluster: RedisCluster
) -> None:
    """Sessions that ended while their slot moved stay ended, and those that live are found again."""
    room = make_room(session_shards=1)
    key = KEYS.due_sessions(0)
    slot, home = slot_of(key), cluster.owner(key)
    for _ in range(5):
        kept = [room.sessions.create("kept", {"n": n}) for n in range(5)]
        ended = [room.sessions.create("ended", {"n": n}) for n in range(5)]
        old = cluster.owner(key)
        new = next(node for node in cluster.nodes[:NODES] if node is not old)
        begin_move(cluster, slot, old, new)
        told = [room.sessions.destroy(session.token, defer=True) for session in ended]
        while keys := keys_in(cluster, slot, old):
            migrate(cluster, old, new, keys)
        cluster.move(slot, new)
        for session, is_told in zip(ended, told, strict=True):
            assert not is_told or room.sessions.get(session.token) is None
        assert all(room.sessions.get(session.token) is not None for session in kept)
        room.sessions.destroy_for_user("ended")
        assert not any(room.sessions.get(session.token) for session in ended)
    if (old := cluster.owner(key)) is not home:
        give_away(cluster, slot, old, home, keys_in(cluster, slot, old))


@contextmanager
def half_moved(cluster: RedisCluster) -> Iterator[None]:
    """Move a shard's sessions to another node before its indexes; the rest follows at the end of the block."""
    key = KEYS.due_sessions(0)
    slot, old = slot_of(key), cluster.owner(key)
    new = next(node for node in cluster.nodes[:NODES] if node is not old)
    begin_move(cluster, slot, old, new)
    migrate(cluster, old, new, [key for key in keys_in(cluster, slot, old) if not is_index(key)])
    try:
        yield
    finally:
        while keys := keys_in(cluster, slot, old):
            migrate(cluster, old, new, keys)
        cluster.move(slot, new)


def is_index(key: bytes) -> bool:
    """Return whether this is no session, or the name that one had before its rotation."""
    return b"}:s:" not in key or key in FORMER


FORMER: set[bytes] = set()


def end_by_former_name(room: Any, tokens: list[str]) -> None:
    for token in tokens:
        room.sessions.destroy(token)


ACTS: dict[str, Callable[[Any, list[str]], object]] = {
    "all of a user's": lambda room, _: room.sessions.destroy_for_user("ann"),
    "all of a tag's": lambda room, _: room.sessions.destroy_by_tag("phone"),
    "by the name before a rotation": end_by_former_name,
    "a list of them": lambda room, _: room.sessions.list_for_user("ann"),
    "a login with a cap": lambda room, _: room.sessions.create("ann", {}, max_per_user=2),
    "the sweep": lambda room, _: room.sessions.sweep(),
}


@pytest.mark.parametrize("name", ACTS)
def test_no_session_is_taken_for_gone_while_its_slot_moves(
    make_room: Make, client: Any, cluster: RedisCluster, name: str
) -> None:
    """What needs sessions that are on another node already is refused, and finds them all afterwards."""
    room = make_room(session_shards=1)
    first = [room.sessions.create("ann", {}, tags=["phone"]) for _ in range(4)]
    FORMER.clear()
    FORMER.update(record_of(room, session.handle) for session in first)
    sessions = [room.sessions.rotate(session.token) for session in first]
    if name == "the sweep":
        client.zadd(
            KEYS.due_sessions(0), dict.fromkeys(client.zrange(KEYS.due_sessions(0), 0, -1), 1)
        )
    home = cluster.owner(KEYS.due_sessions(0))
    with half_moved(cluster), pytest.raises(RedisUnavailable):
        ACTS[name](room, [session.token for session in first])
    assert len(room.sessions.list_for_user("ann")) == len(sessions)
    assert room.sessions.destroy_for_user("ann") == len(sessions)
    assert not any(room.sessions.get(session.token) for session in sessions)
    cluster.reshard(slot_of(KEYS.due_sessions(0)), home)


def keys_in(cluster: RedisCluster, slot: int, node: EmbeddedServer) -> list[bytes]:
    found: list[bytes] = cluster.client(node).execute_command("CLUSTER GETKEYSINSLOT", slot, 100)
    return found


def slots_of(cluster: RedisCluster, node: EmbeddedServer) -> range:
    """Return the slots that a node was given when the cluster was formed."""
    number = cluster.nodes.index(node)
    return range(16_384 * number // NODES, 16_384 * (number + 1) // NODES)


@contextmanager
def hammering(rooms: list[Stillroom], limits: list[Limit], admitted: list[int]) -> Iterator[None]:
    """Check from several threads of each room while the block runs."""

    def hammer(room: Stillroom) -> None:
        forget_denials(room)
        if room.limits.check({"ip": IP, "user": "ann"}, limits):
            admitted.append(1)

    with ExitStack() as stack:
        for room in rooms:
            stack.enter_context(repeated(partial(hammer, room), threads=4))
        yield


# When a node is away


@pytest.mark.parametrize("face", FACES)
def test_a_frozen_node_leaves_the_others_alone(
    places: dict[str, Any], cluster: RedisCluster, face: str
) -> None:
    """Subjects and sessions of the other nodes are decided by Redis, also when the node of the counts is frozen."""
    settings = Settings(**PATIENT | places | HURRIED)
    with open_room(face, settings, Recording()) as room:
        room.connect()
        frozen = cluster.owner(HOUSE)
        near, far = ip_on(cluster, frozen), ip_on(cluster, frozen, other=True)
        sessions = [room.sessions.create("ann", {"n": n}) for n in range(32)]
        theirs = [s for s in sessions if owner_of(cluster, s) is not frozen]
        assert room.limits.check(far, [AUTH], cost=3)
        assert room.limits.check(near, [AUTH])
        with cluster.frozen(frozen):
            for _ in range(10):
                room.limits.check(near, [DEFAULT])
            assert room.limits.check(near, [DEFAULT]).degraded
            assert room.limits.check(far, [AUTH]).degraded == ""
            assert all(room.sessions.get(session.token) is not None for session in theirs)
            assert room.sessions.destroy(theirs[0].token)
            assert room.sessions.get(theirs[0].token) is None
        assert room.limits.check(far, [AUTH], cost=0).remaining == 1


def test_a_part_that_nobody_decides_is_decided_here(
    places: dict[str, Any], cluster: RedisCluster
) -> None:
    """Where one of two nodes is frozen the process decides its limit, up to the quota, and Redis the other one."""
    with Stillroom(Settings(**PATIENT | places | HURRIED), dispatch=NoDispatch()) as room:
        make = room._limits_body._requests.make
        part = make({"ip": IP, "user": "ann"}, [AUTH, BY_USER], 1, "")
        address, user = map(cluster.owner, part.keys)
        if address is user:
            names = (f"user-{number}" for number in range(100))
            name = next(
                name
                for name in names
                if cluster.owner(make({"ip": IP, "user": name}, [BY_USER], 1, "").keys[0])
                is not address
            )
        else:
            name = "ann"
        subject: dict[str, str | None] = {"ip": IP, "user": name}
        assert room.limits.check(subject, [AUTH, BY_USER], cost=2)
        user = cluster.owner(make(subject, [BY_USER], 1, "").keys[0])
        with cluster.frozen(user):
            decisions = [room.limits.check(subject, [AUTH, BY_USER]) for _ in range(8)]
            assert sum(map(bool, decisions)) == 3
            assert all(one.degraded for one in decisions if one)
        until(lambda: not room.limits.peek(subject, [AUTH, BY_USER]).degraded, "recovery")
        left = AUTH.quota - 2 - sum(map(bool, decisions))
        until(
            lambda: room.limits.peek(IP, [AUTH]).remaining == left,
            "what was denied to be given back",
        )


def test_what_a_node_has_reserved_is_settled_there_though_another_is_away(
    places: dict[str, Any], cluster: RedisCluster
) -> None:
    """A node that only knows the bans of a request may be away: what another has reserved is charged its price."""
    with Stillroom(Settings(**PATIENT | places | HURRIED), dispatch=NoDispatch()) as room:
        make = room._limits_body._requests.make
        part = make({"ip": IP, "user": "ann"}, [BY_USER], 1, "")
        ip = ip_on(cluster, cluster.owner(part.keys[0]), other=True)
        subject: dict[str, str | None] = {"ip": ip, "user": "ann"}
        assert room.limits.check(subject, [BY_USER])
        with cluster.frozen(cluster.owner(home_of_ip(ip))):
            more, back = (room.limits.reserve(subject, [BY_USER]) for _ in range(2))
            assert more.decision.degraded
            assert (room.limits.settle(more, 3), room.limits.refund(back)) == (True, True)
        until(lambda: not room.limits.peek(subject, [BY_USER]).degraded, "recovery")
        assert room.limits.peek(subject, [BY_USER]).remaining == BY_USER.quota - 1 - 3


def test_hits_of_a_node_that_is_back_are_told_while_another_is_away(
    places: dict[str, Any], cluster: RedisCluster
) -> None:
    """However many hits a node that stays away is owed, those of a node that is back are told to it."""
    addresses = [f"198.51.{n // 256}.{n % 256}" for n in range(2_000)]
    owners = {ip: cluster.owner(home_of_ip(ip)) for ip in addresses}
    house = cluster.owner(HOUSE)
    lost, back = [node for node in cluster.nodes[:NODES] if node is not house]
    lots = [ip for ip in addresses if owners[ip] is lost][: BITE + 20]
    few = [ip for ip in addresses if owners[ip] is back][:3]
    with Stillroom(Settings(**PATIENT | places | HURRIED), dispatch=NoDispatch()) as here:
        here.connect()
        here.state_wire.breaker.recovered[:] = []  # nothing is told but by the test
        with cluster.frozen(lost, back):
            for ip in [*lots, *few]:
                assert here.limits.check(ip, [AUTH]).degraded
            back.thaw()
            until(lambda: here.limits.deliver() == len(lots), "the hits")
            for ip in few:
                known = here.limits.peek(ip, [AUTH])
                assert (known.degraded, known.remaining) == ("", AUTH.quota - 1)
        until(lambda: here.limits.deliver() == 0, "the other hits")


def owner_of(cluster: RedisCluster, session: Any) -> EmbeddedServer:
    return cluster.owner(KEYS.due_sessions(int(session.token[:2], 16)))


@pytest.mark.long
@pytest.mark.parametrize("face", FACES)
def test_a_replica_takes_over(server: EmbeddedServer, face: str) -> None:
    """When a node is killed its replica goes on with the quotas and the sessions that it has."""
    with RedisCluster(replicas=NODES) as cluster:
        places = {"redis_url": cluster.url, "cache_url": server.url, "broker_url": server.url}
        settings = Settings(**PATIENT | places | {"state_cluster": True, "replicas": 1})
        with open_room(face, settings, Recording()) as room:
            room.connect()
            held = room.limits.reserve(IP, [AUTH], cost=3)
            session = room.sessions.create("ann", {"n": 1})
            ended = room.sessions.create("bob", {"n": 1})
            assert held
            assert room.sessions.destroy(ended.token)
            cluster.owner(home_of_ip()).kill()
            cluster.await_that("limits are decided again", lambda: answers(room))
            assert room.limits.peek(IP, [AUTH]).remaining == 2
            cluster.await_that("sessions are read again", lambda: reads(room, session))
            assert room.sessions.get(ended.token) is None


def answers(room: Any) -> bool:
    return not room.limits.peek(IP, [AUTH]).degraded


def reads(room: Any, session: Any) -> bool:
    try:
        return room.sessions.get(session.token) is not None
    except RedisUnavailable:
        return False


@pytest.mark.parametrize("role", ["state", "cache"])
def test_a_node_of_a_cluster_that_is_down_is_not_back(server: EmbeddedServer, role: str) -> None:
    """A node that answers PING and refuses all keys is away for the prober, until the cluster serves its slots."""
    with RedisCluster() as cluster:
        asked, other, _ = cluster.nodes
        urls = {"cache_url": server.url, "broker_url": server.url}
        places = {
            "state": {"redis_url": cluster.url, "state_cluster": True} | urls,
            "cache": {"redis_url": server.url, "cache_url": cluster.url, "cluster": True},
        }

        def says(state: bytes) -> bool:
            return state in cluster.client(asked).execute_command("CLUSTER INFO")

        with Stillroom(Settings(**PATIENT | places[role]), dispatch=NoDispatch()) as room:
            nodes: Any = room.state_wire if role == "state" else room.wire
            wire = nodes.at(("127.0.0.1", asked.port))
            wire.ping(to_read=True)
            other.freeze()
            cluster.await_that("the cluster is down", lambda: says(b"cluster_state:fail"))
            with pytest.raises(RedisUnavailable) as refused:
                wire.ping(to_read=True)
            assert refused.value.reason == "clusterdown"
            other.thaw()
            cluster.await_that("the cluster is up", lambda: says(b"cluster_state:ok"))
            wire.ping(to_read=True)
