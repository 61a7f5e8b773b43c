"""Creates sessions: of a login, of a visitor nobody knows yet, and in the place of another session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, overload

from stillroom.durations import Duration, seconds_of
from stillroom.errors import InvalidArgument, SessionEnded, SettingsError, TooManySessions, in_code
from stillroom.keys import Keys
from stillroom.misuse import YES_OR_NO, refuse_other
from stillroom.operation import Operation
from stillroom.sessions.beginning import Beginning
from stillroom.sessions.data import MAPPINGS, encoded, encoded_meta, flat
from stillroom.sessions.ends import BOTH, BRINGS_ANOTHER, NO_COOKIE, UNLESS_LATE, Gone
from stillroom.sessions.named import Known, Named
from stillroom.sessions.session import Session, encoded_tags, encoded_user, head
from stillroom.sessions.token import Place, shard_of
from stillroom.settings import Settings
from stillroom.stats import Stats
from stillroom.whole import is_whole
from stillroom.wire import Server, StateServer

T = TypeVar("T")

CAP_LIMIT = 300  # sessions of a user that one login may count
LONGEST_S = 366 * 86_400
DEVICE_LENGTH = 22  # characters of an HMAC


class Creating(Named):
    """The operations that begin a session. SessionsBody has the others on one."""

    def __init__(
        self, settings: Settings, server: Server | StateServer, keys: Keys, stats: Stats
    ) -> None:
        super().__init__(settings, server, keys, stats)
        self._times = self._times_of(None, None)
        self._limits = settings.session_data_limit, settings.session_keys_limit

    @overload
    def create(
        self,
        user_id: str | None,
        data: Mapping[str, Any] | None = None,
        *,
        tags: Sequence[str] = (),
        meta: Mapping[str, Any] | None = None,
        idle: Duration | None = None,
        absolute: Duration | None = None,
        replaces: Known | None = None,
        max_per_user: int | None = None,
        on_cap: str = "evict_oldest",
        device: str | None = None,
        fresh: bool = True,
    ) -> Operation[Session[dict[str, Any]]]: ...
    @overload
    def create(
        self,
        user_id: str | None,
        data: T,
        *,
        tags: Sequence[str] = (),
        meta: Mapping[str, Any] | None = None,
        idle: Duration | None = None,
        absolute: Duration | None = None,
        replaces: Known | None = None,
        max_per_user: int | None = None,
        on_cap: str = "evict_oldest",
        device: str | None = None,
        fresh: bool = True,
    ) -> Operation[Session[T]]: ...
    def create(
        self,
        user_id: str | None,
        data: Any = None,
        *,
        tags: Sequence[str] = (),
        meta: Mapping[str, Any] | None = None,
        idle: Duration | None = None,
        absolute: Duration | None = None,
        replaces: Known | None = None,
        max_per_user: int | None = None,
        on_cap: str = "evict_oldest",
        device: str | None = None,
        fresh: bool = True,
    ) -> Operation[Session[Any]]:
        """Begin a session; its `token` goes into the cookie. `user_id=None` makes an anonymous session.

        - `data`: a mapping, a pydantic model or a dataclass. `meta`: what lists of devices show.
        - `idle`, `absolute`: seconds or timedeltas; by default the settings.
        - `replaces`: the session before the login, which ends, so that a token that was planted opens nothing.
        - `max_per_user`: up to 300. `on_cap`: "evict_oldest", or "reject", which raises TooManySessions and ends
          nothing. If a user has many more already, each login evicts up to 100.
        - `device`: a name of the user's device, kept as an HMAC for `session_device_memory` seconds. Listeners of
          `on_event` are told of a device that is new to a user who has others.
        - `fresh=False`: the user did not just prove who they are (a "remember me" cookie did), so `get(fresh=…)`
          refuses the session until it is confirmed.

        Raises SessionDataRefused, SessionUnreadable (what could not be read back), ValueTooLarge, InvalidKey.

        Redis away or full: SessionStoreUnavailable. What may have been created all the same is ended as soon as
        this process reaches Redis, and so is `replaces`: a login whose reply was lost, or that was cancelled, takes
        no place of a cap. A server that is full has created nothing, and `replaces` lives on.
        """
        return self._create(
            *(user_id, data, tags, meta, idle, absolute, replaces, max_per_user, on_cap),
            *(device, fresh, NO_COOKIE, None),
        )

    def log_in(
        self,
        before: Known | None,
        user_id: str,
        data: Mapping[str, Any],
        *,
        tags: Sequence[str] = (),
        meta: Mapping[str, Any] | None = None,
        idle: Duration | None = None,
        absolute: Duration | None = None,
        max_per_user: int | None = None,
        on_cap: str = "evict_oldest",
        device: str | None = None,
        fresh: bool = True,
        asked_us: int | None = None,
    ) -> Operation[Session[Any]]:
        """Return the `create` of a login whose response brings the browser its cookie, in the place of the session
        before.

        Responses to other requests of that browser, which are under way, do not set theirs over it. `asked_us`:
        when the request looked at the session before, by this machine's steady clock: a new token that another
        request has given to that one since does not save it. None: now.
        """
        return self._create(
            *(user_id, data, tags, meta, idle, absolute, before, max_per_user, on_cap),
            *(device, fresh, BRINGS_ANOTHER, asked_us),
        )

    def begin(
        self,
        token: str,
        data: Mapping[str, Any],
        *,
        ends: bool = False,
        idle: Duration | None = None,
        absolute: Duration | None = None,
        asked_us: int | None = None,
    ) -> Operation[Session[Any]]:
        """Begin an anonymous session in the place of the one of this token, for a request that came with it.

        That one has ended, or ends now (`ends`). Raises SessionEnded if it is gone because another request has just
        logged in or out or got a new token: the response to this one may arrive later, and must not set its cookie
        over that. `asked_us`, if it `ends`: see `log_in`. Otherwise see `create`.
        """
        return self._create(
            *(None, data, (), None, idle, absolute, token, None, "evict_oldest"),
            *(None, True, BOTH if ends else UNLESS_LATE, asked_us),
        )

    def _create(
        self,
        user_id: str | None,
        data: Any,
        tags: Sequence[str],
        meta: Mapping[str, Any] | None,
        idle: Duration | None,
        absolute: Duration | None,
        replaces: Known | None,
        max_per_user: int | None,
        on_cap: str,
        device: str | None,
        fresh: bool,
        cookie: int,
        asked_us: int | None,
    ) -> Operation[Session[Any]]:
        user = b"" if user_id is None else encoded_user(user_id)
        _check_cap(user_id, max_per_user, on_cap)
        times = self._times if idle is absolute is None else self._times_of(idle, absolute)
        given = {} if data is None else data
        fields, note = encoded(given, *self._limits), encoded_meta(meta)
        labels = b"" if tags == () else b"\n".join(encoded_tags(tags))
        old = None if replaces is None else self._place(replaces)
        # An anonymous session stays in its shard: then one script does all of it.
        shard = shard_of(user, self._shards) if user else (None if old is None else old.shard)
        token, place = self._new_place(shard)
        ending = None
        if old is not None:
            ending = self._destroying(old, cookie & BRINGS_ANOTHER, asked_us)
            if cookie == UNLESS_LATE:
                ending = Gone(*ending)
        most, evicts = b"%d" % (max_per_user or 0), b"1" if on_cap == "evict_oldest" else b"0"
        numbers = b"%d" % times[0], b"%d" % times[1], most, evicts
        keys, prefix = self._keys.record(*place)
        about = (prefix, user, labels, *numbers, note)
        proved = b"" if fresh is True else b"0"
        if fresh is not True:
            refuse_other("fresh", fresh, bool, YES_OR_NO)
        known_by = self._device_of(device) if user and device else (b"", b"")
        more = (proved, b"%d" % cookie, *known_by, *flat(fields))
        begins = Beginning(self, place, keys, old, ending, about, more)
        reply = yield from begins.run()
        if begins.expired:
            self._tell_all("expired", place.shard, begins.expired)
        if reply[0] == b"full":
            raise TooManySessions(int(reply[1]), max_per_user or 0)
        if reply[0] == b"replaced":
            raise SessionEnded("replaced")
        self._note_begun(place, user, reply)
        began = head(user, int(reply[1]), *times, labels, note, proved)
        where = place.shard, place.names[0], began
        if isinstance(given, MAPPINGS):
            return Session(*where, fields, token, as_fields=True)
        return Session(*where, given, token)

    def _note_begun(self, place: Place, user: bytes, reply: Any) -> None:
        """Count a session that has begun, and tell of those that ended for it and of a new device."""
        self.stats.counts["sessions_created"] += 1
        if reply[2] or reply[3]:
            evicted = [part for name in reply[3] for part in (name, user)]
            self._tell_all("expired", place.shard, reply[2])
            self._tell_all("evicted", place.shard, evicted)
        if reply[5]:
            self._tell_all("new_device", place.shard, [place.names[0], user])

    def _device_of(self, device: str) -> tuple[bytes, bytes]:
        """Return a device's names in Redis, under each pepper, and how many ms it is known.

        Raises InvalidArgument for what is no text.
        """
        # An object's text may be another one each time: then each login would be by a new device.
        refuse_other("device", device, str, "the text that names the user's device")
        text = b"device\0" + device.encode("utf-8", "replace")
        names = [one.name(text)[:DEVICE_LENGTH] for one in self._ring()]
        return b" ".join(names), b"%d" % (1_000 * self.settings.session_device_memory)

    def _times_of(self, idle: Duration | None, absolute: Duration | None) -> tuple[int, int]:
        """Return the times in µs. Raises SettingsError."""
        idle = self.settings.session_idle if idle is None else idle
        absolute = self.settings.session_absolute if absolute is None else absolute
        given = ("idle", idle), ("absolute", absolute)
        first, last = [us_of(name, one, least=0.001, most=LONGEST_S) for name, one in given]
        return first, last


def us_of(name: str, given: Duration, *, least: float, most: float) -> int:
    """Return the time in µs. Raises SettingsError, because an argument stands in the place of a setting."""
    try:
        return int(seconds_of(name, given, least=least, most=most) * 1_000_000)
    except InvalidArgument as error:
        raise SettingsError(str(error)) from None


def _check_cap(user_id: str | None, most: int | None, on_cap: str) -> None:
    if on_cap not in ("evict_oldest", "reject"):
        raise SettingsError(f"on_cap={in_code(on_cap):.100}: evict_oldest or reject")
    if most is not None and not is_whole(most, most=CAP_LIMIT):
        raise SettingsError(f"max_per_user={in_code(most):.100}: 1 to {CAP_LIMIT}")
    if most is not None and user_id is None:
        raise SettingsError("max_per_user needs a user_id: the anonymous are not counted")
