"""Write LLaVA-1.5-shaped Hugging Face checkpoints with seeded random weights.

Real weights cannot be downloaded on every machine that builds or tests this project. A folder written here
has the file layout, tensor names, shapes, tokenizer conventions and chat template of the checkpoints on the
hub, so that every tool that reads the real ones reads these, and the same bytes come out on every machine.

Weights never need to fit in memory: names and shapes come from the model class on the meta device, each
shard's header is computed before its data, and values are drawn a chunk at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flashvlm_export.testing.tokenizer import CHAT_TEMPLATE, FIXED_TOKENS, make_tokenizer

Naming = Literal["hub", "transformers5", "module"]
NAMINGS: tuple[Naming, ...] = ("hub", "transformers5", "module")
DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}  # torch name -> safetensors name


class CheckpointError(Exception):
    """A request that cannot be met, in one line that says what to do instead."""


@dataclass(frozen=True)
class Preset:
    """The sizes of one checkpoint. ``text_tokens`` counts the tokenizer without ``<image>`` and ``<pad>``."""

    vision: dict[str, int]
    text: dict[str, Any]
    text_tokens: int
    vocab_multiple: int  # LLaVA pads its embedding rows to a multiple of 64: 32002 tokens, 32064 rows
    dtype: str
    rope_theta: float = 1e4

    @property
    def image_token_id(self) -> int:
        return self.text_tokens

    @property
    def pad_token_id(self) -> int:
        return self.text_tokens + 1

    @property
    def vocab_size(self) -> int:
        return -(-(self.text_tokens + 2) // self.vocab_multiple) * self.vocab_multiple


def vision_sizes(image: int, hidden: int, layers: int, heads: int, inter: int, projection: int) -> dict[str, int]:
    return {
        "image_size": image,
        "patch_size": 14,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inter,
        "projection_dim": projection,
    }


def text_sizes(hidden: int, layers: int, heads: int, inter: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inter,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        **more,
    }


_CLIP_L_336 = vision_sizes(336, 1024, 24, 16, 4096, 768)
PRESETS: dict[str, Preset] = {
    "tiny": Preset(vision_sizes(56, 32, 3, 2, 64, 32), text_sizes(48, 2, 4, 96), 512, 1, "float32"),
    "tiny-gqa": Preset(
        vision_sizes(70, 36, 4, 3, 76, 20),
        text_sizes(72, 3, 6, 150, num_key_value_heads=2, head_dim=16),
        512,
        64,
        "float32",
    ),
    "small": Preset(vision_sizes(336, 192, 6, 3, 768, 128), text_sizes(256, 4, 4, 688), 4096, 64, "float16"),
    "llava-1.5-7b": Preset(_CLIP_L_336, text_sizes(4096, 32, 32, 11008), 32000, 64, "float16"),
    "llava-1.5-13b": Preset(_CLIP_L_336, text_sizes(5120, 40, 40, 13824), 32000, 64, "float16"),
}


@dataclass(frozen=True)
class Tensor:
    """One tensor to write: its name in the file, its shape, and the law of its values."""

    name: str
    key: str  # the naming-independent name; with the seed it fixes the values
    shape: tuple[int, ...]
    mean: float
    std: float
    spoken: tuple[int, int] | None = None  # rows outside [start, stop) are scaled down by 100

    @property
    def numel(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Written:
    """What `write_checkpoint` left on disk."""

    folder: Path
    parameters: int
    weight_bytes: int
    shards: int


def write_checkpoint(
    like: str,
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    dtype: str | None = None,
    layers: int | None = None,
    naming: Naming = "hub",
    max_shard_size: int | str = "5GB",
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Write a checkpoint folder that transformers loads with no missing and no unexpected tensor.

    Args:
        like: a key of `PRESETS`.
        out: the folder to create; it appears only when complete.
        seed: with a tensor's name it fixes that tensor's values, whatever the naming, sharding or dtype (a
            narrower dtype holds the same values rounded).
        dtype: one of `DTYPES`; by default the preset's.
        layers: number of language layers, to cut a real-size model down.
        naming: ``hub`` as in the llava-hf checkpoints; ``transformers5`` as transformers 5.23 saves a fresh
            model (no ``vision_model`` level); ``module`` as ``state_dict()`` names them.
        max_shard_size: bytes, or a number with KB, MB or GB (powers of 1000).
        force: replace an existing folder.
        progress: called with (bytes written, bytes in all).

    Raises:
        CheckpointError: for an unknown choice, or an ``out`` that exists without ``force``.
    """
    preset = _choose(like, PRESETS, "--like")
    dtype = dtype or preset.dtype
    _choose(dtype, DTYPES, "--dtype")
    _choose(naming, dict.fromkeys(NAMINGS), "--naming")
    limit = parse_size(max_shard_size)
    if layers is not None:
        if layers < 1:
            raise CheckpointError(f"--layers must be at least 1, not {layers}.")
        preset = replace(preset, text={**preset.text, "num_hidden_layers": layers})

    with _appear_whole(Path(out), force) as folder:
        config = make_config(preset, dtype)
        config.save_pretrained(folder)
        generation_config(preset).save_pretrained(folder)
        save_processor(preset, folder)
        tensors = list_tensors(config, naming)
        shards = write_shards(tensors, folder, seed, dtype, limit, progress)
    parameters = sum(t.numel for t in tensors)
    return Written(Path(out), parameters, parameters * _itemsize(dtype), shards)


