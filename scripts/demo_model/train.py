"""Optimizer, schedule, checkpoints and resume of one stage."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.utils.data import DataLoader

from demo_model import build
from demo_model.batches import Batches
from demo_model.stages import STAGES, Demo
from demo_model.turns import Turns

WARM_UP = 100  # steps
CLIP = 1.0  # of the gradient's norm
DECAY = 0.05
MUON = 3.0  # its learning rate, as a multiple of AdamW's
SAVED_EVERY = 100  # steps
AVERAGED = 0.995  # what is kept of the mean of weights at each step: batches this small leave noise in the weights
WEIGHT = "weight"

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
    only: tuple[str, ...] = (),
    pace: float = 1.0,
) -> Path:
    """Runs a stage, from its checkpoint if there is one, and returns the file with its weights.

    In a process group (``train_together``) each process takes its share of a batch, and the first reports and saves.

    Args:
        folder: holds the processor; the checkpoint ``STAGE.safetensors``, the moving mean of the weights, is kept
            here, every 100 steps.
        start: weights of the stages before.
        threads, workers: of each process; workers draw scenes beside it.
        only: prefixes of parameter names, to train these alone of what the stage trains.
        pace: the learning rate as a multiple of the stage's own.
    """
    torch.set_num_threads(threads)
    rank, processes = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    stage = STAGES[stage_name]
    out, state_file = folder / f"{stage_name}.safetensors", folder / f"{stage_name}.optimizer.safetensors"
    first = step_of(out)
    demo = load_demo(folder, *start, *([out] if first else [])).to(device)
    demo.train()
    for name, parameter in demo.named_parameters():
        parameter.requires_grad_(name.startswith(stage.trained) and name.startswith(only or stage.trained))
    named = {n: p for n, p in demo.named_parameters() if p.requires_grad}
    optimizers = _optimizers(named)
    mean = {name: parameter.detach().clone() for name, parameter in named.items()}
    if first:
        _load_state(optimizers, named, load_file(state_file))

    started, step = time.perf_counter(), first
    for begin, end, plan in _spans(stage.plans, steps):
        if end <= step:
            continue
        label = f"{stage_name}/{rank}" if rank else stage_name  # every process draws its own scenes
        share = replace(plan, scenes=-(-plan.scenes // processes))
        batches = Batches(share, label, range(max(begin, step), end), folder)
        for batch in DataLoader(batches, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None):
            rate = pace * stage.learning_rate * _schedule(step, steps)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate * (MUON if isinstance(optimizer, torch.optim.Muon) else 1)
            torch.manual_seed(step * processes + rank)  # noise too comes from the step number alone
            with torch.autocast(device, dtype=torch.bfloat16):
                losses = demo(stage_name, {name: tensor.to(device) for name, tensor in batch.items()})
            total = sum(value for name, value in losses.items() if name != "token accuracy")
            demo.zero_grad(set_to_none=True)
            total.backward()
            if processes > 1:
                _average(named, processes)
            torch.nn.utils.clip_grad_norm_(named.values(), CLIP)
            for optimizer in optimizers:
                optimizer.step()
            step += 1
            for name, parameter in named.items():
                mean[name].lerp_(parameter.detach(), 1 - min(AVERAGED, (step - 1) / (step + 9)))
            seconds = time.perf_counter() - started
            report(step, {name: float(v.detach()) for name, v in losses.items()} | {"rate": rate, "seconds": seconds})
            if rank == 0 and (step % SAVED_EVERY == 0 or step == steps):
                _save(optimizers, named, mean, out, state_file, step)
    return out


def train_together(processes: int, *arguments: Any) -> Path:
    """``train(*arguments)`` in several processes: faster than as many threads, for these models' matrices are small."""
    stage_name, _, folder = arguments[:3]
    meeting = folder / f".{stage_name}.{os.getpid()}"
    spawn = multiprocessing.get_context("spawn")
    silent = tuple(_say_nothing if callable(argument) else argument for argument in arguments)
    others = [spawn.Process(target=_join, args=(meeting, rank, processes, silent)) for rank in range(1, processes)]
    for other in others:
        other.start()
    try:
        return _join(meeting, 0, processes, arguments)
    finally:
        for other in others:
            other.join()
        meeting.unlink(missing_ok=True)


def _join(meeting: Path, rank: int, processes: int, arguments: tuple[Any, ...]) -> Path:
    distributed.init_process_group("gloo", init_method=f"file://{meeting.resolve()}", rank=rank, world_size=processes)
    try:
        return train(*arguments)
    finally:
        distributed.destroy_process_group()


def _say_nothing(step: int, losses: dict[str, float]) -> None:
    pass


def _spans(plans: tuple[tuple[float, Any], ...], steps: int) -> list[tuple[int, int, Any]]:
    begins = [round(share * steps) for share, _ in plans] + [steps]
    return [(begins[i], begins[i + 1], plan) for i, (_, plan) in enumerate(plans)]


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    warm = min(1.0, (step + 1) / WARM_UP)
    return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _optimizers(named: dict[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of blocks and projector; AdamW for embeddings, heads, biases and norms."""
    matrices = [p for n, p in named.items() if p.ndim == 2 and (".layers." in n or "projector" in n)]
    chosen = set(map(id, matrices))
    decayed = [p for p in named.values() if p.ndim > 1 and id(p) not in chosen]
    others = [p for p in named.values() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def _average(named: dict[str, nn.Parameter], processes: int) -> None:
    gradients = [p.grad for p in named.values() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    for gradient, mean in zip(gradients, flat.div_(processes).split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def _save(
    optimizers: list[torch.optim.Optimizer],
    named: dict[str, nn.Parameter],
    mean: dict[str, torch.Tensor],
    out: Path,
    state_file: Path,
    step: int,
) -> None:
    """Both files whole or not at all; the step stands in the weights' header."""
    state = {
        f"{key}/{name}": value
        for name, parameter in named.items()
        for optimizer in optimizers
        for key, value in optimizer.state.get(parameter, {}).items()
    } | {f"{WEIGHT}/{name}": parameter.detach() for name, parameter in named.items()}
    for tensors, path in ((state, state_file), (mean, out)):
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, metadata={"step": str(step)})
        partial.replace(path)


def step_of(path: Path) -> int:
    if not path.exists():
        return 0
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return int(header["__metadata__"]["step"])


def _load_state(
    optimizers: list[torch.optim.Optimizer], named: dict[str, nn.Parameter], state: dict[str, torch.Tensor]
) -> None:
    owner = {parameter: o for o in optimizers for group in o.param_groups for parameter in group["params"]}
    for label, value in state.items():
        key, name = label.split("/")
        parameter = named[name]
        if key == WEIGHT:
            parameter.data.copy_(value)
            continue
        owner[parameter].state[parameter][key] = value.to(parameter.device)
