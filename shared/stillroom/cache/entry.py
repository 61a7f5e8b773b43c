"""Write and read one cached value in its form in Redis, and tell how fresh it is. Pure: the time is an argument.

    1⇥<epoch>⇥<stamp>⇥<fresh until, ms>⇥<crc32 of the rest>⇥<codec>⇥<source>⇥<key>⇥<tag>⇥<tag>…⏎<payload>

The codec is a letter (codec.py), and behind a colon the fingerprint of the release whose value it is.

A line of text, then the JSON, so that `redis-cli GET` shows all of it. Scripts write the first four
fields (the server's clocks decide them) in front of the rest, which is made here and is covered by
the checksum: cut short, altered, or another key's bytes are a miss, never a value.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple
from zlib import crc32

VERSION = b"1"
NUMBER_DIGITS = 17  # µs since 1970 have 16


class Freshness(Enum):
    """Tell what a reader may do with an entry.

    FRESH: serve it. STALE: serve it, and have it refreshed. DEAD: never serve it.
    """

    FRESH = "fresh"
    STALE = "stale"
    DEAD = "dead"


class Entry(NamedTuple):
    """One entry as it was read. Times are the server's, in ms since 1970; `stamp` is the logical clock."""

    epoch: bytes
    stamp: int
    fresh_until: int
    codec: bytes
    source: bytes
    key: bytes
    tags: list[bytes]
    payload: bytes
    is_beside: bool = False  # it was read in its key's other place: see lua/lib/places.lua

    @property
    def release(self) -> bytes:
        """Return the fingerprint of the app's release whose value it is; nothing for everybody's."""
        return self.codec[2:]

    @property
    def loader(self) -> str:
        """Return the name of the loader that has made the value; empty if the entry does not say."""
        return self.source.partition(b" ")[0].decode(errors="replace")


_entry = tuple.__new__


class Corrupt(ValueError):
    """These bytes are not an entry for this key."""


def parse(raw: bytes, key: bytes) -> Entry:
    """Return the entry in these bytes from Redis. Raises Corrupt for anything not written by us for this key."""
    try:
        version, epoch, stamp, fresh_until, checksum, rest = raw.split(b"\t", 5)
        if version != VERSION or crc32(rest) != int(checksum):
            raise Corrupt("checksum or version")
        header, _, payload = rest.partition(b"\n")
        codec, source, name, *tags = header.split(b"\t")
        if name != key:
            raise Corrupt("another key's entry")
        if len(stamp) > NUMBER_DIGITS or len(fresh_until) > NUMBER_DIGITS:
            raise Corrupt("a time that no clock shows")
        # Past NamedTuple's own constructor, which is Python: this is read on every hit.
        return _entry(
            Entry, (epoch, int(stamp), int(fresh_until), codec, source, name, tags, payload, False)
        )
    except ValueError as error:
        raise Corrupt(str(error)) from None


def parse_head(raw: bytes, key: bytes) -> tuple[bytes, Entry] | None:
    """Return the first bytes of an entry → how it begins (no other does: there is its checksum), and its header.

    None where this is no entry for this key, or its header is longer than what was read.
    """
    head, line_end, _ = raw.partition(b"\n")
    fields = head.split(b"\t")
    if not line_end or len(fields) < 8 or fields[0] != VERSION or fields[7] != key:
        return None
    _, epoch, stamp, fresh_until, _, codec, source, name, *tags = fields
    try:
        entry = Entry(epoch, int(stamp), int(fresh_until), codec, source, name, tags, b"")
    except ValueError:
        return None
    return b"\t".join(fields[:5]) + b"\t", entry


def body(codec: bytes, source: bytes, key: bytes, tags: list[bytes], payload: bytes) -> bytes:
    """Return the part of an entry that the caller knows; a script puts epoch, stamp and time in front."""
    rest = b"\t".join([codec, source, key, *tags]) + b"\n" + payload
    return b"%d\t%b" % (crc32(rest), rest)
