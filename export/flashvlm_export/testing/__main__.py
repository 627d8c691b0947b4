"""Write a LLaVA-1.5-style checkpoint folder with seeded random weights. checkpoints.py does the work."""

from __future__ import annotations

import os
import resource
import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from flashvlm_export.testing import checkpoints

Like = Enum("Like", {name: name for name in checkpoints.PRESETS}, type=str)  # type: ignore[misc]
Dtype = Enum("Dtype", {name: name for name in checkpoints.DTYPES}, type=str)  # type: ignore[misc]
NamingChoice = Enum("NamingChoice", {name: name for name in checkpoints.NAMINGS}, type=str)  # type: ignore[misc]

app = typer.Typer(add_completion=False)


@app.command()
def make_checkpoint(
    like: Annotated[Like, typer.Option(help="The model whose shapes to copy.")],
    out: Annotated[Path, typer.Option(help="The folder to create.")],
    seed: Annotated[int, typer.Option(help="Fixes every value.")] = 0,
    dtype: Annotated[Dtype | None, typer.Option(help="Default: the model's own.", show_default=False)] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Number of language layers. Default: all.", show_default=False)
    ] = None,
    naming: Annotated[
        NamingChoice,
        typer.Option(help="Tensor names: llava-hf's on the hub, transformers 5's when it saves, or state_dict's."),
    ] = NamingChoice["hub"],
    max_shard_size: Annotated[str, typer.Option(help="Bytes of weights a file.")] = "5GB",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing folder.")] = False,
) -> None:
    """Write a LLaVA-1.5-style Hugging Face checkpoint folder with seeded random weights.

    It has the files, tensor names, shapes, tokenizer conventions and chat template of the real checkpoint,
    and loads with AutoProcessor and LlavaForConditionalGeneration. Its answers are noise.
    """
    # The tokenizer and the model class are all that is needed of transformers: no hub, no hints.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    error = Console(stderr=True)
    columns = (
        TextColumn("weights"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    started = time.perf_counter()
    try:
        with Progress(*columns, console=error, transient=True) as bar:
            task = bar.add_task("weights", total=None)
            written = checkpoints.write_checkpoint(
                like.value,
                out,
                seed=seed,
                dtype=dtype.value if dtype else None,
                layers=layers,
                naming=naming.value,
                max_shard_size=max_shard_size,
                force=force,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    except checkpoints.CheckpointError as refusal:
        error.print(str(refusal), style="red", soft_wrap=True, markup=False, highlight=False)
        raise typer.Exit(2) from None
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # ru_maxrss is in KiB on Linux
    Console().print(
        f"{written.folder}: {written.parameters / 1e6:,.1f} M parameters, "
        f"{written.weight_bytes / 1e9:.2f} GB in {written.shards} file(s), "
        f"{seconds:.1f} s, peak memory {peak:.2f} GiB",
        soft_wrap=True,
        highlight=False,
    )


if __name__ == "__main__":
    app()
