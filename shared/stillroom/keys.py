"""Every Redis key, and what may be in one. This is the data dictionary.

`ns` is the namespace setting (default `stillroom`); `{0}` is the hash tag of the cache's first shard: all keys of
a shard live in one Redis Cluster slot, so that one script may touch them together. In a cluster `ns:stats:…`,
`ns:counts` and `ns:errors` have a shard's tag too, for they ride along with the shard's batches.

With the setting state_cluster the state is on a cluster, too. Then the keys of a subject of the limits (`{rl:…}`)
have the tag of a shard before them, `ns:{r00}{rl:…}` to `ns:{r3f}{rl:…}`, and each of these shards has a stream
`ns:{r00}:abuse`, of 10,000. A ban is there for the checks, and at `ns:{one}{rl:…}`, where it is decided. Everything
else of the state that has no tag here is at `ns:{one}:…`. See Keys.home.

| key               | type   | meaning                                         | lifetime     | written by      |
|-------------------|--------|-------------------------------------------------|--------------|-----------------|
| ns:{0}:clock      | string | `<epoch>.<seq>`, the clock of invalidations     | none, 1 key  | lib/clock.lua   |
| ns:{0}:marks      | zset   | `t:<tag>` `s:<tag>` `p:<glob>` → seq;           | trimmed past | mark, trim_marks|
|                   |        | `~<epoch>` the newest mark, `?` the newest glob,| life_limit   | lib/clock.lua,  |
|                   |        | `!` how far they are trimmed, `*` how far       |              | lib/marks.lua,  |
|                   |        | patterns were dropped; of the epoch: `@` the run|              | drop_globs,     |
|                   |        | of the server (48 bits of its id), `&` its      |              | verify_epoch,   |
|                   |        | history, `#` how many shards there are;         |              | clear,          |
|                   |        | `K` the newest key in `named`                   |              | lib/near.lua    |
| ns:{0}:globs      | zset   | the globs among the marks → seq                 | as the marks | mark, trim_marks|
| ns:{0}:near       | string | prefixes of keys that processes keep copies of: | 8 d without  | near_join       |
|                   |        | an id, then one a line                          | such one     |                 |
| ns:{0}:named      | zset   | `k:<key>` → seq: such a key whose value was     | 10 min,      | lib/near.lua    |
|                   |        | changed; `!` since when they are complete       | 11,000       |                 |
| ns:{0}:e:<key>    | string | entry: one header line, then the payload        | ttl + swr    | put, commit,    |
|                   |        |                                                 |              | add, replace    |
| …e:<key>%other    | string | the same, of a second release of the app: see   | ttl + swr    | commit          |
|                   |        | lua/lib/places.lua                              |              |                 |
| ns:{0}:l:<key>    | string | lease: who is loading or refreshing it, for how | seconds      | lease_*, claim, |
|                   |        | long; or a backoff (lib/lease.lua)              |              | back_off        |
| ns:{0}:f:<key>    | string | `<lease> <error as JSON>`: the load that failed | 2 s          | fail_load       |
| ns:{0}:n:<loader> | zset   | loads that run → until, ms (at_once=)           | a lease      | take_place      |
| ns:{0}:q:<loader> | zset   | loads that wait for a place → until, ms         | 2 s          | take_place      |
| ns:{0}:i:<tag>    | zset   | index: key → when its entry runs out, ms. Finds | longest      | put, commit     |
|                   |        | memory to reclaim; decides nothing              | member       | add, replace    |
| ns:{0}:todo       | zset   | work that invalidations left → when it is due,  | until done,  | mark, clear,    |
|                   |        | ms (lib/todo.lua lists the kinds)               | life_limit   | verify_epoch    |
| ns:{0}:at:<work>  | string | how far it has got, as JSON                     | 10 min       | reclaim.py      |
| ns:{0}:warm:<loader> | string | the newest period that is claimed, a token, | 2 periods    | warm_claim      |
|                   |        | until when its orders are to be written         |              |                 |
| ns:{0}:trimmed    | string | how far the trimming of indexes has got         | 10 min       | reclaim.py      |
| ns:{s<shard>}:…   | of one shard of the sessions, 00 to ff: lib/session.lua |              | session_*       |
|       …s:<h>      | hash   | a session, by the HMAC of its token             | its deadline |                 |
|                   |        | or where it went when it was rotated; or where  | + 60 s; its  |                 |
|                   |        | it is, under another pepper                     | absolute one |                 |
|       …u:<user>   | zset   | the user's sessions → stamp                     | longest of   |                 |
|       …g:<tag>    | zset   | the tag's sessions → stamp                      | their        |                 |
|       …d:<user>   | zset   | HMACs of the user's devices → last login, µs    | session_     | session_create  |
|                   |        |                                                 | device_memory|                 |
|       …all        | string | a stamp: all that was made up to it is dead     | longest      | session_end_all |
|                   |        |                                                 | session      |                 |
|       …x:<stamp>  | zset   | what x was then, still to be deleted            | as x         | session_end_all |
|       …x          | zset   | session, user, tags → when to look at it again  | members'     |                 |
|       …rev        | zset   | revoked and not yet deleted → stamp; `!left`,   | absolute     | … session_shut  |
|                   |        | `!arriving`: the shard is being moved           | deadlines    |                 |
|       …clock      | string | the newest stamp                                | the same     |                 |
|       …late:<h>   | string | the browser is getting another cookie in the    | 1 min        | session_create, |
|                   |        | place of this session's                         |              | _destroy,_rotate|
| ns:{rl:<kind>:<value>}:… | of one subject of the limits. kind: `ip`, `user`, `ip&user` …; value: an address |
|                   |        | or network, any other text as its HMAC, so it holds no brace |                |
|       …<limit>    | string | its hits: (last µs, count) packed, oldest first | the window   | limit_check,    |
|                   |        | (lib/hits.lua)                                  |              | _charge, _refund|
|       …<limit>!near        | string | a `near` event was written             | the window   | limit_check     |
|       …<limit>!born        | string | since when it has not been reset, µs   | the window   | limit_check     |
|       …!denied    | string | denials                                         | 10 min       | limit_check     |
|       …!ban       | string | why, as JSON; as long as it is there, a ban (ip)| the ban      | lib/ban.lua     |
|       …!level     | string | how many bans it has had                        | 7 d          | abuse_judge     |
|       …!lifted    | string | its ban was lifted: when, ms. No rule bans it   | 70 min       | abuse_lift,     |
|                   |        | for ten minutes                                 |              | ban_end         |
| ns:{rl:!held}:<id>| hash   | a reservation that may still be refunded: see   | the window;  | limit_check,    |
|                   |        | lib/reservation.lua                             | `over` 10 min| _charge, _settle|
| ns:{rl:!told}:<id>| string | how many hits of its own a process has told of  | the window   | limit_charge    |
| ns:{rl:!widths}   | string | widths of networks that have bans, until when   | those bans   | lib/ban.lua     |
| ns:limits:windows | hash   | limit → its longest window, µs, and when that   | 366 d, 1,000 | limit_windows   |
|                   |        | was said                                        |              |                 |
| ns:limits:changes | hash   | limit → what operators changed it to, as JSON   | the change   | limit_change    |
|                   |        |                                                 | that ends    |                 |
|                   |        |                                                 | last; 200    |                 |
| ns:{lk:<name>}:…  | of one lock or semaphore                                 |              | slot_take,      |
|       …slots      | zset   | `<token>.<lease, ms>` → when the lease ends, µs | the longest  | slot_renew      |
|       …queue      | zset   | who waits → when it came, µs; 1,000 at most     | 2 s          |                 |
|       …waiters    | zset   | who waits → until when its place is kept, µs    | 2 s          |                 |
|       …fence      | string | the last fencing number: µs, always growing     | 1 d          | slot_take       |
| ns:abuse          | stream | events: `kind` denied, near …, `n`, `limit`,    | 100,000      | limit_check,    |
|                   |        | `ip`, `user`, `token` (HMACs), `route`, `ago`   |              | abuse           |
| ns:abuse:log      | stream | patterns: see abuse/patterns.py                 | 10,000       | abuse_judge     |
| ns:abuse:aside    | stream | events that could not be read: `id`, `reason`,  | 1,000        | abuse           |
|                   |        | `event`                                         |              |                 |
| ns:abuse:c:<rule>:<group> | zset: what a rule counts → when it was seen, ms | its window | abuse_count     |
| ns:abuse:groups   | zset   | the counts there are → when each grew, ms       | 50,000; 1 d  | abuse_count     |
| ns:abuse:seen:<rule>:<group> | string: the event that completed the pattern, | the window   | abuse_judge     |
|                   |        | and what was done                               | + 1 h        |                 |
| ns:bans           | zset   | subject → until when, ms                        | 31 d         | lib/ban.lua     |
| ns:bans:times     | list   | when rules banned, ms, newest first             | 1 min        | abuse_judge     |
| ns:orders         | zset   | what apps ordered from workers and is not done  | until done,  | write_orders,   |
|                   |        | `<kind> <JSON>` → when it is due, µs            | 10,000       | take_order …    |
| ns:orders:tries   | hash   | order → how often it was begun                  | as its order | take_order      |
| ns:dead-letters   | stream | what could not be done and waits for a person:  | 1,000; 90 d  | dead_letter     |
|                   |        | `kind` `body` `reason` `tries` `cut`            |              |                 |
| ns:agreed         | hash   | settings that all processes have alike: name →  | none, 1,000  | agree           |
|                   |        | value, id, who brought it                       | fields       |                 |
| ns:stats:<minute> | hash   | counts of all processes: hits, misses, loads …  | 2 h          | stats.py        |
| ns:counts         | hash   | the same, since they began to count             | 30 d unused, | stats.py,       |
|                   |        |                                                 | 8,000 fields | fold_counts     |
| ns:errors         | hash   | loader → its last error, as JSON: kind, place,  | 8 d          | stats.py        |
|                   |        | when; never its message                         |              |                 |
| ns:health         | stream | a snapshot a minute, as JSON; the id is the time| a day's,     | health_snapshot |
| ns:health:week    | stream | every fifth minute's                            | a week's; 8 d| health_snapshot |
| ns:health:open    | hash   | finding → since when, ms: told once;            | 8 d          | health_snapshot |
|                   |        | `@<machine>` → when it found some of itself     |              |                 |
|                   |        | `!<finding>` → since when it is told as a failure|             |                 |
| ns:health:nodes   | string | what nodes of clusters had counted at the last  | 8 d          | health_snapshot |
|                   |        | snapshot, as JSON                               |              |                 |
| ns:paused:<what>  | string | what workers leave alone for now, and who said so| as was said, | pauses.py       |
|                   |        |                                                 | 1 d at most  |                 |
| ns:webhook        | stream | findings that began or ended, as JSON: `event`  | 1,000; 8 d   | health_snapshot |
| ns:webhook:at     | hash   | how far, and by whom; when to try again         | 8 d          | webhook_note    |
| ns:webhook:lease  | string | the worker that tells it                        | 60 s         | webhook_lease   |
| ns:workers        | zset   | worker → when it was last seen, ms              | 10 min       | worker_seen     |
| ns:workers:about  | hash   | worker → what it does, as JSON                  | 10 min       | worker_seen     |
| ns:ticks          | hash   | scheduled task → when it last ended well, ms    | 30 d         | task_ticked     |

Celery's own keys belong to kombu. Other apps may use the same Redis, so each has the namespace in its name:

| key                       | type | meaning                                       | lifetime          |
|---------------------------|------|-----------------------------------------------|-------------------|
| ns.refresh, ns.maintenance| list | a queue: messages, the oldest at the right end| until taken       |
|                           |      | (`\\x06\\x163` and so on: of other priorities)  |                   |
| ns:unacked                | hash | what workers have taken and not done          | until done, 1 h   |
| ns:unacked_index          | zset | the same → when it was taken, s               | as the hash       |
| ns:unacked_mutex          | string | who gives back what a killed worker held    | 5 min             |
| ns:binding_deadlines      | zset | exchanges of short-lived queues → until, ms   | swept             |
| ns:redbeat:*              | any  | redbeat's schedule, if beat runs with that    | redbeat's         |
| _kombu.binding*.ns.*      | set  | which queues an exchange has                  | none; one for each|
| <worker>.ns.pidbox        | list | replies to `celery inspect`                   | 10 s              |
| ns.celeryev.<id>          | list | events for one listener                       | 60 s              |
"""

