"""The Django app: `INSTALLED_APPS = ["stillroom.web.django", …]` brings checks, commands and template tags."""

from __future__ import annotations

from django.apps import AppConfig
from django.core import checks

from stillroom.web.django.checks import check_deployment, check_settings


class StillroomConfig(AppConfig):
    name = "stillroom.web.django"
    label = "stillroom"
    verbose_name = "Stillroom"

    def ready(self) -> None:
        checks.register(check_settings, "stillroom")
        checks.register(check_deployment, "stillroom", deploy=True)
