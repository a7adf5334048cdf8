#!/usr/bin/env python3
"""Exports the fixture models (and all-MiniLM-L6-v2) with `trt-embed export` and checks the files by onnx.checker and ONNX Runtime.

    pip install numpy onnx onnxruntime safetensors
    scripts/check_onnx.py --binary target/release/trt-embed --minilm models/all-MiniLM-L6-v2

Hidden states at real positions must equal PyTorch's, kept in tests/fixtures, to 1e-4 in fp32: all texts in one padded batch and
each text alone. A file of fp16 types must equal them to what rounding to 11 bits allows. INT8 files, calibrated on the texts of
fixture_texts.py, must load, run and keep the direction of the mean hidden states. Files with int64 inputs and token types, as optimum's
consumers feed them, must equal PyTorch on token types other than 0, kept in tests/fixtures/token_types.safetensors.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from fixture_texts import MINILM
from safetensors.numpy import load_file

FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "fixtures"
FP32_BAR = 1e-4
# Smallest cosine of a token's state in fp16, for families whose values fp16_bar does not describe: gates multiply, pre-norm does not bound.
FP16_COSINE = 0.9999
# Mean cosine of pooled vectors with every linear in INT8: scales that are wrong, or on the wrong axis, end far below.
INT8_BAR = 0.95


GATED = {"modernbert", "nomic_bert", "gte", "new", "jina_bert", "jina_bert_later"}


def fp16_bar(layers: int, texts: list) -> float:
    """About 8 steps of a layer each round their weights and their result to 11 bits; such errors have random signs."""
    largest = max(float(np.abs(hidden).max()) for _, hidden in texts)
    return (16.0 * layers) ** 0.5 * 2.0**-11 * largest


def smallest_cosine(path: Path, texts: list) -> float:
    """Of each token's hidden state with PyTorch's."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    smallest = 1.0
    for ids, expected in texts:
        inputs = {"input_ids": ids[None].astype(np.int32), "attention_mask": np.ones((1, len(ids)), np.int32)}
        found = session.run(["last_hidden_state"], inputs)[0][0].astype(np.float32)
        assert np.isfinite(found).all()
        lengths = np.linalg.norm(found, axis=-1) * np.linalg.norm(expected, axis=-1)
        smallest = min(smallest, float(((found * expected).sum(-1) / lengths).min()))
    return smallest


