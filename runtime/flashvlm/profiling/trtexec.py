"""``trtexec`` and ``tensorrt_rtx``: command lines that measure a bundle's graphs, and what they measured."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from flashvlm.budget import ALL, Budget
from flashvlm.bundle import Bundle
from flashvlm.engines import Engines, Target, build_command, built_from, newest_engines
from flashvlm.errors import FlashVLMError
from flashvlm.graph_io import DECODER, prefill_graph, select_graph
from flashvlm.manifest import GraphSpec, Manifest
from flashvlm.profiling.measure import (
    BudgetProfile,
    Profile,
    ProfileOptions,
    Spread,
    allocated_rows,
    describe,
    kv_bytes,
)
from flashvlm.profiling.synthetic import SyntheticSight, synthetic_sight
from flashvlm.profiling.trtexec_json import read_layer_nodes, read_profile, read_times, sum_by_path
from flashvlm.prompt import Item, Prompt, layout, select_rows
from flashvlm.text.processor import EncodedPrompt

Stage = Literal["vision", "select", "prefill", "decode", "fused"]

EXECUTABLES: dict[Target, str] = {"tensorrt": "trtexec", "tensorrt-rtx": "tensorrt_rtx"}
# Where JetPack and NVIDIA's containers put trtexec, off the PATH.
USUAL_FOLDERS = ("/usr/src/tensorrt/bin", "/opt/tensorrt/bin")
WARM_UP_MS = 500
ANY_GPU = "X.Y"  # where a command line names a compute capability
SECONDS = 3  # of measuring, at least, beside --runs inferences


class Libraries(NamedTuple):
    """Plugin libraries that engines call, by how trtexec takes them."""

    dynamic: tuple[Path, ...] = ()
    static: tuple[Path, ...] = ()


NO_LIBRARIES = Libraries()


@dataclass(frozen=True)
class Job:
    """One graph at one set of shapes: what one command line measures.

    sizes   the symbolic dimensions of its inputs
    values  inputs that may not be random: trtexec fills integers with -128..127, which are no places in a cache
    """

    name: str
    stage: Stage
    budget: Budget | None  # None: the same at every budget
    graph: str
    sizes: dict[str, int]
    values: dict[str, np.ndarray] = field(default_factory=dict)

    def values_file(self, tensor: str) -> str:
        return f"{self.name}.{tensor}.bin"

    def report(self, kind: Literal["times", "profile", "layers"]) -> str:
        return f"{self.name}.{kind}.json"


# --- what to measure -----------------------------------------------------------------------------------------------


def find_engines(bundle: Bundle, target: Target | None) -> Engines | None:
    """The engines built last for ``target`` (None: for any), or None if there are none.

    Raises:
        FlashVLMError: they were built from another export, or hold no weights.
    """
    engines = newest_engines(bundle, target)
    if engines is None:
        return None
    again = f"build them again with: {engines.rebuild()}"
    for graph in bundle.manifest.graphs:
        spec = engines.manifest.engines.get(graph)
        if spec is None or not built_from(spec, bundle, graph):
            raise FlashVLMError(f"{engines.folder} has no engine of this export's {graph}; {again}")
        engines.file(graph)
    if engines.manifest.flags.strip_weights:
        again = again.replace(" --strip-weights", "")
        raise FlashVLMError(f"{engines.folder} holds engines without weights, which trtexec cannot fill; {again}")
    return engines


def jobs(bundle: Bundle, options: ProfileOptions, prompt: EncodedPrompt, engines: Engines | None) -> list[Job]:
    """Every graph at the shapes an answer has; decoding is measured half way through it.

    ``prompt`` is the text, with one placeholder for the image.

    Raises:
        FlashVLMError: the engines are too small for prompt or answer.
    """
    manifest, budgets, new_tokens = bundle.manifest, options.budgets, options.new_tokens
    mask = prompt.question_mask if manifest.selection.query == "question" else prompt.text_mask
    query = int(mask.sum())
    seen = synthetic_sight(manifest, options.photo)
    graph = seen.spec.graph
    prompts = {budget: _layout(manifest, prompt.input_ids, seen, seen.tokens(budget)) for budget in budgets}
    longest = max(placed.position_ids.shape[1] for placed in prompts.values()) + new_tokens - 1
    capacity = min(allocated_rows(longest, 1), manifest.model.max_seq)
    if engines is not None:
        flags = engines.manifest.flags
        capacity = flags.max_seq
        if longest > capacity or query > flags.max_query:
            raise FlashVLMError(
                f"prompt and answer take {longest} tokens, {query} of them the question; the engines take "
                f"{capacity} and {flags.max_query}: ask for fewer, or build with: "
                + engines.rebuild(max_seq=max(longest, capacity), max_query=max(query, flags.max_query))
            )
    valid = select_rows(seen.spec, seen.grid, seen.arrangement.valid)
    asked: dict[str, np.ndarray] = {"query_mask": np.ones((len(valid), query), np.bool_)}
    order = {"order": seen.arrangement.order} if seen.spec.tiled else {}
    found = [Job(graph, "vision", None, graph, {"units": seen.grid.units} if order else {"batch": 1}, order)]
    for budget in budgets:
        placed = prompts[budget]
        length = placed.position_ids.shape[1]
        if budget != ALL and seen.tokens(budget) < seen.arrangement.count:
            name, rows = select_graph(graph, budget), "units" if seen.spec.scope == "unit" else "batch"
            sizes = {rows: len(valid), "query": query}
            found.append(Job(name, "select", budget, name, sizes, {"valid": valid, **asked}))
        later = np.full_like(placed.position_ids[:, :1], placed.next_position + new_tokens // 2)  # [A,1]
        steps: tuple[tuple[Stage, str, int, np.ndarray], ...]
        steps = (
            ("prefill", "prompt", 0, placed.position_ids),
            ("decode", "token", length + new_tokens // 2, later),
        )
        for stage, name, start, positions in steps:
            count = positions.shape[1]
            sizes = {"batch": 1, "sequence": count, "capacity": capacity}
            values = {
                "position_ids": positions if len(positions) == 1 else positions[None],
                "cache_position": np.array([start], np.int64),
                "num_tokens": np.array([count], np.int64),
            }
            label = f"decoder-{name}-{'all' if budget == ALL else f'k{budget}'}"
            found.append(Job(label, stage, budget, DECODER, sizes, values))
        if budget != ALL and prefill_graph(graph, budget) in manifest.graphs:
            name = prefill_graph(graph, budget)
            prefix = int(np.flatnonzero(prompt.input_ids == seen.spec.placeholder_id)[0])
            suffix = len(prompt.input_ids) - prefix - 1
            sizes = {"batch": 1, "query": query, "prefix": prefix, "suffix": suffix, "capacity": capacity}
            count_of_suffix = {"num_tokens": np.array([suffix], np.int64)}
            found.append(Job(name, "fused", budget, name, sizes, count_of_suffix | asked))
    return found


def _layout(manifest: Manifest, ids: np.ndarray, seen: SyntheticSight, tokens: int) -> Prompt:
    """The prompt with its image's first tokens kept."""
    item = Item(seen.spec, seen.grid, seen.arrangement.count, np.arange(tokens))
    return layout(ids, [item], manifest.model.position_axes, manifest.selection.positions == "keep")


