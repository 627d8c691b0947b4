"""What a message may name an image or video by, beside its path: data: and file: URLs, and base64."""

from __future__ import annotations

import base64
import binascii
import os
import urllib.parse

from flashvlm.errors import PromptError, brief
from flashvlm.images import MAX_BYTES


def a_kind(kind: str) -> str:
    return f"{'an' if kind == 'image' else 'a'} {kind}"


def file_url(url: str, where: str) -> str:
    """file:///a/b.png and file://localhost/a/b.png -> /a/b.png, with %20 and the like decoded."""
    rest = url[5:]
    if rest.startswith("//"):
        host, slash, path = rest[2:].partition("/")
        if host.lower() not in ("", "localhost"):
            raise PromptError(f"{where}: expected a file of this machine, found {brief(url)}; write file:///...")
        rest = slash + path
    if not rest.startswith("/"):
        raise PromptError(f"{where}: expected file:// and a full path, found {brief(url)}; or pass the path alone")
    try:
        return os.fsdecode(urllib.parse.unquote_to_bytes(os.fsencode(rest)))
    except UnicodeEncodeError:
        raise PromptError(f"{where}: expected the name of a file, found {brief(url)}; check the path") from None


def data_url(url: str, where: str, kind: str) -> bytes:
    """data:image/png;base64,... -> the bytes (RFC 2397); ``kind``: image or video."""
    head, comma, data = url[5:].partition(",")
    found, *parameters = head.lower().split(";")
    if not comma or "base64" not in (parameter.strip() for parameter in parameters):
        raise PromptError(f"{where}: expected data:{kind}/...;base64,..., found {brief(url)}; encode it so")
    if found.strip() and not found.startswith((f"{kind}/", "application/octet-stream")):
        raise PromptError(f"{where}: expected {a_kind(kind)} in the data: URL, found {brief(found)}")
    return decoded(urllib.parse.unquote(data, "latin-1") if "%" in data else data, where, kind)


def decoded(text: str, where: str, kind: str) -> bytes:
    """Base64 -> bytes; line breaks and missing padding are common, anything else is damage."""
    if len(text) > MAX_BYTES * 4 // 3:
        raise PromptError(f"{where}: expected at most {MAX_BYTES:,} bytes, found more; downscale the {kind}")
    try:
        data = "".join(text.split()).encode("ascii").rstrip(b"=")
        found = base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except (UnicodeEncodeError, binascii.Error):
        raise PromptError(f"{where}: expected base64, found {brief(text)}; encode the file again") from None
    if not found:
        raise PromptError(f"{where}: expected {a_kind(kind)} in base64, found nothing")
    return found
