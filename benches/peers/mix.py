"""The texts of `trt-embed bench`, as src/cli/mix.rs and src/cli/bench.rs make them: peers do the same work."""

import math

WORDS = (
    "the of and in to was for on with time city water house music year school "
    "river war team book world group state song line day film church road game life work"
).split()
SEED = 20_250_101
SPECIAL_TOKENS = 2  # a text of n - 2 words has n tokens in the usual English vocabularies


class Seeded:
    """SplitMix64 and what mix.rs draws from it."""

    MASK = (1 << 64) - 1

    def __init__(self, seed: int):
        self.state = seed

    def next(self) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) & self.MASK
        z = ((self.state ^ (self.state >> 30)) * 0xBF58476D1CE4E5B9) & self.MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & self.MASK
        return z ^ (z >> 31)

    def unit(self) -> float:
        return (self.next() >> 11) / (1 << 53)

    def normal(self) -> float:
        return math.sqrt(-2.0 * math.log(1.0 - self.unit())) * math.cos(math.tau * self.unit())

    def length(self, limit: int) -> int:
        kind = self.unit()
        if kind < 0.5:
            length, most = 12.0 * math.exp(0.5 * self.normal()), 64
        elif kind < 0.9:
            length, most = 90.0 * math.exp(0.6 * self.normal()), 384
        else:
            length, most = 300.0 + 120.0 * self.normal(), 512
        return min(max(math.floor(length + 0.5), 3), most, limit)

    def text(self, words: int) -> str:
        return " ".join(WORDS[(self.next() * len(WORDS)) >> 64] for _ in range(words))


def mixed_texts(count: int, limit: int) -> list[str]:
    """The texts of `trt-embed bench --mixed COUNT` for a model that takes `limit` tokens."""
    seeded = Seeded(SEED)
    return [seeded.text(max(seeded.length(limit) - SPECIAL_TOKENS, 0)) for _ in range(count)]