def needs_engine(bundle: Bundle, job: Job) -> bool:
    """Whether trtexec cannot take the graph itself: TensorScatter wants a capacity that is a number."""
    return bundle.manifest.model.cache_in_place and "capacity" in job.sizes


# --- command lines -------------------------------------------------------------------------------------------------


def command(
    bundle: Bundle,
    job: Job,
    engines: Engines | None,
    target: Target,
    folder: Path,
    runs: int,
    executable: str | None = None,
    libraries: Libraries = NO_LIBRARIES,
) -> list[str]:
    """The line that measures a job and writes its three reports into ``folder``, where ``write_values`` put its inputs.

    With engines it loads one; otherwise it builds from the ONNX file for just these shapes.
    """
    graph = bundle.graph(job.graph)
    shapes = _shapes(graph, job.sizes)
    line = [executable or EXECUTABLES[target]]
    if engines is not None:
        if engines.manifest.plugins and not any(libraries):
            name = engines.manifest.plugins[0].file
            raise FlashVLMError(f"{engines.folder} calls {name}; name it with: flashvlm-profile --plugins .../{name}")
        line += [f"--loadEngine={engines.file(job.graph)}"]
    else:
        line += [f"--onnx={bundle.graph_file(job.graph)}", f"--minShapes={_shapes(graph, dict.fromkeys(job.sizes, 1))}"]
        line += [f"--optShapes={shapes}", f"--maxShapes={shapes}"]
        line += ["--stronglyTyped"] if target == "tensorrt" else []  # TensorRT-RTX knows no other mode
        # The option came with TensorRT 10.15, as did what the modern dialect needs; older trtexec refuses it.
        override = any(libraries) and bundle.manifest.model.cache_in_place
        line += ["--enablePluginOverride"] if override else []
    line += [f"--shapes={shapes}"]
    if job.values:
        line += ["--loadInputs=" + ",".join(f"{name}:{folder / job.values_file(name)}" for name in job.values)]
    line += [f"--dynamicPlugins={path}" for path in libraries.dynamic]
    line += [f"--staticPlugins={path}" for path in libraries.static]
    line += [f"--iterations={runs}", f"--warmUp={WARM_UP_MS}", f"--duration={SECONDS}"]
    line += _timing_flags(target, None if engines is None else engines.manifest.version)
    line += ["--profilingVerbosity=detailed"]
    line += [f"--exportTimes={folder / job.report('times')}", f"--exportProfile={folder / job.report('profile')}"]
    return [*line, f"--exportLayerInfo={folder / job.report('layers')}"]


