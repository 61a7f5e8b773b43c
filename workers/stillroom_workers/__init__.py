"""The Celery side of Stillroom. `celery -A stillroom_workers worker` runs it; see app.py."""

from __future__ import annotations

from typing import Any

__all__ = ["app", "make_app"]


def __getattr__(name: str) -> Any:
    """Make `app` from the environment when it is first asked for, not on import."""
    if name not in __all__:
        raise AttributeError(name)
    try:
        from stillroom_workers.app import make_app

        if name == "make_app":
            return make_app
        globals()["app"] = make_app()
    except AttributeError as error:
        # Celery would say of that one that there is no app here, and nothing of the reason.
        raise ImportError(f"stillroom_workers can't be loaded: {error}") from error
    return globals()["app"]
