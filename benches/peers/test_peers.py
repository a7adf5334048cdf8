#!/usr/bin/env python3
"""Tests of the benchmark's own parts on the CPU: seeded texts, the encoder beside transformers, how texts are spread over shapes.

    pip install numpy torch transformers
    benches/peers/test_peers.py
"""

import itertools
import random
import unittest
from pathlib import Path

import numpy as np
import torch
import transformers
from captured import Captured, Spread, spread
from encoder import Encoder
from gpu import Eager, load
from mix import SPECIAL_TOKENS, Seeded, mixed_texts
from report import percentiles

FIXTURES = Path(__file__).resolve().parent.parent.parent / "tests" / "fixtures"
CPU = torch.device("cpu")


def random_rows(model, lengths: list[int], generator) -> list[np.ndarray]:
    """Ids without special tokens: transformers' MPNet gives the padding id no position."""
    return [generator.integers(5, model.config.vocab_size, length, dtype=np.int32) for length in lengths]


class Mix(unittest.TestCase):
    def test_generator(self):
        # As in the test of src/cli/mix.rs.
        seeded = Seeded(1234567)
        self.assertEqual([seeded.next() for _ in range(3)], [6457827717110365317, 3203168211198807973, 9817491932198370423])

    def test_texts_are_those_of_trt_embed_bench(self):
        # Texts, limit, tokens: as `trt-embed bench --mixed` counted them (benches/RESULTS.md).
        for count, limit, tokens in [(64, 256, 3982), (128, 256, 8628)]:
            self.assertEqual(sum(len(text.split()) + SPECIAL_TOKENS for text in mixed_texts(count, limit)), tokens)

    def test_limit(self):
        lengths = [Seeded(seed).length(24) for seed in range(1000)]
        self.assertTrue(3 <= min(lengths) and max(lengths) == 24)


class Speed(unittest.TestCase):
    def test_percentiles_are_nearest_ranks(self):
        self.assertEqual(
            percentiles([float(i) for i in range(1000, 0, -1)]), {"p50": 500, "p90": 900, "p99": 990, "p999": 999, "max": 1000}
        )
        self.assertEqual(percentiles([1.5]), dict.fromkeys(["p50", "p90", "p99", "p999", "max"], 1.5))

    def test_spread_is_the_cheapest(self):
        draw = random.Random(1)
        for _ in range(200):
            lengths = [draw.randint(1, 20) for _ in range(draw.randint(1, 7))]
            costs = {(draw.randint(1, 4), seq): draw.uniform(1, 9) for seq in (5, 12, 20)}
            batches = spread(lengths, costs)
            self.assertEqual(sorted(text for _, texts in batches for text in texts), list(range(len(lengths))))
            for (rows, seq), texts in batches:
                self.assertTrue(0 < len(texts) <= rows and all(lengths[text] <= seq for text in texts))
            self.assertAlmostEqual(sum(costs[shape] for shape, _ in batches), self.cheapest(lengths, costs))
        with self.assertRaises(SystemExit):
            spread([3, 21], {(4, 20): 1.0})

    def cheapest(self, lengths: list[int], costs: dict) -> float:
        """Over all multisets of shapes: one holds the texts when the longest text always finds a row, longest rows first."""
        cost = float("inf")
        for count in range(1, len(lengths) + 1):
            for shapes in itertools.combinations_with_replacement(costs, count):
                rows = sorted((seq for batch, seq in shapes for _ in range(batch)), reverse=True)
                texts = sorted(lengths, reverse=True)
                if len(rows) >= len(texts) and all(row >= text for row, text in zip(rows, texts)):
                    cost = min(cost, sum(costs[shape] for shape in shapes))
        return cost


class Fidelity(unittest.TestCase):
    def test_encoder_equals_transformers(self):
        generator = np.random.default_rng(1)
        for name in ("mpnet", "bert", "xlm-roberta", "modernbert"):
            model = load(FIXTURES / name, torch.float32)
            eager, encoder = Eager(model, CPU), Encoder(model, CPU, torch.float32)
            for lengths in ([1], [16], [90], [3, 90, 17], [5, 5], [64, 1, 2, 33]):
                rows = random_rows(model, lengths, generator)
                captured = Captured(encoder, len(rows), max(lengths))
                captured.staging.fill(rows)
                captured.enqueue(captured.staging)
                for row, ours in zip(rows, captured.staging.vectors):
                    theirs = eager(row[None], np.array([len(row)]))[0]
                    self.assertLess(np.abs(ours - theirs).max(), 1e-5, (name, lengths))

    def test_spread_keeps_the_order_and_empty_rows_are_finite(self):
        model = load(FIXTURES / "mpnet", torch.float32)
        eager, encoder = Eager(model, CPU), Encoder(model, CPU, torch.float32)
        rows = random_rows(model, [3, 40, 7, 120, 9, 2, 64, 65, 11], np.random.default_rng(2))
        costs = {(4, 16): 1.0, (2, 64): 1.5, (4, 128): 4.0}  # nine texts never fill even batches
        run = Spread({shape: Captured(encoder, *shape) for shape in costs}, costs, rows)
        self.assertTrue(any(len(texts) < captured.batch for captured, _, texts in run.batches))
        for _ in range(2):
            vectors = run.run()
            for row, ours in zip(rows, vectors):
                self.assertLess(np.abs(ours - eager(row[None], np.array([len(row)]))[0]).max(), 1e-5)
        self.assertTrue(all(np.isfinite(staging.vectors).all() for _, staging, _ in run.batches))

    def test_eager_ignores_padding(self):
        model = load(FIXTURES / "bert", torch.float32)
        eager = Eager(model, CPU)
        ids = np.random.default_rng(3).integers(5, model.config.vocab_size, (2, 30), dtype=np.int32)
        both = eager(ids, np.array([30, 11]))
        self.assertLess(np.abs(both[1] - eager(ids[1:, :11], np.array([11]))[0]).max(), 1e-5)


if __name__ == "__main__":
    transformers.logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    unittest.main()
