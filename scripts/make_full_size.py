#!/usr/bin/env python3
"""Writes a full-size model folder of an encoder family with seeded weights: speed and fidelity at full size without the real model.

    pip install torch safetensors
    scripts/make_full_size.py modernbert models/modernbert-seeded

Tensors, configuration and tokenizer are those of the family's small model in tests/fixtures, with the sizes of ModernBERT-base
(answerdotai/ModernBERT-base, of which gte-modernbert-base and modernbert-embed-base are made) or XLM-RoBERTa-base (multilingual-e5-base).
The vectors are means of unit length, and texts are cut at --limit tokens. The small tokenizer cuts words into more tokens than the real
one; its ids are few of the table's. Weights are exact in fp16, as which they are stored.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "fixtures"
# Width, heads, width of the feed-forward part, layers, rows of the embedding table, positions; and what else the configuration says.
SIZES = {
    "modernbert": (768, 12, 1152, 22, 50368, 8192, {"local_attention": 128, "norm_bias": False, "attention_bias": False, "mlp_bias": False}),
    "xlm-roberta": (768, 12, 3072, 12, 250002, 514, {}),
}
LAYERS = {"modernbert": "layers.", "xlm-roberta": "encoder.layer."}


def edit(path: Path, change: dict) -> dict:
    value = json.loads(path.read_text()) | change
    path.write_text(json.dumps(value, indent=2) + "\n")
    return value


def made(family: str, small: dict[str, torch.Size], old: dict, seed: int) -> dict[str, torch.Tensor]:
    hidden, _, wide, layers, vocab, positions, changes = SIZES[family]
    small_hidden, small_wide = old["hidden_size"], old["intermediate_size"]
    generator = torch.Generator().manual_seed(seed)

    def size(name: str, axis: int, n: int) -> int:
        if "embeddings.weight" in name and axis == 0:
            return vocab if "word" in name or "tok_" in name else positions if "position" in name else n
        if "qkv" in name and n == 3 * small_hidden:
            return 3 * hidden
        if ".Wi." in name and n == 2 * small_wide:
            return 2 * wide
        return {small_hidden: hidden, small_wide: wide}[n]

    def tensor(name: str, shape: torch.Size) -> torch.Tensor:
        shape = [size(name, axis, n) for axis, n in enumerate(shape)]
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            noise = 1.0 + 0.2 * noise if name.endswith("weight") else 0.1 * noise
        elif "embeddings" not in name:
            # Rows that make queries and keys are longer, so that attention is uneven.
            uneven = any(part in name for part in ("qkv", ".query.", ".key."))
            noise *= (1.5 if uneven else 1.0) / shape[1] ** 0.5
        return noise.half()

    tensors = {}
    for name, shape in sorted(small.items()):
        if name.endswith(".bias") and changes.get("norm_bias", True) is False:
            continue
        prefix, _, rest = name.partition(LAYERS[family])
        if not rest:
            tensors[name] = tensor(name, shape)
            continue
        # Layer 0 may lack a norm that the others have; all others are like layer 1.
        number, part = rest.split(".", 1)
        for layer in {"0": [0], "1": range(1, layers)}.get(number, []):
            of_layer = f"{prefix}{LAYERS[family]}{layer}.{part}"
            tensors[of_layer] = tensor(of_layer, shape)
    return tensors


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("family", choices=list(SIZES))
    arguments.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist")
    arguments.add_argument("--limit", type=int, default=512, metavar="N", help="tokens at which texts are cut (default: %(default)s)")
    arguments.add_argument("--seed", type=int, default=1, metavar="N", help="of the weights (default: %(default)s)")
    arguments = arguments.parse_args()
    if arguments.out.exists():
        raise SystemExit(f"{arguments.out} exists; name a new folder or remove it")
    hidden, heads, wide, layers, vocab, positions, changes = SIZES[arguments.family]
    fixture = FIXTURES / arguments.family
    old = json.loads((fixture / "config.json").read_text())
    with safe_open(fixture / "model.safetensors", "pt") as file:
        heads_of_language_models = ("lm_head.", "decoder.")
        names = [name for name in file.keys() if not name.startswith(heads_of_language_models)]
        small = {name: file.get_slice(name).get_shape() for name in names}
    tensors = made(arguments.family, small, old, arguments.seed)

    shutil.copytree(fixture, arguments.out)
    sizes = {
        "hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": wide, "num_hidden_layers": layers,
        "vocab_size": vocab, "max_position_embeddings": positions,
    }  # fmt: skip
    edit(arguments.out / "config.json", sizes | changes)
    pooling = arguments.out / "1_Pooling" / "config.json"
    modes = {key: key == "pooling_mode_mean_tokens" for key in json.loads(pooling.read_text()) if key.startswith("pooling_mode_")}
    edit(pooling, {"word_embedding_dimension": hidden} | modes)
    edit(arguments.out / "sentence_bert_config.json", {"max_seq_length": arguments.limit})
    save_file(tensors, arguments.out / "model.safetensors", metadata={"format": "pt"})
    print(f"{arguments.out}: {sum(tensor.numel() for tensor in tensors.values()) / 1e6:.1f} million weights")


if __name__ == "__main__":
    main()
