"""One family of errors: each is a sentence plus the data a caller may act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class StillroomError(Exception):
    """The base of everything that Stillroom raises on purpose. Pickled and copied with its message and its data."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Python would call the class with the message, which is what most of them make of their arguments.
        return _made_again, (type(self), self.args, vars(self))


def _made_again(kind: type[StillroomError], args: tuple[Any, ...], data: dict[str, Any]) -> Any:
    error = kind.__new__(kind)
    error.args = args
    vars(error).update(data)
    return error


class SettingsError(StillroomError, ValueError):
    """A setting is unknown, missing or out of its range; the message names each one.

    Answer: do not start; print the message.
    """


class InvalidArgument(StillroomError, TypeError, ValueError):
    """An argument can't be used: its name is unknown, its type is wrong, or it is out of range.

    The message says what is allowed.

    Answer: a mistake in the code; let it fail a test.
    """


class Misplaced(StillroomError, RuntimeError):
    """A call can't work where it stands.

    That is a lock's object in a second `with` block, a blocking room's async loader in the loop that awaits it, an
    AsyncStillroom in an event loop that is not asyncio's, or what needs a thread when the interpreter is ending.

    Answer: a mistake in the code; the message says what to call instead.
    """


class UnknownSetting(SettingsError, InvalidArgument):
    """A room was given a keyword that is no setting. The message names the setting that was probably meant."""


class InvalidKey(StillroomError, ValueError):
    """A key, tag or key template can't be used. `given` is what came in, `reason` says why it is refused.

    Answer: a mistake in the code; 400 where the key came from a visitor.
    """

    def __init__(self, given: object, reason: str) -> None:
        super().__init__(f"{_shortened(given)}: {reason}")
        self.given = given
        self.reason = reason


class ValueTooLarge(StillroomError, ValueError):
    """An encoded value is over the limit (`size` and `limit` in bytes). `setting` names that limit, if it is one.

    Answer: store less, or raise `STILLROOM_VALUE_LIMIT`; for sessions it is `STILLROOM_SESSION_DATA_LIMIT`.
    """

    def __init__(self, size: int, limit: int, setting: str = "") -> None:
        of = f" of {setting}" if setting else ""
        super().__init__(f"the encoded value has {size:,} bytes, the limit{of} is {limit:,}")
        self.size = size
        self.limit = limit
        self.setting = setting


class ImageRefused(StillroomError, ValueError):
    """This file is not an image to be looked at; `reason` is one word, `sentence` says why.

    Reasons: name, link, special (no plain file), bytes, pixels, content, changing, denied.

    Answer: 404 for `name`, `link` and `special`; 422 for the others.
    """

    def __init__(self, filename: str, reason: str, sentence: str) -> None:
        super().__init__(f"{_shortened(filename)}: {sentence}")
        self.filename = filename
        self.reason = reason
        self.sentence = sentence


class ImagesUnavailable(StillroomError):
    """Images can't be read here: no root is set, there is no such folder, or Pillow is not installed; or not just
    now: the process has too many open files, or its disk fails.

    Answer: 500; set `STILLROOM_IMAGE_ROOT`, install `stillroom[images]`.
    """


class LoadFailed(StillroomError):
    """Another process' load, which this call waited for, has failed; `kind` is the name of its error's class.

    Callers in that process get the error itself. The next call tries again.

    Answer: what you answer when the loader itself fails; mostly 502 or 503.
    """

    def __init__(self, loader: str, kind: str, detail: str = "") -> None:
        super().__init__(
            f"{loader}: the load that was waited for failed with {kind}"
            + (f": {detail}" if detail else "")
        )
        self.loader = loader
        self.kind = kind
        self.detail = detail


class LoadShed(StillroomError):
    """The loader has as many loads under way as `at_once` allows, and the queue is too long.

    Where nobody handles it, the middlewares, Flask's `init_app` and Django's session middleware answer 503 with
    `Retry-After: retry_after` (seconds).

    Answer: 503 with `Retry-After`.
    """

    def __init__(self, loader: str, at_once: int, retry_after: float) -> None:
        super().__init__(
            f"{loader}: {at_once} loads are under way, and as many more wait; try again in {retry_after:g} s"
        )
        self.loader = loader
        self.at_once = at_once
        self.retry_after = retry_after


