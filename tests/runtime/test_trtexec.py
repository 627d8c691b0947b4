"""trtexec is driven with lines and inputs that fit the graphs, and what it writes is read as it writes it.

No trtexec is needed: a stand-in writes the files in its format, and ONNX Runtime runs every graph at the shapes and
with the values that the lines name.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
from trtexec_files import LAYERS, NAMES_ONLY, PROFILE, TIMES

from flashvlm import FlashVLMError
from flashvlm.bundle import Bundle
from flashvlm.cli.profile import main
from flashvlm.engines import ENGINE_MANIFEST, ENGINES, BuildFlags, EngineManifest, EngineSpec, Target
from flashvlm.profiling.measure import ProfileOptions, Spread
from flashvlm.profiling.synthetic import synthetic_prompt
from flashvlm.profiling.trtexec import Engines, Job, Libraries, command, find_engines, jobs, script, write_values
from flashvlm.profiling.trtexec_json import (
    OUTSIDE,
    layer_path,
    over_layers,
    read_layer_nodes,
    read_profile,
    read_times,
    sum_by_path,
)
from flashvlm.sessions.onnxruntime import NUMPY_DTYPES
from refusals import assert_refused, copy_of, run


@pytest.fixture(scope="module")
def bundle(tiny_gqa_bundle: Path) -> Bundle:
    return Bundle(tiny_gqa_bundle, verify=False)


def options(*budgets: int | str, prompt: int = 20, new: int = 8) -> ProfileOptions:
    return ProfileOptions(tuple(budgets) or (5, "all"), prompt, new, 3, 0)  # type: ignore[arg-type]


def planned(bundle: Bundle, engines: Engines | None = None, **sizes: int) -> list[Job]:
    asked = options(**sizes)
    return jobs(bundle, asked, synthetic_prompt(bundle, asked.prompt_tokens)[1], engines)


def add_engines(
    folder: Path, target: Target = "tensorrt", version: str = "10.13.2", *, sha: str | None = None, **flags: object
) -> Path:
    """What flashvlm-compile leaves, with empty engines."""
    source = Bundle(folder, verify=False)
    files = source.manifest.files
    engines = {}
    out = folder / ENGINES / f"{target}-{version}-sm87"
    out.mkdir(parents=True)
    for name, graph in source.manifest.graphs.items():
        (out / f"{name}.engine").write_bytes(b"")
        engines[name] = EngineSpec(
            file=f"{name}.engine",
            size=0,
            sha256="0" * 64,
            onnx_sha256=sha or files[graph.file].sha256,
            data_sha256=tuple(files[data].sha256 for data in graph.data),
            build_seconds=1,
            peak_rss=1,
        )
    wanted = BuildFlags.model_validate(
        {"compute_capabilities": ("8.7",), "max_seq": 128, "max_batch": 1, "max_query": 64, **flags}
    )
    manifest = EngineManifest(target=target, version=version, flags=wanted, engines=engines)
    (out / ENGINE_MANIFEST).write_text(manifest.model_dump_json())
    return out


def flag(line: list[str], name: str) -> str:
    (found,) = [part.partition("=")[2] for part in line if part.startswith(f"--{name}=")]
    return found


def sizes(text: str) -> dict[str, list[int]]:
    """``a:1x2,b:3`` -> {a: [1, 2], b: [3]}, split as trtexec does: at commas, then at the last colon."""
    pairs = (part.rpartition(":") for part in text.split(","))
    return {name: [int(d) for d in dims.split("x")] for name, _, dims in pairs}


# --- shapes and inputs ---


def test_the_lines_shapes_and_inputs_run_the_graphs(bundle: Bundle, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    found = planned(bundle)
    assert [job.name for job in found] == [
        "vision",
        "select-k5",
        "decoder-prompt-k5",
        "decoder-token-k5",
        "prefill-k5",
        "decoder-prompt-all",
        "decoder-token-all",
    ]
    for job in found:
        write_values(job, tmp_path)
        line = command(bundle, job, None, "tensorrt", tmp_path, 3)
        shapes, graph = sizes(flag(line, "shapes")), bundle.graph(job.graph)
        loaded = dict(part.rsplit(":", 1) for part in flag(line, "loadInputs").split(",")) if job.values else {}
        feed = {}
        for spec in graph.inputs:
            dtype, shape = NUMPY_DTYPES[spec.dtype], shapes[spec.name]
            if spec.name in loaded:
                feed[spec.name] = np.fromfile(loaded[spec.name], dtype).reshape(shape)
            else:  # trtexec's own: random, and of a kind that is safe to be random
                assert spec.dtype == "float32"
                feed[spec.name] = np.random.default_rng(0).uniform(-1, 1, shape).astype(dtype)
        session = onnxruntime.InferenceSession(bundle.file(graph.file))
        for output in session.run(None, feed):
            assert np.isfinite(output).all()


def test_stages_have_the_lengths_of_an_answer(bundle: Bundle) -> None:
    by_name = {job.name: job for job in planned(bundle, prompt=20, new=8)}
    assert by_name["decoder-prompt-k5"].sizes["sequence"] == 25
    assert by_name["decoder-prompt-all"].sizes["sequence"] == 45
    token = by_name["decoder-token-k5"]
    assert token.sizes["sequence"] == 1
    assert token.values["cache_position"].tolist() == [29]  # half way through eight new tokens
    assert token.values["num_tokens"].tolist() == [1]
    fused = by_name["prefill-k5"]
    assert fused.sizes["prefix"] + fused.sizes["suffix"] == 20
    assert fused.values["num_tokens"].tolist() == [fused.sizes["suffix"]]
    question = int(synthetic_prompt(bundle, 20)[1].question_mask.sum())
    assert by_name["select-k5"].sizes["query"] == question


def test_without_engines_the_script_begins_with_the_compiler(bundle: Bundle, tmp_path: Path) -> None:
    lines = list(script(bundle, planned(bundle), None, "tensorrt", tmp_path, 20))
    assert lines[0] == f"flashvlm-compile {bundle.path} --target tensorrt"
    runnable = [shlex.split(line) for line in lines[1:] if not line.startswith("#")]
    assert [line[1] for line in runnable] == [
        f"--onnx={bundle.path}/vision.onnx",
        f"--onnx={bundle.path}/select-k5.onnx",
    ]
    for line in runnable:  # no capacity in them, so TensorRT takes the ONNX file
        assert {"--stronglyTyped", "--useCudaGraph", "--noDataTransfers", "--separateProfileRun"} <= set(line)
        assert flag(line, "maxShapes") == flag(line, "optShapes") == flag(line, "shapes")
        assert all(min(dims) >= 1 for dims in sizes(flag(line, "minShapes")).values())
    assert sum("fixed KV capacity" in line for line in lines) == 5


def test_with_engines_every_line_loads_one(tiny_gqa_bundle: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_gqa_bundle, tmp_path)
    built = add_engines(folder)
    bundle = Bundle(folder, verify=False)
    engines = find_engines(bundle, None)
    assert engines is not None
    assert engines.folder == built
    for job in planned(bundle, engines):
        line = command(
            bundle, job, engines, "tensorrt", tmp_path / "out", 20, libraries=Libraries((Path("libflashvlm.so"),))
        )
        assert line[:2] == ["trtexec", f"--loadEngine={built}/{job.graph}.engine"]
        assert "--dynamicPlugins=libflashvlm.so" in line
        assert not any(part.startswith(("--onnx", "--minShapes", "--stronglyTyped")) for part in line)
        assert flag(line, "iterations") == "20"
        for option, kind in (("exportTimes", "times"), ("exportProfile", "profile"), ("exportLayerInfo", "layers")):
            assert flag(line, option) == f"{tmp_path}/out/{job.name}.{kind}.json"
        if "capacity" in job.sizes:
            assert sizes(flag(line, "shapes"))["past_key_values.0.key"] == [1, 2, 128, 16]


@pytest.mark.parametrize(
    ("target", "version", "expected"),
    [
        ("tensorrt", "10.3.0", {"--useCudaGraph", "--noDataTransfers", "--useSpinWait", "--separateProfileRun"}),
        ("tensorrt", "11.0.0", set()),  # the defaults there
        ("tensorrt-rtx", "1.7.1", {"--rtxCudaGraphStrategy=wholeGraph", "--noDataTransfers", "--separateProfileRun"}),
    ],
)
def test_flags_follow_the_version(
    target: Target, version: str, expected: set[str], tiny_gqa_bundle: Path, tmp_path: Path
) -> None:
    folder = copy_of(tiny_gqa_bundle, tmp_path)
    add_engines(folder, target, version)
    bundle = Bundle(folder, verify=False)
    engines = find_engines(bundle, target)
    line = command(bundle, planned(bundle)[0], engines, target, tmp_path, 20)
    assert line[0] == {"tensorrt": "trtexec", "tensorrt-rtx": "tensorrt_rtx"}[target]
    switches = {"--useCudaGraph", "--noDataTransfers", "--useSpinWait", "--separateProfileRun"}
    assert {part for part in line if part in switches or "Strategy" in part} == expected


# --- engines ---


def test_engines_are_found_by_target_and_newest_first(tiny_gqa_bundle: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_gqa_bundle, tmp_path)
    bundle = Bundle(folder, verify=False)
    assert find_engines(bundle, None) is None
    old = add_engines(folder, version="10.3.0")
    os.utime(old / ENGINE_MANIFEST, (1, 1))
    new = add_engines(folder, version="10.13.2")
    rtx = add_engines(folder, "tensorrt-rtx", "1.7.1")
    os.utime(rtx / ENGINE_MANIFEST, (2, 2))
    assert [find_engines(bundle, t).folder for t in (None, "tensorrt", "tensorrt-rtx")] == [new, new, rtx]  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ({"sha": "1" * 64}, "no engine of this export's vision; build them again with: flashvlm-compile"),
        ({"strip_weights": True}, "engines without weights"),
    ],
)
def test_engines_that_do_not_fit_are_refused(
    made: dict[str, object], expected: str, tiny_gqa_bundle: Path, tmp_path: Path
) -> None:
    folder = copy_of(tiny_gqa_bundle, tmp_path)
    add_engines(folder, **made)  # type: ignore[arg-type]
    with pytest.raises(FlashVLMError, match=expected):
        find_engines(Bundle(folder, verify=False), None)


def test_engines_too_small_are_refused(tiny_gqa_bundle: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_gqa_bundle, tmp_path)
    add_engines(folder, max_seq=51)
    bundle = Bundle(folder, verify=False)
    with pytest.raises(FlashVLMError, match=r"take 52 tokens, .* --max-seq 52 --max-query"):
        planned(bundle, find_engines(bundle, None), prompt=20, new=8)
    assert planned(bundle, find_engines(bundle, None), prompt=20, new=7)


# --- what trtexec writes ---


def test_its_files_are_read_as_it_writes_them(tmp_path: Path) -> None:
    for name, text in (("times", TIMES), ("profile", PROFILE), ("layers", LAYERS), ("names", NAMES_ONLY)):
        (tmp_path / name).write_text(text)
    assert read_times(tmp_path / "times") == [2, 3, 4]
    layers = read_profile(tmp_path / "profile")
    assert [ms for _, ms in layers] == [0.1, 0.4, 1, 0.5]
    nodes = read_layer_nodes(tmp_path / "layers")
    assert len(nodes["__myl_MulAddSum_myl0_3"]) == 3
    assert read_layer_nodes(tmp_path / "names") == {}
    assert sum_by_path(layers, nodes) == {
        "/decoder/language_model/layers.0": 1,  # what an Add, a Mul and a projection have in common
        "/decoder/language_model/layers.1/mlp": 0.5,
        "/decoder/language_model/layers.0/self_attn": 0.4,
        "/vision/vision_tower/embeddings/patch_embedding": 0.1,
    }
    assert sum_by_path(layers, {})[OUTSIDE] == 1


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("/vision/vision_tower/layers.3/mlp/fc1/MatMul", "/vision/vision_tower/layers.3/mlp/fc1"),
        ("/a/b/MatMul + /a/b/Add", "/a/b"),
        ("/a/layers.1/x/MatMul + /a/layers.11/x/Add", "/a"),  # parts, not letters
        ("{ForeignNode[/a/layers.0/x/MatMul.../a/layers.0/y/Add]}", "/a/layers.0"),
        ("{ForeignNode[/a/layers.0/x/MatMul]}", "/a/layers.0/x"),
        ("PWN(PWN(/a/b/Sigmoid), PWN(/a/b/Mul))", "/a/b"),
        ("/a/b/MatMul_myl0_12", "/a/b"),
        ("Reformatting CopyNode for Output Tensor 0 to /a/b/Conv", "/a/b"),
        ("/select-k64/TextGuidedScore", "/select-k64"),
        ("/MatMul", "/"),
        ("/a/MatMul + /b/MatMul", "/"),
        ("__myl_ReshTran_myl0_0", OUTSIDE),
        ("(Unnamed Layer* 14) [Shuffle]", OUTSIDE),
    ],
)
def test_layers_belong_to_the_module_their_nodes_share(name: str, path: str) -> None:
    assert layer_path(name) == path


def test_stacks_of_layers_are_told_as_one() -> None:
    sums = {"/d/lm/layers.0/mlp/up": 1.0, "/d/lm/layers.11/mlp/up": 2.0, "/d/lm/layers.1/attn": 4.0, "/d": 8.0}
    assert over_layers(sums, 4) == {"/d": 8.0, "/d/lm/layers.*/attn": 4.0, "/d/lm/layers.*/mlp": 3.0}
    assert sum(over_layers(sums, 1).values()) == 15


@pytest.mark.parametrize("text", ["", "[", "[]", "{}", '[{"latencyMs" : 1}]', "[1]"])
def test_files_of_another_kind_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "times").write_text(text)
    with pytest.raises(FlashVLMError, match="--exportTimes"):
        read_times(tmp_path / "times")


# --- the command ---

STAND_IN = f"""#!{sys.executable}
import json, sys
from pathlib import Path
given = dict(part.partition("=")[::2] for part in sys.argv[1:])
for entry in filter(None, given.get("--loadInputs", "").split(",")):
    assert Path(entry.rpartition(":")[2]).stat().st_size > 0
