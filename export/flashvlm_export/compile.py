"""Bundle -> TensorRT engines, with ``tensorrt`` or ``tensorrt_rtx``: one path, the two modules share their interface.

TensorRT-RTX builds for a named compute capability and needs no GPU; TensorRT builds for the GPU it finds.
Never imports torch.
"""

from __future__ import annotations

import contextlib
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashvlm.bundle import Bundle, GraphSpec, TensorSpec, sha256
from flashvlm.engines import (
    ENGINE_MANIFEST,
    ENGINES,
    MODULES,
    BuildFlags,
    EngineManifest,
    EngineSpec,
    PluginSpec,
    Target,
    built_from,
    folder_name,
    import_target,
    local_capability,
    read_manifest,
)
from flashvlm.errors import BundleError, FlashVLMError
from flashvlm_export import plugin_nodes
from flashvlm_export.output import check_space, whole_or_not

# Shapes the compiler tunes for: one decode step's neighbourhood would starve prefill, the maximum starves both.
TYPICAL = {"batch": 1, "sequence": 128, "query": 32, "prefix": 16, "suffix": 64}


@dataclass(frozen=True)
class CompileOptions:
    """What ``flashvlm-compile`` takes; None leaves a choice to the compiler or the bundle.

    plugins: library of plugins/ for the nodes of the selection; without it they are standard operators.
    """

    bundle: Path
    target: Target = "tensorrt"
    compute_capabilities: tuple[str, ...] = ()
    max_seq: int | None = None
    max_batch: int = 1
    max_query: int = 512
    workspace: int | None = None
    optimization_level: int | None = None
    timing_cache: Path | None = None
    weight_streaming: bool = False
    strip_weights: bool = False
    version_compatible: bool = False
    plugins: Path | None = None
    force: bool = False


@dataclass(frozen=True)
class CompileReport:
    folder: Path
    manifest: EngineManifest
    reused: tuple[str, ...]
    seconds: float


Start = Callable[[str, int], Callable[[int], None]]


