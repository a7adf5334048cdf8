#!/usr/bin/env python3
"""Compares the vectors of `trt-embed embed` with those that gpu_references.py wrote: a table by length, and a bar.

    scripts/gpu_references.py models/all-MiniLM-L6-v2
    scripts/gpu_fidelity.py --binary target/release/trt-embed --model models/all-MiniLM-L6-v2 --engine minilm.engine

Exit status 1 when trt-embed fails, counts the tokens of a text otherwise, or gives a cosine below --min-cosine.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np

BANDS = [(1, 16), (17, 64), (65, 128), (129, 256), (257, 512), (513, None)]


def embed(arguments, texts: list[str]) -> tuple[np.ndarray, list[int]]:
    """trt-embed's vectors [texts, dim] in double precision, and its token counts."""
    with tempfile.TemporaryDirectory() as folder:
        # JSON Lines, so that line ends inside texts survive.
        lines = Path(folder, "texts.jsonl")
        lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        command = [str(arguments.binary), "embed", "-m", str(arguments.model), "--backend", arguments.backend]
        command += ["--engine", str(arguments.engine)] if arguments.engine else []
        command += ["-i", str(lines), "--format", "jsonl"]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, encoding="utf-8")
        if run.returncode != 0:
            raise SystemExit(f"exit status {run.returncode} of: {' '.join(command)}")
        rows = [json.loads(line) for line in run.stdout.splitlines()]
    if [row["index"] for row in rows] != list(range(len(texts))):
        raise SystemExit(f"{len(texts)} texts gave {len(rows)} rows, or rows in another order")
    # NaN is no JSON: a program that means it writes null.
    return np.array([row["embedding"] for row in rows], dtype=np.float64), [row["tokens"] for row in rows]


def cosines(ours: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Of each row; 0 for a row that has no direction."""
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(references, axis=1)
    with np.errstate(all="ignore"):
        return np.nan_to_num((ours * references).sum(1) / norms, nan=0.0)


def summary(name: str, chosen: np.ndarray, cosine: np.ndarray, difference: np.ndarray, tokens: np.ndarray) -> dict:
    """Of the texts `chosen`; a difference that is not finite counts as NaN and not in the largest one."""
    difference, cosine, tokens = difference[chosen], cosine[chosen], tokens[chosen]
    finite = np.isfinite(difference)
    worst = int(cosine.argmin())
    return {
        "lengths": name,
        "texts": int(chosen.sum()),
        "min_cosine": float(cosine[worst]),
        "mean_cosine": float(cosine.mean()),
        "max_abs_difference": float(difference[finite].max(initial=0.0)),
        "nan": int((~finite).sum()),
        "worst_text": int(np.flatnonzero(chosen)[worst]),
        "worst_tokens": int(tokens[worst]),
    }


def table(rows: list[dict]) -> str:
    lines = [
        "| tokens | texts | min cosine | mean cosine | max abs difference | NaN | worst text | its tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['lengths']} | {row['texts']} | 1 - {1 - row['min_cosine']:.1e} | 1 - {1 - row['mean_cosine']:.1e} "
            f"| {row['max_abs_difference']:.1e} | {row['nan']} | {row['worst_text']} | {row['worst_tokens']} |"
        )
    return "\n".join(lines)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--binary", type=Path, default="trt-embed", help="the command (default: %(default)s)")
    arguments.add_argument("--model", type=Path, required=True, help="model folder")
    arguments.add_argument("--references", type=Path, metavar="FILE", help="default: references.json in the model folder")
    arguments.add_argument("--engine", type=Path, metavar="FILE", help="engine file, else trt-embed's own choice")
    arguments.add_argument("--backend", default="tensorrt", help="default: %(default)s")
    arguments.add_argument("--min-cosine", type=float, default=0.9999, metavar="C", help="the bar (default: %(default)s)")
    arguments.add_argument("--json", action="store_true", help="prints one JSON object instead of the table")
    arguments = arguments.parse_args()
    file = arguments.references or arguments.model / "references.json"
    if not file.exists():
        raise SystemExit(f"{file} is missing; make it with scripts/gpu_references.py")
    stored = json.loads(file.read_text(encoding="utf-8"))
    references, tokens = np.array(stored["vectors"], dtype=np.float64), np.array(stored["tokens"])
    ours, counted = embed(arguments, stored["texts"])
    if ours.shape != references.shape:
        raise SystemExit(f"vectors are {list(ours.shape)}; the references are {list(references.shape)}")

    cosine, difference = cosines(ours, references), np.abs(ours - references).max(axis=1)
    rows = [summary("all", np.ones(len(tokens), bool), cosine, difference, tokens)]
    for least, most in BANDS:
        chosen = (tokens >= least) & (tokens <= (most or tokens.max()))
        if chosen.any():
            rows.append(summary(f"{least}-{most or ''}", chosen, cosine, difference, tokens))
    miscounted = [i for i, (a, b) in enumerate(zip(counted, stored["tokens"])) if a != b]
    if arguments.json:
        report = {"model": stored["model"], "made_by": stored["made_by"], "bands": rows, "miscounted": miscounted}
        print(json.dumps(report))
    else:
        print(f"{stored['model']} by {arguments.backend} against {stored['made_by']}\n\n{table(rows)}")
    if miscounted:
        i = miscounted[0]
        raise SystemExit(f"{len(miscounted)} texts have other token counts; text {i}: {counted[i]}, not {stored['tokens'][i]}")
    least, nan = rows[0]["min_cosine"], rows[0]["nan"]
    if least < arguments.min_cosine or nan:
        raise SystemExit(f"below the bar: min cosine {least:.7f} (bar {arguments.min_cosine}), {nan} texts with NaN")


if __name__ == "__main__":
    main()
