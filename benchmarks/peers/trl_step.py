"""Worker of the DPO benchmark: the same step as TRL computes it, in PyTorch.

    python -m benchmarks.peers.trl_step WEIGHTS PAIRS ANSWER_TOKENS DISPATCH all|answers

TRL 1.16's DPOTrainer puts chosen and rejected sequences into one batch of twice the rows, so prompts and images are
there twice, and runs the model on it with the adapter that trains and, without gradients, with the frozen copy 'ref'.
'all' scores every position, as its head does on a CPU; 'answers' scores answers only, as its Triton head does.
"""

import pathlib
import sys

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks import dpo_workload, pairing, workload
from benchmarks.peers import torch_model
from moe_vlm_jax import config as config_lib
from moe_vlm_jax.batch import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from moe_vlm_jax.models import adapters


class Adapted(nn.Module):
    """A frozen linear layer with two adapters, of which one is active: x W + b + scale x A B."""

    def __init__(self, layer: nn.Linear, factors: list[tuple[np.ndarray, np.ndarray]], scale: float):
        super().__init__()
        self.layer, self.scale, self.active = layer, scale, 0
        down, up = ([torch.from_numpy(factor.T.copy()) for factor in side] for side in zip(*factors, strict=True))
        self.down = nn.ParameterList([nn.Parameter(factor, i == 0) for i, factor in enumerate(down)])
        self.up = nn.ParameterList([nn.Parameter(factor, i == 0) for i, factor in enumerate(up)])

    def forward(self, x):
        low = functional.linear(x, self.down[self.active])
        return self.layer(x) + functional.linear(low, self.up[self.active]) * self.scale


class Policy(torch_model.TorchVLM):
    """The model with two adapters on q, k and v of every block."""

    def __init__(self, weights, config: config_lib.ModelConfig, dispatch: str, factors: list[dict[str, np.ndarray]]):
        super().__init__(weights, config, dispatch)
        self.requires_grad_(False)
        scale = adapters.scale(config.lora)
        for i, block in enumerate(self.blocks):
            path, index = self.places[i]
            for name in "qkv":
                where = f"{path}/attention/{name}"
                pairs = [(f[f"{where}/lora_a"][index], f[f"{where}/lora_b"][index]) for f in factors]
                setattr(block.attention, name, Adapted(getattr(block.attention, name), pairs, scale))

    def use(self, adapter: int) -> None:
        for module in self.modules():
            if isinstance(module, Adapted):
                module.active = adapter

    def log_probs(self, images, tokens, labels, *, answers_only: bool):
        """Returns (log-prob of each sequence, balance loss)."""
        hidden, balance = self.hidden(images, tokens)
        trained = labels != IGNORE_INDEX
        if answers_only:
            scores = torch.log_softmax(self.lm_head(hidden[trained]).float(), dim=-1)
            picked = torch.zeros(labels.shape, dtype=scores.dtype).masked_scatter(
                trained, scores.gather(1, labels[trained][:, None])[:, 0]
            )
        else:
            scores = torch.log_softmax(self.lm_head(hidden).float(), dim=-1)
            picked = scores.gather(2, labels.clamp(min=0)[..., None])[..., 0] * trained
        return picked.sum(dim=1), balance


def main() -> None:
    file, num_pairs, answer_tokens, dispatch, scored = sys.argv[1:]
    torch.set_num_threads(1)
    shape = dpo_workload.Shape(int(num_pairs), int(answer_tokens))
    config = dpo_workload.run_config(shape)
    weights = workload.read_weights(pathlib.Path(file))
    shapes = dpo_workload.adapter_shapes(config)
    factors = [dpo_workload.adapter_weights(shapes, seed) for seed in (0, 1)]
    model = Policy(weights, config.model, dispatch, factors)
    trainable = [p for p in model.parameters() if p.requires_grad]
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        trainable,
        lr=settings.learning_rate,
        betas=(settings.b1, settings.b2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    found = dpo_workload.pairs(config, shape)
    examples = [pair[side] for side in (0, 1) for pair in found]  # all chosen, then all rejected
    pixels = np.ascontiguousarray(dpo_workload.images(config, shape).transpose(0, 3, 1, 2))
    images = torch.from_numpy(np.concatenate([pixels, pixels]))
    text = np.stack([example.tokens[example.tokens != IMAGE_TOKEN_INDEX] for example in examples])
    labels = np.full((len(examples), workload.IMAGE_TOKENS + text.shape[1]), IGNORE_INDEX)
    labels[:, -shape.answer_tokens - 1 : -1] = text[:, -shape.answer_tokens :]
    tokens, targets = torch.from_numpy(text.astype(np.int64)), torch.from_numpy(labels.astype(np.int64))
    beta, balance_coef = config.preference.beta, config.model.moe.balance_coef

    def log_probs(adapter: int):
        model.use(adapter)
        return model.log_probs(images, tokens, targets, answers_only=scored == "answers")

    def step() -> float:
        policy, balance = log_probs(0)
        with torch.no_grad():
            reference, _ = log_probs(1)
        chosen, rejected = (policy - reference).chunk(2)
        loss = -functional.logsigmoid(beta * (chosen - rejected)).mean() + balance_coef * balance
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    pairing.serve(step)


if __name__ == "__main__":
    main()
