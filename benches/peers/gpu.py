#!/usr/bin/env python3
"""Speed on an NVIDIA GPU beside PyTorch, in one run on one GPU with the same weights: prints a Markdown table with ratios.

    pip install numpy torch transformers
    benches/peers/gpu.py --model models/mpnet-seeded --binary target/release/trt-embed --engine mpnet.engine --json gpu.json

- trt-embed: `trt-embed bench`.
- torch.compile: the encoder of encoder.py in fp16, compiled for each shape and captured into a CUDA graph with static buffers and
  pinned staging. The strongest simple peer.
- eager: transformers' model in fp16, mean pooling and normalisation on the GPU: what most people run.

Latency is wall time on the calling thread from token ids in host memory to vectors in host memory, fresh random ids each call,
one call in flight, after warm-up. GPU time is measured apart, by CUDA events, medians: the peer's of its graph (encoder and
pooling) and of the graph with both copies, without the gap before the launch; trt-embed's as its bench gives them.

Throughput is that of the mix of lengths, from ids. The peer's texts are spread over --buckets at the least cost by measured times;
that planning is not counted. Build trt-embed's engine with the same buckets.

First of all every program's vectors of the same texts are compared with transformers' in fp32 (TF32 off): below --min-cosine
nothing is measured. Measurements stop at --time-limit; what they leave out is named.

Try it without a GPU: --device cpu --backend cpu --compile-mode none --shapes 1x16 --buckets 4x64 2x512 --mixed 16 --iterations 5
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # as trt-embed: all cores

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from captured import ATTENTION, Captured, Spread, spread
from encoder import COUNTED_FROM_PADDING, Encoder
from mix import mixed_texts
from report import percentiles, table

SHAPES = [(1, 16), (1, 128), (32, 128)]
BUCKETS = [(1, 32), (1, 128), (64, 32), (32, 128), (16, 512)]
COMPILE_MODES = ["default", "max-autotune-no-cudagraphs", "none"]
COMPILE_SCOPES = ["layer", "model"]
CHECKED_TEXTS = 64
WARM_UP = 20
GPU_CALLS = 500
ROUNDS = 5  # of the throughput: the median counts


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


class Clock:
    """Progress on stderr with the time since the start, and the time that is left."""

    def __init__(self, limit: float):
        self.start, self.limit, self.skipped = time.monotonic(), limit, []

    def say(self, what: str) -> None:
        print(f"[{time.monotonic() - self.start:6.1f} s] {what}", file=sys.stderr, flush=True)

    def left(self) -> float:
        return self.limit - (time.monotonic() - self.start)

    def begin(self, what: str) -> bool:
        """Whether there is time for another step."""
        if self.left() > 0:
            self.say(what)
            return True
        self.say(f"no time left for: {what}")
        self.skipped.append(what)
        return False


class Eager:
    """transformers' own model, mean pooling and normalisation, on its device and in its type."""

    def __init__(self, model, device: torch.device):
        self.model, self.device = model, device

    def __call__(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        ids = torch.from_numpy(ids).to(self.device)
        mask = torch.arange(ids.shape[1], device=self.device) < torch.from_numpy(lengths).to(self.device)[:, None]
        hidden = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()
        pooled = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(pooled, dim=-1).cpu().numpy()


class Ours:
    """The command."""

    def __init__(self, arguments, clock: Clock):
        self.binary, self.clock = str(arguments.binary), clock
        self.model = ["-m", str(arguments.model), "--backend", arguments.backend]
        self.model += ["--engine", str(arguments.engine)] if arguments.engine else []

    def run(self, verb: str, *rest) -> str:
        command = [self.binary, verb, *self.model, *map(str, rest)]
        try:
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=max(self.clock.left(), 1.0))
        except subprocess.TimeoutExpired:
            raise SystemExit(f"the time limit stopped: {' '.join(command)}") from None
        if run.returncode != 0:
            raise SystemExit(f"exit status {run.returncode} of: {' '.join(command)}")
        return run.stdout

    def vectors(self, texts: list[str]) -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "texts.txt").write_text("\n".join(texts) + "\n")
            self.run("embed", "--input", f"{folder}/texts.txt", "--format", "npy", "--output", f"{folder}/rows.npy")
            return np.load(f"{folder}/rows.npy")

    def bench(self, shapes: list[tuple[int, int]], iterations: int, mixed: int) -> dict:
        options = [option for shape in shapes for option in ("--shape", name_of(shape))]
        return json.loads(self.run("bench", *options, "--iterations", iterations, "--mixed", mixed, "--json"))


