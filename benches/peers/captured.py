"""The PyTorch peer's way to run: one CUDA graph a shape with static buffers, and many texts spread over such shapes.

On a device that is no GPU the same code runs without graphs: a dry run of everything but speed.
"""

import contextlib
import time

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

ATTENTION = {
    "default": None,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
# Cycles that the GPU spins before a timed piece of work, about 0.2 ms, while the CPU enqueues all of it: GPU time without gaps.
SPIN = 400_000


class Staging:
    """Ids [batch, seq] and lengths [batch] in one int32 buffer, and room for the vectors; pinned for a GPU."""

    def __init__(self, batch: int, seq: int, dim: int, pinned: bool):
        self.input = torch.zeros(batch * (seq + 1), dtype=torch.int32, pin_memory=pinned)
        self.result = torch.zeros(batch, dim, pin_memory=pinned)
        flat = self.input.numpy()
        self.ids, self.lengths = flat[: batch * seq].reshape(batch, seq), flat[batch * seq :]
        self.vectors = self.result.numpy()

    def fill(self, rows: list[np.ndarray]) -> None:
        """Padding keeps whatever ids are there: it is masked."""
        for i, row in enumerate(rows):
            self.ids[i, : len(row)] = row
            self.lengths[i] = len(row)
        self.lengths[len(rows) :] = 0


class Captured:
    """An encoder at one shape: static device buffers and the graph that reads and writes them."""

    def __init__(self, encoder, batch: int, seq: int, attention: str = "default"):
        self.batch, self.seq, self.encoder = batch, seq, encoder
        self.cuda = encoder.device.type == "cuda"
        self.staging = Staging(batch, seq, encoder.dim, self.cuda)
        self.input = torch.zeros_like(self.staging.input, device=encoder.device)
        self.ids, self.lengths = self.input[: batch * seq].view(batch, seq), self.input[batch * seq :]
        self.lengths.fill_(seq)
        backend = ATTENTION[attention]
        with sdpa_kernel(backend) if backend is not None else contextlib.nullcontext():
            if not self.cuda:
                self.output = encoder(self.ids, self.lengths)
                return
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):  # compiles, and makes what may not be made while capturing
                    encoder(self.ids, self.lengths)
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self.output = encoder(self.ids, self.lengths)
            torch.cuda.synchronize()

    def replay(self) -> None:
        if self.cuda:
            self.graph.replay()
        else:
            self.output = self.encoder(self.ids, self.lengths)

    def enqueue(self, staging: Staging) -> None:
        """Copy in, encoder and pooling, copy out; the result is there after a synchronisation."""
        self.input.copy_(staging.input, non_blocking=True)
        self.replay()
        staging.result.copy_(self.output, non_blocking=True)

    def __call__(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Ids [batch, seq] in host memory to vectors [batch, dim] in host memory, overwritten by the next call."""
        self.staging.ids[...] = ids
        self.staging.lengths[...] = lengths
        self.enqueue(self.staging)
        synchronize(self.cuda)
        return self.staging.vectors

    def gpu_us(self, calls: int, copies: bool) -> list[float]:
        """GPU time of each of `calls` replays by CUDA events, with or without the two copies; wall time where there is no GPU."""
        times = []
        work = (lambda: self.enqueue(self.staging)) if copies else self.replay
        self.staging.lengths[...] = self.seq
        self.enqueue(self.staging)
        synchronize(self.cuda)
        for _ in range(calls):
            if not self.cuda:
                start = time.perf_counter_ns()
                work()
                times.append((time.perf_counter_ns() - start) / 1e3)
                continue
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(SPIN)
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(1e3 * start.elapsed_time(end))
        return times


def synchronize(cuda: bool) -> None:
    if cuda:
        torch.cuda.current_stream().synchronize()


def spread(lengths: list[int], costs: dict[tuple[int, int], float]) -> list[tuple[tuple[int, int], list[int]]]:
    """The cheapest way to run texts of `lengths` in shapes (batch, seq) of known cost: each batch's shape and texts.

    Texts sorted by length are cut into consecutive batches. A shape takes as many as it has rows: leaving texts for later
    never makes the rest cheaper.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    best = [(0.0, None)]  # of the first n texts: cost, and the shape of the last batch
    for n, text in enumerate(order, 1):
        fitting = [(best[max(n - shape[0], 0)][0] + cost, shape) for shape, cost in costs.items() if shape[1] >= lengths[text]]
        if not fitting:
            raise SystemExit(f"no bucket holds a text of {lengths[text]} tokens; add one to --buckets")
        best.append(min(fitting))
    batches, n = [], len(order)
    while n > 0:
        shape = best[n][1]
        batches.append((shape, order[max(n - shape[0], 0) : n]))
        n -= len(batches[-1][1])
    return batches


class Spread:
    """Texts' ids spread over captured shapes, with pinned staging of its own for each batch, so that none waits for another."""

    def __init__(self, captured: dict[tuple[int, int], Captured], costs: dict[tuple[int, int], float], rows: list[np.ndarray]):
        self.rows = rows
        self.dim = next(iter(captured.values())).encoder.dim
        self.cuda = next(iter(captured.values())).cuda
        self.batches = [
            (captured[shape], Staging(*shape, self.dim, self.cuda), texts) for shape, texts in spread(list(map(len, rows)), costs)
        ]

    def padded_tokens(self) -> int:
        return sum(captured.batch * captured.seq for captured, _, _ in self.batches)

    def run(self) -> np.ndarray:
        """Vectors [texts, dim] in the texts' order: batches are packed while the GPU runs those before; one synchronisation."""
        for captured, staging, texts in self.batches:
            staging.fill([self.rows[text] for text in texts])
            captured.enqueue(staging)
        synchronize(self.cuda)
        vectors = np.empty((len(self.rows), self.dim), np.float32)
        for _, staging, texts in self.batches:
            vectors[texts] = staging.vectors[: len(texts)]
        return vectors
