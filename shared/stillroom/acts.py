"""Do what an operator asks: look at keys, sessions, bans and limits, and change them. Each act is told in the log.

The page at /operate offers them; the command line has a command for each. An act takes the texts of a form and
gives back a sentence and rows, never the value of an entry or of a session.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from ipaddress import ip_network
from typing import NamedTuple

from stillroom.broker import publish
from stillroom.dead_messages import KIND, sender
from stillroom.errors import InvalidArgument, InvalidLimit, StillroomError, did_you_mean
from stillroom.limits import Limit
from stillroom.limits.changes import read_time, write_rate, write_time
from stillroom.limits.limit import QUOTA_LIMIT, WINDOW_LIMIT
from stillroom.pauses import LONGEST_S
from stillroom.room import Stillroom
from stillroom.shown import named, plural, shown

log = logging.getLogger("stillroom.operator")

ROWS_MOST = 200
Form = Mapping[str, str]


class Button(NamedTuple):
    """An act that a row offers, and what it would be given."""

    label: str
    act: str
    form: Form


class Row(NamedTuple):
    """Hold what is known of one thing. A moment is a float, seconds since 1970."""

    cells: tuple[str | float, ...]
    buttons: tuple[Button, ...] = ()


class Done(NamedTuple):
    """Tell what came of an act."""

    said: str
    heads: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()


class Field(NamedTuple):
    """Describe one field that a form asks for."""

    name: str
    label: str
    example: str = ""
    is_needed: bool = True


class Act(NamedTuple):
    """One thing to do. `changes`: whether it is more than to look."""

    title: str
    fields: tuple[Field, ...]
    run: Callable[[Stillroom, Form], Done]
    changes: bool = True


def act(room: Stillroom, name: str, form: Form, who: str) -> Done:
    """Do it, and say so in the log. Raises InvalidArgument for what is missing; what the services raise."""
    if name not in ACTS:
        raise InvalidArgument(f"{shown(name, 50)} is no act{did_you_mean(name, ACTS)}")
    one = ACTS[name]
    given = {field.name: form.get(field.name, "").strip() for field in one.fields}
    for field in one.fields:
        if field.is_needed and not given[field.name]:
            raise InvalidArgument(f"{field.label} is missing")
    about = " ".join(f"{key}={shown(text, 200)}" for key, text in given.items() if text)
    level = logging.WARNING if one.changes else logging.INFO
    try:
        done = one.run(room, given)
    except StillroomError as error:
        log.log(level, "%s by %s: %s failed: %s", name, shown(who, 100), about, shown(error, 300))
        raise
    log.log(level, "%s by %s: %s: %s", name, shown(who, 100), about, shown(done.said, 300))
    return done


# The cache


def _look(room: Stillroom, form: Form) -> Done:
    key = form["key"]
    found = room.upkeep.explain(key)
    facts: dict[str, str | float | None] = {
        "a read is": found.outcome,
        "loader": found.loader,
        "tags": ", ".join(found.tags) or None,
        "bytes": None if found.size is None else f"{found.size:,}",
        "age": None if found.age_s is None else f"up to {found.age_s:,.0f} s",
        "fresh until": found.fresh_until,
        "ends": found.ends_at,
        "invalidated": found.invalidated_at,
        "under way": found.loading,
    }
    rows = tuple(Row((name, fact)) for name, fact in facts.items() if fact is not None)
    buttons = [Button("Invalidate", "invalidate", {"key": key})]
    if found.loader is not None:
        buttons.append(Button("Load it now", "load", {"key": key}))
    return Done(f"{key}: {found.why}", ("", ""), (*rows, Row(("",), tuple(buttons))))


def _invalidate(room: Stillroom, form: Form) -> Done:
    held = room.cache.invalidate(form["key"])
    return Done(f"{form['key']} is invalidated; it held {'a' if held else 'no'} value.")


def _invalidate_tag(room: Stillroom, form: Form) -> Done:
    soft = bool(form["soft"])
    room.cache.invalidate_by_tag(form["tag"], soft=soft)
    how = "are served stale and loaded again" if soft else "are gone for every reader"
    return Done(f"The values with the tag {form['tag']} {how}.")


def _invalidate_pattern(room: Stillroom, form: Form) -> Done:
    room.cache.invalidate_by_pattern(form["pattern"])
    return Done(f"The values whose key {form['pattern']} matches are gone for every reader.")


def _load(room: Stillroom, form: Form) -> Done:
    loader = order_load(room, form["key"])
    return Done(f"A worker was asked to load {form['key']} by {loader}{after_a_pause(room)}.")


def after_a_pause(room: Stillroom) -> str:
    """Return what is to be said of an order to load: nothing, or that it waits."""
    return ", after the pause of refreshes" if room.upkeep.refreshes_are_paused() else ""


def order_load(room: Stillroom, key: str) -> str:
    """Have a worker load a key now, whatever is there. Return the loader's name. Raises InvalidArgument."""
    found = room.upkeep.explain(key)
    loader, args = found.loader, found.args
    if args is None and loader is not None and loader in room.cache.loaders:
        args = room.cache.loaders[loader].arguments_of(key)
    if loader is None or args is None:
        unknown = "no loader is" if loader is None else f"the arguments of {loader} are not"
        raise InvalidArgument(
            f"{unknown} known for {key}: an app that has the loader loads it with the next read"
        )
    room.upkeep.order_load(loader, args)
    return loader


