"""Limits on time and memory of chat templates, which are programs that come with a model's files.

Notable: jinja's sandbox restricts what a template can access, but neither nested loops nor growing strings. Time is CPU time of this
thread, so that a busy machine stops nothing early.
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

TEMPLATE = "<template>"  # jinja's file name of a template that comes as a string
MAX_GROWTH = 1 << 20  # of the process, in KiB, the unit of ru_maxrss


class LimitExceeded(Exception):
    """A template exceeded a limit; the message says which."""


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Limit jinja templates in this thread to this CPU time in total and to one GiB of memory.

    Raises:
        LimitExceeded: inside, at a template's next line.
    """
    end = time.thread_time() + seconds
    limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + MAX_GROWTH
    count = itertools.count(1)

    def enter(frame: FrameType, event: str, argument: Any) -> Any:
        return line if frame.f_code.co_filename == TEMPLATE else None

    def line(frame: FrameType, event: str, argument: Any) -> Any:
        if next(count) % 16 == 0:
            if time.thread_time() > end:
                raise LimitExceeded(f"it needs more than {seconds:g} seconds")
            if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > limit:
                raise LimitExceeded("it needs more than 1 GiB of memory")
        return line

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)
