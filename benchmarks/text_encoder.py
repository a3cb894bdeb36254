"""CLIP-L's text encoder, as SD 1.5 has it. `python -m benchmarks.text_encoder [--batch=2] ...`"""

from benchmarks import timing

TORCH_CONFIG = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
DEFAULTS = {"batch": 2}


def describe(options) -> str:
    return f"CLIP-L text, batch {options.batch}, 77 tokens, {options.dtype}"


def build_sd_jax(options) -> timing.Program:
    import jax
    import jax.numpy as jnp

    from sd_jax import sharding
    from sd_jax.models.clip_text import CLIPText
    from sd_jax.models.families import SD15

    model = CLIPText(SD15.text_encoder, dtype=jnp.dtype(options.dtype))
    ids = jnp.full((options.batch, 77), 49407, jnp.int32)
    params = timing.random_params(lambda: model.init(jax.random.key(0), ids), options.dtype)

    def apply(params, ids):
        return model.apply({"params": params}, ids)

    encode = sharding.jit(apply)
    return timing.Program(lambda: jax.block_until_ready(encode(params, ids)), timing.count_flops(apply, params, ids))


def build_torch(options) -> timing.Program:
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    model = timing.place_torch(CLIPTextModel(CLIPTextConfig(**TORCH_CONFIG)), options)
    ids = torch.full((options.batch, 77), 49407, device=timing.torch_device(options))

    @torch.no_grad()
    def run():
        model(ids)
        timing.synchronize(options)

    return timing.Program(run)


if __name__ == "__main__":
    timing.main("benchmarks.text_encoder")
