"""Errors in one line."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name."""
    return next(iter(str(error).splitlines()), type(error).__name__)
