"""Nothing is written where a name or a link in a bundle leads, and nothing is replaced that we did not write."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flashvlm.cli import profile as cli_profile
from flashvlm.cli import run as cli
from flashvlm.files import atomic_file, atomic_folder
from refusals import Ran, assert_refused, copy_of, run

QUESTION = ("--prompt", "What is it?")


@pytest.fixture
def bundle(tiny_gqa_half_bundle: Path, tmp_path: Path) -> Path:
    return copy_of(tiny_gqa_half_bundle, tmp_path, "bundle")


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder of somebody's, with something to lose."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "precious").write_text("precious")
    return folder


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (60, 60), "red").save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def compile_bundle(bundle: Path) -> Ran:
    pytest.importorskip("tensorrt_rtx")
    from flashvlm_export.cli.compile import main

    return run(main, bundle, "--target", "tensorrt-rtx", "--compute-capability", "8.9", "--max-seq", "64")


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((bundle / "bundle.json").read_text())
    change(content)
    (bundle / "bundle.json").write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["../../x", "/x", "..", "select-k5/../x", "visi\x00on", "a" * 300, "select-k05"])
def test_graphs_of_other_names(name: str, bundle: Path) -> None:
    """Each becomes the name of an engine."""
    edit(bundle, lambda m: m["graphs"].update({name: m["graphs"]["vision"]}))
    for ran in (compile_bundle(bundle), run(cli.main, bundle, *QUESTION)):
        assert_refused(ran, "is not a graph: vision, vision-448x672, decoder, select-k64")
    assert not (bundle / "engines").exists()


@pytest.mark.parametrize("name", ["../x.onnx", "/x.onnx", "a/b/c.onnx", ".hidden", "a//b", "a/.b", "vision.onnx/"])
def test_files_of_other_names(name: str, bundle: Path) -> None:
    edit(bundle, lambda m: m["graphs"]["vision"].update(file=name))
    assert_refused(compile_bundle(bundle), "is not the name of a file in the bundle")


def test_engines_that_are_a_link(bundle: Path, foreign: Path) -> None:
    (bundle / "engines").symlink_to(foreign)
    assert_refused(compile_bundle(bundle), "engines is a link", "not followed for writing")
    assert (foreign / "precious").read_text() == "precious"
    assert os.listdir(foreign) == ["precious"]


def test_a_folder_of_engines_that_is_a_link(bundle: Path, foreign: Path) -> None:
    place = engines_of(bundle)
    place.symlink_to(foreign)
    assert_refused(compile_bundle(bundle), f"{place.name} is a link", "not followed for writing")
    assert os.listdir(foreign) == ["precious"]


def test_a_folder_of_engines_with_something_else_in_it(bundle: Path) -> None:
    place = engines_of(bundle)
    place.mkdir()
    (place / "precious").write_text("precious")
    assert_refused(compile_bundle(bundle), f"{place.name}", "precious is not part of any", "move it away")
    assert (place / "precious").read_text() == "precious"


def engines_of(bundle: Path) -> Path:
    trt = pytest.importorskip("tensorrt_rtx")
    (bundle / "engines").mkdir()
    return bundle / "engines" / f"tensorrt-rtx-{trt.__version__}-sm89"


@pytest.mark.parametrize("what", ["a link", "a pipe", "a device", "a folder"])
def test_a_timing_cache_that_is_no_file(what: str, bundle: Path, foreign: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from flashvlm_export.compile import builder

    path = tmp_path / "cache"
    if what == "a link":  # is read, but replaced rather than followed
        path.symlink_to(foreign / "precious")
    elif what == "a pipe":
        os.mkfifo(path)
    elif what == "a folder":
        path.mkdir()
    else:
        path = Path("/dev/zero")
    if what == "a link":
        with atomic_file(path) as file:
            file.write(b"learned")
        assert path.read_bytes() == b"learned"
        assert not path.is_symlink()
        assert (foreign / "precious").read_text() == "precious"
    else:
        with pytest.raises(OSError, match=r"expected a (regular )?file, found a (named pipe|folder|device)"):
            builder._known(path)


@pytest.mark.parametrize(
    "flags",
    [
        ("--workspace", "nan"),
        ("--workspace", "inf"),
        ("--workspace", "-1"),
        ("--workspace", "1e300"),
        ("--max-query", "0"),
        ("--max-query", "-5"),
        ("--max-query", "1000000000"),
        ("--max-batch", "0"),
        ("--max-batch", "1000000000000"),
        ("--max-seq", "0"),
        ("--max-seq", "100000000000000"),
        ("--compute-capability", "99999.99999"),
        ("--compute-capability", "٣.٣"),
        ("--timing-cache", "/dev/zero"),
        ("--timing-cache", "x" * 300),
    ],
    ids=" ".join,
)
def test_flags_of_compile(flags: tuple[str, str], tiny_gqa_half_bundle: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from flashvlm_export.cli.compile import main

    line = {"--target": "tensorrt-rtx", "--compute-capability": "8.9", "--max-seq": "64"} | dict([flags])
    ran = run(main, tiny_gqa_half_bundle, *(word for pair in line.items() for word in pair))
    assert_refused(ran, flags[0])


# --- what an export replaces ---


@pytest.fixture
def exporting(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, Path], Ran]:
    """Runs an export that is refused before it traces, or fails the test."""
    pytest.importorskip("torch")
    from flashvlm_export import exporter
    from flashvlm_export.cli.export import main

    def reached(*_: object) -> None:
        raise AssertionError("not refused before the work began")

    monkeypatch.setattr(exporter, "trace", reached)
    return lambda checkpoint, out: run(main, "--model", checkpoint, "--budget", "4", "--out", out, "--force")


def test_out_is_a_link(
    tiny_checkpoint: Path, bundle: Path, foreign: Path, tmp_path: Path, exporting: Callable[[Path, Path], Ran]
) -> None:
    for target in (foreign, bundle):
        (tmp_path / "out").symlink_to(target)
        assert_refused(exporting(tiny_checkpoint, tmp_path / "out"), "is a link", "not followed for writing")
        (tmp_path / "out").unlink()
    assert os.listdir(foreign) == ["precious"]
    assert (bundle / "bundle.json").exists()


def test_something_of_somebody_under_engines(
    tiny_checkpoint: Path, bundle: Path, foreign: Path, exporting: Callable[[Path, Path], Ran]
) -> None:
    (bundle / "engines").mkdir()
    (bundle / "engines" / "notes.txt").write_text("precious")
    assert_refused(exporting(tiny_checkpoint, bundle), "notes.txt is not part of one")
    (bundle / "engines" / "notes.txt").unlink()
    (bundle / "engines" / "mine").symlink_to(foreign)
    assert_refused(exporting(tiny_checkpoint, bundle), "mine is not part of one")
    assert os.listdir(foreign) == ["precious"]


@pytest.mark.parametrize("out", ["x" * 250, "x" * 300, "y/" * 2500 + "x", "nul\0byte"], ids=lambda out: str(len(out)))
def test_names_without_end(
    out: str, tiny_checkpoint: Path, tmp_path: Path, exporting: Callable[[Path, Path], Ran]
) -> None:
    if len(out) == 250:
        with atomic_folder(tmp_path / out) as partial:
            (partial / "file").write_text("x")
        assert (tmp_path / out / "file").exists()
    else:
        assert_refused(exporting(tiny_checkpoint, tmp_path / out), "--out")
        assert_refused(run(cli.main, tmp_path / out, *QUESTION), "bundle")


# --- --show and reports ---


def test_show_does_not_follow_links_laid_beforehand(bundle: Path, picture: Path, foreign: Path, tmp_path: Path) -> None:
    (tmp_path / ".kept.png.partial").symlink_to(foreign / "precious")
    (tmp_path / "kept.png").symlink_to(foreign / "precious")
    ran = run(cli.main, bundle, "--image", picture, *QUESTION, "--max-new-tokens", "1", "--show", tmp_path / "kept.png")
    assert ran.code == 0, ran
    assert (foreign / "precious").read_text() == "precious"
    assert Image.open(tmp_path / "kept.png").width > 100
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".partial") and name != ".kept.png.partial"]


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "y/" * 2500 + "x.png", "nul\0.png"], ids=len)
def test_show_under_a_name_without_end(name: str, bundle: Path, picture: Path, tmp_path: Path) -> None:
    ran = run(cli.main, bundle, "--image", picture, *QUESTION, "--max-new-tokens", "1", "--show", tmp_path / name)
    assert_refused(Ran(ran.code, "", ran.stderr), "--show")


def test_a_report_over_a_link(bundle: Path, foreign: Path, tmp_path: Path) -> None:
    (tmp_path / "report").symlink_to(foreign)
    ran = run(cli_profile.main, bundle, "--runs", "1", "--new-tokens", "2", "--out", tmp_path / "report", "--force")
    assert_refused(ran, "report is a link")
    assert os.listdir(foreign) == ["precious"]


def test_a_terminated_command_takes_its_temporary_file_away(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from flashvlm.cli import support as cli_support
from flashvlm.files import atomic_file, atomic_folder
app = cli_support.new_app()
@app.command()
def wait(place: Path) -> None:
    with atomic_folder(place / "folder") as folder, atomic_file(place / "file") as file:
        (folder / "half").write_text("half")
        print("ready", flush=True)
        time.sleep(60)
cli_support.run(app, "wait")
"""
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    assert len(os.listdir(tmp_path)) == 2
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=20) == 143
    assert os.listdir(tmp_path) == []


