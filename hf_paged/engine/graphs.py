"""Decode steps as CUDA graphs: captured at their first use, by number of sequences, and replayed with other numbers.

A graph is found by (rows, width of the block tables, ambient state). Nothing else of a step is in it: rows are padded
to the next size, tables to the next power of two, and lengths are read on the device. A step that has no graph yet runs
as it is, on the buffers of the graph, and is captured after that: its kernels are compiled and their scratch is there.

Graphs hold addresses. All are dropped when one of these lies elsewhere: a parameter or buffer of the model, or the KV
pool. That is looked at when a call is taken up, and after each change that the weights guard saw; in between the
tensors are kept alive, so that no graph reads memory that is somebody else's. Edits in place change nothing.
"""

from __future__ import annotations

import functools
import itertools
import threading
import warnings
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_paged.config import PagedConfig
from hf_paged.engine import batch
from hf_paged.engine.adapters import is_adapter_layer
from hf_paged.engine.ambient import Ambient
from hf_paged.engine.kv_cache import KVCache
from hf_paged.engine.step_buffers import StepBuffers
from hf_paged.engine.weight_samples import PLAIN_TENSORS
from hf_paged.errors import ConfigError
from hf_paged.step import Forward, StepInputs, StepPlan

__all__ = ["CudaGraph", "DecodeGraphs", "GraphPool", "make_graphs", "size_for", "width_for"]

#: A process has one capture at a time.
_capturing = threading.Lock()
#: Narrowest tables: one graph serves sequences of up to this many blocks.
_LEAST_WIDTH = 64


class Graph(Protocol):
    """What is captured and replayed."""

    def capture(self, run: Forward) -> None: ...
    def replay(self) -> Tensor: ...


class GraphPool:
    """The memory that all graphs of an engine share, and the stream they are captured on."""

    def __init__(self, device: torch.device) -> None:
        with torch.cuda.device(device):
            self.handle = torch.cuda.graph_pool_handle()
            self.stream = _capture_stream(device)


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures on a device: the library of matrix products keeps scratch for each stream it ever saw."""
    return torch.cuda.Stream(device)


class CudaGraph:
    """A graph in the memory pool that all graphs of an engine share: they never run at once."""

    def __init__(self, device: torch.device, pool: GraphPool) -> None:
        self._device, self._pool = device, pool
        self._graph = torch.cuda.CUDAGraph()
        self._output: Tensor | None = None

    def capture(self, run: Forward) -> None:
        """Records what `run` launches; nothing of it is executed."""
        with _capturing, torch.cuda.device(self._device):
            stream = torch.cuda.current_stream(self._device)
            try:
                with torch.cuda.graph(
                    self._graph,
                    pool=self._pool.handle,
                    # torch's own stream for captures belongs to the device of the process's first one.
                    stream=self._pool.stream,
                    # Other threads may allocate meanwhile: that is their business, not an error of this capture.
                    capture_error_mode="thread_local",
                ):
                    self._output = run()
            finally:
                # Where the end of a capture fails, torch leaves its stream the current one.
                torch.cuda.set_stream(stream)

    def replay(self) -> Tensor:
        """Runs it with what is in its inputs now. The output is overwritten by the next replay."""
        assert self._output is not None, "replayed before it was captured"
        self._graph.replay()
        return self._output


def size_for(num_rows: int, most: int) -> int | None:
    """Rows of the graph for a step of `num_rows`: steps of 1, 2, 4, 8, then 8, from 64 on 16, from 256 on 64."""
    step = 8 if num_rows <= 64 else 16 if num_rows <= 256 else 64
    size = 1 << (num_rows - 1).bit_length() if num_rows <= 8 else -(-num_rows // step) * step
    return None if num_rows > most else min(size, most)


def width_for(num_blocks: int) -> int:
    """Blocks a row of the graph's tables holds, for a longest table of `num_blocks`."""
    return max(_LEAST_WIDTH, 1 << (num_blocks - 1).bit_length())


