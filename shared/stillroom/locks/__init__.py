"""Locks and semaphores that processes share: leased, renewed, fenced, and served in the order of asking."""

from stillroom.locks.body import LocksBody
from stillroom.locks.held import AsyncHeld, Held
from stillroom.locks.locks import AsyncLock, Lock, Terms

__all__ = ["AsyncHeld", "AsyncLock", "Held", "Lock", "LocksBody", "Terms"]
