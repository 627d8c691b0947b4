"""Calls into native code, and the end of the process.

Python ends a thread that comes back from native code after the interpreter has shut down by unwinding its stack; C++
takes that for an error and aborts the process. So at exit, calls under way are waited for, and a daemon thread that
begins another one is held until the process ends.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_state = threading.Condition()
_under_way = 0
_ending = False


@contextmanager
def native_call() -> Iterator[None]:
    """Around every call that leaves Python for longer than a moment."""
    global _under_way
    with _state:
        while _ending and threading.current_thread().daemon:
            _state.wait()  # nobody notifies: the process is about to end
        _under_way += 1
    try:
        yield
    finally:
        with _state:
            _under_way -= 1
            _state.notify_all()


@atexit.register
def _finish() -> None:
    global _ending
    with _state:
        _ending = True
        _state.wait_for(lambda: _under_way == 0)
