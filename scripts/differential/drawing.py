"""From a seed to a folder: which aspects have which values."""

import functools
import json
import random
from pathlib import Path

import aspects_encoder
import aspects_modules
import aspects_tokenizer
from folders import Folder

# In the order in which they change a folder; odd spellings of whole files come last.
ASPECTS = aspects_encoder.ASPECTS | aspects_tokenizer.ASPECTS | aspects_modules.ASPECTS
FAMILIES = ("bert", "mpnet")
# Where the reference stumbles over what is clear: to load such a folder is no finding.
LENIENT = {
    ("hidden_act", "null"): "null is as good as absent",
    ("layer_norm_eps", "null"): "null is as good as absent",
    ("layer_norm_eps", "0"): "0 without a point is a number as well",
    ("pooling_mode", "null"): "null is as good as absent",
    ("pooling keys", "no width"): "the encoder's width is known",
    ("modules", "no name"): "nothing depends on a module's name",
    ("prompts", "prompts null"): "null is as good as absent",
    ("config_sentence_transformers.json", "requirements"): "versions of Python packages",
    ("sentence_bert_config.json", "modality_config null"): "null is as good as absent",
    ("tokenizer_args", "null"): "null is as good as absent",
    ("named tokens", "pad_token null"): "rows are padded without a token",
    ("special tokens in tokenizer.json", "absent key"): "an absent list is an empty one",
    ("tokenizer_config keys", "a method's name"): "a name that only Python's class cannot have",
    ("config keys", "chunk_size_feed_forward"): "cuts the work, not the result",
}
REFUSED = Path(__file__).with_name("refused.json")
# How many aspects a folder has.
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

    def lenient(self) -> bool:
        return any(value in LENIENT for value in self.values)

    def without(self, number: int) -> "Spec":
        return Spec(self.family, self.values[:number] + self.values[number + 1 :])


def possible(family: str, aspect: str) -> list[str]:
    return [label for label, change in ASPECTS[aspect].items() if family in getattr(change, "families", FAMILIES)]


def draw(seed: int) -> Spec:
    """The folder of a seed. At most one of its values is refused by itself, and that in one folder of eight: such a value hides the others."""
    generator = random.Random(seed)
    family = generator.choice(FAMILIES)
    aspects = [aspect for aspect in generator.sample(list(ASPECTS), generator.choice(COUNTS)) if possible(family, aspect)]
    values = []
    refused_one = generator.randrange(8) == 0
    for number, aspect in enumerate(aspects):
        labels = possible(family, aspect)
        if not (refused_one and number == 0):
            labels = [label for label in labels if label not in refused().get(aspect, [])] or labels
        values.append((aspect, generator.choice(labels)))
    return Spec(family, values)


@functools.cache
def refused() -> dict:
    """Values that are refused by themselves, by aspect: what `--each --record` found last."""
    return json.loads(REFUSED.read_text(encoding="utf-8")) if REFUSED.exists() else {}


def each(only: list[str] | None = None, both: bool = False) -> list[Spec]:
    """Every value of these aspects (or of all) alone, after a folder of each family without any: in both families, or in turns."""
    specs = [Spec(family, []) for family in FAMILIES]
    turn = 0
    for aspect in only or ASPECTS:
        for label in ASPECTS[aspect]:
            families = [family for family in FAMILIES if label in possible(family, aspect)]
            turn += 1
            specs += [Spec(family, [(aspect, label)]) for family in (families if both else [families[turn % len(families)]])]
    return specs
