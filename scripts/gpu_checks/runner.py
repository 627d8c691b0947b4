"""Runs sections one after another, each in a process of its own: a CUDA fault, a hang or a killed process is one
section's finding, and the next one starts clean."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .record import Job, Record, Skip, read

COMMAND = Path(__file__).resolve().parents[1] / "gpu_check"
SANITIZER = "compute-sanitizer"
SANITIZER_FOUND = 86  # exit status asked of compute-sanitizer
LAST_LINES = 12
SHORTEST = 5.0  # seconds; with less left, a section is not begun


@dataclass(frozen=True)
class Section:
    """``function`` of a module here, and the seconds it may take. Where a comparison fails, nothing is wrong here."""

    name: str
    module: str
    limit: float
    function: str = "run"
    gpu: bool = True
    comparison: bool = False
    sanitizer: str = ""  # run by that tool of compute-sanitizer, on few cases


SECTIONS = (
    Section("machine", "machine", 60, gpu=False),
    Section("build", "build", 120, gpu=False),
    Section("kernels", "correctness", 150, gpu=False),
    Section("speed", "speed", 120),
    Section("function body", "body", 90, gpu=False),
    Section("bundle", "sessions", 90, "run_bundle"),
    Section("onnxruntime cuda", "sessions", 60, "run_cuda"),
    Section("tensorrt plugins", "plugins", 120),
    Section("tensorrt-rtx", "sessions", 90, "run_rtx"),
    Section("tensorrt", "sessions", 120, "run_tensorrt"),
    Section("tensorrt with plugins", "sessions", 120, "run_tensorrt_plugins"),
    Section("torch.compile", "compiled", 120, comparison=True),
)
SANITIZED = tuple(
    Section(f"kernels under {tool}", "correctness", 120, sanitizer=tool)
    for tool in ("memcheck", "racecheck", "synccheck")
)
NEEDED = ("machine", "build")  # run whatever is asked for: others read their facts

Say = Callable[[str], None]
Command = Callable[[Section, Path, Path], list[str]]
Save = Callable[[dict[str, Any]], None]


def command_of(section: Section, job: Path, findings: Path) -> list[str]:
    plain = [sys.executable, str(COMMAND), "--section", section.name, str(job), str(findings)]
    if not section.sanitizer:
        return plain
    return [SANITIZER, "--tool", section.sanitizer, "--error-exitcode", str(SANITIZER_FOUND), *plain]


def run_sections(
    job: Job,
    sections: Sequence[Section],
    seconds: float,
    say: Say = lambda _: None,
    save: Save = lambda _: None,
    command: Command = command_of,
) -> dict[str, Any]:
    """The report: see docs/gpu.md. ``save`` gets it as it stands after every section."""
    started = time.monotonic()
    report: dict[str, Any] = {
        "seed": job.seed,
        "machine": {},
        "sections": [],
        "finished": False,
        "passed": False,
        "seconds": 0.0,
    }
    for section in sections:
        left = seconds - (time.monotonic() - started)
        if section.gpu and job.device != "cuda":
            result = _not_run(section, "it needs a GPU")
        elif section.sanitizer and shutil.which(SANITIZER) is None:
            result = _not_run(section, f"no {SANITIZER} on PATH", "it comes with the CUDA toolkit")
        elif left < SHORTEST:
            result = _not_run(section, f"the {seconds:g} seconds of this run were used up", "--limit SECONDS or --only")
        else:
            say(f"{section.name} ...")
            result = run_section(job, section, min(section.limit, left), command)
        say(f"{section.name}: {result['status']}, {result['seconds']:.1f} s")
        job = replace(job, facts={**job.facts, **result["facts"]})
        if section.name == "machine":
            report["machine"] = result["facts"]
        report["sections"].append(result)
        report |= {"seconds": round(time.monotonic() - started, 1), "passed": passed(report)}
        save(report)
    report["finished"] = True
    save(report)
    return report


def run_section(job: Job, section: Section, limit: float, command: Command = command_of) -> dict[str, Any]:
    """What one section found, however it ended."""
    slug = section.name.replace(" ", "-")
    told, findings, output = (job.work / f"{slug}.{ending}" for ending in ("json", "jsonl", "log"))
    job.save(told)
    findings.unlink(missing_ok=True)
    started = time.monotonic()
    with output.open("wb") as log:
        # Its own process group, so that the compilers it may have started end with it.
        child = subprocess.Popen(
            command(section, told, findings), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True, env={**os.environ, "PYTHONFAULTHANDLER": "1"},
        )  # fmt: skip
        try:
            status: int | None = child.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(child)
    last = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-LAST_LINES:]
    result = _result(section, read(findings), time.monotonic() - started)
    if status is None:
        result |= {"status": "timed out", "error": "\n".join([f"ended after {limit:.0f} s", *last])}
    elif status == SANITIZER_FOUND:
        result |= {"status": "failed", "error": "\n".join(["compute-sanitizer found errors", *last])}
    elif status != 0:
        died = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        result |= {"status": "crashed", "error": "\n".join([f"ended with {died}", *last])}
    return result


def _end(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _result(section: Section, findings: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    of_kind = {kind: [f for f in findings if f["kind"] == kind] for kind in ("check", "timing", "skip", "error")}
    facts = {found["name"]: found["value"] for found in findings if found["kind"] == "fact"}
    of_kind = {kind: [{k: v for k, v in f.items() if k != "kind"} for f in found] for kind, found in of_kind.items()}
    errors = "\n".join(error["message"] for error in of_kind["error"])
    found_anything = of_kind["check"] or of_kind["timing"] or facts
    if errors or not all(check["passed"] for check in of_kind["check"]):
        status = "failed"
    elif of_kind["skip"] and not of_kind["check"] and not of_kind["timing"]:
        status = "skipped"
    else:
        status = "passed" if found_anything else "failed"
    return {
        "name": section.name,
        "status": status,
        "comparison": section.comparison,
        "seconds": round(seconds, 1),
        "checks": of_kind["check"],
        "timings": of_kind["timing"],
        "facts": facts,
        "skipped": of_kind["skip"],
        "error": errors or ("" if found_anything or of_kind["skip"] else "it found nothing and said nothing"),
    }


def _not_run(section: Section, reason: str, remedy: str = "") -> dict[str, Any]:
    return _result(section, [{"kind": "skip", "reason": reason, "remedy": remedy}], 0.0)


def passed(report: dict[str, Any]) -> bool:
    """Nothing that ran failed, and something was checked. What was skipped counts as neither."""
    judged = [section for section in report["sections"] if not section["comparison"]]
    checks = [check for section in judged for check in section["checks"]]
    return bool(checks) and all(section["status"] in ("passed", "skipped") for section in judged)


# --- in the child --------------------------------------------------------------------------------------------------


def run_child(name: str, job: Path, findings: Path) -> int:
    """Runs one section in this process. Its exception is a finding; only what kills the process is a crash."""
    section = next(section for section in (*SECTIONS, *SANITIZED) if section.name == name)
    record = Record(findings)
    try:
        module = importlib.import_module(f".{section.module}", __package__)
        told = Job.load(job)
        getattr(module, section.function)(replace(told, quick=told.quick or bool(section.sanitizer)), record)
    except Skip as skip:
        record.skip(skip.reason, skip.remedy)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("flashvlm", "flashvlm_export", __package__):
            record.error(f"{type(error).__name__}: {error}")
        else:
            record.skip(f"{package} is not installed", f"pip install {package}")
    except Exception as error:
        traceback.print_exc()  # into the section's log
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        record.error(f"{type(error).__name__} at {place}: {error}"[:2000])
    return 0
