#!/usr/bin/env python3
"""Writes tests/fixtures/adapters: small seeded LoRA adapters of the small models, and sentence-transformers' vectors (fp32, CPU) with
each of them beside its base model's weights.

    pip install torch sentence-transformers peft
    scripts/make_fixtures.py            # the base models
    scripts/make_adapter_fixtures.py

`NAME/` holds one adapter as peft saves it; `cases.json` each one's base model and the texts; `references.safetensors` for each NAME
`[texts, dim]` f32.
"""

import json
import shutil
import tempfile
from pathlib import Path

import peft
import torch
import transformers
from fixture_texts import SMALL
from make_fixtures import FIXTURES, SIZE_LIMIT, encode, load, write_json
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from sentence_transformers import __version__ as st_version
from transformers import AutoModel, AutoModelForMaskedLM

OUT = FIXTURES / "adapters"
TEXTS = [text for text in SMALL if 2 < len(text.split()) < 20][:5]

# Name, base model, class that the adapter was made for, what peft is asked for.
CASES = [
    ("plain", "bert", AutoModel, {"target_modules": ["query", "value"]}),
    ("rank-stabilised", "bert", AutoModel, {"target_modules": ["query", "value"], "use_rslora": True, "r": 3}),
    (
        "patterns",
        "bert",
        AutoModel,
        {
            "target_modules": ["query", "value", "output.dense"],
            "rank_pattern": {"query": 3, r"layer\.1\.output\.dense": 1},
            "alpha_pattern": {"encoder.layer.0.attention.self.query": 7, "(key|value)": 2.5},
        },
    ),
    ("expression", "bert", AutoModel, {"target_modules": r".*\.layer\.1\.(?!inter).*(query|dense)"}),
    ("all-linear", "bert", AutoModel, {"target_modules": "all-linear", "exclude_modules": ["pooler.dense", "layer.0.output.dense"], "r": 1}),
    ("layers", "bert", AutoModel, {"target_modules": ["query", "key"], "layers_to_transform": [1]}),
    ("layers-pattern", "bert", AutoModel, {"target_modules": ["value"], "layers_to_transform": 0, "layers_pattern": "layer"}),
    ("modules-to-save", "bert", AutoModel, {"target_modules": ["query"], "modules_to_save": ["LayerNorm", "layer.1.attention.self.key"]}),
    ("bias-all", "bert", AutoModel, {"target_modules": ["query"], "bias": "all"}),
    ("bias-of-targets", "bert", AutoModel, {"target_modules": ["query", "value"], "bias": "lora_only"}),
    ("bias-of-product", "bert", AutoModel, {"target_modules": ["key", "value"], "lora_bias": True}),
    ("embeddings", "bert", AutoModel, {"target_modules": ["word_embeddings", "position_embeddings", "token_type_embeddings"], "r": 1}),
    ("fan-in-fan-out", "bert", AutoModel, {"target_modules": ["query", "word_embeddings"], "fan_in_fan_out": True, "r": 1}),
    ("tokens", "bert", AutoModel, {"target_modules": ["query"], "trainable_token_indices": [2, 12, 7, 30]}),
    ("tokens-of-tables", "bert", AutoModel, {"target_modules": ["query"], "trainable_token_indices": {"position_embeddings": [3, 1]}}),
    ("masked-lm", "bert", AutoModelForMaskedLM, {"target_modules": ["query"], "modules_to_save": ["cls.predictions.transform.LayerNorm"]}),
    ("half", "bert-fp16-plain", AutoModel, {"target_modules": ["query", "intermediate.dense"]}),
    ("mpnet", "mpnet", AutoModel, {"target_modules": ["attn.q", "attn.o", "relative_attention_bias"]}),
    ("mpnet-shards", "mpnet-bf16-shards", AutoModel, {"target_modules": ["v"], "modules_to_save": ["relative_attention_bias"]}),
]


def make(name: str, base: str, kind, asked: dict, seed: int) -> torch.Tensor:
    """Writes the adapter NAME; returns the vectors of its model."""
    torch.manual_seed(seed)
    asked = {"r": 2, "lora_alpha": 4, "init_lora_weights": False} | asked
    model = get_peft_model(kind.from_pretrained(FIXTURES / base, dtype=torch.float32), LoraConfig(**asked))
    with torch.no_grad():
        for _, tensor in sorted(model.named_parameters()):
            if tensor.requires_grad:
                tensor.add_(0.2 * torch.randn_like(tensor))
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        shutil.copytree(FIXTURES / base, folder)
        model.save_pretrained(folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        # Sets to peft, so that their order changes from run to run.
        config |= {key: sorted(value) for key, value in config.items() if isinstance(value, list) and "modules" in key}
        if base == "bert-fp16-plain":
            tensors = {key: tensor.half().contiguous() for key, tensor in load_file(folder / "adapter_model.safetensors").items()}
            save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        # sentence-transformers reads config.json of the base model that is named, not the one beside the adapter.
        write_json(folder / "adapter_config.json", config | {"base_model_name_or_path": str(folder)})
        rows = encode(load(folder), TEXTS, {})
        (OUT / name).mkdir()
        write_json(OUT / name / "adapter_config.json", config | {"base_model_name_or_path": f"fixtures/{base}"})
        shutil.copy(folder / "adapter_model.safetensors", OUT / name)
    return rows


def main() -> None:
    transformers.logging.set_verbosity_error()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    plain = {base: encode(load(FIXTURES / base), TEXTS, {}) for base in {base for _, base, _, _ in CASES}}
    references = {}
    for seed, (name, base, kind, asked) in enumerate(CASES):
        references[name] = make(name, base, kind, asked, seed)
        cosine = torch.nn.functional.cosine_similarity(references[name], plain[base]).max().item()
        print(f"  {name}: cosine with the base model at most {cosine:.4f}")
        # An adapter that is not merged must not pass.
        assert cosine < 0.999, (name, cosine)
    save_file(references, OUT / "references.safetensors")
    made_by = f"sentence-transformers {st_version}, transformers {transformers.__version__}, peft {peft.__version__}, torch {torch.__version__}"
    cases = [{"name": name, "base": base} for name, base, _, _ in CASES]
    write_json(OUT / "cases.json", {"made_by": made_by, "texts": TEXTS, "cases": cases})
    size = sum(file.stat().st_size for file in FIXTURES.rglob("*") if file.is_file())
    print(f"{FIXTURES}: {size} bytes")
    assert size < SIZE_LIMIT


if __name__ == "__main__":
    main()
