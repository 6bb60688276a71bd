"""Errors in one line."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator

DEBUG_VARIABLE = "GNPRACTICAL_DEBUG"
_THEIR_MESSAGE_IS_ENOUGH = (ValueError, OSError, FloatingPointError, ImportError)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name."""
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextlib.contextmanager
def in_one_line() -> Iterator[None]:
    """Exit with one line for an error, or raise it where ``$GNPRACTICAL_DEBUG`` is set.

    Errors that this package does not raise itself come with their type.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as e:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        sys.exit(f"error: {_message(e)}")


@contextlib.contextmanager
def without_traceback(logger_name: str) -> Iterator[None]:
    """Let a logger write an error whose message is enough without its traceback, as above."""

    def shorten(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, _THEIR_MESSAGE_IS_ENOUGH) and not os.environ.get(DEBUG_VARIABLE):
            record.msg, record.exc_info = f"{record.getMessage()} {error}", None
        return True

    logger = logging.getLogger(logger_name)
    logger.addFilter(shorten)
    try:
        yield
    finally:
        logger.removeFilter(shorten)


def _message(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if "Traceback (most recent call last)" in str(error):  # of a loader's process
        return lines[-1].removeprefix("ValueError: ")
    text = " ".join(line.strip() for line in lines)
    if isinstance(error, _THEIR_MESSAGE_IS_ENOUGH):
        return text
    return f"{type(error).__name__}: {text} ({DEBUG_VARIABLE}=1 shows where)"