from __future__ import annotations

import re
from binascii import crc_hqx
from collections.abc import Sequence
from functools import lru_cache
from ipaddress import ip_network

from stillroom.errors import InvalidArgument, InvalidKey
from stillroom.subject import SITE_PREFIX, UNKNOWN, site_of

# The type of each key that there is one of, by its name in Keys: of a shard of the cache, and of the state.
OF_A_SHARD = {
    **dict.fromkeys(("clock", "near", "trimmed"), "string"),
    **dict.fromkeys(("marks", "globs", "named", "todo"), "zset"),
}
OF_THE_STATE = {
    **dict.fromkeys(("orders", "bans", "workers"), "zset"),
    **dict.fromkeys(("order_tries", "agreed", "limit_windows", "limit_changes", "ticks"), "hash"),
    **dict.fromkeys(("abuse", "abuse_log", "dead_letters", "health", "health_week"), "stream"),
}
# Before the name of a limit in shadow: a field of ns:stats and ns:counts.
WOULD_DENY = "limit_would_deny:"
# In a cluster: the hash tag of what there is one of, and the tags of the shards of limits (see Keys.home).
HOUSE = b"{one}"
EVENTS_KEPT, EVENTS_KEPT_IN_A_SHARD = 100_000, 10_000  # in the stream, or each of a cluster's
HOMES = tuple([b"{r%02x}" % number for number in range(64)])
# Is it IPv6? → the width of the networks that have one shard.
SHARDED_BY = {False: 32, True: SITE_PREFIX}
IN_A_HOME = "{r[0-3][0-9a-f]}"  # a glob for the tags above
OF_EACH_HOME = ("abuse",)  # what each of these shards has one of
OF_THE_BROKER = ("unacked", "binding_deadlines")  # kombu's keys, which are on no cluster
KEY_LIMIT = 1024  # bytes of a key or tag, escaped
KEY_SHOWN = 100  # bytes of a key in a log or an error
TAGS_LIMIT = 1_000  # of one entry: writing their indexes takes the server 3 ms
OTHER = b"%other"  # behind an entry's key: its other place. No escaped key ends so

