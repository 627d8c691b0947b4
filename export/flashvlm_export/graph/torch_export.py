"""nn.Module -> onnx_ir model, by torch's own exporter and without its chatter."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn


def to_ir(module: nn.Module, examples: tuple[Tensor, ...], shapes: tuple[Any, ...], opset: int) -> ir.Model:
    """One input for each example; ``shapes`` names the dimensions of each that vary, by their index."""
    with torch.no_grad(), _one_registry():
        program = torch.export.export(module, examples, dynamic_shapes=_varargs(module, shapes), strict=False)
        exported = torch.onnx.export(program, dynamo=True, optimize=False, opset_version=opset, verbose=False)
    assert exported is not None
    return exported.model


@contextlib.contextmanager
def _one_registry() -> Iterator[None]:
    """torch.onnx.export reads its 500 translations of operators anew at each call, half of a small graph's time; here
    they are read once a process. Only within this context, as other callers may add translations to theirs.
    """
    owner, theirs, once = _registry()
    if owner is None:
        yield
        return
    owner.from_torchlib = once
    try:
        yield
    finally:
        owner.from_torchlib = theirs


@functools.cache
def _registry() -> tuple[Any, Any, Any]:
    """The class of torch's registry, the method that fills one, and that method with a memory."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        theirs = ONNXRegistry.__dict__["from_torchlib"]
    except (ImportError, KeyError):  # private to torch: where it has moved, an export is slower and no worse
        return None, None, None
    return ONNXRegistry, theirs, staticmethod(functools.cache(ONNXRegistry.from_torchlib))


def _varargs(module: nn.Module, shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    """torch.export wants the shapes of ``*past`` as one nested tuple, and none of it where nothing is passed there."""
    code = type(module).forward.__code__
    fixed = code.co_argcount - 1  # without self
    takes_varargs = bool(code.co_flags & 0x04)
    return (*shapes[:fixed], shapes[fixed:]) if takes_varargs and shapes[fixed:] else shapes


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporter libraries report on stdout and in warnings what is by design here: initializers without values."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
