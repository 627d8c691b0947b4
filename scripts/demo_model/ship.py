"""Writes the trained model as a Hugging Face checkpoint: what is shipped, and nothing that only training used."""

from __future__ import annotations

import textwrap
from pathlib import Path
from string import Template

import torch
from safetensors.torch import save_file

from demo_model import build
from demo_model.stages import STAGES, Demo
from flashvlm_export.testing.presets import llava
from scenes.exam import ASKED

DTYPE = "float16"
HEADS = ("heads.", "nouns.")


def round_weights(demo: Demo) -> None:
    """What is measured is what is shipped."""
    for tensor in demo.parameters():
        tensor.data = tensor.data.to(torch.float16).float()


def model_card(
    demo: Demo,
    steps: dict[str, int],
    accuracy: dict[str, float],
    by_turn: list[float],
    count: int,
    constant: tuple[str, float],
    history: str,
) -> str:
    rows = [f"| {kind} | {share:.1%} |" for kind, share in accuracy.items()]
    turns = [f"| {number} | {share:.1%} |" for number, share in enumerate(by_turn, 1)]
    parameters = sum(p.numel() for name, p in demo.named_parameters() if not name.startswith(HEADS))
    return Template((Path(__file__).parent / "card.md").read_text(encoding="utf-8")).substitute(
        parameters=f"{parameters / 1e6:.1f}",
        stages="\n".join(["| stage | steps |", "| --- | --- |", *(f"| {n} | {s:,} |" for n, s in steps.items())]),
        history="\n".join(textwrap.wrap(history, 120)),
        count=f"{count:,}",
        accuracy="\n".join(["| questions | right |", "| --- | --- |", *rows]),
        scenes=f"{count // ASKED:,}",
        turns="\n".join(["| turn | right |", "| --- | --- |", *turns]),
        constant=constant[0],
        constant_share=f"{constant[1]:.1%}",
    )


def unpack(folder: Path, out: Path) -> None:
    """What each stage trained of a shipped checkpoint, in float32 as ``STAGE.safetensors``."""
    from transformers import LlavaForConditionalGeneration

    state = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).state_dict()
    out.mkdir(parents=True, exist_ok=True)
    for name, stage in STAGES.items():
        trained = {key: tensor.contiguous() for key, tensor in state.items() if key.startswith(stage.trained)}
        save_file(trained, out / f"{name}.safetensors", metadata={"step": "0"})


def ship(demo: Demo, folder: Path, card: str) -> int:
    """Writes config, processor, float16 weights under the hub's names, and the model card; returns bytes of weights."""
    config = llava.make_config(build.PRESET, DTYPE)
    config.save_pretrained(folder)
    llava.generation_config(build.PRESET).save_pretrained(folder)
    build.save_processor(folder)
    tensors = {
        llava.rename(name, "hub"): tensor.detach().to(torch.float16).contiguous()
        for name, tensor in demo.state_dict().items()
        if not name.startswith(HEADS)
    }
    weights = folder / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors makes files that only their owner reads
    (folder / "README.md").write_text(card, encoding="utf-8")
    return weights.stat().st_size
