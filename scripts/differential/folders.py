"""A model folder under construction: the base's files as JSON values, operations on its weights, and how both are written."""

import copy
import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FIXTURES = Path(__file__).resolve().parent.parent.parent / "tests" / "fixtures"

# Files that stay at the root when the encoder moves into a subfolder, beside everything that has a folder of its own.
ROOT_FILES = {"modules.json", "config_sentence_transformers.json"}

# Pieces put in the place of the base vocabulary's rarest, so that case, accents, splitting and literal special tokens change ids.
PIECES = [
    "A", "B", "T", "N", "UPPER", "The", "##A", "##E", "##S", "É", "é", "##é", "è", "e\u0301", "##\u0300", "ö", "ß", "ss", "İ", "日本",
    "##本", "##語", "語", "東", "京", "##京", "🙂", "[", "]", "<", ">", "/", "new", "NEW", "##NEW", "pad", "sep", "mask", "cls", "##tok",
]  # fmt: skip
FREE_IDS = 10  # rows of the embedding table that no piece uses: room for added tokens

WIDTHS = {"bert": 40, "mpnet": 32}
MODULE = "sentence_transformers.models."

_bases: dict = {}


def vocabulary(family: str, stored: dict) -> dict:
    """The base's vocabulary with PIECES in it; the last FREE_IDS ids are left free."""
    pieces = sorted(stored, key=stored.get)
    mask = [piece for piece in pieces[-1:] if family == "mpnet"]
    kept = pieces[: len(pieces) - FREE_IDS - len(PIECES) - len(mask)]
    return {piece: i for i, piece in enumerate(kept + PIECES + mask)}


def base(family: str) -> dict:
    """The JSON files of the base folder, by path."""
    if family not in _bases:
        root = FIXTURES / family
        files = {str(path.relative_to(root)): json.loads(path.read_text()) for path in sorted(root.rglob("*.json"))}
        tokenizer = files["tokenizer.json"]
        tokenizer["model"]["vocab"] = vocabulary(family, tokenizer["model"]["vocab"])
        for token in tokenizer["added_tokens"]:
            token["id"] = tokenizer["model"]["vocab"][token["content"]]
        _bases[family] = files, load_file(root / "model.safetensors")
    return _bases[family]


