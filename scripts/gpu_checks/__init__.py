"""What scripts/gpu_check runs: each section in a process of its own, its findings as lines of JSON.

record.py       findings, and what a section is told: the border between a section and the command
runner.py       sections one after another, each with a time limit; the report they add up to
report.py       the report as tables; targets.py: what is hoped for, beside what was measured
machine.py      GPU, driver and versions, without torch
build.py        nvcc or the host emulation -> a library
kernels.py      its C entry points through ctypes, into poisoned memory
correctness.py  kernels against references; body.py: against the ONNX function body
speed.py        CUDA events; compiled.py: torch.compile beside them
sessions.py     bundles on ONNX Runtime CUDA, TensorRT-RTX and TensorRT against ONNX Runtime CPU
graphs.py       each graph of a bundle by itself, in Polygraphy's runners
plugins.py      a TensorRT engine around each plugin
"""
