"""Bundles by their name on the Hub: fetched by huggingface_hub, run from its cache, refused in one line without it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashvlm import Pipeline
from flashvlm.errors import BundleError
from flashvlm.hub import bundle_folder

hub = pytest.importorskip("huggingface_hub")


def snapshot_of(bundle: Path, cache: Path) -> Path:
    """As huggingface_hub keeps it: every file a link to a blob."""
    blobs, snapshot = cache / "models--owner--name" / "blobs", cache / "models--owner--name" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in bundle.rglob("*") if path.is_file())):
        link = snapshot / path.relative_to(bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        (blobs / str(number)).write_bytes(path.read_bytes())
        link.symlink_to(blobs / str(number))
    return snapshot


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[Any]]:
    """Puts an answer in the Hub's place, a path or an exception, and tells what was asked for."""

    def answer(found: Any) -> list[Any]:
        calls: list[Any] = []

        def manifest(name: str, file: str, revision: str | None = None) -> str:
            calls.append((name, revision, file))
            if isinstance(found, Exception):
                raise found
            return str(found / file)

        def download(name: str, revision: str | None = None, allow_patterns: Any = None) -> str:
            calls.append((name, revision, *sorted(allow_patterns)))
            return str(found)

        monkeypatch.setattr(hub, "hf_hub_download", manifest)
        monkeypatch.setattr(hub, "snapshot_download", download)
        return calls

    return answer


def test_a_bundle_on_the_hub_answers(
    tiny_bundle: Path, tmp_path: Path, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    calls = asked(snapshot_of(tiny_bundle, tmp_path / "cache"))
    with Pipeline.from_bundle("owner/name", revision="main") as pipeline:
        answer = pipeline.generate(None, "What is it?", max_new_tokens=2)
    first, second = calls
    assert first == ("owner/name", "main", "bundle.json")
    files = {path.relative_to(tiny_bundle).as_posix() for path in tiny_bundle.rglob("*") if path.is_file()}
    assert {*second[2:]} == files | {"engines/*"}
    assert (
        answer.token_ids == Pipeline.from_bundle(tiny_bundle).generate(None, "What is it?", max_new_tokens=2).token_ids
    )


def test_a_folder_never_asks_the_hub(tmp_path: Path, asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    calls = asked(AssertionError("asked"))
    (tmp_path / "owner").mkdir()
    for name in ("owner", "owner/misspelt", "./owner/name", "/owner/name", "a/b/c", "bundle", "x" * 300, "a\0/b"):
        assert bundle_folder(name) == Path(name)
    assert bundle_folder(Path("elsewhere/name")) == Path("elsewhere/name")
    assert calls == []
    with pytest.raises(BundleError, match="revision main: owner is no name on the Hub"):
        bundle_folder("owner", "main")


def response(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, "many\nlines")
    return error


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("LocalEntryNotFoundError", "not in the local cache"),
        ("RemoteEntryNotFoundError", "has no bundle.json; name one that holds a bundle"),
        ("RepositoryNotFoundError", "no such folder, nor a repository"),
        ("GatedRepoError", "no such folder, nor a repository"),
        ("RevisionNotFoundError", "has no revision 'v2'"),
    ],
)
def test_what_the_hub_refuses(
    kind: str, words: str, asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import errors

    monkeypatch.chdir(tmp_path)
    asked(response(getattr(errors, kind)))
    with pytest.raises(BundleError, match=words):
        bundle_folder("owner/name", "v2")


def test_any_other_failure_is_one_line(asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked(OSError("disk\nfull"))
    with pytest.raises(BundleError, match=r"download failed \(disk full\)"):
        bundle_folder("owner/name")


def test_without_huggingface_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BundleError, match="pip install huggingface_hub"):
        bundle_folder("owner/name")