# --- folders of processes that this one cannot see ---


def test_a_folder_in_the_making_is_left_to_its_maker(tmp_path: Path) -> None:
    """As in two containers with one volume: no process id says anything, only the lock does."""
    code = "import sys, time; from pathlib import Path; from flashvlm.files import atomic_folder\n"
    code += "with atomic_folder(Path(sys.argv[1])) as partial:\n    print(partial, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    maker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert maker.stdout is not None
    partial = Path(maker.stdout.readline().strip())
    with atomic_folder(tmp_path / "out"):
        assert partial.is_dir()
    assert partial.is_dir()
    maker.kill()
    maker.wait()
    (tmp_path / "out").rmdir()
    with atomic_folder(tmp_path / "out"):
        assert not partial.exists()  # now it was left behind


def test_what_only_looks_like_a_folder_left_behind(tmp_path: Path, foreign: Path) -> None:
    (tmp_path / ".out.partial-mine").mkdir()
    (tmp_path / f".out.partial-{'0' * 16}").symlink_to(foreign)
    (tmp_path / f".out.replaced-{'0' * 16}").symlink_to(foreign)
    with atomic_folder(tmp_path / "out"):
        pass
    assert (tmp_path / ".out.partial-mine").is_dir()
    assert os.listdir(foreign) == ["precious"]
    assert not (tmp_path / "out").is_symlink()


def test_ctrl_c_while_a_command_still_imports(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time\nopen('importing', 'w').close()\ntime.sleep(60)\n")
    # A shell starts what it runs in the background with SIGINT ignored.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from flashvlm.cli import entry\nentry._start('slow')"
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "importing").exists():
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    assert child.communicate(timeout=20)[1] == "interrupted\n"
    assert child.returncode == 130
