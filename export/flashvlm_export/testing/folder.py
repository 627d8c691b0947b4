"""A checkpoint folder of any of transformers' models, by its configuration: what most presets are."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flashvlm_export.testing.tensors import Naming, Tensor, drawn


@dataclass(frozen=True)
class FolderPreset:
    """One checkpoint.

    model      class of transformers
    config     config.json, but for the dtype
    processor  writes tokenizer and image processor into a folder; image_processor: of transformers, by PIL
    template   chat template
    spoken     range of tokens that a generation may say: rows of the head outside it are faint
    renames    module path -> name on the Hub, the first that fits
    stop       stop tokens of generation_config.json
    text       section of the configuration that counts the language layers; "" where it is flat
    files      others, by name
    """

    model: str
    config: Mapping[str, Any]
    tokenizer: Callable[[], Any]
    image_processor: Callable[[], Any]
    template: str
    spoken: tuple[int, int]
    renames: tuple[tuple[str, str], ...] = ()
    stop: tuple[int, ...] = ()
    dtype: str = "bfloat16"
    text: str = "text_config"
    files: Mapping[str, Any] = field(default_factory=dict)

    def cut(self, layers: int) -> FolderPreset:
        config = copy.deepcopy(dict(self.config))
        (config[self.text] if self.text else config)["num_hidden_layers"] = layers
        return replace(self, config=config)

    def write_files(self, folder: Path, dtype: str) -> None:
        _write(folder / "config.json", {**self.config, "dtype": dtype})
        _write(folder / "generation_config.json", {"eos_token_id": list(self.stop)})
        self.image_processor().save_pretrained(folder)
        self.tokenizer().save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(self.template)
        for name, content in self.files.items():
            _write(folder / name, content)

    def tensors(self, dtype: str, naming: Naming) -> list[Tensor]:
        import torch
        import transformers

        cls = getattr(transformers, self.model)
        config = cls.config_class.from_dict(copy.deepcopy(dict(self.config)))
        with torch.device("meta"):
            model = cls(config)
        tied = config.tie_word_embeddings
        table = model.get_input_embeddings().weight
        found = []
        for name, value in model.named_parameters():
            shared = tied and value is table
            if tied and value is model.get_output_embeddings().weight and not shared:
                continue  # stored once
            heard = self.spoken if name == "lm_head.weight" or shared else None
            tensor = drawn(name, name if naming == "module" else self.rename(name), name, tuple(value.shape), heard)
            # The table as head would say the last token again and again, were its rows of length one.
            found.append(replace(tensor, std=0.02) if shared else tensor)
        return found

    def rename(self, name: str) -> str:
        for pattern, replacement in self.renames:
            new, count = re.subn(pattern, replacement, name)
            if count:
                return new
        return name


# As LLaVA-1.5's, and of all that were converted like it.
LLAVA_NAMES = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.", ""),
)


def chatml(image: str, video: str = "", before: str = "") -> str:
    """A template of turns between ``<|im_start|>`` and ``<|im_end|>``; an image or video is written as given."""
    return f"""\
{before}{{%- for message in messages -%}}
{{{{- '<|im_start|>' + message['role'] + '\\n' -}}}}
{{%- if message['content'] is string -%}}{{{{- message['content'] -}}}}
{{%- else -%}}
{{%- for part in message['content'] -%}}
{{%- if part['type'] == 'image' -%}}{{{{- {image!r} -}}}}
{{%- elif part['type'] == 'video' -%}}{{{{- {video!r} -}}}}
{{%- elif part['type'] == 'text' -%}}{{{{- part['text'] -}}}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- endif -%}}
{{{{- '<|im_end|>\\n' -}}}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{{{{- '<|im_start|>assistant\\n' -}}}}{{%- endif -%}}
"""


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
