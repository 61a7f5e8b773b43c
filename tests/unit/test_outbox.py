"""Waiting invalidations keep their order, the newest of each name, and a bound."""

from __future__ import annotations

from stillroom.cache.outbox import EVERYTHING, Outbox


def test_names_wait_in_order_the_newest_of_each() -> None:
    """Names wait in order, and a name that is put again goes to the end."""
    outbox = Outbox(10)
    outbox.put([b"k:a", b"t:b"])
    outbox.put([b"k:a"])
    assert list(outbox.first(10)) == [b"t:b", b"k:a"]
    assert list(outbox.first(1)) == [b"t:b"]


def test_what_is_put_while_it_is_delivered_waits_on() -> None:
    """A name that is put again during its delivery waits on, because it may be for a later change."""
    outbox = Outbox(10)
    outbox.put([b"k:a", b"k:b"])
    delivering = outbox.first(10)
    outbox.put([b"k:a"])
    outbox.delivered(delivering)
    assert list(outbox.first(10)) == [b"k:a"]


def test_one_too_many_becomes_everything_and_everything_is_all() -> None:
    """One name too many becomes "everything", so that more is invalidated than asked and never less."""
    outbox = Outbox(3)
    outbox.put([b"k:a", b"k:b", b"k:c", b"k:d"])
    assert list(outbox.first(10)) == [EVERYTHING]
    outbox.put([b"k:e"])
    assert list(outbox.first(10)) == [EVERYTHING, b"k:e"]
    outbox.put([EVERYTHING])
    assert list(outbox.first(10)) == [EVERYTHING]
