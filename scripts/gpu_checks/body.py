"""The kernels against the ONNX function bodies of TextGuidedScore and MaskedLloyd on ONNX Runtime's CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from flashvlm.extras import install
from flashvlm_export.testing.references import DEFAULTS, ROUNDING, choice64, make

from .correctness import DTYPES, SCORE_BOUND, load
from .kernels import Kernels
from .record import Job, Record, Skip

# B, N, D, Dv, L, K
CASES = ((2, 65, 136, 72, 9, 12), (1, 576, 4096, 1024, 64, 64))
INSTALL = install("export", "cpu")


def run(job: Job, record: Record) -> None:
    kernels = load(job)
    try:
        from flashvlm_export.graph.dialects import DIALECTS
    except ImportError as error:
        raise Skip(f"the exporter does not import ({error})", INSTALL) from None
    # ONNX Runtime's CPU has no bfloat16.
    for dialect, dtype in (("modern", "float16"), ("modern", "float32"), ("legacy", "float32"))[
        : 1 if job.quick else 3
    ]:
        compare(kernels, record, DIALECTS[dialect].opset, dtype, job)


def compare(kernels: Kernels, record: Record, opset: int, dtype: str, job: Job) -> None:
    errors, different, undecided, items = [], 0, 0, 0
    score = None
    for i, (B, N, D, Dv, L, K) in enumerate(CASES[:1] if job.quick else CASES):
        x = make(B=B, N=N, D=D, Dv=Dv, L=L, seed=job.seed + i, masks=True, dtype=DTYPES[dtype])
        score = score or score_session(opset, dtype)
        fed = (x.projected, x.query, x.query_mask, x.saliency.float(), x.valid)
        (body,) = _run(score, *fed)
        scores = kernels.score(x._replace(saliency=fed[3]), DEFAULTS)
        errors.append(float(np.abs(scores.numpy() - body).max()))

        lloyd = lloyd_session(opset, x.features, K)
        body_kept, body_top = _run(lloyd, x.features, scores, x.valid)
        kept, is_top = (t.numpy() for t in kernels.lloyd(x.features, scores, x.valid, K, K // 2))
        for b in range(B):
            items += 1
            if np.array_equal(kept[b], body_kept[b]) and np.array_equal(is_top[b], body_top[b] != 0):
                continue
            exact = choice64(
                x.features[b].double().numpy(), scores[b].numpy(), x.valid[b].numpy(), K, K // 2, DEFAULTS.iterations
            )
            different += exact.margin > ROUNDING
            undecided += exact.margin <= ROUNDING
    said = f"opset {opset}, {dtype}"
    # Both scores are float32, each off by up to the bound.
    record.check(f"score of kernel and function body, {said}", len(errors), max(errors), 2 * SCORE_BOUND)
    detail = f"{undecided} more differ where float64 decides by less than {ROUNDING:g}" if undecided else ""
    record.check(f"choice of kernel and function body, {said}", items, different, 0, detail=detail)


def score_session(opset: int, dtype: str) -> Any:
    from flashvlm_export.graph.functions import score_function

    shapes = {
        "projected": (dtype, "BND"), "query": (dtype, "BLD"), "query_mask": ("bool", "BL"),
        "saliency": ("float32", "BN"), "valid": ("bool", "BN"),
    }  # fmt: skip
    names = ("eta", "temperature", "pool_temperature", "eps")
    attributes = {name: float(getattr(DEFAULTS, name)) for name in names}
    return _session(score_function(opset), shapes, attributes, opset)


def lloyd_session(opset: int, features: torch.Tensor, budget: int) -> Any:
    from flashvlm_export.graph.functions import lloyd_function

    attributes = {"budget": budget, "top_count": budget // 2, "iterations": DEFAULTS.iterations}
    function = lloyd_function(opset, *features.shape[1:], features.dtype, *attributes.values())
    dtype = str(features.dtype).removeprefix("torch.")
    shapes = {"features": (dtype, "BND"), "scores": ("float32", "BN"), "valid": ("bool", "BN")}
    return _session(function, shapes, attributes, opset)


def _session(function: Any, shapes: dict[str, tuple[str, str]], attributes: dict[str, Any], opset: int) -> Any:
    """ONNX Runtime over a graph of one node and its body."""
    try:
        import onnx_ir as ir
        import onnxruntime
    except ImportError as error:
        raise Skip(str(error), INSTALL) from None
    types = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bool": ir.DataType.BOOL}
    inputs = [ir.val(name, dtype=types[t], shape=ir.Shape(list(axes))) for name, (t, axes) in shapes.items()]
    count = len(function.outputs)
    node = ir.node(function.name, inputs, attributes, domain=function.domain, num_outputs=count)
    for i, output in enumerate(node.outputs):
        output.name = f"output{i}"
        output.dtype = ir.DataType.FLOAT if count == 1 else ir.DataType.INT32  # scores, or kept and is_top
        output.shape = ir.Shape(["B", "K"])
    opsets = {"": opset, function.domain: 1}
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports=opsets, name="body")
    model = ir.to_proto(ir.Model(graph, ir_version=10, functions=[function]))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _run(session: Any, *tensors: torch.Tensor) -> list[np.ndarray]:
    names = (value.name for value in session.get_inputs())
    return session.run(None, {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)})
