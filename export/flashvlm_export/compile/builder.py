"""One graph of a bundle -> one engine: parse, pin the KV capacity, set shapes and flags, build."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flashvlm.bundle import Bundle
from flashvlm.engines import MODULES, BuildFlags, local_capability
from flashvlm.errors import FlashVLMError
from flashvlm.files import atomic_file, read_bytes, sha256
from flashvlm.graph_io import TensorSpec
from flashvlm.manifest import GraphSpec
from flashvlm_export.compile import plugin_nodes

# Shapes the compiler tunes for: one decode step's neighbourhood would starve prefill, the maximum starves both.
TYPICAL = {"batch": 1, "sequence": 128, "query": 32, "prefix": 16, "suffix": 64}

MAX_TIMING_CACHE = 1 << 30  # bytes

Start = Callable[[str, int], Callable[[int], None]]


def build_engine(
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
    """Writes one engine and returns its size in bytes and its SHA-256.

    ``to_plugins``: with the selection's function calls as plugin nodes. ``start`` is that of ``compile_bundle``.

    Raises:
        FlashVLMError: the compiler cannot take the graph or fails to build it, with its own first reason.
    """
    messages: list[str] = []
    logger = _logger(trt, messages)
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    path = bundle.graph_file(name)
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
            config.set_compute_capability(getattr(trt.ComputeCapability, sm_name(capability)), i)
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
    # Half-precision scores divided by a temperature of 0.016 would reorder tokens; TF32 has the same 10 bits.
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


def sm_name(capability: str) -> str:
    """``SM89`` for ``8.9``: TensorRT-RTX's own name."""
    return "SM" + capability.replace(".", "")
