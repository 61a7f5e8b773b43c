"""A project that knows Stillroom's Celery app, to send it orders by name."""

from stillroom_workers import app as stillroom_app
from tests.support.project import app

__all__ = ["app", "stillroom_app"]
