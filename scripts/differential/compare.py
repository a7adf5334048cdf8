"""One folder through sentence-transformers and through the binary, and what the two have to say to each other."""

import json
import logging
import os
import re
import shutil
import subprocess
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "critical"}

import numpy as np
import torch
import transformers
from sentence_transformers import SentenceTransformer
from texts import TEXTS

MIN_COSINE = 0.999999
MAX_DIFFERENCE = 1e-5  # of a component, as a part of the reference's length
TIMEOUT = 60  # seconds

# Kinds of outcomes; the last three are findings.
EQUAL, BOTH_REFUSE, REFUSED_HERE, LENIENT = "equal", "both refuse", "refused here", "lenient"
DIFFERS, LOADS_HERE, FAULT = "DIFFERS", "LOADS HERE", "FAULT"
FINDINGS = (DIFFERS, LOADS_HERE, FAULT)


def quiet() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity(logging.CRITICAL)
    torch.set_num_threads(1)


@dataclass
class Reference:
    """What sentence-transformers makes of a folder, text by text: a row, or why there is none."""

    refusal: str = ""
    rows: list = field(default_factory=list)
    failures: dict = field(default_factory=dict)  # by text number


@dataclass
class Outcome:
    kind: str
    detail: str = ""
    message: str = ""  # the binary's, for refusals
    rows: list = field(default_factory=list)  # the reference's
    texts: list = field(default_factory=list)  # refusals of single texts that the reference encodes


def short(error: Exception) -> str:
    first = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {first}"[:200]


def reference(folder: Path) -> Reference:
    """Vectors in float32 of one text at a time: padding in a batch changes what MPNet makes of a literal padding token."""
    try:
        # Stored half types are widened: the reference is what exact arithmetic on the stored weights comes closest to.
        model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    except Exception as error:  # whatever it raises is a refusal
        return Reference(refusal=short(error))
    result, found = _rows(model, range(len(TEXTS))), Reference()
    beyond = [i for i, row in result.items() if isinstance(row, (IndexError, RuntimeError))]
    if beyond:
        # Its limit may be above the position table, where it crashes: the text is then taken as cut to the table.
        first = 2 if model[0].config.model_type == "mpnet" else 0  # MPNet's positions start behind padding id 1
        limit = model[0].config.max_position_embeddings - first
        if (model.max_seq_length or 10**9) > limit:
            model.max_seq_length = limit
            result |= _rows(model, beyond)
    for i, row in result.items():
        if isinstance(row, Exception):
            found.failures[i] = short(row)
        elif not np.isfinite(row).all():
            found.failures[i] = "the reference is not finite"
    found.rows = [None if i in found.failures else result[i].astype(np.float32) for i in range(len(TEXTS))]
    return found


def _rows(model, numbers) -> dict:
    rows = {}
    for i in numbers:
        try:
            rows[i] = model.encode([TEXTS[i]], show_progress_bar=False)[0]
            assert rows[i].dtype == np.float32, rows[i].dtype
        except Exception as error:
            rows[i] = error
    return rows


def run_binary(binary: str, folder: Path, texts: list[str]) -> tuple[int, list, str]:
    """Exit code, rows and what it said."""
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        file.flush()
        command = [binary, "embed", "-m", str(folder), "-i", file.name, "--format", "jsonl", "--backend", "cpu"]
        environment = os.environ | {"RAYON_NUM_THREADS": "1", "RUST_BACKTRACE": "0"}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=environment)
        except subprocess.TimeoutExpired:
            return -1, [], f"no end after {TIMEOUT} s"
    rows = [np.array(json.loads(line)["embedding"], np.float32) for line in done.stdout.splitlines()] if done.returncode == 0 else []
    lines = [line for line in done.stderr.splitlines() if not line.startswith("trt-embed: backend")]
    said = "\n".join(sorted(lines, key=lambda line: " WARN " in line))  # what it refuses comes before what it only notes
    return done.returncode, rows, said.replace(str(folder), "FOLDER").replace(file.name, "TEXTS").strip()


def _refusal(code: int, said: str) -> str:
    """Empty for an orderly refusal, else what is wrong with it."""
    if code != 1:
        return f"exit {code}"
    if "panicked" in said:
        return "panic"
    if not said:
        return "nothing said"
    return "" if re.search(r"\.(json|safetensors|txt)|FOLDER", said.split("\n")[0]) else "names no file"


