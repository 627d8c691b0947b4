"""flashvlm-export refuses what cannot work before it starts, and what goes wrong later leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from refusals import assert_refused, copy_of, run

pytest.importorskip("torch")

from flashvlm.bundle import Bundle
from flashvlm.extras import install
from flashvlm.files import atomic_folder
from flashvlm_export import exporter, output
from flashvlm_export.cli.export import main
from flashvlm_export.weights import stream as weights


class WorkBeganError(Exception):
    """The work began."""


@pytest.fixture
def no_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    def trace(*_: object) -> None:
        raise WorkBeganError

    monkeypatch.setattr(exporter, "trace", trace)
    monkeypatch.setenv("FLASHVLM_DEBUG", "1")  # or WorkBeganError would be told in one line


@pytest.fixture(scope="module")
def traced() -> dict[str, Any]:
    return {}


# What is refused while or after it is traced: by the method whose graph takes least to trace.
QUICK = ("--method", "uniform", "--budget", "4")


@pytest.fixture
def quick_tracing(monkeypatch: pytest.MonkeyPatch, traced: dict[str, Any]) -> None:
    """Traces each graph once for all tests: what comes after takes a fraction of a second."""
    real = exporter.trace

    def trace(graph: Any, *how: Any) -> Any:
        if graph.name not in traced:
            traced[graph.name] = real(graph, *how)
        return traced[graph.name]

    monkeypatch.setattr(exporter, "trace", trace)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


def everything(folder: Path) -> dict[str, bytes | str]:
    """Names of all entries, hidden ones too, and the contents of files."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else ""
        for path in folder.rglob("*")
    }


# --- flags ---

FLAGS: list[tuple[list[str], tuple[str, ...]]] = [
    (["--budget", "0"], ("--budget 0", "at least 1", "all")),
    (["--budget", "-3"], ("--budget -3", "at least 1")),
    (["--budget", "17"], ("--budget 17", "expected 1 to 16")),
    (["--budget", "4,17"], ("--budget 17", "expected 1 to 16")),
    (["--budget", "many"], ("--budget 'many'", "whole number", "all")),
    (["--budget", "3.5"], ("--budget '3.5'", "whole number")),
    (["--budget", ""], ("--budget ''", "whole number")),
    (["--budget", "64,,128"], ("--budget ''", "whole number")),
    (
        ["--method", "best"],
        ("unknown method 'best'", "flashvlm-contrast", "flashvlm-published", "uniform, random, none"),
    ),
    (["--method", "none"], ("--method none keeps every token", "--budget all", "not 4")),
    (["--query", "image"], ("--query", "'image'", "'question', 'prompt'")),
    (["--positions", "any"], ("--positions", "'any'", "'renumber', 'keep'")),
    (["--dtype", "int8"], ("--dtype", "'int8'", "'float16', 'bfloat16', 'float32'")),
    (["--layout", "one"], ("--layout", "'one'", "'split', 'fused'")),
    (["--partition-space", "pixels"], ("partition_space", "'features' or 'projected'", "'pixels'")),
    (["--eta", "2"], ("eta", "0 to 1", "2.0")),
    (["--eta", "nan"], ("eta", "0 to 1", "nan")),
    (["--eta", "half"], ("--eta", "valid number")),
    (["--temperature", "0"], ("temperature", "0.0")),
    (["--pool-temperature", "0"], ("pool_temperature", "0.0")),
    (["--eps", "0"], ("eps", "0.0")),
    (["--top-ratio", "-1"], ("top_ratio", "0 to 1", "-1.0")),
    (["--iterations", "-1"], ("iterations", "0 to 100", "-1")),
    (["--seed", "-1"], ("seed", "-1")),
    (["--seed", "1"], ("--seed is not a parameter of flashvlm, which reads --eta, --temperature", "leave it out")),
    (["--method", "trim", "--eta", "0.3"], ("--eta is not a parameter of trim, which reads none", "leave it out")),
    (["--method", "random", "--top-ratio", "1"], ("--top-ratio is not a parameter of random, which reads --seed;",)),
    (["--max-seq", "0"], ("--max-seq 0", "expected 2 to 4096")),
    (["--max-seq", "-1"], ("--max-seq -1", "expected 2 to 4096")),
    (["--max-seq", "5000"], ("--max-seq 5000", "expected 2 to 4096", "max_position_embeddings")),
    (["--max-seq", "11"], ("--max-seq 11 is too small", "4 image tokens", "need 12", "lower --budget")),
    (["--max-seq", "23", "--budget", "4,16"], ("16 image tokens", "need 24")),
    (["--max-seq", "23", "--budget", "all"], ("16 image tokens", "need 24")),
    (["--max-seq", "few"], ("--max-seq", "valid integer")),
    (["--colour", "red"], ("No such option: --colour", "flashvlm-export --help")),
    (["another"], ("unexpected extra argument", "another")),
]


@pytest.mark.usefixtures("no_tracing")
@pytest.mark.parametrize(("flags", "expected"), FLAGS, ids=lambda value: " ".join(value))
def test_flags(flags: list[str], expected: tuple[str, ...], tiny_checkpoint: Path, place: Path) -> None:
    ran = run(main, "--model", tiny_checkpoint, "--out", place / "out", *["--budget", "4", *flags])
    assert_refused(ran, *expected)
    assert not everything(place)


