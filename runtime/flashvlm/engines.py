"""Compiled engines inside a bundle: ``engines/<target>-<version>-<sm>/`` and the manifest beside them."""

from __future__ import annotations

import ctypes
import importlib
import platform
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flashvlm.bundle import ENGINES, Bundle
from flashvlm.errors import BundleError, FlashVLMError
from flashvlm.extras import install
from flashvlm.fields import GraphName, Sha256
from flashvlm.files import read_json
from flashvlm.graph_io import is_fused

ENGINE_MANIFEST = "engine.json"
MAX_MANIFEST = 1 << 20  # bytes

Target = Literal["tensorrt", "tensorrt-rtx"]
TARGETS: tuple[Target, ...] = ("tensorrt", "tensorrt-rtx")
MODULES: dict[Target, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
# Of every backend, as shown to people.
TITLES = {"onnxruntime": "ONNX Runtime", "tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}

MAX_BATCH = 1024
DEFAULT_SEQ, TEXT_ROOM = 4096, 1024
Capability = Annotated[str, Field(pattern=r"^[0-9]{1,2}\.[0-9]$")]
EngineFile = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,63}\.engine$")]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BuildFlags(_Record):
    """What decides an engine besides its graph: a change of any of these is another engine.

    max_seq and max_batch bound the shapes; workspace is in bytes, None for the compiler's default.
    """

    compute_capabilities: tuple[Capability, ...] = Field(min_length=1, max_length=32)
    max_seq: int = Field(gt=1, le=1 << 24)
    max_batch: int = Field(gt=0, le=MAX_BATCH)
    max_query: int = Field(gt=0, le=1 << 24)
    workspace: int | None = Field(default=None, gt=0, lt=1 << 50)
    optimization_level: int | None = Field(default=None, ge=0, le=5)
    weight_streaming: bool = False
    strip_weights: bool = False
    version_compatible: bool = False


class EngineSpec(_Record):
    """One engine: the graph it was built from, and what building it took."""

    file: EngineFile
    size: int = Field(ge=0, lt=1 << 50)
    sha256: Sha256
    onnx_sha256: Sha256
    data_sha256: tuple[Sha256, ...]
    build_seconds: float
    peak_rss: int


class PluginSpec(_Record):
    """A plugin library that engines call. Its place is not recorded: no manifest names code for a runtime to load."""

    file: str
    sha256: Sha256


class EngineManifest(_Record):
    """plugins: libraries to load into TensorRT's registry before any of the engines."""

    target: Target
    version: Annotated[str, Field(pattern=r"^[0-9][0-9A-Za-z.+-]{0,63}$")]
    flags: BuildFlags
    engines: dict[GraphName, EngineSpec]
    plugins: tuple[PluginSpec, ...] = ()


def folder_name(target: Target, version: str, compute_capabilities: tuple[str, ...]) -> str:
    """``tensorrt-rtx-1.7.1.116-sm89``; several capabilities share one folder: ``-sm86-sm89``."""
    return "-".join([target, version, *("sm" + c.replace(".", "") for c in compute_capabilities)])


def read_manifest(folder: Path) -> EngineManifest:
    """Raises BundleError if the folder holds no readable engine manifest, or a link leads out of it."""
    try:
        for path in (folder.parent, folder, folder / ENGINE_MANIFEST):
            if path.is_symlink():
                raise BundleError(f"{path} is a link; engines are used where they were built: flashvlm-compile")
        return EngineManifest.model_validate(read_json(folder / ENGINE_MANIFEST, MAX_MANIFEST))
    except (OSError, ValueError, ValidationError):
        raise BundleError(f"{folder} holds no complete engines; build them with: flashvlm-compile") from None


def built_from(spec: EngineSpec, bundle: Bundle, graph: str) -> bool:
    """Whether an engine was built from the graph and weights the bundle has now."""
    files, source = bundle.manifest.files, bundle.graph(graph)
    same_data = spec.data_sha256 == tuple(files[name].sha256 for name in source.data)
    return same_data and spec.onnx_sha256 == files[source.file].sha256


def largest_sizes(bundle: Bundle, graph: str, flags: BuildFlags) -> dict[str, int]:
    """The largest size of each symbol that the engine of a graph takes.

    A fused prefill shares the capacity between text before the image, what is kept of it and text after.

    Raises:
        FlashVLMError: the graph varies in something that engines have no largest size of.
    """
    spec = bundle.graph(graph)
    budget = next((tensor.shape[1] for tensor in spec.outputs if tensor.name == "kept"), 0)
    room = flags.max_seq - int(budget)
    prefix = max(room // 4, 1)
    sizes = {
        "batch": flags.max_batch,
        "query": flags.max_query,
        "sequence": flags.max_seq,
        "capacity": flags.max_seq,
        "prefix": prefix,
        "suffix": max(room - prefix, 1),
        "units": bundle.manifest.max_units(graph),
    }
    symbols = {d: tensor.name for tensor in (*spec.inputs, *spec.outputs) for d in tensor.shape if isinstance(d, str)}
    if unknown := symbols.keys() - sizes:
        odd = min(unknown)
        raise FlashVLMError(
            f"{spec.file}: {symbols[odd]} varies in {odd}, of which engines have no largest size; run it with: "
            f"--backend onnxruntime"
        )
    return sizes


# --- engines for this machine --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engines:
    """A folder of engines of a bundle, and the compute capability (or several, ``8.6,8.9``) to build them for again."""

    bundle: Bundle
    folder: Path
    manifest: EngineManifest
    capability: str

    def file(self, graph: str) -> Path:
        """Path of one engine. Raises BundleError if it is anything but a file of the folder."""
        path = self.folder / self.manifest.engines[graph].file
        if path.is_symlink() or not path.is_file():
            raise BundleError(f"{path} is no file of this folder; build it with: {self.rebuild()}")
        return path

    def rebuild(self, **sizes: int) -> str:
        """The command that makes them again, with other max_seq, max_batch or max_query if given."""
        plugins = "".join(f" --plugins {shlex.quote(library.file)}" for library in self.manifest.plugins)
        target, flags = self.manifest.target, self.manifest.flags
        return build_command(self.bundle, target, self.capability, flags, **sizes) + plugins


def has_engines(bundle: Bundle, target: Target) -> bool:
    """Whether the bundle has engines for ``target`` at all, of any version and GPU."""
    return any((bundle.path / ENGINES).glob(f"{target}-[0-9]*/{ENGINE_MANIFEST}"))


def newest_engines(bundle: Bundle, target: Target | None) -> Engines | None:
    """The engines built last for ``target`` (None: for any), of whatever version and GPU; None if there are none."""
    found = []
    for path in (bundle.path / ENGINES).glob(f"*/{ENGINE_MANIFEST}"):
        manifest = read_manifest(path.parent)
        if target in (None, manifest.target):
            found.append((path.stat().st_mtime_ns, path.parent, manifest))
    if not found:
        return None
    _, folder, manifest = max(found, key=lambda entry: entry[:2])
    return Engines(bundle, folder, manifest, ",".join(manifest.flags.compute_capabilities))


def matching_engines(bundle: Bundle, target: Target, version: str, capability: str) -> Engines:
    """The engines for this version of TensorRT and a compute capability such as ``8.9``; the newest of several.

    Another GPU of the same compute capability is for TensorRT to judge: it loads the engine, and may run slower.

    Raises:
        BundleError: there are none, or they were built by another version, for another GPU or from another export;
            with the command that builds them again with the options they had.
    """
    refused: list[tuple[int, int, str, BuildFlags | None]] = []  # the most fitting last
    usable = []
    for path in sorted((bundle.path / ENGINES).glob(f"{target}-[0-9]*")):
        try:
            manifest = read_manifest(path)
        except BundleError:
            refused.append((0, 0, f"{path} holds no complete engines", None))
            continue
        written = (path / ENGINE_MANIFEST).stat().st_mtime_ns
        rank, problem = _problem(bundle, path, manifest, target, version, capability)
        if problem is None:
            usable.append((written, path, manifest))
        else:
            refused.append((rank, written, f"{path} {problem}", manifest.flags))
    if usable:
        _, path, manifest = max(usable, key=lambda entry: entry[:2])
        return Engines(bundle, path, manifest, capability)
    *_, reason, flags = max(
        refused, key=lambda entry: entry[:2], default=(0, 0, f"{bundle.path} has no engines for {TITLES[target]}", None)
    )
    raise BundleError(f"{reason}; build them with: {build_command(bundle, target, capability, flags)}")


def _problem(
    bundle: Bundle, folder: Path, manifest: EngineManifest, target: Target, version: str, capability: str
) -> tuple[int, str | None]:
    """Why these engines do not load here, after how many checks; None if they do."""
    if manifest.target != target:
        return 0, f"is for {TITLES[manifest.target]}"
    later = (
        target == "tensorrt" and manifest.flags.version_compatible and _numbers(manifest.version) < _numbers(version)
    )
    if manifest.version != version and not later:
        return 1, f"was built by {TITLES[target]} {manifest.version}, and this is {version}"
    if capability not in manifest.flags.compute_capabilities:
        built = ", ".join(manifest.flags.compute_capabilities)
        return 2, f"was built for compute capability {built}, and this GPU has {capability}"
    for graph in (name for name in bundle.manifest.graphs if not is_fused(name)):  # those a pipeline runs
        spec = manifest.engines.get(graph)
        if spec is None or not built_from(spec, bundle, graph):
            return 3, f"has no engine of this export's {graph}"
        file = folder / spec.file
        found = file.stat().st_size if file.is_file() and not file.is_symlink() else 0
        if found != spec.size:
            return 4, f"holds {spec.file} with {found} of its {spec.size} bytes"
    return 5, None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def default_max_seq(bundle: Bundle) -> int:
    """KV slots of engines that name none: an image with all its tokens and a thousand of text fit, and at least 4096.

    Not every position of the model: the cache of a 7B model's 128,000 takes 7 GB, which no small board has.
    """
    image = -(-(bundle.manifest.candidates + TEXT_ROOM) // TEXT_ROOM) * TEXT_ROOM
    return min(bundle.manifest.model.max_seq, max(DEFAULT_SEQ, image))


def build_command(bundle: Bundle, target: Target, capability: str, flags: BuildFlags | None = None, **more: int) -> str:
    """The command line that builds engines for a GPU, with the options ``flags`` records and those of ``more``."""
    words = ["flashvlm-compile", str(bundle.path), "--target", target]
    if target == "tensorrt-rtx":
        words += ["--compute-capability", capability]
    if flags is not None:
        sizes = {"max_seq": flags.max_seq, "max_batch": flags.max_batch, "max_query": flags.max_query} | more
        defaults = {"max_seq": default_max_seq(bundle), "max_batch": 1, "max_query": min(512, flags.max_seq)}
        for name, size in sizes.items():
            if size != defaults[name]:
                words += [f"--{name.replace('_', '-')}", str(size)]
        if flags.workspace is not None:
            words += ["--workspace", f"{flags.workspace / 1e9:.12g}"]
        if flags.optimization_level is not None:
            words += ["--optimization-level", str(flags.optimization_level)]
        switches = ("weight_streaming", "strip_weights", "version_compatible")
        words += [f"--{name.replace('_', '-')}" for name in switches if getattr(flags, name)]
    return shlex.join(words)


# --- this machine --------------------------------------------------------------------------------------------------


def import_target(target: Target) -> ModuleType:
    """The module of a target, or a refusal with the install line for this platform."""
    try:
        return importlib.import_module(MODULES[target])
    except ImportError as error:
        line = install(target)
        if target == "tensorrt" and is_jetson():
            line = (
                "sudo apt install tensorrt python3-libnvinfer (JetPack), and use python3 -m venv --system-site-packages"
            )
        raise FlashVLMError(f"{MODULES[target]} cannot be imported ({error}); install it with: {line}") from None


def is_jetson() -> bool:
    """NVIDIA's Tegra systems get CUDA and TensorRT from JetPack, by apt."""
    tegra = Path("/etc/nv_tegra_release").exists() or "tegra" in platform.release()
    return platform.machine() == "aarch64" and tegra


def local_capability(device: int = 0) -> str | None:
    """Compute capability of a GPU, such as ``8.7``; None without a driver or that GPU."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    major, minor, handle = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGet(ctypes.byref(handle), device) != 0:
        return None
    # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
    cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, handle)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, handle)
    return f"{major.value}.{minor.value}"
