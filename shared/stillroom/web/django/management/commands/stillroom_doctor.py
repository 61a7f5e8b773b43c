"""`manage.py stillroom_doctor`: what `stillroom doctor` says, of the room that Django uses."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

from django.core.management.base import BaseCommand

from stillroom.cli.doctor import SIGNS, examined
from stillroom.web.django import room


class Command(BaseCommand):
    help = "Settings, connections, versions, rights, clocks, memory and pending work: each line says what to do."
    requires_system_checks: ClassVar[list[str]] = []

    def handle(self, *_: Any, **__: Any) -> None:
        styles = {
            "pass": self.style.SUCCESS,
            "warn": self.style.WARNING,
            "fail": self.style.ERROR,
        }
        failed = False
        for line in examined(room()):
            self.stdout.write(
                styles[line.status](f"{SIGNS[line.status]} {line.about}: {line.sentence}")
            )
            failed = failed or line.status == "fail"
        if failed:
            sys.exit(1)
