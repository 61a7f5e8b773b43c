"""Work that could not be done is kept as a dead letter for a person to read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from stillroom import Stillroom
from stillroom.dead_letters import BODY_LIMIT, KEPT_S, LETTERS_LIMIT, REASON_LIMIT, DeadLetter
from stillroom.durations import LAST_MOMENT
from stillroom.errors import DeadLetterRefused, NoDeadLetter
from stillroom.operation import Operation


def add(
    room: Any, kind: str = "message", body: str = "{}", reason: str = "why", tries: int = 1
) -> str:
    kept: str = room.state.run(room.dead_letters.add(kind, body, reason, tries))
    return kept


def test_a_letter_comes_back_as_it_was_kept(room: Any, client: Any) -> None:
    """A dead letter comes back with the kind, body, reason and tries it was kept with, and the time."""
    kept = add(room, "message", '{"a": "Käse\\n"}', "no loader named 'x'", 3)
    letter = room.state.run(room.dead_letters.show(kept))
    assert (letter.kind, json.loads(letter.body), letter.reason, letter.tries, letter.cut) == (
        *("message", {"a": "Käse\n"}, "no loader named 'x'"),
        *(3, 0),
    )
    seconds, us = client.time()
    assert 0 <= seconds + us / 1e6 - letter.when < 60
    assert room.state.run(room.dead_letters.list()) == [letter]
    assert room.state.run(room.dead_letters.count()) == 1


def test_a_letter_from_behind_the_end_of_calendars_is_shown(room: Any, client: Any) -> None:
    """A letter whose id is no time of a calendar is listed with the last one there is."""
    client.xadd(room.keys.dead_letters, {"kind": "message"}, id="18446744073709551000-1")
    (letter,) = room.state.run(room.dead_letters.list())
    assert letter.when == LAST_MOMENT


def test_letters_are_listed_in_pages_the_oldest_first(room: Any) -> None:
    """Dead letters are listed in pages, the oldest first; a page begins after the last id of the one before."""
    ids = [add(room, body=str(n)) for n in range(5)]
    page = room.state.run(room.dead_letters.list(2))
    assert [letter.id for letter in page] == ids[:2]
    page = room.state.run(room.dead_letters.list(10, after=page[-1].id))
    assert [letter.id for letter in page] == ids[2:]


def test_only_the_newest_are_kept(room: Any, client: Any) -> None:
    """Past the limit the oldest dead letters go, and 90 days after the newest all of them."""
    first = add(room)
    client.expire(room.keys.dead_letters, 10)
    for _ in range(LETTERS_LIMIT):
        room.state.run(room.dead_letters.add("message", "{}", "why"))
    assert client.xlen(room.keys.dead_letters) == LETTERS_LIMIT
    assert client.ttl(room.keys.dead_letters) > KEPT_S - 60
    with pytest.raises(NoDeadLetter):
        room.state.run(room.dead_letters.show(first))


def test_a_letter_is_sent_again_by_who_knows_its_kind(room: Any) -> None:
    """The sender of its kind gets the whole dead letter; then the letter is gone."""
    sent: list[DeadLetter] = []

    def send(letter: DeadLetter) -> Operation[None]:
        sent.append(letter)
        yield [(b"PING",)]

    room.dead_letters.senders["message"] = send
    kept = add(room, body='{"x": 1}')
    assert room.state.run(room.dead_letters.retry(kept)) == sent[0]
    assert sent[0].body == '{"x": 1}'
    assert room.state.run(room.dead_letters.list()) == []
    with pytest.raises(NoDeadLetter):
        room.state.run(room.dead_letters.retry(kept))


def test_a_letter_whose_sending_fails_is_still_there(room: Any) -> None:
    """A dead letter whose sending failed stays; it goes only after it was sent."""

    def send(letter: DeadLetter) -> Operation[None]:
        yield [(b"PING",)]
        raise OSError("no broker")

    room.dead_letters.senders["message"] = send
    kept = add(room)
    with pytest.raises(OSError, match="no broker"):
        room.state.run(room.dead_letters.retry(kept))
    assert room.state.run(room.dead_letters.show(kept)).id == kept


def test_what_was_cut_or_is_of_another_kind_is_not_sent(room: Any) -> None:
    """A letter that was shortened or is of another kind is not sent again."""
    long = add(room, body="x" * (BODY_LIMIT + 7), reason="y" * 2_000)
    letter = room.state.run(room.dead_letters.show(long))
    assert (len(letter.body), letter.cut, len(letter.reason)) == (BODY_LIMIT, 7, REASON_LIMIT)
    room.dead_letters.senders["message"] = lambda letter: iter(())
    with pytest.raises(DeadLetterRefused, match="7 bytes"):
        room.state.run(room.dead_letters.retry(long))
    with pytest.raises(DeadLetterRefused, match="can send"):
        room.state.run(room.dead_letters.retry(add(room, kind="parcel")))


def test_an_order_is_a_letter_or_an_order_and_never_lost(room: Any, client: Any) -> None:
    """An order that is due as it was taken becomes a letter with all of its body. One that was asked for again
    stays an order.
    """
    body, orders, tries = "x" * (BODY_LIMIT + 7), room.keys.orders, room.keys.order_tries
    client.zadd(orders, {"one": 5})
    client.hset(tries, "one", 8)

    def bury(due: bytes) -> Operation[None]:
        yield [room.dead_letters.burying("order", body, "why", 8, b"one", due)]

    room.state.run(bury(b"4"))
    assert (client.zscore(orders, "one"), client.hget(tries, "one")) == (5, b"8")
    assert room.state.run(room.dead_letters.count()) == 0
    room.state.run(bury(b"5"))
    (letter,) = room.state.run(room.dead_letters.list())
    assert (letter.body, letter.cut, letter.tries) == (body, 0, 8)
    assert not client.exists(orders, tries)


def test_letters_are_dropped(room: Any) -> None:
    """The named dead letters are dropped and the others stay."""
    one, two = add(room), add(room)
    assert room.state.run(room.dead_letters.drop(one, "1-1")) == 1
    assert [letter.id for letter in room.state.run(room.dead_letters.list())] == [two]
    assert room.state.run(room.dead_letters.drop()) == 0


@pytest.mark.parametrize("id", ["", "x", "1", "1-1-1", "-", "+", "(1-1", "1-1\n"])
def test_what_is_no_id_is_told_so(make_room: Any, id: str) -> None:
    """An id that Redis would not take raises NoDeadLetter, not an error of the server."""
    room: Stillroom = make_room()
    with pytest.raises(NoDeadLetter):
        room.state.run(room.dead_letters.show(id))
    with pytest.raises(NoDeadLetter):
        room.state.run(room.dead_letters.drop(id))


def test_bytes_that_are_no_text_are_kept_as_escapes(room: Any) -> None:
    """Bytes that are no text are kept as escapes, so that every message can be kept and read."""
    letter = room.state.run(room.dead_letters.show(add(room, body="\ud800", reason="\udfff")))
    assert (letter.body, letter.reason) == ("\\ud800", "\\udfff")
