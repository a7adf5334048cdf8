"""Aspects of the tokenizer: tokenizer.json, tokenizer_config.json and the files beside them. Each value changes a folder."""

from folders import Folder, of_file

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"


def of_config(**changes):
    """Sets keys of tokenizer_config.json; `...` removes one."""
    return of_file(CONFIG, **changes)


def of_tokenizer(**changes):
    """Sets keys of tokenizer.json."""
    return lambda folder: folder.json[TOKENIZER].update(changes)


def of_normalizer(**changes):
    return lambda folder: folder.json[TOKENIZER]["normalizer"].update(changes)


def of_model(**changes):
    return lambda folder: folder.json[TOKENIZER]["model"].update(changes)


def both(*functions):
    return lambda folder: [function(folder) for function in functions]


def each(key: str, *values, **named):
    return {label: of_config(**{key: value}) for label, value in ({str(v): v for v in values} | named).items()}


def token(content: str, **flags) -> dict:
    """An added token as tokenizer.json writes it, without its id."""
    absent = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    return {"content": content} | absent | flags


# What an added token may be. A place where tokens are declared is tried with each of them.
TOKENS = {
    "plain": token("[NEW]"),
    "special": token("[NEW]", special=True, normalized=False),
    "lstrip": token("[NEW]", lstrip=True, normalized=False),
    "rstrip": token("[NEW]", rstrip=True, normalized=False),
    "single_word": token("newtok", single_word=True),
    "not normalized": token("newtok", normalized=False),
    "upper case, normalized": token("NEWTOK", normalized=True),
    "upper case, special, normalized": token("NEWTOK", normalized=True, special=True),
    "accents": token("Ünï", normalized=True),
    "two words": token("two words", normalized=True),
    "a piece": token("the", normalized=False),
    "literal </s>": token("</s>", normalized=False, special=True),
    "literal [SEP]": token("[SEP]", normalized=False, special=True),
}  # fmt: skip


def vocab(folder: Folder) -> dict:
    """Ids by piece, also of a Unigram model, which stores a list."""
    stored = folder.json[TOKENIZER]["model"]["vocab"]
    return stored if isinstance(stored, dict) else {piece: i for i, (piece, _) in enumerate(stored)}


def identity(folder: Folder, content: str) -> int:
    return vocab(folder).get(content, folder.next_id)


def in_tokenizer_json(declared: dict):
    def apply(folder: Folder) -> None:
        tokens = [t for t in folder.json[TOKENIZER]["added_tokens"] if t["content"] != declared["content"]]
        tokens.append({"id": identity(folder, declared["content"])} | declared)
        folder.json[TOKENIZER]["added_tokens"] = sorted(tokens, key=lambda t: t["id"])

    return apply


def in_decoder(declared: dict, alone: bool = False, at: int | None = None):
    """added_tokens_decoder of tokenizer_config.json, with or without what tokenizer.json declares."""

    def apply(folder: Folder) -> None:
        tokens = {} if alone else {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in folder.json[TOKENIZER]["added_tokens"]}
        tokens[str(identity(folder, declared["content"]) if at is None else at)] = declared
        folder.file(CONFIG)["added_tokens_decoder"] = tokens

    return apply


def without_special(declared: dict) -> dict:
    return {key: value for key, value in declared.items() if key != "special"}


def json_file(path: str, value):
    def apply(folder: Folder) -> None:
        folder.json[path] = value(folder) if callable(value) else value

    return apply


def roles(folder: Folder, **changes) -> dict:
    return {f"{role}_token": content for role, content in folder.specials.items()} | changes