class Latency:
    """Measures calls with fresh random ids: as many as asked, fewer where `seconds` pass first."""

    def __init__(self, vocab_size: int, seconds: float):
        self.vocab_size, self.seconds, self.generator = vocab_size, seconds, np.random.default_rng(0)

    def ids(self, rows: int, tokens: int) -> np.ndarray:
        return self.generator.integers(0, self.vocab_size, (rows, tokens), dtype=np.int32)

    def measure(self, call, shape: tuple[int, int], calls: int) -> dict:
        lengths = np.full(shape[0], shape[1], np.int32)
        for _ in range(min(WARM_UP, calls)):
            call(self.ids(*shape), lengths)
        us, end = [], time.monotonic() + self.seconds
        gc.collect()
        gc.disable()
        while len(us) < calls and (not us or time.monotonic() < end):
            ids = self.ids(*shape)
            start = time.perf_counter_ns()
            call(ids, lengths)
            us.append((time.perf_counter_ns() - start) / 1e3)
        gc.enable()
        return {"calls": len(us), "ids_to_vector_us": percentiles(us)}


def parse_shape(text: str) -> tuple[int, int]:
    try:
        batch, seq = map(int, text.split("x"))
        if batch < 1 or seq < 1:
            raise ValueError
        return batch, seq
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: a shape is texts x tokens, e.g. 8x128") from None