# Control characters would break the entry's header line and every log they are printed in;
# `%` is escaped so that no two keys are ever written the same.
_UNSAFE = re.compile(r"[\x00-\x1f\x7f%]")
_GLOB_SIGNS = re.compile(rb"[*?\[\]\\]")
_SHARDED = re.compile(rb"[^{]*(?:\{\w+\}(?=\{))?\{([^}]*)\}:(.*)", re.DOTALL)
_BAN = re.compile(rb"[^{]*(?:\{\w+\})?\{rl:ip:([^}]*)\}:!ban")
_HOME = re.compile(rb"[^{]*(\{\w+\})\{")
_ESCAPED = re.compile(rb"%([0-9A-F]{2})")


class Keys:
    """The keys of one namespace, and of one shard of its cache.

    `in_cluster`: the cache is on a cluster; `state_in_cluster`: the state is.
    """

    def __init__(
        self,
        namespace: str,
        shard: int = 0,
        *,
        in_cluster: bool = False,
        state_in_cluster: bool = False,
    ) -> None:
        self._namespace = namespace
        self._name = namespace.encode()
        cache = f"{namespace}:{{{shard}}}:"
        house = f"{namespace}:{HOUSE.decode()}:" if state_in_cluster else f"{namespace}:"
        counted = cache if in_cluster else house
        self.events_kept = EVENTS_KEPT_IN_A_SHARD if state_in_cluster else EVENTS_KEPT
        self.homes: Sequence[bytes] = HOMES if state_in_cluster else (b"",)
        self._house = HOUSE if state_in_cluster else b""
        self.is_spread = state_in_cluster
        self._stats = f"{counted}stats:"
        self.counts = f"{counted}counts".encode()
        self.errors = f"{counted}errors".encode()
        self.clock = f"{cache}clock".encode()
        self.marks = f"{cache}marks".encode()
        self.unacked = f"{namespace}:unacked"
        self.unacked_index = f"{namespace}:unacked_index"
        self.unacked_mutex = f"{namespace}:unacked_mutex"
        self.binding_deadlines = f"{namespace}:binding_deadlines"
        self.redbeat = f"{namespace}:redbeat"
        self.control = namespace  # kombu adds `.pidbox`
        self.events = f"{namespace}.celeryev"
        self.orders = f"{house}orders".encode()
        self.order_tries = self.orders + b":tries"
        self.dead_letters = f"{house}dead-letters".encode()
        self.agreed = f"{house}agreed".encode()
        self.abuse = f"{house}abuse".encode()
        self.abuse_log = self.abuse + b":log"
        self.abuse_aside = self.abuse + b":aside"
        self.abuse_groups = self.abuse + b":groups"
        self.limit_windows = f"{house}limits:windows".encode()
        self.limit_changes = f"{house}limits:changes".encode()
        self.ban_widths = self.widths(self._house)
        self.bans = f"{house}bans".encode()
        self.ban_times = self.bans + b":times"
        self.health = f"{house}health".encode()
        self.health_week = f"{house}health:week".encode()
        self.health_open = f"{house}health:open".encode()
        self.health_nodes = f"{house}health:nodes".encode()
        self._paused = f"{house}paused:".encode()
        self.webhook = f"{house}webhook".encode()
        self.webhook_at = self.webhook + b":at"
        self.webhook_lease = self.webhook + b":lease"
        self.workers = f"{house}workers".encode()
        self.workers_about = self.workers + b":about"
        self.ticks = f"{house}ticks".encode()
        self.globs = f"{cache}globs".encode()
        self.todo = f"{cache}todo".encode()
        self.trimmed = f"{cache}trimmed".encode()
        self.near = f"{cache}near".encode()
        self.named = f"{cache}named".encode()
        self.entry_prefix = f"{cache}e:".encode()
        self.index_prefix = f"{cache}i:".encode()
        self._shards = _session_shards(namespace)
        self._lease = f"{cache}l:".encode()
        self._failure = f"{cache}f:".encode()
        self._places = f"{cache}n:".encode()
        self._queue = f"{cache}q:".encode()
        self._at = f"{cache}at:".encode()
        self._warm = f"{cache}warm:".encode()
        self._limits = f"{namespace}:{{rl:".encode()
        self._locks = f"{namespace}:{{lk:".encode()

    def entry(self, name: bytes) -> bytes:
        return self.entry_prefix + name

    def other(self, name: bytes) -> bytes:
        """Return the entry's other place: see lua/lib/places.lua."""
        return self.entry_prefix + name + OTHER

    def lease(self, name: bytes) -> bytes:
        return self._lease + name

    def failure(self, name: bytes) -> bytes:
        return self._failure + name

    def places(self, loader: str) -> list[bytes]:
        """Return a loader's places, and the queue for them."""
        name = loader.encode()
        return [self._places + name, self._queue + name]

    def index(self, tag: bytes) -> bytes:
        return self.index_prefix + tag

    def at(self, work: bytes) -> bytes:
        return self._at + work

    def warm(self, loader: bytes) -> bytes:
        return self._warm + loader

    def shard(self, number: int) -> bytes:
        """Return the prefix of all keys of one shard of the sessions."""
        return self._shards[number]

    def sessions(self, shard: int, names: Sequence[bytes]) -> tuple[bytes, ...]:
        """Return the keys of a session, under each of its names."""
        return self.record(shard, names)[0]

    def record(self, shard: int, names: Sequence[bytes]) -> tuple[tuple[bytes, ...], bytes]:
        """Return the keys of a session, and the prefix of its shard: its scripts take them first."""
        prefix = self._shards[shard]
        return tuple(map((prefix + b"s:").__add__, names)), prefix

    def late(self, shard: int, names: Sequence[bytes]) -> list[bytes]:
        """Return the keys that remember that the browser of this session is getting another cookie."""
        prefix = self._shards[shard] + b"late:"
        return [prefix + name for name in names]

    def user_sessions(self, shard: int, user: bytes) -> bytes:
        return self.shard(shard) + b"u:" + user

    def due_sessions(self, shard: int) -> bytes:
        return self.shard(shard) + b"x"

    def revocations(self, shard: int) -> bytes:
        return self.shard(shard) + b"rev"

    def session_stamps(self, shard: int) -> bytes:
        return self.shard(shard) + b"clock"

    def all_revoked(self, shard: int) -> bytes:
        return self.shard(shard) + b"all"

    def limits(self, kind: str, value: str) -> bytes:
        """Return the prefix of all keys of one subject of the limits."""
        if self._house:
            return self._of_subject(self.home(kind, value), kind, value)
        return b"%b%b:%b}:" % (self._limits, kind.encode(), value.encode())

    def home(self, kind: str, value: str) -> bytes:
        """Return the hash tag of the shard that has a subject of the limits; empty where there is one server.

        A subject with an address lives where the address does, so that a check by both is in one slot, and an
        address of IPv6 where its site does, so that a ban of any network within the site is in that slot, too.
        """
        if not self._house:
            return b""
        parts = dict(zip(kind.split("&"), value.split("&"), strict=False))
        where = parts.get("ip")
        name = f"{kind}:{value}" if where is None else site_of(where) or where
        return HOMES[crc_hqx(name.encode(), 0) % len(HOMES)]

    def homes_of_ban(self, subject: str) -> Sequence[bytes]:
        """Return the shards whose addresses a ban concerns: one, or all for a network that several may have."""
        if subject != UNKNOWN and ip_network(subject).prefixlen < SHARDED_BY[":" in subject]:
            return self.homes
        return [self.home("ip", subject)]

    def _of_subject(self, home: bytes, kind: str, value: str) -> bytes:
        return b"%b:%b{rl:%b:%b}:" % (self._name, home, kind.encode(), value.encode())

    def abuse_at(self, home: bytes) -> bytes:
        """Return the stream of the events of abuse in this shard."""
        return b"%b:%b:abuse" % (self._name, home) if home else self.abuse

    def widths(self, home: bytes) -> bytes:
        """Return the key of the widths of networks that have bans in this shard."""
        return b"%b:%b{rl:!widths}" % (self._name, home)

    def no_widths(self, home: bytes) -> bytes:
        """Return a key of this shard that nobody writes, for a check that looks for no bans."""
        return b"%b:%b{rl:!none}" % (self._name, home)

    def slots(self, name: bytes) -> list[bytes]:
        """Return the keys of a lock: slots, queue, waiters, fence."""
        prefix = b"%b%b}:" % (self._locks, name)
        return [prefix + part for part in (b"slots", b"queue", b"waiters", b"fence")]

    def reservation(self, id: str, home: bytes) -> bytes:
        return b"%b:%b{rl:!held}:%b" % (self._name, home, id.encode())

    def told(self, log: str, home: bytes) -> bytes:
        """Return the key for how much of a process' own admissions Redis was told. `log`: that process' log."""
        return b"%b:%b{rl:!told}:%b" % (self._name, home, log.encode())

    def ban(self, subject: str) -> bytes:
        """Return the key for a ban. In a cluster it is the ban as operators see it.

        `subject`: an address, or a network: see subject.py.
        """
        return self._of_subject(self._house, "ip", subject) + b"!ban"

    def ban_at(self, home: bytes, subject: str) -> bytes:
        """Return the key that a check in this shard looks at."""
        return self._of_subject(home, "ip", subject) + b"!ban"

    def ban_level(self, subject: str) -> bytes:
        return self._of_subject(self._house, "ip", subject) + b"!level"

    def ban_lifted(self, subject: str) -> bytes:
        return self._of_subject(self._house, "ip", subject) + b"!lifted"

    def lifted_at(self, home: bytes, subject: str) -> bytes:
        """Return the key that says when a ban was lifted, to the shard of this home."""
        return self._of_subject(home, "ip", subject) + b"!lifted"

    def abuse_count(self, rule: str, group: str) -> bytes:
        return b"%b:c:%b:%b" % (self.abuse, rule.encode(), group.encode())

    def abuse_seen(self, rule: str, claim: str) -> bytes:
        return b"%b:seen:%b:%b" % (self.abuse, rule.encode(), claim.encode())

    def of_rule(self, key: bytes) -> tuple[str, str]:
        """Return what a rule of abuse keeps under a key, `count` or `seen`, and the rule; empty texts for others.

        >>> keys = Keys("shop")
        >>> keys.of_rule(keys.abuse_count("hammer", "ip:192.0.2.1")), keys.of_rule(keys.abuse_groups)
        (('count', 'hammer'), ('', ''))
        """
        for kind, prefix in (("count", b":c:"), ("seen", b":seen:")):
            if key.startswith(self.abuse + prefix):
                return kind, key[len(self.abuse + prefix) :].partition(b":")[0].decode()
        return "", ""

    def stats(self, minute: int) -> bytes:
        """Return the key for the counts of one minute. `minute` counts from 1970."""
        return f"{self._stats}{minute}".encode()

    def paused(self, what: str) -> bytes:
        return self._paused + what.encode()

    def queue(self, kind: str) -> str:
        """Return the Celery queue for `refresh` (short, latency matters) or `maintenance` (bulk, in bites)."""
        return f"{self._namespace}.{kind}"


