#!/usr/bin/env python3
"""Writes a small seeded model of each encoder family beside BERT and MPNet to tests/fixtures, and what PyTorch (fp32, CPU) makes of texts with it.

    pip install torch transformers sentence-transformers
    scripts/make_family_fixtures.py [FAMILY ...]       # all without names

A family's folder has the name of its `model_type`. `families.json` holds the texts and the cases, as cases.json does, and
`families.safetensors` their vectors and some hidden states (see make_fixtures.py).
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import tokenizers
import torch
import transformers
from fixture_texts import SMALL, SMALL_HIDDEN
from jina_bert import JinaBert, JinaReference
from make_fixtures import FIXTURES, encode, hidden_states, load, materialise, modules, pooling, token_ids, word_pieces, write_json
from safetensors.torch import save_file
from sentence_transformers import __version__ as st_version

HIDDEN, LAYERS, HEADS, WIDE = 32, 3, 4, 48
JINA_HIDDEN = 36
SIZE_LIMIT = 1_900_000  # bytes of these fixtures together

# --- tokenizers ---------------------------------------------------------------------------------------------------


def unigram_pieces(count: int) -> list[tuple[str, float]]:
    """The commonest characters and beginnings, parts and ends of words, each with the logarithm of how common it is."""
    characters, parts = Counter(), Counter()
    for text in SMALL:
        for word in text.split():
            word = "\u2581" + word
            for start in range(len(word)):
                for end in range(start + 1, min(start + 6, len(word)) + 1):
                    (characters if end == start + 1 else parts)[word[start:end]] += 1
    common = [sorted(counter, key=lambda piece: (-counter[piece], piece)) for counter in (characters, parts)]
    pieces = common[0][:70] + common[1][: count - 70]
    total = sum((characters + parts)[piece] for piece in pieces)
    return [(piece, round(math.log((characters + parts)[piece] / total), 4)) for piece in pieces]


def charsmap() -> bytes:
    """A small precompiled map of characters, as sentencepiece has them: that of the tokenizers' fixtures."""
    return json.loads((FIXTURES / "tokenizers" / "unigram.json").read_text())["normalizer"]["precompiled_charsmap"]


def xlm_roberta_tokenizer():
    import base64

    vocab = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *unigram_pieces(200), ("<mask>", 0.0)]
    return transformers.XLMRobertaTokenizer(
        vocab=vocab, _spm_precompiled_charsmap=base64.b64decode(charsmap()), model_max_length=512
    )


def camembert_tokenizer():
    special = [("<s>NOTUSED", 0.0), ("<pad>", 0.0), ("</s>NOTUSED", 0.0), ("<unk>", 0.0), ("<unk>NOTUSED", -100.0)]
    vocab = [*special, ("<s>", 0.0), ("</s>", 0.0), *unigram_pieces(200), ("<mask>", 0.0)]
    return transformers.CamembertTokenizer(vocab=vocab, model_max_length=512)


def byte_level(special: list[str], merges: int):
    """Vocabulary and merges of a byte-level BPE, special tokens first."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=len(special) + len(alphabet) + merges, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    trained.train_from_iterator(SMALL, trainer)
    model = json.loads(trained.to_str())["model"]
    return model["vocab"], [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]


def roberta_tokenizer():
    vocab, merges = byte_level(["<s>", "<pad>", "</s>", "<unk>"], 100)
    vocab["<mask>"] = len(vocab)
    return transformers.RobertaTokenizer(vocab=vocab, merges=merges, model_max_length=512)


def bert_vocab() -> dict[str, int]:
    return {piece: i for i, piece in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *word_pieces(200)])}


# --- weights ------------------------------------------------------------------------------------------------------


def seed_weights(model: torch.nn.Module, seed: int) -> None:
    """Weights that make every part count: no bias is 0, no norm's weight 1, attention is uneven. All are exact in fp16, as which they
    are stored."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(model.named_parameters()):
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.dim() == 1:
                noise = 1.0 + 0.2 * noise if name.endswith("weight") else 0.1 * noise
            elif "embeddings" in name:
                noise = (1.0 if "word" in name or "tok" in name else 0.5) * noise
            else:  # a matrix [out, in]
                uneven = (".q_lin.", ".k_lin.", ".query.", ".key.", ".q_proj.", ".k_proj.", ".Wqkv.")
                noise = (2.0 if any(part in name for part in uneven) else 1.0) * noise / tensor.shape[1] ** 0.5
            tensor.copy_(noise.half().float())


