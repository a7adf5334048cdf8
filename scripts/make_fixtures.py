#!/usr/bin/env python3
"""Writes tests/fixtures: small seeded MPNet and BERT folders and what sentence-transformers (fp32, CPU) makes of texts with them.

    pip install torch sentence-transformers
    scripts/make_fixtures.py                                    # the small models
    scripts/make_fixtures.py --minilm models/all-MiniLM-L6-v2   # and the references of the real model

Every test case is a line of `cases.json`: a base folder, files that replace or join the base's, and settings. The tests build
the same folder from the same line, so that variants cost no second copy of the weights.

`references.safetensors` holds, for text number i of `cases.json`:
    ids.BASE.I     [tokens]          i32, as the model runs them: special tokens included, cut at the limit
    hidden.BASE.I  [tokens, hidden]  f32, for some texts
    CASE           [texts, dim]      f32
"""

import argparse
import json
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import torch
import transformers
from fixture_texts import MINILM, MINILM_HIDDEN, SMALL, SMALL_HIDDEN
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer, __version__ as st_version
from tokenizers import Tokenizer, normalizers, pre_tokenizers

FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "fixtures"
SIZE_LIMIT = 2_500_000  # bytes of all fixtures together

MODES = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "meansqrtlen": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
MODULE = "sentence_transformers.models."


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def modules(*names: str) -> list:
    """modules.json: the encoder at the root, then one folder for each module named."""
    paths = [("", "Transformer")] + [(f"{i}_{name}", name) for i, name in enumerate(names, 1)]
    return [{"idx": i, "name": str(i), "path": path, "type": MODULE + kind} for i, (path, kind) in enumerate(paths)]


def pooling(width: int, *modes: str, **extra) -> dict:
    """1_Pooling/config.json in the form of published models: one boolean a mode."""
    return {"word_embedding_dimension": width} | {key: mode in modes for mode, key in MODES.items()} | extra


# --- the small models ---------------------------------------------------------------------------------------------


def word_pieces(count: int) -> list[str]:
    """The texts' commonest characters and, after them, commonest parts of words. Rare characters become the unknown token."""
    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    characters, parts = Counter(), Counter()
    for text in SMALL:
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)):
            for start in range(len(word)):
                for end in range(start + 1, min(start + 7, len(word)) + 1):
                    counter = characters if end == start + 1 else parts
                    counter[("##" if start else "") + word[start:end]] += 1
    common = [sorted(counter, key=lambda piece: (-counter[piece], piece)) for counter in (characters, parts)]
    return common[0][:70] + common[1][: count - 70]


def seed_weights(model: torch.nn.Module, seed: int) -> None:
    """Weights that make every part of the graph count: biases and LayerNorm weights are neither 0 nor 1, attention is uneven."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(model.named_parameters()):
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("LayerNorm.weight"):
                tensor.copy_(1.0 + 0.2 * noise)
            elif name.endswith("bias"):
                tensor.copy_(0.1 * noise)
            elif "relative_attention_bias" in name:
                tensor.copy_(1.5 * noise)
            elif "embeddings" in name:
                tensor.copy_((1.0 if "word" in name else 0.5) * noise)
            else:  # a matrix [out, in]
                gain = 2.0 if any(part in name for part in (".q.", ".k.", ".query.", ".key.")) else 1.0
                tensor.copy_(gain * noise / tensor.shape[1] ** 0.5)


def save_encoder(folder: Path, model, tokenizer) -> None:
    folder.mkdir(parents=True)
    config = model.config.to_dict()
    config["architectures"] = [type(model).__name__]
    config = {key: value for key, value in config.items() if value is not None and key not in ("dtype", "use_cache")}
    write_json(folder / "config.json", config)
    tokenizer.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")


def make_mpnet(folder: Path):
    """MPNet with the published tokenizer's trap: tokenizer.json itself cuts at 128 tokens and pads every text to 128."""
    pieces = word_pieces(210)
    vocab = ["<s>", "<pad>", "</s>", "<unk>", "[UNK]", *pieces, "<mask>"]
    tokenizer = transformers.MPNetTokenizer({piece: i for i, piece in enumerate(vocab)}, model_max_length=512)
    tokenizer.backend_tokenizer.enable_truncation(128)
    tokenizer.backend_tokenizer.enable_padding(length=128, pad_id=1, pad_token="<pad>")
    config = transformers.MPNetConfig(
        vocab_size=len(vocab), hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=210, layer_norm_eps=1e-5, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    model = transformers.MPNetModel(config, add_pooling_layer=False).eval()
    seed_weights(model, 1)
    save_encoder(folder, model, tokenizer)
    stored = json.loads((folder / "tokenizer.json").read_text())
    assert stored["truncation"]["max_length"] == 128 and stored["padding"]["strategy"] == {"Fixed": 128}
    write_json(folder / "modules.json", modules("Pooling", "Normalize"))
    write_json(folder / "1_Pooling" / "config.json", pooling(32, "mean"))
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 192, "do_lower_case": False})
    prompts = {"query": "query: ", "passage": "the sentence that follows "}
    write_json(folder / "config_sentence_transformers.json", {"prompts": prompts, "default_prompt_name": None})
    return model


