"""Where a bundle comes from, under which terms, and the README.md that says so on the Hub."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, fields
from pathlib import Path

from flashvlm.bundle import hub_blobs
from flashvlm.manifest import Manifest
from flashvlm_export.checkpoint import SHIPPED, Checkpoint, read_file
from flashvlm_export.options import ExportOptions

CARD = "README.md"
TERMS = re.compile(r"(LICEN[CS]E|Licen[cs]e|licen[cs]e|NOTICE|Notice|notice)(\.(md|txt))?")
MAX_TERMS = 1 << 20  # bytes of a licence
MAX_CARD = 16 << 20  # bytes of a checkpoint's own card
HEAD = 64 << 10  # bytes in which its front matter ends


@dataclass(frozen=True)
class Provenance:
    """repo, revision: id and commit on the Hub, where the checkpoint is from there. license: as its card names it.
    files: licences and notices, by name."""

    repo: str | None
    revision: str | None
    license: str | None
    files: dict[str, bytes]


def provenance(checkpoint: Checkpoint) -> Provenance:
    """Raises CheckpointError for a licence or card that is no regular file of the checkpoint, or too large."""
    folder = checkpoint.folder
    repo, revision = _snapshot(folder)
    card = read_file(folder, CARD, MAX_CARD) or b""
    files = {}
    for name in sorted(path.name for path in folder.iterdir() if TERMS.fullmatch(path.name)):
        content = read_file(folder, name, MAX_TERMS)
        if content is not None:
            files[name] = content
    return Provenance(repo, revision, _license(card[:HEAD].decode("utf-8", "replace")), files)


def _snapshot(folder: Path) -> tuple[str | None, str | None]:
    """Repository and commit of a snapshot in the Hub cache: models--owner--name/snapshots/COMMIT."""
    root = folder.resolve()
    if hub_blobs(root) is None or root.parent.name != "snapshots" or not re.fullmatch("[0-9a-f]{40}", root.name):
        return None, None
    return root.parent.parent.name.removeprefix("models--").replace("--", "/", 1), root.name


def _license(card: str) -> str | None:
    """What a model card's front matter says on its line ``license:``; for ``other``, its ``license_name:``."""
    front = re.match(r"---\r?\n(.*?)\r?\n---\s", card + "\n", re.DOTALL)
    if front is None:
        return None
    for key in ("license_name", "license"):
        line = re.search(rf"^{key}:[ \t]*[\"']?([A-Za-z0-9][\w.+-]{{0,63}})[\"']?[ \t\r]*$", front[1], re.MULTILINE)
        if line:
            return line[1]
    return None


# --- the card --------------------------------------------------------------------------------------------------------


def write(manifest: Manifest, source: Provenance, options: ExportOptions) -> str:
    """The card of a bundle, but for whose name nothing of this machine is in."""
    model, selection = manifest.model, manifest.selection
    name = source.repo or model.name
    budgets = ", ".join(map(str, (*selection.budgets, "all")))
    rows = "\n".join(f"| `{file}` | {_size(spec.size)} |" for file, spec in sorted(manifest.files.items()))
    dtypes = model.dtypes
    kept = "" if dtypes.embeddings == dtypes.weights else f", embedding table {dtypes.embeddings}"
    return f"""{_front_matter(manifest, source)}
# {name} with FlashVLM

An ONNX bundle of {name} that keeps only the visual tokens a question needs: up to {manifest.candidates} of an image
become a budget of {budgets}, chosen inside the graphs by `{selection.method}`.

| | |
| --- | --- |
| made from | {name}{f", revision `{source.revision}`" if source.revision else ""} |
| licence of the weights | {manifest.license or "see the model it was made from"} |
| dtype | {dtypes.weights}{kept} |
| budgets | {budgets}; {selection.default} if none is asked for |
| selection | `{selection.method}`, guided by the {selection.query}; positions: {selection.positions} |
| operators | {manifest.dialect} dialect, {manifest.layout} layout |
| longest prompt and answer | {model.max_seq} tokens |

## Run it

```bash
flashvlm-run BUNDLE --image cat.jpg --prompt "What is on the sofa?" --budget {selection.default}
```

```python
from flashvlm import Pipeline

print(Pipeline.from_bundle("BUNDLE").generate("cat.jpg", "What is on the sofa?"))
```

`BUNDLE` is this folder. It runs on any CPU or GPU that runs ONNX Runtime; `flashvlm-compile` makes TensorRT engines of
it.

## How it was made

```bash
{command(name, options)}
```

by {" ".join(f"{package} {version}" for package, version in list(manifest.created_by.items())[:1])}.

| file | size |
| --- | ---: |
{rows}
"""


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:,.1f} kB"


def _front_matter(manifest: Manifest, source: Provenance) -> str:
    """Hub metadata in YAML, of which JSON's texts are a part."""
    entries = {"license": manifest.license, "base_model": source.repo, "library_name": "flashvlm"}
    lines = [f"{key}: {json.dumps(value)}" for key, value in entries.items() if value is not None]
    lines += ["pipeline_tag: image-text-to-text", "tags:", "- onnx", "- flashvlm", "- vision-language"]
    return "\n".join(["---", *lines, "---", ""])


def command(name: str, options: ExportOptions) -> str:
    """The command line of an export, with what is not the default, and without the folders of this machine."""
    model = options.model if options.model in SHIPPED or options.model.count("/") < 2 else name
    words = ["flashvlm-export", "--model", model]
    words += ["--budget", ",".join(map(str, options.budgets)) or "all"]
    defaults = ExportOptions(options.model, options.out)
    plain = ("method", "query", "positions", "dtype", "max_seq", "layout", "dialect", "revision")
    for owner, default, keys in (
        (options, defaults, plain),
        (options.params, defaults.params, tuple(field.name for field in fields(options.params))),
    ):
        for key in keys:
            if getattr(owner, key) != getattr(default, key):
                words += [f"--{key.replace('_', '-')}", str(getattr(owner, key))]
    return shlex.join([*words, "--out", "BUNDLE"])