def parse_size(size: int | str) -> int:
    """``5GB`` -> 5_000_000_000, as transformers' ``max_shard_size``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B)?", str(size).strip(), re.IGNORECASE)
    factor = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    value = int(float(match[1]) * factor[(match[2] or "").upper()]) if match else 0
    if value < 1:
        raise CheckpointError(f"--max-shard-size {size!r} is not a size; write it like 5GB or 200MB.")
    return value


def _choose(value: str, choices: dict[str, Any], flag: str) -> Any:
    if value not in choices:
        raise CheckpointError(f"{flag} {value!r} is unknown; choose one of {', '.join(choices)}.")
    return choices[value]


@contextlib.contextmanager
def _appear_whole(out: Path, force: bool) -> Iterator[Path]:
    """Yield a temporary sibling of ``out`` that takes its name if the block ends well, and else vanishes."""
    if out.exists() and not force:
        raise CheckpointError(f"{out} exists; choose another --out, or pass --force to replace it.")
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.partial")
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    temporary.mkdir()
    try:
        yield temporary
        if out.exists():
            out.rename(old)
        try:
            temporary.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
    finally:
        for leftover in (temporary, old):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)


# ---- configuration and processor


def make_config(preset: Preset, dtype: str) -> Any:
    """The ``LlavaConfig`` of a preset."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(**preset.vision, hidden_act="quick_gelu")
    text = LlamaConfig(
        **preset.text,
        vocab_size=preset.vocab_size,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=preset.pad_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": preset.rope_theta},
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        vision_config=vision,
        text_config=text,
        image_token_index=preset.image_token_id,
        image_seq_length=(preset.vision["image_size"] // preset.vision["patch_size"]) ** 2,
        pad_token_id=preset.pad_token_id,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        dtype=getattr(torch, dtype),
    )


def generation_config(preset: Preset) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=preset.pad_token_id)


def save_processor(preset: Preset, folder: Path, tokenizer: Any = None) -> None:
    """Write tokenizer, image processor, processor and chat template in the layout of the hub's folders."""
    # The Pillow class is the one that exists without torchvision; both save as `CLIPImageProcessor`.
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size = preset.vision["image_size"]
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, resample=3
    )
    image_processor.save_pretrained(folder)
    if tokenizer is None:
        tokenizer = make_tokenizer(preset.text_tokens, preset.text["max_position_embeddings"])
    tokenizer.save_pretrained(folder)
    processor = {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,  # CLS, which the "default" strategy then drops
        "patch_size": preset.vision["patch_size"],
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": "default",
    }
    # Not `LlavaProcessor.save_pretrained`: since transformers 5 that nests the image processor in this file,
    # while the folders on the hub keep it in preprocessor_config.json.
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


# ---- weights


def list_tensors(config: Any, naming: Naming = "hub") -> list[Tensor]:
    """Every tensor of the model class, in its own order, with the name it has under ``naming``.

    Scales keep activations of order one through any depth: weights have a standard deviation of
    1/sqrt(fan-in), norms are near one, biases near zero, and no tensor is constant, so that an exporter that
    drops or swaps one is caught.
    """
    import torch
    from transformers import LlavaForConditionalGeneration

    with torch.device("meta"):
        state = LlavaForConditionalGeneration(config).state_dict()
    tensors = []
    for module_name, value in state.items():
        shape = tuple(value.shape)
        mean, std = 0.0, float(np.prod(shape[1:])) ** -0.5
        if re.search(r"(norm|norm1|norm2|layrnorm)\.weight$", module_name):
            mean, std = 1.0, 0.05
        elif module_name.endswith(".bias"):
            std = 0.02
        elif "position_embedding" in module_name:
            std = 0.3  # below the patches' own scale, or every image would look alike
        elif "embed_tokens" in module_name or "class_embedding" in module_name:
            std = 1.0
        # A trained model never says <image> or a padding row; rows this faint never win an argmax either. The
        # same for </s> and the byte tokens lets a generation run its full length and read as (meaningless)
        # text.
        spoken = (len(FIXED_TOKENS), config.image_token_index) if module_name == "lm_head.weight" else None
        key = rename(module_name, "hub")
        tensors.append(Tensor(rename(module_name, naming), key, shape, mean, std, spoken))
    return tensors


