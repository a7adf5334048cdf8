"""The committed set: folders that cover every value, with the reference's vectors or the refusal to expect, for tests/differential.rs.

A folder that loads has a few values of each of several groups, so that some dozens of folders hold them all; `--each` has tried every
value alone. A value that is refused has a line of its own.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path

import aspects_encoder
import aspects_modules
import numpy as np
import sentence_transformers
import torch
import transformers
from compare import BOTH_REFUSE, EQUAL, REFUSED_HERE, quiet
from drawing import FAMILIES, Spec
from folders import FIXTURES, base, edits, plain
from safetensors.numpy import save_file as save_rows
from safetensors.torch import save_file
from texts import TEXTS

TARGET = FIXTURES / "differential"
SIZE_LIMIT = 400_000  # bytes of the set
INLINE = 1200  # bytes of a file's text that stay in cases.json; a longer one becomes a file that cases share
TEXTS_A_VALUE = 1  # rows kept for each value: those that it moves most
# Values of one folder: how many of each group.
GROUPS = {"encoder": 1, "tokenizer": 3, "modules": 2}
# Aspects that take the place of what the other values of their group set.
EXCLUSIVE = {"tokenizer_class", "tokenizer kind", "tokenizer_config.json", "tokenizer files", "adapter", "modules", "dense"}


def group(aspect: str) -> str:
    if aspect in aspects_encoder.ASPECTS:
        return "encoder"
    return "modules" if aspect in aspects_modules.ASPECTS else "tokenizer"


def case_files(spec: Spec) -> tuple[dict, dict, dict]:
    """The case's line in cases.json, further JSON files by name, tensors by name."""
    folder, before = spec.folder(), base(spec.family)[0]
    line = {"name": str(spec), "base": spec.family, "edits": {}, "removed": [], "files": {}, "weights": folder.weights}
    line |= {"parts": {path: name for path, (name, _) in folder.parts.items()}, "encoder": folder.encoder}
    line["removed"] = [path for path in before if path not in folder.json and path not in folder.raw]
    shared = {}
    for path in {**folder.json, **folder.raw}:
        compact = path not in folder.raw and json.dumps(folder.json[path], ensure_ascii=False, separators=(",", ":"))
        if path in before and compact and plain(folder.json[path]):
            changes = edits(before[path], folder.json[path])
            if len(json.dumps(changes)) < INLINE:
                if changes:
                    line["edits"][path] = changes
                continue
        text = compact or folder.raw[path]
        if len(text) < INLINE:
            line["files"][path] = text
        else:
            name = hashlib.sha256(text.encode()).hexdigest()[:12] + Path(path).suffix
            shared[name] = text
            line["parts"][path] = name
    return {key: value for key, value in line.items() if value or key in ("name", "base")}, shared, dict(folder.parts.values())


def moved(found: list, still: list, count: int) -> set[int]:
    """The `count` texts that values move most. `found`: the rows with them; `still`: those of the folder without any."""
    distances = {}
    for i, (a, b) in enumerate(zip(found, still)):
        if a is not None and b is not None:
            distances[i] = float("inf") if a.shape != b.shape else float(np.abs(a - b).max())
    order = sorted(distances, key=lambda i: (-distances[i], i))
    return {i for i in order[:count] if distances[i] > 1e-5}


def combine(values: list[tuple[str, str]], family: str) -> list[Spec]:
    """As few folders as hold every value: at most GROUPS values of each group, no aspect twice, an EXCLUSIVE one alone in its group."""
    waiting = {name: [value for value in values if group(value[0]) == name] for name in GROUPS}
    specs = []
    while any(waiting.values()):
        taken: list[tuple[str, str]] = []
        for name, count in GROUPS.items():
            room = count
            for value in list(waiting[name]):
                cost = count if value[0] in EXCLUSIVE else 1
                if cost <= room and value[0] not in dict(taken):
                    taken.append(value)
                    waiting[name].remove(value)
                    room -= cost
        specs.append(Spec(family, taken))
    return specs


def expected_words(outcome_message: str, line: dict) -> list[str]:
    """The file (or the first thing in quotes), and the key where the message names one of those that the case sets."""
    named = re.search(r"[\w.-]+\.(json|safetensors|txt|bin)\b", outcome_message) or re.search(r'"[^"]+"', outcome_message)
    words = [named.group()] if named else []
    for changes in line.get("edits", {}).values():
        for pointer, *_ in changes:
            key = pointer.rsplit("/", 1)[-1]
            if key and not key.isdigit() and key in outcome_message:
                return words + [key]
    return words


