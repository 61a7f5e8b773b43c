"""Stillroom: the Redis services a web app shares, and the workers that keep them fresh.

The names are in public.py. They are imported when the first of them is used: a command line, a settings module or a
test that only mentions the package does not wait for pydantic and redis-py.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillroom.public import *  # noqa: F403  # type checkers read its __all__
    from stillroom.public import __all__ as __all__
else:

    def __getattr__(name: str) -> Any:
        """Return a public name, or a module of the package; it is asked for once."""
        if name.startswith("__") and name != "__all__":  # tools look for many of these
            raise AttributeError(f"module 'stillroom' has no attribute {name!r}")
        public = import_module("stillroom.public")
        if name == "__all__" or name in public.__all__:
            found = globals()[name] = getattr(public, name)
            return found
        try:
            return import_module(f"stillroom.{name}")
        except ModuleNotFoundError as missing:
            if missing.name != f"stillroom.{name}":
                raise
            raise AttributeError(f"module 'stillroom' has no attribute {name!r}") from None

    def __dir__() -> list[str]:
        return sorted({*globals(), *import_module("stillroom.public").__all__})
