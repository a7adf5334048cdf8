"""JinaBERT v2 in plain PyTorch, both forms: an oracle for fixtures. transformers has no class of its own, and the authors' code is not run here.

The earlier form (jina-embeddings-v2-base-en): BERT with slopes by distance instead of positions, and a gate whose first half is activated. The
later one (jina-embeddings-v2-base-code): queries and keys through a LayerNorm each, a LayerNorm and residual more around attention, and a gate
whose second half is activated.
"""

import json
import math
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch import nn


def slopes(heads: int) -> list[float]:
    """2^-8/n, 2^-16/n, ... for a power of two n; for other numbers those of the power below, then every other one of the power above."""
    power = 2 ** math.floor(math.log2(heads))
    own = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    return own if power == heads else own + slopes(2 * power)[0::2][: heads - power]


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int, eps: float, later: bool):
        super().__init__()
        self.heads, self.slopes = heads, torch.tensor(slopes(heads))
        own = nn.ModuleDict({name: nn.Linear(hidden, hidden) for name in ("query", "key", "value")})
        if later:
            own["layer_norm_q"], own["layer_norm_k"] = nn.LayerNorm(hidden, eps), nn.LayerNorm(hidden, eps)
        self.add_module("self", own)
        self.output = nn.ModuleDict({"dense": nn.Linear(hidden, hidden), "LayerNorm": nn.LayerNorm(hidden, eps)})
        self.later = later

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[tokens, hidden]` of one text, through attention, its residual and its norm."""
        own = getattr(self, "self")
        q, k, v = own["query"](x), own["key"](x), own["value"](x)
        if self.later:
            q, k = own["layer_norm_q"](q), own["layer_norm_k"](k)
        tokens, hidden = x.shape
        q, k, v = (part.view(tokens, self.heads, -1).transpose(0, 1) for part in (q, k, v))
        place = torch.arange(tokens)
        context = []
        for rows in place.split(512):  # all scores of a long text would not fit
            distance = (rows[:, None] - place[None, :]).abs().float()
            scores = q[:, rows] @ k.transpose(1, 2) / (hidden // self.heads) ** 0.5
            context.append((scores - self.slopes[:, None, None] * distance).softmax(-1) @ v)
        context = torch.cat(context, 1).transpose(0, 1).reshape(tokens, hidden)
        return self.output["LayerNorm"](self.output["dense"](context) + x)


class Layer(nn.Module):
    def __init__(self, config: dict, later: bool):
        super().__init__()
        hidden, wide, eps = config["hidden_size"], config["intermediate_size"], config["layer_norm_eps"]
        self.attention = Attention(hidden, config["num_attention_heads"], eps, later)
        names = ("up_gated_layer", "down_layer") if later else ("gated_layers", "wo")
        self.mlp = nn.ModuleDict({names[0]: nn.Linear(hidden, 2 * wide, bias=False), names[1]: nn.Linear(wide, hidden)})
        if later:
            self.layer_norm_1, self.layer_norm_2 = nn.LayerNorm(hidden, eps), nn.LayerNorm(hidden, eps)
        else:
            self.mlp["layernorm"] = nn.LayerNorm(hidden, eps)
        self.later = later
        self.activation = {"geglu": nn.GELU(), "reglu": nn.ReLU()}[config["feed_forward_type"]]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attended = self.attention(x)
        if self.later:
            x = self.layer_norm_1(x + attended)
            up, gate = self.mlp["up_gated_layer"](x).chunk(2, -1)
            return self.layer_norm_2(x + self.mlp["down_layer"](up * self.activation(gate)))
        gate, value = self.mlp["gated_layers"](attended).chunk(2, -1)
        return self.mlp["layernorm"](self.mlp["wo"](self.activation(gate) * value) + attended)


class JinaBert(nn.Module):
    def __init__(self, config: dict, later: bool):
        super().__init__()
        hidden = config["hidden_size"]
        self.embeddings = nn.ModuleDict({
            "word_embeddings": nn.Embedding(config["vocab_size"], hidden),
            "token_type_embeddings": nn.Embedding(config["type_vocab_size"], hidden),
            "LayerNorm": nn.LayerNorm(hidden, config["layer_norm_eps"]),
        })  # fmt: skip
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(config, later) for _ in range(config["num_hidden_layers"]))})

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embeddings["word_embeddings"](ids) + self.embeddings["token_type_embeddings"].weight[0]
        x = self.embeddings["LayerNorm"](x)
        for layer in self.encoder["layer"]:
            x = layer(x)
        return x


class JinaReference:
    """A folder's model with its tokenizer, as far as fixtures ask for it: mean pooling, unit vectors."""

    def __init__(self, folder: Path):
        config = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
        self.model = JinaBert(config, any("layer_norm_q" in name for name in tensors)).eval()
        self.model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        self.tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        self.limit = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]

    def preprocess(self, texts: list[str]) -> dict:
        return {"input_ids": [torch.tensor(self.tokenizer(text, truncation=True, max_length=self.limit)["input_ids"]) for text in texts]}

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.model(ids.long()).contiguous()

    def encode(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(self.hidden(ids).mean(0, keepdim=True), dim=-1)
