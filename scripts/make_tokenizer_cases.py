#!/usr/bin/env python3
"""Writes tests/fixtures/tokenizers/cases.json: small tokenizers in every way that their files can differ, with the ids of transformers.

Usage: make_tokenizer_cases.py [RANDOM_CASES [SEED]]     (needs transformers 5 with tokenizers)

tests/fixtures/tokenizers holds the vocabularies (wordpiece.json, mpnet.json, unigram.json, bpe.json). A case names one of them, changes
some of its fields (`json`), adds other files (`files`) and gives the arguments that sentence_bert_config.json would (`overrides`). `ids`
are those of every text; `error` says what transformers raises instead.
"""

import copy
import json
import pathlib
import random
import sys
import tempfile
import warnings

from transformers import AutoTokenizer
from transformers.utils import logging

FOLDER = pathlib.Path(__file__).parent.parent / "tests/fixtures/tokenizers"
LIMIT = 14

TEXTS = [
    "",
    "the cat sat on the mat",
    "The Cat, the MAT; Berlin!",
    "café Ünïcode naïve CAFÉ",
    "我爱北京 cats 中文",
    "a literal </s> and <s> or <pad> and <mask> in it",
    "a literal [SEP] and [CLS] or [PAD] , [MASK] and [UNK]",
    "the cat sat on the mat and it may rain in london the cat sat on the mat and then it fell on berlin stocks",
    "foo <new> bar  <e1> the <e2>cat <image> x<tool>y X<TOOL>Y",
    "the\tcat\nsat \u200b on\u3000it",
    "mat. <Mask> [sep] [mask] </S>",
    "<e1><e2> <new>",
]

