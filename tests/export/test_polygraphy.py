"""``polygraphy run --onnxrt`` over every graph of a bundle loads it as it lies, and finds what our session finds.

Polygraphy is what users of TensorRT look into a graph with, so a bundle's graphs have to be graphs to it, too: external
weights, local functions, a cache that is input and output, and inputs of which random numbers would make no sense.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flashvlm.bundle import Bundle
from flashvlm.sessions.onnxruntime import OnnxRuntimeSession
from gpu_checks.graphs import inputs

pytest.importorskip("polygraphy", reason="polygraphy is not installed; pip install polygraphy")
POLYGRAPHY = Path(sys.executable).with_name("polygraphy")
# Of the largest absolute output: the two sessions may share work among threads differently.
BOUND = 1e-5


def compare(bundle: Bundle, graph: str, folder: Path, **wrong: np.ndarray) -> subprocess.CompletedProcess[str]:
    """Polygraphy's run of a graph beside our session's, with some of our outputs put ``wrong``."""
    from polygraphy.comparator import RunResults
    from polygraphy.json import save_json

    feed = inputs(bundle.graph(graph).inputs, batch=2, capacity=16, seed=1)
    ours = OnnxRuntimeSession(bundle, "cpu")._graph(graph).run(feed) | wrong
    save_json([feed], str(folder / "inputs.json"))
    results = RunResults()
    results.add([ours], runner_name="flashvlm")
    results.save(str(folder / "ours.json"))
    bounds = [f"{name}:{BOUND * float(np.abs(value.astype(np.float64)).max()):g}" for name, value in ours.items()]
    command = [POLYGRAPHY, "run", bundle.graph_file(graph), "--onnxrt", "--load-inputs", folder / "inputs.json"]
    command += ["--load-outputs", folder / "ours.json", "--rtol", "0", "--atol", *bounds]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("kind", "graph"),
    [
        *(("tiny_gqa_bundle", graph) for graph in ("vision", "select-k5", "decoder", "prefill-k5")),
        *(("tiny_gqa_legacy_bundle", graph) for graph in ("vision", "select-k5", "decoder")),
    ],
)
def test_polygraphy_finds_what_our_session_finds(
    kind: str, graph: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    bundle = Bundle(request.getfixturevalue(kind), verify=False)
    done = compare(bundle, graph, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for spec in bundle.graph(graph).outputs:
        assert f"'{spec.name}'" in done.stdout  # each was compared


def test_it_would_find_a_token_that_was_not_kept(tiny_gqa_bundle: Path, tmp_path: Path) -> None:
    done = compare(Bundle(tiny_gqa_bundle, verify=False), "select-k5", tmp_path, kept=np.zeros((2, 5), np.int64))
    assert done.returncode == 1
    assert "FAILED" in done.stdout