def name_of(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def names(shapes: list[tuple[int, int]]) -> str:
    return " ".join(map(name_of, shapes))


def load(folder: Path, dtype: torch.dtype, **settings):
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    if model_type != "modernbert":  # which has none, nor the argument
        settings["add_pooling_layer"] = False
    return transformers.AutoModel.from_pretrained(folder, dtype=dtype, **settings).eval()


def max_tokens(folder: Path, config) -> int:
    """The longest text: what the folder says, at most what there are positions for."""
    first = config.pad_token_id + 1 if config.model_type in COUNTED_FROM_PADDING else 0
    positions = config.max_position_embeddings - first
    file = folder / "sentence_bert_config.json"
    stated = json.loads(file.read_text()).get("max_seq_length") if file.exists() else None
    return min(stated or positions, positions)


def token_ids(folder: Path, texts: list[str], limit: int) -> list[np.ndarray]:
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(limit)
    return [np.array(encoding.ids, np.int32) for encoding in tokenizer.encode_batch(texts)]


def one_by_one(eager: Eager, rows: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([eager(row[None], np.array([len(row)], np.int32)) for row in rows])


def exact_fp32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")


class Bench:
    """The steps and what they found: `report` is written after each."""

    def __init__(self, arguments, clock: Clock):
        self.arguments, self.clock = arguments, clock
        self.device = torch.device(arguments.device)
        self.dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        self.model = load(arguments.model, torch.float32, attn_implementation="eager")
        limit = max_tokens(arguments.model, self.model.config)
        longest = max(arguments.shapes, key=lambda shape: shape[1])
        if longest[1] > limit:
            raise SystemExit(f"--shapes {name_of(longest)}: the model takes {limit} tokens")
        self.texts = mixed_texts(arguments.mixed, limit)
        self.rows = token_ids(arguments.model, self.texts, limit)
        spread([len(row) for row in self.rows], dict.fromkeys(arguments.buckets, 1.0))  # ends a run without a bucket for a text
        self.latency = Latency(self.model.config.vocab_size, arguments.seconds)
        self.report = {
            "model": arguments.model.resolve().name,
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "dtype": str(self.dtype).removeprefix("torch."),
            "compile": f"mode {arguments.compile_mode}, by {arguments.compile_scope}, attention {arguments.attention}",
            "min_cosine": {},
            "trt_embed": None,
            "compiled": {"shapes": {}, "mixed": None},
            "eager": {"shapes": {}},
            "skipped": clock.skipped,
        }

    def save(self) -> None:
        if self.arguments.json:
            self.arguments.json.write_text(json.dumps(self.report, indent=1) + "\n")

    def check(self, name: str, vectors: np.ndarray, references: np.ndarray) -> None:
        """Keeps the smallest cosine; ends the run where a program computes something else."""
        cosine = cosines(vectors, references)
        least = float(cosine.min()) if np.isfinite(cosine).all() else float("nan")
        self.clock.say(f"{name}: smallest cosine to fp32 {least:.7f} over {len(cosine)} vectors")
        found = self.report["min_cosine"]
        found[name] = min(least, found.get(name, 1.0))
        if not least >= self.arguments.min_cosine:
            raise SystemExit(f"{name} does not compute this model with mean pooling: smallest cosine {least:.7f}")

    def references(self) -> None:
        """fp32 vectors of some mixed texts and of full rows at each shape."""
        exact_fp32()
        eager = Eager(self.model.to(self.device), self.device)
        self.checked = self.rows[:CHECKED_TEXTS]
        self.reference = one_by_one(eager, self.checked) if self.checked else None
        # Ids from 5 on: transformers' MPNet gives the padding id no position.
        low = min(5, self.latency.vocab_size - 1)
        self.full = {}
        for shape in self.arguments.shapes:
            ids = np.random.default_rng(shape).integers(low, self.latency.vocab_size, shape, dtype=np.int32)
            self.full[shape] = ids, one_by_one(eager, list(ids[:CHECKED_TEXTS]))

    def ours(self) -> None:
        ours = Ours(self.arguments, self.clock)
        if self.checked:
            self.check("trt-embed", ours.vectors(self.texts[: len(self.checked)]), self.reference)
        shapes = self.arguments.shapes
        self.clock.say(f"trt-embed bench, {names(shapes)}, {len(self.texts)} mixed texts")
        self.report["trt_embed"] = report = ours.bench(shapes, self.arguments.iterations, len(self.texts))
        lengths = [len(row) for row in self.rows]
        if lengths and report["mixed"]["lengths"] != lengths:
            raise SystemExit(f"trt-embed measured other texts: {report['mixed']['tokens']} tokens, not {sum(lengths)}")

    def eager(self) -> None:
        eager = Eager(load(self.arguments.model, self.dtype).to(self.device), self.device)
        if self.checked:
            self.check("eager", one_by_one(eager, self.checked), self.reference)
        for shape in self.arguments.shapes:
            if self.clock.begin(f"eager, {name_of(shape)}"):
                found = self.latency.measure(eager, shape, self.arguments.eager_iterations)
                self.report["eager"]["shapes"][name_of(shape)] = found

    def compiled(self) -> None:
        arguments = self.arguments
        encoder = Encoder(self.model, self.device, self.dtype)
        if arguments.compile_mode != "none":
            encoder.compile(arguments.compile_mode, arguments.compile_scope)
        captured = {}
        for shape in dict.fromkeys([*arguments.shapes, *(arguments.buckets if self.rows else [])]):
            if not self.clock.begin(f"torch.compile and capture, {name_of(shape)}"):
                continue
            captured[shape] = Captured(encoder, *shape, arguments.attention)
            if shape in arguments.shapes and self.clock.begin(f"compiled, {name_of(shape)}"):
                self.report["compiled"]["shapes"][name_of(shape)] = self.compiled_shape(captured[shape])
                self.save()
        if self.rows and all(shape in captured for shape in arguments.buckets) and self.clock.begin("compiled, mixed texts"):
            self.report["compiled"]["mixed"] = self.compiled_mixed({shape: captured[shape] for shape in arguments.buckets})

    def compiled_shape(self, captured: Captured) -> dict:
        shape = captured.batch, captured.seq
        ids, references = self.full[shape]
        vectors = captured(ids, np.full(shape[0], shape[1], np.int32))
        self.check("compiled", vectors[: len(references)], references)
        found = self.latency.measure(captured, shape, self.arguments.iterations)
        calls = min(GPU_CALLS, self.arguments.iterations)
        found["gpu_graph_us"] = statistics.median(captured.gpu_us(calls, copies=True))
        found["gpu_encoder_us"] = statistics.median(captured.gpu_us(calls, copies=False))
        return found

    def compiled_mixed(self, captured: dict[tuple[int, int], Captured]) -> dict:
        calls = min(50, self.arguments.iterations)
        costs = {shape: statistics.median(one.gpu_us(calls, copies=True)) for shape, one in captured.items()}
        run = Spread(captured, costs, self.rows)
        self.check("compiled in buckets", run.run()[: len(self.checked)], self.reference)
        seconds = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            run.run()
            seconds.append(time.perf_counter() - start)
        tokens, took = sum(map(len, self.rows)), statistics.median(seconds)
        return {
            "texts": len(self.rows),
            "tokens": tokens,
            "padded_tokens": run.padded_tokens(),
            "batches": len(run.batches),
            "bucket_us": {name_of(shape): cost for shape, cost in costs.items()},
            "ids_total_s": took,
            "rounds_s": seconds,
            "ids_sentences_per_s": len(self.rows) / took,
            "ids_tokens_per_s": tokens / took,
        }


def parse() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = arguments.add_argument
    default = " (default: %(default)s)"
    add("--model", type=Path, required=True, help="model folder, MPNet, BERT, XLM-RoBERTa or ModernBERT with mean pooling")
    add("--binary", type=Path, default="trt-embed", help="the command" + default)
    add("--engine", type=Path, metavar="FILE", help="engine file for trt-embed, else its own choice")
    add("--backend", default="tensorrt", help="of trt-embed" + default)
    add("--device", default="cuda", help="of the peers; on cpu they run in fp32 without graphs" + default)
    shapes = {"type": parse_shape, "nargs": "+", "metavar": "BxS"}
    add("--shapes", **shapes, default=SHAPES, help=f"of the latency (default: {names(SHAPES)})")
    add("--buckets", **shapes, default=BUCKETS, help=f"of the throughput (default: {names(BUCKETS)})")
    add("--iterations", type=int, default=2000, metavar="N", help="calls of a shape; p99.9 wants 10000" + default)
    add("--eager-iterations", type=int, default=300, metavar="N", help="calls of a shape for the slow peer" + default)
    add("--seconds", type=float, default=20.0, metavar="S", help="most seconds of a peer's latency measurement" + default)
    add("--mixed", type=int, default=4096, metavar="N", help="texts of the throughput, 0 for none" + default)
    add("--compile-mode", choices=COMPILE_MODES, default="default", help="of torch.compile" + default)
    add("--compile-scope", choices=COMPILE_SCOPES, default="layer", help="compiled at once; the model takes longer" + default)
    add("--attention", choices=list(ATTENTION), default="default", help="kernel of the compiled peer, else PyTorch's choice")
    add("--skip-ours", action="store_true", help="leaves out trt-embed")
    add("--skip-eager", action="store_true", help="leaves out the eager peer")
    add("--skip-compile", action="store_true", help="leaves out the compiled peer")
    add("--min-cosine", type=float, default=0.999, metavar="C", help="to fp32; below, nothing is measured" + default)
    add("--time-limit", type=float, default=540.0, metavar="S", help="no step begins later than this" + default)
    add("--json", type=Path, metavar="OUT", help="file for all figures")
    return arguments.parse_args()


def main() -> None:
    arguments = parse()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    clock = Clock(arguments.time_limit)
    clock.say("loading the model")
    bench = Bench(arguments, clock)
    clock.say("fp32 references")
    bench.references()
    steps = {bench.ours: arguments.skip_ours, bench.eager: arguments.skip_eager, bench.compiled: arguments.skip_compile}
    for step, skip in steps.items():
        try:
            if not skip:
                step()
        finally:
            bench.save()
    report = bench.report
    print(
        f"{report['model']} on {report['device']}, torch {report['torch']} ({report['compile']}), "
        f"transformers {report['transformers']}, peers in {report['dtype']}.\n\n{table(report)}\n"
    )
    cosine = ", ".join(f"{name} {least:.7f}" for name, least in report["min_cosine"].items())
    print(f"Smallest cosine to transformers in fp32: {cosine}.")
    if clock.skipped:
        print(f"Left out for lack of time: {'; '.join(clock.skipped)}.")
    clock.say("done")


if __name__ == "__main__":
    main()
