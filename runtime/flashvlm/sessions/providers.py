"""Which execution provider of ONNX Runtime runs the graphs, and how to get one that is not installed.

``cuda`` and ``tensorrt`` are parts of the onnxruntime-gpu package; ``tensorrt-rtx`` is either built in or a plugin
package that any ONNX Runtime registers. Only ``cpu`` has run so far; the others follow ONNX Runtime's documentation.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Any

from flashvlm.engines import is_jetson, local_capability
from flashvlm.errors import FlashVLMError
from flashvlm.extras import install

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
RTX_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"


@dataclass(frozen=True)
class Provider:
    """``name`` is a key of PROVIDERS. ``plugin``: a device of a registered plugin library, None for built-in ones."""

    name: str
    device: int = 0
    plugin: Any = None

    @property
    def memory(self) -> str:
        """Where inputs are put for it. A plugin brings no memory that Python can fill."""
        return "cpu" if self.name == "cpu" or self.plugin is not None else "cuda"

    @property
    def fixed_capacity(self) -> bool:
        """TensorRT takes a KV cache of one capacity only."""
        return self.name in ("tensorrt", "tensorrt-rtx")

    def __str__(self) -> str:
        return "cpu" if self.name == "cpu" else f"{self.name}:{self.device}"

    def arguments(self, options: Any) -> dict[str, Any]:
        """Of InferenceSession. What a provider does not take goes to the ones after it; nothing is cached on disk."""
        if self.plugin is not None:
            options.add_provider_for_devices([self.plugin], {})
            return {}
        order = {"cpu": [], "cuda": ["cuda"]}.get(self.name, [self.name, "cuda"])
        at = {name: {"device_id": str(self.device)} for name in order}
        if "cuda" in at:
            # Scores are divided by a temperature of 0.016: the 10 bits of TF32, CUDA's default, would reorder tokens.
            at["cuda"]["use_tf32"] = "0"
        return {"providers": [*((PROVIDERS[name], at[name]) for name in order), (PROVIDERS["cpu"], {})]}


def choose(ort: Any, name: str, device: int) -> Provider:
    """The provider to use; ``auto``: CUDA where this build has it and there is a GPU, else the CPU.

    Raises:
        FlashVLMError: it is not part of this ONNX Runtime; with the line that installs it.
    """
    if name not in ("auto", *PROVIDERS):
        raise FlashVLMError(f"unknown provider {name!r}; expected auto, {', '.join(PROVIDERS)}")
    available = ort.get_available_providers()
    if name == "auto":
        usable = PROVIDERS["cuda"] in available and local_capability(device) is not None
        name = "cuda" if usable else "cpu"
    if name == "cpu":
        if device != 0:
            raise FlashVLMError(f"device {device}: the cpu provider has no devices; leave it out")
        return Provider(name)
    if PROVIDERS[name] in available:
        return Provider(name, device)
    if name == "tensorrt-rtx":
        return _rtx_plugin(ort, device)
    raise FlashVLMError(f"this ONNX Runtime has no {name} provider; install it with: {install_line(name)}")


def install_line(name: str) -> str:
    if name == "tensorrt-rtx":
        return "pip install 'onnxruntime>=1.31' onnxruntime-ep-nv-tensorrt-rtx"
    if is_jetson():
        # PyPI's wheels for aarch64 are built without CUDA, or for servers.
        return "the onnxruntime-gpu wheel that NVIDIA builds for this JetPack, in place of onnxruntime"
    more = " tensorrt" if name == "tensorrt" else ""
    return f"pip uninstall onnxruntime && {install('gpu')}{more}"


def _rtx_plugin(ort: Any, device: int) -> Provider:
    try:
        plugin = importlib.import_module(RTX_PLUGIN)
    except ImportError:
        raise FlashVLMError(
            f"this ONNX Runtime has no tensorrt-rtx provider; install it with: {install_line('tensorrt-rtx')}"
        ) from None
    name = plugin.get_ep_name()
    try:
        if not any(found.ep_name == name for found in ort.get_ep_devices()):
            ort.register_execution_provider_library(name, plugin.get_library_path())
        devices = [found for found in ort.get_ep_devices() if found.ep_name == name]
    except Exception as error:  # ONNX Runtime's exceptions share no public base
        raise FlashVLMError(f"the tensorrt-rtx provider does not load: {' '.join(str(error).split())}") from None
    if device >= len(devices):
        raise FlashVLMError(
            f"device {device}: the tensorrt-rtx provider finds {len(devices)} NVIDIA RTX GPU(s) on this machine"
        )
    return Provider("tensorrt-rtx", device, devices[device])


def import_onnxruntime() -> Any:
    # ONNX Runtime 1.31 sends usage data and keeps a database in the home directory unless told not to beforehand.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:  # also a broken install, hence the reason
        raise FlashVLMError(
            f"ONNX Runtime is not installed or does not import ({error}); "
            f"install it with: {install('cpu')} (NVIDIA GPU: {install('gpu')})"
        ) from None
    return onnxruntime
