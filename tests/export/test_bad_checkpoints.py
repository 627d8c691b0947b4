"""flashvlm-export refuses what is not a whole checkpoint of a family it knows, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from refusals import assert_refused, copy_of, run

pytest.importorskip("torch")

from flashvlm_export import checkpoint as checkpoints
from flashvlm_export import exporter
from flashvlm_export.cli.export import main

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
NORM = "language_model.model.norm.weight"  # [48]

Edit = Callable[[Path], object]


@pytest.fixture(autouse=True)
def _refused_before_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*_: object) -> None:
        raise AssertionError("not refused before the work began")

    monkeypatch.setattr(exporter, "trace", reached)


def refused(model: object, tmp_path: Path, *expected: str) -> None:
    place = tmp_path / "place"
    place.mkdir()
    assert_refused(run(main, "--model", model, "--budget", "4", "--out", place / "out"), *expected)
    assert not list(place.iterdir())


def text(name: str, content: str) -> Edit:
    return lambda folder: (folder / name).write_text(content)


def without(name: str) -> Edit:
    return lambda folder: (folder / name).unlink()


def edited(name: str, **changes: Any) -> Edit:
    """Sets fields of a JSON file, ``part__field`` one inside another; ... removes one."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        for path, value in changes.items():
            *parts, field = path.split("__")
            target = content
            for part in parts:
                target = target[part]
            target[field] = value
            if value is ...:
                del target[field]
        (folder / name).write_text(json.dumps(content))

    return edit


def config(**changes: Any) -> Edit:
    return edited("config.json", **changes)


