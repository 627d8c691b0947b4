"""A process ends when its main thread does, whatever daemon threads are doing in native code at that moment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

STREAMS = """
import sys, threading, time
from flashvlm import Pipeline
pipeline = Pipeline.from_bundle(sys.argv[1], threads=1)
begun = threading.Event()
def ask():
    while True:
        for _ in pipeline.stream(None, "What is it?", max_new_tokens=50):
            begun.set()
threading.Thread(target=ask, daemon=True).start()
begun.wait()
time.sleep(float(sys.argv[2]))
"""

LOADS = """
import sys, threading, time
from flashvlm import Pipeline
threading.Thread(target=lambda: [Pipeline.from_bundle(sys.argv[1], threads=1).generate(None, "hi", max_new_tokens=1)
                                 for _ in range(1000)], daemon=True).start()
time.sleep(0.3 + float(sys.argv[2]))
"""

AT_EXIT = """
import atexit, sys
from flashvlm import Pipeline
pipeline = Pipeline.from_bundle(sys.argv[1], threads=1)
atexit.register(lambda: print(pipeline.generate(None, "hi", max_new_tokens=1).stop_reason))
"""


@pytest.mark.parametrize("moment", [0.0, 0.003, 0.011, 0.027, 0.05, 0.081])
@pytest.mark.parametrize("code", [STREAMS, LOADS], ids=["streams", "loads"])
def test_a_daemon_thread_in_native_code(code: str, moment: float, tiny_bundle: Path) -> None:
    command = [sys.executable, "-c", code, str(tiny_bundle), str(moment)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_main_thread_may_still_ask(tiny_bundle: Path) -> None:
    command = [sys.executable, "-c", AT_EXIT, str(tiny_bundle), "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() in ("length", "stop token")
