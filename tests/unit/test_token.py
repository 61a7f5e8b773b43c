"""Tokens, handles and shards are right without a server."""

from __future__ import annotations

import hmac
from base64 import urlsafe_b64encode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.sessions.token import (
    Pepper,
    is_token,
    make_handle,
    make_token,
    place_of,
    read_handle,
    shard_of,
)

PEPPERS = (Pepper(b"new"), Pepper(b"old"))
SECRET = bytes(range(32))


def test_a_token_is_its_shard_and_256_bits() -> None:
    """A token is two hex digits of its shard, a dot and 43 characters that need no escaping in a cookie."""
    assert make_token(7, SECRET) == "07.AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8"


def test_redis_knows_it_by_one_name_for_each_pepper() -> None:
    """Redis knows a token by one name for each pepper, which is always the same and reveals nothing of it."""
    token = make_token(7, SECRET)
    place = place_of(token, PEPPERS)
    assert place is not None
    assert place == place_of(token, PEPPERS)
    assert place.shard == 7
    assert len(set(place.names)) == 2
    assert all(len(name) == 43 and name.decode() not in token for name in place.names)


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_the_name_is_the_hmac(secret: bytes, token: bytes) -> None:
    """The name is the HMAC of RFC 2104, as the standard library computes it, for secrets of any length."""
    digest = hmac.digest(secret, token, "sha256")
    assert Pepper(secret).name(token) == urlsafe_b64encode(digest).rstrip(b"=")


def test_another_shard_is_another_name() -> None:
    """A token with a changed shard has another name."""
    token = make_token(7, SECRET)
    moved = place_of("08" + token[2:], PEPPERS)
    here = place_of(token, PEPPERS)
    assert moved is not None
    assert here is not None
    assert not set(moved.names) & set(here.names)


@pytest.mark.parametrize(
    "token",
    [
        "",
        "07.",
        "07." + "a" * 42,
        "07." + "a" * 44,
        "7." + "a" * 43,
        "0G." + "a" * 43,
        "0A." + "a" * 43,
        "07-" + "a" * 43,
        "07." + "a" * 42 + "=",
        "07." + "a" * 42 + "\0",
        "07." + "a" * 43 + "\n",
        "07." + "a" * 43 + "\r\nSet-Cookie: x",
        "\n07." + "a" * 43,
        "07." + "é" * 43,
        "०७." + "a" * 43,  # digits of another script
        "07." + "a" * 10_000,
        "07." + "{}*?[" + "a" * 38,
        None,
        7,
        b"07." + b"a" * 43,
    ],
)
def test_what_looks_like_no_token_has_no_place(token: object) -> None:
    """A text of a wrong length, shard or alphabet has no place, and no other value is a token."""
    assert place_of(str(token), PEPPERS) is None
    assert not is_token(token)


@given(st.text(max_size=60))
def test_no_text_is_an_error(text: str) -> None:
    """Any cookie's text is a place or none, and never raises."""
    assert place_of(text, PEPPERS) is None or len(text) == 46
    assert read_handle(text) is None or len(text) == 46


def test_a_handle_is_no_token_and_a_token_no_handle() -> None:
    """A handle cannot be used as a token, nor a token as a handle."""
    token = make_token(7, SECRET)
    place = place_of(token, PEPPERS)
    assert place is not None
    handle = make_handle(7, place.names[0])
    assert read_handle(handle) == (7, place.names[:1])
    assert place_of(handle, PEPPERS) is None
    assert read_handle(token) is None


def test_users_are_spread_over_the_shards() -> None:
    """Users are spread evenly: no shard has more than one and a half times its share."""
    shards = [shard_of(b"user:%d" % n, 16) for n in range(16_000)]
    assert set(shards) == set(range(16))
    assert max(map(shards.count, range(16))) < 1_500
