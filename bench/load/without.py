"""The example shop without Stillroom, for the load test: each page asks the database; no limits, no health."""

from __future__ import annotations

from shop import cache
from shop.app import app

__all__ = ["app"]

cache.load_product = cache.load_product.loader.function
cache.load_listing = cache.load_listing.loader.function
del app.wsgi_app  # the middleware around Flask's own
