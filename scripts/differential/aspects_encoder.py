"""Aspects of the encoder: config.json and how its weights are stored. Each value is a function that changes a folder."""

from folders import Folder, seeded


def config(**changes):
    """Sets keys of config.json; `...` removes one."""

    def apply(folder: Folder) -> None:
        for key, value in changes.items():
            if value is ...:
                folder.json["config.json"].pop(key, None)
            else:
                folder.json["config.json"][key] = value

    return apply


def weights(*operations):
    return lambda folder: folder.weights.extend([op[0]] + [v(folder) if callable(v) else v for v in op[1:]] for op in operations)


def each(key: str, *values, **named):
    """One aspect value for each value of one key."""
    labels = {str(value): value for value in values} | named
    return {label: config(**{key: value}) for label, value in labels.items()}


def both(*functions):
    return lambda folder: [function(folder) for function in functions]


def bert_only(function):
    """Marks a value that MPNet folders do not have."""

    def apply(folder: Folder) -> None:
        function(folder)

    apply.families = ("bert",)
    return apply


def _prefix(folder: Folder) -> str:
    return folder.family + "."


QUERY = {"bert": "attention.self.query", "mpnet": "attention.attn.q"}
VALUE = {"bert": "attention.self.value", "mpnet": "attention.attn.v"}


def adapter(rank: int = 2, **changes):
    """A LoRA adapter beside the weights, on query and value of every layer."""

    def apply(folder: Folder) -> None:
        names = [table[folder.family] for table in (QUERY, VALUE)]
        settings = {
            "peft_type": "LORA", "base_model_name_or_path": "FOLDER", "task_type": "FEATURE_EXTRACTION", "r": rank, "lora_alpha": 4,
            "lora_dropout": 0.1, "bias": "none", "target_modules": [name.rsplit(".")[-1] for name in names], "inference_mode": True,
            "fan_in_fan_out": False, "peft_version": "0.21.2",
        } | changes  # fmt: skip
        folder.json["adapter_config.json"] = settings
        tensors, width = {}, folder.width
        for layer in range(folder.json["config.json"]["num_hidden_layers"]):
            for name in names:
                at = f"base_model.model.encoder.layer.{layer}.{name}"
                ranks = settings.get("rank_pattern") or {}
                r = next((n for key, n in ranks.items() if name.endswith(key)), rank)
                tensors[f"{at}.lora_A.weight"] = seeded(at + "a", r, width)
                tensors[f"{at}.lora_B.weight"] = seeded(at + "b", width, r)
                if settings.get("use_dora"):
                    tensors[f"{at}.lora_magnitude_vector"] = 1 + seeded(at + "m", width, scale=0.1).abs()
        kind = "-dora" if settings.get("use_dora") else "-ranks" if settings.get("rank_pattern") else ""
        folder.part("adapter_model.safetensors", f"adapter-{folder.family}-{rank}{kind}", tensors)

    return apply