assert Path(given["--loadEngine"]).is_file()
if "FAIL" in Path(given["--loadEngine"]).parent.parent.parent.name:
    sys.exit("[11/21/2026-09:00:00] [E] Error[1]: engine plan file is not compatible")
Path(given["--exportTimes"]).write_text({TIMES!r})
Path(given["--exportProfile"]).write_text({PROFILE!r})
Path(given["--exportLayerInfo"]).write_text({LAYERS!r})
"""


@pytest.fixture
def trtexec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "bin" / "trtexec"
    path.parent.mkdir()
    path.write_text(STAND_IN)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(path.parent), prepend=os.pathsep)
    return path


@pytest.mark.usefixtures("trtexec")
def test_engines_are_measured_and_their_layers_summed(tiny_gqa_bundle: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_gqa_bundle, tmp_path)
    add_engines(folder)
    out = tmp_path / "report"
    ran = run(main, folder, "--trtexec", "--new-tokens", "5", "--target-ms", "9", "--out", out)
    assert ran.code == 0, ran.stderr
    assert "TensorRT 10.13.2, trtexec" in ran.stdout
    assert re.search(r"decoder-prompt-k5 +ms +%", ran.stdout)
    assert re.search(r"/decoder/language_model/layers\.\* +1\.000 +50\.0", ran.stdout)
    values = json.loads((out / "profile.json").read_text())
    kept, whole = values["budgets"]
    assert kept["stages"]["select"] == {"median": 3, "p10": 2.2, "p90": 3.8}
    assert kept["first_token"] == {"median": 9, "p10": 6.6, "p90": 11.4}  # vision, select and prefill
    assert kept["stages"]["fused"]["median"] == 3
    assert whole["first_token"]["median"] == 6
    assert whole["answer"]["median"] == 6 + 4 * 3
    assert values["recommendation"]["budget"] == "all"
    assert values["layers"]["vision"]["/decoder/language_model/layers.1/mlp"] == 0.5
    assert len(values["commands"]) == 7
    assert all(f"{out}/trtexec/" in line for line in values["commands"])
    assert (out / "trtexec" / "vision.log").is_file()
    assert (out / "profile.png").is_file()
    assert Spread(**kept["speedup"]).median == pytest.approx(6 / 9)


@pytest.mark.usefixtures("trtexec")
def test_a_failing_trtexec_is_one_line_and_leaves_nothing(tiny_gqa_bundle: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_gqa_bundle, tmp_path, "FAIL")
    add_engines(folder)
    ran = run(main, folder, "--trtexec", "--out", tmp_path / "report")
    assert_refused(ran, "trtexec failed with status 1 in vision", "Error[1]: engine plan file is not compatible")
    assert not [path for path in tmp_path.iterdir() if "report" in path.name]


def test_without_trtexec_its_origin_is_told(
    tiny_gqa_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("flashvlm.profiling.trtexec.USUAL_FOLDERS", ())
    folder = copy_of(tiny_gqa_bundle, tmp_path)
    add_engines(folder)
    assert_refused(run(main, folder, "--trtexec"), "trtexec is not on the PATH", "JetPack", "--print-commands")
    rtx = copy_of(tiny_gqa_bundle, tmp_path, "rtx")
    add_engines(rtx, "tensorrt-rtx", "1.7.1")
    assert_refused(run(main, rtx, "--trtexec"), "tensorrt_rtx is not on the PATH", "TensorRT-RTX archive")
    assert_refused(run(main, rtx, "--trtexec", "--plugins", "x.so"), "runs no plugin layers")
    assert_refused(run(main, folder, "--trtexec", "--plugins", "x.so"), "--plugins x.so: no such file")
    assert_refused(run(main, folder, "--trtexec", "--out", tmp_path / "a,b"), "trtexec splits", "','")


def test_print_commands_prints_a_script_and_writes_its_inputs(tiny_gqa_bundle: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_gqa_bundle, tmp_path)
    add_engines(folder)
    out = tmp_path / "report"
    ran = run(main, folder, "--print-commands", "--out", out, "--budget", "5")
    assert ran.code == 0, ran.stderr
    lines = [shlex.split(line) for line in ran.stdout.splitlines()]
    assert [flag(line, "exportTimes") for line in lines] == [
        f"{out}/trtexec/{name}.times.json"
        for name in ("vision", "select-k5", "decoder-prompt-k5", "decoder-token-k5", "prefill-k5")
    ]
    loads = [flag(line, "loadInputs").split(",") for line in lines[1:]]  # vision's pixels may be random
    named = [entry.rpartition(":")[2] for load in loads for entry in load]
    assert sorted(named) == sorted(str(path) for path in (out / "trtexec").iterdir())
    bare = run(main, folder, "--print-commands")
    assert bare.code == 0
    assert "written with --out report" in bare.stderr
