"""Llama's layers in a dozen calls each: what the frozen LLM does for one token, without what surrounds it elsewhere.

Ours, for speed: with a small model on a CPU, half of a token's time in transformers goes to its bookkeeping. Queries,
keys and values come from one product, gate and up from another; their weights share memory with the model's own. A
test holds it equal to transformers, which does the work for every other architecture. Used by: frozen_llm.py.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import KVCache, causal_mask

FAMILIES = ("llama", "qwen2")  # Qwen2 is Llama with biases


@dataclass
class ThinLayer:
    """The tensors of one layer; biases are None where the model has none."""

    attention_norm: Tensor
    query_key_value: tuple[Tensor, Tensor | None]
    out: Tensor
    feed_forward_norm: Tensor
    gate_up: tuple[Tensor, Tensor | None]
    down: Tensor


class ThinLlama:
    """The decoder layers of a Llama model on KVCaches, one conversation at a time."""

    def __init__(self, model: nn.Module) -> None:
        config, self.source = model.config, model.layers[0].self_attn.q_proj
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.head_width, self.epsilon = model.layers[0].self_attn.head_dim, config.rms_norm_eps
        self.layers = [thin(layer) for layer in model.layers]
        self.norm, self.rotary = model.norm.weight, model.rotary_emb
        self.turns: tuple[Tensor, Tensor] | None = None  # cosines and sines (positions, head_width) so far

    @classmethod
    def of(cls, model: nn.Module) -> "ThinLlama | None":
        """The same model, thin; None if it is of another family or not made of plain layers."""
        config = model.config
        plain = config.model_type in FAMILIES and config.hidden_act == "silu"
        plain = plain and not getattr(config, "use_sliding_window", False)
        plain = plain and getattr(model.rotary_emb, "rope_type", "") == "default"
        plain = plain and all(type(m) is nn.Linear for layer in model.layers for m in linears(layer))
        return cls(model) if plain else None

    @property
    def current(self) -> bool:
        """Whether the model still uses these tensors: not after it was moved or filled anew."""
        return self.source.weight.data_ptr() == self.layers[0].query_key_value[0].data_ptr()

    def __call__(self, x: Tensor, caches: list[KVCache]) -> Tensor:
        """Vectors (1, positions, width) that follow what the caches hold -> normed states of the same shape."""
        past, count = len(caches[0]), x.shape[1]
        turn = self.turn(past, count)
        share = self.heads // self.groups
        # The queries that share a key stand in one head, one after the other; each is masked alike.
        mask = causal_mask(count, past + count).to(x.device).repeat(share, 1) if count > 1 else None
        for layer, cache in zip(self.layers, caches, strict=True):
            x = x + self.attend(layer, self.normed(x, layer.attention_norm), turn, mask, cache)
            gate, up = F.linear(self.normed(x, layer.feed_forward_norm), *layer.gate_up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, layer.down)
        return self.normed(x, self.norm)

    def attend(
        self, layer: ThinLayer, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache
    ) -> Tensor:
        count = x.shape[1]
        heads = F.linear(x, *layer.query_key_value).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
        rotated = rotate(heads[:, : -self.groups], *turn)
        keys, values = cache.append(rotated[:, self.heads :], heads[:, -self.groups :])
        queries = rotated[:, : self.heads].reshape(1, self.groups, -1, self.head_width)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        mixed = mixed.view(1, self.heads, count, self.head_width).transpose(1, 2).flatten(2)
        return F.linear(mixed, layer.out)

    def normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.epsilon)

    def turn(self, past: int, count: int) -> tuple[Tensor, Tensor]:
        """Rotary cosines and sines (count, head_width) from position `past` on, computed once for many positions."""
        if (
            self.turns is None
            or len(self.turns[0]) < past + count
            or self.turns[0].device != self.norm.device
        ):
            positions = torch.arange(max(1024, 2 * (past + count)), device=self.norm.device)
            self.turns = tuple(t[0] for t in self.rotary(self.norm, positions[None]))
        return tuple(t[past : past + count] for t in self.turns)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn (1, heads, positions, head_width): place i with place i + head_width / 2."""
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cosine, torch.cat([-second, first], dim=-1), sine)


def linears(layer: Any) -> list[nn.Module]:
    attention, network = layer.self_attn, layer.mlp
    return [
        *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        *(network.gate_proj, network.up_proj, network.down_proj),
    ]


def thin(layer: Any) -> ThinLayer:
    query, key, value, out, gate, up, down = linears(layer)
    return ThinLayer(
        layer.input_layernorm.weight,
        joined(query, key, value),
        out.weight,
        layer.post_attention_layernorm.weight,
        joined(gate, up),
        down.weight,
    )


@torch.inference_mode(False)  # tensors made in inference mode could not take part in training later
@torch.no_grad()
def joined(*modules: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weights (and biases) one below the other; the modules go on with their part of the same memory."""
    weight = torch.cat([module.weight for module in modules])
    for module, part in zip(modules, weight.split([m.out_features for m in modules]), strict=True):
        module.weight.data = part
    biases = [module.bias for module in modules]
    return weight, None if biases[0] is None else torch.cat(biases)
