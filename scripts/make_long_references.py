#!/usr/bin/env python3
"""Writes what PyTorch (fp32, CPU) makes of a text of 8192 tokens with a small model of each kind of positions: `long.json` (cases as in
families.json) and `long.safetensors`, hidden states of some tokens, under tests/fixtures.

    pip install torch transformers safetensors
    scripts/make_long_references.py

Token i has the id `id_of(i)`; a table of positions is filled by `position_row`. tests/long_texts.rs has both, too.
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from jina_bert import JinaBert
from safetensors.torch import load_file, save_file

FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "fixtures"
TOKENS = 8192
# The first, some in the middle, both sides of a block's end, the last.
PLACES = [0, 1, 63, 64, 85, 2047, 2048, 4100, 6001, 8190, 8191]


def id_of(i: int) -> int:
    """Ids from 5 on are no special tokens, and below 195 all fixtures have them."""
    return 5 + (i * i * 31 + i * 7) % 190


def position_row(row: int, width: int) -> list[float]:
    """Exact in fp16."""
    return [((row * 7 + column * 13 + row // 64) % 33 - 16) / 32 for column in range(width)]


def config_of(base: str, **changes) -> dict:
    config = json.loads((FIXTURES / base / "config.json").read_text()) | changes
    return {key: value for key, value in config.items() if value is not None}


def rope(**parameters) -> dict:
    return {"rope_type": "default", **parameters}


def cases() -> list[tuple[str, str, dict, dict | None]]:
    """Name, base, config.json, and that of the reference where transformers knows another."""
    trained = rope(rope_type="dynamic", factor=2.0, rope_theta=1000.0)
    size = 8
    ntk = rope(rope_type="linear", rope_theta=20000.0 * 8, factor=8 ** (2 / size))
    as_gte = {"model_type": "gte", "auto_map": None}
    new = {"rope_theta": 20000, "rope_scaling": {"type": "ntk", "factor": 8.0}}
    return [
        ("absolute", "xlm-roberta", config_of("xlm-roberta", max_position_embeddings=TOKENS + 2), None),
        ("window", "modernbert", config_of("modernbert", max_position_embeddings=TOKENS, local_attention=128), None),
        # 100 positions by the configuration, which the limit of the folder exceeds; so below.
        ("rotary", "gte", config_of("gte"), None),
        # Trained on 2048 tokens; the limit of the folder asks for more.
        ("dynamic", "nomic_bert", config_of("nomic_bert", max_position_embeddings=2048, rope_parameters=trained), None),
        ("ntk", "new", config_of("new", **new), config_of("new", **as_gte, rope_theta=None, rope_parameters=ntk)),
        ("slopes", "jina_bert", config_of("jina_bert", max_position_embeddings=TOKENS), None),
    ]


def states(folder: Path, base: str, ids: torch.Tensor) -> torch.Tensor:
    config = json.loads((folder / "config.json").read_text())
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    for name, tensor in tensors.items():
        if "position_embeddings" in name:
            rows = [position_row(row, tensor.shape[1]) for row in range(config["max_position_embeddings"])]
            tensors[name] = torch.tensor(rows)
    with torch.no_grad():
        if base.startswith("jina_bert"):
            model = JinaBert(config, "later" in base).eval()
            model.load_state_dict(tensors)
            return model(ids)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
        return model(input_ids=ids[None], attention_mask=torch.ones_like(ids[None])).last_hidden_state[0]


def main() -> None:
    transformers.logging.set_verbosity_error()
    ids = torch.tensor([id_of(i) for i in range(TOKENS)])
    tensors, written = {"places": torch.tensor(PLACES, dtype=torch.int32)}, []
    for name, base, config, reference in cases():
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "model"
            shutil.copytree(FIXTURES / base, folder)
            (folder / "config.json").write_text(json.dumps(reference or config))
            found = states(folder, base, ids)
        assert torch.isfinite(found).all()
        tensors[name] = found[PLACES].contiguous()
        tensors[f"{name}.mean"] = found.double().mean(0, keepdim=True).float()
        files = {"config.json": config, "sentence_bert_config.json": {"max_seq_length": TOKENS}}
        written.append({"name": name, "group": "long", "base": base, "files": files, "copies": {}, "settings": {}, "tokens": [TOKENS]})
        print(f"{name}: largest value {found.abs().max():.3f}", flush=True)
    save_file(tensors, FIXTURES / "long.safetensors")
    lines = ",\n".join("    " + json.dumps(one) for one in written)
    made_by = f"transformers {transformers.__version__}, torch {torch.__version__}"
    (FIXTURES / "long.json").write_text(f'{{\n  "made_by": "{made_by}",\n  "texts": [],\n  "cases": [\n{lines}\n  ]\n}}\n')


if __name__ == "__main__":
    main()
