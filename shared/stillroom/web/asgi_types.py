"""The types of ASGI, which no framework has to be installed for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
# Not Scope, Receive and Send: types of Django say that its handler takes a dict and sends a Mapping.
App: TypeAlias = Callable[[Any, Any, Any], Awaitable[None]]