class UnknownLoader(StillroomError, LookupError):
    """No loader is registered under this `name` in this process. `known` are those that are.

    Answer: name its module in `STILLROOM_LOADERS`.
    """

    def __init__(self, name: str, known: Sequence[str]) -> None:
        super().__init__(f"no loader named {name!r}; registered: {', '.join(known) or 'none'}")
        self.name = name
        self.known = tuple(known)


WHO_MAY = "users.acl says what this user of Redis may do"


class RedisUnavailable(StillroomError):
    """Redis did not answer in time, or at all, or refused.

    `reason` is one word: refused, name (the host has none), timeout, tls, closed, breaker, pool, budget, contended,
    nocluster; auth, select or time for the part of a connection's handshake that was refused; readonly (it is a
    replica), cluster (it is a node of one, and no setting says so), old (older than Redis 6.2), sentinel (they name
    no primary), proxy; settings: see SettingsDiffer; unsupported (it does not know a command), or, in
    `RedisRefused`, the server's own error code in lower case. `detail` says which setting leads there, and what to
    do.

    Answer: 503, or go on without; after an edit that was saved, `defer=True` instead.
    """

    def __init__(self, reason: str, detail: str = "", *, may_be_done: bool = False) -> None:
        what = "Redis refuses this" if reason in OF_THE_COMMAND else "Redis is unavailable"
        super().__init__(f"{what} ({reason})" + (f": {detail}" if detail else ""))
        self.reason = reason
        self.detail = detail
        self._may_be_done = may_be_done

    @property
    def may_be_done(self) -> bool:
        """Return whether Redis may have done, or may still do, what was asked: it was sent, and no answer came.

        Or a server has done it that was no primary any more.
        """
        return self._may_be_done or self.reason in UNANSWERED

    @property
    def lacks_right(self) -> bool:
        """Return whether the server answered that this user of Redis may not do that."""
        return self.reason == "noperm"


class RedisRefused(RedisUnavailable):
    """The server answered with an error: OOM, READONLY, NOPERM, LOADING, WRONGTYPE …

    `replies` holds the whole batch's replies, errors in their places: a batch is not a transaction.

    Answer: as RedisUnavailable; an operator looks at the code.
    """

    def __init__(self, code: str, detail: str, replies: Sequence[Any] = ()) -> None:
        super().__init__(code.lower(), detail)
        self.replies = list(replies)


class SettingsDiffer(RedisUnavailable):
    """This process has another value of a setting than the other processes of its namespace.

    Redis would answer, but what this process reads and writes there would not be what the others mean. So its calls
    do what they do without Redis. `setting` is the setting's name; `mine` and `agreed` are the two values; `who`
    is the process that brought the agreed one.

    Answer: as RedisUnavailable; an operator makes the settings alike.
    """

    def __init__(self, setting: str, mine: str, agreed: str, who: str) -> None:
        name = f"STILLROOM_{setting.upper()}" if setting.isidentifier() else setting
        sentence = (
            f"{name} is {mine} in this process and {agreed} in the others (so says {who}). Set it to {agreed} "
            f"here; or stop every process of the namespace, say `stillroom agree {setting}` with the new value, "
            "and start them again"
        )
        super().__init__("settings", sentence)
        self.args = (sentence,)
        self.setting = setting
        self.mine = mine
        self.agreed = agreed
        self.who = who


