"""The workers' app with every tick of its schedule five times a second, so that a test need not wait a minute."""

from __future__ import annotations

from stillroom_workers.app import make_app

app = make_app()
for tick in app.conf.beat_schedule.values():
    tick["schedule"] = 0.2