@pytest.mark.usefixtures("no_tracing")
@pytest.mark.parametrize("flags", [["--max-seq", "12"], ["--max-seq", "4096"], ["--budget", "16"], ["--budget", "all"]])
def test_what_just_fits_is_not_refused(flags: list[str], tiny_checkpoint: Path, place: Path) -> None:
    with pytest.raises(WorkBeganError):
        run(main, "--model", tiny_checkpoint, "--out", place / "out", *["--budget", "4", *flags])


@pytest.mark.parametrize("missing", ["--model", "--out"])
def test_missing_flag(missing: str) -> None:
    flags = {"--model": "m", "--out": "o"}
    del flags[missing]
    assert_refused(run(main, *next(iter(flags.items()))), missing, "flashvlm-export --help")


# --- where to write ---


def make_file(out: Path) -> None:
    out.write_text("precious")


def make_folder(out: Path) -> None:
    out.mkdir()
    (out / "precious").touch()


def make_other_bundle(out: Path) -> None:
    """A file of our manifest's name, written by some other program."""
    make_folder(out)
    (out / "bundle.json").write_text('{"files": []}')


@pytest.mark.usefixtures("no_tracing")
@pytest.mark.parametrize("make", [make_file, make_folder, make_other_bundle])
def test_something_else_is_there(make: Callable[[Path], None], tiny_checkpoint: Path, place: Path) -> None:
    make(place / "out")
    before = everything(place)
    command = ("--model", tiny_checkpoint, "--budget", "4", "--out", place / "out")
    assert_refused(run(main, *command), f"{place / 'out'} exists", "--force")
    assert_refused(run(main, *command, "--force"), "--force replaces only bundles", "is not part of one", "move it")
    assert everything(place) == before


@pytest.mark.usefixtures("no_tracing")
def test_a_bundle_is_there(tiny_bundle: Path, tiny_checkpoint: Path, place: Path) -> None:
    out = copy_of(tiny_bundle, place, "out")
    before = everything(place)
    command = ("--model", tiny_checkpoint, "--budget", "4", "--out", out)
    assert_refused(run(main, *command), "exists", "add --force to replace it")
    (out / "notes.txt").write_text("mine")
    assert_refused(run(main, *command, "--force"), "notes.txt is not part of one")
    assert everything(place) == {**before, "out/notes.txt": b"mine"}


@pytest.mark.usefixtures("quick_tracing")
def test_force_replaces_a_bundle_and_its_engines(tiny_bundle: Path, tiny_checkpoint: Path, place: Path) -> None:
    out = copy_of(tiny_bundle, place, "out")
    engines = out / "engines" / "tensorrt-1-sm89"
    engines.mkdir(parents=True)
    digest = "0" * 64
    spec = {"file": "vision.engine", "size": 0, "sha256": digest, "onnx_sha256": digest, "data_sha256": []}
    manifest = {
        "target": "tensorrt",
        "version": "1",
        "flags": {"compute_capabilities": ["8.9"], "max_seq": 64, "max_batch": 1, "max_query": 64},
        "engines": {"vision": spec | {"build_seconds": 1.0, "peak_rss": 1}},
    }
    (engines / "engine.json").write_text(json.dumps(manifest))
    (engines / "vision.engine").touch()
    flags = ("--method", "uniform", "--budget", "7, 4,7,all", "--force")
    ran = run(main, "--model", tiny_checkpoint, "--out", out, *flags)
    assert ran.code == 0, ran
    assert Bundle(out).manifest.selection.budgets == (7, 4)  # each once; the first is the default
    assert not (out / "engines").exists()
    assert os.listdir(place) == ["out"]


@pytest.mark.usefixtures("no_tracing")
@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.parametrize("out", [".", "new", "./new/../new", "../place"])
def test_the_checkpoint_is_there(out: str, force: list[str], tiny_checkpoint: Path, place: Path) -> None:
    shutil.copytree(tiny_checkpoint, place, dirs_exist_ok=True)
    if out == "./new/../new":
        (place / "new").mkdir()
    before = everything(place)
    for _ in range(2):
        ran = run(main, "--model", place, "--budget", "4", "--out", f"{place}/{out}", *force)
        assert_refused(ran)
        assert everything(place) == before
        # Even where it passes for a bundle.
        listed = ", ".join(f'"{name}": 0' for name in before)
        (place / "bundle.json").write_text(f'{{"files": {{{listed}}}}}')
        before = everything(place)


@pytest.mark.usefixtures("no_tracing")
def test_the_checkpoint_is_inside(tiny_checkpoint: Path, place: Path) -> None:
    model = copy_of(tiny_checkpoint, place / "out", "engines")
    (place / "out" / "bundle.json").write_text('{"files": {}}')
    before = everything(place)
    ran = run(main, "--model", model, "--budget", "4", "--out", place / "out", "--force")
    assert_refused(ran, "is not part of one", "choose another name")
    assert everything(place) == before


