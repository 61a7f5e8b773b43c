"""Whole responses of an app, cached: with tags, refreshed by workers, ETag and 304, and what CDNs want to hear."""

from stillroom.web.pages.pages import Pages, tag_page
from stillroom.web.pages.stored import NotKept, StoredPage

__all__ = ["NotKept", "Pages", "StoredPage", "tag_page"]
