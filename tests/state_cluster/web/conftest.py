"""Serve the shop of tests/web with its state on a cluster: `places` says where Redis is."""

from tests.web.conftest import browser, face, room, serve  # noqa: F401 - fixtures