def _shapes(graph: GraphSpec, sizes: dict[str, int]) -> str:
    """``name:1x3x336x336,...`` of the inputs with a symbolic dimension; the others stand in the graph."""
    dynamic = [spec for spec in graph.inputs if any(isinstance(d, str) for d in spec.shape)]
    return ",".join(
        f"{spec.name}:{'x'.join(str(sizes[d] if isinstance(d, str) else d) for d in spec.shape)}" for spec in dynamic
    )


def _timing_flags(target: Target, version: str | None) -> list[str]:
    """Kernels alone, without copies and launch gaps, and layers timed apart from the whole."""
    if target == "tensorrt-rtx":
        return ["--rtxCudaGraphStrategy=wholeGraph", "--noDataTransfers", "--separateProfileRun"]
    if version is not None and int(version.split(".")[0]) >= 11:
        return []  # the defaults since 11.0, where the flags are deprecated
    return ["--useCudaGraph", "--noDataTransfers", "--useSpinWait", "--separateProfileRun"]


def script(
    bundle: Bundle,
    measured: Sequence[Job],
    engines: Engines | None,
    target: Target,
    folder: Path,
    runs: int,
    libraries: Libraries = NO_LIBRARIES,
) -> Iterator[str]:
    """The lines as a shell script. Without engines it begins with building them."""
    if engines is None:
        yield build_command(bundle, target, ANY_GPU)
    for job in measured:
        if engines is None and needs_engine(bundle, job):
            yield f"# {job.name}: TensorRT takes {job.graph} with a fixed KV capacity only; list it again once built"
        else:
            yield shlex.join(command(bundle, job, engines, target, folder, runs, libraries=libraries))


def write_values(job: Job, folder: Path) -> None:
    """Inputs as trtexec reads them: raw little-endian values in C order."""
    for name, array in job.values.items():
        array.tofile(folder / job.values_file(name))


def find_executable(target: Target) -> str:
    """Path of trtexec or tensorrt_rtx; refuses with where it comes from."""
    name = EXECUTABLES[target]
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(USUAL_FOLDERS))
    if found is None:
        origin = "the TensorRT archive or JetPack" if target == "tensorrt" else "the TensorRT-RTX archive"
        raise FlashVLMError(
            f"{name} is not on the PATH: it is part of {origin}, not of the Python package; "
            f"add its bin folder to PATH, or print the lines for another machine with --print-commands"
        )
    return found


def run(line: Sequence[str], log: Path) -> None:
    """Runs a command line, its output to ``log``.

    Raises:
        FlashVLMError: it failed, with the first error it printed.
    """
    done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    log.write_text(f"{shlex.join(line)}\n{done.stdout}", encoding="utf-8")
    if done.returncode:
        errors = [text.partition("[E]")[2].strip() for text in done.stdout.splitlines() if "[E]" in text]
        reason = errors[0] if errors else (done.stdout.strip().splitlines() or ["it printed nothing"])[-1]
        raise FlashVLMError(f"{Path(line[0]).name} failed with status {done.returncode} in {log.stem}: {reason}")


def collect(
    bundle: Bundle, options: ProfileOptions, measured: Sequence[Job], folder: Path, backend: str, text_tokens: int
) -> Profile:
    """The profile of jobs whose reports are in ``folder``.

    Stages ran apart: percentiles of a sum are sums of percentiles, and so wider than those of whole answers.
    """
    times = {(job.stage, job.budget): Spread.of(read_times(folder / job.report("times"))) for job in measured}
    capacity = max(job.sizes.get("capacity", 0) for job in measured)
    first: dict[Budget, Spread] = {}
    stages: dict[Budget, dict[str, Spread]] = {}
    for budget in options.budgets:
        stages[budget] = {stage: spread for (stage, of), spread in times.items() if of in (None, budget)}
        parts = [stages[budget][stage] for stage in ("vision", "select", "prefill") if stage in stages[budget]]
        first[budget] = sum(parts[1:], start=parts[0])
    whole = first.get(ALL)
    budgets = tuple(
        BudgetProfile(
            budget=budget,
            text_tokens=text_tokens,
            image_tokens=synthetic_sight(bundle.manifest, options.photo).tokens(budget),
            kv_bytes=kv_bytes(bundle, capacity),
            stages=stages[budget],
            first_token=first[budget],
            answer=first[budget] + stages[budget]["decode"].times(options.new_tokens - 1),
            speedup=None if whole is None else whole.over(first[budget]),
        )
        for budget in options.budgets
    )
    layers = {}
    for job in measured:
        nodes = read_layer_nodes(folder / job.report("layers"))
        layers[job.name] = sum_by_path(read_profile(folder / job.report("profile")), nodes)
    return describe(bundle, backend, options, budgets, interleaved=False, layers=layers)