def seeded(name: str, *shape: int, scale: float = 0.4) -> torch.Tensor:
    """Values that depend on the name and shape alone."""
    seed = sum((i + 1) * byte for i, byte in enumerate(name.encode())) % 2**31
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Folder:
    """`json`: values by path. `raw`: texts that take a JSON file's place. `weights`: operations, see `tensors`. `parts`: tensors by path."""

    def __init__(self, family: str):
        self.family = family
        self.width = WIDTHS[family]
        files, self._tensors = base(family)
        self.json = copy.deepcopy(files)
        self.raw: dict[str, str] = {}
        self.weights: list[list] = []
        self.parts: dict[str, tuple[str, dict]] = {}
        self.encoder = ""

    def file(self, path: str) -> dict:
        """The JSON object at `path`, made when absent."""
        return self.json.setdefault(path, {})

    def remove(self, path: str) -> None:
        self.json.pop(path, None)

    def part(self, path: str, name: str, tensors: dict) -> None:
        """A safetensors file beside the encoder's weights; equal names mean equal tensors."""
        self.parts[path] = (name, tensors)

    @property
    def specials(self) -> dict:
        """Special tokens of the family by their role."""
        if self.family == "bert":
            return {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "unk": "[UNK]", "mask": "[MASK]"}
        return {"cls": "<s>", "sep": "</s>", "pad": "<pad>", "unk": "[UNK]", "mask": "<mask>"}

    @property
    def next_id(self) -> int:
        return len(base(self.family)[0]["tokenizer.json"]["model"]["vocab"])

    def place(self, path: str) -> str:
        """Where the file is written: the encoder's files move with it."""
        if self.encoder and "/" not in path and path not in ROOT_FILES:
            return f"{self.encoder}/{path}"
        return path

    def tensors(self) -> tuple[dict, dict]:
        """The weights after all operations, and how they are stored: tests/differential_folder/mod.rs does the same.

        prefix P | gamma_beta | cast DTYPE | rows NAME COUNT | copy FROM TO SCALE | remove NAME | positions NAME |
        shards FILES NAMES (further names in the index) | no_metadata
        """
        tensors = dict(self._tensors)
        stored = {"shards": 1, "index": [], "metadata": {"format": "pt"}}
        for kind, *values in self.weights:
            if kind == "prefix":
                tensors = {values[0] + name: tensor for name, tensor in tensors.items()}
            elif kind == "gamma_beta":
                names = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
                for old, new in names:
                    tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
            elif kind == "cast":
                dtype = {"F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}[values[0]]
                tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
            elif kind == "rows":
                tensors[values[0]] = tensors[values[0]][: values[1]].contiguous()
            elif kind == "copy":
                tensors[values[1]] = tensors[values[0]] * values[2]
            elif kind == "remove":
                del tensors[values[0]]
            elif kind == "positions":
                tensors[values[0]] = torch.arange(96).unsqueeze(0)
            elif kind == "shards":
                stored["shards"], stored["index"] = values
            elif kind == "no_metadata":
                stored["metadata"] = None
            else:
                raise ValueError(kind)
        return tensors, stored

    def text(self, path: str) -> str:
        return self.raw[path] if path in self.raw else json.dumps(self.json[path], indent=1, ensure_ascii=False)

    def write(self, root: Path) -> None:
        for path in {**self.json, **self.raw}:
            # An adapter names its base model: here the folder itself.
            self._target(root, path).write_text(self.text(path).replace('"FOLDER"', json.dumps(str(root))), encoding="utf-8")
        for path, (_, tensors) in self.parts.items():
            save_file(tensors, self._target(root, path), metadata={"format": "pt"})
        tensors, stored = self.tensors()
        if stored["shards"] == 1:
            save_file(tensors, self._target(root, "model.safetensors"), metadata=stored["metadata"])
            return
        names, weight_map, count, file = sorted(tensors), {}, stored["shards"], ""
        for i in range(count):
            file = f"model-{i + 1:05}-of-{count:05}.safetensors"
            save_file({n: tensors[n] for n in names[i::count]}, self._target(root, file), metadata=stored["metadata"])
            weight_map |= dict.fromkeys(names[i::count], file)
        weight_map |= dict.fromkeys(stored["index"], file)
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        self._target(root, "model.safetensors.index.json").write_text(json.dumps(index))

    def _target(self, root: Path, path: str) -> Path:
        target = root / self.place(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        return target


def edits(before, after, pointer: str = "") -> list:
    """What turns one JSON value into the other: [pointer, value] sets, [pointer] removes. Lists are replaced whole."""
    if isinstance(before, dict) and isinstance(after, dict):
        found = []
        for key in {**before, **after}:
            inner = f"{pointer}/{key.replace('~', '~0').replace('/', '~1')}"
            if key not in after:
                found.append([inner])
            elif key not in before:
                found.append([inner, after[key]])
            else:
                found += edits(before[key], after[key], inner)
        return found
    same = type(before) is type(after) and before == after
    return [] if same else [[pointer, after]]


def plain(value) -> bool:
    """Whether every number is one that any JSON reader keeps as it is."""
    if isinstance(value, dict):
        return all(map(plain, value.values()))
    if isinstance(value, list):
        return all(map(plain, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, int) or abs(value) < 2**53


def of_file(path: str, **changes):
    """Sets keys of a JSON file, made when absent; `...` removes one."""

    def apply(folder: Folder) -> None:
        file = folder.file(path)
        for key, value in changes.items():
            if value is ...:
                file.pop(key, None)
            else:
                file[key] = value

    return apply
