"""Passes over a traced graph: what is constant is computed, what is doubled or dead goes, nodes get their paths."""

from __future__ import annotations

import ast

import onnx_ir as ir
from onnx_ir.passes import common as passes


def fold(model: ir.Model) -> None:
    """Constant folding, common subexpressions and dead nodes; weights have no value here and stay as they are."""
    from onnxscript import optimizer

    # Not optimizer.optimize: its rewrite rules take a third of the export's tracing time and find nothing here.
    optimizer.fold_constants(model, onnx_shape_inference=False)
    for tidy in (
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
    ):
        tidy(model)
    shapes: dict[tuple[int, ...], ir.Value] = {}
    for node in list(model.graph):
        _simplify_reshape(node, shapes)
    passes.IdentityEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)


def _simplify_reshape(node: ir.Node, shapes: dict[tuple[int, ...], ir.Value]) -> None:
    """Reshape to a computed shape -> to a constant one, where 0 copies a dimension from the input.

    Shapes such as [batch, sequence, heads * size] otherwise cost a Shape and a Concat node and hide from compilers.
    """
    source, target = (node.inputs[0], node.outputs[0].shape) if node.op_type == "Reshape" else (None, None)
    if source is None or source.shape is None or target is None or _is_constant(node.inputs[1]):
        return
    copies = [i < len(source.shape) and source.shape[i] == d for i, d in enumerate(target)]
    if not all(copied or isinstance(d, int) for copied, d in zip(copies, target, strict=True)):
        return
    new = tuple(d if isinstance(d, int) else 0 for d in target)
    if new not in shapes:
        assert node.graph is not None
        name = "shape_" + "_".join(map(str, new))
        shapes[new] = ir.val(name, const_value=ir.tensor(new, dtype=ir.DataType.INT64, name=name))
        node.graph.register_initializer(shapes[new])
    node.replace_input_with(1, shapes[new])
    node.attributes.pop("allowzero", None)  # torch sets it; then 0 would mean an empty dimension


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and ir.convenience.get_const_tensor(value) is not None


def absorb_transpose(graph: ir.Graph, weight: ir.Value) -> bool:
    """Transpose(weight) -> a weight that is stored transposed, so that no runtime pays for it or folds a copy.

    False, and the graph as it was, where some node reads it as it is.
    """
    users = [usage.node for usage in weight.uses()]
    if weight.shape is None or len(weight.shape) != 2 or not all(map(_swaps, users)):
        return False
    rows, columns = weight.shape
    weight.shape = ir.Shape([columns, rows])
    for node in users:
        ir.convenience.replace_all_uses_with(node.outputs[0], weight)
        graph.remove(node, safe=True)
    return True


def _swaps(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [1, 0]


def name_nodes(graph: ir.Graph | ir.Function, root: str) -> None:
    """Path-like names such as /decoder/language_model/layers.0/self_attn/Attention, unique by a counter."""
    seen: dict[str, int] = {}
    for node in graph:
        path = "/".join(["", root, *_scope(node), node.op_type])
        count = seen.get(path, 0)
        seen[path] = count + 1
        node.name = f"{path}_{count}" if count else path
        node.metadata_props.clear()


def _scope(node: ir.Node) -> list[str]:
    """The module path torch recorded, with list indices kept on their list: layers.0."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if scopes is None:
        return []
    modules = ast.literal_eval(scopes)[:-1]  # the last entry is the torch operator
    parts: list[str] = []
    if modules and modules[-1].startswith("_empty_nn_module_stack"):
        return parts
    for part in (modules[-1] if modules else "").split("."):
        if part.isdigit() and parts:
            parts[-1] += f".{part}"
        elif part:
            parts.append(part)
    return parts
