"""``python -m flashvlm_export export`` and ``compile``."""

from flashvlm.cli.entry import EXPORT, by_name

by_name("flashvlm_export", EXPORT)
