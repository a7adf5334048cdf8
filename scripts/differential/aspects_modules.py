"""Aspects of sentence-transformers' own files: modules, pooling, Dense, prompts, sentence_bert_config.json, and odd JSON."""

import json

from folders import MODULE, Folder, of_file, seeded

SBERT, SETTINGS, POOLING = "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json"
NEW = "sentence_transformers.sentence_transformer.modules."
TORCH = "torch.nn.modules.activation."
FLAGS = {
    "cls": "pooling_mode_cls_token", "max": "pooling_mode_max_tokens", "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens", "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}  # fmt: skip


def both(*functions):
    return lambda folder: [function(folder) for function in functions]


def each(path: str, key: str, *values, **named):
    return {label: of_file(path, **{key: v}) for label, v in ({str(v): v for v in values} | named).items()}


def flags(*modes: str, **extra):
    """Old spelling of the Pooling module's modes."""

    def apply(folder: Folder) -> None:
        folder.json[POOLING] = {"word_embedding_dimension": folder.width} | {flag: mode in modes for mode, flag in FLAGS.items()} | extra

    return apply


def mode(value, **extra):
    """New spelling."""

    def apply(folder: Folder) -> None:
        folder.json[POOLING] = {"embedding_dimension": folder.width, "pooling_mode": value, "include_prompt": True} | extra

    return apply


def pooling(**changes):
    return of_file(POOLING, **changes)


def modules(*entries, package: str = MODULE):
    """modules.json with these modules after the Transformer: names, or (name, type)."""

    def apply(folder: Folder) -> None:
        found = [folder.json["modules.json"][0]]
        for i, entry in enumerate(entries, 1):
            name, kind = entry if isinstance(entry, tuple) else (entry, package + entry)
            found.append({"idx": i, "name": str(i), "path": f"{i}_{name}", "type": kind})
        folder.json["modules.json"] = found

    return apply


def dense(place: int, out: int, bias: bool = True, activation: str | None = TORCH + "Tanh", after: int | None = None, residual: bool = False, **extra):
    """A Dense module's files at the given place of modules.json; `after` is the width before it where that is not the encoder's."""

    def apply(folder: Folder) -> None:
        width = after or folder.width
        config = {"in_features": width, "out_features": out, "bias": bias} | extra
        if activation is not None:
            config["activation_function"] = activation
        tensors = {"linear.weight": seeded("dense", out, width)}
        if bias:
            tensors["linear.bias"] = seeded("bias", out, scale=0.3)
        if residual:
            config["use_residual"] = True
            if width != out:
                tensors["residual.weight"] = seeded("residual", out, width)
        folder.json[f"{place}_Dense/config.json"] = config
        name = f"dense-{width}-{out}" + ("" if bias else "-no-bias") + ("-residual" if "residual.weight" in tensors else "")
        folder.part(f"{place}_Dense/model.safetensors", name, tensors)

    return apply


def one_dense(*arguments, **named):
    return both(modules("Pooling", "Dense", "Normalize"), dense(2, *arguments, **named))


def renamed(name: str, **changes):
    def apply(folder: Folder) -> None:
        folder.json[name] = folder.json.pop(SBERT) | {"max_seq_length": 16} | changes

    return apply


def odd(path: str, change):
    """Another spelling of one JSON file."""
    return lambda folder: folder.raw.update({path: change(folder.text(path))}) if path in folder.json else None


def oddities(path: str, key: str, other: str) -> dict:
    """What a JSON file may look like. `key: other` is a further value for a key that the file has."""
    return {
        f"{path}: duplicate key": odd(path, lambda text: text.rstrip()[:-1] + f', "{key}": {other}}}'),
        f"{path}: duplicate key before": odd(path, lambda text: f'{{"{key}": {other},' + text.lstrip()[1:]),
        f"{path}: BOM": odd(path, lambda text: "\ufeff" + text),
        f"{path}: NaN": odd(path, lambda text: text.rstrip()[:-1] + ', "some_number": NaN}'),
        f"{path}: Infinity": odd(path, lambda text: text.rstrip()[:-1] + ', "some_number": -Infinity}'),
        f"{path}: trailing comma": odd(path, lambda text: text.rstrip()[:-1] + ",}"),
        f"{path}: comment": odd(path, lambda text: "// comment\n" + text),
        f"{path}: empty": odd(path, lambda text: ""),
        f"{path}: a list": odd(path, lambda text: "[]"),
        f"{path}: null": odd(path, lambda text: "null"),
        f"{path}: escapes": odd(path, lambda text: json.dumps(json.loads(text), ensure_ascii=True)),
    }


E5 = {"query": "query: ", "passage": "the passage ", "empty": ""}
FORWARD = {"method": "forward", "method_output_name": "last_hidden_state"}

ASPECTS = {
    "pooling flags": {name: flags(name) for name in FLAGS}
    | {
        "two": flags("max", "mean"),
        "all": flags(*FLAGS),
        "none set": flags(),
        "no flag at all": lambda f: f.json.update({POOLING: {"word_embedding_dimension": f.width}}),
        "with pooling_mode": flags("cls", pooling_mode="max"),
        "numbers": lambda f: f.json.update({POOLING: {"word_embedding_dimension": f.width, FLAGS["cls"]: 1, FLAGS["mean"]: 0}}),
        "null": flags("max", pooling_mode_cls_token=None),
    },
    "pooling_mode": {name: mode(name) for name in FLAGS}
    | {
        "list": mode(["max", "mean"]),
        "list the other way": mode(["mean", "cls", "max"]),
        "list of one": mode(["cls"]),
        "empty list": mode([]),
        "twice the same": mode(["mean", "mean"]),
        "unknown": mode("no_such_mode"),
        "meansqrtlen": mode("meansqrtlen"),
        "null": mode(None),
        "absent": lambda f: f.json.update({POOLING: {"embedding_dimension": f.width}}),
    },
    "pooling keys": {
        "wrong width": pooling(word_embedding_dimension=17),
        "both widths": pooling(embedding_dimension=17),
        "no width": pooling(word_embedding_dimension=...),
        "include_prompt false": pooling(include_prompt=False),
        "include_prompt null": pooling(include_prompt=None),
        "unknown key": pooling(some_future_key=1),
        "file absent": lambda f: f.remove(POOLING),
    },
    "include_prompt": {
        f"false, {name}": both(mode(name, include_prompt=False), of_file(SETTINGS, prompts=E5, default_prompt_name="passage")) for name in FLAGS
    },
    "modules": {
        "new names": both(modules("Pooling", "Normalize", package=NEW), lambda f: f.json["modules.json"][0].update(type=NEW.replace("sentence_transformer.", "base.", 1) + "Transformer")),
        "base.modules names": both(modules(("Pooling", NEW + "pooling.Pooling"), ("Normalize", "sentence_transformers.base.modules.normalize.Normalize")), lambda f: f.json["modules.json"][0].update(type="sentence_transformers.base.modules.transformer.Transformer")),
        "old full names": modules(("Pooling", "sentence_transformers.models.Pooling.Pooling")),
        "no Normalize": modules("Pooling"),
        "no Pooling": modules(),
        "Normalize alone": modules("Normalize"),
        "Normalize twice": modules("Pooling", "Normalize", "Normalize"),
        "Normalize before Dense": both(modules("Pooling", "Normalize", "Dense"), dense(3, 24)),
        "Pooling twice": both(modules("Pooling", "Pooling"), lambda f: f.json.update({"2_Pooling/config.json": dict(f.json[POOLING])})),
        "Dropout": both(modules("Pooling", "Dropout", "Normalize"), lambda f: f.json.update({"2_Dropout/config.json": {"dropout": 0.5}})),
        "LayerNorm": both(modules("Pooling", "LayerNorm"), lambda f: f.json.update({"2_LayerNorm/config.json": {"dimension": f.width}}), lambda f: f.part("2_LayerNorm/model.safetensors", f"norm-{f.width}", {"norm.weight": 1 + seeded("w", f.width), "norm.bias": seeded("b", f.width)})),
        "WordWeights": modules("Pooling", "WordWeights"),
        "Normalize with a file": both(modules("Pooling", "Normalize"), lambda f: f.json.update({"2_Normalize/config.json": {"module_input_name": "sentence_embedding"}})),
        "Normalize of tokens": both(modules("Pooling", "Normalize"), lambda f: f.json.update({"2_Normalize/config.json": {"module_input_name": "token_embeddings"}})),
        "Normalize to another name": both(modules("Pooling", "Normalize"), lambda f: f.json.update({"2_Normalize/config.json": {"module_output_name": "elsewhere"}})),
        "custom module": modules("Pooling", ("Custom", "custom.Module")),
        "plain": both(lambda f: f.remove("modules.json"), lambda f: f.remove(POOLING)),
        "plain with pooling left": lambda f: f.remove("modules.json"),
        "encoder in a subfolder": lambda f: (setattr(f, "encoder", "0_Transformer"), f.json["modules.json"][0].update(path="0_Transformer")),
        "other order of entries": lambda f: f.json["modules.json"].reverse(),
        "no idx": lambda f: [entry.pop("idx") for entry in f.json["modules.json"]],
        "no name": lambda f: [entry.pop("name") for entry in f.json["modules.json"]],
        "same names": lambda f: [entry.update(name="0") for entry in f.json["modules.json"]],
        "kwargs": lambda f: f.json["modules.json"][0].update(kwargs=["task"]),
        "path outside": lambda f: f.json["modules.json"][1].update(path="../1_Pooling"),
        "path with a slash": lambda f: f.json["modules.json"][1].update(path="1_Pooling/"),
        "empty": lambda f: f.json["modules.json"].clear(),
        "unknown key": lambda f: f.json["modules.json"][1].update(some_future_key=1),
    },
    "dense": {
        "tanh": one_dense(24),
        "no bias": one_dense(24, bias=False),
        "identity": one_dense(24, activation="torch.nn.modules.linear.Identity"),
        **{name.lower() + " of torch": one_dense(24, activation=TORCH + name) for name in ("ReLU", "GELU", "Sigmoid", "SiLU", "LeakyReLU", "ELU", "Softmax", "Hardswish", "Mish", "LogSigmoid")},
        "short name": one_dense(24, activation="torch.nn.Tanh"),
        "activation absent": one_dense(24, activation=None),
        "activation null": one_dense(24, activation=None, activation_function=None),
        "activation not trusted": one_dense(24, activation="mine.Activation"),
        "activation no class": one_dense(24, activation="torch.nn.functional.relu"),
        "wider": one_dense(64),
        "two": both(modules("Pooling", "Dense", "Dense", "Normalize"), dense(2, 24), dense(3, 16, after=24, activation=TORCH + "ReLU")),
        "residual": one_dense(24, residual=True),
        "residual of equal width": both(modules("Pooling", "Dense", "Normalize"), lambda f: dense(2, f.width, residual=True)(f)),
        "bias absent": both(one_dense(24), of_file("2_Dense/config.json", bias=...)),
        "in_features wrong": one_dense(24, in_features=17),
        "input other": one_dense(24, module_input_name="token_embeddings"),
        "before pooling": both(modules("Dense", "Pooling"), dense(1, 24, module_input_name="token_embeddings", module_output_name="token_embeddings"), lambda f: f.json.update({"2_Pooling/config.json": {"word_embedding_dimension": 24, "pooling_mode_mean_tokens": True}})),
        "unknown key": one_dense(24, some_future_key=1),
        "bias false, stored": both(one_dense(24), of_file("2_Dense/config.json", bias=False)),
        "bias true, not stored": both(one_dense(24, bias=False), of_file("2_Dense/config.json", bias=True)),
    },
    "prompts": {
        "none chosen": of_file(SETTINGS, prompts=E5, default_prompt_name=None),
        "default": of_file(SETTINGS, prompts=E5, default_prompt_name="passage"),
        "default empty": of_file(SETTINGS, prompts=E5, default_prompt_name="empty"),
        "default unknown": of_file(SETTINGS, prompts=E5, default_prompt_name="nowhere"),
        "default of encode_query": of_file(SETTINGS, prompts={"a": "x "}, default_prompt_name="query"),
        "null prompt as default": of_file(SETTINGS, prompts={"query": None, "passage": "p "}, default_prompt_name="query"),
        "prompts null": of_file(SETTINGS, prompts=None),
        "prompts empty": of_file(SETTINGS, prompts={}),
        "prompt a number": of_file(SETTINGS, prompts={"query": 3}, default_prompt_name="query"),
        "prompt a list": of_file(SETTINGS, prompts={"query": ["a"]}),
        "with a special token": of_file(SETTINGS, prompts={"x": "[SEP] the </s>"}, default_prompt_name="x"),
        "without a space": of_file(SETTINGS, prompts={"x": "the"}, default_prompt_name="x"),
        "upper case": of_file(SETTINGS, prompts={"x": "UPPER É "}, default_prompt_name="x"),
        "longer than the limit": both(of_file(SETTINGS, prompts={"x": "the cat " * 30}, default_prompt_name="x"), of_file(SBERT, max_seq_length=16)),
    },
    "config_sentence_transformers.json": {
        "absent": lambda f: f.remove(SETTINGS),
        "empty": lambda f: f.json.update({SETTINGS: {}}),
        "similarity dot": of_file(SETTINGS, similarity_fn_name="dot"),
        "similarity null": of_file(SETTINGS, similarity_fn_name=None),
        "similarity unknown": of_file(SETTINGS, similarity_fn_name="nothing"),
        "version newer": of_file(SETTINGS, __version__={"sentence_transformers": "99.0.0"}),
        "version older": of_file(SETTINGS, __version__={"sentence_transformers": "2.0.0", "transformers": "4.6.1", "pytorch": "1.8.1"}),
        "model_type": of_file(SETTINGS, model_type="SentenceTransformer"),
        "model_type SparseEncoder": of_file(SETTINGS, model_type="SparseEncoder"),
        "model_type CrossEncoder": of_file(SETTINGS, model_type="CrossEncoder"),
        "requirements": of_file(SETTINGS, requirements={"transformers": ">=99"}),
        "unknown key": of_file(SETTINGS, some_future_key=1),
    },
    "truncate_dim": each(SETTINGS, "truncate_dim", 8, 0, 1000, -3, "8", 8.0, null=None),
    "max_seq_length": each(SBERT, "max_seq_length", 16, 3, 2, 1, 0, -1, "16", 16.5, 100000, absent=..., null=None),
    "sbert do_lower_case": each(SBERT, "do_lower_case", True, False, null=None, absent=...),
    "sentence_bert_config.json": {
        "absent": lambda f: f.remove(SBERT),
        "empty": lambda f: f.json.update({SBERT: {}}),
        **{
            f"as sentence_{name}_config.json": renamed(f"sentence_{name}_config.json")
            for name in ("roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet", "mpnet")
        },
        "beside another": lambda f: f.json.update({"sentence_roberta_config.json": {"max_seq_length": 12}}),
        "empty beside another": lambda f: f.json.update({SBERT: {}, "sentence_roberta_config.json": {"max_seq_length": 12}}),
        "unknown key": of_file(SBERT, some_future_key=1),
        "transformer_task": of_file(SBERT, transformer_task="feature-extraction"),
        "transformer_task fill-mask": of_file(SBERT, transformer_task="fill-mask"),
        "transformer_task unknown": of_file(SBERT, transformer_task="nothing"),
        "modality_config": of_file(SBERT, modality_config={"text": FORWARD}, module_output_name="token_embeddings"),
        "modality_config, first hidden state": of_file(SBERT, modality_config={"text": {"method": "forward", "method_output_name": "pooler_output"}}, module_output_name="token_embeddings"),
        "modality_config, other name": of_file(SBERT, modality_config={"text": FORWARD}, module_output_name="elsewhere"),
        "modality_config without output": of_file(SBERT, modality_config={"text": FORWARD}),
        "modality_config of images": of_file(SBERT, modality_config={"image": FORWARD}, module_output_name="token_embeddings"),
        "modality_config null": of_file(SBERT, modality_config=None),
        "unpad_inputs": of_file(SBERT, unpad_inputs=True),
        "query_length": of_file(SBERT, query_length=5, document_length=7),
        "query_expansion": of_file(SBERT, query_expansion={"strategy": "fixed", "length": 32}),
        "tokenizer_name_or_path": of_file(SBERT, tokenizer_name_or_path="/nowhere"),
        "tokenizer_name_or_path null": of_file(SBERT, tokenizer_name_or_path=None),
        "backend": of_file(SBERT, backend="onnx"),
    },
    "tokenizer_args": {
        f"{key}: {label}": of_file(SBERT, **{key: value})
        for key in ("tokenizer_args", "processor_kwargs")
        for label, value in {
            "empty": {}, "lower case": {"do_lower_case": False}, "accents": {"strip_accents": False}, "chinese": {"tokenize_chinese_chars": False},
            "side": {"truncation_side": "left"}, "length": {"model_max_length": 12}, "use_fast": {"use_fast": False},
            "padding_side": {"padding_side": "left"}, "sep": {"sep_token": "the"}, "extra": {"additional_special_tokens": ["[NEW]"]},
            "type": {"tokenizer_type": "bert"}, "trust": {"trust_remote_code": True}, "unknown": {"some_future_key": 1}, "post": {"add_bos_token": True},
        }.items()
    }
    | {
        "both names": of_file(SBERT, tokenizer_args={"do_lower_case": False}, processor_kwargs={"truncation_side": "left"}),
        "null": of_file(SBERT, tokenizer_args=None),
        "length and max_seq_length": of_file(SBERT, tokenizer_args={"model_max_length": 12}, max_seq_length=20),
    },
    "config_args": {
        f"{key}: {label}": of_file(SBERT, **{key: value})
        for key in ("config_args", "config_kwargs")
        for label, value in {
            "empty": {}, "activation": {"hidden_act": "relu"}, "eps": {"layer_norm_eps": 0.1}, "layers": {"num_hidden_layers": 1},
            "dtype": {"torch_dtype": "float16"}, "unknown": {"some_future_key": 1}, "decoder": {"is_decoder": True}, "pooling": {"hidden_dropout_prob": 0.3},
        }.items()
    },
    "model_args": {
        f"{key}: {label}": of_file(SBERT, **{key: value})
        for key in ("model_args", "model_kwargs")
        for label, value in {
            "empty": {}, "torch_dtype": {"torch_dtype": "float32"}, "float16": {"torch_dtype": "float16"}, "attention": {"attn_implementation": "eager"},
            "pooler": {"add_pooling_layer": False}, "unknown": {"some_future_key": 1}, "subfolder": {"subfolder": "x"}, "safetensors": {"use_safetensors": True}, "ignore": {"ignore_mismatched_sizes": True},
            "activation": {"hidden_act": "relu"},
        }.items()
    },
    "processing_kwargs": {
        label: of_file(SBERT, processing_kwargs=value)
        for label, value in {
            "empty": {}, "length": {"text": {"max_length": 12}}, "no special tokens": {"text": {"add_special_tokens": False}},
            "no truncation": {"text": {"truncation": False}}, "padded": {"text": {"padding": "max_length", "max_length": 40}}, "common": {"common": {"max_length": 12}},
            "unknown": {"nothing": {"max_length": 12}}, "unknown in text": {"text": {"some_future_key": 1}}, "image": {"image": {"size": 3}}, "stride": {"text": {"stride": 3}},
            "side": {"text": {"padding_side": "left"}}, "multiple": {"text": {"pad_to_multiple_of": 16}}, "split": {"text": {"split_special_tokens": True}},
            "token types": {"text": {"return_token_type_ids": False}}, "mask": {"text": {"return_attention_mask": False}}, "words": {"text": {"is_split_into_words": False}},
            "null": None, "truncation only_first": {"text": {"truncation": "only_first"}},
        }.items()
    },
    "json": oddities("config.json", "hidden_act", '"relu"')
    | oddities("tokenizer_config.json", "do_lower_case", "false")
    | oddities(SBERT, "max_seq_length", "12")
    | oddities(POOLING, "word_embedding_dimension", "17")
    | oddities(SETTINGS, "truncate_dim", "8")
    | oddities("tokenizer.json", "version", '"1.0"')
    | {"modules.json: BOM": odd("modules.json", lambda text: "\ufeff" + text), "modules.json: an object": odd("modules.json", lambda text: "{}"),
       "modules.json: trailing comma": odd("modules.json", lambda text: text.rstrip()[:-1] + ",]")},
}  # fmt: skip
