#!/usr/bin/env python3
"""Speed on the CPU beside ONNX Runtime and sentence-transformers, in one run: prints a Markdown table with ratios.

    cargo build --release && scripts/get-minilm.sh
    pip install numpy onnxruntime sentence-transformers
    benches/peers/cpu.py

- One text on one thread, 1x16 and 1x128: `trt-embed bench` (token ids in memory to unit vector in memory) against ONNX Runtime
  with one thread on the file that `trt-embed export` wrote. ONNX Runtime's time is that of the graph alone: its pooling is free.
- A batch of 64 mixed texts on all cores: `trt-embed bench --mixed 64` against sentence-transformers' `encode` (fp32) on the same
  texts, made again here from the benchmark's seed; tokenising apart.

Programs take turns, round after round, so that a noisy machine disturbs all alike. A cell is the median over the rounds and, in
brackets, the smallest and largest round; a ratio is the median of the rounds' ratios (below 1: trt-embed is faster).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # as trt-embed: all cores

import numpy as np
import onnxruntime
import sentence_transformers
import torch
from mix import mixed_texts

ROOT = Path(__file__).resolve().parent.parent.parent
SHAPES = ["1x16", "1x128"]
MIXED = 64


def trt_embed(binary: Path, *arguments) -> str:
    return subprocess.run([str(binary), *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def bench(binary: Path, model: Path, *arguments) -> dict:
    return json.loads(trt_embed(binary, "bench", "--model", model, "--backend", "cpu", "--json", *arguments))


def time_onnxruntime(session, shape: str, calls: int, vocab_size: int, generator) -> float:
    """p50 in microseconds, fresh ids each call."""
    rows, tokens = map(int, shape.split("x"))
    mask = np.ones((rows, tokens), np.int32)
    times = []
    for call in range(calls + 5):
        ids = generator.integers(0, vocab_size, (rows, tokens), dtype=np.int32)
        start = time.perf_counter_ns()
        session.run(None, {"input_ids": ids, "attention_mask": mask})
        if call >= 5:
            times.append((time.perf_counter_ns() - start) / 1e3)
    return statistics.median(times)


def time_sentence_transformers(model, texts: list[str]) -> tuple[float, float]:
    """Milliseconds: tokenising alone, and `encode` whole at the better of two batch sizes."""
    start = time.perf_counter()
    model.preprocess(texts)
    tokenise = time.perf_counter() - start
    totals = []
    for batch_size in (32, MIXED):
        start = time.perf_counter()
        model.encode(texts, batch_size=batch_size, show_progress_bar=False)
        totals.append(time.perf_counter() - start)
    return 1e3 * tokenise, 1e3 * min(totals)


def cell(values: list[float], unit: str) -> str:
    return f"{statistics.median(values):.1f} {unit} ({min(values):.1f} to {max(values):.1f})"


def ratio(ours: list[float], peers: list[float]) -> str:
    return f"{statistics.median(a / b for a, b in zip(ours, peers)):.2f}"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--binary", type=Path, default=ROOT / "target/release/trt-embed")
    arguments.add_argument("--model", type=Path, default=ROOT / "models/all-MiniLM-L6-v2")
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--calls", type=int, default=200, help="calls of a round and shape (default: %(default)s)")
    arguments.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of the mixed batch (default: all)")
    arguments = arguments.parse_args()
    binary, model, rounds = arguments.binary, arguments.model, arguments.rounds

    torch.set_num_threads(arguments.threads)
    reference = sentence_transformers.SentenceTransformer(str(model), device="cpu", model_kwargs={"dtype": torch.float32})
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    texts = mixed_texts(MIXED, reference.max_seq_length)
    tokens = sum(len(reference.tokenizer(text)["input_ids"]) for text in texts)
    generator = np.random.default_rng(0)

    with tempfile.TemporaryDirectory() as folder:
        trt_embed(binary, "export", "--model", model, "--output", folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(f"{folder}/model.onnx", options, providers=["CPUExecutionProvider"])

        # Speed without fidelity says nothing: the vectors that the two programs make of the mixed texts.
        Path(folder, "texts.txt").write_text("\n".join(texts) + "\n")
        trt_embed(binary, "embed", "--model", model, "--backend", "cpu", "--input", f"{folder}/texts.txt",
                  "--format", "npy", "--output", f"{folder}/rows.npy")  # fmt: skip
        ours, theirs = np.load(f"{folder}/rows.npy").astype(np.float64), reference.encode(texts).astype(np.float64)
        cosine = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)

        latency = {name: {shape: [] for shape in SHAPES} for name in ("trt-embed", "onnxruntime")}
        mixed = {name: [] for name in ("trt-embed", "trt-embed tokenise", "peer", "peer tokenise")}
        for number in range(rounds):
            for shape in SHAPES:
                report = bench(binary, model, "--threads", 1, "--shape", shape, "--iterations", arguments.calls, "--mixed", 0)
                latency["trt-embed"][shape].append(report["shapes"][0]["ids_to_vector_us"]["p50"])
                latency["onnxruntime"][shape].append(time_onnxruntime(session, shape, arguments.calls, vocab_size, generator))
            report = bench(binary, model, "--threads", arguments.threads, "--shape", "1x16", "--iterations", 1, "--mixed", MIXED)
            assert (report["mixed"]["texts"], report["mixed"]["tokens"]) == (MIXED, tokens), (report["mixed"], tokens)
            mixed["trt-embed"].append(1e3 * report["mixed"]["total_s"])
            mixed["trt-embed tokenise"].append(1e3 * report["mixed"]["tokenise_s"])
            tokenise, total = time_sentence_transformers(reference, texts)
            mixed["peer"].append(total)
            mixed["peer tokenise"].append(tokenise)
            print(f"round {number + 1} of {rounds}", flush=True, file=sys.stderr)

    print(
        f"{model.name} on {cpu_name()}, {arguments.threads} cores; onnxruntime {onnxruntime.__version__}, "
        f"sentence-transformers {sentence_transformers.__version__}, torch {torch.__version__}; "
        f"{rounds} rounds, {arguments.calls} calls a round and shape.\n"
    )
    print("| measurement | trt-embed | peer | ratio |\n| --- | --- | --- | --- |")
    for shape in SHAPES:
        ours, peers = latency["trt-embed"][shape], latency["onnxruntime"][shape]
        print(f"| {shape}, 1 thread, ids to vector, p50 | {cell(ours, 'us')} | ONNX Runtime {cell(peers, 'us')} | {ratio(ours, peers)} |")
    for name, what in (("", "text to vector"), (" tokenise", "tokenising alone")):
        ours, peers = mixed["trt-embed" + name], mixed["peer" + name]
        print(
            f"| {MIXED} mixed texts ({tokens} tokens), {arguments.threads} cores, {what} | {cell(ours, 'ms')} "
            f"| sentence-transformers {cell(peers, 'ms')} | {ratio(ours, peers)} |"
        )
    print(f"\nSmallest cosine between the two programs' vectors of the mixed texts: {cosine.min():.7f}.")


if __name__ == "__main__":
    main()
