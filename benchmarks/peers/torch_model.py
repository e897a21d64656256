"""The benchmark's model in PyTorch, eager and float32, with the expert dispatches that PyTorch projects use.

    index    a loop over experts that picks each one's tokens and index_adds the results (HF's Mixtral)
    sorted   tokens sorted by expert, one matmul per contiguous segment
    grouped  tokens sorted by expert, torch's grouped_mm (HF's 'grouped_mm' experts)
    einsum   one-hot dispatch and combine tensors of fixed capacity (DeepSpeed 0.9.5, which MoE-LLaVA pins)

Everything else is what transformers does: nn.Linear, scaled_dot_product_attention, logits of every position. Own code
after those projects' published formulas; weights come from the JAX model, so first losses can be compared.
"""

import dataclasses
import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.models import placement


def linear(weights: dict[str, np.ndarray], path: str, index: int | None = None) -> nn.Linear:
    """Returns a Linear with the kernel [in, out] (of layer `index` of a stack) and bias at a parameter path."""
    kernel = weights[f"{path}/kernel"]
    bias = weights.get(f"{path}/bias")
    if index is not None:
        kernel, bias = kernel[index], None if bias is None else bias[index]
    module = nn.Linear(*kernel.shape, bias=bias is not None)
    module.weight.data = torch.from_numpy(np.ascontiguousarray(kernel.T))
    if bias is not None:
        module.bias.data = torch.from_numpy(bias.copy())
    return module


def norm(weights: dict[str, np.ndarray], path: str, eps: float, index: int | None = None) -> nn.LayerNorm:
    scale, bias = (weights[f"{path}/{leaf}"] for leaf in ("scale", "bias"))
    if index is not None:
        scale, bias = scale[index], bias[index]
    module = nn.LayerNorm(list(scale.shape), eps=eps)
    module.weight.data, module.bias.data = torch.from_numpy(scale.copy()), torch.from_numpy(bias.copy())
    return module


class Attention(nn.Module):
    def __init__(self, weights, path: str, index: int, num_heads: int):
        super().__init__()
        self.q, self.k, self.v, self.o = (linear(weights, f"{path}/{name}", index) for name in "qkvo")
        self.num_heads = num_heads

    def forward(self, x, rotary=None, causal=False):
        q, k, v = (p(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.o(y.transpose(1, 2).flatten(-2))


def rotate(x, cos, sin):
    """Rotates the leading dims of x, [B, N, T, H], as HF does: pair j is (j, j + r/2)."""
    dims = cos.shape[-1]
    turning, rest = x[..., :dims], x[..., dims:]
    first, second = turning.chunk(2, dim=-1)
    return torch.cat([turning * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)


class MLP(nn.Module):
    def __init__(self, weights, path: str, index: int, act):
        super().__init__()
        self.up, self.down = linear(weights, f"{path}/up", index), linear(weights, f"{path}/down", index)
        self.act = act

    def forward(self, x):
        return self.down(self.act(self.up(x)))


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x):
    return functional.gelu(x, approximate="tanh")


class VisionBlock(nn.Module):
    def __init__(self, weights, index: int, config: config_lib.VisionConfig):
        super().__init__()
        path = "vision/blocks"
        self.norm1 = norm(weights, f"{path}/norm1", config.norm_eps, index)
        self.norm2 = norm(weights, f"{path}/norm2", config.norm_eps, index)
        self.attention = Attention(weights, f"{path}/attention", index, config.num_heads)
        self.mlp = MLP(weights, f"{path}/mlp", index, quick_gelu)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Vision(nn.Module):
    """CLIP's tower up to the second-last block, without the class token."""

    def __init__(self, weights, config: config_lib.VisionConfig):
        super().__init__()
        patch = config.patch_size
        kernel = weights["vision/patch_embed/kernel"]  # rows in order patch row, patch column, channel
        self.patches = nn.Conv2d(3, config.embed_dim, patch, stride=patch, bias=False)
        kernel = kernel.reshape(patch, patch, 3, -1).transpose(3, 2, 0, 1)
        self.patches.weight.data = torch.from_numpy(np.ascontiguousarray(kernel))
        self.class_embed = nn.Parameter(torch.from_numpy(weights["vision/class_embed"].copy()))
        self.position = nn.Parameter(torch.from_numpy(weights["vision/position_embed"].copy()))
        self.pre_norm = norm(weights, "vision/pre_norm", config.norm_eps)
        used = config.num_layers + 1 + config.select_layer
        self.blocks = nn.ModuleList([VisionBlock(weights, i, config) for i in range(used)])

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embed.expand(x.shape[0], 1, -1), x], dim=1)
        x = self.pre_norm(x + self.position)
        for block in self.blocks:
            x = block(x)
        return x[:, 1:]


