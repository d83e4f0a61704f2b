"""A bound on what a program of somebody else's may take: chat templates are such, and come with a model's files.

Notable: jinja's sandbox keeps a template from reading and calling what it should not, and has no bound on loops inside loops, nor on
strings that double. The time is this thread's own, so that a busy machine ends nothing early; a template may end at any of its lines.
"""

from __future__ import annotations

import itertools
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

TEMPLATE = "<template>"  # what jinja calls the file of a template that comes as a string
KIB = 1 << 20  # that a process may grow by, in the unit of ru_maxrss


class TooMuch(Exception):
    """A template took more than it may; the message says what."""


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Let jinja's templates compute in this thread for at most so long in all, and in no more than a gibibyte.

    Raises:
        TooMuch: inside, at a template's next line.
    """
    end = time.thread_time() + seconds
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + KIB
    count = itertools.count(1)

    def enter(frame: FrameType, event: str, argument: Any) -> Any:
        return line if frame.f_code.co_filename == TEMPLATE else None

    def line(frame: FrameType, event: str, argument: Any) -> Any:
        if next(count) % 16 == 0:
            if time.thread_time() > end:
                raise TooMuch(f"{seconds:g} seconds were not enough")
            if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > most:
                raise TooMuch("a gibibyte was not enough")
        return line

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)
