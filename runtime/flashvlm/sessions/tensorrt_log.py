"""The logger of TensorRT and of TensorRT-RTX, for building engines and for running them."""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

log = logging.getLogger(__name__)

MESSAGES: deque[str] = deque(maxlen=2)  # the libraries' last errors; whoever reads them clears them beforehand
_LOGGERS: dict[type, Any] = {}  # by the ILogger of each library


def logger(trt: Any) -> Any:
    """Collects errors for the one line a refusal has; the library would print them.

    A process has one for each: a library keeps the first it is given, for as long as anything of it lives, and ignores
    others.
    """

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            line = " ".join(message.split())
            if severity <= trt.ILogger.Severity.ERROR:
                MESSAGES.append(line)
            else:
                log.debug("%s", line)

    if trt.ILogger not in _LOGGERS:
        _LOGGERS[trt.ILogger] = Logger()
    return _LOGGERS[trt.ILogger]
