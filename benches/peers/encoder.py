"""MPNet, BERT, XLM-RoBERTa and ModernBERT sentence encoders in plain PyTorch, as fast as simple code gets: ids and lengths to unit vectors.

One matrix product makes queries, keys and values; attention is `scaled_dot_product_attention`, whose mask is made once for each kind of
layer and holds MPNet's position bias, ModernBERT's window, and the padding. Linear, attention, LayerNorm and activation in the given type,
pooling in fp32.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

MASKED = -1e4  # finite in fp16, so that a row without tokens stays finite


class Norm(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float


class Linear(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor | None


class Layer(NamedTuple):
    qkv: Linear  # [3 hidden, hidden]: queries, keys, values
    attention_output: Linear
    attention_norm: Norm | None  # behind attention; in front of it in ModernBERT, whose first layer has none
    intermediate: Linear  # in ModernBERT gate and value, [2 wide, hidden]
    output: Linear
    output_norm: Norm  # behind the feed-forward part; in front of it in ModernBERT


# Parts of a layer's tensor names: queries, keys, values, attention output, LayerNorm after it.
BERT_NAMES = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "attention.output.LayerNorm",
)
NAMES = {
    "mpnet": ("attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o", "attention.LayerNorm"),
    "bert": BERT_NAMES,
    "xlm-roberta": BERT_NAMES,
}
# Families whose first token has the position behind the padding id's.
COUNTED_FROM_PADDING = ("mpnet", "xlm-roberta")
FULL, SLIDING = "full_attention", "sliding_attention"


def norm(x: torch.Tensor, with_: Norm | None) -> torch.Tensor:
    return x if with_ is None else F.layer_norm(x, x.shape[-1:], with_.weight, with_.bias, with_.eps)


def embed(ids: torch.Tensor, words: torch.Tensor, positions: torch.Tensor | None, with_: Norm) -> torch.Tensor:
    """[batch, seq] to [batch, seq, hidden]."""
    rows = F.embedding(ids, words)
    return norm(rows if positions is None else rows + positions[: ids.shape[1]], with_)


def attention_mask(lengths: torch.Tensor, bias: torch.Tensor, heads: int) -> torch.Tensor:
    """The position bias [1, heads or 1, seq, seq] where the key is a token, a large negative number where it is padding."""
    seq = bias.shape[-1]
    tokens = torch.arange(seq, device=lengths.device) < lengths[:, None]
    return torch.where(tokens[:, None, None, :], bias, MASKED).expand(-1, heads, -1, -1)


def turn(x: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """[batch, heads, seq, head size] turned by positions: cosines and sines, [seq, head size]."""
    cosines, sines = turns
    first, second = x.chunk(2, -1)
    return x * cosines + torch.cat((-second, first), -1) * sines


def attend(x: torch.Tensor, mask: torch.Tensor, turns: tuple | None, weights: Layer) -> torch.Tensor:
    batch, seq, hidden = x.shape
    heads = mask.shape[1]
    q, k, v = F.linear(x, *weights.qkv).view(batch, seq, 3, heads, hidden // heads).permute(2, 0, 3, 1, 4)
    if turns is not None:
        q, k = turn(q, turns), turn(k, turns)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # scaled by 1 / sqrt(hidden / heads)
    return F.linear(attended.transpose(1, 2).reshape(batch, seq, hidden), *weights.attention_output)


def layer(x: torch.Tensor, mask: torch.Tensor, turns: None, weights: Layer) -> torch.Tensor:
    x = norm(x + attend(x, mask, turns, weights), weights.attention_norm)
    return norm(x + F.linear(F.gelu(F.linear(x, *weights.intermediate)), *weights.output), weights.output_norm)


def pre_norm_layer(x: torch.Tensor, mask: torch.Tensor, turns: tuple, weights: Layer) -> torch.Tensor:
    x = x + attend(norm(x, weights.attention_norm), mask, turns, weights)
    gate, value = F.linear(norm(x, weights.output_norm), *weights.intermediate).chunk(2, -1)
    return x + F.linear(F.gelu(gate) * value, *weights.output)


def pool(hidden: torch.Tensor, lengths: torch.Tensor, final_norm: Norm | None) -> torch.Tensor:
    """The mean over each row's tokens at unit length, fp32 [batch, hidden]; zeros for a row without tokens."""
    tokens = torch.arange(hidden.shape[1], device=lengths.device) < lengths[:, None]
    hidden = norm(hidden, final_norm).float()
    return F.normalize((hidden * tokens[:, :, None]).sum(1) / lengths.clamp(min=1)[:, None], dim=-1)


