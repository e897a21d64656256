"""Worker of the decode benchmark: transformers' own generate, in PyTorch, on its Phi with experts in the place of MLPs.

`python -m benchmarks.peers.hf_decode WEIGHTS EMBED_DIM ROWS NEW_TOKENS DISPATCH`

The model is transformers' PhiForCausalLM, as MoE-LLaVA's is; what computes the experts is chosen among the ways that
PyTorch projects have (torch_model.DISPATCHES).
"""

import pathlib
import sys
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks import decode_workload, pairing, workload
from benchmarks.peers import torch_model
from moe_vlm_jax import config as config_lib
from moe_vlm_jax.models import placement


class FeedForward(nn.Module):
    """A layer's experts as what transformers expects of an MLP: states in, states out."""

    def __init__(self, experts: torch_model.Experts):
        super().__init__()
        self.experts = experts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x)[0]


def make_model(weights: dict, config: config_lib.ModelConfig, dispatch: str) -> Any:
    """Returns transformers' model with the weights of ours, {parameter path: array}."""
    dec = config.decoder
    settings = {
        "vocab_size": dec.vocab_size,
        "hidden_size": dec.embed_dim,
        "intermediate_size": dec.mlp_dim,
        "num_hidden_layers": dec.num_layers,
        "num_attention_heads": dec.num_heads,
        "partial_rotary_factor": dec.rotary_dim / dec.head_dim,
        "rope_theta": dec.rope_theta,
        "layer_norm_eps": dec.norm_eps,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    model: Any = transformers.PhiForCausalLM(transformers.PhiConfig(**settings))
    model.model.embed_tokens = nn.Embedding.from_pretrained(torch.from_numpy(weights["decoder/embed/embedding"]))
    model.model.final_layernorm = torch_model.norm(weights, "decoder/final_norm", dec.norm_eps)
    model.lm_head = torch_model.linear(weights, "decoder/lm_head")
    for g, group in enumerate(placement.group_layers(config.layer_experts)):
        for b, num_experts in enumerate(group.experts):
            path = f"decoder/groups/{g}/blocks/{b}"
            for r in range(group.repeats):
                layer = model.model.layers[group.layer(b, r)]
                layer.input_layernorm = torch_model.norm(weights, f"{path}/attention_norm", dec.norm_eps, r)
                names = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "dense": "o"}
                for theirs, ours in names.items():
                    setattr(layer.self_attn, theirs, torch_model.linear(weights, f"{path}/attention/{ours}", r))
                if num_experts:
                    experts = torch_model.DISPATCHES[dispatch](weights, f"{path}/moe", r, config.moe)
                    layer.mlp = FeedForward(experts)
                else:
                    layer.mlp.fc1 = torch_model.linear(weights, f"{path}/mlp/up", r)
                    layer.mlp.fc2 = torch_model.linear(weights, f"{path}/mlp/down", r)
    return model.eval()


def main() -> None:
    file, embed_dim, num_rows, new_tokens, dispatch = sys.argv[1:]
    torch.set_num_threads(1)
    config = decode_workload.model_config(int(embed_dim))
    model = make_model(workload.read_weights(pathlib.Path(file)), config, dispatch)
    ids = torch.from_numpy(decode_workload.prompts(config, int(num_rows))).long()

    def step() -> float:
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=int(new_tokens),
            min_new_tokens=int(new_tokens),
            pad_token_id=0,
        )
        return decode_workload.checksum(out[:, ids.shape[1] :].numpy())

    pairing.serve(step)


if __name__ == "__main__":
    main()
