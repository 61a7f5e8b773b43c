"""The rules of users.acl name the same keys where the state is on a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from stillroom import Settings
from stillroom.cli.credentials import (
    KEYS_OF_A_ROLE,
    USERS,
    acl_file,
    names,
    users,
)
from stillroom.keys import OF_THE_BROKER, Keys

SUBJECTS = [
    ("ip", "192.0.2.1"),
    ("ip", "2001:db8::1"),
    ("user", "ab12"),
    ("ip&user", "192.0.2.1&x"),
]
PLACES = {
    "redis_url": "redis://state",
    "cache_url": "redis://cache",
    "broker_url": "redis://broker",
}


def keys_of(keys: Keys) -> Iterator[bytes]:
    """Yield each key of the state that a namespace may have, in one order whatever servers there are."""
    named = sorted((name, key) for name, key in vars(keys).items() if not name.startswith("_"))
    yield from (key for _, key in named if isinstance(key, bytes))
    yield from (keys.limits(kind, value) + b"few" for kind, value in SUBJECTS)
    for subject in ("192.0.2.1", "203.0.113.0/24"):
        yield from (keys.ban(subject), keys.ban_level(subject), keys.ban_lifted(subject))
    yield from (keys.abuse_count("rule", "x"), keys.abuse_seen("rule", "x"))
    yield from (keys.stats(7), keys.paused("refresh"), *keys.slots(b"lock"))
    yield from keys.sessions(3, [b"x"])


def in_homes(keys: Keys) -> Iterator[bytes]:
    """Yield what each shard of the limits has of its own on a cluster."""
    for home in keys.homes:
        yield from (keys.abuse_at(home), keys.widths(home))
        yield from (keys.reservation("x", home), keys.told("x", home))
        yield from (keys.ban_at(home, "192.0.2.1"), keys.lifted_at(home, "192.0.2.1"))


def rights(folder: Path, **changes: object) -> dict[str, list[tuple[str, str]]]:
    """Return each role's patterns of keys, with what may be done with them."""
    text = acl_file(folder, USERS, Settings(**changes)).replace("stillroom", "<ns>")  # type: ignore[arg-type]
    lines = (line.replace("(", " ").replace(")", " ") for line in users(text.splitlines()))
    return {line.split()[1]: KEYS_OF_A_ROLE.findall(line) for line in lines}


def may_touch(rules: list[tuple[str, str]], key: bytes, how: str) -> bool:
    """Return whether a rule of this kind names the key. ACLs' globs are those of fnmatch here."""
    name = key.decode().removeprefix("stillroom:")
    return any(kind == how and fnmatchcase(name, glob) for kind, glob in rules)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a password for each role."""
    for name in names():
        path = tmp_path / name
        path.write_text("x")
        path.chmod(0o600)
    return tmp_path


def test_a_role_has_the_same_keys_on_a_cluster(folder: Path) -> None:
    """A role may touch a key on a cluster exactly where it may on one server, in the same way."""
    here, there = rights(folder), rights(folder, state_cluster=True, **PLACES)
    pairs = list(
        zip(
            keys_of(Keys("stillroom")),
            keys_of(Keys("stillroom", state_in_cluster=True)),
            strict=True,
        )
    )
    assert len(pairs) > 40
    for role, rules in here.items():
        for how in ("~", "%R~"):
            for on_one, on_many in pairs:
                told = (role, how, on_one, on_many)
                assert may_touch(rules, on_one, how) == may_touch(there[role], on_many, how), told


def test_apps_and_workers_may_touch_what_each_shard_has(folder: Path) -> None:
    """An app and a worker may touch the keys of all 64 shards; the other roles may touch none of them."""
    there = rights(folder, state_cluster=True, **PLACES)
    for key in in_homes(Keys("stillroom", state_in_cluster=True)):
        allowed = {role for role, rules in there.items() if may_touch(rules, key, "~")}
        assert allowed == {"web", "worker"}, key


def test_no_role_has_a_key_of_one_server_on_a_cluster(folder: Path) -> None:
    """With the state on a cluster the keys without its tags are nobody's, but the broker's and the cache's."""
    there = rights(folder, state_cluster=True, **PLACES)
    for key in keys_of(Keys("stillroom")):
        if b"{" not in key and not key.startswith(
            tuple(b"stillroom:%b" % name.encode() for name in OF_THE_BROKER)
        ):
            assert not [role for role, rules in there.items() if may_touch(rules, key, "~")], key


@pytest.mark.parametrize(
    ("changes", "may_ask"),
    [
        ({}, set()),
        ({"cluster": True, "cache_url": "redis://cache"}, {"web", "worker", "ops"}),
        ({"state_cluster": True, **PLACES}, {"web", "worker", "ops"}),
    ],
)
def test_only_on_a_cluster_somebody_may_ask_for_slots(
    folder: Path, changes: dict[str, object], may_ask: set[str]
) -> None:
    """Who speaks to a cluster may ask which node has which slots, and where there is none nobody may."""
    text = acl_file(folder, USERS, Settings(**changes))  # type: ignore[arg-type]
    assert {line.split()[1] for line in text.splitlines() if "+cluster|slots" in line} == may_ask
    assert "<" not in text
