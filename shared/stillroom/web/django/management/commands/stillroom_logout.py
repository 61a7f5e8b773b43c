"""`manage.py stillroom_logout`: end all sessions of users."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from stillroom.errors import StillroomError
from stillroom.shown import plural
from stillroom.web.django import room


class Command(BaseCommand):
    help = "End all sessions of these users, on every device. Nobody is logged in with one when it ends."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("users", nargs="+", help="primary keys")

    def handle(self, *_: Any, **options: Any) -> None:
        try:
            for user in options["users"]:
                ended = room().sessions.destroy_for_user(user)
                self.stdout.write(f"user {user}: {plural(ended, 'session')} ended")
        except StillroomError as error:
            raise CommandError(str(error)) from error
