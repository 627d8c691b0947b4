"""An engine of TensorRT around each plugin, against the float64 references."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashvlm.extras import install
from flashvlm_export.testing.references import DEFAULTS, make, score64

from .build import PLUGINS
from .correctness import DTYPES, SCORE_BOUND, Tally, compare_choice, need_torch_cuda, record_tally, worst_error
from .record import Job, Record, Skip

SIZES = {"B": 2, "N": 577, "D": 264, "Dv": 136, "L": 37}
BUDGET = 64
MASKS = {"bool": torch.bool, "int32": torch.int32}


def run(job: Job, record: Record) -> None:
    need_torch_cuda()
    try:
        trt = importlib.import_module("tensorrt")
    except ImportError:
        raise Skip("tensorrt is not installed", install("tensorrt")) from None
    library = job.plugins.resolve() if job.plugins else _build(job)
    registry = trt.get_plugin_registry()
    if registry.load_library(str(library)) is None:
        raise Skip(f"TensorRT {trt.__version__} does not load {library}", "build it with this TensorRT's headers")
    record.fact("plugins_library", str(library))
    for mask_name, mask in MASKS.items():
        for name, dtype in DTYPES.items():
            x = make(**SIZES, seed=job.seed, masks=True, dtype=dtype)
            engines = Engines(trt, mask)
            try:
                error = worst_error(engines.score(x, DEFAULTS), score64(x))
                tally = Tally()
                compare_choice(engines, x, BUDGET, DEFAULTS, tally)
            except Refused as refusal:
                # TensorRT's headers say that plugins have no bool: it may refuse those, but nothing else.
                if mask is not torch.bool:
                    raise
                record.skip(f"TensorRT {trt.__version__} with bool masks: {refusal}", "int32 masks are used instead")
                break
            record.check(f"TensorRT plugin, score, {name}, {mask_name} masks", SIZES["B"], error, SCORE_BOUND)
            record_tally(record, f"TensorRT plugin, choice, {name}, {mask_name} masks", tally)


class Refused(Exception):  # noqa: N818 - a finding
    """TensorRT built no engine; the last it said."""


class Engines:
    """The plugins in the place of kernels.Kernels: one engine for every call."""

    def __init__(self, trt: Any, mask: torch.dtype) -> None:
        self._trt, self._mask = trt, mask
        self._types = {
            torch.float32: trt.float32, torch.float16: trt.float16, torch.bfloat16: trt.bfloat16,
            torch.int32: trt.int32, torch.bool: trt.bool,
        }  # fmt: skip

    def score(self, x: Any, params: Any) -> torch.Tensor:
        fields = {name: float(getattr(params, name)) for name in ("eta", "temperature", "pool_temperature", "eps")}
        inputs = [x.projected, x.query, x.query_mask.to(self._mask), x.saliency.float(), x.valid.to(self._mask)]
        scores = torch.full(tuple(x.valid.shape), torch.nan, device="cuda")
        self._run("TextGuidedScore", fields, inputs, [scores])
        return scores.cpu()

    def lloyd(
        self,
        features: torch.Tensor,
        scores: torch.Tensor,
        valid: torch.Tensor,
        budget: int,
        top_count: int,
        iterations: int = 4,
        mask_dtype: torch.dtype = torch.bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """With this object's masks, whatever ``mask_dtype`` says."""
        fields = {"budget": budget, "top_count": top_count, "iterations": iterations}
        outputs = [torch.full((len(scores), budget), -1, dtype=torch.int32, device="cuda") for _ in range(2)]
        self._run("MaskedLloyd", fields, [features, scores, valid.to(self._mask)], outputs)
        return outputs[0].cpu(), outputs[1].cpu().bool()

    def _run(self, name: str, fields: dict[str, Any], inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        trt = self._trt
        inputs = [tensor.cuda().contiguous() for tensor in inputs]
        logger = trt.Logger(trt.Logger.ERROR)
        builder = trt.Builder(logger)
        strong = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # TensorRT 11 knows nothing else
        network = builder.create_network(0 if strong is None else 1 << int(strong))
        sources = [network.add_input(f"input{i}", self._types[t.dtype], tuple(t.shape)) for i, t in enumerate(inputs)]
        plugin = create(trt, name, fields)
        layer = network.add_plugin_v3(sources, [], plugin)
        for i in range(len(outputs)):
            layer.get_output(i).name = f"output{i}"
            network.mark_output(layer.get_output(i))
        plan = builder.build_serialized_network(network, builder.create_builder_config())
        if plan is None:
            raise Refused(f"no engine around {name}; what TensorRT said is in this section's output")
        engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
        context = engine.create_execution_context()
        for kind, tensors in (("input", inputs), ("output", outputs)):
            for i, tensor in enumerate(tensors):
                context.set_tensor_address(f"{kind}{i}", tensor.data_ptr())
        torch.cuda.synchronize()
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError(f"the engine around {name} did not run")
        torch.cuda.synchronize()


def create(trt: Any, name: str, fields: dict[str, Any]) -> Any:
    """A plugin by its creator; RuntimeError where that gives none."""
    kinds = {float: (trt.PluginFieldType.FLOAT32, np.float32), int: (trt.PluginFieldType.INT32, np.int32)}
    arrays = {key: np.array([value], kinds[type(value)][1]) for key, value in fields.items()}
    collection = trt.PluginFieldCollection(
        [trt.PluginField(key, array, kinds[type(fields[key])][0]) for key, array in arrays.items()]
    )
    creator = trt.get_plugin_registry().get_creator(name, "1", "flashvlm")
    plugin = creator and creator.create_plugin("node", collection, trt.TensorRTPhase.BUILD)
    if plugin is None:
        raise RuntimeError(f"the creator of flashvlm::{name} gave no plugin")
    return plugin


def _build(job: Job) -> Path:
    root = os.environ.get("TENSORRT_ROOT") or _packaged_root()
    if root is None:
        raise Skip("TensorRT's headers were not found", "TENSORRT_ROOT=/path/to/TensorRT, or give --plugins")
    missing = [tool for tool in ("cmake", "nvcc") if shutil.which(tool) is None]
    if missing:
        raise Skip(f"no {' and no '.join(missing)} on PATH", "install it, or give --plugins")
    folder = job.work / "plugins"
    capability = job.facts["gpu"]["compute_capability"].replace(".", "")
    options = [f"-DTENSORRT_ROOT={root}", f"-DCMAKE_CUDA_ARCHITECTURES={capability}"]
    for command in (
        ["cmake", "-S", str(PLUGINS), "-B", str(folder), *options],
        ["cmake", "--build", str(folder), "-j", "--target", "flashvlm_plugins"],
    ):
        subprocess.run(command, check=True)
    return folder / "libflashvlm_plugins.so"


def _packaged_root() -> str | None:
    """Where the deb packages put NvInfer.h."""
    places = (Path("/usr/include"), Path(f"/usr/include/{platform.machine()}-linux-gnu"))
    return "/usr" if any((place / "NvInfer.h").is_file() for place in places) else None
