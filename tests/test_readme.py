"""The commands of the README and of docs/, run as they stand in a copy of the tree.

The fast tier runs scripts/demo on a bundle that is there, and what takes no minute; the slow one runs everything.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
from PIL import Image

import refusals

ROOT = Path(__file__).resolve().parents[1]
EXCLUDED = (".git", ".venv", "demo-out", "*cache*")


Demo = tuple[Path, str]
EXPORTED = pytest.param("exported", marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def demo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """A copy of the tree in which scripts/demo ran, and what it printed; ``given``: it had its bundle already."""
    tree = copy_of_the_tree(tmp_path_factory.mktemp("readme") / "flashvlm")
    if request.param == "given":
        (tree / "demo-out").mkdir()
        shutil.copytree(request.getfixturevalue("demo_bundle"), tree / "demo-out" / "bundle")
    printed = run("scripts/demo", tree)
    assert "error" not in printed
    return tree, printed


def copy_of_the_tree(tree: Path) -> Path:
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*EXCLUDED))
    # The environment the tests run in stands for the one scripts/demo would install.
    (tree / ".venv").mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):
        (tree / ".venv" / name).symlink_to(Path(sys.prefix, name))
    want = subprocess.check_output("cat pyproject.toml constraints.txt | cksum", shell=True, cwd=tree, text=True)
    (tree / ".venv" / "installed-export,cpu").write_text(f"export,cpu {want}")
    return tree


def run(command: str, folder: Path) -> str:
    environment = os.environ | {"PATH": f"{folder}/.venv/bin:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("demo", ["given", EXPORTED], indirect=True)
def test_the_demo_answers_and_draws(demo: Demo) -> None:
    tree, printed = demo
    for stage in ("preprocess", "vision", "select", "prefill", "decode"):
        assert re.search(rf"^{stage}\b.*\d+\.\d\d$", printed, re.MULTILINE), stage
    assert "64 kept of 576" in printed
    assert "Q: What color is the heart?" in printed
    assert re.search(r"^A: yellow$", printed, re.MULTILINE)
    with Image.open(tree / "demo-out" / "kept.png") as picture:
        assert picture.width > 1000


def test_the_demo_exports_what_the_tests_gave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its export, which the fast tier does not run, but for its dtype: float16, as the weights are stored."""
    from flashvlm_export import exporter
    from flashvlm_export.cli.export import main
    from flashvlm_export.exporter import ExportOptions

    (line,) = re.findall(r"^  flashvlm-export (.*) \|\|$", (ROOT / "scripts" / "demo").read_text(), re.MULTILINE)
    asked = []

    def export(options: ExportOptions, _: object) -> NoReturn:
        asked.append(dataclasses.replace(options, default=None))  # the first budget, named
        raise exporter.FlashVLMError("read")

    monkeypatch.setattr(exporter, "export", export)
    assert "read" in refusals.run(main, *line.split()).stderr
    assert asked == [ExportOptions("demo", Path("demo-out/bundle"), budgets=(64,), force=True)]


@pytest.mark.slow
@pytest.mark.parametrize("demo", ["exported"], indirect=True)
def test_the_demo_runs_again_on_the_bundle_it_has(demo: Demo) -> None:
    tree, _ = demo
    manifest = tree / "demo-out" / "bundle" / "bundle.json"
    made = manifest.stat()
    assert "A: yellow" in run("scripts/demo", tree)
    assert (manifest.stat().st_ino, manifest.stat().st_mtime_ns) == (made.st_ino, made.st_mtime_ns)


@pytest.mark.parametrize(
    ("demo", "every"),
    [("given", False), pytest.param("exported", True, marks=pytest.mark.slow)],
    ids=["quick", "every"],
    indirect=["demo"],
)
def test_the_commands_of_the_readme_run(demo: Demo, every: bool) -> None:
    from clips import scene, write_clip
    from flashvlm_export.cli.export import main as export
    from flashvlm_export.testing import checkpoints

    tree, _ = demo
    for name in ("cat.jpg", "left.jpg", "right.jpg"):
        Image.open(tree / "scripts" / "assets" / "scene.png").save(tree / name)
    if every:
        checkpoints.write_checkpoint("tiny-internvl", tree / "tiny")
        write_clip(tree / "cat.mp4", scene(10, (48, 64), 1))
    first, own = blocks("README.md", "bash")
    assert [line.split()[0] for line in first.splitlines()] == ["scripts/demo", "scripts/test"]
    bundle = tree / "llava"
    bundle.unlink(missing_ok=True)
    if not every:
        bundle.symlink_to("demo-out/bundle")
    ran = []
    for line in own.splitlines():
        command = line.split()[0]
        minutes = command == "flashvlm-compile" or (command == "flashvlm-export" and "--plan" not in line)
        minutes = minutes or "clips" in line  # the bundle of such an export
        if command.startswith("flashvlm-") and (every or not minutes):
            # No hub in a test; the demo model has LLaVA-1.5's 576 image tokens.
            line = line.replace("--model llava-1.5-7b", "--model demo").replace("--model internvl3-2b", "--model tiny")
            if every:
                run(f"echo 'What is it?' | {line}", tree)
            elif command == "flashvlm-export":  # in this process, where torch is imported
                assert refusals.run(export, *shlex.split(line, comments=True)[1:]).code == 0
            else:
                run(f"echo 'What is it?' | {line.replace('--runs 5', '--runs 1')}", tree)
            ran.append(command)
    assert len(ran) == (8 if every else 4)
    (python,) = blocks("README.md", "python")
    (tree / "example.py").write_text(python)
    assert run("python example.py", tree).strip()


def test_the_python_of_the_design_document_runs() -> None:
    (python,) = blocks("docs/design.md", "python")
    scope: dict[str, object] = {}
    exec(compile(python, "docs/design.md", "exec"), scope)
    assert scope["selection"].kept.shape == (2, 64)  # type: ignore[attr-defined]


def test_documents_name_files_that_exist() -> None:
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
