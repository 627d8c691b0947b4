"""One TensorRT engine and its execution contexts: what is bound is checked against the contract of the graph.

Calls are those TensorRT 10.3 to 11 and TensorRT-RTX share; where only some have one, its absence is allowed for.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

from flashvlm.bundle import Bundle
from flashvlm.engines import TITLES, Engines, largest_sizes
from flashvlm.errors import BundleError, FlashVLMError
from flashvlm.files import digest, open_regular, sha256
from flashvlm.graph_io import present
from flashvlm.sessions.contract import check, shape_of
from flashvlm.sessions.cuda import Buffer, Cuda, DeviceArray
from flashvlm.sessions.tensorrt_log import MESSAGES, logger

DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32", "BOOL": "bool"}


class Scratch:
    """Memory for activations, shared by contexts that run one after another."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._buffer: Buffer | None = None

    def at_least(self, size: int) -> tuple[int, int]:
        """Address and size."""
        if self._buffer is None or self._buffer.size < size:
            if self._buffer is not None:
                self._buffer = None
                self._cuda.trim()  # the old one would only lie beside the new one
            self._buffer = self._cuda.allocate(size)
        return self._buffer.address, self._buffer.size


class Engine:
    """An engine of a bundle, loaded.

    Raises:
        FlashVLMError: TensorRT does not load it, its file was edited, or it is not what the manifest says.
    """

    def __init__(self, trt: Any, cuda: Cuda, bundle: Bundle, engines: Engines, graph: str, verify: bool) -> None:
        self.trt, self.cuda, self.engines = trt, cuda, engines
        self.graph = bundle.graph(graph)
        self.inputs = {spec.name: spec for spec in self.graph.inputs}
        self.outputs = {spec.name: spec for spec in self.graph.outputs}
        self.largest = largest_sizes(bundle, graph, engines.manifest.flags)
        spec = engines.manifest.engines[graph]
        self.path = engines.file(graph)
        MESSAGES.clear()
        self._runtime = trt.Runtime(logger(trt))
        if engines.manifest.flags.version_compatible:
            # Such an engine brings the runtime it needs as code; the session refuses it unless asked for.
            self._runtime.engine_host_code_allowed = True
        self.engine = self._deserialize(spec.sha256 if verify else None)
        if engines.manifest.flags.strip_weights:
            self._refit(bundle, graph)
        if engines.manifest.flags.weight_streaming and self.engine.streamable_weights_size > 0:
            self.engine.weight_streaming_budget_v2 = self.engine.get_weight_streaming_automatic_budget()
        self.scratch_bound = int(self.engine.device_memory_size_v2)
        self._check()

    def _deserialize(self, sha256: str | None) -> Any:
        try:
            with open_regular(self.path) as file:
                if sha256 is not None and digest(file) != sha256:
                    again = f"{self.engines.rebuild()} --force"
                    raise BundleError(f"{self.path} was edited after it was built; build it with: {again}")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
                    engine = self._runtime.deserialize_cuda_engine(plan)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise self.refusal(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
        if engine is None:
            raise self.refusal("does not load")
        return engine

    def _refit(self, bundle: Bundle, graph: str) -> None:
        """Puts the weights of the ONNX file into an engine that was built without."""
        refitter = self.trt.Refitter(self.engine, self._runtime.logger)
        parser = self.trt.OnnxParserRefitter(refitter, self._runtime.logger)
        if not parser.refit_from_file(str(bundle.graph_file(graph))) or not refitter.refit_cuda_engine():
            raise self.refusal("was built with --strip-weights and cannot be refitted")

    def refusal(self, what: str) -> FlashVLMError:
        """With TensorRT's own words, and the command that mends it."""
        title = f"{TITLES[self.engines.manifest.target]} {self.trt.__version__}"
        words = ": ".join([title, "; ".join(MESSAGES)] if MESSAGES else [title])
        return BundleError(f"{self.path} {what} ({words}); build it with: {self.engines.rebuild()} --force")

    def _check(self) -> None:
        """The engine's tensors are those of the contract: names, directions, dtypes, sizes and the range of shapes."""
        engine, trt = self.engine, self.trt
        fixed = {"capacity": self.largest["capacity"]}
        names = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        if names != {*self.inputs, *self.outputs}:
            odd = ", ".join(sorted(names ^ {*self.inputs, *self.outputs}))
            raise self.refusal(f"has other inputs and outputs than {self.graph.file}: {odd}")
        for name, spec in (self.inputs | self.outputs).items():
            mode = trt.TensorIOMode.INPUT if name in self.inputs else trt.TensorIOMode.OUTPUT
            dtype = DTYPES.get(engine.get_tensor_dtype(name).name)
            shape = tuple(engine.get_tensor_shape(name))  # -1 where it varies
            expected = tuple(fixed.get(d, -1) if isinstance(d, str) else d for d in spec.shape)
            if engine.get_tensor_mode(name) != mode or dtype != spec.dtype or shape != expected:
                raise self.refusal(f"has {name} as {dtype} {shape}, expected {spec.dtype} {expected}")
            if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
                raise self.refusal(f"wants {name} in host memory")
            if name in self.inputs:
                top = tuple(engine.get_tensor_profile_shape(name, 0)[2])
                wanted = shape_of(spec, self.largest)
                if len(top) != len(wanted) or any(t < w for t, w in zip(top, wanted, strict=True)):
                    raise self.refusal(f"takes {name} up to {top}, expected {wanted}")
        if hasattr(engine, "get_aliased_input_tensor"):  # from TensorRT 10.15 on
            for name in self.inputs:
                output = present(name)
                if output != name and self._in_place(name) and engine.get_aliased_input_tensor(output) != name:
                    raise self.refusal(f"does not write {output} into {name}")

    def _in_place(self, name: str) -> bool:
        """Whether a cache comes back whole: then it is the same memory."""
        return present(name) in self.outputs and self.outputs[present(name)].shape == self.inputs[name].shape

    def context(self, scratch: Scratch, fixed_shapes: bool = False) -> Context:
        """``fixed_shapes``: every enqueue will have the shapes of the first; TensorRT-RTX then compiles for them."""
        strategy = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if fixed_shapes and hasattr(self.trt, "DynamicShapesKernelSpecializationStrategy"):
            config = self.engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            # Lazily, better kernels would come after the CUDA graph has been captured.
            config.dynamic_shapes_kernel_specialization_strategy = (
                self.trt.DynamicShapesKernelSpecializationStrategy.EAGER
            )
            context = self.engine.create_execution_context(config)
        else:
            context = self.engine.create_execution_context(strategy)
        if context is None:
            raise self.refusal("gives no execution context")
        return Context(self, context, scratch)


class Context:
    """An execution context: ``bind`` every tensor, then ``enqueue``. What stays as it was bound is not bound again."""

    def __init__(self, engine: Engine, context: Any, scratch: Scratch) -> None:
        self._engine, self._context, self._scratch = engine, context, scratch
        self._bound: dict[str, tuple[tuple[int, ...], int]] = {}  # shape, address
        self._needed: int | None = None  # bytes of scratch memory; None: shapes have changed since it was measured
        self._memory = (0, 0)

    def bind(self, arrays: dict[str, DeviceArray]) -> None:
        """Every input and output by name. Who binds keeps the arrays until what was enqueued has run.

        Raises:
            FlashVLMError: dtype or shape are not those of the contract, or beyond what the engine was built for.
        """
        specs = self._engine.inputs | self._engine.outputs
        symbols = {"capacity": self._engine.largest["capacity"]}
        for name, spec in specs.items():
            check(spec, arrays[name].dtype, arrays[name].shape, symbols)
        self._check_range(symbols)
        for name in specs:
            new = arrays[name].shape, arrays[name].address
            shape, address = self._bound.get(name, (None, None))
            if name in self._engine.inputs and shape != new[0]:
                self._needed = None
                if not self._context.set_input_shape(name, new[0]):
                    raise self._engine.refusal(f"does not take {name} of shape {new[0]}")
            if address != new[1] and not self._context.set_tensor_address(name, new[1]):
                raise self._engine.refusal(f"does not take the memory of {name}")
            self._bound[name] = new

    def _check_range(self, symbols: dict[str, int]) -> None:
        for symbol, size in symbols.items():
            if size > (most := self._engine.largest[symbol]):
                # A prefix or suffix takes its share of the capacity: no option states how much more that would be.
                option = {"batch": "max_batch", "query": "max_query", "sequence": "max_seq"}.get(symbol)
                again = "" if option is None else f", or build with: {self._engine.engines.rebuild(**{option: size})}"
                raise FlashVLMError(f"{symbol} of {size}: {self._engine.path} takes up to {most}; ask for less{again}")

    def prepare(self) -> None:
        """Gives the context the memory its shapes need; afterwards ``enqueue`` allocates nothing."""
        if self._needed is None:
            if missing := self._context.infer_shapes():
                raise self._engine.refusal(f"lacks {', '.join(missing)}")
            for name in self._engine.outputs:
                found, expected = tuple(self._context.get_tensor_shape(name)), self._bound[name][0]
                if found != expected:
                    raise self._engine.refusal(f"gives {name} the shape {found}, expected {expected}")
            # 0 stands for an error as well as for none needed; the upper bound is right for both.
            self._needed = self._context.update_device_memory_size_for_shapes() or self._engine.scratch_bound
        memory = self._scratch.at_least(self._needed)
        if memory != self._memory:
            self._context.set_device_memory(*memory)
            self._memory = memory

    def enqueue(self) -> None:
        """Puts one run on the stream."""
        self.prepare()
        if not self._context.execute_async_v3(self._engine.cuda.stream):
            raise FlashVLMError(f"{self._engine.path} failed: {'; '.join(MESSAGES)}")

    def is_capturable(self) -> bool:
        """Whether a CUDA graph can be made of ``enqueue``; TensorRT-RTX says beforehand, TensorRT in trying."""
        asked = getattr(self._context, "is_stream_capturable", None)
        return asked is None or bool(asked(self._engine.cuda.stream))


def load_plugins(trt: Any, engines: Engines, library: Path | None) -> None:
    """Loads the library that engines were built with into TensorRT's registry. Where it lies, only the user says.

    Raises:
        FlashVLMError: the engines need one and none or another was given, or it does not load.
    """
    for wanted in engines.manifest.plugins:
        if library is None:
            raise FlashVLMError(f"{engines.folder} was built with {wanted.file}; give it with --plugins PATH")
        if not library.is_file() or sha256(library) != wanted.sha256:
            raise FlashVLMError(
                f"--plugins {library} is not the {wanted.file} that {engines.folder} was built with; build the engines "
                f"with: {engines.rebuild()}"
            )
        try:
            trt.get_plugin_registry().load_library(str(library.resolve()))  # None: it was loaded before
        except Exception as error:  # of whichever kind the binding makes of it
            raise FlashVLMError(f"--plugins {library} does not load: {' '.join(str(error).split())}") from None
