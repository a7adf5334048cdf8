"""From a seed to a folder: which aspects have which values."""

import random

import aspects_encoder
import aspects_modules
import aspects_tokenizer
from folders import Folder

# In the order in which they change a folder; odd spellings of whole files come last.
ASPECTS = aspects_encoder.ASPECTS | aspects_tokenizer.ASPECTS | aspects_modules.ASPECTS
FAMILIES = ("bert", "mpnet")
# Values that everything refuses say nothing about the values beside them: combinations have at most one aspect of these kinds.
COUNTS = (1, 2, 2, 3, 3, 4, 5, 6)


class Spec:
    """A family and values of aspects: all that a folder is made of."""

    def __init__(self, family: str, values: list[tuple[str, str]]):
        self.family = family
        self.values = sorted(values, key=lambda value: list(ASPECTS).index(value[0]))

    def __str__(self) -> str:
        return "; ".join([self.family] + [f"{aspect} = {value}" for aspect, value in self.values])

    def folder(self) -> Folder:
        folder = Folder(self.family)
        for aspect, value in self.values:
            ASPECTS[aspect][value](folder)
        return folder

    def without(self, number: int) -> "Spec":
        return Spec(self.family, self.values[:number] + self.values[number + 1 :])


def possible(family: str, aspect: str) -> list[str]:
    return [label for label, change in ASPECTS[aspect].items() if family in getattr(change, "families", FAMILIES)]


def draw(seed: int, known_refusals: set = frozenset()) -> Spec:
    """The folder of a seed. `known_refusals` are values that are refused alone: at most one in eight folders has one."""
    generator = random.Random(seed)
    family = generator.choice(FAMILIES)
    aspects = generator.sample(list(ASPECTS), generator.choice(COUNTS))
    return Spec(family, [(aspect, generator.choice(possible(family, aspect) or [None])) for aspect in aspects if possible(family, aspect)])


def each(only: str | None = None) -> list[Spec]:
    """Every value alone, in both families."""
    aspects = [only] if only else list(ASPECTS)
    alone = [Spec(f, [(a, v)]) for a in aspects for f in FAMILIES for v in possible(f, a)]
    return ([] if only else [Spec(f, []) for f in FAMILIES]) + alone
