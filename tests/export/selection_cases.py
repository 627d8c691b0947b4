"""Odd inputs of a selection, and its graphs on ONNX Runtime."""

from __future__ import annotations

from functools import cache

import onnx_ir as ir
import onnxruntime
import torch

from flashvlm_export.graph.dialects import DIALECTS
from flashvlm_export.graph.trace import fake_weights, trace
from flashvlm_export.selection import (
    Selection,
    SelectionInputs,
    SelectionParams,
)
from flashvlm_export.testing.graphs import selection_graph
from flashvlm_export.testing.references import DEFAULTS


def row(inputs: SelectionInputs, b: int) -> SelectionInputs:
    return SelectionInputs(*(x[b : b + 1] for x in inputs))


def same(a: Selection, b: Selection) -> bool:
    return torch.equal(a.kept, b.kept) and torch.equal(a.is_top, b.is_top)


def degenerate(kind: str, inputs: SelectionInputs) -> SelectionInputs:
    p, f, s, q, query_mask, valid = inputs
    changes = {
        "constant features": {"features": torch.ones_like(f)},
        "constant saliency": {"saliency": torch.full_like(s, 0.1)},
        "zero saliency": {"saliency": torch.zeros_like(s)},
        "identical tokens": {"projected": p[:, :1].expand_as(p), "features": f[:, :1].expand_as(f)},
        "opposite tokens": {"features": torch.cat([f, -f], 1)[:, : f.shape[1]], "projected": p * 0 - 1},
        "all zero": {"projected": p * 0, "features": f * 0, "saliency": s * 0, "query": q * 0},
        "one query token": {"query": q[:, :1], "query_mask": query_mask[:, :1]},
        "no query": {"query_mask": torch.zeros_like(query_mask)},
        "empty query": {"query": q[:, :0], "query_mask": query_mask[:, :0]},
        "one valid": {"valid": torch.arange(s.shape[1])[None] == torch.zeros_like(s[:, :1])},
        "none valid": {"valid": torch.zeros_like(valid)},
        "huge": {"projected": p * 1e30, "features": f * 1e9, "saliency": (s - 2) * 1e37},
        "tiny": {"projected": p * 1e-35, "features": f * 1e-35, "saliency": s * 1e-38},
        "any": {},
    }
    return inputs._replace(**changes[kind])


KINDS = (
    "constant features", "constant saliency", "zero saliency", "identical tokens", "opposite tokens", "all zero",
    "one query token", "no query", "empty query", "one valid", "none valid", "huge", "tiny", "any",
)  # fmt: skip


GRAPH_NAMES = {"projected": "image_tokens", "query": "query_embeds"}


@cache
def exported(method: str, N: int, D: int, Dv: int, K: int, params: SelectionParams = DEFAULTS):
    """The selection graph as flashvlm-export writes it: the score as a local function, constants folded."""
    graph = selection_graph(method, K, params, N, D, Dv)
    with fake_weights(graph.module) as mode:
        traced = trace(graph, mode, DIALECTS["modern"])
    return ir.to_proto(traced.model)


def nodes_of(model):
    """Those of the graph and of the functions it calls."""
    return [*model.graph.node, *(node for function in model.functions for node in function.node)]


@cache
def session(*key):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(exported(*key).SerializeToString(), options)


def run_onnx(inputs: SelectionInputs, *key) -> Selection:
    feed = {GRAPH_NAMES.get(name, name): tensor.numpy() for name, tensor in inputs._asdict().items()}
    return Selection(*(torch.from_numpy(x) for x in session(*key).run(list(Selection._fields), feed)))