SPECIAL = {
    "wordpiece": {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"},
    "mpnet": {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>",
              "unk_token": "[UNK]", "mask_token": "<mask>"},
    "unigram": {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>",
                "unk_token": "<unk>", "mask_token": "<mask>"},
}
SPECIAL["bpe"] = SPECIAL["unigram"]
CLASSES = {
    "wordpiece": ["BertTokenizer", "BertTokenizerFast", "DistilBertTokenizer", "PreTrainedTokenizerFast", "DPRQuestionEncoderTokenizer",
                  "ElectraTokenizer", "RetriBertTokenizer", "MPNetTokenizer", None],
    "mpnet": ["MPNetTokenizer", "MPNetTokenizerFast", "PreTrainedTokenizerFast", "BertTokenizer", None],
    "unigram": ["XLMRobertaTokenizer", "XLMRobertaTokenizerFast", "PreTrainedTokenizerFast", "BertTokenizer", None],
    "bpe": ["RobertaTokenizer", "RobertaTokenizerFast", "PreTrainedTokenizerFast", "BartTokenizer"],
}
MODEL_TYPES = {"wordpiece": "bert", "mpnet": "mpnet", "unigram": "bert", "bpe": "mpnet"}


def token(content, marked=True, **flags):
    fields = {"content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": True, **flags}
    return {"__type": "AddedToken", **fields} if marked else fields


def case(base, name, tokenizer_class="default", config=None, files=None, overrides=None, json_fields=None, model_class=None):
    tokenizer_config = dict(SPECIAL[base]) if config is None or config.pop("special", True) else {}
    tokenizer_config.update(config or {})
    if tokenizer_class == "default":
        tokenizer_class = CLASSES[base][0]
    if tokenizer_class is not None:
        tokenizer_config["tokenizer_class"] = tokenizer_class
    files = dict(files or {})
    if tokenizer_config.pop("absent", False) is False:
        files["tokenizer_config.json"] = tokenizer_config
    return {"name": f"{base}: {name}", "base": base, "model_type": MODEL_TYPES[base], "model_class": model_class,
            "json": json_fields or {}, "files": files, "overrides": overrides or {}}


def written_cases():
    decoder = {"0": token("[PAD]", False, normalized=False, special=True), "100": token("<new>", False, special=False),
               "101": token("<e1>", False, lstrip=True, normalized=False, special=True)}
    cut = lambda side: {"truncation": {"direction": side, "max_length": 9, "strategy": "LongestFirst", "stride": 0}}
    pad = {"padding": {"strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
                       "pad_token": "<padding>"}}
    for base, classes in CLASSES.items():
        for name in classes:
            yield case(base, f"class {name}", name)
            yield case(base, f"class {name}, cased", name, {"do_lower_case": False})
            yield case(base, f"class {name}, no special tokens named", name, {"special": False})
        yield case(base, "class of config.json", None, model_class=classes[0])
        yield case(base, "without tokenizer_config.json", None, {"special": False, "absent": True})
        yield case(base, "left", config={"truncation_side": "left"})
        yield case(base, "left by tokenizer.json", json_fields=cut("Left"))
        yield case(base, "right over left", config={"truncation_side": "right"}, json_fields=cut("Left"))
        yield case(base, "left by override", overrides={"truncation_side": "left"}, json_fields=cut("Right"))
        yield case(base, "padding with a token of its own", "PreTrainedTokenizerFast", {"special": False}, json_fields=pad)
        yield case(base, "added_tokens_decoder", config={"added_tokens_decoder": decoder})
        yield case(base, "added_tokens_decoder, plain", "PreTrainedTokenizerFast", {"added_tokens_decoder": decoder})
        yield case(base, "extra list", config={"extra_special_tokens": ["<e1>", token("<e2>", lstrip=True, special=True)]})
        yield case(base, "extra object", config={"extra_special_tokens": {"image_token": "<image>"}})
        yield case(base, "additional list", config={"additional_special_tokens": ["<e2>", "<e1>"]})
        yield case(base, "both lists", config={"additional_special_tokens": ["<e2>"], "extra_special_tokens": ["<e1>"]})
        yield case(base, "model-specific token", config={"tool_token": "<tool>"})
        yield case(base, "mask of several flags", config={"mask_token": token("<new>", lstrip=True, rstrip=True, single_word=True)})
        yield case(base, "split special tokens", config={"split_special_tokens": True})
        yield case(base, "null pad and mask", config={"pad_token": None, "mask_token": None})
        yield case(base, "null cls and sep", config={"cls_token": None, "sep_token": None})
        yield case(base, "an unknown token out of the vocabulary", config={"unk_token": "<unknown>"})
        yield case(base, "special_tokens_map", config={"special": False}, files={
            "special_tokens_map.json": {**SPECIAL[base], "mask_token": token("<new>", False, rstrip=True),
                                        "extra_special_tokens": ["<e1>", token("<e2>", False)]}})
        yield case(base, "special_tokens_map unread", config={"added_tokens_decoder": decoder}, files={
            "special_tokens_map.json": {"mask_token": "<e2>"}})
        yield case(base, "special_tokens_map with additional", files={"special_tokens_map.json": {"additional_special_tokens": ["<e1>"]}})
        yield case(base, "special_tokens_map with model-specific", files={"special_tokens_map.json": {"image_token": "<image>"}})
        yield case(base, "special_tokens_map under an override", files={"special_tokens_map.json": {"mask_token": "<e2>"}},
                   overrides={"mask_token": "<e1>"})
        yield case(base, "added_tokens.json", files={"added_tokens.json": {"<e1>": 201, "<e2>": 200, "<new>": 202}},
                   config={"extra_special_tokens": ["<e2>"]})
        yield case(base, "add_bos and add_eos", config={"add_bos_token": True, "add_eos_token": True})
        yield case(base, "add_bos and add_eos by override, plain", "PreTrainedTokenizerFast",
                   overrides={"add_bos_token": True, "add_eos_token": False})
        yield case(base, "no post-processor", json_fields={"post_processor": None})
        yield case(base, "no post-processor, plain", "PreTrainedTokenizerFast", json_fields={"post_processor": None})
        yield case(base, "no added tokens", json_fields={"added_tokens": []})
        yield case(base, "no added tokens, plain", "PreTrainedTokenizerFast", json_fields={"added_tokens": []})
        yield case(base, "no prefix space", config={"add_prefix_space": False})
        yield case(base, "prefix space", config={"add_prefix_space": True})
        yield case(base, "accents kept", config={"strip_accents": False})
        yield case(base, "ideographs together", config={"tokenize_chinese_chars": False})
        yield case(base, "a wrong side", config={"truncation_side": "middle"})
        yield case(base, "a token without its type", config={"mask_token": token("<new>", False)})
        yield case(base, "a number for a token", config={"mask_token": 3})
        yield case(base, "text for a flag", config={"do_lower_case": "no", "add_prefix_space": None})
        yield case(base, "lower case and normalizer of the file", json_fields={"normalizer": {"type": "Lowercase"}})
        yield case(base, "old keys", config={"do_basic_tokenize": False, "never_split": ["cat"], "max_length": 5, "stride": 2,
                                             "truncation_strategy": "only_first", "pad_to_multiple_of": 8, "padding_side": "left",
                                             "clean_up_tokenization_spaces": True, "name_or_path": "x"})
        yield case(base, "an Unigram class", "XLMRobertaTokenizer")
        yield case(base, "a BPE class", "RobertaTokenizer")
    for tokenizer_class in ("BertTokenizer", "MPNetTokenizer", None):
        yield case("wordpiece", f"vocab.txt alone, {tokenizer_class}", tokenizer_class, {"do_lower_case": False}, files={"vocab.txt": True})


def camembert_cases():
    """After all others, so that those stay as they are. Most of its files are told as XLM-RoBERTa's."""
    kind = "CamembertTokenizer"
    case_of = lambda name, **parts: case("unigram", f"CamemBERT, {name}", kind, **parts)
    yield case_of("class")
    yield case_of("no special tokens named", config={"special": False})
    yield case("unigram", "CamemBERT, Fast", "CamembertTokenizerFast", {"special": False})
    yield case_of("extra list", config={"extra_special_tokens": ["<e1>"]})
    yield case_of("empty extra list", config={"extra_special_tokens": []})
    yield case_of("extra object", config={"extra_special_tokens": {"image_token": "<image>"}})
    yield case_of("additional list", config={"additional_special_tokens": ["<e2>", "<e1>"]})
    yield case_of("both lists", config={"additional_special_tokens": ["<e2>"], "extra_special_tokens": ["<e1>"]})
    yield case_of("no prefix space", config={"add_prefix_space": False})
    yield case_of("null prefix space", config={"add_prefix_space": None})
    yield case_of("another unknown token", config={"unk_token": "e"})
    yield case_of("an unknown token out of the vocabulary", config={"unk_token": "<unknown>"})
    yield case_of("null unknown token", config={"unk_token": None})
    yield case_of("mask of several flags", config={"mask_token": token("<new>", lstrip=True, rstrip=True, single_word=True)})
    yield case_of("no post-processor", json_fields={"post_processor": None})
    yield case_of("null bos", config={"bos_token": None})
    yield case_of("special_tokens_map", config={"special": False}, files={
        "special_tokens_map.json": {**SPECIAL["unigram"], "mask_token": token("<new>", False, rstrip=True)}})
    yield case("wordpiece", "a Unigram class", kind)


def random_case(rng):
    base = rng.choice(list(CLASSES))
    names = ["<e1>", "<e2>", "<new>", "<image>", "<tool>", "cat", "The", "[SEP]", "</s>", "<mask>", "[MASK]", "é", "中"]

    def some_token():
        content = rng.choice(names)
        if rng.random() < 0.5:
            return content
        flags = {key: rng.random() < 0.4 for key in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        return token(content, **flags)

    config = {"special": rng.random() < 0.8}
    for key, values in {"do_lower_case": [True, False], "strip_accents": [True, False, None], "tokenize_chinese_chars": [True, False],
                        "truncation_side": ["left", "right"], "add_prefix_space": [True, False], "split_special_tokens": [True, False],
                        "add_bos_token": [True, False]}.items():
        if rng.random() < 0.3:
            config[key] = rng.choice(values)
    for key in ("mask_token", "bos_token", "pad_token", "tool_token"):
        if rng.random() < 0.2:
            config[key] = some_token()
    if rng.random() < 0.4:
        config["extra_special_tokens"] = [some_token() for _ in range(rng.randint(0, 3))]
    if rng.random() < 0.3:
        config["additional_special_tokens"] = [some_token() for _ in range(rng.randint(0, 2))]
    if rng.random() < 0.4:
        config["added_tokens_decoder"] = {}
        for _ in range(rng.randint(0, 4)):
            form = some_token()
            form = token(form, False) if isinstance(form, str) else {k: v for k, v in form.items() if k != "__type"}
            config["added_tokens_decoder"][str(rng.randint(0, 400))] = form
    files = {}
    if rng.random() < 0.3:
        files["special_tokens_map.json"] = {key: (t if isinstance(t := some_token(), str) else {k: v for k, v in t.items() if k != "__type"})
                                            for key in ("mask_token", "cls_token") if rng.random() < 0.5}
    if rng.random() < 0.3:
        files["added_tokens.json"] = {rng.choice(names): rng.randint(300, 400) for _ in range(rng.randint(1, 3))}
    fields = {}
    if rng.random() < 0.2:
        fields["truncation"] = {"direction": rng.choice(["Left", "Right"]), "max_length": 7, "strategy": "LongestFirst", "stride": 0}
    if rng.random() < 0.2:
        fields["normalizer"] = rng.choice([None, {"type": "Lowercase"}, {"type": "NFKC"},
                                           {"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "StripAccents"}]}])
    if rng.random() < 0.15:
        fields["post_processor"] = None
    overrides = {"truncation_side": rng.choice(["left", "right"])} if rng.random() < 0.15 else {}
    return case(base, "random", rng.choice(CLASSES[base]), config, files, overrides, fields)


def write(folder, entry, tokenizers):
    content = copy.deepcopy(tokenizers[entry["base"]])
    content.update(entry["json"])
    (folder / "config.json").write_text(json.dumps({"model_type": entry["model_type"], "max_position_embeddings": 66,
                                                    **({"tokenizer_class": entry["model_class"]} if entry["model_class"] else {})}))
    if "vocab.txt" in entry["files"]:
        ids = sorted(content["model"]["vocab"].items(), key=lambda item: item[1])
        (folder / "vocab.txt").write_text("".join(f"{word}\n" for word, _ in ids))
    else:
        (folder / "tokenizer.json").write_text(json.dumps(content))
    for name, value in entry["files"].items():
        if name != "vocab.txt":
            (folder / name).write_text(json.dumps(value))


def fill_in(entry, tokenizers):
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        write(folder, entry, tokenizers)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, **copy.deepcopy(entry["overrides"]))
            tokenizer.model_max_length = LIMIT
            entry["ids"] = [tokenizer([text], truncation="longest_first")["input_ids"][0] for text in TEXTS]
        except BaseException as error:  # The Python bindings panic with an exception that is no Exception.
            if isinstance(error, KeyboardInterrupt):
                raise
            entry["error"] = f"{type(error).__name__}: {error}".replace(str(folder), "FOLDER")[:100]
    return entry


def main():
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 150
    rng = random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 11)
    tokenizers = {base: json.loads((FOLDER / f"{base}.json").read_text()) for base in CLASSES}
    cases = [fill_in(entry, tokenizers) for entry in [*written_cases(), *(random_case(rng) for _ in range(count)), *camembert_cases()]]
    out = pathlib.Path(sys.argv[3]) if len(sys.argv) > 3 else FOLDER / "cases.json"
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False, separators=(",", ":")) for entry in cases)
    out.write_text('{"limit":%d,"texts":%s,"cases":[\n%s\n]}\n' % (LIMIT, json.dumps(TEXTS, ensure_ascii=False), lines))
    print(f"{len(cases)} cases, {sum('error' in entry for entry in cases)} that transformers refuses")


if __name__ == "__main__":
    main()