class DecodeGraphs:
    """The captured decode steps of one runtime. Only the holder of the crank calls what is here."""

    def __init__(self, device: torch.device, backend: str, cache: KVCache, most_rows: int) -> None:
        self._device, self._backend, self._cache, self._most_rows = device, backend, cache, most_rows
        self._graphs: dict[tuple[int, int, Ambient], Graph] = {}
        self._buffers: dict[tuple[int, int], StepBuffers] = {}
        self._pool: Any = None
        self._generation = cache.generation
        self._addresses: list[tuple[int, torch.dtype]] | None = None
        self._modules: list[tuple[int, type]] = []
        self._kept: list[Tensor] = []  # what the addresses are of, while something runs
        self._looked = False
        self._suitable = False
        self._failed = False
        self.num_captures = 0
        self.num_replays = 0

    def look_again(self) -> None:
        """The model may be another than at the last step: its tensors are looked at before the next one."""
        self._looked = False

    def drop(self) -> None:
        """Forgets all graphs and hands their memory back."""
        self._clear()
        self._buffers.clear()
        self.went_idle()

    def went_idle(self) -> None:
        """Nothing runs: no tensor of the model is held any more."""
        self._kept = []
        self._looked = False

    def inputs(self, plan: StepPlan, model: nn.Module, owner: object, ambient: Ambient) -> StepInputs | None:
        """The inputs of a step that is, or will be, a graph; None for one that runs as it is."""
        # Under autocast, weights in the narrow dtype are temporaries that somebody else's context lets go of.
        if self._failed or ambient.autocast_dtype is not None or not _is_plain_decode(plan):
            return None
        size = size_for(len(plan.sequences), self._most_rows)
        if size is None or not self._is_current(model):
            return None
        arrays = batch.pack(plan, self._cache.block_size)
        width = width_for(arrays.tables.shape[1])
        buffers = self._buffers.get((size, width))
        if buffers is None:
            buffers = self._buffers[size, width] = StepBuffers(size, width, self._device)
        buffers.fill(arrays)
        inputs = buffers.inputs(owner=owner, backend=self._backend, kv_layer=self._cache.layer)
        inputs.kv_scales = self._cache.scales
        key, rows = (size, width, ambient), len(plan.sequences)
        inputs.around = lambda run: self._run(key, rows, run)
        return inputs

    def _run(self, key: tuple[int, int, Ambient], rows: int, run: Forward) -> Tensor:
        graph = self._graphs.get(key)
        if graph is not None:
            self.num_replays += 1
            # A copy: callers that choose their tokens themselves look at it while the next steps run.
            return graph.replay()[:rows].clone()
        logits = run()
        self._capture(key, run)
        return logits[:rows]

    def _capture(self, key: tuple[int, int, Ambient], run: Forward) -> None:
        if self._pool is None:
            self._pool = _new_pool(self._device)
        graph = _new_graph(self._device, self._pool)
        try:
            graph.capture(run)
        except Exception as error:
            # The step itself is done. What cannot be captured (a layer that waits for the device, say) runs as it is.
            self._failed = True
            self.drop()
            warnings.warn(
                f"cuda_graphs: a decode step of this model could not be captured ({type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else 'no message'}); its steps run kernel by kernel. "
                "cuda_graphs=False says so from the start",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        self._graphs[key] = graph
        self.num_captures += 1

    def _is_current(self, model: nn.Module) -> bool:
        """Whether graphs may be used; those of tensors that have moved are gone afterwards."""
        if self._generation != self._cache.generation:
            self._generation = self._cache.generation
            self._clear()
        if not self._looked:
            self._look(model)
        return self._suitable

    def _look(self, model: nn.Module) -> None:
        modules = list(model.modules())
        tensors = list(itertools.chain(model.parameters(), model.buffers()))
        # What adapters' layers do depends on numbers and names on the host, and hooks of accelerate may move tensors.
        self._suitable = not any(is_adapter_layer(m) or "_hf_hook" in vars(m) for m in modules) and all(
            type(tensor) in PLAIN_TENSORS and tensor.device == self._device for tensor in tensors
        )
        self._looked = True
        if not self._suitable:
            self._clear()
            self._kept = []
            return
        addresses = [(tensor.data_ptr(), tensor.dtype) for tensor in tensors]
        ids = [(id(module), type(module)) for module in modules]
        if addresses != self._addresses or ids != self._modules:
            self._clear()
        self._addresses, self._modules = addresses, ids
        # `detach`: a parameter whose `.data` is replaced would let go of the old memory.
        self._kept = [tensor.detach() for tensor in tensors]

    def _clear(self) -> None:
        self._graphs.clear()
        # A pool that no graph uses any more is torch's to free, and takes no other.
        self._pool = None


def _is_plain_decode(plan: StepPlan) -> bool:
    """One new token of each sequence, logits of each, and nothing besides."""
    count = len(plan.sequences)
    return (
        plan.num_decodes == count == len(plan.sample_indices)
        and not any(plan.num_drafts)
        and all(
            s.adapters is None and (s.embeds is None or s.num_computed >= s.prompt_len)
            for s in plan.sequences
        )
    )


def _new_pool(device: torch.device) -> Any:
    return GraphPool(device)


def _new_graph(device: torch.device, pool: Any) -> Graph:
    return CudaGraph(device, pool)


def make_graphs(
    config: PagedConfig, device: torch.device, backend: str, cache: KVCache
) -> DecodeGraphs | None:
    """The graphs `config.cuda_graphs` asks for: with "auto" where they are possible.

    Raises:
        ConfigError: they are asked for where they are not possible.
    """
    if config.cuda_graphs is False:
        return None
    if device.type == "cuda" and backend == "triton":
        return DecodeGraphs(device, backend, cache, config.max_num_seqs)
    if config.cuda_graphs is True:
        raise ConfigError(
            f"cuda_graphs=True: not possible on {device} with backend {backend!r}; CUDA and Triton are needed"
        )
    return None