def compile_bundle(options: CompileOptions, start: Start = lambda *_: lambda _: None) -> CompileReport:
    """Builds an engine for every graph of a bundle into ``engines/``, whole or not at all.

    ``start(stage, total)`` is called as the compiler enters a graph and returns a function that takes steps done.
    An engine whose graph, flags and compiler are what they were is reused.

    Raises:
        FlashVLMError: the compiler is missing, cannot take a graph, or the options do not fit.
    """
    started = time.perf_counter()
    bundle = Bundle(options.bundle)
    _check_types(bundle)
    trt = import_target(options.target)
    flags = _flags(options, bundle, trt)
    plugins = () if options.plugins is None else (plugin_nodes.load(options.plugins, bundle, flags, trt),)
    folder = bundle.path / ENGINES / folder_name(options.target, trt.__version__, flags.compute_capabilities)
    previous = _previous(folder, flags, trt.__version__, plugins)
    engines: dict[str, EngineSpec] = {}
    reused = []
    with _engines_folder(folder.parent), whole_or_not(folder, replace=True) as out:
        check_space(out, 0 if options.strip_weights else _weight_bytes(bundle))
        for name, graph in bundle.manifest.graphs.items():
            engine = f"{name}.engine"
            old = previous.get(name)
            if old is not None and not options.force and built_from(old, bundle, name) and _intact(folder, old):
                shutil.copy2(folder / engine, out / engine)
                engines[name] = old
                reused.append(name)
                continue
            began = time.perf_counter()
            cache, to_plugins = options.timing_cache, bool(plugins)
            size, digest = _build(trt, bundle, name, graph, flags, cache, out / engine, start, to_plugins)
            files = bundle.manifest.files
            engines[name] = EngineSpec(
                file=engine,
                size=size,
                sha256=digest,
                onnx_sha256=files[graph.file].sha256,
                data_sha256=tuple(files[data].sha256 for data in graph.data),
                build_seconds=round(time.perf_counter() - began, 2),
                peak_rss=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            )
        manifest = EngineManifest(
            target=options.target, version=trt.__version__, flags=flags, engines=engines, plugins=plugins
        )
        (out / ENGINE_MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    return CompileReport(folder, manifest, tuple(reused), time.perf_counter() - started)


@contextmanager
def _engines_folder(folder: Path) -> Iterator[None]:
    """Makes the folder of all engines, and takes it away again if nothing came of it."""
    folder.mkdir(exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # only succeeds while empty


def _weight_bytes(bundle: Bundle) -> int:
    files = bundle.manifest.files
    return sum(files[name].size for graph in bundle.manifest.graphs.values() for name in graph.data)


def _check_types(bundle: Bundle) -> None:
    model = bundle.manifest
    if model.model.dtype == "float32" and model.dialect == "modern":
        raise FlashVLMError(
            f"{bundle.path} is float32, for which TensorRT's Attention has no kernel; "
            f"export with --dtype float16 or bfloat16, or with --dialect legacy"
        )


# --- one engine ----------------------------------------------------------------------------------------------------


def _build(
    trt: Any,
    bundle: Bundle,
    name: str,
    graph: GraphSpec,
    flags: BuildFlags,
    cache: Path | None,
    out: Path,
    start: Start,
    to_plugins: bool = False,
) -> tuple[int, str]:
    messages: list[str] = []
    logger = _logger(trt, messages)
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    path = bundle.file(graph.file)
    if not parser.parse(_pinned(path, flags.max_seq, to_plugins), str(path)):
        raise FlashVLMError(f"{trt.__name__} {trt.__version__} cannot take {graph.file}: {_parser_errors(parser)}")
    config = builder.create_builder_config()
    _configure(trt, config, flags)
    profile = builder.create_optimization_profile()
    for tensor in graph.inputs:
        profile.set_shape(tensor.name, *_shapes(tensor, _largest(graph, flags)))
    config.add_optimization_profile(profile)
    config.progress_monitor = _monitor(trt, name, start)
    with _timing_cache(config, cache):
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        hint = "stripping weights needs a GPU: " if flags.strip_weights and local_capability() is None else ""
        reason = "; ".join(messages[-2:])
        raise FlashVLMError(f"{trt.__name__} {trt.__version__} failed to build {graph.file}: {hint}{reason}")
    with out.open("wb") as file:
        file.write(plan)
    return out.stat().st_size, sha256(out)


def _pinned(path: Path, max_seq: int, to_plugins: bool = False) -> bytes:
    """The graph with its KV capacity fixed: TensorRT takes no symbol there, and engines have one capacity.

    ``to_plugins``: also with the selection's function calls as plugin nodes.
    """
    try:
        import onnx
    except ImportError:
        raise FlashVLMError("onnx is not installed; install it with: pip install onnx") from None
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == "capacity":
                dimension.dim_value = max_seq  # a oneof: this clears the symbol
    if to_plugins:
        plugin_nodes.for_plugins(model)
    return model.SerializeToString()


def _largest(graph: GraphSpec, flags: BuildFlags) -> dict[str, int]:
    """The largest size of each symbol; a fused prefill shares the capacity between prefix, image and suffix."""
    budget = next((tensor.shape[1] for tensor in graph.outputs if tensor.name == "kept"), 0)
    room = flags.max_seq - int(budget)
    prefix = max(room // 4, 1)
    return {
        "batch": flags.max_batch,
        "query": flags.max_query,
        "sequence": flags.max_seq,
        "prefix": prefix,
        "suffix": max(room - prefix, 1),
        "capacity": flags.max_seq,
    }


def _shapes(tensor: TensorSpec, largest: dict[str, int]) -> list[list[int]]:
    """Smallest, typical and largest shape of an input."""
    fixed = {"capacity": largest["capacity"]}
    smallest = dict.fromkeys(largest, 1) | fixed
    typical = {symbol: min(size, largest[symbol]) for symbol, size in TYPICAL.items()} | fixed
    return [[d if isinstance(d, int) else sizes[d] for d in tensor.shape] for sizes in (smallest, typical, largest)]


def _network_flags(trt: Any) -> int:
    # Types are in the graph. TensorRT 11 and TensorRT-RTX know no other mode and may not list the flag.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _configure(trt: Any, config: Any, flags: BuildFlags) -> None:
    if hasattr(config, "set_compute_capability"):
        config.num_compute_capabilities = len(flags.compute_capabilities)
        for i, capability in enumerate(flags.compute_capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, _sm(capability)), i)
    if flags.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, flags.workspace)
    if flags.optimization_level is not None:
        config.builder_optimization_level = flags.optimization_level
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        # TensorRT-RTX: without it a decode step may allocate, and then no CUDA graph can be captured.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    for wanted, flag in (
        (flags.weight_streaming, "WEIGHT_STREAMING"),
        (flags.strip_weights, "STRIP_PLAN"),
        (flags.strip_weights, "REFIT_IDENTICAL"),
        (flags.version_compatible, "VERSION_COMPATIBLE"),
    ):
        if wanted:
            # TensorRT-RTX lists the flag but ships no lean runtime to go with it.
            missing = flag == "VERSION_COMPATIBLE" and trt.__name__ == MODULES["tensorrt-rtx"]
            if missing or not hasattr(trt.BuilderFlag, flag):
                raise FlashVLMError(f"{trt.__name__} {trt.__version__} has no {flag}; leave that option out")
            config.set_flag(getattr(trt.BuilderFlag, flag))
    # Layer names with the graph paths they come from: flashvlm-profile --trtexec sums by them.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    # Half-precision scores divided by a temperature of 0.004 would reorder tokens; TF32 has the same 10 bits.
    config.clear_flag(trt.BuilderFlag.TF32)