def keys_of(model, renamed: dict[str, str], packed: dict[str, list[str]]) -> dict:
    """A layer's tensors under the names of published checkpoints: parts are renamed, several become one."""
    tensors = dict(model.state_dict())
    for name in list(tensors):
        for part, others in packed.items():
            if f".{others[0]}." in name:
                parts = [tensors.pop(name.replace(f".{others[0]}.", f".{other}.")) for other in others]
                tensors[name.replace(f".{others[0]}.", f".{part}.")] = torch.cat(parts)
    for old, new in renamed.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    return tensors


def save(folder: Path, config: dict, tensors: dict, tokenizer, pooled: str, limit: int | None) -> None:
    """A folder of sentence-transformers. `config` holds what a published config.json would."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    write_json(folder / "config.json", config)
    save_file({name: tensor.half().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "modules.json", modules("Pooling", "Normalize"))
    write_json(folder / "1_Pooling" / "config.json", pooling(HIDDEN, pooled))
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": limit, "do_lower_case": False})


def published(model) -> dict:
    """config.json as transformers writes it."""
    config = json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": [type(model).__name__]}
    left_out = ("dtype", "use_cache", "id2label", "label2id")
    return {key: value for key, value in config.items() if value is not None and key not in left_out}


def prefixed(tensors: dict, prefix: str, head: str, vocab_size: int) -> dict:
    """The tensors as a language model's checkpoint holds them: with a prefix, beside a head."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()} | {head: torch.zeros(vocab_size)}


SIZES = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": WIDE}


def make_xlm_roberta(out: Path) -> None:
    """As bge-m3: one token type, positions from 2; under RoBERTa's prefix. The limit is the last position (sentence-transformers
    fails beyond it)."""
    tokenizer = xlm_roberta_tokenizer()
    config = transformers.XLMRobertaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=98, type_vocab_size=1, layer_norm_eps=1e-5, **SIZES
    )
    model = transformers.XLMRobertaModel(config, add_pooling_layer=False).eval()
    seed_weights(model, 11)
    tensors = prefixed(model.state_dict(), "roberta", "lm_head.bias", len(tokenizer))
    save(out / "xlm-roberta", published(model), tensors, tokenizer, "cls", 96)


def make_roberta(out: Path) -> None:
    """Two token types, of which the first is added, and a max_seq_length."""
    tokenizer = roberta_tokenizer()
    config = transformers.RobertaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=130, type_vocab_size=2, layer_norm_eps=1e-5, **SIZES
    )
    model = transformers.RobertaModel(config, add_pooling_layer=False).eval()
    seed_weights(model, 12)
    save(out / "roberta", published(model), model.state_dict(), tokenizer, "mean", 120)


def make_camembert(out: Path) -> None:
    """A padding id of its own: positions start one above whatever it is."""
    tokenizer = camembert_tokenizer()
    config = transformers.CamembertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=100, type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=4,
        bos_token_id=5, eos_token_id=6, **SIZES,
    )  # fmt: skip
    model = transformers.CamembertModel(config, add_pooling_layer=False).eval()
    seed_weights(model, 13)
    save(out / "camembert", published(model), model.state_dict(), tokenizer, "mean", 95)


def make_distilbert(out: Path) -> None:
    tokenizer = transformers.DistilBertTokenizer(bert_vocab(), model_max_length=512)
    config = transformers.DistilBertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=96, dim=HIDDEN, n_layers=LAYERS, n_heads=HEADS, hidden_dim=WIDE
    )
    model = transformers.DistilBertModel(config).eval()
    seed_weights(model, 14)
    save(out / "distilbert", published(model), model.state_dict(), tokenizer, "mean", None)


