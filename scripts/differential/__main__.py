#!/usr/bin/env python3
"""Differential test: seeded model folders through the binary and through sentence-transformers.

    pip install torch sentence-transformers peft
    python scripts/differential --binary target/debug/trt-embed --each              # every value of every aspect alone
    python scripts/differential --binary target/debug/trt-embed --count 300 --seed 1  # seeds 1 to 300, aspects combined

Both load the folder: the vectors must agree. sentence-transformers refuses: the binary must, with a message that names a file. The
binary alone refuses: counted, with the reason. Anything else is a finding, and the exit code is 1.
"""

import argparse
import json
import multiprocessing
import re
import sys
from collections import Counter
from pathlib import Path

from drawing import ASPECTS, REFUSED, Spec, draw, each


def all_outcomes(binary: str, specs: list, keep: str | None, jobs: int):
    """The outcome of each spec, in order."""
    from compare import quiet, work

    tasks = [(binary, name, spec, keep) for name, spec in specs]
    quiet()
    if jobs == 1 or len(tasks) < 3:
        yield from map(work, tasks)
        return
    # Forked: PyTorch is imported once.
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from pool.imap(work, tasks)


def shrink(binary: str, spec: Spec, keep: str | None) -> None:
    """Drops values one by one while the outcome stays of its kind, and prints the smallest set."""
    from compare import work

    _, _, outcome = work((binary, "shrink", spec, None))
    print(f"{spec}\n    {outcome.kind}: {outcome.detail}")
    number = 0
    while number < len(spec.values):
        _, _, smaller = work((binary, "shrink", spec.without(number), None))
        if smaller.kind == outcome.kind:
            spec, outcome = spec.without(number), smaller
        else:
            number += 1
    work((binary, f"shrunk {spec}", spec, keep))
    print(f"shrunk to: {spec}\n    {outcome.kind}: {outcome.detail}\n    said: {outcome.message}")


def reason(message: str) -> str:
    """A refusal's message without what differs from folder to folder."""
    first = message.split("\n")[0]
    return re.sub(r"\d+(\.\d+)?", "N", first.removeprefix("error: "))[:160]


def record(outcomes: list) -> None:
    """Writes which values are refused by themselves, in either family."""
    from compare import BOTH_REFUSE, REFUSED_HERE

    values = sorted({spec.values[0] for _, spec, outcome in outcomes if outcome.kind in (BOTH_REFUSE, REFUSED_HERE)})
    by_aspect: dict[str, list] = {}
    for aspect, label in values:
        by_aspect.setdefault(aspect, []).append(label)
    REFUSED.write_text(json.dumps(by_aspect, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def parse(text: str) -> Spec:
    """A folder as `str(Spec)` prints it."""
    family, *values = [part.strip() for part in text.split(";")]
    return Spec(family, [tuple(part.strip() for part in value.split(" = ", 1)) for value in values])


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--binary", required=True, metavar="PATH", help="trt-embed")
    arguments.add_argument("--count", type=int, default=100, help="folders to try")
    arguments.add_argument("--seed", type=int, default=1, help="the first one's seed; the others follow")
    arguments.add_argument("--each", action="store_true", help="every value of every aspect alone, instead of seeds")
    arguments.add_argument("--both", action="store_true", help="with --each and --only: in both families, not in turns")
    arguments.add_argument("--only", metavar="ASPECT", choices=list(ASPECTS), action="append", help="as --each, with this aspect (repeat it)")
    arguments.add_argument("--keep", metavar="DIR", help="keep the folders of findings there")
    arguments.add_argument("--shrink", type=int, metavar="SEED", help="make this seed's finding small")
    arguments.add_argument("--folder", metavar="TEXT", help="one folder as the report names it: `bert; weights = F16; dense = two`")
    arguments.add_argument("--record", action="store_true", help="with --each: write refused.json, which drawing.py reads")
    arguments.add_argument("--fixtures", action="store_true", help="with --each: write tests/fixtures/differential")
    arguments.add_argument("--log", metavar="FILE", help="one JSON line for each folder")
    arguments.add_argument("--jobs", type=int, default=2, help="processes")
    arguments = arguments.parse_args()
    if arguments.keep:
        Path(arguments.keep).mkdir(parents=True, exist_ok=True)

    if arguments.shrink is not None or arguments.folder:
        shrink(arguments.binary, parse(arguments.folder) if arguments.folder else draw(arguments.shrink), arguments.keep)
        return 0
    if arguments.each or arguments.only:
        specs = [(str(spec), spec) for spec in each(arguments.only, arguments.both)]
    else:
        specs = [(f"seed {seed}", draw(seed)) for seed in range(arguments.seed, arguments.seed + arguments.count)]

    from compare import BOTH_REFUSE, EQUAL, FINDINGS, LENIENT, REFUSED_HERE

    kinds, refused, refused_texts, findings, outcomes = Counter(), {}, Counter(), [], []
    log = open(arguments.log, "w", encoding="utf-8") if arguments.log else None
    for name, spec, outcome in all_outcomes(arguments.binary, specs, arguments.keep, arguments.jobs):
        kinds[outcome.kind] += 1
        outcomes.append((name, spec, outcome))
        refused_texts.update({reason(text) for text in outcome.texts})
        if outcome.kind == REFUSED_HERE:
            refused.setdefault(reason(outcome.message), []).append(name)
        if outcome.kind in FINDINGS:
            findings.append((name, spec, outcome))
            print(f"{outcome.kind} {name}: {spec}\n    {outcome.detail}\n    said: {outcome.message[:300]}", flush=True)
        if log:
            line = {"name": name, "spec": str(spec), "kind": outcome.kind, "detail": outcome.detail, "said": outcome.message}
            log.write(json.dumps(line, ensure_ascii=False) + "\n")
            log.flush()

    if arguments.record:
        record(outcomes)
    if arguments.fixtures:
        import fixtures

        run = lambda more: all_outcomes(arguments.binary, [(str(spec), spec) for spec in more], arguments.keep, arguments.jobs)  # noqa: E731
        findings += fixtures.write(outcomes, run)

    print(f"\ntried            {sum(kinds.values())}\nequal            {kinds[EQUAL]}\nboth refuse      {kinds[BOTH_REFUSE]}")
    print(f"only loads here  {kinds[LENIENT]}  (drawing.py says why)\nrefused here     {kinds[REFUSED_HERE]}")
    for why, names in sorted(refused.items(), key=lambda item: -len(item[1])):
        print(f"  {len(names):4}  {why}   (e.g. {names[0]})")
    for why, count in refused_texts.most_common():
        print(f"  {count:4}  folders of which one text is refused: {why}")
    print(f"findings         {len(findings)}  " + ", ".join(f"{kind} {kinds[kind]}" for kind in FINDINGS))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
