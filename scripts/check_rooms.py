#!/usr/bin/env python3
"""Checks that the rooms of src/ depend downward only, and prints what each depends on.

A room is a top-level module; src/tensorrt/ has rooms of its own. ORDER lists them from the ground up: a room may name those before it alone.
What tests need does not count. Fails for a dependency upward or sideways, for a room that is not in the list, and for one of the list that is gone.
"""
import pathlib
import re
import sys

ORDER = [
    "setting", "progress", "error", "trace", "notice", "similarity", "digest", "shared", "files",
    "model", "tokens", "graph", "pooling", "scheduler", "executor", "cpu", "compare", "quantization",
    "cuda", "gpu", "native", "tensorrt::library", "tensorrt::engine_file", "tensorrt::encoder", "tensorrt::make", "tensorrt",
    "embedder", "server",
]
# Not rooms: the crate's root with its facade, and the command, which sees the library from outside.
OUTSIDE = {"lib", "main", "cli"}
# Names that the crate's root gives to what lies in a room.
ROOT_NAMES = {"Error": "error", "Result": "error", "Similarity": "similarity", "Progress": "progress", "NoProgress": "progress", "Setting": "setting",
              "Class": "scheduler", "QueueStatus": "scheduler", "BackendChoice": "embedder", "Embedder": "embedder", "EmbedderBuilder": "embedder", "HiddenStates": "embedder",
              "Submission": "embedder", "SubmitSettings": "embedder"}
SPLIT = {"tensorrt"}


def code(text):
    """`text` without comments, strings, visibilities and test modules."""
    text = re.sub(r'"(?:[^"\\]|\\.)*"', '""', re.sub(r"//[^\n]*", "", text))
    text = re.sub(r"\bpub\((?:super|crate|in [\w:]+)\)", "pub", text)
    kept, position = [], 0
    for test in re.finditer(r"#\[cfg\((?:test|all\(test,[^\]]*)\)\]\s*(?:pub(?:\([a-z]+\))?\s+)?(mod\s+\w+\s*\{|[^;{]*;)", text):
        if test.start() < position:
            continue
        kept.append(text[position : test.start()])
        position = test.end()
        if test.group(1).endswith("{"):
            depth = 1
            while depth and position < len(text):
                depth += {"{": 1, "}": -1}.get(text[position], 0)
                position += 1
    return "".join(kept) + text[position:]


def paths(text):
    """Every path of `text` that begins with crate or super, groups in braces taken apart."""
    for start in re.finditer(r"\b(?:crate|super)\b(?:::super\b)*", text):
        yield from tails(text, start.end(), start.group().split("::"))


def tails(text, position, path):
    step = re.compile(r"\s*::\s*(\w+|\{|\*)").match(text, position)
    if step is None or step.group(1) == "*":
        yield path
        return
    if step.group(1) != "{":
        yield from tails(text, step.end(), path + [step.group(1)])
        return
    position = step.end()
    depth = 1
    at_item = True
    while depth and position < len(text):
        if depth == 1 and at_item and (name := re.compile(r"\s*(\w+)").match(text, position)):
            yield from tails(text, name.end(), path if name.group(1) == "self" else path + [name.group(1)])
            at_item = False
            position = name.end()
            continue
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        at_item = at_item or (depth == 1 and text[position] == ",")
        position += 1


def room_of(module):
    """The room of a module path below the crate's root; None for what is not in a room."""
    if not module:
        return None
    first = ROOT_NAMES.get(module[0], module[0])
    if first in SPLIT and len(module) > 1 and f"{first}::{module[1]}" in ORDER:
        return f"{first}::{module[1]}"
    return first


def main():
    source = pathlib.Path(__file__).resolve().parent.parent / "src"
    uses, faults = {}, []
    for file in sorted(source.rglob("*.rs")):
        module = list(file.relative_to(source).with_suffix("").parts)
        if module[-1] == "mod":
            module.pop()
        if module[0] in OUTSIDE or module[-1] == "tests" or module[-1].endswith("_tests"):
            continue
        room = room_of(module)
        if room not in ORDER:
            faults.append(f"{file.relative_to(source)}: room {room} is not in the list of {sys.argv[0]}")
            continue
        found = uses.setdefault(room, set())
        for path in paths(code(file.read_text(encoding="utf-8"))):
            ups = sum(step == "super" for step in path)
            # Inside an inline module `super` may mean the file itself: such a path stays in its room.
            target = path[1:] if path[0] == "crate" else module[: len(module) - ups] + path[ups:] if ups < len(module) else path[ups:]
            other = room_of(target)
            # The parent of a room of tensorrt only gathers what its rooms offer.
            if other is None or other == room or (room in SPLIT and other.startswith(room + "::")):
                continue
            if other not in ORDER:
                faults.append(f"{file.relative_to(source)}: {'::'.join(path)} is in no room")
                continue
            found.add(other)
            if ORDER.index(other) >= ORDER.index(room):
                faults.append(f"{file.relative_to(source)}: {room} may not use {other} ({'::'.join(path)})")
    faults += [f"no file in room {room}" for room in ORDER if room not in uses]
    for room in ORDER:
        below = sorted(uses.get(room, ()), key=ORDER.index)
        print(f"{room:22} -> {', '.join(below) or '-'}")
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
