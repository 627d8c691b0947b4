"""Bundles by their name on the Hugging Face Hub, where huggingface_hub is installed."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from flashvlm.bundle import MANIFEST, MAX_MANIFEST
from flashvlm.errors import BundleError, brief, one_line
from flashvlm.files import read_json

REPOSITORY = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", re.ASCII)


def _files(manifest: Path) -> list[str]:
    """What a bundle has of files, as far as its manifest can be read: whether it is right is looked at later."""
    try:
        listed = read_json(manifest, MAX_MANIFEST)["files"]
        names = [name for name in listed if re.fullmatch(r"[\w./-]{1,201}", name, re.ASCII)]
    except (OSError, ValueError, KeyError, TypeError):
        names = []
    return [MANIFEST, "engines/*", *names]


def _is_local(path: Path) -> bool:
    try:
        return path.exists() or path.parent.exists()
    except (OSError, ValueError):  # no name that a file can have
        return True


def bundle_folder(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder itself, or that of a snapshot of OWNER/NAME on the Hub, which is fetched if the cache lacks it.

    Raises:
        BundleError: a name that is neither, or a snapshot that cannot be had.
    """
    if not isinstance(source, (str, os.PathLike)) or not isinstance(name := os.fspath(source), str):
        raise BundleError(f"bundle: expected a folder or a name on the Hub, found {brief(source)}")
    # A folder misspelt within one that exists is no repository, and its name is nobody's business.
    if _is_local(Path(name)) or not isinstance(source, str) or not REPOSITORY.fullmatch(name):
        if revision is not None:
            raise BundleError(f"revision {revision}: {name} is no name on the Hub; leave it out for a folder")
        return Path(name)
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
        from huggingface_hub.utils import logging as hub_logging
    except ImportError:
        raise BundleError(
            f"{name}: expected a bundle folder, found nothing there; to take it from the Hugging Face Hub, install: "
            f"pip install huggingface_hub"
        ) from None
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.ERROR)  # it tells of every attempt; a refusal tells of the last
    try:
        manifest = Path(hub.hf_hub_download(name, MANIFEST, revision=revision))
        # Of a repository that holds more than the bundle, such as its checkpoint, nothing else is fetched.
        return Path(hub.snapshot_download(name, revision=revision, allow_patterns=_files(manifest)))
    except errors.LocalEntryNotFoundError:
        reason = "it is not in the local cache, and the Hub cannot be reached; connect, or pass a folder"
    except errors.EntryNotFoundError:
        reason = f"the repository has no {MANIFEST}; name one that holds a bundle, or export its checkpoint"
    except (errors.RepositoryNotFoundError, errors.GatedRepoError):
        reason = "there is no such folder, nor a repository you may read on the Hub; check the name, or log in with hf"
    except errors.RevisionNotFoundError:
        reason = f"the repository has no revision {revision!r}; check its page on the Hub"
    except Exception as error:  # a disk, a proxy, an HTTP library
        reason = f"its download failed ({one_line(error)}); try again, or pass a folder"
    finally:
        hub_logging.set_verbosity(verbosity)
    raise BundleError(f"{name}: {reason}")
