#!/usr/bin/env python3
"""Writes what sentence-transformers makes of over 200 texts of all lengths in fp32: the reference of the GPU's fidelity.

    pip install torch sentence-transformers
    scripts/gpu_references.py models/all-MiniLM-L6-v2     # writes models/all-MiniLM-L6-v2/references.json

Runs on the GPU where there is one, else on the CPU. Full fp32: TF32 off, plain attention; one text at a time, so that padding
plays no part. Texts are those of fixture_texts.py and seeded ones of their words, from three tokens to beyond the model's limit,
with the lengths around powers of two, where buckets begin and end.

The file: {"model": name, "made_by": versions, "dim": n, "texts": […], "tokens": […], "vectors": [[…], …]}; `tokens` has each
text's count, special tokens included, cut at the limit.
"""

import argparse
import json
import random
from pathlib import Path

import sentence_transformers
import torch
import transformers
from fixture_texts import MINILM, SMALL

SEED = 20_250_101
TEXTS = 240


class Lengths:
    """Texts of a wanted number of tokens, made of the fixture texts' words: all scripts, signs and emoji mixed."""

    def __init__(self, tokenizer, random: random.Random):
        self.random = random
        self.special = tokenizer.num_special_tokens_to_add()
        words = sorted({word for text in MINILM for word in text.split()})
        self.words = [(word, len(tokenizer(word, add_special_tokens=False)["input_ids"])) for word in words]
        self.fillers = [word for word, tokens in self.words if tokens == 1]

    def text(self, tokens: int) -> str:
        words, missing = [], tokens - self.special
        while missing > 0:
            word, taken = self.random.choice(self.words)
            if taken > missing:
                word, taken = (self.random.choice(self.fillers), 1) if self.fillers else (word, taken)
            words.append(word)
            missing -= max(taken, 1)
        return " ".join(words)


def all_texts(tokenizer, limit: int) -> list[str]:
    texts = list(dict.fromkeys(MINILM + SMALL))
    randomly = random.Random(SEED)
    make = Lengths(tokenizer, randomly)
    edges = [edge + i for edge in (8, 16, 32, 64, 128, 256, 384, 512) for i in (-1, 0, 1) if edge + i <= limit]
    lengths = [*edges, limit - 1, limit, limit + 1, 2 * limit]
    while len(texts) + len(lengths) < TEXTS:
        lengths.append(round(3 * (limit / 3) ** randomly.random()))  # as many from 3 to 6 tokens as from 200 to 400
    return texts + [make.text(tokens) for tokens in lengths]


def exact_fp32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model", type=Path, metavar="MODEL", help="model folder")
    arguments.add_argument("out", type=Path, metavar="OUT.json", nargs="?", help="default: references.json in the model folder")
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    arguments = arguments.parse_args()
    out = arguments.out or arguments.model / "references.json"
    transformers.logging.set_verbosity_error()
    exact_fp32()
    settings = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = sentence_transformers.SentenceTransformer(str(arguments.model), device=arguments.device, model_kwargs=settings)
    limit = model.max_seq_length
    texts = all_texts(model.tokenizer, limit)
    tokens = [len(ids) for ids in model.tokenizer(texts, truncation=True, max_length=limit)["input_ids"]]
    rows = model.encode(texts, batch_size=1, show_progress_bar=False)
    document = {
        "model": arguments.model.resolve().name,
        "made_by": f"sentence-transformers {sentence_transformers.__version__}, transformers {transformers.__version__}, "
        f"torch {torch.__version__}, {arguments.device}",
        "dim": rows.shape[1],
        "texts": texts,
        "tokens": tokens,
        # Nine digits bring an f32 back exactly.
        "vectors": [[float(f"{value:.9g}") for value in row] for row in rows],
    }
    out.write_text(json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    print(f"{out}: {len(texts)} texts of {min(tokens)} to {max(tokens)} tokens ({sum(tokens)} in all), dimension {rows.shape[1]}")


if __name__ == "__main__":
    main()
