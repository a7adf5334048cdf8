#!/usr/bin/env python3
"""How true the INT8 export of a mean-pooled model is to its fp32 export: the table of docs/quantization.md.

    pip install numpy onnx onnxruntime tokenizers
    scripts/int8_fidelity.py --model models/all-MiniLM-L6-v2 --calibrate calibration.txt --texts others.txt \\
        --keep-float output.dense -- --method percentile --percentile 99.999

Both files hold a text a line, and no line should be in both. What follows `--` goes to `trt-embed calibrate`. Both graphs run in ONNX
Runtime on the CPU, the INT8 one with optimisations off: optimised, Q/DQ pairs become integer products with another rounding.
Printed: the smallest and the mean cosine of the vectors, and the share of each text's 10 nearest neighbours that stays. Exit status 1
where the mean is below --min-mean.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from tokenizers import Tokenizer

BATCH_TOKENS = 2048
NEIGHBOURS = 10


def run(binary: Path, *arguments: object) -> None:
    command = [str(binary), *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)


def rows_of_ids(model: Path, texts: list[str]) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_padding()
    limit = json.loads((model / "sentence_bert_config.json").read_text(encoding="utf-8"))["max_seq_length"]
    tokenizer.enable_truncation(limit)
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)]


def batches(rows: list[list[int]]) -> list[list[int]]:
    """Places of rows, longest first, so many that a batch has at most BATCH_TOKENS tokens with its padding."""
    out: list[list[int]] = []
    for place in sorted(range(len(rows)), key=lambda place: -len(rows[place])):
        if not out or (len(out[-1]) + 1) * len(rows[out[-1][0]]) > BATCH_TOKENS:
            out.append([])
        out[-1].append(place)
    return out


def vectors(graph: Path, rows: list[list[int]], pad: int, optimise: bool) -> np.ndarray:
    """The mean of each row's hidden states at unit length, [rows, hidden]."""
    options = onnxruntime.SessionOptions()
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    found: dict[int, np.ndarray] = {}
    for places in batches(rows):
        ids = np.full((len(places), len(rows[places[0]])), pad, np.int32)
        mask = np.zeros_like(ids)
        for row, place in enumerate(places):
            ids[row, : len(rows[place])], mask[row, : len(rows[place])] = rows[place], 1
        (hidden,) = session.run(["last_hidden_state"], {"input_ids": ids, "attention_mask": mask})
        for row, place in enumerate(places):
            mean = hidden[row, : len(rows[place])].astype(np.float64).mean(0)
            found[place] = mean / np.linalg.norm(mean)
    return np.stack([found[place] for place in range(len(rows))])


def neighbours(of: np.ndarray) -> list[set[int]]:
    similar = of @ of.T
    np.fill_diagonal(similar, -np.inf)
    return [set(row) for row in np.argsort(-similar, axis=1)[:, :NEIGHBOURS].tolist()]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--binary", type=Path, default=Path("target/release/trt-embed"), help="default: %(default)s")
    arguments.add_argument("--model", type=Path, required=True, metavar="DIR", help="sentence-transformers folder with mean pooling")
    arguments.add_argument("--calibrate", type=Path, required=True, metavar="FILE", help="texts that ranges are measured over")
    arguments.add_argument("--texts", type=Path, required=True, metavar="FILE", help="texts that are compared")
    arguments.add_argument("--keep-float", action="append", default=[], metavar="PART", help="leave linears of such names in float")
    arguments.add_argument("--min-mean", type=float, default=0.0, metavar="X", help="smallest mean cosine that passes")
    arguments.add_argument("more", nargs="*", metavar="…", help="for `trt-embed calibrate`")
    arguments = arguments.parse_args()
    texts = arguments.texts.read_text(encoding="utf-8").splitlines()
    rows = rows_of_ids(arguments.model, texts)
    pad = json.loads((arguments.model / "config.json").read_text(encoding="utf-8"))["pad_token_id"]
    with tempfile.TemporaryDirectory() as folder:
        ranges = Path(folder, "calibration.json")
        run(arguments.binary, "calibrate", "-m", arguments.model, "-i", arguments.calibrate, "-o", ranges, "--backend", "cpu", *arguments.more)
        graph = json.loads(ranges.read_text(encoding="utf-8"))
        run(arguments.binary, "export", "-m", arguments.model, "-o", Path(folder, "fp32"))
        names = linears(Path(folder, "fp32", "model.onnx"), arguments.keep_float)
        keep = [part for name in names for part in ("--keep-float", name)]
        run(arguments.binary, "export", "-m", arguments.model, "-o", Path(folder, "int8"), "--precision", "int8", "--calibration", ranges, *keep)
        expected = vectors(Path(folder, "fp32", "model.onnx"), rows, pad, optimise=True)
        found = vectors(Path(folder, "int8", "model.onnx"), rows, pad, optimise=False)
    cosines = (expected * found).sum(1)
    shared = [len(a & b) / NEIGHBOURS for a, b in zip(neighbours(expected), neighbours(found))]
    print(
        f"{len(texts)} texts of {min(map(len, rows))} to {max(map(len, rows))} tokens; {graph['samples']} calibrated; "
        f"{len(names)} linears in float: min cosine {cosines.min():.5f}, mean {cosines.mean():.5f}, top {NEIGHBOURS} {np.mean(shared):.1%}"
    )
    if not cosines.mean() >= arguments.min_mean:
        raise SystemExit(f"the mean is below {arguments.min_mean}")


def linears(graph: Path, parts: list[str]) -> list[str]:
    """Names of the linears that have one of `parts` in them, from the graph's weights."""
    names = [tensor.name for tensor in onnx.load(str(graph), load_external_data=False).graph.initializer]
    stems = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    chosen = [stem for stem in stems if any(part in stem for part in parts) and "LayerNorm" not in stem]
    if parts and not chosen:
        raise SystemExit(f"no linear's name has {', '.join(parts)} in it; there are {', '.join(stems)}")
    return chosen


if __name__ == "__main__":
    main()
