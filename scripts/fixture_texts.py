"""The texts that parity fixtures are made of: a few for the small seeded models, many and varied ones for all-MiniLM-L6-v2."""

STORY = (
    "The engine reads a sentence, cuts it into pieces, and gives every piece a number. Numbers become vectors; vectors meet in "
    "attention, layer after layer, until each of them knows its neighbours. Then the vectors are pooled into one, and that one is "
    "scaled to unit length. Two sentences that mean the same thing end up close together, and two that do not end up far apart. "
)

# Lengths from two tokens (the empty text) to far beyond the limit of both small models; some characters are in no vocabulary.
SMALL = [
    "",
    "a",
    "the",
    "   \t\n ",
    "A sentence.",
    "two sentences that mean the same thing",
    "The engine reads a sentence!",
    "Numbers become vectors; vectors become numbers.",
    "UPPER CASE, lower case, MiXeD case",
    "1234567890 and 3.14159",
    "Crème brûlée, naïve façade",
    "日本語 in the middle of a sentence",
    "🚀 rockets 🚀🚀 and 🙂 smiles",
    "!!! ??? ... --- ((()))",
    "attention",
    "unitunitunitunitunitunitunitunitunitunitunit",
    "line one\nline two\r\nline three\twith a tab",
    "query: how are vectors pooled?",
    STORY[:150],
    STORY[:300],
    STORY,
    STORY + STORY[:190],
    STORY * 2,
    STORY * 6,
]

# Texts whose hidden states are kept: two tokens, one word, medium, and the longest that each model takes.
SMALL_HIDDEN = [0, 2, 9, 18, 23]

_ENGLISH = [
    "This is an example sentence.",
    "Each sentence is converted to a vector.",
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "A man is riding a horse.",
    "A cheetah is running behind its prey.",
    "How do I reset my password?",
    "I forgot my password and cannot log in any more.",
    "Colorless green ideas sleep furiously.",
    "Buffalo buffalo Buffalo buffalo buffalo buffalo Buffalo buffalo.",
    "word",
    "I",
    "?",
    "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG",
    "the quick brown fox jumps over the lazy dog",
    "It's 5 o'clock; don't you think we'd better leave?",
    "Pneumonoultramicroscopicsilicovolcanoconiosis is a lung disease caused by inhaling very fine silica dust.",
    "antidisestablishmentarianism" * 4,  # longer than WordPiece's 100 characters: one unknown token
    "e.g., i.e., etc., vs., Dr. Smith Jr., Ph.D., U.S.A.",
]

_SCRIPTS = [
    "Der schnelle braune Fuchs springt über den faulen Hund.",
    "Où est la bibliothèque? Ça coûte combien?",
    "El niño comió piñas en la montaña.",
    "Zażółć gęślą jaźń.",
    "Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "İstanbul'da güneşli bir gün",
    "Быстрая коричневая лиса перепрыгивает через ленивую собаку.",
    "Η γρήγορη καφέ αλεπού πηδάει πάνω από το τεμπέλικο σκυλί.",
    "الثعلب البني السريع يقفز فوق الكلب الكسول",
    "השועל החום המהיר קופץ מעל הכלב העצלן",
    "तेज भूरी लोमड़ी आलसी कुत्ते के ऊपर कूदती है।",
    "สุนัขจิ้งจอกสีน้ำตาลกระโดดข้ามสุนัขขี้เกียจ",
    "敏捷的棕色狐狸跳过了懒狗。",
    "素早い茶色の狐がのろまな犬を飛び越える。ソフトウェア",
    "빠른 갈색 여우가 게으른 개를 뛰어넘습니다.",
    "nhanh như cắt, con cáo nâu nhảy qua con chó lười",
    "e\u0301 and \u00e9 are the same letter; \ufb01 is a ligature; Ａ is a wide letter",
    "mixed 中文 and English 混在 in one 句子",
]

_SYMBOLS = [
    "🚀",
    "I ❤️ Rust 🦀 and 👩‍👩‍👧‍👦 families 🇫🇷🇯🇵",
    "👍🏽👎🏿 ok?",
    "∀x∈ℝ: x² ≥ 0, ∑ᵢ aᵢ ≤ ∞, √2 ≈ 1.41421356",
    "$19.99 + 7.5% = €21,49 (approx.)",
    "2024-02-29T23:59:60Z",
    "0xDEADBEEF 1e-12 -273.15 1,000,000 0b1010",
    "+1 (555) 010-9999",
    "https://example.org/search?q=sentence%20embeddings&page=2#results",
    "first.last+tag@mail.example.com",
    "/usr/local/lib/libnvinfer.so.8",
    "fn main() { println!(\"{}\", (1..=10).map(|x| x * x).sum::<u32>()); }",
    "SELECT name, COUNT(*) FROM users WHERE age >= 21 GROUP BY name HAVING COUNT(*) > 1;",
    "def f(x):\n    return [y ** 2 for y in x if y % 2 == 0]\n",
    "<html><body><p class=\"x\">Hello &amp; goodbye</p></body></html>",
    "{\"id\": 7, \"tags\": [\"a\", \"b\"], \"ok\": true}",
    "!!!???...---___***",
    "a.b.c.d.e.f.g.h.i.j.k.l.m.n.o.p",
]

_EDGES = [
    "",
    " ",
    "\t\n\r ",
    "\u00a0\u2003\u3000",
    "\u200b",
    "  leading and trailing spaces  ",
    "tabs\tand\nnew\r\nlines",
    "control \x01 characters \x7f inside",
    "replacement \ufffd character",
    "[CLS] and [SEP] written out by a user [MASK]",
    "soft\u00adhyphen and zero\u200dwidth joiner",
]

_LONG = [
    STORY * 2,
    STORY * 3,
    STORY * 8,  # more than 256 tokens: cut
    "word " * 254,  # with its two special tokens exactly 256
    "word " * 255,  # one too many
    "one two three four five six seven eight nine ten " * 12,
    "東京" * 300,
    "supercalifragilisticexpialidocious " * 60,
]

MINILM = _ENGLISH + _SCRIPTS + _SYMBOLS + _EDGES + _LONG

# Texts whose hidden states are kept: a plain one, the empty one, one with many word pieces.
MINILM_HIDDEN = [0, 17, 56]
