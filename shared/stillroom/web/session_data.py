"""The data of a session as one request changes it. Its changes can be done again, to what another request wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple, Self

from stillroom.errors import InvalidArgument, in_code
from stillroom.marked import FIXED
from stillroom.misuse import refuse_awaited
from stillroom.sessions import decoded_value, encoded_value
from stillroom.web.fields import field_of
from stillroom.web.merge import GONE, merged_keys

Change = Callable[[dict[str, Any]], Any]


class Done(NamedTuple):
    """Hold what a request did to the data: the keys it looked at as they were, and its changes as it left them."""

    base: Mapping[str, Any]
    ours: Mapping[str, Any]

    def onto(self, data: dict[str, Any]) -> None:
        """Do the same to this data."""
        for key, value in merged_keys(self.base, self.ours, data).items():
            if value is GONE:
                data.pop(key, None)
            else:
                data[key] = value


class SessionData(MutableMapping[str, Any]):
    """A mapping that knows what has been changed in it, also in its lists and dicts.

    RequestSession says how the data are read (`_look`), and when nothing may be changed any more (`_change`). It
    makes the sets and the dict, too, which saves each request a call.
    """

    _data: dict[str, Any] | None = None  # None: not looked at
    # The keys that were set, and those that were removed, since the read or the last `mutate`.
    _changed: set[str]
    _gone: set[str]
    # The values that were read and can be changed in place, as JSON; None: the key was not there.
    _seen: dict[str, bytes | None]
    # The changes before each `mutate`, and the change itself.
    _earlier: tuple[tuple[Done, Change], ...] = ()
    _mutated: frozenset[str] = frozenset()  # the keys that these changed
    _has_emptied = False  # all that was read is gone, and so is what another request adds

    def _look(self) -> dict[str, Any]:
        """Return the data, to be changed in place."""
        raise NotImplementedError

    def _change(self) -> None:
        """Raise where nothing may be changed any more."""
        raise NotImplementedError

    def mutate(self, change: Change) -> None:
        """Change the data by a function that is called again where another request has written meanwhile.

        `change(data)` changes the dict it is given, or returns another one. It is called now, and the session shows
        what it did; when the session is written and somebody else was first, it is called with theirs. So a counter
        that two requests add to counts both. Raises InvalidArgument for a coroutine function.
        """
        if not callable(change):
            raise InvalidArgument(
                f"mutate({in_code(change):.100}): a function that is given the data"
            )
        refuse_awaited("mutate", change)
        data = self._look()
        self._change()
        before = encoded_values(data)
        after = _changed_by(change, {key: decoded_value(text) for key, text in before.items()})
        done = self._done()
        self._earlier += ((Done(done.base, _copied(done.ours)), change),)
        self._mutated |= differing(before, encoded_values(after)) | self._changed | self._gone
        self._mutated |= self._altered()
        data.clear()
        data.update(after)
        self._changed, self._gone = set(), set()
        self._seen = _changeable(data, data)

    def __getitem__(self, key: str) -> Any:
        data = self._look()
        try:
            value = data[key]
        except KeyError:
            self._seen.setdefault(key, None)
            raise
        if type(value) not in FIXED and key not in self._seen and key not in self._changed:
            self._seen[key] = encoded_value(key, value)
        return value

    def __setitem__(self, key: str, value: Any) -> None:
        field_of(key)
        data = self._look()
        self._change()
        data[key] = value
        self._changed.add(key)
        self._gone.discard(key)

    def __delitem__(self, key: str) -> None:
        data = self._look()
        self._change()
        del data[key]
        self._changed.discard(key)
        self._gone.add(key)

    def popitem(self) -> tuple[str, Any]:
        """Remove the key that came last, as a dict does."""
        if not (data := self._look()):
            raise KeyError("the session is empty")
        key = next(reversed(data))
        return key, self.pop(key)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._look()))

    def __len__(self) -> int:
        return len(self._look())

    # What a dict can do besides.

    def copy(self) -> dict[str, Any]:
        """Return the data as a dict of its own."""
        return dict(self)

    def __or__(self, other: Any) -> Any:
        return self.copy() | dict(other)

    def __ror__(self, other: Any) -> Any:
        return other | self.copy()

    def __ior__(self, other: Any) -> Self:
        self.update(other)
        return self

    def __reversed__(self) -> Iterator[str]:
        return reversed(self.copy())

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle the data alone."""
        return dict, (self.copy(),)

    def __repr__(self) -> str:
        state = "not looked at" if self._data is None else f"{len(self._data)} keys"
        return f"<{type(self).__name__}: {state}>"

    # What was changed

    def _merges(self, keys: set[str]) -> bool:
        """Return whether this request's changes to these keys can be merged into those of another request."""
        data = self._data or {}
        known = self._seen.keys() & keys
        return bool(self._mutated) or any(
            self._seen[key] is not None or not _is_fixed(data.get(key)) for key in known
        )

    def _redone_on(self, theirs: dict[str, Any]) -> tuple[set[str], dict[str, Any]]:
        """Return (keys to write, the data to write): this request's changes, done to another request's data."""
        data, before = theirs, encoded_values(theirs)
        for done, change in self._earlier:
            done.onto(data)
            data = _changed_by(change, data)
        self._done().onto(data)
        return differing(before, encoded_values(data)), data

    def _empty(self) -> None:
        data = self._look()
        self._gone |= data.keys()
        self._has_emptied = True
        self._changed.clear()
        data.clear()

    def _done(self) -> Done:
        """Return the changes since the last `mutate`, or since the read."""
        data = self._data or {}
        base = {
            key: GONE if text is None else decoded_value(text) for key, text in self._seen.items()
        }
        ours = {key: data.get(key, GONE) for key in self._changed | self._gone | self._altered()}
        return Done(base, ours)

    def _remember(self) -> None:
        """Remember the lists and dicts as they were written: see is_lost."""
        data = self._data or {}
        kept = [key for key in self._changed | self._seen.keys() if key in data]
        self._seen = _changeable(data, kept)
        self._changed = set()

    def _altered(self) -> set[str]:
        """Return the lists and dicts that were changed in place."""
        if not self._seen:
            return set()
        data = self._data or {}
        return {
            key
            for key, before in self._seen.items()
            if before is not None
            and key in data
            and key not in self._changed
            and encoded_value(key, data[key]) != before
        }


def encoded_values(data: Mapping[str, Any]) -> dict[str, bytes]:
    """Return each value as JSON."""
    return {key: encoded_value(key, value) for key, value in data.items()}


def differing(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> set[str]:
    """Return the keys that were added, removed or given another value."""
    return {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}


def _changeable(data: Mapping[str, Any], keys: Iterable[str]) -> dict[str, bytes | None]:
    """Return as JSON the values of these keys that can be changed in place."""
    return {key: encoded_value(key, data[key]) for key in keys if not _is_fixed(data[key])}


def _is_fixed(value: Any) -> bool:
    return type(value) in FIXED


def _changed_by(change: Change, data: dict[str, Any]) -> dict[str, Any]:
    """Return the data after the change, which may be another dict."""
    result = change(data)
    return data if result is None else dict(result)


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value if value is GONE else decoded_value(encoded_value(key, value))
        for key, value in values.items()
    }
