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
        """Return a public name, which has a capital, or a module, which has none. Each name is looked up once."""
        if name != "__all__" and (name.startswith("__") or name.islower()):
            return _module(name)
        public = _imported("public")
        if name != "__all__" and name not in public.__all__:
            raise AttributeError(f"module 'stillroom' has no attribute {name!r}")
        found = globals()[name] = getattr(public, name)
        return found

    def _module(name: str) -> Any:
        # Not through public.py: a module that it imports may be asking for another one.
        try:
            return _imported(name)
        except ModuleNotFoundError as missing:
            if missing.name != f"stillroom.{name}":
                raise
            raise AttributeError(f"module 'stillroom' has no attribute {name!r}") from None

    def _imported(name: str) -> Any:
        try:
            return import_module(f"stillroom.{name}")
        except AttributeError as error:
            # Python would say of that one that stillroom lacks the name, and nothing of the reason.
            raise ImportError(f"stillroom can't be imported: {error}") from error

    def __dir__() -> list[str]:
        """Return what an app imports from here, for editors and prompts: no helpers, and no modules by chance."""
        return sorted(
            {*_imported("public").__all__, *(name for name in globals() if name[:2] == "__")}
        )
