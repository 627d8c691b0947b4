"""One graph of a bundle -> one engine: parse, pin the KV capacity, set shapes and flags, build.

Shapes and flags go through Polygraphy's ``Profile`` and ``CreateConfig``. Its other loaders do less than we need:

    NetworkFromOnnxPath     parses a file; ours is edited in memory, and a parser's reasons are printed, not told
    EngineBytesFromNetwork  prints its progress, tells no reason, and writes the timing cache in place
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flashvlm.bundle import Bundle
from flashvlm.engines import MODULES, BuildFlags, largest_sizes, local_capability
from flashvlm.errors import FlashVLMError
from flashvlm.files import atomic_file, read_bytes, sha256
from flashvlm.graph_io import TensorSpec
from flashvlm.sessions.contract import shape_of
from flashvlm.sessions.tensorrt_log import MESSAGES, logger
from flashvlm_export.compile import plugin_nodes

# Shapes the compiler tunes for: one decode step's neighbourhood would starve prefill, the maximum starves both.
TYPICAL = {"batch": 1, "sequence": 128, "query": 32, "prefix": 16, "suffix": 64, "units": 64}

MAX_TIMING_CACHE = 1 << 30  # bytes

Start = Callable[[str, int], Callable[[int], None]]


def build_engine(
    trt: Any,
    bundle: Bundle,
    name: str,
    flags: BuildFlags,
    cache: Path | None,
    out: Path,
    start: Start,
    to_plugins: bool = False,
) -> tuple[int, str]:
    """Writes one engine and returns its size in bytes and its SHA-256.

    ``to_plugins``: with the selection's function calls as plugin nodes. ``start`` is that of ``compile_bundle``.

    Raises:
        FlashVLMError: the compiler cannot take the graph or fails to build it, with its own first reason.
    """
    MESSAGES.clear()
    graph, path = bundle.graph(name), bundle.graph_file(name)
    builder = trt.Builder(logger(trt))
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger(trt))
    if not parser.parse(_pinned(path, flags.max_seq, to_plugins), str(path)):
        raise FlashVLMError(f"{trt.__name__} {trt.__version__} cannot take {graph.file}: {_parser_errors(parser)}")
    shapes = {tensor.name: _shapes(tensor, largest_sizes(bundle, name, flags)) for tensor in graph.inputs}
    config = _config(trt, builder, network, shapes, flags, _monitor(trt, name, start))
    with _timing_cache(config, cache):
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        hint = "stripping weights needs a GPU: " if flags.strip_weights and local_capability() is None else ""
        raise FlashVLMError(
            f"{trt.__name__} {trt.__version__} failed to build {graph.file}: {hint}{'; '.join(MESSAGES)}"
        )
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


def _shapes(tensor: TensorSpec, largest: dict[str, int]) -> list[tuple[int, ...]]:
    """Smallest, typical and largest shape of an input."""
    fixed = {"capacity": largest["capacity"]}
    typical = {symbol: min(size, TYPICAL.get(symbol, size)) for symbol, size in largest.items()}
    return [shape_of(tensor, sizes) for sizes in (dict.fromkeys(largest, 1) | fixed, typical | fixed, largest)]


def _network_flags(trt: Any) -> int:
    # Types are in the graph. TensorRT 11 and TensorRT-RTX know no other mode and may not list the flag.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _config(
    trt: Any, builder: Any, network: Any, shapes: dict[str, list[tuple[int, ...]]], flags: BuildFlags, monitor: Any
) -> Any:
    """The builder's configuration: by Polygraphy, and after it what Polygraphy has no word for."""
    rtx = trt.__name__ == MODULES["tensorrt-rtx"]
    if rtx and flags.version_compatible:  # it lists the flag, but ships no lean runtime to go with it
        raise FlashVLMError(f"{trt.__name__} {trt.__version__} has no version_compatible; leave that option out")
    _bind_polygraphy(trt)
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
    from polygraphy.backend.trt import CreateConfig, Profile
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    profile = Profile()
    for name, (smallest, typical, largest) in shapes.items():
        profile.add(name, smallest, typical, largest)
    options: dict[str, Any] = {
        "memory_pool_limits": {} if flags.workspace is None else {trt.MemoryPoolType.WORKSPACE: flags.workspace},
        "builder_optimization_level": flags.optimization_level,
        "weight_streaming": flags.weight_streaming,
        "strip_plan": flags.strip_weights,
        "version_compatible": flags.version_compatible,
        # Layer names with the graph paths they come from: flashvlm-profile --trtexec sums by them.
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
        "progress_monitor": monitor,
    }
    if rtx:
        options["compute_capabilities"] = [tuple(map(int, c.split("."))) for c in flags.compute_capabilities]
    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):  # it prints even what it raises
            config = (CreateConfigRTX if rtx else CreateConfig)(profiles=[profile], **options)(builder, network)
    except PolygraphyException as error:
        raise FlashVLMError(f"{' '.join(str(error).split()).rstrip('.')}; leave that option out") from None
    if flags.strip_weights:
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION") and not flags.weight_streaming:
        # TensorRT-RTX: without it a decode step may allocate, and then no CUDA graph can be captured. Streamed weights
        # are allocated while it runs: it refuses both at once.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    # Half-precision scores divided by a temperature of 0.016 would reorder tokens; TF32 has the same 10 bits.
    config.clear_flag(trt.BuilderFlag.TF32)
    return config


def _bind_polygraphy(trt: Any) -> None:
    """Makes Polygraphy's loaders call this library. Its own switch holds for a process, from the first import on."""
    try:
        from polygraphy import config
    except ImportError:
        raise FlashVLMError("polygraphy is not installed; install it with: pip install polygraphy") from None
    config.USE_TENSORRT_RTX = trt.__name__ == MODULES["tensorrt-rtx"]
    for name in ("trt.config", "trt.util", "tensorrt_rtx.config"):
        vars(importlib.import_module(f"polygraphy.backend.{name}"))["trt"] = trt


def _parser_errors(parser: Any) -> str:
    """The operators the parser refused, each once, with its first reason."""
    reasons: dict[str, str] = {}
    for i in range(parser.num_errors):
        error = parser.get_error(i)
        operator = error.local_function_stack()[0] if error.local_function_stack() else error.node_operator()
        reasons.setdefault(operator or "graph", f"{operator or 'graph'} ({error.node_name()}: {error.desc()})")
    return "; ".join(reasons.values()) or "no reason given"


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
    """Loads a timing cache and, under a lock, merges into it what the build learned: builds may run side by side.

    Polygraphy reads any file whole, locks a second one beside it, and may leave half a cache behind.
    """
    if path is None:
        yield
        return
    import fcntl

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        cache = config.create_timing_cache(_known(path))
    except OSError as error:
        raise FlashVLMError(f"--timing-cache {path}: {error.strerror or error}; name a file of its own") from None
    config.set_timing_cache(cache, ignore_mismatch=False)
    yield
    try:
        # Of the folder itself: a lock file beside the cache would be one more name to follow.
        held = os.open(path.parent, os.O_RDONLY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX)
            learned = config.get_timing_cache()
            if known := _known(path):
                learned.combine(config.create_timing_cache(known), ignore_mismatch=False)
            with atomic_file(path) as file:
                file.write(learned.serialize())
        finally:
            os.close(held)
    except OSError as error:
        raise FlashVLMError(f"--timing-cache {path} cannot be written: {error.strerror or error}") from None


def _known(path: Path) -> bytes:
    """What a timing cache holds; nothing if there is none yet."""
    try:
        return read_bytes(path, MAX_TIMING_CACHE)
    except FileNotFoundError:
        return b""
