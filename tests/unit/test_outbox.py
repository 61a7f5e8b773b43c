"""Invalidations that wait: in order, the newest per name, bounded."""

from __future__ import annotations

from stillroom.cache.outbox import EVERYTHING, Outbox


def test_names_wait_in_order_the_newest_of_each() -> None:
    """Put again, a name goes to the end of the line."""
    outbox = Outbox(10)
    outbox.put([b"k:a", b"t:b"])
    outbox.put([b"k:a"])
    assert list(outbox.first(10)) == [b"t:b", b"k:a"]
    assert list(outbox.first(1)) == [b"t:b"]


def test_what_is_put_while_it_is_delivered_waits_on() -> None:
    """It may have been put for a change that the delivery came too early for."""
    outbox = Outbox(10)
    outbox.put([b"k:a", b"k:b"])
    delivering = outbox.first(10)
    outbox.put([b"k:a"])
    outbox.delivered(delivering)
    assert list(outbox.first(10)) == [b"k:a"]


def test_one_too_many_becomes_everything_and_everything_is_all() -> None:
    """More is invalidated than was asked, never less."""
    outbox = Outbox(3)
    outbox.put([b"k:a", b"k:b", b"k:c", b"k:d"])
    assert list(outbox.first(10)) == [EVERYTHING]
    outbox.put([b"k:e"])
    assert list(outbox.first(10)) == [EVERYTHING, b"k:e"]
    outbox.put([EVERYTHING])
    assert list(outbox.first(10)) == [EVERYTHING]
