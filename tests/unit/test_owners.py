"""An error belongs to the command, the peer or the configuration, and that says what may be sent again."""

from __future__ import annotations

import pytest

from stillroom.operation import Once
from stillroom.wire.outcome import PEER, may_repeat, owner_of, refusal
from stillroom.wire.server import ReplyError

IN_REDIS_6 = "ERR Error running script (call to f_1): @user_script:3:"


@pytest.mark.parametrize(
    ("text", "owner"),
    [
        ("READONLY You can't write against a read only replica.", "readonly"),
        (
            "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
            "masterdown",
        ),
        ("LOADING Redis is loading the dataset in memory", "loading"),
        ("UNBLOCKED force unblock from blocking operation, instance state changed", "unblocked"),
        ("NOREPLICAS Not enough good replicas to write.", "noreplicas"),
        # What a script met, as Redis 6 tells it.
        (f"{IN_REDIS_6} @user_script: 3: -READONLY You can't write", "readonly"),
        (f"{IN_REDIS_6} -LOADING Redis is loading the dataset in memory", "loading"),
        (f"{IN_REDIS_6} @user_script: 3: -NOREPLICAS Not enough good replicas", "noreplicas"),
        (f"{IN_REDIS_6} @user_script: 3: -OOM command not allowed", "oom"),
        (f"{IN_REDIS_6} @user_script: 3: -MISCONF Redis is configured to save", "misconf"),
        (f"{IN_REDIS_6} WRONGTYPE Operation against a key", "wrongtype"),
        (f"{IN_REDIS_6} @user_script: 3: The user executing the script can't run this", "noperm"),
        (f"{IN_REDIS_6} @user_script: 3: Unknown Redis command called from Lua script", "err"),
        (f"{IN_REDIS_6} attempt to index a nil value", "err"),
        (f"ERR no such name: {IN_REDIS_6} -READONLY, says a stranger", "err"),
        # What proxies say in a server's place.
        ("ERR upstream failure", "proxy"),
        ("ERR Connection reset by peer", "proxy"),
        ("ERR server closed the connection", "proxy"),
        ("ERR backend connection refused", "proxy"),
        ("ERR Host is down", "proxy"),
        # The command's own.
        ("WRONGTYPE Operation against a key holding the wrong kind of value", "wrongtype"),
        ("NOSCRIPT No matching script. Please use EVAL.", "noscript"),
        ("OOM command not allowed when used memory > 'maxmemory'.", "oom"),
        ("NOPERM this user has no permissions to run the 'get' command", "noperm"),
        # A right that is missing inside a script: Redis 7.0, then newer ones and Valkey.
        ("ERR The user executing the script can't run this command or subcommand", "noperm"),
        ("ERR ACL failure in script: User web has no permissions to run 'get'", "noperm"),
        ("ERR unknown command 'FOO'", "err"),
        ("ERR value is not an integer or out of range", "err"),
    ],
)
def test_an_error_has_an_owner(text: str, owner: str) -> None:
    """An error's owner is known by its code, or by the words that proxies use."""
    assert owner_of(text) == owner


READONLY = ReplyError("READONLY You can't write against a read only replica.")
UNBLOCKED = ReplyError("UNBLOCKED force unblock from blocking operation")


@pytest.mark.parametrize(
    ("replies", "may"),
    [
        ([READONLY, READONLY], True),  # nothing was done
        ([READONLY, b"1"], False),  # the second script was
        ([READONLY, UNBLOCKED], False),  # the second may have been
        ([], True),  # it was not sent
    ],
)
def test_a_batch_that_must_not_be_sent_twice_is_sent_again_only_if_nothing_was_done(
    replies: list[object], may: bool
) -> None:
    """A batch that must not be sent twice is sent again only if a replica refused all its scripts."""
    batch = Once([(b"EVALSHA", b"a", b"0"), (b"EVALSHA", b"b", b"0")])
    assert may_repeat(batch, replies, idempotent=False) is may
    assert may_repeat(batch, replies, idempotent=True)
    with_counts = Once([*batch, (b"HINCRBY", b"stats", b"hits", b"1")])
    assert may_repeat(with_counts, [*replies, 5] if replies else [], idempotent=False) is may


def test_what_is_the_peers_is_dropped_and_found_anew() -> None:
    """A peer's error drops its connection, and the server is looked up anew, as in the README's table."""
    assert {"readonly", "masterdown", "loading", "unblocked", "proxy"} <= PEER


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        ("NOPERM no right to run it", "Redis refuses this (noperm): no right to run it"),
        ("ERR ACL failure in script: no", "Redis refuses this (noperm): ACL failure in script: no"),
        # The place in a script says nothing to whoever gives rights. Valkey, then Redis 7.0.
        (
            "ERR ACL failure in script: No permissions to access a key script: on @user_script:3.",
            "Redis refuses this (noperm): ACL failure in script: No permissions to access a key",
        ),
        (
            "ERR The user executing the script can't run this command script: 46bb, on @user_script:1.",
            "Redis refuses this (noperm): The user executing the script can't run this command",
        ),
        (
            "OOM command not allowed when used memory > 'maxmemory'. script: on @user_script:124.",
            "Redis is unavailable (oom): command not allowed when used memory > 'maxmemory'.",
        ),
        (
            f"{IN_REDIS_6} @user_script: 3: -OOM command not allowed when used memory > 'maxmemory'.",
            "Redis is unavailable (oom): command not allowed when used memory > 'maxmemory'.",
        ),
        (
            f"{IN_REDIS_6} @user_script: 3: Unknown Redis command called from Lua script",
            "Redis refuses this (unsupported): Error running script (call to f_1): @user_script:3: "
            "@user_script: 3: Unknown Redis command called from Lua script",
        ),
        (
            "ERR bad script: on @user_script:3.",
            "Redis refuses this (err): bad script: on @user_script:3.",
        ),
        ("WRONGTYPE not a list", "Redis refuses this (wrongtype): not a list"),
        ("LOADING its data", "Redis is unavailable (loading): its data"),
    ],
)
def test_a_server_that_refuses_one_command_is_not_called_unavailable(
    reply: str, sentence: str
) -> None:
    """Only a server that can serve nobody is called unavailable; one that refuses a command has answered."""
    assert str(refusal([ReplyError(reply)])) == sentence