def make_modernbert(out: Path) -> None:
    """Windows of 8 to each side, the first layer global. Published spelling; every bias is stored, so that configurations may leave them out."""
    vocab, merges = byte_level(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], 100)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    ids = [("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])]
    backend.post_processor = tokenizers.processors.TemplateProcessing("[CLS]:0 $A:0 [SEP]:0", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", ids)
    named = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=512, **named)
    biases = {"norm_bias": True, "attention_bias": True, "mlp_bias": True}
    special = {"pad_token_id": 0, "cls_token_id": 2, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3}
    config = transformers.ModernBertConfig(vocab_size=len(tokenizer), max_position_embeddings=120, local_attention=16, **biases, **special, **SIZES)
    model = transformers.ModernBertModel(config).eval()
    seed_weights(model, 15)
    old = {
        "architectures": ["ModernBertForMaskedLM"], "model_type": "modernbert", "vocab_size": len(tokenizer), "max_position_embeddings": 120,
        "global_attn_every_n_layers": 3, "local_attention": 16, "global_rope_theta": 160000.0, "local_rope_theta": 10000.0, "norm_eps": 1e-5,
        "hidden_activation": "gelu", "position_embedding_type": "absolute", "layer_norm_eps": 1e-5, **biases, **special, **SIZES,
    }  # fmt: skip
    tensors = prefixed(model.state_dict(), "model", "decoder.bias", len(tokenizer))
    save(out / "modernbert", old, tensors, tokenizer, "cls", 110)


NOMIC = {
    "layers.": "encoder.layers.", "self_attn.o_proj": "attn.out_proj", "mlp.gate_proj": "mlp.fc12", "mlp.up_proj": "mlp.fc11",
    "mlp.down_proj": "mlp.fc2", "post_attention_layernorm": "norm1", "post_mlp_layernorm": "norm2", "embeddings.LayerNorm": "emb_ln",
    "self_attn.Wqkv": "attn.Wqkv",
}  # fmt: skip


def make_nomic_bert(out: Path) -> None:
    """In the spelling of transformers 5; that of the authors' code is a case. A vocabulary smaller than the table, as published."""
    tokenizer = transformers.BertTokenizer(bert_vocab(), model_max_length=512)
    config = transformers.NomicBertConfig(vocab_size=256, max_position_embeddings=96, **SIZES)
    model = transformers.NomicBertModel(config).eval()
    seed_weights(model, 16)
    tensors = keys_of(model, NOMIC, {"Wqkv": ["q_proj", "k_proj", "v_proj"]})
    save(out / "nomic_bert", published(model), tensors, tokenizer, "mean", 96)


GTE = {
    "layers.": "encoder.layer.", "self_attn.o_proj": "attention.o_proj", "self_attn.qkv_proj": "attention.qkv_proj",
    "post_attention_layernorm": "attn_ln", "post_mlp_layernorm": "mlp_ln",
}  # fmt: skip
GTE_PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "up_gate_proj": ["up_proj", "gate_proj"]}


def make_gte(out: Path) -> None:
    """As snowflake-arctic-embed-m-v2.0: a Unigram tokenizer and one token type."""
    tokenizer = xlm_roberta_tokenizer()
    config = transformers.GteConfig(vocab_size=len(tokenizer), max_position_embeddings=100, **SIZES)
    model = transformers.GteModel(config).eval()
    seed_weights(model, 17)
    save(out / "gte", published(model), keys_of(model, GTE, GTE_PACKED), tokenizer, "cls", 100)


NEW_CODE = {"AutoConfig": "Alibaba-NLP/new-impl--configuration.NewConfig", "AutoModel": "Alibaba-NLP/new-impl--modeling.NewModel"}


def make_new(out: Path) -> None:
    """As gte-base-en-v1.5 with a token type table that is not used, under the prefix of a language model."""
    tokenizer = transformers.BertTokenizer(bert_vocab(), model_max_length=512)
    config = transformers.GteConfig(vocab_size=len(tokenizer), max_position_embeddings=100, pad_token_id=0, **SIZES)
    model = transformers.GteModel(config).eval()
    seed_weights(model, 18)
    old = {
        "architectures": ["NewModel"], "auto_map": NEW_CODE, "model_type": "new", "hidden_act": "gelu", "layer_norm_type": "layer_norm",
        "layer_norm_eps": 1e-12, "logn_attention_clip1": False, "logn_attention_scale": False, "max_position_embeddings": 100, "pack_qkv": True,
        "pad_token_id": 0, "position_embedding_type": "rope", "rope_scaling": None, "rope_theta": 500000, "type_vocab_size": 0,
        "unpad_inputs": False, "use_memory_efficient_attention": False, "vocab_size": len(tokenizer), **SIZES,
    }  # fmt: skip
    tensors = prefixed(keys_of(model, GTE, GTE_PACKED), "new", "lm_head.bias", len(tokenizer))
    save(out / "new", old, tensors, tokenizer, "cls", 100)


def make_jina_bert(out: Path) -> None:
    """As jina-embeddings-v2-base-en, with six heads: not a power of two. `jina_bert_later` is in the form of jina-embeddings-v2-base-code."""
    for name, later, seed in (("jina_bert", False, 19), ("jina_bert_later", True, 20)):
        tokenizer = transformers.BertTokenizer(bert_vocab(), model_max_length=512)
        sizes = SIZES | {"hidden_size": JINA_HIDDEN, "num_attention_heads": 6}
        code = "jina-bert-v2-qk-post-norm" if later else "jina-bert-implementation"
        config = {
            "_name_or_path": f"jinaai/{code}", "model_max_length": 8192, "architectures": ["JinaBertForMaskedLM"],
            "attention_probs_dropout_prob": 0.0, "attn_implementation": None, "model_type": "bert",
            "auto_map": {"AutoConfig": f"jinaai/{code}--configuration_bert.JinaBertConfig",
                         "AutoModel": f"jinaai/{code}--modeling_bert.JinaBertModel",
                         "AutoModelForMaskedLM": f"jinaai/{code}--modeling_bert.JinaBertForMaskedLM"},
            "emb_pooler": "mean", "feed_forward_type": "geglu", "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "layer_norm_eps": 1e-12,
            "max_position_embeddings": 100, "pad_token_id": 0, "position_embedding_type": "alibi", "type_vocab_size": 2,
            "vocab_size": len(tokenizer), **sizes,
        }  # fmt: skip
        model = JinaBert(config, later)
        seed_weights(model, seed)
        save(out / name, config, dict(model.state_dict()), tokenizer, "mean", 100)
        write_json(out / name / "1_Pooling" / "config.json", pooling(JINA_HIDDEN, "mean"))


MAKE = {
    "xlm-roberta": make_xlm_roberta, "roberta": make_roberta, "camembert": make_camembert, "distilbert": make_distilbert,
    "modernbert": make_modernbert, "nomic_bert": make_nomic_bert, "gte": make_gte, "new": make_new,
    "jina_bert": make_jina_bert,
}  # fmt: skip


# --- the cases ----------------------------------------------------------------------------------------------------


def case(base: str, name: str = "", files: dict | None = None, reference: dict | None = None, **settings) -> dict:
    """`reference`: files in the place of `files` where transformers does not know the configuration, which means the same."""
    name = f"{base}-{name}" if name else base
    return {"name": name, "group": base, "base": base, "files": files or {}, "copies": {}, "settings": settings, "reference": reference}


def config_of(out: Path, base: str, **changes) -> dict:
    """config.json of a base with other values; None takes a key out."""
    config = json.loads((out / base / "config.json").read_text()) | changes
    return {"config.json": {key: value for key, value in config.items() if value is not None}}


def nomic_old(**changes) -> dict:
    """config.json of the authors' code."""
    return {"config.json": {
        "activation_function": "swiglu", "architectures": ["NomicBertModel"], "attn_pdrop": 0.0,
        "auto_map": {"AutoConfig": "nomic-ai/nomic-bert-2048--configuration_hf_nomic_bert.NomicBertConfig",
                     "AutoModel": "nomic-ai/nomic-bert-2048--modeling_hf_nomic_bert.NomicBertModel"},
        "causal": False, "dense_seq_output": True, "layer_norm_epsilon": 1e-12, "max_trained_positions": 96, "mlp_fc1_bias": False,
        "mlp_fc2_bias": False, "model_type": "nomic_bert", "n_embd": HIDDEN, "n_head": HEADS, "n_inner": WIDE, "n_layer": LAYERS,
        "n_positions": 96, "pad_vocab_size_multiple": 64, "prenorm": False, "qkv_proj_bias": False, "rotary_emb_base": 1000,
        "rotary_emb_fraction": 1.0, "rotary_emb_interleaved": False, "rotary_emb_scale_base": None, "rotary_scaling_factor": None,
        "type_vocab_size": 2, "use_rms_norm": False, "vocab_size": 205, **changes,
    }}  # fmt: skip


def jina_case(out: Path, base: str, kind: str) -> dict:
    return case(base, kind, config_of(out, base, feed_forward_type=kind)) | {"group": "jina_bert"}


def all_cases(out: Path) -> list[dict]:
    rope = lambda **parameters: {"rope_type": "default", **parameters}
    by_layer = lambda full, sliding: {"full_attention": rope(rope_theta=full), "sliding_attention": rope(rope_theta=sliding)}
    modern = lambda **changes: config_of(out, "modernbert", **changes)
    new_form = {"global_rope_theta": None, "local_rope_theta": None, "global_attn_every_n_layers": None}
    as_gte = {"model_type": "gte", "auto_map": None}
    new = lambda **changes: config_of(out, "new", **changes)
    # ntk: (theta factor)^(-2i/d) / factor^(2/d), which transformers has as linear scaling.
    size = HIDDEN // HEADS
    ntk = rope(rope_type="linear", rope_theta=20000.0 * 8, factor=8 ** (2 / size))
    return [
        *(case(base) for base in MAKE if base not in ("new", "jina_bert")),
        case("distilbert", "relu", config_of(out, "distilbert", activation="relu")),
        case("modernbert", "no-biases", modern(norm_bias=False, attention_bias=False, mlp_bias=False)),
        case("modernbert", "new-form", modern(**new_form, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
                                              rope_parameters=by_layer(7000.0, 300.0), local_attention=7)),
        case("modernbert", "all-global", modern(global_attn_every_n_layers=1)),
        case("modernbert", "wide-window", modern(local_attention=1000)),
        case("nomic_bert", "old-form", nomic_old(), config_of(out, "nomic_bert")),
        case("nomic_bert", "geglu", nomic_old(activation_function="geglu"), config_of(out, "nomic_bert", hidden_act="gelu")),
        case("nomic_bert", "dynamic", nomic_old(rotary_scaling_factor=2, max_trained_positions=32),
             config_of(out, "nomic_bert", max_position_embeddings=32, rope_parameters=rope(rope_type="dynamic", factor=2.0, rope_theta=1000.0))),
        case("nomic_bert", "theta", config_of(out, "nomic_bert", rope_parameters=rope(rope_theta=50.0))),
        case("gte", "theta", config_of(out, "gte", rope_parameters=None, rope_theta=300.0)),
        case("gte", "no-types", config_of(out, "gte", type_vocab_size=0)),
        case("new", "", None, new(**as_gte)),
        case("new", "types", new(type_vocab_size=1), new(**as_gte, type_vocab_size=1)),
        *(jina_case(out, name, kind) for name in ("jina_bert", "jina_bert_later") for kind in ("geglu", "reglu")),
        case("new", "ntk", new(rope_theta=20000, rope_scaling={"type": "ntk", "factor": 8.0}),
             new(**as_gte, rope_theta=None, rope_parameters=ntk)),
    ]  # fmt: skip


def zero(tensor):
    tensor.zero_()


def shift(tensor):
    tensor.copy_(tensor.roll(1, 0))


# Each likely mistake must move some vector by over 1e-3: a reference that a wrong graph would also meet proves nothing.
MISTAKES = [
    ("xlm-roberta", "embeddings.position_embeddings.weight", shift),
    ("xlm-roberta", "embeddings.token_type_embeddings.weight", zero),
    ("roberta", "embeddings.position_embeddings.weight", shift),
    ("roberta", "embeddings.token_type_embeddings.weight", shift),
    ("camembert", "embeddings.position_embeddings.weight", shift),
    ("distilbert", "embeddings.position_embeddings.weight", shift),
    ("distilbert", "transformer.layer.0.attention.q_lin.bias", zero),
]


def check_sensitivity(out: Path) -> None:
    for base in MAKE:
        if base in ("new", "jina_bert"):  # transformers has neither
            continue
        rows = encode(load(out / base), SMALL, {})
        upper = torch.triu_indices(len(SMALL), len(SMALL), offset=1)
        cosine = (rows @ rows.T)[upper[0], upper[1]].median().item()
        print(f"  {base}: median cosine between two texts {cosine:.3f}")
        assert cosine < 0.9, (base, cosine)
    for base, name, mistake in MISTAKES:
        model = load(out / base)
        right = encode(model, SMALL, {})
        with torch.no_grad():
            mistake(model[0].model.get_parameter(name))
        moved = (encode(model, SMALL, {}) - right).abs().max().item()
        print(f"  {base} {name} {mistake.__name__}: moves a component by {moved:.4f}")
        assert moved > 1e-3, (base, name, moved)


def check_configurations(out: Path) -> None:
    """Likely mistakes that are other configurations: a doubled window, one that is a place too wide, one base for all layers, no scaling."""
    rope = lambda theta: {"rope_theta": theta, "rope_type": "default"}
    for base, changes in [
        ("modernbert", {"local_attention": 32}),
        ("modernbert", {"local_attention": 18}),
        ("modernbert", {"local_rope_theta": 160000.0}),
        ("modernbert", {"global_rope_theta": 10000.0}),
        ("modernbert", {"norm_eps": 1e-2}),
        ("nomic_bert", {"rope_parameters": rope(10000.0)}),
        ("nomic_bert", {"hidden_act": "gelu"}),
        ("gte", {"rope_parameters": rope(10000.0)}),
        ("gte", {"type_vocab_size": 0}),
        ("gte", {"hidden_act": "silu"}),
    ]:
        right = encode(load(out / base), SMALL, {})
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "model"
            materialise(out, case(base, "", config_of(out, base, **changes)), folder)
            moved = (encode(load(folder), SMALL, {}) - right).abs().max().item()
        print(f"  {base} {changes}: moves a component by {moved:.4f}")
        assert moved > 1e-3, (base, changes, moved)


    for base in ("jina_bert", "jina_bert_later"):
        model = JinaReference(out / base)
        ids = [token_ids(model, text) for text in SMALL]
        right = torch.cat([model.encode(row) for row in ids])
        for layer in model.model.encoder["layer"]:
            layer.attention.slopes = torch.zeros_like(layer.attention.slopes)
        moved = (torch.cat([model.encode(row) for row in ids]) - right).abs().max().item()
        print(f"  {base} without slopes: moves a component by {moved:.4f}")
        assert moved > 1e-3, (base, moved)


# Cases that mean the same as another one.
EQUAL = {"nomic_bert-old-form"}


def make_references(out: Path) -> None:
    tensors, cases = {}, all_cases(out)
    for one in cases:
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "model"
            reference = one.pop("reference")
            materialise(out, one | {"files": reference} if reference else one, folder)
            model = JinaReference(folder) if one["group"] == "jina_bert" else load(folder)
            # One text at a time, as a service would ask: padding must change nothing, and does not need to be trusted here. Lengths do not
            # fall, since transformers keeps the frequencies of a longer text for the next one.
            ids = [token_ids(model, text) for text in SMALL]
            if one["group"] == "jina_bert":
                tensors[one["name"]] = torch.cat([model.encode(row) for row in ids])
            else:
                tensors[one["name"]] = torch.cat([encode(model, [text], one["settings"]) for text in SMALL])
            one["tokens"] = [len(row) for row in ids]
            print(f"  {one['name']}: lengths {one['tokens']}")
            if one["group"] != "jina_bert":
                model = load(folder)
            for i in SMALL_HIDDEN:
                states = model.hidden(ids[i]) if one["group"] == "jina_bert" else hidden_states(model, ids[i])
                tensors[f"hidden.{one['name']}.{i}"] = states
            for i, row in enumerate(ids):
                tensors[f"ids.{one['name']}.{i}"] = row
    assert (tensors["jina_bert-geglu"] - tensors["jina_bert-reglu"]).abs().max() > 1e-3
    for one in cases:
        name, base = one["name"], one["base"]
        if name not in EQUAL and name != base and base in tensors:
            moved = (tensors[name] - tensors[base]).abs().max().item()
            assert moved > 1e-3, (name, moved)
    save_file(tensors, out / "families.safetensors")
    lines = ",\n".join("    " + json.dumps(one, ensure_ascii=False) for one in cases)
    texts = ",\n".join("    " + json.dumps(text, ensure_ascii=False) for text in SMALL)
    made_by = f"sentence-transformers {st_version}, transformers {transformers.__version__}, torch {torch.__version__}"
    document = f'{{\n  "made_by": "{made_by}",\n  "texts": [\n{texts}\n  ],\n  "cases": [\n{lines}\n  ]\n}}\n'
    json.loads(document)
    (out / "families.json").write_text(document, encoding="utf-8")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(MAKE)}; the references are always made")
    arguments.add_argument("--output", type=Path, default=FIXTURES, metavar="DIR", help="default: tests/fixtures")
    arguments = arguments.parse_args()
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    out = arguments.output
    for family in arguments.families or MAKE:
        MAKE[family](out)
    check_sensitivity(out)
    check_configurations(out)
    make_references(out)
    files = [file for family in [*MAKE, "jina_bert_later"] for file in (out / family).rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in [*files, out / "families.safetensors", out / "families.json"])
    print(f"{out}: {size} bytes")
    assert size < SIZE_LIMIT


if __name__ == "__main__":
    sys.exit(main())