def _parser_errors(parser: Any) -> str:
    """The operators the parser refused, each once, with its first reason."""
    reasons: dict[str, str] = {}
    for i in range(parser.num_errors):
        error = parser.get_error(i)
        operator = error.local_function_stack()[0] if error.local_function_stack() else error.node_operator()
        reasons.setdefault(operator or "graph", f"{operator or 'graph'} ({error.node_name()}: {error.desc()})")
    return "; ".join(reasons.values()) or "no reason given"


def _logger(trt: Any, messages: list[str]) -> Any:
    """Collects errors for the one line a refusal has; the compiler would print them."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                messages.append(" ".join(message.split()))

    return Logger()


def _monitor(trt: Any, name: str, start: Start) -> Any:
    """The builder's own progress: its outermost phase is the bar."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.outermost: str | None = None
            self.done = 0
            self.advance: Callable[[int], None] = lambda _: None

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None and self.outermost is None:
                self.outermost = phase
                self.advance = start(name, steps)

        def phase_finish(self, phase: str) -> None:
            pass

        def step_complete(self, phase: str, step: int) -> bool:
            if phase == self.outermost:
                self.advance(step + 1 - self.done)
                self.done = step + 1
            return True

    return Monitor()


@contextmanager
def _timing_cache(config: Any, path: Path | None) -> Iterator[None]:
    """Loads a timing cache and, under a lock, merges into it what the build learned: builds may run side by side."""
    if path is None:
        yield
        return
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    yield
    with path.with_name(path.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        learned = config.get_timing_cache()
        if path.exists():
            learned.combine(config.create_timing_cache(path.read_bytes()), ignore_mismatch=False)
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(learned.serialize())
        partial.replace(path)


# --- options -------------------------------------------------------------------------------------------------------


def _flags(options: CompileOptions, bundle: Bundle, trt: Any) -> BuildFlags:
    limit = bundle.manifest.model.max_seq
    max_seq = limit if options.max_seq is None else options.max_seq
    if not 1 < max_seq <= limit:
        raise FlashVLMError(f"--max-seq {max_seq}: expected 2 to {limit}, the capacity of {bundle.path}")
    if options.max_batch < 1:
        raise FlashVLMError(f"--max-batch {options.max_batch}: expected at least 1")
    return BuildFlags(
        compute_capabilities=_capabilities(options, trt),
        max_seq=max_seq,
        max_batch=options.max_batch,
        max_query=min(options.max_query, max_seq),
        workspace=options.workspace,
        optimization_level=options.optimization_level,
        weight_streaming=options.weight_streaming,
        strip_weights=options.strip_weights,
        version_compatible=options.version_compatible,
    )


def _capabilities(options: CompileOptions, trt: Any) -> tuple[str, ...]:
    asked = options.compute_capabilities
    if options.target == "tensorrt-rtx":
        known = [name for name in dir(trt.ComputeCapability) if name.startswith("SM")]
        for capability in asked:
            if _sm(capability) not in known:
                have = ", ".join(sorted((f"{n[2:-1]}.{n[-1]}" for n in known), key=lambda v: float(v)))
                raise FlashVLMError(
                    f"--compute-capability {capability}: {trt.__name__} {trt.__version__} builds for {have}"
                )
        if not asked:
            raise FlashVLMError(
                "--compute-capability is needed to build for another machine's GPU, such as 8.9 or 12.0"
            )
        return tuple(sorted(set(asked), key=float))
    found = local_capability()
    if found is None:
        raise FlashVLMError(
            "no NVIDIA GPU found; TensorRT builds on the GPU it is for (--target tensorrt-rtx needs none)"
        )
    if asked and asked != (found,):
        raise FlashVLMError(
            f"--compute-capability {','.join(asked)}: TensorRT builds for the GPU it runs on, which is {found}"
        )
    return (found,)


def _sm(capability: str) -> str:
    return "SM" + capability.replace(".", "")


def _previous(folder: Path, flags: BuildFlags, version: str, plugins: tuple[PluginSpec, ...]) -> dict[str, EngineSpec]:
    try:
        manifest = read_manifest(folder)
    except BundleError:
        return {}
    same = (manifest.flags, manifest.version, manifest.plugins) == (flags, version, plugins)
    return manifest.engines if same else {}


def _intact(folder: Path, spec: EngineSpec) -> bool:
    path = folder / spec.file
    return path.is_file() and path.stat().st_size == spec.size and sha256(path) == spec.sha256
