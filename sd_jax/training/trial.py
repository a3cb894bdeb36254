"""`:runlocal` of a pretraining config: the same run in seconds on a laptop, with no file but those of the package."""

from ml_collections import ConfigDict

from sd_jax.models.presets import ModelSpec, shrink
from sd_jax.sampling.pipeline import BUNDLED


def make_small(config: ConfigDict) -> None:
    """Two steps of a small model of the same family on shapes world, over as many devices as there are.

    The autoencoder is the bundled model's, and so is a frozen text encoder. Families with two have none there: theirs
    are made from nothing and trained, and their states cannot be cached.
    """
    spec = shrink(ModelSpec.from_dict(config.model.to_dict()))
    config.model = ConfigDict(spec.to_dict())
    config.init, config.init_parts = str(BUNDLED), ("vae", "text_encoder")
    if spec.text_encoder_2 is not None:
        config.init_parts = ("vae",)
        config.diffusion.train_text_encoder, config.data.cache_text = True, False
    config.dtype = "float32"
    config.total_steps, config.optimizer.warmup_steps, config.batch_size = 2, 1, 4
    config.eval_batches, config.samples.steps = 1, 2
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.data.path, config.data.num_examples, config.data.resolution = "shapes", 60, 64
    config.data.image_key, config.data.caption_key = "image", "text"
    if config.data.buckets.step:
        config.data.buckets.step, config.data.aspects = 32, (1.0, 3.0)
