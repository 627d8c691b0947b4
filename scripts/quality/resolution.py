"""Fewer tokens without selection: the same model on a smaller image, and image tokens averaged over their grid."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from flashvlm.errors import CheckpointError
from flashvlm_export.selection import Method, Nodes, Selection, SelectionInputs, SelectionParams
from flashvlm_export.selection.uniform import evenly_spaced

POSITIONS = "position_embedding.weight"


def write_downsampled(checkpoint: Path, side: int, out: Path) -> None:
    """A checkpoint for images of ``side`` x ``side`` patches: the same weights, the position table interpolated.

    Bicubic over the grid, as transformers' ``interpolate_pos_encoding`` has it; CLS keeps its own position.

    Raises:
        CheckpointError: not exactly one position table, or a grid that is no square.
    """
    out.mkdir(parents=True, exist_ok=True)
    for path in checkpoint.iterdir():
        if path.suffix != ".safetensors" and path.is_file() and not path.name.endswith(".index.json"):
            shutil.copy(path, out)
    tensors: dict[str, Tensor] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        tensors |= load_file(path)
    tables = [name for name in tensors if name.endswith(POSITIONS)]
    if len(tables) != 1:
        raise CheckpointError(f"{checkpoint}: expected one tensor ...{POSITIONS}, found {len(tables)}; use a LLaVA-1.5")
    tensors[tables[0]] = interpolated(tensors[tables[0]], side)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})

    config = json.loads((out / "config.json").read_text())
    size = side * config["vision_config"]["patch_size"]
    config["vision_config"]["image_size"] = size
    config["image_seq_length"] = side * side
    (out / "config.json").write_text(json.dumps(config, indent=2))
    path = out / "preprocessor_config.json"
    processor = json.loads(path.read_text())
    processor["size"], processor["crop_size"] = {"shortest_edge": size}, {"height": size, "width": size}
    path.write_text(json.dumps(processor, indent=2))


def interpolated(table: Tensor, side: int) -> Tensor:
    """[1 + s * s, Dv] -> [1 + side * side, Dv], row 0 as it is."""
    old = math.isqrt(len(table) - 1)
    if old * old != len(table) - 1:
        raise CheckpointError(f"expected positions of CLS and a square grid, found {len(table)} rows")
    grid = table[1:].float().T.reshape(1, -1, old, old)
    new = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([table[:1], new.flatten(2)[0].T.to(table.dtype)]).contiguous()


def pooled(inputs: SelectionInputs, budget: int, params: SelectionParams, nodes: Nodes) -> Selection:
    """A method: image tokens averaged over a grid of sqrt(budget) x sqrt(budget) cells. ``budget`` is a square."""
    tokens, side = inputs.saliency.shape[1], math.isqrt(budget)
    old = math.isqrt(tokens)
    # The cells of adaptive average pooling as one constant, without an operator that no exported graph has.
    line = np.array([[i * old // side <= x < -(-(i + 1) * old // side) for x in range(old)] for i in range(side)])
    cells = np.kron(line, line).astype(np.float32)  # [K, N]
    embeds = torch.from_numpy(cells / cells.sum(1, keepdims=True)) @ inputs.projected.float()  # [B, K, D]
    nothing = torch.zeros_like(inputs.saliency, dtype=torch.float32)
    # Where the cells lie, more or less: no token is kept as it is.
    kept = torch.tensor(evenly_spaced(tokens, budget)).expand(nothing.shape[0], -1)
    return Selection(embeds.to(inputs.projected.dtype), kept, torch.zeros_like(kept, dtype=torch.bool), nothing)


POOLED = Method("pooled", pooled, "image tokens averaged over a coarser grid")
