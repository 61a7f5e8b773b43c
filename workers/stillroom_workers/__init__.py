"""The Celery side of Stillroom. `celery -A stillroom_workers worker` runs it; see app.py."""

from __future__ import annotations

from typing import Any

__all__ = ["app", "make_app"]


def __getattr__(name: str) -> Any:
    """Make `app` from the environment when it is first asked for, not on import."""
    if name == "make_app":
        from stillroom_workers.app import make_app

        return make_app
    if name == "app":
        from stillroom_workers.app import make_app

        globals()["app"] = make_app()
        return globals()["app"]
    raise AttributeError(name)