# Sessions


def _sessions(room: Stillroom, form: Form) -> Done:
    user = form["user"]
    devices = room.sessions.list_for_user(user, limit=ROWS_MOST)
    rows = tuple(
        Row(
            (device.handle, device.last_seen, device.created, device.expires_at),
            (Button("End", "end_session", {"user": user, "handle": device.handle}),),
        )
        for device in devices
    )
    heads = ("session", "last seen", "began", "ends")
    return Done(_counted(rows, "session", f" of {user}"), heads, rows)


def _end_session(room: Stillroom, form: Form) -> Done:
    ended = room.sessions.end(form["user"], form["handle"])
    return Done("The session is ended." if ended else "There is no such session.")


def _end_sessions(room: Stillroom, form: Form) -> Done:
    count = room.sessions.destroy_for_user(form["user"])
    return Done(f"{plural(count, 'session')} of {form['user']} {named(count, 'is', 'are')} ended.")


# Bans and limits


def _bans(room: Stillroom, _: Form) -> Done:
    found = room.abuse.bans(ROWS_MOST)
    rows = tuple(
        Row(
            (ban.subject, ban.until, ban.since, ban.rule or ban.by, ban.reason),
            (Button("Lift", "lift", {"subject": ban.subject}),),
        )
        for ban in found
    )
    return Done(_counted(rows, "ban"), ("subject", "until", "since", "by", "reason"), rows)


def _lift(room: Stillroom, form: Form) -> Done:
    subject = form["subject"]
    lifted = room.abuse.lift(subject)
    said = f"{subject} was not banned"
    if lifted:
        said = f"The ban of {subject} is lifted; for ten minutes no rule bans it again"
    return Done(f"{said}{still_banned(bans_around(room, subject))}.")


def still_banned(others: Sequence[str]) -> str:
    """Return what is to be said of bans that are in force beside the one that was to be lifted."""
    verb = named(len(others), "is", "are")
    return f"; {', '.join(others)} {verb} banned" if others else ""


def bans_around(room: Stillroom, subject: str) -> list[str]:
    """Return the bans in force of what holds an address or a network, or is in it."""
    return [ban.subject for ban in room.abuse.bans() if _overlap(subject, ban.subject)]


def _overlap(one: str, other: str) -> bool:
    """Return whether two addresses or networks have addresses in common. What is neither has none."""
    try:
        first, second = ip_network(one, strict=False), ip_network(other)
    except ValueError:
        return False
    return first.version == second.version and first.overlaps(second)


def _ban(room: Stillroom, form: Form) -> Done:
    ban = room.abuse.ban(form["subject"], read_time(form["for"]), form["reason"])
    return Done(f"{ban.subject} is banned for {form['for']}.")


def _limits(room: Stillroom, _: Form) -> Done:
    changes = {change.name: change for change in room.limits.changes()}
    rows = []
    for name in sorted({*room.limits.names(), *changes}):
        change = changes.get(name)
        said = write_rate(change.quota, change.window) if change else "as the app says"
        rows.append(Row((name, said, change.until if change else "", change.by if change else "")))
    return Done(
        f"{plural(len(rows), 'limit')}.", ("limit", "is", "until", "by"), tuple(rows[:ROWS_MOST])
    )


def _peek(room: Stillroom, form: Form) -> Done:
    """Tell how much somebody has used in a limit's longest window. What it admits, the app alone knows."""
    name, by = form["limit"], _kind(room, form)
    windows = room.state.run(room.operations.limits.windows())
    if name not in windows:
        raise InvalidArgument(f"no process has a limit {name}{did_you_mean(name, windows)}")
    who, window = form["subject"], max(1, windows[name])
    found = room.limits.peek({by: who}, [Limit(name, QUOTA_LIMIT, window, by=by)])
    if not found.standings:
        return Done(f"{who} is {'banned' if found.banned else 'exempt from limits'}.")
    used = f"{QUOTA_LIMIT - found.standings[0].remaining:,} of {name} in {write_time(window)}"
    button = Button("Reset", "reset", {"subject": who, "limit": name, "by": by})
    return Done(f"{who} has used {used}.", ("used",), (Row((used,), (button,)),))


def _reset(room: Stillroom, form: Form) -> Done:
    by = _kind(room, form)
    if not forget_used(room, by, form["subject"], form["limit"]):
        return Done(f"{form['subject']} has used nothing of {form['limit']}, by {by}.")
    return Done(f"What {form['subject']} has used of {form['limit']} is forgotten.")


