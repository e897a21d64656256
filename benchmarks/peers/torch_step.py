"""Worker of the step benchmark: the PyTorch peer.

`python -m benchmarks.peers.torch_step WEIGHTS EMBED_DIM ROWS STAGE DISPATCH`
"""

import pathlib
import sys

import numpy as np
import torch

from benchmarks import pairing, workload
from benchmarks.peers import torch_model


def main() -> None:
    file, embed_dim, num_rows, stage, dispatch = sys.argv[1:]
    torch.set_num_threads(1)
    config = workload.Shape(int(embed_dim), int(num_rows), stage).config()
    model = torch_model.TorchVLM(workload.read_weights(pathlib.Path(file)), config.model, dispatch)
    model.train_only(stage)
    settings = config.optimizer
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable,
        lr=settings.learning_rate,
        betas=(settings.b1, settings.b2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    arrays = workload.make_batch(config)
    batch = torch_model.TorchBatch(
        images=torch.from_numpy(np.ascontiguousarray(arrays.images.transpose(0, 3, 1, 2))),
        tokens=torch.from_numpy(arrays.tokens[:, workload.IMAGE_TOKENS :].astype(np.int64)),
        labels=torch.from_numpy(arrays.labels.astype(np.int64)),
    )

    def step() -> float:
        loss = model.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    pairing.serve(step)


if __name__ == "__main__":
    main()
