"""Files as this project reads and writes them.

Read: regular files of bounded size only, as a pipe or a device may never end. Written: whole or not at all, under a
random name opened exclusively until they are complete, so that no link laid beforehand is followed.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from flashvlm.errors import FlashVLMError

MAX_JSON = 64 << 20  # bytes; the largest published tokenizer.json has 33 MB
MAX_JSON_DEPTH = 64  # the configurations we read are nested 8 deep
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of a file system without; what is left behind stays there
_STEM = 100  # bytes of a name that its temporary sibling repeats: a file name has at most 255

# Windows has none of these; there a folder in the making is not locked either.
_READ = sum(getattr(os, flag, 0) for flag in ("O_CLOEXEC", "O_NONBLOCK", "O_BINARY"))
_CREATE = sum(getattr(os, flag, 0) for flag in ("O_CLOEXEC", "O_NOFOLLOW", "O_BINARY"))

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


# --- reading -------------------------------------------------------------------------------------------------------


def open_regular(path: str | bytes | os.PathLike[str], limit: int | None = None) -> BinaryIO:
    """Opens a regular file of at most ``limit`` bytes for reading; never waits for a writer.

    Raises:
        OSError: it is something else, or larger; ``strerror`` says what was found.
    """
    _check_regular(os.stat(path), path)  # before it is opened: opening a device may do something
    # The file may have been swapped since; O_NONBLOCK, so that a pipe put there does not wait for its other end.
    file = os.fdopen(os.open(path, os.O_RDONLY | _READ), "rb", buffering=0)
    try:
        found = os.fstat(file.fileno())
        _check_regular(found, path)
        if limit is not None and found.st_size > limit:
            raise _too_large(path, limit, found.st_size)
    except OSError:
        file.close()
        raise
    return file


def read_bytes(path: str | os.PathLike[str], limit: int) -> bytes:
    """The content of a regular file of at most ``limit`` bytes. Raises OSError, as ``open_regular``."""
    with open_regular(path, limit) as file:
        blocks = []
        left = limit + 1  # files of /proc say that they are empty, and others grow meanwhile
        while left and (block := file.read(left)):
            blocks.append(block)
            left -= len(block)
    if not left:
        raise _too_large(path, limit, limit + 1)
    return b"".join(blocks)


def read_json(path: str | os.PathLike[str], limit: int = MAX_JSON) -> Any:
    """A JSON value from a file. Raises OSError as ``open_regular``, and ValueError for anything but JSON."""
    return parse_json(read_bytes(path, limit))


def parse_json(content: bytes) -> Any:
    """A JSON value, nested at most ``MAX_JSON_DEPTH`` deep. Raises ValueError for anything else."""
    try:
        value = json.loads(content.decode("utf-8"), parse_constant=refuse_constant)
    except UnicodeDecodeError:
        raise ValueError("expected UTF-8 text, found other bytes") from None
    except RecursionError:
        raise ValueError(f"nested over {MAX_JSON_DEPTH} deep") from None
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [child for item in level for child in _children(item)]
        if not level:
            return value
    raise ValueError(f"nested over {MAX_JSON_DEPTH} deep")


def sha256(path: str | os.PathLike[str], on_bytes: Callable[[int], None] = lambda _: None) -> str:
    """SHA-256 of a regular file in hex, reading 4 MiB at a time."""
    with open_regular(path) as file:
        return digest(file, on_bytes)


def digest(file: BinaryIO, on_bytes: Callable[[int], None] = lambda _: None) -> str:
    """SHA-256 in hex of what is left of an open file."""
    found = hashlib.sha256()
    buffer = bytearray(4 << 20)
    view = memoryview(buffer)
    while count := file.readinto(view):  # type: ignore[attr-defined]
        found.update(view[:count])
        on_bytes(count)
    return found.hexdigest()


def _check_regular(found: os.stat_result, path: Any) -> None:
    kind = stat.S_IFMT(found.st_mode)
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, "expected a file, found a folder", path)
    if kind != stat.S_IFREG:
        raise OSError(errno.EINVAL, f"expected a regular file, found {_KINDS.get(kind, 'something else')}", path)


def _too_large(path: Any, limit: int, size: int) -> OSError:
    return OSError(errno.EFBIG, f"expected at most {limit:,} bytes, found {size:,} or more", path)


def refuse_constant(name: str) -> None:
    """For ``json.loads``: NaN and Infinity are numbers to Python alone."""
    raise ValueError(f"{name} is not JSON")


def _children(value: Any) -> list[Any]:
    """The containers in a container; leaves are of no interest to a depth, and there may be 150,000 of them."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [item for item in items if isinstance(item, (dict, list))]