def header(change: Callable[[dict[str, Any], bytes], bytes | None]) -> Edit:
    """Edits the header of the weights; what ``change`` returns replaces the data."""

    def edit(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        entries = json.loads(content[8:end])
        data = change(entries, content[end:])
        packed = json.dumps(entries).encode()
        (folder / WEIGHTS).write_bytes(
            len(packed).to_bytes(8, "little") + packed + (content[end:] if data is None else data)
        )

    return edit


def entry(**changes: Any) -> Edit:
    return header(lambda entries, _: entries[NORM].update(changes))


def weights(change: Callable[[bytes], bytes]) -> Edit:
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def add_tensor(entries: dict[str, Any], data: bytes) -> bytes:
    entries["new.weight"] = {"dtype": "F32", "shape": [2], "data_offsets": [len(data), len(data) + 8]}
    return data + bytes(8)


def drop_last_tensor(entries: dict[str, Any], data: bytes) -> bytes:
    entries.pop("__metadata__", None)
    last = max(entries, key=lambda name: entries[name]["data_offsets"][1])
    return data[: entries.pop(last)["data_offsets"][0]]


def shift_tensor(entries: dict[str, Any], _: bytes) -> None:
    first, last = entries[NORM]["data_offsets"]
    entries[NORM]["data_offsets"] = [first + 4, last + 4]


def two_shards(weight_map: dict[str, Any]) -> Edit:
    def edit(folder: Path) -> None:
        shutil.copy(folder / WEIGHTS, folder / "second.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return edit


FILES: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "no config": (without("config.json"), ("has no config.json",)),
    "no weights": (without(WEIGHTS), ("has no weights; expected model.safetensors",)),
    "pickled weights": (
        lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"),
        ("only pickled weights", "expected .safetensors", "save_pretrained"),
    ),
    "no tokenizer": (without("tokenizer.json"), ("tokenizer", "download its files again")),
    "broken tokenizer": (text("tokenizer.json", "{"), ("does not load", "download")),
    "empty tokenizer": (text("tokenizer.json", "{}"), ("does not load", "download")),
    "no image processor": (
        without("preprocessor_config.json"),
        ("does not load", "image processor", "download its files again"),
    ),
    "broken image processor": (text("preprocessor_config.json", "{"), ("preprocessor_config.json", "is no JSON")),
    "no chat template": (without("chat_template.jinja"), ("has no chat template", "chat_template.jinja", "copy it")),
    "broken chat template": (text("chat_template.jinja", "{% {"), ("chat_template.jinja", "expected a Jinja template")),
    "silent chat template": (
        text("chat_template.jinja", "Hi"),
        ("cannot be put in a bundle", "expected a chat template that"),
    ),
    "broken generation config": (text("generation_config.json", "{"), ("generation_config.json cannot be read",)),
}
CONFIGS: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "not JSON": (text("config.json", "{"), ("config.json cannot be read", "line 1")),
    "not an object": (text("config.json", "[]"), ("expected a JSON object, found list",)),
    "not UTF-8": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe{"), ("cannot be read",)),
    "nested without end": (text("config.json", "[" * 100_000), ("cannot be read", "nested over 64 deep")),
    "another family": (
        config(model_type="qwen2_vl"),
        ("'qwen2_vl' is not supported (its tower has", "supported families:"),
    ),
    "a relative": (config(model_type="vipllava"), ("'vipllava' is not supported (it joins the features of several",)),
    "no family": (config(model_type=...), ("model_type None", "supported families:", "llava")),
    "no name of a family": (config(model_type=[]), ("model_type []", "supported families:", "llava")),
    "another language model": (config(text_config__model_type="gpt2"), ("text_config.model_type is 'gpt2'", "llama")),
    "no text_config": (config(text_config=...), ("text_config is missing",)),
    "no vision_config": (config(vision_config=5), ("vision_config is 5",)),
    "quantized": (config(quantization_config={"quant_method": "awq"}), ("quantized", "float16")),
    "negative size": (config(text_config__hidden_size=-48), ("config.json", "-48")),
    "size zero": (config(text_config__hidden_size=0), ("config.json", "hidden_size")),
    "text for a size": (config(text_config__hidden_size="wide"), ("config.json", "hidden_size")),
    "no heads": (config(text_config__num_attention_heads=0), ("config.json",)),
    "uneven heads": (config(text_config__num_attention_heads=5), ("config.json", "attention heads")),
    "no patches": (config(vision_config__patch_size=0), ("vision_config.patch_size is 0", "expected 1 to")),
    "no capacity": (
        config(text_config__max_position_embeddings=-1),
        ("text_config.max_position_embeddings is -1", "expected 1 to"),
    ),
    "unknown activation": (config(text_config__hidden_act="none such"), ("config.json", "none such")),
    "no such block": (config(vision_feature_layer=99), ("vision_feature_layer is 99", "of the 3")),
    "several blocks": (config(vision_feature_layer=[-2, -3]), ("vision_feature_layer is [-2, -3]",)),
    "another image token": (config(image_token_index=7), ("image placeholders",)),
    "more layers": (config(text_config__num_hidden_layers=3), ("tensor model.language_model.layers.2.", "is missing")),
    "other shapes": (config(text_config__num_key_value_heads=2), ("k_proj.weight is [48, 48]", "says [24, 48]")),
    "another crop": (
        edited("preprocessor_config.json", crop_size={"height": 3, "width": 3}),
        ("crop_size", "the vision tower takes 56 x 56"),
    ),
    "no crop": (edited("preprocessor_config.json", do_center_crop=False), ("preprocessor_config.json", "center crop")),
    "unknown filter": (edited("preprocessor_config.json", resample=5), ("preprocessor_config.json", "resample")),
    "one mean": (edited("preprocessor_config.json", image_mean=[0.5]), ("preprocessor_config.json", "field mean")),
    "no deviation": (edited("preprocessor_config.json", image_std=[0, 0, 0]), ("preprocessor_config.json", "std > 0")),
}
TENSORS: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "missing": (header(drop_last_tensor), ("tensor lm_head.weight is missing", "download it again")),
    "extra": (header(add_tensor), ("tensor new.weight is not part of this model",)),
    "renamed": (header(lambda e, _: e.update(other=e.pop(NORM))), ("tensor other is not part",)),
    "another shape": (entry(shape=[24, 2]), (f"{NORM} is [24, 2]", "config.json says [48]")),
    "too few bytes": (entry(shape=[47]), (f"{NORM} [47] needs 188 bytes", "spans 192")),
    "negative shape": (entry(shape=[-48]), (NORM, "damaged")),
    "offsets of text": (entry(data_offsets=["a", "b"]), (NORM, "damaged")),
    "shifted": (header(shift_tensor), ("overlaps its neighbour or leaves a gap",)),
    "integers": (entry(dtype="I8"), (f"{NORM} is I8", "F32, F16, BF16")),
    "dtype of another kind": (entry(dtype=[]), (NORM, "damaged")),
    "not an entry": (header(lambda e, _: e.update({NORM: 5})), (NORM, "damaged")),
    "none": (header(lambda e, _: e.clear()), ("holds no tensors",)),
    "zero bytes": (weights(lambda _: b""), ("truncated or not safetensors (0 bytes)",)),
    "three bytes": (weights(lambda b: b[:3]), ("truncated or not safetensors (3 bytes)",)),
    "garbage": (weights(lambda _: b"\xff" * 64), ("truncated or not safetensors (64 bytes)",)),
    "a zip file": (weights(lambda _: b"PK\3\4" + bytes(5000)), ("truncated or not safetensors",)),
    "header cut": (weights(lambda b: b[:4000]), ("truncated", "4000 bytes")),
    "header is a list": (weights(lambda _: (2).to_bytes(8, "little") + b"[]"), ("damaged safetensors header",)),
    "header nested without end": (
        weights(lambda _: (50_000).to_bytes(8, "little") + b"[" * 50_000),
        ("damaged safetensors header",),
    ),
    "data cut": (weights(lambda b: b[:-1]), ("truncated or damaged", "found 588679", "download it again")),
    "data added": (weights(lambda b: b + b"x"), ("found 588681",)),
    "shard missing": (
        text(INDEX, json.dumps({"weight_map": {NORM: "none.safetensors"}})),
        ("none.safetensors is named by", "missing"),
    ),
    "shard elsewhere": (
        text(INDEX, json.dumps({"weight_map": {NORM: "../x.safetensors"}})),
        ("'../x.safetensors'", "beside it"),
    ),
    "index empty": (text(INDEX, "{}"), ("has no weight_map",)),
    "index not JSON": (text(INDEX, "{"), (INDEX, "cannot be read")),
    "not in its shard": (two_shards({NORM: WEIGHTS, "x": "second.safetensors"}), ("says x is in second.safetensors",)),
    "in both shards": (
        two_shards({NORM: WEIGHTS, "language_model.lm_head.weight": "second.safetensors"}),
        ("is in both model.safetensors and second.safetensors",),
    ),
}