def rename(module_name: str, naming: Naming) -> str:
    """A ``state_dict`` name in another naming.

    transformers 5 loads all three: its conversion table for "llava" maps the older prefixes, and the one for
    ``CLIPVisionModel`` drops ``vision_model``, a level that the class lost in the course of version 5.
    """
    if naming == "module":
        return module_name
    level = "vision_model." if naming == "hub" else ""
    for pattern, replacement in (
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.vision_tower\.(vision_model\.)?", f"vision_tower.{level}"),
        (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
    ):
        module_name = re.sub(pattern, replacement, module_name)
    return module_name


def write_shards(
    tensors: list[Tensor],
    folder: Path,
    seed: int,
    dtype: str,
    limit: int,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write safetensors files of at most ``limit`` bytes of data, or one tensor, each; return how many."""
    itemsize = _itemsize(dtype)
    shards: list[list[Tensor]] = [[]]
    room = limit
    for tensor in tensors:
        if shards[-1] and tensor.numel * itemsize > room:
            shards.append([])
            room = limit
        shards[-1].append(tensor)
        room -= tensor.numel * itemsize

    total, done = sum(t.numel for t in tensors) * itemsize, 0
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        alone = len(shards) == 1
        file = "model.safetensors" if alone else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update({tensor.name: file for tensor in shard})
        with open(folder / file, "wb") as stream:
            stream.write(safetensors_header(shard, dtype))
            for tensor in shard:
                for chunk in draw(tensor, seed, dtype):
                    stream.write(chunk)
                    done += len(chunk)
                    if progress:
                        progress(done, total)
    if len(shards) > 1:  # like transformers, which writes no index beside a single file
        index = {
            "metadata": {"total_parameters": total // itemsize, "total_size": total},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return len(shards)


def safetensors_header(tensors: list[Tensor], dtype: str) -> bytes:
    """The bytes before the data: an 8-byte little-endian length, then JSON padded to align the data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.numel * _itemsize(dtype)
        header[tensor.name] = {
            "dtype": DTYPES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


_CHUNK = 1 << 22  # values drawn at once; a multiple of the four that one random word gives


def draw(tensor: Tensor, seed: int, dtype: str) -> Iterator[memoryview]:
    """The tensor's bytes, a chunk at a time.

    Each value is one of 65,536 quantiles of its normal law, chosen by 16 bits of a counter-based generator.
    Looking up a table that already holds the target dtype makes one pass of 2-byte reads and writes: several
    times faster than drawing float32 normals and converting them, and the same bits on every machine and
    library version.
    """
    digest = hashlib.sha256(f"{seed}:{tensor.key}".encode()).digest()
    bits = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    table = _table(tensor.mean, tensor.std, dtype)
    quiet = _table(tensor.mean, tensor.std / 100, dtype)
    row = tensor.numel // tensor.shape[0]
    first, last = (border * row for border in tensor.spoken or (0, tensor.shape[0]))
    for start in range(0, tensor.numel, _CHUNK):
        count = min(_CHUNK, tensor.numel - start)
        index = bits.random_raw(-(-count // 4)).astype("<u8", copy=False).view("<u2")[:count]
        values = table[index]
        for part in (slice(0, max(first - start, 0)), slice(max(last - start, 0), None)):
            values[part] = quiet[index[part]]
        yield memoryview(values).cast("B")


_QUANTILES: list[np.ndarray] = []


def _table(mean: float, std: float, dtype: str) -> np.ndarray:
    """65,536 equally likely values of N(mean, std), as unsigned integers of the dtype's width."""
    import torch

    if not _QUANTILES:
        from statistics import NormalDist

        inverse = NormalDist().inv_cdf
        half = np.array([inverse((i + 0.5) / 65536) for i in range(32768)])
        _QUANTILES.append(np.concatenate([half, -half[::-1]]))
    values = torch.from_numpy(mean + std * _QUANTILES[0]).to(torch.float32).to(getattr(torch, dtype))
    width = {2: torch.uint16, 4: torch.uint32}[_itemsize(dtype)]
    return values.view(width).numpy()


def _itemsize(dtype: str) -> int:
    return 4 if dtype == "float32" else 2
