"""`manage.py stillroom_invalidate`: what an operator does when the data was changed behind the app's back."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from stillroom.errors import StillroomError
from stillroom.shown import plural
from stillroom.web.django import room


class Command(BaseCommand):
    help = "Forget keys, tags, patterns or all there is. True for every reader when it ends."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("keys", nargs="*", help="keys of the room, as in room().cache")
        parser.add_argument("--tag", action="append", default=[], help="entries with this tag")
        parser.add_argument("--pattern", action="append", default=[], help="keys this glob matches")
        parser.add_argument("--all", action="store_true", help="every entry of the namespace")
        parser.add_argument(
            "--soft", action="store_true", help="tags: serve them stale, refresh them"
        )

    def handle(self, *_: Any, **options: Any) -> None:
        keys, tags, patterns = options["keys"], options["tag"], options["pattern"]
        if not (keys or tags or patterns or options["all"]):
            raise CommandError("give a key, --tag, --pattern or --all")
        if options["soft"] and not tags:
            raise CommandError("--soft goes with --tag")
        cache = room().cache
        try:
            if keys:
                held = cache.invalidate(*keys)
                self.stdout.write(f"{held:,} of {plural(len(keys), 'key')} held a value")
            cache.invalidate_by_tag(*tags, soft=options["soft"])
            for glob in patterns:
                cache.invalidate_by_pattern(glob)
            if options["all"]:
                cache.clear()
        except StillroomError as error:
            raise CommandError(str(error)) from error
        self.stdout.write(self.style.SUCCESS("invalidated: no reader sees the old values any more"))