class Experts(nn.Module):
    """Router and experts of one layer; forward returns (output, balance loss)."""

    up_kernel: nn.Parameter  # [E, D, F]
    up_bias: nn.Parameter
    down_kernel: nn.Parameter
    down_bias: nn.Parameter

    def __init__(self, weights, path: str, index: int, config: config_lib.MoEConfig):
        super().__init__()
        self.router = linear(weights, f"{path}/router", index)
        names = {"up": f"{path}/experts/up", "down": f"{path}/experts/down"}
        for name, where in names.items():
            for leaf in ("kernel", "bias"):
                value = torch.from_numpy(np.ascontiguousarray(weights[f"{where}/{leaf}"][index]))
                setattr(self, f"{name}_{leaf}", nn.Parameter(value))
        self.num_experts, self.top_k = self.up_kernel.shape[0], config.top_k
        self.config = config

    def route(self, x):
        logits = self.router(x.float())
        probs = torch.softmax(logits, dim=-1)
        weight, chosen = torch.topk(probs, self.top_k, dim=-1)
        weight = weight / weight.sum(-1, keepdim=True)
        first = functional.one_hot(chosen[:, 0], self.num_experts).float().mean(0)
        return probs, weight, chosen, self.num_experts * torch.sum(probs.mean(0) * first)

    def one_expert(self, x, e: int):
        hidden = gelu_tanh(torch.addmm(self.up_bias[e], x, self.up_kernel[e]))
        return torch.addmm(self.down_bias[e], hidden, self.down_kernel[e])

    def forward(self, x):
        flat = x.flatten(0, 1)
        probs, weight, chosen, balance = self.route(flat)
        return self.dispatch(flat, probs, weight, chosen).view_as(x), balance

    def dispatch(self, flat, probs, weight, chosen):
        raise NotImplementedError("choose one of DISPATCHES")

    def sort(self, flat, chosen):
        """Returns tokens in order of expert, the order, and how many each expert has."""
        order = torch.argsort(chosen.flatten(), stable=True)
        return flat[order // self.top_k], order, torch.bincount(chosen.flatten(), minlength=self.num_experts)

    def unsort(self, rows, order, weight):
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel())
        rows = rows[back].unflatten(0, (-1, self.top_k))
        return (rows * weight[..., None]).sum(1)


class IndexExperts(Experts):
    def dispatch(self, flat, probs, weight, chosen):
        out = torch.zeros_like(flat)
        mask = functional.one_hot(chosen, self.num_experts).permute(2, 1, 0)
        for e in range(self.num_experts):
            rank, token = torch.where(mask[e])
            out.index_add_(0, token, self.one_expert(flat[token], e) * weight[token, rank, None])
        return out


class SortedExperts(Experts):
    def dispatch(self, flat, probs, weight, chosen):
        rows, order, sizes = self.sort(flat, chosen)
        parts = [self.one_expert(part, e) for e, part in enumerate(rows.split(sizes.tolist()))]
        return self.unsort(torch.cat(parts), order, weight)


class GroupedExperts(Experts):
    def dispatch(self, flat, probs, weight, chosen):
        rows, order, sizes = self.sort(flat, chosen)
        ends = torch.cumsum(sizes, 0).to(torch.int32)
        expert = chosen.flatten()[order]
        hidden = gelu_tanh(functional.grouped_mm(rows, self.up_kernel, offs=ends) + self.up_bias[expert])
        out = functional.grouped_mm(hidden, self.down_kernel, offs=ends) + self.down_bias[expert]
        return self.unsort(out, order, weight)


class EinsumExperts(Experts):
    """GShard's top-2 as in DeepSpeed 0.9.5, without its noise: first choices take slots before second ones."""

    def dispatch(self, flat, probs, weight, chosen):
        tokens = flat.shape[0]
        capacity = self.capacity(tokens)
        masks = [functional.one_hot(chosen[:, k], self.num_experts) for k in range(self.top_k)]
        combine = flat.new_zeros(tokens, self.num_experts, capacity)
        taken = torch.zeros(self.num_experts, dtype=torch.int64)
        kept, slots = [], []
        for mask in masks:
            slot = torch.cumsum(mask, 0) - 1 + taken
            taken = taken + mask.sum(0)
            kept.append(mask * (slot < capacity))
            slots.append((slot * kept[-1]).sum(1))
        gates = [(probs * mask).sum(1) for mask in kept]
        total = torch.stack(gates).sum(0).clamp(min=torch.finfo(torch.float32).eps)
        for gate, mask, slot in zip(gates, kept, slots, strict=True):
            place = functional.one_hot(slot, capacity).float()
            combine = combine + torch.einsum("s,se,sc->sec", gate / total, mask.float(), place)
        dispatched = torch.einsum("sec,sm->ecm", combine.bool().to(flat.dtype), flat)
        outputs = torch.stack([self.one_expert(dispatched[e], e) for e in range(self.num_experts)])
        return torch.einsum("sec,ecm->sm", combine, outputs)

    def capacity(self, tokens: int) -> int:
        return math.ceil(tokens / self.num_experts * self.config.capacity_factor * self.top_k)