class Encoder:
    """The weights of a transformers model on `device` in `dtype`; called with ids [batch, seq] and lengths [batch]."""

    def __init__(self, model, device: torch.device, dtype: torch.dtype):
        config = model.config
        self.model_type = config.model_type
        if self.model_type not in (*NAMES, "modernbert"):
            raise SystemExit(f"model_type {self.model_type}: this peer knows {', '.join(NAMES)} and modernbert")
        activation = config.hidden_activation if self.model_type == "modernbert" else config.hidden_act
        if activation != "gelu":
            raise SystemExit(f"activation {activation}: this peer knows gelu")
        self.device, self.dtype, self.heads, self.dim = device, dtype, config.num_attention_heads, config.hidden_size
        self.tensors = model.state_dict()
        self.kinds = [FULL] * config.num_hidden_layers  # of each layer's attention
        self.positions, self.final_norm, self.window, self.thetas = None, None, None, {}
        if self.model_type == "modernbert":
            self.read_pre_norm(config)
        else:
            self.read_post_norm(model)
        del self.tensors
        self.shapes = {}
        block = pre_norm_layer if self.model_type == "modernbert" else layer
        self.parts = {"embed": embed, "attention_mask": attention_mask, "layer": block, "pool": pool}
        self.forward = self.run

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, self.dtype, copy=True)

    def stored(self, name: str) -> torch.Tensor | None:
        return self.put(self.tensors[name]) if name in self.tensors else None

    def linear(self, *names: str) -> Linear:
        weight, bias = ([self.tensors.get(f"{name}.{part}") for name in names] for part in ("weight", "bias"))
        return Linear(self.put(torch.cat(weight)), None if bias[0] is None else self.put(torch.cat(bias)))

    def read_norm(self, name: str, eps: float) -> Norm | None:
        return Norm(self.stored(f"{name}.weight"), self.stored(f"{name}.bias"), eps) if f"{name}.weight" in self.tensors else None

    def read_post_norm(self, model) -> None:
        config = model.config
        if getattr(config, "position_embedding_type", None) not in (None, "absolute"):
            raise SystemExit(f"position_embedding_type {config.position_embedding_type}: this peer knows absolute")
        eps = config.layer_norm_eps
        self.words = self.stored("embeddings.word_embeddings.weight")
        positions = self.tensors["embeddings.position_embeddings.weight"]
        if self.model_type in COUNTED_FROM_PADDING:
            positions = positions[config.pad_token_id + 1 :]
        if self.model_type == "mpnet":
            bias = model.encoder.compute_position_bias(torch.empty(1, len(positions), 1, device=positions.device))
            self.bias = self.put(bias)
        else:
            positions = positions + self.tensors["embeddings.token_type_embeddings.weight"][0]
        self.positions = self.put(positions)
        self.longest = len(positions)
        self.norm = self.read_norm("embeddings.LayerNorm", eps)
        self.layers = []
        for i in range(config.num_hidden_layers):
            prefix = f"encoder.layer.{i}."
            q, k, v, attention_output, attention_norm = (prefix + name for name in NAMES[self.model_type])
            weights = Layer(
                qkv=self.linear(q, k, v),
                attention_output=self.linear(attention_output),
                attention_norm=self.read_norm(attention_norm, eps),
                intermediate=self.linear(prefix + "intermediate.dense"),
                output=self.linear(prefix + "output.dense"),
                output_norm=self.read_norm(prefix + "output.LayerNorm", eps),
            )
            self.layers.append(weights)

    def read_pre_norm(self, config) -> None:
        every, eps = getattr(config, "global_attn_every_n_layers", 3), config.norm_eps
        count = range(config.num_hidden_layers)
        self.kinds = getattr(config, "layer_types", None) or [SLIDING if i % every else FULL for i in count]
        thetas = getattr(config, "rope_parameters", None)
        if thetas:
            self.thetas = {kind: thetas[kind]["rope_theta"] for kind in (FULL, SLIDING)}
        else:
            self.thetas = {FULL: config.global_rope_theta, SLIDING: config.local_rope_theta or config.global_rope_theta}
        self.window = config.local_attention // 2  # to each side
        self.words, self.longest = self.stored("embeddings.tok_embeddings.weight"), config.max_position_embeddings
        self.norm, self.final_norm = self.read_norm("embeddings.norm", eps), self.read_norm("final_norm", eps)
        self.layers = []
        for i in count:
            prefix = f"layers.{i}."
            weights = Layer(
                qkv=self.linear(prefix + "attn.Wqkv"),
                attention_output=self.linear(prefix + "attn.Wo"),
                attention_norm=self.read_norm(prefix + "attn_norm", eps),
                intermediate=self.linear(prefix + "mlp.Wi"),
                output=self.linear(prefix + "mlp.Wo"),
                output_norm=self.read_norm(prefix + "mlp_norm", eps),
            )
            self.layers.append(weights)

    def made_for(self, seq: int) -> dict:
        """For each kind of attention the bias of scores, and cosines and sines where positions are rotary."""
        made = {}
        for kind in dict.fromkeys(self.kinds):
            if self.model_type == "mpnet":
                made[kind] = self.bias[:, :, :seq, :seq].contiguous(), None
                continue
            place = torch.arange(seq, device=self.device)
            bias = torch.zeros(1, 1, seq, seq, device=self.device, dtype=self.dtype)
            if kind == SLIDING:
                bias.masked_fill_((place[:, None] - place[None, :]).abs() > self.window, MASKED)
            turns = None
            if self.thetas:
                size = self.dim // self.heads
                frequencies = 1.0 / self.thetas[kind] ** (torch.arange(0, size, 2, device=self.device).float() / size)
                angles = torch.cat([place.float()[:, None] * frequencies] * 2, -1)
                turns = self.put(angles.cos()), self.put(angles.sin())
            made[kind] = bias, turns
        return made

    def compile(self, mode: str, scope: str) -> None:
        """`scope` layer compiles one layer for all (seconds a shape), model the whole at once (minutes)."""
        torch._dynamo.config.recompile_limit = 64  # a compilation for each shape
        settings = {"mode": mode, "dynamic": False, "fullgraph": True}
        if scope == "model":
            self.forward = torch.compile(self.run, **settings)
        else:
            self.parts = {name: torch.compile(part, **settings) for name, part in self.parts.items()}

    def run(self, ids: torch.Tensor, lengths: torch.Tensor, made: dict) -> torch.Tensor:
        x = self.parts["embed"](ids, self.words, self.positions, self.norm)
        masks = {kind: self.parts["attention_mask"](lengths, bias, self.heads) for kind, (bias, _) in made.items()}
        for kind, weights in zip(self.kinds, self.layers):
            x = self.parts["layer"](x, masks[kind], made[kind][1], weights)
        return self.parts["pool"](x, lengths, self.final_norm)

    def __call__(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Unit vectors, fp32 [batch, hidden]."""
        seq = ids.shape[1]
        if seq > self.longest:
            raise SystemExit(f"{seq} tokens: the model has {self.longest} positions")
        if seq not in self.shapes:
            self.shapes[seq] = self.made_for(seq)
        return self.forward(ids, lengths, self.shapes[seq])
