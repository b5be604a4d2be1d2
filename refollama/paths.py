"""Is it a path or a model's name? One answer for everybody."""

from __future__ import annotations

PATH_STARTS = ("/", ".", "~")  # no name begins so: names begin with a letter, a digit or _


def is_path(text: str) -> bool:
    """Could this be nothing but a path?"""
    return text.startswith(PATH_STARTS)
