#!/usr/bin/env python3
"""Tokenising beside transformers' fast tokenizer, one text a call, on one core, after benches/tokens.rs in the same run.

    pip install transformers
    cargo build --release --no-default-features --bench tokens
    taskset -c 1 benches/peers/tokens.py TOKENIZER.json [--texts 200000]

The benchmark compares ids and times itself and the `tokenizers` crate; its texts then go through `PreTrainedTokenizerFast`, cut at the same limits.
Medians of 9 rounds."""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import tempfile
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"
ROUNDS = 9


def newest_benchmark() -> pathlib.Path:
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", "target")) / "release/deps"
    found = [file for file in target.glob("tokens-*") if file.suffix == "" and os.access(file, os.X_OK)]
    if not found:
        raise SystemExit(f"{target} has no benchmark; build it: cargo build --release --no-default-features --bench tokens")
    return max(found, key=lambda file: file.stat().st_mtime)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer")
    parser.add_argument("--texts", default="20000")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        written = os.path.join(folder, "timed.json")
        subprocess.run([newest_benchmark(), arguments.tokenizer, "--texts", arguments.texts, "--write", written], check=True)
        with open(written, encoding="utf-8") as file:
            timed = json.load(file)
    # Slow to import: after the benchmark.
    from transformers import PreTrainedTokenizerFast, __version__

    fast = PreTrainedTokenizerFast(tokenizer_file=arguments.tokenizer)
    print(f"\ntransformers {__version__}\n\n| texts | limit | trt-embed, us a text | transformers, us a text | times faster |\n|---|---|---|---|---|")
    for case in timed:
        times = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            for text in case["texts"]:
                fast(text, truncation=True, max_length=case["limit"])
            times.append((time.perf_counter() - start) * 1e6 / len(case["texts"]))
        peer = statistics.median(times)
        print(f"| {case['kind']} | {case['limit']} | {case['own']:.2f} | {peer:.1f} | {peer / case['own']:.0f} |")


if __name__ == "__main__":
    main()