# Reasons that say nothing of whether a command was done.
UNANSWERED = frozenset({"timeout", "closed", "protocol", "proxy", "unblocked"})
# The answers of a server that refuses this one command: it is not away.
OF_THE_COMMAND = frozenset({"wrongtype", "err", "unsupported", "noperm"})
# Of these no other answer will come. A right is given back, and what Redis is owed has to be told then.
REFUSED_FOR_GOOD = OF_THE_COMMAND - {"noperm"}
# A server that answers this to each write can't write its file, or has too few replicas. It answers all reads.
READS_ONLY = frozenset({"misconf", "noreplicas"})
# Stillroom can't work as it is configured: the server is of the wrong kind, or this user lacks a right. Unlike an
# outage this does not end by itself.
MISCONFIGURED = frozenset({"cluster", "old", "crossslot", "moved", "ask", "unsupported", "noperm"})
# Reasons that another attempt, later, will not mend.
FINAL = frozenset(
    {
        *("auth", "select", "time", "tls", "noauth", "wrongpass"),
        *("protocol", "nocluster", "nomaster", "settings"),
        # Not moved and ask: on a cluster with its setting a slot is on its way, and arrives.
        *MISCONFIGURED - {"moved", "ask"},
    }
)


def is_in_doubt(error: BaseException) -> bool:
    """Return whether Redis may have done what ended with this error: the reply is late or lost, or nobody waits for
    it, because the call was cancelled or interrupted.
    """
    if isinstance(error, RedisUnavailable):
        return error.may_be_done
    return not isinstance(error, GeneratorExit)  # nobody drives that operation any more


@contextmanager
def partly_done(is_so: bool = True) -> Iterator[None]:
    """Let an error of this block say that Redis may have done what was asked: an earlier exchange may have.

    `is_so=False`: the block's errors stay as they are.
    """
    try:
        yield
    except RedisUnavailable as error:
        error._may_be_done = error._may_be_done or is_so
        raise


def is_misconfigured(error: RedisUnavailable) -> bool:
    """Return whether a mistake in the configuration is behind this error. An open breaker tells why it opened."""
    reason = error.detail if error.reason == "breaker" else error.reason
    return reason in MISCONFIGURED


class SessionStoreUnavailable(RedisUnavailable):
    """Redis is away, so nobody can say whether the session lives. It is not a logout.

    Answer: 503, and leave the cookie.
    """

    @classmethod
    def of(cls, error: RedisUnavailable) -> SessionStoreUnavailable:
        """Return the error as one of sessions."""
        return cls(error.reason, error.detail, may_be_done=error.may_be_done)


