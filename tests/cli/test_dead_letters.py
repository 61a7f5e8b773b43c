"""`stillroom dead-letters` works as a person types it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from stillroom.cache.orders import Load, to_body, to_member
from stillroom.cli import app
from stillroom.dead_messages import KIND
from stillroom.embedded import EmbeddedServer
from stillroom.errors import DispatchFailed
from tests.support.full_disk import refuse_writes

ORDER = {
    "task": "stillroom.invalidate_tags",
    "queue": "stillroom.maintenance",
    "args": [["t"]],
    "kwargs": {},
}


@pytest.fixture
def run(server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command and return what it prints."""
    monkeypatch.setenv("REDIS_URL", server.url)

    def run(*arguments: str, raises: type[Exception] | None = None) -> str:
        result = CliRunner().invoke(app, ["dead-letters", *arguments])
        assert (result.exit_code == 0) == (raises is None), result.output
        if raises is not None:
            assert isinstance(result.exception, raises)
            return str(result.exception)
        return result.output

    return run


@pytest.fixture
def room(make_room: Any) -> Any:
    return make_room()


@pytest.fixture
def letter(room: Any) -> str:
    """Return the id of one dead letter."""
    return str(room.state.run(room.dead_letters.add(KIND, json.dumps(ORDER), "it does not fit")))


def test_a_person_finds_what_was_asked_and_why_it_was_not_done(run: Any, letter: str) -> None:
    """The list shows task and reason and one letter is shown whole, both as JSON too."""
    listed = run("list")
    for part in (
        letter,
        KIND,
        "stillroom.invalidate_tags",
        "it does not fit",
        "1 of 1 dead letter",
    ):
        assert part in listed
    assert '[["t"]]' in run("show", letter)
    (one,) = json.loads(run("list", "--json"))
    assert one == json.loads(run("show", letter, "--json"))
    assert one["body"] == ORDER
    assert one["reason"] == "it does not fit"


def test_the_list_names_an_order_and_its_loader(run: Any, room: Any) -> None:
    """An order that became a dead letter is listed by its name, and with the loader that it is for."""
    order = Load(loader="product", args={"id": 7})
    room.state.run(room.dead_letters.add("order", to_body(to_member(order)), "KeyError: 7"))
    assert " load product " in run("list")


def test_retry_sends_it_again_and_drops_the_letter(run: Any, client: Any, letter: str) -> None:
    """Retry puts a message with the same arguments into its queue and drops the letter."""
    assert f"{letter} is sent again" in run("retry", letter)
    (raw,) = client.lrange("stillroom.maintenance", 0, -1)
    message = json.loads(raw)
    assert message["headers"]["task"] == "stillroom.invalidate_tags"
    assert message["properties"]["delivery_info"]["routing_key"] == "stillroom.maintenance"
    assert "0 of 0 dead letters" in run("list")


def test_drop_deletes_it(run: Any, client: Any, letter: str) -> None:
    """Drop deletes a letter, and its order is not carried out."""
    assert json.loads(run("drop", letter, "--json")) == {"dropped": 1}
    assert run("drop", letter) == "0 dropped\n"
    assert not client.exists("stillroom.maintenance")


def test_what_can_not_be_sent_again_stays_a_letter(run: Any, room: Any, client: Any) -> None:
    """A message without a task, one for a foreign queue and a missing letter are not sent, each with its reason."""
    add = room.dead_letters.add
    raw, foreign, cut = (
        room.state.run(add(KIND, body, "why"))
        for body in (
            json.dumps({"queue": "stillroom.maintenance", "raw": "\x00"}),
            json.dumps(ORDER | {"queue": "stillroom:{0}:todo"}),
            json.dumps(ORDER | {"args": ["a" * 100_000]}),
        )
    )
    assert "no task can be made of this letter" in run("retry", raw, raises=ValueError)
    assert "is no queue of this namespace" in run("retry", foreign, raises=ValueError)
    assert "were not kept" in run("retry", cut, raises=ValueError)
    assert "there is no dead letter" in run("show", "1-1", raises=LookupError)
    assert "there is no dead letter" in run("retry", "nonsense", raises=LookupError)
    assert client.keys("stillroom.*") == []
    assert "3 of 3 dead letters" in run("list")


