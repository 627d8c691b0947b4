"""``python -m flashvlm run`` and ``profile``."""

from flashvlm.cli.entry import RUNTIME, by_name

by_name("flashvlm", RUNTIME)
