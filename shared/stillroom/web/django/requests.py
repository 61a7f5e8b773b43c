"""The part that our Django middlewares have in common: the outermost of them begins a request of the room."""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest
from django.utils.deprecation import MiddlewareMixin

from stillroom.web.django import room
from stillroom.web.within import within


class InRequest(MiddlewareMixin):
    """A middleware behind which all Redis calls of a request share `request_timeout`.

    What the process keeps of the cache is proved once for all that the request reads.
    """

    def __call__(self, request: HttpRequest) -> Any:
        if self.async_mode:
            return self.__acall__(request)
        with within(room()):
            return super().__call__(request)

    async def __acall__(self, request: HttpRequest) -> Any:
        with within(room()):
            return await super().__acall__(request)
