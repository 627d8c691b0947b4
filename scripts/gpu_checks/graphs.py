"""Each graph of a bundle by itself: an engine in NVIDIA's own runner against ONNX Runtime's CPU, by Polygraphy.

No session of ours takes part: where answers are wrong and every graph is right, the session is to blame, and otherwise
this names the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flashvlm.bundle import Bundle
from flashvlm.graph_io import TensorSpec

from .record import Record, Skip

# Few tokens: a wrong kernel is wrong for them, too, and the reference is a CPU.
SIZES = {"sequence": 5, "query": 6, "prefix": 3, "suffix": 4}
FIRST = 7  # slots of the cache that are in use already
DTYPES = {"float32": np.float32, "float16": np.float16}
# ||a - b|| / ||a|| of an output: float16 and bfloat16 products through a few layers; TF32 lies below.
BOUND = 2e-2
# Of the kept tokens. Features in half precision move a few representatives: their choice is not continuous.
DIFFERENT_BOUND = 0.1


def inputs(specs: Sequence[TensorSpec], batch: int, capacity: int, seed: int) -> dict[str, np.ndarray]:
    """Inputs that mean something: places in the cache that are there, and as many tokens as given.

    The first item of a batch has no padding, each after it one token more.
    """
    generator = np.random.default_rng(seed)
    sizes = SIZES | {"batch": batch, "capacity": capacity}
    values: dict[str, np.ndarray] = {}
    for spec in specs:
        shape = [sizes[d] if isinstance(d, str) else d for d in spec.shape]
        if spec.name == "position_ids":
            value = np.broadcast_to(FIRST + np.arange(shape[-1]), shape)
        elif spec.name == "cache_position":
            value = FIRST - np.arange(batch)
        elif spec.name == "num_tokens":
            decoder = any(other.name == "cache_position" for other in specs)
            value = sizes["sequence" if decoder else "suffix"] - np.arange(batch)
        elif spec.dtype == "bool":
            value = np.arange(shape[-1]) < shape[-1] - np.arange(batch)[:, None]
        else:
            value = generator.standard_normal(shape).astype(DTYPES[spec.dtype])
        values[spec.name] = np.ascontiguousarray(value)
    return values


def tensorrt_runner(target: str, engines: Path) -> Callable[[str], Any]:
    """For ``compare``: the engine of a graph in Polygraphy's runner. It, too, gives a cache and what follows it one
    memory, where the engine says so."""
    from polygraphy import config, cuda
    from polygraphy.exception import PolygraphyException

    config.USE_TENSORRT_RTX = target == "tensorrt-rtx"  # read when the loaders are imported
    from polygraphy.backend.common import BytesFromPath
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    try:
        cuda.wrapper()
    except PolygraphyException as error:
        raise Skip(f"Polygraphy: {error}", "put the folder of libcudart.so into LD_LIBRARY_PATH") from None

    def runner(graph: str) -> Any:
        engine = EngineFromBytes(BytesFromPath(str(engines / f"{graph}.engine")))
        return TrtRunner(engine, allocation_strategy="runtime")  # engines want memory that the caller allocates

    return runner


def compare(record: Record, name: str, bundle: Bundle, runner: Callable[[str], Any], capacity: int, seed: int) -> None:
    """``runner(graph)``: what runs a graph, one of Polygraphy's runners. ``capacity``: slots of its cache."""
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
    from polygraphy.comparator import Comparator

    for graph, spec in bundle.manifest.graphs.items():
        feed = inputs(spec.inputs, 1, capacity, seed)
        reference = OnnxrtRunner(SessionFromOnnx(str(bundle.graph_file(graph))))
        wanted, found = (run[0] for _, run in Comparator.run([reference, runner(graph)], data_loader=[feed]))
        if "kept" in wanted:
            other = 1 - np.intersect1d(wanted["kept"], found["kept"]).size / wanted["kept"].size
            record.check(f"{name}, {graph}: share of other tokens kept", 1, other, DIFFERENT_BOUND)
            if other > 0:  # what follows from them rightly differs
                continue
        errors = {output: _error(wanted[output], found[output]) for output in wanted}
        worst = max(errors, key=lambda output: np.nan_to_num(errors[output], nan=np.inf))
        record.check(f"{name}, {graph}: relative error of {worst}", len(errors), errors[worst], BOUND)


def _error(wanted: np.ndarray, found: np.ndarray) -> float:
    a, b = (array.astype(np.float64) for array in (wanted, found))
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(a), np.finfo(np.float32).tiny))
