"""The folder of a report: ``profile.json``, ``profile.png``, and what trtexec loaded and wrote."""

from __future__ import annotations

import json
import os
from pathlib import Path

from flashvlm.charts import MissingMatplotlibError
from flashvlm.errors import FlashVLMError
from flashvlm.files import refuse_link
from flashvlm.profiling.measure import Profile, Recommendation
from flashvlm.profiling.table import to_json

JSON_FILE, PICTURE_FILE, TRTEXEC_FOLDER = "profile.json", "profile.png", "trtexec"


def check_out(out: Path, force: bool) -> None:
    """Refuses a place that cannot be written, or that holds anything but an earlier report."""
    if not out.resolve().parent.is_dir():
        raise FlashVLMError(f"--out {out}: the folder {out.parent} does not exist; create it first")
    refuse_link(out)
    if not os.path.lexists(out):
        return
    if not force:
        raise FlashVLMError(f"--out {out} exists; choose another name, or add --force to replace an earlier report")
    ours = {JSON_FILE, PICTURE_FILE, TRTEXEC_FOLDER}
    if not out.is_dir() or not {path.name for path in out.iterdir()} <= ours:
        raise FlashVLMError(f"--out {out}: --force replaces only reports, and this holds other files; move it away")


def write(profile: Profile, recommendation: Recommendation | None, folder: Path) -> str | None:
    """Writes JSON and picture into a folder that exists; returns why there is no picture, if there is none."""
    text = json.dumps(to_json(profile, recommendation), indent=1)
    (folder / JSON_FILE).write_text(text + "\n", encoding="utf-8")
    from flashvlm.profiling.plot import draw

    try:
        draw(profile, recommendation, folder / PICTURE_FILE)
    except MissingMatplotlibError as error:
        return f"no {PICTURE_FILE}: {error}"
    return None