@pytest.mark.usefixtures("no_tracing")
@pytest.mark.parametrize("out", ["/", ".", "..", "no/such/folder", "file/out"])
def test_impossible_places(out: str, tiny_checkpoint: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_file(place / "file")
    monkeypatch.chdir(place)
    assert_refused(run(main, "--model", tiny_checkpoint, "--budget", "4", "--out", out, "--force"), f"--out {out}")
    assert list(everything(place)) == ["file"]


@pytest.mark.usefixtures("quick_tracing")
def test_something_else_arrives_meanwhile(tiny_checkpoint: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = exporter.check_space

    def meanwhile(*arguments: Any) -> None:
        make_folder(place / "out")
        real(*arguments)

    monkeypatch.setattr(exporter, "check_space", meanwhile)
    ran = run(main, "--model", tiny_checkpoint, "--budget", "4", "--out", place / "out", "--force")
    assert_refused(ran, "precious is not part of one")
    assert sorted(everything(place)) == ["out", "out/precious"]


def test_leftovers_of_the_dead_alone_are_removed(place: Path) -> None:
    """Who is alive holds the lock of its folder (tests/attacks/test_places.py); names that are not ours stay."""
    for name in ("partial-" + "1" * 16, "replaced-" + "2" * 16, "partial-mine", "partial-1"):
        make_folder(place / f".o[1].{name}")
    with atomic_folder(place / "o[1]") as folder:  # the old one that was aside is back
        assert (place / "o[1]" / "precious").exists()
        shutil.rmtree(place / "o[1]")
        (folder / "new").touch()
    assert sorted(os.listdir(place)) == [".o[1].partial-1", ".o[1].partial-mine", "o[1]"]
    assert os.listdir(place / "o[1]") == ["new"]


def test_unwritable_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output.os, "access", lambda *_: False)  # root may write anywhere
    assert_refused(run(main, "--model", "m", "--out", place / "out"), "no permission to write", str(place))


# --- in the middle of the work ---


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_room(_: object) -> Any:
    return shutil._ntuple_diskusage(10**6, 10**6, 0)  # type: ignore[attr-defined]


@pytest.mark.usefixtures("quick_tracing")
@pytest.mark.parametrize(
    ("owner", "name", "stand_in", "expected"),
    [
        (output.shutil, "disk_usage", no_room, ("disk full", "0.00 GB are needed", "free space")),
        (weights.os, "posix_fallocate", full, ("No space left", "free space or choose another")),
        (exporter.ir, "save", full, ("No space left", "free space or choose another")),
        (Path, "write_text", full, ("No space left", "free space or choose another")),
        (Path, "rename", full, ("No space left", "free space or choose another")),
    ],
    ids=["known before", "weights", "graph", "manifest", "rename"],
)
@pytest.mark.parametrize("old", [False, True])
def test_disk_full(
    owner: Any,
    name: str,
    stand_in: Any,
    expected: tuple[str, ...],
    old: bool,
    tiny_checkpoint: Path,
    tiny_bundle: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if old:
        copy_of(tiny_bundle, place, "out")
    before = everything(place)
    monkeypatch.setattr(owner, name, stand_in)
    ran = run(main, "--model", tiny_checkpoint, *QUICK, "--out", place / "out", "--force")
    monkeypatch.undo()
    assert_refused(ran, *expected)
    assert everything(place) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Room for the weights, not for the graphs as well."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=760k", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.usefixtures("quick_tracing")
def test_a_disk_that_is_really_full(small_disk: Path, tiny_checkpoint: Path) -> None:
    ran = run(main, "--model", tiny_checkpoint, *QUICK, "--out", small_disk / "out")
    assert_refused(ran, "No space left on device", "free space or choose another")
    assert not os.listdir(small_disk)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell that starts the tests in the background has them, and their children, ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("quick_tracing", "interruptible")
@pytest.mark.parametrize(("owner", "name"), [(exporter, "trace"), (weights, "write"), (exporter.ir, "save")])
def test_ctrl_c(owner: Any, name: str, tiny_checkpoint: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = getattr(owner, name)

    def interrupted(*arguments: Any, **options: Any) -> None:
        real(*arguments, **options)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr(owner, name, interrupted)
    ran = run(main, "--model", tiny_checkpoint, *QUICK, "--out", place / "out")
    assert ran.code == 130
    assert ran.stderr.splitlines()[-1] == "interrupted"
    assert "Traceback" not in ran.stderr
    assert not everything(place)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_while_starting(place: Path) -> None:
    """In a process of its own, where torch is not yet imported."""
    command = [sys.executable, "-m", "flashvlm_export.cli.export", "--model", "none", "--out", place / "out"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline() == "starting ...\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr.read().split() == ["interrupted"]
    assert process.wait() == 130


# --- an incomplete installation ---


@pytest.mark.parametrize("package", ["torch", "onnx_ir"])
def test_not_installed(package: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if re.match(r"flashvlm_export\.(?!cli)", name)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    ran = run(main, "--model", "llava-1.5-7b", "--out", place / "out")
    assert_refused(ran, f"{package} is not installed", install("export"))
