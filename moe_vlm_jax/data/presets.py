"""Data settings that several configs share."""

from moe_vlm_jax import config as config_lib


def embedded_mini() -> config_lib.DataConfig:
    """Returns the embedded synthetic infographics of 64 pixels, one image with all its questions a row."""
    return config_lib.DataConfig(
        source="embedded",
        difficulty="mini",
        tokenizer="closed",
        template="plain_qa",
        max_text_tokens=64,
        pack=True,
        row_lengths=(128,),  # one image with all its questions (at most 126 tokens)
        images_per_row=1,
    )