def make_bert(folder: Path):
    """BERT without max_seq_length: the position table is the limit. As in older checkpoints, position_ids lie among the weights."""
    pieces = word_pieces(200)
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]
    tokenizer = transformers.BertTokenizer({piece: i for i, piece in enumerate(vocab)}, model_max_length=512)
    config = transformers.BertConfig(
        vocab_size=len(vocab), hidden_size=40, num_hidden_layers=2, num_attention_heads=5, intermediate_size=80,
        max_position_embeddings=96, type_vocab_size=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    seed_weights(model, 2)
    save_encoder(folder, model, tokenizer)
    tensors = dict(model.state_dict()) | {"embeddings.position_ids": torch.arange(96).unsqueeze(0)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    write_json(folder / "modules.json", modules("Pooling", "Normalize"))
    write_json(folder / "1_Pooling" / "config.json", pooling(40, "mean"))
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": None, "do_lower_case": False})
    return model


def make_stored_variants(out: Path, mpnet, bert) -> None:
    """The same weights as checkpoints of a language model store them: prefixed, beside a head, in bf16 shards or one fp16 file."""
    folder = out / "mpnet-bf16-shards"
    shutil.copytree(out / "mpnet", folder, ignore=shutil.ignore_patterns("model.safetensors"))
    tensors = {"mpnet." + name: tensor.to(torch.bfloat16).contiguous() for name, tensor in mpnet.state_dict().items()}
    tensors["lm_head.bias"] = torch.zeros(mpnet.config.vocab_size, dtype=torch.bfloat16)
    names, weight_map = sorted(tensors), {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{i:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})

    # A plain Hugging Face folder: no modules.json, so mean pooling and no normalisation.
    folder = out / "bert-fp16-plain"
    folder.mkdir()
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(out / "bert" / file, folder)
    tensors = {"bert." + name: tensor.half().contiguous() for name, tensor in bert.state_dict().items()}
    tensors["cls.predictions.bias"] = torch.zeros(bert.config.vocab_size, dtype=torch.float16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def make_dense(out: Path) -> None:
    """Weights of a Dense module, 40 -> 24, with and without bias."""
    generator = torch.Generator().manual_seed(3)
    weight = 0.4 * torch.randn(24, 40, generator=generator)
    bias = 0.3 * torch.randn(24, generator=generator)
    out.joinpath("parts").mkdir()
    save_file({"linear.weight": weight, "linear.bias": bias}, out / "parts" / "dense.safetensors")
    save_file({"linear.weight": weight}, out / "parts" / "dense-no-bias.safetensors")


# --- the cases ----------------------------------------------------------------------------------------------------


def case(name: str, group: str, base: str, files: dict | None = None, copies: dict | None = None, **settings) -> dict:
    """`files`: JSON files put into a copy of `base`. `copies`: files from parts/. `settings`: prompt, dim, max_tokens, normalize."""
    return {"name": name, "group": group, "base": base, "files": files or {}, "copies": copies or {}, "settings": settings}


def all_cases(saved_by_st: dict) -> list[dict]:
    cases = []
    for base, width in (("mpnet", 32), ("bert", 40)):
        for mode in MODES:
            cases.append(case(f"{base}-{mode}", "pooling", base, {"1_Pooling/config.json": pooling(width, mode)}))
        for name, modes in (("two", ("max", "mean")), ("all", tuple(MODES))):
            cases.append(case(f"{base}-{name}", "concatenation", base, {"1_Pooling/config.json": pooling(width, *modes)}))

    raw = modules("Pooling")
    for base, width, mode in (("mpnet", 32, "mean"), ("mpnet", 32, "max"), ("bert", 40, "meansqrtlen")):
        files = {"modules.json": raw, "1_Pooling/config.json": pooling(width, mode)}
        cases.append(case(f"{base}-{mode}-raw", "not-normalized", base, files))
    files = {"modules.json": raw, "1_Pooling/config.json": pooling(40, "cls")}
    cases.append(case("bert-cls-forced-unit", "not-normalized", "bert", files, normalize="on"))

    cases.append(case("mpnet-prompt", "prompts", "mpnet", prompt="query"))
    default = {"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": "query"}
    cases.append(case("mpnet-default-prompt", "prompts", "mpnet", {"config_sentence_transformers.json": default}))
    for mode in MODES:
        files = {"1_Pooling/config.json": pooling(32, mode, include_prompt=False)}
        cases.append(case(f"mpnet-prompt-left-out-{mode}", "prompts", "mpnet", files, prompt="passage"))

    for name, part, bias, activation in (
        ("tanh", "dense", True, "torch.nn.modules.activation.Tanh"),
        ("identity", "dense-no-bias", False, "torch.nn.modules.linear.Identity"),
    ):
        config = {"in_features": 40, "out_features": 24, "bias": bias, "activation_function": activation}
        files = {"modules.json": modules("Pooling", "Dense", "Normalize"), "2_Dense/config.json": config}
        copies = {"2_Dense/model.safetensors": f"{part}.safetensors"}
        cases.append(case(f"bert-dense-{name}", "dense", "bert", files, copies))

    cases.append(case("mpnet-dim", "settings", "mpnet", dim=13, normalize="on"))
    cases.append(case("mpnet-max-tokens", "settings", "mpnet", max_tokens=17))
    cases.append(case("bert-saved-by-sentence-transformers-6", "stored", "bert", saved_by_st))
    cases.append(case("mpnet-bf16-shards", "stored", "mpnet-bf16-shards"))
    cases.append(case("bert-fp16-plain", "stored", "bert-fp16-plain"))
    return cases


def saved_by_sentence_transformers(out: Path) -> dict:
    """The JSON files as sentence-transformers 6 writes them: pooling by name instead of six booleans, the limit in the tokenizer's."""
    with tempfile.TemporaryDirectory() as folder:
        model = load(out / "bert")
        model.max_seq_length = 64
        model.save_pretrained(folder, create_model_card=False)
        files = ["modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json"]
        files = {file: json.loads((Path(folder) / file).read_text()) for file in [*files, "tokenizer_config.json"]}
    assert files["tokenizer_config.json"]["model_max_length"] == 64 and "max_seq_length" not in files["sentence_bert_config.json"]
    files["1_Pooling/config.json"] |= {"pooling_mode": ["cls", "mean"]}
    return files


def materialise(out: Path, one: dict, folder: Path) -> None:
    """A case's model folder: the base, its files, its copies. tests/common/mod.rs does the same."""
    shutil.copytree(out / one["base"], folder)
    for file, value in one["files"].items():
        write_json(folder / file, value)
    for file, part in one["copies"].items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(out / "parts" / part, folder / file)


# --- the references -----------------------------------------------------------------------------------------------


def load(folder: Path) -> SentenceTransformer:
    # Stored half types are widened: the reference is what exact arithmetic on the stored weights comes closest to.
    return SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32, "attn_implementation": "eager"})


def encode(model: SentenceTransformer, texts: list[str], settings: dict) -> torch.Tensor:
    if "max_tokens" in settings:
        model.max_seq_length = settings["max_tokens"]
    rows = model.encode(
        texts, batch_size=8, convert_to_tensor=True, prompt_name=settings.get("prompt"),
        truncate_dim=settings.get("dim"), normalize_embeddings=settings.get("normalize") == "on",
    )  # fmt: skip
    assert rows.dtype == torch.float32 and torch.isfinite(rows).all()
    return rows.contiguous()


def token_ids(model: SentenceTransformer, text: str) -> torch.Tensor:
    return model.preprocess([text])["input_ids"][0].to(torch.int32)


def hidden_states(model: SentenceTransformer, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        ids = ids.long().unsqueeze(0)
        return model[0].model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].contiguous()


def check_sensitivity(out: Path) -> None:
    """A reference that a wrong graph would also meet proves nothing: each likely mistake must move some vector by over 1e-3."""

    def zero(tensor):
        tensor.zero_()

    def zero_far(tensor):  # buckets of distances from about 100 tokens on, both directions
        tensor[[15, 31]] = 0

    def shift(tensor):
        tensor.copy_(tensor.roll(1, 0))

    mistakes = [
        ("mpnet", "encoder.relative_attention_bias.weight", zero),
        ("mpnet", "encoder.relative_attention_bias.weight", zero_far),
        ("mpnet", "embeddings.position_embeddings.weight", shift),
        ("bert", "embeddings.position_embeddings.weight", shift),
        ("bert", "embeddings.token_type_embeddings.weight", zero),
        ("bert", "encoder.layer.0.attention.self.query.bias", zero),
    ]
    for base in ("mpnet", "bert"):
        rows = encode(load(out / base), SMALL, {})
        upper = torch.triu_indices(len(SMALL), len(SMALL), offset=1)
        cosine = (rows @ rows.T)[upper[0], upper[1]].median().item()
        print(f"  {base}: median cosine between two texts {cosine:.3f}")
        assert cosine < 0.9, (base, cosine)
    for base, name, mistake in mistakes:
        model = load(out / base)
        right = encode(model, SMALL, {})
        with torch.no_grad():
            mistake(model[0].model.get_parameter(name))
        moved = (encode(model, SMALL, {}) - right).abs().max().item()
        print(f"  {base} {name} {mistake.__name__}: moves a component by {moved:.4f}")
        assert moved > 1e-3, (base, name, moved)
    for base in ("mpnet", "bert"):
        model = load(out / base)
        right = encode(model, SMALL, {})
        for layer in model[0].model.encoder.layer:
            layer.intermediate.intermediate_act_fn = torch.nn.GELU(approximate="tanh")
        moved = (encode(model, SMALL, {}) - right).abs().max().item()
        print(f"  {base} GELU by tanh: moves a component by {moved:.6f}")
        assert moved > 5e-5, (base, moved)  # five times the bar


def make_references(out: Path) -> None:
    cases = all_cases(saved_by_sentence_transformers(out))
    tensors, tokens = {}, {}
    for base in ("mpnet", "bert"):
        model = load(out / base)
        raw = Tokenizer.from_file(str(out / base / "tokenizer.json"))
        raw.no_padding()
        raw.enable_truncation(model.max_seq_length)
        for i, text in enumerate(SMALL):
            ids = token_ids(model, text)
            assert ids.tolist() == raw.encode(text).ids, (base, i)
            tensors[f"ids.{base}.{i}"] = ids
            if i in SMALL_HIDDEN:
                tensors[f"hidden.{base}.{i}"] = hidden_states(model, ids)
        lengths = [len(tensors[f"ids.{base}.{i}"]) for i in range(len(SMALL))]
        assert min(lengths) == 2 and max(lengths) == model.max_seq_length, (base, lengths)
        print(f"  {base}: lengths {lengths}")
    for one in cases:
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "model"
            materialise(out, one, folder)
            model = load(folder)
            tensors[one["name"]] = encode(model, SMALL, one["settings"])
            prompt = model.prompts.get(one["settings"].get("prompt") or model.default_prompt_name) or ""
            one["tokens"] = [len(token_ids(model, prompt + text)) for text in SMALL]
    save_file(tensors, out / "references.safetensors")
    lines = ",\n".join("    " + json.dumps(one, ensure_ascii=False) for one in cases)
    texts = ",\n".join("    " + json.dumps(text, ensure_ascii=False) for text in SMALL)
    made_by = f"sentence-transformers {st_version}, transformers {transformers.__version__}, torch {torch.__version__}"
    document = f'{{\n  "made_by": "{made_by}",\n  "texts": [\n{texts}\n  ],\n  "cases": [\n{lines}\n  ]\n}}\n'
    json.loads(document)
    (out / "cases.json").write_text(document, encoding="utf-8")


def make_minilm(model_folder: Path, out: Path) -> None:
    model = load(model_folder)
    ids = [token_ids(model, text) for text in MINILM]
    tensors = {"embeddings": encode(model, MINILM, {})}
    for i in MINILM_HIDDEN:
        tensors[f"ids.{i}"] = ids[i]
        tensors[f"hidden.{i}"] = hidden_states(model, ids[i])
    lines = ",\n".join("  " + json.dumps({"text": t, "tokens": len(i)}, ensure_ascii=False) for t, i in zip(MINILM, ids))
    out.mkdir(exist_ok=True)
    (out / "texts.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    save_file(tensors, out / "embeddings.safetensors")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--minilm", type=Path, metavar="DIR", help="folder of all-MiniLM-L6-v2; its references are made too")
    arguments.add_argument("--output", type=Path, default=FIXTURES, metavar="DIR", help="default: tests/fixtures")
    arguments = arguments.parse_args()
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    out = arguments.output
    for name in ("mpnet", "bert", "mpnet-bf16-shards", "bert-fp16-plain", "parts"):
        shutil.rmtree(out / name, ignore_errors=True)
    mpnet, bert = make_mpnet(out / "mpnet"), make_bert(out / "bert")
    make_stored_variants(out, mpnet, bert)
    make_dense(out)
    check_sensitivity(out)
    make_references(out)
    if arguments.minilm:
        make_minilm(arguments.minilm, out / "minilm")
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out}: {size} bytes")
    assert size < SIZE_LIMIT


if __name__ == "__main__":
    main()
