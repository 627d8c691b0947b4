"""Optimizer, schedule, checkpoints and resume of one stage."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from demo_model import build
from demo_model.batches import Batches, Turns
from demo_model.stages import STAGES, Demo

WARM_UP = 100  # steps
CLIP = 1.0  # of the gradient's norm
DECAY = 0.05
SAVED_EVERY = 100  # steps

Report = Callable[[int, dict[str, float]], None]


def load_demo(folder: Path, *weights: Path) -> Demo:
    """The model with the processor of ``folder``, and of each ``STAGE.safetensors`` what that stage trained."""
    torch.manual_seed(0)
    demo = Demo(build.make_model(), Turns(folder).word_ids())
    for file in weights:
        trained = STAGES[file.stem].trained
        kept = {name: tensor for name, tensor in load_file(file).items() if name.startswith(trained)}
        demo.load_state_dict(kept, strict=False)
    return demo


def train(
    stage_name: str,
    steps: int,
    folder: Path,
    start: tuple[Path, ...],
    report: Report,
    threads: int,
    workers: int,
    device: str = "cpu",
) -> Path:
    """Runs a stage, from its checkpoint if there is one, and returns the file with its weights.

    Args:
        folder: holds the processor; the checkpoint ``STAGE.safetensors`` is kept here, every 100 steps.
        start: weights of the stages before.
    """
    torch.set_num_threads(threads)
    stage = STAGES[stage_name]
    out, state_file = folder / f"{stage_name}.safetensors", folder / f"{stage_name}.optimizer.safetensors"
    first = step_of(out)
    demo = load_demo(folder, *start, *([out] if first else [])).to(device)
    demo.train()
    for name, parameter in demo.named_parameters():
        parameter.requires_grad_(name.startswith(stage.trained))
    named = {n: p for n, p in demo.named_parameters() if p.requires_grad}
    decayed = [p for p in named.values() if p.ndim > 1]
    others = [p for p in named.values() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}],
        lr=stage.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    if first:
        _load_optimizer(optimizer, named, load_file(state_file), first)

    started, step = time.perf_counter(), first
    for begin, end, plan in _spans(stage.plans, steps):
        if end <= step:
            continue
        batches = Batches(plan, stage_name, range(max(begin, step), end), folder)
        for batch in DataLoader(batches, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None):
            rate = stage.learning_rate * _schedule(step, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            torch.manual_seed(step)  # noise too comes from the step number alone
            with torch.autocast(device, dtype=torch.bfloat16):
                losses = demo(stage_name, {name: tensor.to(device) for name, tensor in batch.items()})
            total = sum(value for name, value in losses.items() if name != "token accuracy")
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            torch.nn.utils.clip_grad_norm_(named.values(), CLIP)
            optimizer.step()
            step += 1
            seconds = time.perf_counter() - started
            report(step, {name: float(v.detach()) for name, v in losses.items()} | {"rate": rate, "seconds": seconds})
            if step % SAVED_EVERY == 0 or step == steps:
                _save(optimizer, named, out, state_file, step)
    return out


def _spans(plans: tuple[tuple[float, Any], ...], steps: int) -> list[tuple[int, int, Any]]:
    begins = [round(share * steps) for share, _ in plans] + [steps]
    return [(begins[i], begins[i + 1], plan) for i, (_, plan) in enumerate(plans)]


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    warm = min(1.0, (step + 1) / WARM_UP)
    return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _save(optimizer: torch.optim.Optimizer, named: dict[str, Any], out: Path, state_file: Path, step: int) -> None:
    """Both files whole or not at all; the step stands in the weights' header."""
    state = {}
    for name, parameter in named.items():
        for key in ("exp_avg", "exp_avg_sq"):
            state[f"{key}/{name}"] = optimizer.state[parameter][key]
    for tensors, path in ((state, state_file), ({n: p.detach() for n, p in named.items()}, out)):
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, metadata={"step": str(step)})
        partial.replace(path)


def step_of(path: Path) -> int:
    if not path.exists():
        return 0
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return int(header["__metadata__"]["step"])


def _load_optimizer(optimizer: torch.optim.Optimizer, named: dict[str, Any], state: dict[str, Any], step: int) -> None:
    for name, parameter in named.items():
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step)),
            "exp_avg": state[f"exp_avg/{name}"].to(parameter.device),
            "exp_avg_sq": state[f"exp_avg_sq/{name}"].to(parameter.device),
        }