def choose(outcomes: list) -> tuple[list[Spec], list]:
    """Specs that load, combined, and (spec, outcome) of those refused, each in one family: outcomes of every value alone."""
    loads, refused = {}, {}
    for _, spec, outcome in outcomes:
        key = spec.values[0] if spec.values else None
        if key and outcome.kind == EQUAL:
            loads.setdefault(key, []).append(spec.family)
        elif key and outcome.kind in (REFUSED_HERE, BOTH_REFUSE):
            refused.setdefault(key, []).append((spec, outcome))
    # Values that load in both families take turns.
    by_family = {family: [] for family in FAMILIES}
    for i, (key, families) in enumerate(sorted(loads.items())):
        by_family[families[i % len(families)]].append(key)
    combined = [spec for family in FAMILIES for spec in combine(by_family[family], family)]
    return combined, [found[0] for key, found in sorted(refused.items()) if key not in loads]


def write(outcomes: list, run) -> list:
    """Writes the set. `outcomes`: every value alone. `run(specs)`: outcomes of further specs. Returns those that are findings."""
    quiet()
    combined, refused = choose(outcomes)
    alone = {str(spec): outcome.rows for _, spec, outcome in outcomes}
    shutil.rmtree(TARGET, ignore_errors=True)
    (TARGET / "parts").mkdir(parents=True)
    for family in FAMILIES:
        (TARGET / family).mkdir()
        text = json.dumps(base(family)[0]["tokenizer.json"], ensure_ascii=False, separators=(",", ":"))
        (TARGET / family / "tokenizer.json").write_text(text, encoding="utf-8")

    lines, tensors, findings = [], {}, []
    loaded: list = []

    def keep(found, single: bool) -> None:
        for _, spec, outcome in found:
            if outcome.kind == EQUAL:
                loaded.append((spec, outcome))
            elif outcome.kind not in (REFUSED_HERE, BOTH_REFUSE):
                findings.append((str(spec), spec, outcome))
            elif single:
                refused.append((spec, outcome))
            else:  # refused together: each goes alone
                keep(run([Spec(spec.family, [value]) for value in spec.values]), True)

    keep(run([Spec(family, []) for family in FAMILIES] + combined), False)
    bare = {spec.family: outcome.rows for spec, outcome in loaded if not spec.values}
    for spec, outcome in loaded:
        line = add(spec)
        # What each value moves most, and what all together do.
        still = bare[spec.family]
        numbers = {5} | moved(outcome.rows, still, 2) if spec.values else {1, 5, 9, 24}
        for value in spec.values:
            numbers |= moved(alone.get(str(Spec(spec.family, [value])), []), still, TEXTS_A_VALUE)
        have = [i for i, row in enumerate(outcome.rows) if row is not None]
        numbers = sorted(numbers & set(have)) or have[:2]
        line["texts"] = numbers
        tensors[line["name"]] = np.stack([outcome.rows[i] for i in numbers])
        lines.append(line)
    for spec, outcome in refused:
        line = add(spec)
        line["refusal"] = expected_words(outcome.message.split("\n")[0], line)
        lines.append(line)
    save_rows(tensors, TARGET / "references.safetensors")
    made_by = f"sentence-transformers {sentence_transformers.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    texts = ",\n".join("    " + json.dumps(text) for text in TEXTS)
    body = ",\n".join("    " + json.dumps(line, ensure_ascii=False, separators=(",", ":")) for line in lines)
    document = f'{{\n  "made_by": "{made_by}",\n  "texts": [\n{texts}\n  ],\n  "cases": [\n{body}\n  ]\n}}\n'
    json.loads(document)
    (TARGET / "cases.json").write_text(document, encoding="utf-8")
    size = sum(file.stat().st_size for file in TARGET.rglob("*") if file.is_file())
    print(f"{TARGET}: {len(tensors)} folders that load, {len(lines) - len(tensors)} refused, {size} bytes")
    assert size < SIZE_LIMIT, size
    return findings


def add(spec: Spec) -> dict:
    """Writes the case's shared files and returns its line."""
    line, texts, tensors = case_files(spec)
    for name, text in texts.items():
        (TARGET / "parts" / name).write_text(text, encoding="utf-8")
    for name, part in tensors.items():
        save_file(part, TARGET / "parts" / name)
    return line