def metaspace(folder: Folder, prepend: str = "always") -> None:
    """A Unigram tokenizer in the place of WordPiece, as multilingual-e5-small has one."""
    old = folder.json[TOKENIZER]
    words = [piece for piece in old["model"]["vocab"] if piece.isascii() and piece.isalpha() and piece not in folder.specials.values()]
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "\u2581", "\u2581the", "\u2581a", "日", "[", "]", "NEW"]
    pieces += [p for p in letters + ["\u2581" + word for word in words] if p not in pieces]
    pieces = pieces[:180] + ["<mask>"]
    specials = [(0, "<s>"), (1, "<pad>"), (2, "</s>"), (3, "<unk>"), (len(pieces) - 1, "<mask>")]
    old["model"] = {"type": "Unigram", "unk_id": 3, "vocab": [[p, -1.0 - len(p) / 10 if i > 3 else 0.0] for i, p in enumerate(pieces)], "byte_fallback": False}
    old["added_tokens"] = [{"id": i} | token(c, special=True, normalized=False, lstrip=c == "<mask>") for i, c in specials]
    old["normalizer"] = {"type": "NFKC"}
    old["pre_tokenizer"] = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": prepend, "split": True}
    ids = {"<s>": 0, "</s>": 2}
    wrapped = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    old["post_processor"] = {
        "type": "TemplateProcessing", "single": wrapped, "pair": wrapped + [{"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {c: {"id": c, "ids": [i], "tokens": [c]} for c, i in ids.items()},
    }  # fmt: skip
    old["decoder"] = None
    names = {"cls": "<s>", "bos": "<s>", "sep": "</s>", "eos": "</s>", "pad": "<pad>", "unk": "<unk>", "mask": "<mask>"}
    folder.json[CONFIG] = {f"{k}_token": v for k, v in names.items()} | {"model_max_length": 512, "tokenizer_class": "PreTrainedTokenizerFast"}


def word_level(folder: Folder) -> None:
    model = folder.json[TOKENIZER]["model"]
    folder.json[TOKENIZER]["model"] = {"type": "WordLevel", "vocab": model["vocab"], "unk_token": "[UNK]"}
    folder.file(CONFIG)["tokenizer_class"] = "PreTrainedTokenizerFast"


def template(folder: Folder, *items: str) -> dict:
    """A post-processor that writes these tokens around `$A`."""
    ids = vocab(folder)
    single = [{"Sequence": {"id": "A", "type_id": 0}} if i == "$A" else {"SpecialToken": {"id": i, "type_id": 0}} for i in items]
    tokens = {i: {"id": i, "ids": [ids.get(i, 0)], "tokens": [i]} for i in items if i != "$A"}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}


def post_processor(value):
    return lambda folder: folder.json[TOKENIZER].update(post_processor=value(folder) if callable(value) else value)


def pairs(kind: str, **extra):
    """BertProcessing or RobertaProcessing with the family's tokens."""

    def build(folder: Folder) -> dict:
        ids, specials = vocab(folder), folder.specials
        return {"type": kind} | {role: [specials[role], ids.get(specials[role], 0)] for role in ("sep", "cls")} | extra

    return build


def truncation(direction: str, length: int = 20, **extra) -> dict:
    return {"direction": direction, "max_length": length, "strategy": "LongestFirst", "stride": 0} | extra


def padding(strategy, folder: Folder, **extra) -> dict:
    pad = folder.specials["pad"]
    block = {"strategy": strategy, "direction": "Right", "pad_to_multiple_of": None, "pad_type_id": 0, "pad_token": pad}
    return block | {"pad_id": vocab(folder).get(pad, 1)} | extra


CLASSES = [
    "BertTokenizer", "BertTokenizerFast", "MPNetTokenizer", "MPNetTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend",
    "PreTrainedTokenizer", "PythonBackend", "DistilBertTokenizer", "RobertaTokenizer", "RobertaTokenizerFast", "XLMRobertaTokenizer",
    "XLMRobertaTokenizerFast", "AlbertTokenizer", "ElectraTokenizer", "ElectraTokenizerFast", "BertJapaneseTokenizer", "GPT2Tokenizer",
    "LlamaTokenizer", "NoSuchTokenizer", "NoSuchTokenizerFast", "",
]  # fmt: skip
BIG = 10**30

ASPECTS = {
    "tokenizer_class": each("tokenizer_class", *CLASSES, absent=..., null=None),
    "tokenizer_config.json": {
        "absent": lambda folder: folder.remove(CONFIG),
        "empty": lambda folder: folder.json.update({CONFIG: {}}),
        "only the class": lambda folder: folder.json.update({CONFIG: {"tokenizer_class": folder.json[CONFIG].get("tokenizer_class")}}),
    },
    "do_lower_case": each("do_lower_case", True, False, "false", 0, absent=..., null=None),
    "strip_accents": each("strip_accents", True, False, absent=..., null=None),
    "tokenize_chinese_chars": each("tokenize_chinese_chars", True, False, absent=..., null=None),
    "normalizer": {
        "lowercase false": of_normalizer(lowercase=False),
        "strip_accents true": of_normalizer(strip_accents=True),
        "strip_accents false": of_normalizer(strip_accents=False),
        "chinese false": of_normalizer(handle_chinese_chars=False),
        "clean_text false": of_normalizer(clean_text=False),
        "none": of_tokenizer(normalizer=None),
        "NFKC": of_tokenizer(normalizer={"type": "NFKC"}),
        "NFD, Lowercase, StripAccents": of_tokenizer(normalizer={"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "Lowercase"}, {"type": "StripAccents"}]}),
        "Replace": of_tokenizer(normalizer={"type": "Replace", "pattern": {"String": "the"}, "content": "a"}),
        "Sequence with BertNormalizer": of_tokenizer(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": False}]}),
    },
    "pre_tokenizer": {
        "Whitespace": of_tokenizer(pre_tokenizer={"type": "Whitespace"}),
        "WhitespaceSplit": of_tokenizer(pre_tokenizer={"type": "WhitespaceSplit"}),
        "none": of_tokenizer(pre_tokenizer=None),
        "digits": of_tokenizer(pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "BertPreTokenizer"}, {"type": "Digits", "individual_digits": True}]}),
    },
    "wordpiece": {
        "max_input_chars_per_word": of_model(max_input_chars_per_word=5),
        "continuing_subword_prefix": of_model(continuing_subword_prefix="@@"),
        "unk_token": of_model(unk_token="the"),
        "unk_token absent from the vocabulary": of_model(unk_token="<nowhere>"),
        "type absent": lambda folder: folder.json[TOKENIZER]["model"].pop("type"),
    },
    "tokenizer kind": {
        "Unigram, Metaspace always": metaspace,
        "Unigram, Metaspace first": lambda folder: metaspace(folder, "first"),
        "Unigram, XLMRobertaTokenizer": both(metaspace, of_config(tokenizer_class="XLMRobertaTokenizer")),
        "Unigram, XLMRobertaTokenizerFast": both(metaspace, of_config(tokenizer_class="XLMRobertaTokenizerFast")),
        "Unigram, TokenizersBackend": both(metaspace, of_config(tokenizer_class="TokenizersBackend")),
        "Unigram, BertTokenizer": both(metaspace, of_config(tokenizer_class="BertTokenizer")),
        "Unigram, class absent": both(metaspace, of_config(tokenizer_class=...)),
        "WordLevel": word_level,
    },
    "truncation_side": each("truncation_side", "left", "right", "middle", null=None),
    "truncation block": {
        "right": of_tokenizer(truncation=truncation("Right")),
        "left": of_tokenizer(truncation=truncation("Left")),
        "left, config right": both(of_tokenizer(truncation=truncation("Left")), of_config(truncation_side="right")),
        "right, config left": both(of_tokenizer(truncation=truncation("Right")), of_config(truncation_side="left")),
        "stride": of_tokenizer(truncation=truncation("Right", stride=5)),
        "OnlyFirst": of_tokenizer(truncation=truncation("Left", strategy="OnlyFirst")),
        "OnlySecond": of_tokenizer(truncation=truncation("Right", strategy="OnlySecond")),
        "none": of_tokenizer(truncation=None),
    },
    "padding block": {
        "fixed": lambda folder: folder.json[TOKENIZER].update(padding=padding({"Fixed": 30}, folder)),
        "longest": lambda folder: folder.json[TOKENIZER].update(padding=padding("BatchLongest", folder)),
        "left": lambda folder: folder.json[TOKENIZER].update(padding=padding({"Fixed": 30}, folder, direction="Left")),
        "multiple": lambda folder: folder.json[TOKENIZER].update(padding=padding("BatchLongest", folder, pad_to_multiple_of=8)),
        "none": of_tokenizer(padding=None),
    },
    "padding keys": {
        "padding_side left": of_config(padding_side="left"),
        "padding_side middle": of_config(padding_side="middle"),
        "pad_to_multiple_of": of_config(pad_to_multiple_of=8, max_length=12, stride=3, truncation_strategy="longest_first"),
        "max_length": of_config(max_length=12),
    },
    "model_max_length": each("model_max_length", 12, 2, 1, 0, -1, 24.0, 1e30, BIG, "512", 100000, float("inf"), float("nan"), absent=..., null=None)
    | {"max_len": of_config(max_len=12, model_max_length=...)},
    "added in tokenizer.json": {label: in_tokenizer_json(declared) for label, declared in TOKENS.items()},
    "added in added_tokens_decoder": {label: in_decoder(declared) for label, declared in TOKENS.items()}
    | {
        "alone": in_decoder(TOKENS["special"], alone=True),
        "at another id": in_decoder(TOKENS["special"], at=50),
        "at a far id": in_decoder(TOKENS["special"], at=100000),
        "empty": of_config(added_tokens_decoder={}),
        "other flags than tokenizer.json": both(in_tokenizer_json(TOKENS["plain"]), in_decoder(TOKENS["lstrip"])),
        "not an object": of_config(added_tokens_decoder={"200": "[NEW]"}),
    },
    "added_tokens.json": {
        "a new token": json_file("added_tokens.json", lambda f: {"[NEW]": f.next_id}),
        "two tokens": json_file("added_tokens.json", lambda f: {"newtok": f.next_id, "[NEW]": f.next_id + 1}),
        "a piece": json_file("added_tokens.json", {"the": 60}),
        "a special token": both(json_file("added_tokens.json", lambda f: {"[NEW]": f.next_id}), of_config(additional_special_tokens=["[NEW]"])),
    },
    "special_tokens_map.json": {
        "as tokenizer_config.json": json_file("special_tokens_map.json", roles),
        "objects": json_file("special_tokens_map.json", lambda f: {k: without_special(token(v, normalized=False)) for k, v in roles(f).items()}),
        "objects with rstrip": json_file("special_tokens_map.json", lambda f: {k: without_special(token(v, normalized=False, rstrip=True)) for k, v in roles(f).items()}),
        "another sep": json_file("special_tokens_map.json", lambda f: {"sep_token": "the"}),
        "a new bos": json_file("special_tokens_map.json", lambda f: {"bos_token": "<start>"}),
        "additional": json_file("special_tokens_map.json", {"additional_special_tokens": ["[NEW]"]}),
        "additional objects": json_file("special_tokens_map.json", {"additional_special_tokens": [without_special(TOKENS["lstrip"])]}),
        "extra": json_file("special_tokens_map.json", {"extra_special_tokens": ["[NEW]", without_special(token("newtok", rstrip=True))]}),
        "extra by name": json_file("special_tokens_map.json", {"extra_special_tokens": {"image_token": "<img>"}}),
        "beside a decoder": both(json_file("special_tokens_map.json", {"additional_special_tokens": ["newtok"]}), in_decoder(TOKENS["special"])),
    },
    "additional_special_tokens": {
        "list": of_config(additional_special_tokens=["[NEW]", "newtok"]),
        "objects": of_config(additional_special_tokens=[{"__type": "AddedToken"} | TOKENS["lstrip"]]),
        "plain objects": of_config(additional_special_tokens=[TOKENS["lstrip"]]),
        "a piece": of_config(additional_special_tokens=["the"]),
        "empty": of_config(additional_special_tokens=[]),
        "null": of_config(additional_special_tokens=None),
        "with extra_special_tokens": of_config(additional_special_tokens=["newtok"], extra_special_tokens=["[NEW]"]),
    },
    "extra_special_tokens": {
        "list": of_config(extra_special_tokens=["[NEW]", "newtok"]),
        "dict": of_config(extra_special_tokens={"image_token": "<img>"}),
        "empty dict": of_config(extra_special_tokens={}),
        "objects": of_config(extra_special_tokens=[{"__type": "AddedToken"} | TOKENS["rstrip"]]),
        "a string": of_config(extra_special_tokens="[NEW]"),
        "model specific": of_config(model_specific_special_tokens={"image_token": "<img>"}),
    },
    "named tokens": {
        "a new bos_token": of_config(bos_token="<start>"),
        "image_token": of_config(image_token="<img>"),
        "an object": lambda f: f.file(CONFIG).update(mask_token={"__type": "AddedToken"} | token(f.specials["mask"], lstrip=True, normalized=False)),
        "an object with rstrip": lambda f: f.file(CONFIG).update(sep_token={"__type": "AddedToken"} | token(f.specials["sep"], rstrip=True, normalized=False)),
        "a plain object": lambda f: f.file(CONFIG).update(sep_token=token(f.specials["sep"], rstrip=True, normalized=False)),
        "another sep_token": of_config(sep_token="the"),
        "another cls_token": of_config(cls_token="a"),
        "a new sep_token": of_config(sep_token="<end>"),
        "another unk_token": of_config(unk_token="the"),
        "unk_token null": of_config(unk_token=None),
        "pad_token null": of_config(pad_token=None),
        "pad_token absent": of_config(pad_token=...),
        "another pad_token": of_config(pad_token="the"),
        "mask_token null": of_config(mask_token=None),
        "mask_token absent": of_config(mask_token=...),
        "sep_token null": of_config(sep_token=None),
        "all absent": of_config(cls_token=..., sep_token=..., pad_token=..., unk_token=..., mask_token=..., bos_token=..., eos_token=...),
        "a number": of_config(sep_token=3),
    },
    "special tokens in tokenizer.json": {
        "none": of_tokenizer(added_tokens=[]),
        "lstrip": lambda f: [t.update(lstrip=True, rstrip=True) for t in f.json[TOKENIZER]["added_tokens"]],
        "not special": lambda f: [t.update(special=False) for t in f.json[TOKENIZER]["added_tokens"]],
        "normalized": lambda f: [t.update(normalized=True) for t in f.json[TOKENIZER]["added_tokens"]],
        "single_word": lambda f: [t.update(single_word=True) for t in f.json[TOKENIZER]["added_tokens"]],
        "absent key": lambda f: f.json[TOKENIZER].pop("added_tokens"),
    },
    "post_processor": {
        "none": post_processor(None),
        "template": post_processor(lambda f: template(f, f.specials["cls"], "$A", f.specials["sep"])),
        "template without sep": post_processor(lambda f: template(f, f.specials["cls"], "$A")),
        "template, two seps": post_processor(lambda f: template(f, f.specials["cls"], "$A", f.specials["sep"], f.specials["sep"])),
        "template, nothing": post_processor(lambda f: template(f, "$A")),
        "BertProcessing": post_processor(pairs("BertProcessing")),
        "RobertaProcessing": post_processor(pairs("RobertaProcessing", trim_offsets=True, add_prefix_space=False)),
        "Sequence": post_processor(lambda f: {"type": "Sequence", "processors": [pairs("BertProcessing")(f)]}),
        "ByteLevel": post_processor({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}),
        "none, class PreTrainedTokenizerFast": both(post_processor(None), of_config(tokenizer_class="PreTrainedTokenizerFast")),
        "none, added bos and eos": both(post_processor(None), of_config(tokenizer_class="PreTrainedTokenizerFast", add_bos_token=True, add_eos_token=True, bos_token="the", eos_token="a")),
        "type ids": post_processor(lambda f: template(f, f.specials["cls"], "$A", f.specials["sep"]) | {"single": [{"Sequence": {"id": "A", "type_id": 1}}]}),
    },
    "tokenizer_config keys": {
        "harmless": of_config(clean_up_tokenization_spaces=True, processor_class="X", name_or_path="y", verbose=True, tokenizer_file="nowhere", special_tokens_map_file="nowhere", use_fast=True),
        "split_special_tokens": of_config(split_special_tokens=True),
        "model_input_names": of_config(model_input_names=["input_ids", "attention_mask"]),
        "model_input_names, ids alone": of_config(model_input_names=["input_ids"]),
        "chat_template": of_config(chat_template="{{ messages }}"),
        "add_prefix_space": of_config(add_prefix_space=True),
        "do_basic_tokenize": of_config(do_basic_tokenize=False),
        "never_split": of_config(never_split=["the"]),
        "add_bos_token": of_config(add_bos_token=True),
        "auto_map": of_config(auto_map={"AutoTokenizer": ["tokenization.X", None]}),
        "vocab": of_config(vocab={"the": 0}),
        "unknown": of_config(some_future_key=1),
        "from_slow": of_config(from_slow=True),
        "use_fast false": of_config(use_fast=False),
        "backend": of_config(backend="tokenizers", is_local=True),
        "a method's name": of_config(encode=True),
        "init_inputs": of_config(init_inputs=[]),
        "fast_tokenizer_files": of_config(fast_tokenizer_files=["tokenizer.json"]),
        "added_tokens_decoder and lower case": both(in_decoder(TOKENS["upper case, normalized"]), of_config(do_lower_case=False)),
    },
    "tokenizer files": {
        "vocab.txt beside": lambda f: f.raw.update({"vocab.txt": "\n".join(reversed(list(vocab(f)))) + "\n"}),
        "vocab.txt alone": both(lambda f: f.raw.update({"vocab.txt": "\n".join(vocab(f)) + "\n"}), lambda f: f.remove(TOKENIZER)),
        "nothing": lambda f: f.remove(TOKENIZER),
        "chat_template.jinja": lambda f: f.raw.update({"chat_template.jinja": "{{ x }}"}),
        "version": of_tokenizer(version="2.0"),
        "unknown key": of_tokenizer(some_future_key=1),
        "preprocessor_config.json": lambda f: f.json.update({"preprocessor_config.json": {"image_processor_type": "X"}}),
        "processor_config.json": lambda f: f.json.update({"processor_config.json": {"processor_class": "X"}}),
    },
}  # fmt: skip
