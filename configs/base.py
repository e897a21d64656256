"""The tiny base: about a million parameters, trained in full and from nothing on the embedded synthetic infographics.

configs/sft.py starts from it and trains it first when it is not there yet.
"""

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data import presets as data_presets
from moe_vlm_jax.data.infographics import vocabulary
from moe_vlm_jax.models import presets
from moe_vlm_jax.training import stages


def get_config(argument: str = "tiny") -> config_lib.RunConfig:
    """Returns the config; 'tiny' is the only argument."""
    if argument != "tiny":
        raise ValueError(f"configs/base.py has no argument {argument!r}; use tiny, or none.")
    return config_lib.RunConfig(
        model=presets.tiny(vocab_size=len(vocabulary.words())),
        data=data_presets.embedded_mini(),
        optimizer=config_lib.OptimizerConfig(
            name="muon",
            learning_rate=3e-3,
            muon_learning_rate=3e-3,
            warmup_ratio=0.03,
            final_ratio=0.02,
            b2=0.98,
            weight_decay=0.01,
        ),
        training=config_lib.TrainingConfig(
            **stages.EVERYTHING._asdict(),
            batch_size=16,
            accumulation=1,
            max_steps=1000,
            log_every=20,
            checkpoint_every=1000,
            checkpoint_seconds=60.0,
            loss_chunk=0,  # the logits of 85 words are small
        ),
        generation=config_lib.GenerationConfig(max_new_tokens=8),
        evaluation=config_lib.EvaluationConfig(max_questions=500, batch_size=50),
    )