def test_a_broker_that_is_away_keeps_the_letter(
    run: Any, letter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the broker is away a letter stays, because it is dropped only after it was sent."""
    monkeypatch.setenv("STILLROOM_BROKER_URL", "redis://127.0.0.1:1")
    assert "the broker did not take it" in run("retry", letter, raises=DispatchFailed)
    monkeypatch.delenv("STILLROOM_BROKER_URL")
    assert "1 of 1 dead letter" in run("list")


@pytest.mark.parametrize(
    "body", ["[" * 30_000 + "]" * 30_000, '{"task": "x", "kwargs": {"a": NaN, "b": 1e999}}']
)
def test_a_body_that_is_no_json_to_show_is_text(run: Any, room: Any, body: str) -> None:
    """A body nested too deep for Python, or with NaN, is shown as text, and hides no other letter."""
    one = room.state.run(room.dead_letters.add(KIND, body, "why"))
    assert "1 of 1 dead letter" in run("list")
    assert run("show", one)
    for words in (("list",), ("show", one)):
        found = json.loads(run(*words, "--json"), parse_constant=pytest.fail)
        assert (found[0] if words == ("list",) else found)["body"] == body[: 64 * 1024]
    if body[0] == "[":
        assert "no task can be made" in run("retry", one, raises=ValueError)


def test_retry_all_says_that_there_is_nothing_to_send(run: Any) -> None:
    """Retry with --all says so where there are no dead letters, and ends well."""
    assert run("retry", "--all") == "there are no dead letters\n"
    assert json.loads(run("retry", "--all", "--json")) == {"retried": [], "refused": {}}


def test_retry_all_sends_what_it_can(run: Any, room: Any, client: Any, letter: str) -> None:
    """Retry with --all sends each letter. Those that can't be sent stay, with their reasons, and exit code 1."""
    bad, foreign, newer, broken, more = (
        room.state.run(room.dead_letters.add(kind, body, "why"))
        for kind, body in (
            (KIND, "{}"),
            (KIND, json.dumps(ORDER | {"queue": "theirs"})),
            ("order", to_body(b'invalidate_all {"soft": true}')),
            ("order", to_body(b"load {")),
            (KIND, json.dumps(ORDER)),
        )
    )
    said = json.loads(CliRunner().invoke(app, ["dead-letters", "retry", "--all", "--json"]).stdout)
    assert said["retried"] == [letter, more]
    assert "no task can be made" in said["refused"][bad]
    assert "no queue of this namespace" in said["refused"][foreign]
    for letter in (newer, broken):
        assert "can make no order of it" in said["refused"][letter]
    assert client.llen("stillroom.maintenance") == 2
    assert CliRunner().invoke(app, ["dead-letters", "retry", "--all"]).exit_code == 1
    assert CliRunner().invoke(app, ["dead-letters", "retry"]).exit_code == 2
    assert CliRunner().invoke(app, ["dead-letters", "retry", bad, "--all"]).exit_code == 2


def test_what_only_looks_works_where_the_disk_is_full(
    own_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands that only look do not wait for a server that refuses writes."""
    monkeypatch.setenv("REDIS_URL", own_server.url)
    monkeypatch.setenv("STILLROOM_CONNECT_ATTEMPTS", "1")
    refuse_writes(own_server)
    for command in (["dead-letters", "list"], ["bans", "list"], ["limits", "show"]):
        told = CliRunner().invoke(app, command)
        assert told.exit_code == 0, (command, told.exception)
    refused = CliRunner().invoke(app, ["sessions", "end", "u1"])
    assert "misconf" in str(refused.exception)