def home_of(key: bytes) -> bytes:
    """Return the hash tag of the shard that has this log or ban of the limits; empty where there is one server.

    >>> home_of(b"shop:{r1f}{rl:ip:192.0.2.1}:auth"), home_of(b"shop:{rl:ip:192.0.2.1}:auth")
    (b'{r1f}', b'')
    """
    match = _HOME.match(key)
    return match[1] if match else b""


def without_home(key: bytes) -> bytes:
    """Return the key as it is where there is one server, for what a process remembers by it.

    >>> without_home(b"shop:{r1f}{rl:ip:192.0.2.1}:!ban")
    b'shop:{rl:ip:192.0.2.1}:!ban'
    """
    return key.replace(home, b"", 1) if b"}{" in key and (home := home_of(key)) else key


def globs_on_a_cluster(glob: str) -> list[str]:
    """Return the globs of the same keys where the state is on a cluster. `glob`: what follows the namespace.

    >>> globs_on_a_cluster("orders*"), globs_on_a_cluster("{s00}:*")
    (['{one}:orders*'], ['{s00}:*'])
    >>> globs_on_a_cluster("{rl:*")
    ['{one}{rl:*', '{r[0-3][0-9a-f]}{rl:*']
    """
    house = HOUSE.decode()
    if glob.startswith("{rl:"):
        return [house + glob, IN_A_HOME + glob]
    if glob.startswith(("{", *OF_THE_BROKER)):
        return [glob]
    name = glob.removesuffix("*")
    of_homes = [f"{IN_A_HOME}:{name}"] if name in OF_EACH_HOME else []
    return [f"{house}:{glob}", *of_homes]


