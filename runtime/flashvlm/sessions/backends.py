"""Which session runs a bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from flashvlm.bundle import Bundle
from flashvlm.engines import TARGETS, Target, has_engines
from flashvlm.errors import FlashVLMError
from flashvlm.sessions import Session

BACKENDS = ("auto", "onnxruntime", *TARGETS)


def open_session(
    bundle: Bundle,
    backend: str = "auto",
    device: int = 0,
    provider: str = "auto",
    threads: int | None = None,
    verify: bool = True,
    plugins: Path | None = None,
    engine_code: bool = False,
) -> Session:
    """A session of the backend asked for; ``auto`` takes engines that fit this machine, else ONNX Runtime.

    Raises:
        FlashVLMError: what was asked for is not installed or does not fit, with the command that mends it.
    """
    if backend not in BACKENDS:
        raise FlashVLMError(f"unknown backend {backend!r}; expected {', '.join(BACKENDS)}")
    if isinstance(device, bool) or not isinstance(device, int) or device < 0:
        raise FlashVLMError(f"device: expected the number of a GPU, from 0, found {device!r}")
    if backend in TARGETS:
        if provider != "auto":
            raise FlashVLMError(f"provider {provider!r} is of ONNX Runtime; leave it out, or take backend onnxruntime")
        return _tensorrt(bundle, backend, device, verify, plugins, engine_code)
    passed_over = []
    # Who asks for a provider asks for ONNX Runtime.
    for target in TARGETS if (backend, provider) == ("auto", "auto") else ():
        if has_engines(bundle, target):
            try:
                return _tensorrt(bundle, target, device, verify, plugins, engine_code)
            except FlashVLMError as error:
                passed_over.append(f"{target}: {error}")
    return _onnxruntime(bundle, device, provider, threads, tuple(passed_over))


def _tensorrt(
    bundle: Bundle, target: Target, device: int, verify: bool, plugins: Path | None, engine_code: bool
) -> Session:
    from flashvlm.sessions.tensorrt import TensorRTSession

    return TensorRTSession(bundle, target, device, verify, plugins, engine_code)


def _onnxruntime(
    bundle: Bundle, device: int, provider: str, threads: int | None, passed_over: tuple[str, ...]
) -> Session:
    from flashvlm.sessions.onnxruntime import OnnxRuntimeSession

    try:
        session = OnnxRuntimeSession(bundle, provider, threads, device)
    except FlashVLMError as error:
        if not passed_over:
            raise
        raise FlashVLMError(f"{error}; its engines do not run here either: {'; '.join(passed_over)}") from None
    session.backend = replace(session.backend, passed_over=passed_over)
    return session
