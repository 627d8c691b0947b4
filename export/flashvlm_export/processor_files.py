"""The processor of a checkpoint (tokenizer, image processor, chat template): loaded, and as files for the bundle.

transformers reads many files by many rules, and may run code that they name. It only ever sees copies: regular files
of bounded size, from inside the checkpoint, without a mention of code.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flashvlm.errors import CheckpointError, FlashVLMError, no_panic, one_line
from flashvlm.files import parse_json
from flashvlm.frames import Clip
from flashvlm.manifest import PROCESSOR_FILES
from flashvlm.preprocess import grid_of
from flashvlm.prompt import expand
from flashvlm.text.processor import RUN, TextProcessor
from flashvlm.visual import VisualSpec
from flashvlm_export.checkpoint import Checkpoint, read_file, read_json

# Those that may name classes or code, and those that hold data alone.
SETTINGS = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "special_tokens_map.json")
DATA = (
    "tokenizer.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.json",
    "chat_template.jinja",
)
MAX_BYTES = 64 << 20
# Keys by which a processor names the class of transformers it is.
CLASSES = ("processor_class", "image_processor_type", "feature_extractor_type", "tokenizer_class")


class Processor(NamedTuple):
    """transformers' tokenizer and, by PIL, image processor, and the chat template that goes with them."""

    tokenizer: Any
    image: Any
    template: str


def load_processor(checkpoint: Checkpoint) -> Processor:
    """Raises CheckpointError."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        _stage(checkpoint.folder, checkpoint.config, Path(folder))
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            with no_panic():
                # Not AutoProcessor: with some families it needs torchvision, for videos.
                tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
                # The PIL backend: the same pixels wherever torchvision is or is not installed.
                image = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil", **local)
        except Exception as error:  # transformers raises whatever the missing file led to
            reason = one_line(error).replace(folder, str(checkpoint.folder))
            raise CheckpointError(
                f"{checkpoint.folder}: the processor (tokenizer, image processor, chat template) does not load: "
                f"{reason}; download its files again"
            ) from None
        template = tokenizer.chat_template
        older = Path(folder, "chat_template.json")
        if older.is_file() and not Path(folder, "chat_template.jinja").is_file():
            template = read_json(older).get("chat_template")
    if not isinstance(template, str) or not template:
        raise CheckpointError(
            f"{checkpoint.folder} has no chat template; expected chat_template.jinja: copy it from the model's page on "
            f"the Hub"
        )
    return Processor(tokenizer, image, template)


def read_by_the_runtime(
    processor: Processor, checkpoint: Path, rows: int, visual: Sequence[VisualSpec]
) -> tuple[dict[str, bytes], int]:
    """The files of a bundle's processor folder, and how many tokens of text its shortest prompt has.

    The runtime's own reader tries them, as what it cannot read would be found out only on the device.
    """
    text = {"type": "text", "text": "?"}
    with tempfile.TemporaryDirectory() as folder:
        try:
            processor.tokenizer.chat_template = processor.template
            processor.tokenizer.save_pretrained(folder)
            reader = TextProcessor.from_folder(folder, rows)
            lengths = []
            for spec in visual:
                question = [{"role": "user", "content": [{"type": spec.modality}, text]}]
                shortest = Clip((0,), 1, 1.0, spec.pixels.repeat_time) if spec.modality == "video" else None
                shown = expand(spec, grid_of((1, 1), spec.pixels, shortest))
                markers: dict[str, str] = {} if spec.marker is None else {spec.modality: spec.marker}
                prompt = reader.encode(question, {spec.modality: spec.placeholder_id}, [shown], markers)
                lengths.append(len(prompt.input_ids) - shown.count(RUN))
            files = {name: Path(folder, name).read_bytes() for name in PROCESSOR_FILES}
        except Exception as error:  # the refusals of the reader, and what transformers and tokenizers raise
            reason = one_line(error).replace(folder, str(checkpoint))
            raise CheckpointError(f"{checkpoint}: the processor cannot be put in a bundle: {reason}") from None
    return files, min(lengths)


def stop_tokens(checkpoint: Checkpoint, tokenizer: Any, section: dict[str, Any]) -> tuple[int, ...]:
    """Stop tokens: what generation_config.json says, else the configuration, whose ``section`` is about the language
    model, else the tokenizer."""
    path = checkpoint.folder / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    for eos in (generation.get("eos_token_id"), section.get("eos_token_id"), tokenizer.eos_token_id):
        if eos is not None:
            return tuple(eos) if isinstance(eos, list) else (eos,)
    return ()


# --- copies for transformers -----------------------------------------------------------------------------------------


def _stage(checkpoint: Path, config: dict[str, Any], folder: Path) -> None:
    """Copies a checkpoint's processor files, and its checked configuration, into an empty folder.

    Raises:
        CheckpointError: one of them is damaged, no regular file, or a link out of the checkpoint, or needs code that
            the checkpoint brings along.
    """
    copies = {"config.json": json.dumps(_without_code(config, "config.json", needed=False)).encode()}
    for name in (*SETTINGS, *DATA):
        content = read_file(checkpoint, name, MAX_BYTES)
        if content is not None:
            copies[name] = _checked(content, checkpoint / name) if name in SETTINGS else content
    try:
        for name, content in copies.items():
            (folder / name).write_bytes(content)
    except OSError as error:
        raise FlashVLMError(f"cannot write {folder}: {error.strerror or error}; free space or set TMPDIR") from None


def _checked(content: bytes, path: Path) -> bytes:
    try:
        value = parse_json(content)
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON ({error}); download it again") from None
    return json.dumps(_without_code(value, path.name, needed=True), ensure_ascii=False).encode()


def _without_code(value: Any, name: str, needed: bool) -> Any:
    """The value without any ``auto_map``, at whatever depth; ``needed``: refuse one that transformers would have to
    follow, as it has no class of the name."""
    if isinstance(value, list):
        return [_without_code(item, name, needed) for item in value]
    if not isinstance(value, dict):
        return value
    if needed and "auto_map" in value and not _has_classes(value):
        raise CheckpointError(
            f"{name}: auto_map names code of the checkpoint ({value['auto_map']}), and a checkpoint's code is never "
            f"run; expected a class of transformers: take a checkpoint that transformers reads by itself"
        )
    return {key: _without_code(item, name, needed) for key, item in value.items() if key != "auto_map"}


def _has_classes(value: dict[str, Any]) -> bool:
    import transformers

    named = [value[key] for key in CLASSES if key in value]
    return bool(named) and all(isinstance(cls, str) and hasattr(transformers, cls) for cls in named)