@lru_cache(16)
def _session_shards(namespace: str) -> Sequence[bytes]:
    """Return the prefixes of the sessions' shards."""
    return [f"{namespace}:{{s{n:02x}}}:".encode() for n in range(256)]


def kind_of(key: bytes) -> str:
    """Return what a key holds, in the words of the table above: `e`, `l`, `s`, `x`, `limit` …; `` without a shard.

    >>> kind_of(b"stillroom:{0}:e:product:7"), kind_of(b"stillroom:{rl:ip:192.0.2.1}:auth")
    ('e', 'limit')
    """
    match = _SHARDED.match(key)
    if match is None:
        return ""
    if not match[1].startswith(b"rl:"):
        return match[2].partition(b":")[0].decode()
    return "mark of a limit" if b"!" in key else "limit"


def banned_in(key: bytes) -> str:
    """Return the subject that a key bans; empty if it is no such key.

    >>> banned_in(Keys("shop").ban("203.0.113.0/24"))
    '203.0.113.0/24'
    """
    match = _BAN.fullmatch(key)
    return match[1].decode(errors="replace") if match else ""


def sanitized(text: str, what: str = "a key or a tag") -> bytes:
    """Return a user's key or tag as it stands in Redis: UTF-8, control characters and `%` as `%XX`.

    `what`: its name in an error. Raises InvalidKey for what is not text, is empty, has a lone surrogate or passes
    1,024 bytes.
    """
    try:
        # Most keys are plain, and that is cheaper to see than where one is not.
        is_plain = text.isprintable() and "%" not in text
        name = (text if is_plain else _UNSAFE.sub(_percent, text)).encode()
    except (AttributeError, TypeError):
        raise InvalidKey(text, f"{what} is a str, not {type(text).__name__}") from None
    except UnicodeEncodeError:
        raise InvalidKey(
            text, f"{what} can't hold a lone surrogate: it has no UTF-8 form"
        ) from None
    if not 0 < len(name) <= KEY_LIMIT:
        raise InvalidKey(text, f"{what} has 1 to {KEY_LIMIT:,} bytes; this one has {len(name):,}")
    return name