def compare(binary: str, folder: Path) -> Outcome:
    ours_on = lambda texts: run_binary(binary, folder, texts)  # noqa: E731
    truth = reference(folder)
    if truth.refusal:
        code, _, said = ours_on(TEXTS[:2])
        if code == 0:
            return Outcome(LOADS_HERE, truth.refusal, said)
        wrong = _refusal(code, said)
        return Outcome(FAULT if wrong else BOTH_REFUSE, wrong or truth.refusal, said)

    kept = [i for i in range(len(TEXTS)) if i not in truth.failures]
    refused_texts: list[str] = []
    said = ""
    while kept:
        code, rows, said = ours_on([TEXTS[i] for i in kept])
        if code == 0:
            found = _differences([truth.rows[i] for i in kept], rows, kept)
            if found:
                return Outcome(DIFFERS, found, said, truth.rows, refused_texts)
            break
        # A refusal of one text: the others are compared without it.
        one = _refused_text(said, kept, ours_on) if code == 1 and len(refused_texts) < 3 else None
        if one is None:
            wrong = _refusal(code, said)
            return Outcome(FAULT if wrong else REFUSED_HERE, wrong, said, truth.rows)
        kept.remove(one)
        refused_texts.append(re.sub(r"line \d+", "line", said.split("\n")[0]))
    # What the reference cannot encode must not get a vector here.
    for i, why in list(truth.failures.items())[:2]:
        code, _, said = ours_on([TEXTS[i]])
        if code == 0:
            return Outcome(LOADS_HERE, f"text {i}: {why}", said, truth.rows)
        if code != 1 or not said:
            return Outcome(FAULT, f"text {i}: exit {code}", said, truth.rows)
    if not kept:
        return Outcome(BOTH_REFUSE, "every text: " + next(iter(truth.failures.values())), said)
    rows = [row if i in kept else None for i, row in enumerate(truth.rows)]
    return Outcome(EQUAL, message=said, rows=rows, texts=refused_texts)


def _refused_text(said: str, kept: list, ours_on) -> int | None:
    """The number of the text whose line the message names, counted from 1, if that text alone is refused."""
    named = re.search(r"TEXTS: line (\d+)", said)
    place = int(named[1]) - 1 if named else -1
    if 0 <= place < len(kept) and ours_on([TEXTS[kept[place]]])[0] == 1:
        return kept[place]
    return None


def _differences(expected: list, actual: list, numbers: list) -> str:
    """Empty where all rows agree, else the figures."""
    if len(expected) != len(actual):
        return f"{len(actual)} rows for {len(expected)} texts"
    if any(e.shape != a.shape for e, a in zip(expected, actual)):
        return f"{actual[0].shape[0]} values, {expected[0].shape[0]} in the reference"
    worst, far, bad = 1.0, 0.0, []
    for number, e, a in zip(numbers, expected, actual):
        e, a = e.astype(np.float64), a.astype(np.float64)
        length = np.linalg.norm(e)
        if length < 1e-12:  # no direction: the rows must be equal
            cosine, difference = 1.0, float(np.abs(a).max())
        else:
            cosine = float(e @ a / length / max(np.linalg.norm(a), 1e-300))
            difference = float(np.abs(e - a).max() / length)
        worst, far = min(worst, cosine), max(far, difference)
        if not (cosine >= MIN_COSINE and difference <= MAX_DIFFERENCE):
            bad.append(number)
    return f"min cosine {worst:.6f}, max difference {far:.1e} of the length, texts {bad if len(bad) < len(numbers) else 'all'}" if bad else ""


def work(task: tuple) -> tuple:
    """One folder: written, compared, removed or kept."""
    binary, name, spec, keep = task
    quiet()
    with tempfile.TemporaryDirectory() as parent:
        root = Path(parent) / "model"
        root.mkdir()
        try:
            spec.folder().write(root)
            outcome = compare(binary, root)
        except Exception as error:
            outcome = Outcome(FAULT, f"in this script: {type(error).__name__}: {error}")
        if outcome.kind == LOADS_HERE and spec.lenient():
            outcome.kind = LENIENT
        if keep and outcome.kind in FINDINGS:
            shutil.copytree(root, Path(keep) / re.sub(r"\W+", "-", name), dirs_exist_ok=True)
    return name, spec, outcome
