"""Bundle -> TensorRT engines, with ``tensorrt`` or ``tensorrt_rtx``: one path, the two modules share their interface.

TensorRT-RTX builds for a named compute capability and needs no GPU; TensorRT builds for the GPU it finds.
Never imports torch.
"""

from __future__ import annotations

import contextlib
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashvlm.bundle import ENGINES, Bundle
from flashvlm.engines import (
    ENGINE_MANIFEST,
    MAX_BATCH,
    BuildFlags,
    EngineManifest,
    EngineSpec,
    PluginSpec,
    Target,
    built_from,
    default_max_seq,
    folder_name,
    import_target,
    local_capability,
    read_manifest,
)
from flashvlm.errors import BundleError, FlashVLMError
from flashvlm.files import atomic_folder, make_folder, refuse_link, sha256
from flashvlm_export.compile import plugin_nodes
from flashvlm_export.compile.builder import Start, build_engine
from flashvlm_export.output import check_space, foreign_to_engines


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
    _check_place(folder)
    previous = _previous(folder, flags, trt.__version__, plugins)
    engines: dict[str, EngineSpec] = {}
    reused = []
    with _engines_folder(folder.parent), atomic_folder(folder, replace=True) as out:
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
            size, digest = build_engine(trt, bundle, name, flags, cache, out / engine, start, to_plugins)
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
    make_folder(folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # only succeeds while empty


def _check_place(folder: Path) -> None:
    """Refuses a folder for engines that holds anything else, or that a link leads to."""
    refuse_link(folder.parent)
    refuse_link(folder)
    if folder.exists() and (foreign := foreign_to_engines(folder)):
        raise FlashVLMError(f"{folder} is replaced by new engines, and {foreign} is not part of any; move it away")


def _weight_bytes(bundle: Bundle) -> int:
    files = bundle.manifest.files
    return sum(files[name].size for graph in bundle.manifest.graphs.values() for name in graph.data)


def _check_types(bundle: Bundle) -> None:
    model = bundle.manifest
    if model.model.dtypes.activations == "float32" and model.dialect == "modern":
        raise FlashVLMError(
            f"{bundle.path} is float32, for which TensorRT's Attention has no kernel; "
            f"export with --dtype float16 or bfloat16, or with --dialect legacy"
        )


# --- options -------------------------------------------------------------------------------------------------------


def _flags(options: CompileOptions, bundle: Bundle, trt: Any) -> BuildFlags:
    limit = bundle.manifest.model.max_seq
    max_seq = default_max_seq(bundle) if options.max_seq is None else options.max_seq
    if not 1 < max_seq <= limit:
        raise FlashVLMError(f"--max-seq {max_seq}: expected 2 to {limit}, the capacity of {bundle.path}")
    for option, size, largest in (("batch", options.max_batch, MAX_BATCH), ("query", options.max_query, limit)):
        if not 1 <= size <= max(largest, 512):
            raise FlashVLMError(f"--max-{option} {size}: expected 1 to {max(largest, 512)}")
    if options.workspace is not None and not 0 < options.workspace < 1 << 50:
        raise FlashVLMError(f"--workspace of {options.workspace} bytes: expected more than 0 and under 2^50")
    given = {name: getattr(options, name) for name in BuildFlags.model_fields}
    sizes = {"max_seq": max_seq, "max_query": min(options.max_query, max_seq)}
    return BuildFlags(**given | sizes | {"compute_capabilities": _capabilities(options, trt)})


def _capabilities(options: CompileOptions, trt: Any) -> tuple[str, ...]:
    asked = options.compute_capabilities
    if options.target == "tensorrt-rtx":
        names = (name for name in dir(trt.ComputeCapability) if name.startswith("SM"))
        known = sorted((f"{name[2:-1]}.{name[-1]}" for name in names), key=float)  # SM120 -> 12.0
        for capability in asked:
            if capability not in known:
                version = f"{trt.__name__} {trt.__version__}"
                raise FlashVLMError(f"--compute-capability {capability}: {version} builds for {', '.join(known)}")
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


def _previous(folder: Path, flags: BuildFlags, version: str, plugins: tuple[PluginSpec, ...]) -> dict[str, EngineSpec]:
    try:
        manifest = read_manifest(folder)
    except BundleError:
        return {}
    same = (manifest.flags, manifest.version, manifest.plugins) == (flags, version, plugins)
    return manifest.engines if same else {}


def _intact(folder: Path, spec: EngineSpec) -> bool:
    path = folder / spec.file
    regular = path.is_file() and not path.is_symlink()
    return regular and path.stat().st_size == spec.size and sha256(path) == spec.sha256