def refuse_crowd(tags: Sequence[object]) -> None:
    """Raise InvalidArgument for more tags than an entry may have: a script writes an index for each.

    A tag that is given often is one.
    """
    if len(tags) > TAGS_LIMIT and (count := len(set(map(repr, tags)))) > TAGS_LIMIT:
        raise InvalidArgument(
            f"tags: {count:,} were given, and an entry has {TAGS_LIMIT:,} at most; give one tag to what is "
            "invalidated together"
        )


def original(name: bytes) -> bytes:
    """Return a sanitized key as its user wrote it (UTF-8)."""
    return name if b"%" not in name else _ESCAPED.sub(lambda m: bytes([int(m[1], 16)]), name)


def written(name: bytes) -> str:
    """Return a sanitized key or tag as the text that its user wrote."""
    return original(name).decode(errors="replace")


def quoted(name: bytes) -> str:
    """Return the beginning of a sanitized key as logs and errors show it: as its user wrote it, in quotes.

    >>> quoted(b"r%C3%A9sum%C3%A9:7")
    "'r\u00e9sum\u00e9:7'"
    """
    return repr(written(name[:KEY_SHOWN]))


def pattern(glob: str) -> bytes:
    """Return a glob over keys as their users write them. Raises InvalidKey."""
    sanitized(glob)  # the same limits
    return glob.encode()


def glob_literal(text: bytes) -> bytes:
    """Return a glob that matches this text and nothing else."""
    return _GLOB_SIGNS.sub(rb"\\\g<0>", text)


def _percent(match: re.Match[str]) -> str:
    return f"%{ord(match[0]):02X}"