class EinsumExpertsWithoutDrops(EinsumExperts):
    """Room for everybody: the same outputs as the others, to check the code of EinsumExperts; never timed."""

    def capacity(self, tokens: int) -> int:
        return tokens


DISPATCHES = {
    "index": IndexExperts,
    "sorted": SortedExperts,
    "grouped": GroupedExperts,
    "einsum": EinsumExperts,
    "einsum_without_drops": EinsumExpertsWithoutDrops,
}


class Block(nn.Module):
    """Phi's parallel block."""

    def __init__(self, weights, path: str, index: int, num_experts: int, config: config_lib.ModelConfig, dispatch: str):
        super().__init__()
        self.norm = norm(weights, f"{path}/attention_norm", config.decoder.norm_eps, index)
        self.attention = Attention(weights, f"{path}/attention", index, config.decoder.num_heads)
        if num_experts:
            self.moe = DISPATCHES[dispatch](weights, f"{path}/moe", index, config.moe)
        else:
            self.mlp = MLP(weights, f"{path}/mlp", index, gelu_tanh)
        self.num_experts = num_experts

    def forward(self, x, rotary):
        normed = self.norm(x)
        y, balance = self.moe(normed) if self.num_experts else (self.mlp(normed), None)
        return x + self.attention(normed, rotary, causal=True) + y, balance


class TorchVLM(nn.Module):
    """CLIP tower, two-layer projector, Phi decoder with experts; weights by the JAX model's parameter paths."""

    def __init__(self, weights: dict[str, np.ndarray], config: config_lib.ModelConfig, dispatch: str):
        super().__init__()
        dec = config.decoder
        self.vision = Vision(weights, config.vision)
        self.projector = nn.Sequential(
            linear(weights, "projector/linears/0"), nn.GELU(), linear(weights, "projector/linears/1")
        )
        embedding = torch.from_numpy(weights["decoder/embed/embedding"].copy())
        self.embed = nn.Embedding.from_pretrained(embedding, freeze=False)
        blocks: dict[int, Block] = {}
        self.places: dict[int, tuple[str, int]] = {}  # of each block: path of its stack, index in it
        for g, group in enumerate(placement.group_layers(config.layer_experts)):
            for b, num_experts in enumerate(group.experts):
                path = f"decoder/groups/{g}/blocks/{b}"
                for r in range(group.repeats):
                    blocks[group.layer(b, r)] = Block(weights, path, r, num_experts, config, dispatch)
                    self.places[group.layer(b, r)] = (path, r)
        self.blocks = nn.ModuleList([blocks[i] for i in sorted(blocks)])
        self.final_norm = norm(weights, "decoder/final_norm", dec.norm_eps)
        self.lm_head = linear(weights, "decoder/lm_head")
        self.config = config

    def train_only(self, stage: str) -> None:
        """Sets what trains: 'full' all but the tower; 'experts' the projector, MLPs, routers and experts."""
        for name, parameter in self.named_parameters():
            inside = ".mlp." in name or ".moe." in name
            full = not name.startswith("vision.")
            parameter.requires_grad_(name.startswith("projector.") or (full if stage == "full" else full and inside))

    def loss(self, batch: "TorchBatch"):
        hidden, balance = self.hidden(batch.images, batch.tokens)
        logits = self.lm_head(hidden).float()
        entropy = functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100)
        return entropy + self.config.moe.balance_coef * balance

    def hidden(self, images, tokens):
        """Returns (hidden states after the final norm, balance loss summed over layers)."""
        features = self.projector(self.vision(images))
        x = torch.cat([features, self.embed(tokens)], dim=1)  # the image stands before the text
        rotary = self.rotary(x.shape[1])
        balance = x.new_zeros(())
        for block in self.blocks:
            x, layer_balance = block(x, rotary)
            balance = balance if layer_balance is None else balance + layer_balance
        return self.final_norm(x), balance

    def rotary(self, length: int):
        dims, theta = self.config.decoder.rotary_dim, self.config.decoder.rope_theta
        frequency = theta ** (-torch.arange(0, dims, 2, dtype=torch.float32) / dims)
        angle = torch.arange(length, dtype=torch.float32)[:, None] * frequency
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos(), angle.sin()


@dataclasses.dataclass
class TorchBatch:
    """images [B, 3, S, S]; tokens int64 [B, text]; labels int64 [B, image tokens + text], shifted."""

    images: torch.Tensor
    tokens: torch.Tensor
    labels: torch.Tensor
