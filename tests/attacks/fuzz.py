"""Seeded hostile inputs, each given to a command in a child of its own with limits on memory and time.

``python tests/attacks/fuzz.py manifest --cases 2000 --seed 1`` runs one class, ``all`` every one; ``--only 17`` runs
one case again. A command may answer, or refuse in one line; anything else is found, and named.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import mutations

from refusals import run

MEMORY = 2 << 30  # bytes of a child's own
SECONDS = 20
ANSWERED, REFUSED, FOUND = "answered", "refused", "found"


@dataclass(frozen=True)
class Made:
    """What all cases start from."""

    bundle: Path
    checkpoint: Path


@dataclass(frozen=True)
class Outcome:
    kind: str
    text: str


Case = Callable[[Made, Path, random.Random], Outcome]


# --- classes -------------------------------------------------------------------------------------------------------


def manifest(made: Made, place: Path, rng: random.Random) -> Outcome:
    bundle = _copy(made.bundle, place)
    mutations.edit_json(bundle / "bundle.json", rng)
    return _ask(bundle, rng)


def processor(made: Made, place: Path, rng: random.Random) -> Outcome:
    bundle = _copy(made.bundle, place)
    name = rng.choice(("tokenizer.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"))
    path = bundle / "processor" / name
    if name == "chat_template.jinja":
        path.write_text(mutations.template(path.read_text(), rng))
    elif rng.random() < 0.85:
        mutations.edit_json(path, rng)
    else:
        path.write_bytes(mutations.bytes_of(path.read_bytes(), rng))
    mutations.list_file(bundle, f"processor/{name}")
    return _ask(bundle, rng)


def graph(made: Made, place: Path, rng: random.Random) -> Outcome:
    bundle = _copy(made.bundle, place)
    name = rng.choice(("vision.onnx", "select-k4.onnx", "decoder.onnx"))
    path = bundle / name
    change = mutations.graph if rng.random() < 0.7 else mutations.bytes_of
    path.write_bytes(change(path.read_bytes(), rng))
    mutations.list_file(bundle, name)
    return _ask(bundle, rng, with_image=True)


def data(made: Made, place: Path, rng: random.Random) -> Outcome:
    bundle = _copy(made.bundle, place)
    name = rng.choice(("vision.data", "decoder.data", "embed_tokens.safetensors", "embed_tokens.safetensors"))
    path = bundle / name
    path.write_bytes(mutations.bytes_of(path.read_bytes(), rng))
    mutations.list_file(bundle, name)
    return _ask(bundle, rng, with_image=True)


def image(made: Made, place: Path, rng: random.Random) -> Outcome:
    path = place / "picture"
    path.write_bytes(mutations.image(rng))
    return _run_command(made.bundle, ["--image", str(path), "--prompt", "What is it?"])


def config(made: Made, place: Path, rng: random.Random) -> Outcome:
    checkpoint = _copy(made.checkpoint, place)
    mutations.edit_json(checkpoint / "config.json", rng)
    return _export_command(checkpoint, place)


def checkpoint(made: Made, place: Path, rng: random.Random) -> Outcome:
    folder = _copy(made.checkpoint, place)
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != "config.json")
    path = rng.choice(files)
    if path.suffix == ".safetensors":
        path.write_bytes(mutations.safetensors(path.read_bytes(), rng))
    elif path.suffix == ".json" and rng.random() < 0.8:
        mutations.edit_json(path, rng)
    elif path.suffix == ".jinja":
        path.write_text(mutations.template(path.read_text(), rng))
    else:
        path.write_bytes(mutations.bytes_of(path.read_bytes(), rng))
    return _export_command(folder, place)


CLASSES: dict[str, Case] = {
    case.__name__: case for case in (manifest, processor, graph, data, image, config, checkpoint)
}


# --- commands ------------------------------------------------------------------------------------------------------


def _copy(folder: Path, place: Path) -> Path:
    return Path(shutil.copytree(folder, place / folder.name))


def _ask(bundle: Path, rng: random.Random, with_image: bool = False) -> Outcome:
    picture = Path(__file__).resolve().parents[2] / "scripts" / "assets" / "scene.png"
    image = ["--image", str(picture)] if with_image or rng.random() < 0.3 else []
    return _run_command(bundle, [*image, "--prompt", "What is on the sofa? 12 aaaa"])


def _run_command(bundle: Path, flags: list[str]) -> Outcome:
    from flashvlm.cli import run as cli

    return _judge(cli.main, [str(bundle), *flags, "--max-new-tokens", "2", "--threads", "1"])


def _export_command(checkpoint: Path, place: Path) -> Outcome:
    from flashvlm_export import exporter
    from flashvlm_export.cli import export as cli

    def began(*_: object) -> NoReturn:
        sys.exit(0)

    exporter.trace = began
    return _judge(cli.main, ["--model", str(checkpoint), "--budget", "4", "--out", str(place / "out")])


def _judge(main: Callable[[], None], arguments: Sequence[str]) -> Outcome:
    ran = run(main, *arguments)
    lines = [line for line in ran.stderr.splitlines() if line.strip() and not line.endswith(" ...")]
    if ran.code == 0 and not lines:
        return Outcome(ANSWERED, "")
    if ran.code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and lines[0].isprintable():
        return Outcome(REFUSED, lines[0])
    return Outcome(FOUND, f"status {ran.code}: {ran.stderr.strip()[-2000:]}")


# --- children ------------------------------------------------------------------------------------------------------


def run_case(name: str, number: int, seed: int, made: Made, place: Path) -> Outcome:
    """One case in a child; what the child did not live to tell is found too."""
    place.mkdir()
    told = place / "outcome"
    pid = os.fork()
    if pid == 0:
        _child(name, number, seed, made, place, told)
    ended = _wait(pid, SECONDS)
    try:
        if ended is None:
            return Outcome(FOUND, f"no end within {SECONDS} s")
        if not told.exists():
            return Outcome(FOUND, f"the process ended with status {ended}")
        kind, _, text = told.read_text(encoding="utf-8", errors="replace").partition("\n")
        return Outcome(kind, text)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _child(name: str, number: int, seed: int, made: Made, place: Path, told: Path) -> NoReturn:
    os.setsid()
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        outcome = CLASSES[name](made, place, random.Random(f"{name} {seed} {number}"))
    except BaseException as error:
        outcome = Outcome(FOUND, f"escaped: {type(error).__name__}: {error}")
    with contextlib.suppress(BaseException):
        told.write_text(f"{outcome.kind}\n{outcome.text}", encoding="utf-8", errors="replace")
    os._exit(0)


def _wait(pid: int, seconds: float) -> int | None:
    """The exit status of a child, a signal as a negative number; None if it had to be killed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def prepare(names: Sequence[str]) -> None:
    """Imports what the children need, once; nothing is run here, as threads do not survive a fork."""
    from flashvlm import pipeline  # noqa: F401
    from flashvlm.cli import run as cli  # noqa: F401
    from flashvlm.sessions.providers import import_onnxruntime

    import_onnxruntime()
    mutations.prepare()
    if {"config", "checkpoint"} & {*names}:
        import transformers

        from flashvlm_export import exporter  # noqa: F401
        from flashvlm_export.cli import export as export_cli  # noqa: F401

        transformers.AutoProcessor  # noqa: B018


def fuzz(name: str, cases: Sequence[int], seed: int, made: Made) -> tuple[dict[str, int], list[str]]:
    """Counts of each kind of outcome, and what was found: the number of the case and what happened."""
    counts = {ANSWERED: 0, REFUSED: 0, FOUND: 0}
    found = []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        for number in cases:
            outcome = run_case(name, number, seed, made, Path(place, str(number)))
            counts[outcome.kind] += 1
            if outcome.kind == FOUND:
                found.append(f"{name} --seed {seed} --only {number}: {outcome.text}")
    return counts, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("classes", nargs="*", choices=[*CLASSES, "all"], default=["all"])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    options = parser.parse_args()
    names = [*CLASSES] if "all" in options.classes else options.classes
    prepare(names)
    made = Made(options.bundle.resolve(), options.checkpoint.resolve())
    cases = range(options.cases) if options.only is None else [options.only]
    failed = 0
    for name in names:
        began = time.monotonic()
        counts, found = fuzz(name, cases, options.seed, made)
        failed += len(found)
        sys.stdout.write(f"{name}: {counts}, {time.monotonic() - began:.0f} s\n" + "".join(f"  {f}\n" for f in found))
        sys.stdout.flush()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