ASPECTS = {
    "hidden_act": each(
        "hidden_act", "gelu", "gelu_new", "gelu_fast", "gelu_python", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate",
        "quick_gelu", "relu", "silu", "swish", "tanh", "relu2", "gelu_10", "no_such_activation", absent=..., null=None,
    ),
    "layer_norm_eps": each("layer_norm_eps", 0, 0.0, 1e-12, 1e-5, 0.1, 2.0, -1e-12, "1e-12", absent=..., null=None),
    "pad_token_id": each("pad_token_id", 0, 1, 7, -1, 5000, absent=..., null=None),
    "position_embedding_type": each("position_embedding_type", "absolute", "relative_key", "relative_key_query", null=None),
    "dtype": {
        "torch_dtype float16": config(torch_dtype="float16"),
        "torch_dtype bfloat16": config(torch_dtype="bfloat16"),
        "dtype float16": config(dtype="float16"),
        "dtype float32": config(dtype="float32"),
        "dtype null": config(dtype=None),
    },
    "type_vocab_size": {
        "1": bert_only(both(config(type_vocab_size=1), weights(["rows", "embeddings.token_type_embeddings.weight", 1]))),
        "absent": bert_only(config(type_vocab_size=...)),
        "1 where 2 rows are stored": bert_only(config(type_vocab_size=1)),
        "3 where 2 rows are stored": bert_only(config(type_vocab_size=3)),
    },
    "sizes": {
        "defaults absent": config(layer_norm_eps=..., hidden_act=..., pad_token_id=..., type_vocab_size=..., architectures=..., hidden_dropout_prob=...),
        "model_type absent": config(model_type=...),
        "model_type other": config(model_type="electra"),
        "one layer of those stored": config(num_hidden_layers=1),
        "more layers than stored": config(num_hidden_layers=5),
        "no layer": config(num_hidden_layers=0),
        "vocab_size less than stored": config(vocab_size=200),
        "positions less than stored": config(max_position_embeddings=64),
        "heads do not divide": config(num_attention_heads=7),
        "heads fewer": config(num_attention_heads=2),
        "hidden_size a string": config(hidden_size="40"),
        "hidden_size a float": config(hidden_size=40.0),
        "hidden_size absent": config(hidden_size=...),
        "intermediate_size other": config(intermediate_size=128),
        "buckets absent": config(relative_attention_num_buckets=...),
        "buckets other": config(relative_attention_num_buckets=16),
    },
    "config keys": {
        "harmless": config(classifier_dropout=None, use_cache=True, gradient_checkpointing=False, problem_type="regression", _x="y"),
        "unknown": config(some_future_key=True),
        "is_decoder": config(is_decoder=True),
        "is_decoder false": config(is_decoder=False, add_cross_attention=False),
        "add_cross_attention": config(add_cross_attention=True),
        "cross attention of a decoder": config(is_decoder=True, add_cross_attention=True),
        "is_encoder_decoder": config(is_encoder_decoder=True),
        "chunk_size_feed_forward": config(chunk_size_feed_forward=4),
        "dropout": config(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5),
        "output_hidden_states": config(output_hidden_states=True, output_attentions=True),
        "return_dict false": config(return_dict=False),
        "torchscript": config(torchscript=True),
        "pruned_heads": config(pruned_heads={"0": [1]}),
        "tie_word_embeddings false": config(tie_word_embeddings=False),
        "quantization_config 8bit": config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        "quantization_config unknown": config(quantization_config={"quant_method": "nobody", "bits": 4}),
        "quantization_config null": config(quantization_config=None),
        "auto_map": config(auto_map={"AutoModel": "modeling.Model"}),
        "architectures of a head": config(architectures=["BertForMaskedLM"]),
        "architectures of a causal model": config(architectures=["BertLMHeadModel"]),
        "attn_implementation eager": config(attn_implementation="eager"),
        "id2label": config(id2label={"0": "a"}, label2id={"a": 0}, num_labels=1),
        "tokenizer_class": both(
            config(tokenizer_class="PreTrainedTokenizerFast"),
            lambda folder: folder.json["tokenizer_config.json"].pop("tokenizer_class", None),
        ),
        "embedding_size": config(embedding_size=16),
        "is_causal": config(is_causal=True),
        "max_length": config(max_length=20),
    },
    "weights": {
        "F16": weights(["cast", "F16"]),
        "BF16": weights(["cast", "BF16"]),
        "F64": weights(["cast", "F64"]),
        "shards": weights(["shards", 2, []]),
        "shards of F16 with a prefix": weights(["cast", "F16"], ["prefix", _prefix], ["shards", 2, []]),
        "index names an absent tensor": weights(["shards", 2, ["cls.predictions.bias"]]),
        "prefix": weights(["prefix", _prefix]),
        "prefix and heads": weights(
            ["prefix", _prefix], ["copy", lambda f: _prefix(f) + "embeddings.LayerNorm.bias", "cls.predictions.bias", 1.0],
            ["copy", lambda f: _prefix(f) + "embeddings.LayerNorm.bias", lambda f: _prefix(f) + "pooler.dense.bias", 1.0],
        ),
        "gamma and beta": weights(["gamma_beta"]),
        "prefix, gamma and beta": weights(["prefix", _prefix], ["gamma_beta"]),
        "X and prefixed X": weights(
            ["copy", "embeddings.LayerNorm.bias", lambda f: _prefix(f) + "embeddings.LayerNorm.bias", 3.0]
        ),
        "prefixed, one also without": weights(
            ["prefix", _prefix], ["copy", lambda f: _prefix(f) + "embeddings.LayerNorm.bias", "embeddings.LayerNorm.bias", 3.0]
        ),
        "weight and gamma": weights(["copy", "embeddings.LayerNorm.weight", "embeddings.LayerNorm.gamma", 3.0]),
        "positions buffer": weights(["positions", "embeddings.position_ids"]),
        "prefixed positions buffer": weights(["prefix", _prefix], ["positions", lambda f: _prefix(f) + "embeddings.position_ids"]),
        "unknown tensor": weights(["copy", "embeddings.LayerNorm.bias", "embeddings.extra.bias", 1.0]),
        "another prefix": weights(["prefix", "encoder_model."]),
        "prefix model.": weights(["prefix", "model."]),
        "prefix model.bert.": weights(["prefix", lambda f: "model." + _prefix(f)]),
        "missing tensor": weights(["remove", "embeddings.LayerNorm.bias"]),
        "no metadata": weights(["no_metadata"]),
    },
    "adapter": {
        "lora": adapter(),
        "lora rank 3, alpha 1": adapter(3, lora_alpha=1),
        "rslora": adapter(use_rslora=True),
        "dora": adapter(use_dora=True),
        "rank_pattern": adapter(rank_pattern={"value": 1, "v": 1}),
        "alpha_pattern": adapter(alpha_pattern={"query": 16, "q": 16}),
        "bias all": adapter(bias="all"),
        "fan_in_fan_out": adapter(fan_in_fan_out=True),
        "target_modules regex": adapter(target_modules=r".*\.(query|value|q|v)"),
        "all-linear": adapter(target_modules="all-linear"),
        "layers_to_transform": adapter(layers_to_transform=[0]),
        "modules_to_save": adapter(modules_to_save=["LayerNorm"]),
        "ia3": adapter(peft_type="IA3"),
        "unknown key": adapter(some_future_key=3),
    },
}  # fmt: skip
