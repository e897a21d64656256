"""Turns a golden case's inputs into a Batch by the reference's own splice rules (spec: MoE-LLaVA 1.4)."""

import numpy as np

from moe_vlm_jax import batch as batch_lib


def splice(case, *, num_patches: int, side: str = "right", prefix: str = "") -> batch_lib.Batch:
    """Returns the batch that the reference's splice makes of a case.

    Padding belongs to its row's tree: the reference's padding queries attend to the row's real tokens, and in parity
    mode they are routed too.

    Args:
      case: arrays input_ids int[B, L] with -200 for an image, labels, attention_mask bool[B, L], images [n, 3, S, S].
      num_patches: image tokens of one image.
      side: where rows are padded.
      prefix: put before the keys, e.g. 'batch0.'.
    """
    ids = case[prefix + "input_ids"]
    mask = case[prefix + "attention_mask"] if prefix + "attention_mask" in case else np.ones(ids.shape, bool)
    labels = case[prefix + "labels"] if prefix + "labels" in case else np.full_like(ids, batch_lib.IGNORE_INDEX)
    rows, image = [], 0
    for row_ids, row_labels, row_mask in zip(ids, labels, mask, strict=True):
        tokens, targets, slots = [], [], []
        for token, label in zip(row_ids[row_mask], row_labels[row_mask], strict=True):
            if token == batch_lib.IMAGE_TOKEN_INDEX:
                tokens += [0] * num_patches
                targets += [batch_lib.IGNORE_INDEX] * num_patches
                slots += range(image * num_patches, (image + 1) * num_patches)
                image += 1
            else:
                tokens.append(token)
                targets.append(label)
                slots.append(-1)
        image += batch_lib.IMAGE_TOKEN_INDEX not in row_ids[row_mask]  # a text row uses up one dummy image
        rows.append((tokens, [*targets[1:], batch_lib.IGNORE_INDEX], slots))
    length = max(len(tokens) for tokens, _, _ in rows)

    def pad(values, fill) -> np.ndarray:
        filler = [fill] * (length - len(values))
        return np.array([*filler, *values] if side == "left" else [*values, *filler], np.int32)

    stacked = [np.stack([pad(row[i], fill) for row in rows]) for i, fill in enumerate((0, batch_lib.IGNORE_INDEX, -1))]
    ones = np.ones(stacked[0].shape, np.int32)
    return batch_lib.Batch(
        tokens=stacked[0],
        image_slot=stacked[2],
        images=np.ascontiguousarray(case[prefix + "images"].transpose(0, 2, 3, 1)),
        labels=stacked[1],
        position=np.broadcast_to(np.arange(length, dtype=np.int32), ones.shape),
        tree=ones,
        branch=ones,
        valid=np.stack([pad([1] * len(row[0]), 0) for row in rows]).astype(bool),
    )
