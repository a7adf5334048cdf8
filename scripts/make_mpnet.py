#!/usr/bin/env python3
"""Writes a full-size MPNet-base folder with seeded weights: speed and fidelity at full size without the real model.

    scripts/get-minilm.sh                       # for its vocabulary
    pip install torch transformers sentence-transformers
    scripts/make_mpnet.py models/mpnet-seeded

Sizes are those of microsoft/mpnet-base, modules those of all-mpnet-base-v2 (mean pooling, normalisation) with the limit of 512
tokens. The tokenizer is microsoft/mpnet-base's too: its vocabulary is that of bert-base-uncased (which all-MiniLM-L6-v2 has)
between MPNet's special tokens.

The weights are those of the small test models (`seed_weights` of make_fixtures.py): every bias and LayerNorm weight counts,
attention is uneven, and vectors of different texts differ. That is checked at the end; a model whose texts all look alike would
hide faults.
"""

import argparse
import json
from pathlib import Path

import torch
import transformers
from fixture_texts import MINILM
from make_fixtures import modules, pooling, save_encoder, seed_weights, write_json
from sentence_transformers import SentenceTransformer
from tokenizers import AddedToken

ROOT = Path(__file__).resolve().parent.parent
BERT_PIECES = 30522  # of bert-base-uncased
VOCAB_SIZE = BERT_PIECES + 5
LARGEST_MEAN_COSINE = 0.9


def mpnet_tokenizer(source: Path) -> transformers.MPNetTokenizer:
    """That of microsoft/mpnet-base, its trap included: tokenizer.json itself cuts at 128 tokens and pads every text to 128."""
    file = source / "tokenizer.json"
    if not file.exists():
        raise SystemExit(f"{file} is missing; run scripts/get-minilm.sh or name a folder with --tokenizer")
    vocab = json.loads(file.read_text(encoding="utf-8"))["model"]["vocab"]
    if vocab.get("[PAD]") == 0 and len(vocab) == BERT_PIECES:
        first = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
        vocab = first | {piece: i + 4 for piece, i in vocab.items()} | {"<mask>": BERT_PIECES + 4}
    if vocab.get("<s>") != 0 or len(vocab) != VOCAB_SIZE:
        raise SystemExit(f"{file}: {len(vocab)} pieces; needed: MPNet's {VOCAB_SIZE} or bert-base-uncased's {BERT_PIECES}")
    tokenizer = transformers.MPNetTokenizer(vocab, model_max_length=512)
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken("<unk>", special=True, normalized=True)])
    tokenizer.backend_tokenizer.enable_truncation(128)
    tokenizer.backend_tokenizer.enable_padding(length=128, pad_id=1, pad_token="<pad>")
    return tokenizer


def write_model(out: Path, tokenizer: transformers.MPNetTokenizer, layers: int, seed: int) -> None:
    config = transformers.MPNetConfig(
        vocab_size=VOCAB_SIZE, hidden_size=768, num_hidden_layers=layers, num_attention_heads=12, intermediate_size=3072,
        max_position_embeddings=514, relative_attention_num_buckets=32, layer_norm_eps=1e-5,
        pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    model = transformers.MPNetModel(config, add_pooling_layer=False).eval()
    seed_weights(model, seed)
    save_encoder(out, model, tokenizer)
    write_json(out / "modules.json", modules("Pooling", "Normalize"))
    write_json(out / "1_Pooling" / "config.json", pooling(768, "mean"))
    write_json(out / "sentence_bert_config.json", {"max_seq_length": 512, "do_lower_case": False})


def mean_cosine(folder: Path) -> float:
    """Between the vectors of two different texts."""
    texts = [text for text in MINILM if text.strip()][::2]
    rows = torch.from_numpy(SentenceTransformer(str(folder)).encode(texts, show_progress_bar=False))
    first, second = torch.triu_indices(len(rows), len(rows), offset=1)
    return (rows @ rows.T)[first, second].mean().item()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist")
    arguments.add_argument(
        "--tokenizer", type=Path, metavar="DIR", default=ROOT / "models/all-MiniLM-L6-v2",
        help="MPNet or BERT folder to take the vocabulary from (default: models/all-MiniLM-L6-v2)",
    )  # fmt: skip
    arguments.add_argument("--layers", type=int, default=12, metavar="N", help="fewer for a quick try (default: %(default)s)")
    arguments.add_argument("--seed", type=int, default=1, metavar="N", help="of the weights (default: %(default)s)")
    arguments = arguments.parse_args()
    if arguments.out.exists():
        raise SystemExit(f"{arguments.out} exists; name a new folder or remove it")
    transformers.logging.set_verbosity_error()
    write_model(arguments.out, mpnet_tokenizer(arguments.tokenizer), arguments.layers, arguments.seed)
    cosine = mean_cosine(arguments.out)
    size = sum(file.stat().st_size for file in arguments.out.rglob("*") if file.is_file())
    print(f"{arguments.out}: {size / 1e6:.1f} MB; mean cosine between two texts {cosine:.3f}")
    if cosine > LARGEST_MEAN_COSINE:
        raise SystemExit(f"texts look alike (mean cosine above {LARGEST_MEAN_COSINE}): these weights test little")


if __name__ == "__main__":
    main()