@pytest.mark.parametrize(
    ("edit", "expected"),
    [pytest.param(*case, id=name) for group in (FILES, CONFIGS, TENSORS) for name, case in group.items()],
)
def test_damaged_checkpoint(edit: Edit, expected: tuple[str, ...], tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_checkpoint, tmp_path)
    edit(folder)
    refused(folder, tmp_path, *expected)


def test_the_same_parameter_under_two_names(tiny_checkpoint: Path, tmp_path: Path) -> None:
    def again(entries: dict[str, Any], data: bytes) -> bytes:
        entries["model.language_model.norm.weight"] = {
            **entries[NORM],
            "data_offsets": [len(data), len(data) + 4 * 48],
        }
        return data + bytes(4 * 48)

    folder = copy_of(tiny_checkpoint, tmp_path)
    header(again)(folder)
    refused(folder, tmp_path, "are the same parameter", NORM)


# --- names ---


@pytest.mark.parametrize("name", ["nonsense", "a/b/c", "./nowhere", "~/nowhere/at-all"])
def test_unknown_name(name: str, tmp_path: Path) -> None:
    refused(name, tmp_path, f"unknown model {name!r}", "one of demo, ", "llava-1.5-7b, llava-1.5-13b")


def test_no_hub_id(tmp_path: Path) -> None:
    refused("no/such folder", tmp_path, "no such folder", "owner/name")


def test_revision_of_a_folder(tiny_checkpoint: Path, tmp_path: Path) -> None:
    ran = run(main, "--model", tiny_checkpoint, "--revision", "main", "--out", tmp_path / "out")
    assert_refused(ran, "--revision main is for models on the Hub")


def test_revision_of_the_shipped_model(tmp_path: Path) -> None:
    ran = run(main, "--model", "demo", "--revision", "main", "--out", tmp_path / "out")
    assert_refused(ran, "--revision main is for models on the Hub; demo comes with this package")


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("no_cache")
def test_hub_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(
        "llava-1.5-7b", tmp_path, "llava-hf/llava-1.5-7b-hf", "cannot be reached", "HF_HUB_OFFLINE", "pass a folder"
    )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes | None], None]]:
    """A Hub that gives one answer to every question; with None it listens and never answers."""
    import huggingface_hub

    server = socket.create_server(("127.0.0.1", 0))
    connections: list[socket.socket] = []
    answers: list[bytes | None] = []

    def serve() -> None:
        while True:
            try:
                connections.append(server.accept()[0])
            except OSError:
                return
            if (answer := answers[0]) is not None:
                connections[-1].recv(1 << 16)
                connections[-1].sendall(answer)
                connections[-1].close()

    def start(answer: bytes | None) -> None:
        answers.append(answer)
        threading.Thread(target=serve, daemon=True).start()

    address = f"http://127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", address)
    monkeypatch.setattr(checkpoints, "HUB_TIMEOUT", 0.5)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield start
    server.close()
    for connection in connections:
        connection.close()


@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (None, "cannot be reached"),  # would be waited for without end
        (b"", "cannot be reached"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nhey!", "cannot be reached"),  # the log-in page of a hotel
        (b"HTTP/1.1 404 x\r\nX-Error-Code: RepoNotFound\r\nContent-Length: 0\r\n\r\n", "the Hub has no such model"),
        (b"HTTP/1.1 404 x\r\nX-Error-Code: RevisionNotFound\r\nContent-Length: 0\r\n\r\n", "no revision"),
        (b"HTTP/1.1 403 x\r\nX-Error-Code: GatedRepo\r\nContent-Length: 0\r\n\r\n", "gated"),
        (b"HTTP/1.1 500 x\r\nContent-Length: 0\r\n\r\n", "pass a folder"),
    ],
)
def test_hub_answers(answer: bytes | None, expected: str, hub: Callable[[bytes | None], None], tmp_path: Path) -> None:
    hub(answer)
    refused("owner/name", tmp_path, "model owner/name: ", expected)