class SessionEnded(StillroomError, LookupError):
    """There is no such session to write to. `reason`: missing, expired, revoked, replayed, rotated or replaced.

    Answer: 401, and clear the cookie.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"this session does not live ({reason})")
        self.reason = reason


class SessionConflict(StillroomError):
    """Another request changed the session first. `current` is its version now, or None if it was rotated.

    Answer: read the session and try again, or 409; `mutate` does so by itself.
    """

    def __init__(self, current: int | None) -> None:
        super().__init__(
            "somebody else has rotated this session"
            if current is None
            else f"the session has version {current} now"
        )
        self.current = current


class TooManySessions(StillroomError):
    """The user already has `limit` live sessions (`count`).

    Answer: 409 or 403: the user ends another session first.
    """

    def __init__(self, count: int, limit: int) -> None:
        super().__init__(f"the user has {count} sessions, the limit is {limit}")
        self.count = count
        self.limit = limit


class SessionNotLoaded(StillroomError, RuntimeError):
    """A request's session was looked at before it was read: `await session.load()` comes first.

    Answer: a mistake in the code.
    """


class SessionNotFresh(StillroomError):
    """The user proved who they are too long ago for this, or never in this session: ask again, then `confirm`.

    `within`: seconds that were asked for. `age`: seconds since the proof, None where there was none; less than 0
    where the server's clock was set back since.

    Answer: 401 or 403, and ask for the password again.
    """

    def __init__(self, within: float, age: float | None) -> None:
        if age is None:
            proof = "nobody has proved in this session who they are"
        else:
            since = f"{age:,.0f} s ago" if age >= 0 else "before the server's clock was set back"
            proof = f"the user proved who they are {since}"
        super().__init__(f"{proof}; this asks for the last {within:,.15g} s")
        self.within = within
        self.age = age


class SessionTooLate(StillroomError, RuntimeError):
    """The session of this request can't be changed any more.

    Its response has begun, `save()` was called, or the request has failed with an error.

    Answer: a mistake in the code; change the session before that.
    """


class SessionUnreadable(StillroomError, ValueError):
    """The session's data are not of the type asked for. The message names fields, never their contents.

    Answer: treat the session as empty, or end it. The session of a request is taken for one that has ended.
    """


class SessionDataRefused(StillroomError, ValueError):
    """The data can't be kept in a session: too many keys, a key out of its grammar, no JSON for a value.

    Answer: a mistake in the code; 413 where a visitor's input was too much.
    """


class EventRefused(StillroomError, ValueError):
    """The event is refused: its kind is unknown, or it names neither an `ip` nor a `user`.

    Answer: a mistake in the code.
    """


class BanRefused(StillroomError, ValueError):
    """This `subject` can't be banned. `reason` says why.

    Answer: tell the operator.
    """

    def __init__(self, subject: object, reason: str) -> None:
        super().__init__(f"{_shortened(subject)} can't be banned: {reason}")
        self.subject = subject
        self.reason = reason


class InvalidLimit(StillroomError, ValueError):
    """A limit, a route or a subject makes no sense. `given` is what came in, `reason` says why it is refused.

    Answer: a mistake in the code; 400 where the subject came from a visitor.
    """

    def __init__(self, given: object, reason: str) -> None:
        super().__init__(f"{_shortened(given)}: {reason}")
        self.given = given
        self.reason = reason


class LockTaken(StillroomError, TimeoutError):
    """Other holders kept the lock (`name`) for all of the `waited` seconds.

    Answer: try later, 409 or 503.
    """

    def __init__(self, name: str, waited: float, *, crowded: bool = False) -> None:
        why = "too many wait for it already" if crowded else f"waited {waited:g} s in vain"
        super().__init__(f"the lock {_shortened(name)} is held by others: {why}")
        self.name = name
        self.waited = waited


class LockLost(StillroomError, RuntimeError):
    """The lock (`name`) ran out before it was renewed. Somebody else may have held it meanwhile.

    Answer: stop, and undo what a second holder must not find.
    """

    def __init__(
        self, name: str, how: str = "was lost: its lease ran out before it could be renewed"
    ) -> None:
        super().__init__(f"the lock {_shortened(name)} {how}")
        self.name = name


class DispatchFailed(StillroomError):
    """Background work could not be handed over: too much of it waits already, or the broker is away.

    Answer: 503; start workers.
    """


class OrderRefused(StillroomError, ValueError):
    """An order to the workers does not fit its task, and will not fit next time either; the message says why.

    Raised in the worker: the task fails with it, and a caller that waits for the result gets it.

    Answer: a mistake in the code.
    """


class NoDeadLetter(StillroomError, LookupError):
    """There is no dead letter with this `id`: it was retried, dropped, or made room for newer ones.

    Answer: 404.
    """

    def __init__(self, id: object) -> None:
        super().__init__(f"there is no dead letter {_shortened(id)}")
        self.id = id


class DeadLetterRefused(StillroomError, ValueError):
    """This dead letter (`id`) can't be sent again. `reason` says why.

    Answer: tell the operator.
    """

    def __init__(self, id: str, reason: str) -> None:
        super().__init__(f"dead letter {id} can't be sent again: {reason}")
        self.id = id
        self.reason = reason


def did_you_mean(given: object, known: Iterable[str], form: str = "%s", cutoff: float = 0.5) -> str:
    """Return `; did you mean …?` for a slip of the pen, or nothing. `form` is how the name is written."""
    try:
        name = str(given)
    except Exception:  # see in_code
        return ""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {form % near[0]}?" if near else ""


def in_code(given: object) -> str:
    """Return the repr of a value, or the name of its type where repr() fails.

    It fails for a list that is nested thousands deep, and for a row of SQLAlchemy whose session is closed. The
    error that refuses such a value must not be replaced by the error of its repr.
    """
    try:
        return repr(given)
    except Exception:
        return f"<{type(given).__name__}>"


def _shortened(given: object, limit: int = 120) -> str:
    text = in_code(given).encode("ascii", "backslashreplace").decode()
    if len(text) <= limit:
        return text
    return f"{text[:limit]}…" + (f" ({len(given):,} characters)" if isinstance(given, str) else "")