def forget_used(room: Stillroom, by: str, subject: str, limit: str) -> bool:
    """Forget what a subject has used of a limit. Return False where nothing was counted: of a name that is spelled
    otherwise, or by another kind, such as the name of a header. Raises InvalidLimit as `check_used` does.
    """
    check_used(room, limit)
    window = max(1, room.state.run(room.operations.limits.windows()).get(limit, WINDOW_LIMIT))
    found = room.limits.peek({by: subject}, [Limit(limit, QUOTA_LIMIT, window, by=by)])
    room.limits.reset({by: subject}, [Limit(limit, 1, 1, by=by)])
    return not found.standings or any(one.remaining < QUOTA_LIMIT for one in found.standings)


def check_used(room: Stillroom, limit: str) -> None:
    """Raise InvalidLimit for a limit that no process has used, where they have used others."""
    known = room.limits.names()
    if known and limit not in known:
        raise InvalidLimit(
            limit, f"no process has a limit of this name{did_you_mean(limit, known)}"
        )


def _kind(room: Stillroom, form: Form) -> str:
    """Return what the limit counts by. A user is known by a hash, which takes the app's pepper."""
    by = form["by"] or "ip"
    if by != "ip" and not room.settings.session_peppers:
        raise InvalidArgument(f"a limit by {by} needs STILLROOM_SESSION_PEPPERS")
    return by


def _counted(rows: tuple[Row, ...], one: str, of: str = "") -> str:
    more = "; there may be more" if len(rows) == ROWS_MOST else ""
    return f"{plural(len(rows), one)}{of}{more}."


# Dead letters and refreshes


def _letters(room: Stillroom, _: Form) -> Done:
    letters = room.state.run(room.dead_letters.list(ROWS_MOST))
    rows = tuple(
        Row(
            (letter.when, letter.kind, letter.reason, letter.id),
            (
                Button("Send again", "retry", {"id": letter.id}),
                Button("Drop", "drop", {"id": letter.id}),
            ),
        )
        for letter in letters
    )
    return Done(_counted(rows, "dead letter"), ("when", "kind", "reason", "id"), rows)


def teach_messages(room: Stillroom) -> None:
    """Let a room send Celery's messages again: straight away, for somebody waits to hear whether it could be."""
    queues = [room.keys.queue(kind) for kind in ("refresh", "maintenance")]
    room.dead_letters.senders[KIND] = sender(partial(publish, room.settings), queues)


def _retry(room: Stillroom, form: Form) -> Done:
    teach_messages(room)
    room.state.run(room.dead_letters.retry(form["id"]))
    return Done(f"{form['id']} is sent again.")


def _drop(room: Stillroom, form: Form) -> Done:
    dropped = room.state.run(room.dead_letters.drop(form["id"]))
    return Done(f"{form['id']} is dropped." if dropped else "There is no such letter.")


def _pause(room: Stillroom, form: Form) -> Done:
    room.upkeep.pause("refresh", read_time(form["for"], LONGEST_S), by="operator")
    return Done(f"Refreshes are paused for {form['for']}.")


def _resume(room: Stillroom, _: Form) -> Done:
    ended = room.upkeep.resume("refresh")
    return Done("Refreshes go on." if ended else "Refreshes were not paused.")


_KEY = Field("key", "Key", "product:7")
_USER = Field("user", "User", "42")
_SUBJECT = Field("subject", "Address or network", "203.0.113.7")
_FOR = Field("for", "For", "10m")
_ID = Field("id", "Letter")
_USED = (
    Field("subject", "Address or user", "203.0.113.7"),
    Field("limit", "Limit", "auth"),
    Field("by", "By", "ip", False),
)

ACTS: Mapping[str, Act] = {
    "look": Act("Look at a key", (_KEY,), _look, changes=False),
    "invalidate": Act("Invalidate a key", (_KEY,), _invalidate),
    "invalidate_tag": Act(
        "Invalidate a tag",
        (Field("tag", "Tag", "products"), Field("soft", "Softly (write yes)", "", False)),
        _invalidate_tag,
    ),
    "invalidate_pattern": Act(
        "Invalidate a pattern", (Field("pattern", "Glob", "product:*"),), _invalidate_pattern
    ),
    "load": Act("Load a key now", (_KEY,), _load),
    "sessions": Act("Look at a user's sessions", (_USER,), _sessions, changes=False),
    "end_session": Act("End one session", (_USER, Field("handle", "Session")), _end_session),
    "end_sessions": Act("End all sessions of a user", (_USER,), _end_sessions),
    "bans": Act("Look at the bans", (), _bans, changes=False),
    "ban": Act("Ban", (_SUBJECT, _FOR, Field("reason", "Reason", "", False)), _ban),
    "lift": Act("Lift a ban", (_SUBJECT,), _lift),
    "limits": Act("Look at the limits", (), _limits, changes=False),
    "peek": Act("Look at what somebody has used", _USED, _peek, changes=False),
    "reset": Act("Reset a limit", _USED, _reset),
    "letters": Act("Look at the dead letters", (), _letters, changes=False),
    "retry": Act("Send a dead letter again", (_ID,), _retry),
    "drop": Act("Drop a dead letter", (_ID,), _drop),
    "pause": Act("Pause refreshes", (_FOR,), _pause),
    "resume": Act("Resume refreshes", (), _resume),
}
