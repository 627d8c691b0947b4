"""Microseconds of the kernels by CUDA events, beside torch eager and the memory floor.

Three ways of calling: "graph, hot", one of many calls in a row inside a CUDA graph, inputs in the L2 cache; "graph,
cold", a graph of one call after the cache was flushed; "launches", call by call from Python, launch costs included.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

import torch

from flashvlm_export.selection import METHODS, TORCH, Selection, SelectionInputs
from flashvlm_export.testing.references import DEFAULTS, make

from .correctness import DTYPES, load, need_torch_cuda
from .kernels import Kernels
from .names import COLD, EAGER, FLOOR, HOT, LAUNCHES, LLOYD, PUBLISHED, SCORE, SELECTION
from .record import Job, Record

N, D, DV, L, K = 576, 4096, 1024, 64, 64
IN_A_ROW = 20  # calls in the graph of a hot measurement
RUNS = 100


def run(job: Job, record: Record) -> None:
    need_torch_cuda()
    bandwidth = copy_bandwidth()
    record.fact("copy_bandwidth_gb_per_s", round(bandwidth / 1e9, 1))
    record.fact("sizes", {"N": N, "D": D, "Dv": DV, "L": L, "K": K, "iterations": DEFAULTS.iterations})
    kernels = load(job) if "library" in job.facts else None
    if kernels is None:
        record.skip("the kernels were not built: only torch was timed", "see the section build")
    flush = flusher()
    for name, _, batch, x in inputs(job):
        record.timing(FLOOR, name, batch, "bytes / copy bandwidth", [moved_bytes(x) / bandwidth * 1e6])
        if kernels is not None:
            for what, launch in calls(kernels, x).items():
                record.timing(what, name, batch, HOT, hot(launch))
                record.timing(what, name, batch, COLD, cold(launch, flush))
                record.timing(what, name, batch, LAUNCHES, launches(launch))
        for what, method, runs in ((EAGER, "flashvlm", 30), (PUBLISHED, "flashvlm-published", 10)):
            record.timing(what, name, batch, LAUNCHES, launches(torch_selection(method, x), runs))


def inputs(job: Job) -> Iterator[tuple[str, torch.dtype, int, SelectionInputs]]:
    for name, dtype in DTYPES.items():
        for batch in (1, 4):
            x = make(B=batch, N=N, D=D, Dv=DV, L=L, seed=job.seed + batch, dtype=dtype)
            yield name, dtype, batch, SelectionInputs(*(t.cuda() for t in x))


def calls(kernels: Kernels, x: SelectionInputs) -> dict[str, Callable[[], None]]:
    """The kernels of the score, those of the choice, and all of it with the gather of the kept tokens."""
    B = x.projected.shape[0]
    score = kernels.prepare_score(x, DEFAULTS)
    scores = score.outputs[0][: B * N].view(B, N)
    lloyd = kernels.prepare_lloyd(x.features, scores, x.valid, K, K // 2, DEFAULTS.iterations)
    kept = lloyd.outputs[0][: B * K].view(B, K)
    rows = x.projected.view(B * N, D)
    first = (torch.arange(B, dtype=torch.int32, device=rows.device) * N)[:, None]
    embeds = torch.empty(B * K, D, dtype=rows.dtype, device=rows.device)

    def selection() -> None:
        score.launch()
        lloyd.launch()
        index = kept.view(-1) if B == 1 else (kept + first).view(-1)
        torch.index_select(rows, 0, index, out=embeds)

    score.launch()  # so that the choice alone has scores to read
    return {SCORE: score.launch, LLOYD: lloyd.launch, SELECTION: selection}


def torch_selection(method: str, x: SelectionInputs) -> Callable[[], Selection]:
    """A method's operations without the checks of its inputs, which wait for the GPU."""

    @torch.no_grad()
    def selection() -> Selection:
        return METHODS[method].choose(x, K, DEFAULTS, TORCH)

    return selection


def moved_bytes(x: SelectionInputs) -> int:
    """Each input once, each output once."""
    B = x.projected.shape[0]
    read = sum(t.numel() * t.element_size() for t in x)
    return read + B * (N * 4 + K * 2 * 4 + K * D * x.projected.element_size())


def copy_bandwidth() -> float:
    """Bytes a second of a copy on the device, read and written ones counted."""
    size = min(2**30, torch.cuda.mem_get_info()[0] // 8)
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    seconds = statistics.median(launches(lambda: target.copy_(source), 20)) / 1e6
    return 2 * size / seconds


def flusher() -> Callable[[], object]:
    """Writes over four times the L2 cache."""
    size = 4 * torch.cuda.get_device_properties(0).L2_cache_size
    buffer = torch.empty(max(size, 2**26), dtype=torch.uint8, device="cuda")
    return lambda: buffer.fill_(1)


def hot(launch: Callable[[], object]) -> list[float]:
    graph = captured(launch, IN_A_ROW)
    return [time / IN_A_ROW for time in _events(graph.replay, RUNS)]


def cold(launch: Callable[[], object], flush: Callable[[], object]) -> list[float]:
    return _events(captured(launch, 1).replay, RUNS, flush)


def launches(launch: Callable[[], object], runs: int = RUNS) -> list[float]:
    """One call at a time: the GPU waits for whatever Python still has to launch."""
    for _ in range(3):
        launch()
    times = []
    for _ in range(runs):
        torch.cuda.synchronize()
        times += _events(launch, 1, warm_up=0)
    return times


def captured(launch: Callable[[], object], count: int) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what loads or allocates when first called does so before the capture
        for _ in range(3):
            launch()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            launch()
    return graph


def _events(
    work: Callable[[], object], runs: int, before: Callable[[], object] | None = None, warm_up: int = 5
) -> list[float]:
    """Microseconds between two events around each run. ``before`` also keeps the GPU busy while Python queues."""
    for _ in range(warm_up):
        work()
    pairs = []
    for _ in range(runs):
        if before is not None:
            before()
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        pair[0].record()
        work()
        pair[1].record()
        pairs.append(pair)
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in pairs]
