"""Where the commands start: nothing is imported before Ctrl-C has an answer."""

import sys

RUNTIME = {
    "run": ("flashvlm.cli.run", "ask a bundle about an image"),
    "profile": ("flashvlm.cli.profile", "where the milliseconds and megabytes go"),
}
EXPORT = {
    "export": ("flashvlm_export.cli.export", "checkpoint to bundle"),
    "compile": ("flashvlm_export.cli.compile", "bundle to TensorRT engines"),
}


def _start(module: str) -> None:
    try:
        import importlib

        main = importlib.import_module(module).main
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    main()


def run() -> None:
    _start(RUNTIME["run"][0])


def profile() -> None:
    _start(RUNTIME["profile"][0])


def export() -> None:
    _start(EXPORT["export"][0])


def compile() -> None:
    _start(EXPORT["compile"][0])


def by_name(package: str, commands: dict[str, tuple[str, str]]) -> None:
    """``python -m PACKAGE NAME ...``: the command flashvlm-NAME, where scripts are not on the PATH."""
    name = sys.argv[1] if len(sys.argv) > 1 else None
    if name in commands:
        del sys.argv[1]
        _start(commands[name][0])
    elif name == "--version":
        from flashvlm import __version__

        sys.stdout.write(f"{package} {__version__}\n")
    elif name in (None, "-h", "--help"):
        lines = [
            f"  {command:<9}{summary}; the same as flashvlm-{command}" for command, (_, summary) in commands.items()
        ]
        text = "\n".join([f"Usage: python -m {package} COMMAND ...", "", "Commands:", *lines, ""])
        (sys.stderr if name is None else sys.stdout).write(text)
        sys.exit(2 if name is None else 0)
    else:
        sys.stderr.write(f"error: no command {name!a}; expected {' or '.join(commands)}\n")
        sys.exit(2)