def references(path: Path, infix: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids [tokens], hidden states [tokens, hidden]) of every text that has both."""
    tensors = load_file(path)
    numbers = sorted(int(name.rsplit(".", 1)[1]) for name in tensors if name.startswith(f"hidden{infix}."))
    assert numbers, f"no hidden{infix}.* in {path}"
    return [(tensors[f"ids{infix}.{i}"], tensors[f"hidden{infix}.{i}"]) for i in numbers]


def check_form(path: Path, precision: str, io: str = "int32", token_types: bool = False) -> None:
    """What the contract says of the graph: opset 17, inputs of type `io`, dynamic batch and sequence."""
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(str(path), load_external_data=False)
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    assert opsets == {"": 17}, opsets
    inputs = {value.name: value.type.tensor_type for value in model.graph.input}
    assert list(inputs) == ["input_ids", "attention_mask", "token_type_ids"][: 3 if token_types else 2], list(inputs)
    for tensor in inputs.values():
        assert tensor.elem_type == {"int32": onnx.TensorProto.INT32, "int64": onnx.TensorProto.INT64}[io]
        assert len(tensor.shape.dim) == 2 and all(dim.dim_param for dim in tensor.shape.dim), tensor.shape
    (output,) = model.graph.output
    assert output.name == "last_hidden_state"
    expected = onnx.TensorProto.FLOAT16 if precision == "fp16" else onnx.TensorProto.FLOAT
    assert output.type.tensor_type.elem_type == expected, output.type.tensor_type.elem_type
    for file in ("config.json", "tokenizer.json"):
        assert (path.parent / file).is_file(), f"{file} is not beside {path}"


def largest_difference(path: Path, texts: list, pad_id: int) -> float:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(group: list) -> float:
        longest = max(len(ids) for ids, _ in group)
        ids = np.full((len(group), longest), pad_id, np.int32)
        mask = np.zeros((len(group), longest), np.int32)
        for row, (one, _) in enumerate(group):
            ids[row, : len(one)], mask[row, : len(one)] = one, 1
        (hidden,) = session.run(["last_hidden_state"], {"input_ids": ids, "attention_mask": mask})
        assert hidden.shape[:2] == ids.shape, hidden.shape
        found = [np.abs(hidden[row, : len(one)].astype(np.float32) - expected).max() for row, (one, expected) in enumerate(group)]
        assert np.isfinite(found).all(), found
        return float(max(found))

    return max([run(texts)] + [run([text]) for text in texts])


def typed(path: Path, integers: type) -> tuple[float, float]:
    """Largest difference to PyTorch at real positions of a batch with two token types, and the smallest cosine of mean states."""
    expected = load_file(FIXTURES / "token_types.safetensors")
    inputs = {name: expected[name].astype(integers) for name in ("input_ids", "attention_mask", "token_type_ids")}
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (hidden,) = session.run(["last_hidden_state"], inputs)
    mask = expected["attention_mask"] == 1
    assert np.isfinite(hidden[mask]).all()
    difference, cosines = 0.0, []
    for found, wanted, real in zip(hidden.astype(np.float32), expected["last_hidden_state"], mask):
        difference = max(difference, float(np.abs(found - wanted)[real].max()))
        a, b = found[real].mean(0), wanted[real].mean(0)
        cosines.append(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))
    return difference, min(cosines)


def check_token_types(binary: Path) -> int:
    """Every precision with every type of input and token types; the number of those that are too far off."""
    failures = 0
    bert = FIXTURES / "bert"
    expected = load_file(FIXTURES / "token_types.safetensors")["last_hidden_state"]
    with tempfile.TemporaryDirectory() as output:
        lines, ranges = Path(output, "texts.jsonl"), Path(output, "calibration.json")
        lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in MINILM), encoding="utf-8")
        command = [binary, "calibrate", "--model", bert, "--input", lines, "--output", ranges]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
        for precision, bar in (("fp32", FP32_BAR), ("fp16", fp16_bar(2, [(None, expected)])), ("int8", None)):
            for io, integers in (("int32", np.int32), ("int64", np.int64)):
                more = [] if bar else ["--calibration", str(ranges)]
                path = export(binary, bert, output, precision, "--io", io, "--token-types", *more)
                check_form(path, precision, io, token_types=True)
                difference, cosine = typed(path, integers)
                failed = difference > bar if bar else cosine < INT8_BAR
                failures += failed
                found = f"largest difference {difference:.2e} (bar {bar:.1e})" if bar else f"smallest cosine {cosine:.5f} (bar {INT8_BAR})"
                print(f"bert token types {io} {precision}: checker passes; {found} {'FAILED' if failed else 'ok'}")
    return failures


def export(binary: Path, folder: Path, output: str, precision: str, *more: str) -> Path:
    command = [binary, "export", "--model", folder, "--output", output, "--precision", precision, *more]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    return Path(output) / "model.onnx"


def int8_cosine(binary: Path, folder: Path, texts: list) -> float:
    """Mean cosine of mean-pooled hidden states, the INT8 file's beside PyTorch's."""
    with tempfile.TemporaryDirectory() as output:
        lines, ranges = Path(output, "texts.jsonl"), Path(output, "calibration.json")
        lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in MINILM), encoding="utf-8")
        command = [binary, "calibrate", "--model", folder, "--input", lines, "--output", ranges]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
        path = export(binary, folder, output, "int8", "--calibration", str(ranges))
        check_form(path, "int8")
        options = onnxruntime.SessionOptions()
        # Optimised, ONNX Runtime turns Q/DQ into integer products with another rounding.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        cosines = []
        for ids, expected in texts:
            inputs = {"input_ids": ids[None].astype(np.int32), "attention_mask": np.ones((1, len(ids)), np.int32)}
            a, b = session.run(["last_hidden_state"], inputs)[0][0].mean(0), expected.mean(0)
            cosines.append(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))
        return float(np.mean(cosines))


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--binary", type=Path, default=Path("target/release/trt-embed"), help="default: %(default)s")
    arguments.add_argument("--minilm", type=Path, metavar="DIR", help="folder of all-MiniLM-L6-v2")
    arguments = arguments.parse_args()

    small = FIXTURES / "references.safetensors"
    # (folder, references or None where the stored weights are rounded, pad id, layers)
    models = [
        (FIXTURES / "mpnet", references(small, ".mpnet"), 1, 3),
        (FIXTURES / "bert", references(small, ".bert"), 0, 2),
        (FIXTURES / "mpnet-bf16-shards", None, 1, 3),
        (FIXTURES / "bert-fp16-plain", None, 0, 2),
    ]
    families = FIXTURES / "families.safetensors"
    for name, pad_id in (("xlm-roberta", 1), ("roberta", 1), ("camembert", 4), ("distilbert", 0), ("modernbert", 0), ("nomic_bert", 0),
                         ("gte", 1), ("new", 0)):  # fmt: skip
        models.append((FIXTURES / name, references(families, f".{name}"), pad_id, 3))
    for name in ("jina_bert", "jina_bert_later"):
        models.append((FIXTURES / name, references(families, f".{name}-geglu"), 0, 3))
    if arguments.minilm:
        real = references(FIXTURES / "minilm" / "embeddings.safetensors", "")
        models.append((arguments.minilm, real, 0, 6))

    failures = 0
    print(f"onnx {onnx.__version__}, onnxruntime {onnxruntime.__version__}")
    for folder, texts, pad_id, layers in models:
        for precision in ("fp32", "fp16"):
            with tempfile.TemporaryDirectory() as output:
                path = export(arguments.binary, folder, output, precision)
                check_form(path, precision)
                if texts is None:
                    print(f"{folder.name:20} {precision}: checker passes")
                    continue
                if precision == "fp16" and folder.name in GATED:
                    found = smallest_cosine(path, texts)
                    failures += found < FP16_COSINE
                    verdict = "ok" if found >= FP16_COSINE else "TOO SMALL"
                    print(f"{folder.name:20} fp16: checker passes; smallest cosine to PyTorch {found:.6f} (bar {FP16_COSINE}) {verdict}")
                    continue
                bar = FP32_BAR if precision == "fp32" else fp16_bar(layers, texts)
                found = largest_difference(path, texts, pad_id)
                verdict = "ok" if found <= bar else "TOO LARGE"
                failures += found > bar
                print(f"{folder.name:20} {precision}: checker passes; largest difference to PyTorch {found:.2e} (bar {bar:.1e}) {verdict}")
        if texts is not None:
            found = int8_cosine(arguments.binary, folder, texts)
            verdict = "ok" if found >= INT8_BAR else "TOO SMALL"
            failures += found < INT8_BAR
            print(f"{folder.name:20} int8: checker passes; mean cosine to PyTorch {found:.5f} (bar {INT8_BAR}) {verdict}")
    failures += check_token_types(arguments.binary)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
