"""What lies in the place of a file that was not downloaded."""

from __future__ import annotations

import re

LFS_POINTER = b"version https://git-lfs"
"""How the text begins that Git LFS puts in the place of a file until that is fetched."""
_WEB_PAGE = re.compile(rb"\s*(<!doctype html|<html)", re.IGNORECASE)


def is_web_page(start: bytes) -> bool:
    """Tell by its beginning whether a file is a page that says why there was no download."""
    return _WEB_PAGE.match(start) is not None
