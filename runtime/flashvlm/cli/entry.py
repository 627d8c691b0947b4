"""Where the commands start: nothing is imported before Ctrl-C has an answer."""

import sys


def _start(module: str) -> None:
    try:
        import importlib

        main = importlib.import_module(module).main
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    main()


def run() -> None:
    _start("flashvlm.cli.run")


def profile() -> None:
    _start("flashvlm.cli.profile")


def export() -> None:
    _start("flashvlm_export.cli.export")


def compile() -> None:
    _start("flashvlm_export.cli.compile")
