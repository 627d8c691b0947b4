"""An export that is killed, at whichever moment, leaves nothing that passes for a bundle and costs no old one.

A child process counts what it does (each change in the file system, now and then a step of progress) and kills itself
before the n-th of these; so every moment between two changes is tried, and none by chance. The slow tier tries all
of them, the fast one every eighth and those around a rename.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}
EVERY = 8  # moments, in the fast tier


def children(model: str, place: str, every: int) -> None:
    """Runs in a process of its own, as forking is safe only before threads start: kills one child a moment."""
    import shutil
    import signal

    import torch

    from flashvlm.bundle import Bundle
    from flashvlm.errors import BundleError
    from flashvlm_export import exporter
    from flashvlm_export.exporter import ExportOptions, export

    torch.set_num_threads(1)
    out = Path(place, "out")
    # By the method whose graph takes least to trace: this is about files.
    new = ExportOptions(model=model, out=out, budgets=(4,), method="uniform", force=True)
    old = ExportOptions(model=model, out=out, budgets=(), force=True)

    traced = {}
    real = exporter.trace

    def trace(graph, *how):  # type: ignore[no-untyped-def]
        if graph.name not in traced:
            traced[graph.name] = real(graph, *how)
        return traced[graph.name]

    exporter.trace = trace
    export(new)
    kept_new = shutil.copytree(out, Path(place, "new"))
    export(old)
    kept_old = shutil.copytree(out, Path(place, "old"))

    events = Path(place, "events")

    def killed(at: int | None) -> bool:
        """Whether an export got as far as its ``at``-th moment; with None it goes to its end and notes its moments."""
        pid = os.fork()
        if pid == 0:
            seen: list[str] = []

            def moment(event: str) -> None:
                seen.append(event)
                if len(seen) == at:
                    os.kill(os.getpid(), signal.SIGKILL)

            def watch(event: str, arguments: tuple) -> None:
                writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
                # Removing a tree names its files by descriptor and bare name.
                if (writes and place in str(arguments[0])) or event in CHANGES:
                    moment(event)

            class Steps:
                steps = 0

                def start(self, stage: str, total: int):  # type: ignore[no-untyped-def]
                    return self.step

                def step(self, _: int) -> None:  # in the middle of a data file
                    self.steps += 1
                    if self.steps % 16 == 0:
                        moment("step")

            sys.addaudithook(watch)
            export(new, Steps())
            moments = list(seen)
            if at is None:
                events.write_text(json.dumps(moments))
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL

    def budgets(folder: Path) -> tuple[int, ...]:
        return Bundle(folder).manifest.selection.budgets

    def left() -> list[str]:
        return sorted(name for name in os.listdir(place) if name not in ("new", "old", events.name))

    report = {}

    def prepare(had_old: bool) -> None:
        for name in left():
            shutil.rmtree(Path(place, name))
        if had_old:
            shutil.copytree(kept_old, out)

    for had_old in (False, True):
        found = []
        prepare(had_old)
        assert not killed(None)
        assert left() == ["out"], left()
        moments = json.loads(events.read_text())
        assert len(moments) >= (25 if had_old else 20), moments
        around = {at + near for at, event in enumerate(moments, 1) if event == "os.rename" for near in (-1, 0, 1)}
        for at in range(1, len(moments) + 1):
            if at % every and at not in around:
                continue
            prepare(had_old)
            assert killed(at), f"the export does not reach moment {at} of {len(moments)}"
            try:
                state = str(budgets(out))
            except BundleError:
                state = "out exists" if out.exists() else "nothing"
                whole = [name for name in left() if name.startswith(".out.replaced-")]
                if whole and budgets(Path(place, whole[0])) == ():
                    state = "old aside"
            found.append(state)
            if state == "old aside":  # which even an export that is refused puts back
                with pytest.raises(exporter.FlashVLMError, match="exists"):
                    export(ExportOptions(model=model, out=out, budgets=(4,)))
                assert left() == ["out"], left()
                assert budgets(out) == (), "the old bundle is not back"
            if len(found) % 3 == 0 or found[-2:-1] != [state]:  # the time of all is not worth it
                export(new)
                assert left() == ["out"], left()
                assert (out / "decoder.data").read_bytes() == (kept_new / "decoder.data").read_bytes()
                assert budgets(out) == (4,)
        report["over an old bundle" if had_old else "to a free place"] = found
    sys.stdout.write(json.dumps(report))


@pytest.fixture(scope="module", params=[EVERY, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
def report(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[str]]:
    place = tmp_path_factory.mktemp("killed")
    command = [sys.executable, __file__, str(tiny_checkpoint), str(place), str(request.param)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_to_a_free_place(report: dict[str, list[str]]) -> None:
    """Nothing, until everything is there at once; and the next export succeeds and tidies up."""
    states = report["to a free place"]
    assert len(states) >= 5
    assert set(states) == {"nothing"}  # the last change is the rename


def test_over_an_old_bundle(report: dict[str, list[str]]) -> None:
    """The old bundle, then for one moment the old one under another name, then the new one."""
    states = report["over an old bundle"]
    assert len(states) >= 8, states
    assert [state for i, state in enumerate(states) if i == 0 or states[i - 1] != state] == ["()", "old aside", "(4,)"]
    assert states.count("old aside") == 1


if __name__ == "__main__":
    children(*sys.argv[1:3], every=int(sys.argv[3]))