# --- writing -------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A new file beside ``path`` that takes its name at the end of the context, and is removed on failure.

    A link at ``path`` is replaced, not followed. Raises OSError if it cannot be written.
    """
    partial = _sibling(path, "partial")
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _CREATE, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(out: Path, replace: bool = False) -> Iterator[Path]:
    """A hidden sibling of the folder ``out`` that takes its name at the end, and is removed on failure.

    With ``replace``, an old folder steps aside first and is deleted last. A kill between the two renames leaves both,
    the old one under a hidden name that the next run for ``out`` turns back. A folder in the making is locked, so that
    no other run takes it for left behind; the lock goes with the process, in whichever namespace it lives.

    Raises:
        FlashVLMError: ``out`` is a link, is being written by another process, or cannot be written.
    """
    refuse_link(out)
    partial, replaced = _sibling(out, "partial"), _sibling(out, "replaced")
    with contextlib.ExitStack() as locks:
        try:
            _recover(out)
            while not _made_and_locked(partial, locks):
                partial = _sibling(out, "partial")
            yield partial
            refuse_link(out)
            if replace and os.path.lexists(out):
                if not _locked(out, locks):
                    raise FlashVLMError(f"{out} is being written by another process; wait, or choose another place")
                out.rename(replaced)
            partial.rename(out)
        except OSError as error:
            raise _unwritable(out, error) from None
        finally:
            if replaced.exists() and not os.path.lexists(out):
                replaced.rename(out)
            for path in (partial, replaced):
                shutil.rmtree(path, ignore_errors=True)


def refuse_link(path: Path) -> None:
    """Raises FlashVLMError if ``path`` is a link: what it points to is not ours to replace."""
    if path.is_symlink():
        raise FlashVLMError(f"{path} is a link, and links are not followed for writing; name the folder itself")


def make_folder(path: Path) -> None:
    """Creates a folder, or takes the one that is there. Raises FlashVLMError for a link or a file."""
    refuse_link(path)
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(out: Path, error: OSError) -> FlashVLMError:
    return FlashVLMError(f"cannot write {out}: {error.strerror or error}; free space or choose another place")


def _sibling(path: Path, kind: str) -> Path:
    return path.with_name(f".{_stem(path)}.{kind}-{secrets.token_hex(8)}")


def _stem(path: Path) -> str:
    name = os.fsencode(path.name)
    return path.name if len(name) <= _STEM else hashlib.sha256(name).hexdigest()[:32]


def _made_and_locked(folder: Path, locks: contextlib.ExitStack) -> bool:
    """Creates a folder and locks it; False if another run took it for left behind in between."""
    folder.mkdir()
    try:
        return _locked(folder, locks) and folder.is_dir()
    except FileNotFoundError:
        return False


def _locked(folder: Path, locks: contextlib.ExitStack, without_locks: bool = True) -> bool:
    """Locks a folder until ``locks`` closes; False if another process holds it.

    ``without_locks``: the answer on a system that has none.
    """
    if sys.platform == "win32":
        return without_locks
    import fcntl

    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    locks.callback(os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return without_locks
    return True


def _recover(out: Path) -> None:
    """Undoes what runs for the same place left when they were killed."""
    for kind in ("replaced", "partial"):
        for path in out.parent.glob(f".{glob.escape(_stem(out))}.{kind}-*"):
            if not re.search(r"-[0-9a-f]{16}$", path.name) or path.is_symlink() or not path.is_dir():
                continue
            with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as locks:
                if not _locked(path, locks, without_locks=False):
                    continue
                if kind == "replaced" and not os.path.lexists(out):
                    path.rename(out)
                else:
                    shutil.rmtree(path, ignore_errors=True)
