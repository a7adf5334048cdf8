"""MPNet and BERT sentence encoders in plain PyTorch, as fast as simple code gets: ids and lengths to unit vectors.

One matrix product makes queries, keys and values; attention is `scaled_dot_product_attention`, whose mask is made once and holds
MPNet's position bias and the padding. Linear, attention, LayerNorm and GELU (erf) in the given type, pooling in fp32.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

MASKED = -1e4  # finite in fp16, so that a row without tokens stays finite


class Norm(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor
    eps: float


class Linear(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor


class Layer(NamedTuple):
    qkv: Linear  # [3 hidden, hidden]: queries, keys, values
    attention_output: Linear
    attention_norm: Norm
    intermediate: Linear
    output: Linear
    output_norm: Norm


# Parts of a layer's tensor names: queries, keys, values, attention output, LayerNorm after it.
NAMES = {
    "mpnet": ("attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o", "attention.LayerNorm"),
    "bert": (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "attention.output.LayerNorm",
    ),
}


def norm(x: torch.Tensor, with_: Norm) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], with_.weight, with_.bias, with_.eps)


def embed(ids: torch.Tensor, words: torch.Tensor, positions: torch.Tensor, with_: Norm) -> torch.Tensor:
    """[batch, seq] to [batch, seq, hidden]."""
    return norm(F.embedding(ids, words) + positions[: ids.shape[1]], with_)


def attention_mask(lengths: torch.Tensor, bias: torch.Tensor, heads: int) -> torch.Tensor:
    """The position bias [1, heads or 1, seq, seq] where the key is a token, a large negative number where it is padding."""
    seq = bias.shape[-1]
    tokens = torch.arange(seq, device=lengths.device) < lengths[:, None]
    return torch.where(tokens[:, None, None, :], bias, MASKED).expand(-1, heads, -1, -1)


def layer(x: torch.Tensor, mask: torch.Tensor, weights: Layer) -> torch.Tensor:
    batch, seq, hidden = x.shape
    heads = mask.shape[1]
    q, k, v = F.linear(x, *weights.qkv).view(batch, seq, 3, heads, hidden // heads).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # scaled by 1 / sqrt(hidden / heads)
    attended = attended.transpose(1, 2).reshape(batch, seq, hidden)
    x = norm(x + F.linear(attended, *weights.attention_output), weights.attention_norm)
    return norm(x + F.linear(F.gelu(F.linear(x, *weights.intermediate)), *weights.output), weights.output_norm)


def pool(hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The mean over each row's tokens at unit length, fp32 [batch, hidden]; zeros for a row without tokens."""
    tokens = torch.arange(hidden.shape[1], device=lengths.device) < lengths[:, None]
    return F.normalize((hidden.float() * tokens[:, :, None]).sum(1) / lengths.clamp(min=1)[:, None], dim=-1)


class Encoder:
    """The weights of a transformers model on `device` in `dtype`; called with ids [batch, seq] and lengths [batch]."""

    def __init__(self, model, device: torch.device, dtype: torch.dtype):
        config = model.config
        if config.model_type not in NAMES:
            raise SystemExit(f"model_type {config.model_type}: this peer knows {' and '.join(NAMES)}")
        if config.hidden_act != "gelu":
            raise SystemExit(f"hidden_act {config.hidden_act}: this peer knows gelu")
        if getattr(config, "position_embedding_type", "absolute") != "absolute":
            raise SystemExit(f"position_embedding_type {config.position_embedding_type}: this peer knows absolute")
        tensors = model.state_dict()

        def put(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, dtype, copy=True)

        def linear(*names: str) -> Linear:
            return Linear(*(put(torch.cat([tensors[f"{name}.{part}"] for name in names])) for part in ("weight", "bias")))

        def layer_norm(name: str) -> Norm:
            return Norm(put(tensors[f"{name}.weight"]), put(tensors[f"{name}.bias"]), config.layer_norm_eps)

        self.device, self.heads, self.dim = device, config.num_attention_heads, config.hidden_size
        self.words = put(tensors["embeddings.word_embeddings.weight"])
        positions = tensors["embeddings.position_embeddings.weight"]
        if config.model_type == "mpnet":
            positions = positions[config.pad_token_id + 1 :]
            self.bias = put(model.encoder.compute_position_bias(torch.empty(1, len(positions), 1, device=positions.device)))
        else:
            positions = positions + tensors["embeddings.token_type_embeddings.weight"][0]
            self.bias = torch.zeros(1, 1, len(positions), len(positions), device=device, dtype=dtype)
        self.positions = put(positions)
        self.norm = layer_norm("embeddings.LayerNorm")
        self.layers = []
        for i in range(config.num_hidden_layers):
            prefix = f"encoder.layer.{i}."
            q, k, v, attention_output, attention_norm = (prefix + name for name in NAMES[config.model_type])
            weights = Layer(
                qkv=linear(q, k, v),
                attention_output=linear(attention_output),
                attention_norm=layer_norm(attention_norm),
                intermediate=linear(prefix + "intermediate.dense"),
                output=linear(prefix + "output.dense"),
                output_norm=layer_norm(prefix + "output.LayerNorm"),
            )
            self.layers.append(weights)
        self.biases = {}
        self.parts = {"embed": embed, "attention_mask": attention_mask, "layer": layer, "pool": pool}
        self.forward = self.run

    def compile(self, mode: str, scope: str) -> None:
        """`scope` layer compiles one layer for all (seconds a shape), model the whole at once (minutes)."""
        torch._dynamo.config.recompile_limit = 64  # a compilation for each shape
        settings = {"mode": mode, "dynamic": False, "fullgraph": True}
        if scope == "model":
            self.forward = torch.compile(self.run, **settings)
        else:
            self.parts = {name: torch.compile(part, **settings) for name, part in self.parts.items()}

    def run(self, ids: torch.Tensor, lengths: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        x = self.parts["embed"](ids, self.words, self.positions, self.norm)
        mask = self.parts["attention_mask"](lengths, bias, self.heads)
        for weights in self.layers:
            x = self.parts["layer"](x, mask, weights)
        return self.parts["pool"](x, lengths)

    def __call__(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Unit vectors, fp32 [batch, hidden]."""
        seq = ids.shape[1]
        if seq > len(self.positions):
            raise SystemExit(f"{seq} tokens: the model has {len(self.positions)} positions")
        if seq not in self.biases:
            self.biases[seq] = self.bias[:, :, :seq, :seq].contiguous()
        return self.forward(ids, lengths, self.biases[seq])
