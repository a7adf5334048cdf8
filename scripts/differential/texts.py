"""The texts that every folder is compared on: scripts, case, accents, literal special and added tokens, edges, and long ones."""

_STORY = (
    "The engine reads a sentence, cuts it into pieces, and gives every piece a number. Numbers become vectors; vectors meet in "
    "attention, layer after layer, until each of them knows its neighbours. Then the vectors are pooled into one. "
)

TEXTS = [
    "",
    "the cat reads a sentence",
    "  the   vectors\tmean\nthe same \u3000",
    " \t\n",
    "UPPER CASE The B and NEW newtok NEWTOK",
    "Crème brûlée, É é naïve ÖÜß İstanbul",
    "Cre\u0300me e\u0301 bru\u0302le\u0301e \u0300",
    "日本語 the 東京 and日本語engine",
    "🚀 rockets 🙂🙂 the",
    "the[SEP]engine [SEP] mean [CLS]the [MASK] a [PAD]",
    "the</s>engine </s> mean <s>the a <mask> b <unk> [UNK]",
    "[sep] </S> [mask ] <mask>",
    "the[NEW]engine, [NEW] mean [new] x[NEW]",
    "newtok new tok newtokens anewtok  newtok  the",
    "two words, the two  words and atwo words",
    "Ünï the ünï UNI uni",
    "<img> the <start> a <img><start> <end>",
    "a control \x00 \x07 \x7f char \ufffd and \u200b\u00ad zero \u200d width",
    "\ufeffa byte order mark and \u2028 a line separator",
    "query: how are vectors pooled?",
    "unit" * 40,
    "!!! ??? ... --- ((()))",
    _STORY[:60],
    _STORY,
    _STORY * 8,
    "A " + "[NEW] the " * 120 + "end of the last sentence",
    "a literal <pad>the <pad> counts in MPNet's positions",
]
