"""A whole picture: text, guided Euler steps, decode. `python -m benchmarks.sampling [--steps=4] [--pixels=512] ...`"""

from benchmarks import timing

DEFAULTS = {"steps": 4, "pixels": 512, "batch": 1}


def describe(options) -> str:
    size = f"{options.pixels}x{options.pixels}"
    return f"SD 1.5, {options.batch} x {size}, {options.steps} Euler steps with guidance, {options.dtype}"


def build_sd_jax(options) -> timing.Program:
    import jax
    import jax.numpy as jnp

    from sd_jax.models.families import SD15
    from sd_jax.models.networks import Networks
    from sd_jax.sampling.pipeline import Pipeline
    from sd_jax.types import Conditioning

    networks = Networks.of(SD15, options.dtype)
    parts = ("unet", "vae", "text_encoder")
    key = jax.random.key(0)
    params = {
        part: timing.random_params(lambda part=part: {"params": networks.init(part, key)}, options.dtype)
        for part in parts
    }
    pipe = Pipeline(SD15, params, dtype=options.dtype)
    ids = jnp.full((options.batch, 77), 49407, jnp.int32)

    def run():
        conditioning = pipe.encode_tokens(ids)
        pipe.text_to_image(
            conditioning=conditioning,
            negative_conditioning=conditioning,
            width=options.pixels,
            height=options.pixels,
            steps=options.steps,
        )

    def unet_and_decoder(params):  # the text encoder is below a hundredth of one step
        side = options.pixels // SD15.vae.downscale
        latents = jnp.zeros((2 * options.batch, side, side, 4))
        told = Conditioning(jnp.zeros((2 * options.batch, 77, SD15.unet.cross_attention_dim)))
        return (
            lambda: networks.unet.apply({"params": params["unet"]}, latents, jnp.zeros(2 * options.batch), told),
            lambda: networks.vae.apply({"params": params["vae"]}, latents[: options.batch], method="decode"),
        )

    unet, decoder = (timing.count_flops(function) for function in unet_and_decoder(params))
    return timing.Program(run, options.steps * unet + decoder, options.batch)


def build_torch(options) -> timing.Program:
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from benchmarks import text_encoder, vae

    device, dtype = timing.torch_device(options), getattr(torch, options.dtype)
    place = lambda model: model.eval().requires_grad_(False).to(device, dtype)  # noqa: E731
    pipe = StableDiffusionPipeline(
        vae=place(AutoencoderKL(**vae.TORCH_CONFIG)),
        text_encoder=place(CLIPTextModel(CLIPTextConfig(**text_encoder.TORCH_CONFIG))),
        tokenizer=None,
        unet=place(UNet2DConditionModel(cross_attention_dim=768)),
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    if options.side == "torch.compile":
        pipe.unet.compile()
        pipe.vae.decoder.compile()
    ids = torch.full((options.batch, 77), 49407, device=device)

    @torch.no_grad()
    def run():
        context = pipe.text_encoder(ids)[0]
        pipe(
            prompt_embeds=context,
            negative_prompt_embeds=context,
            width=options.pixels,
            height=options.pixels,
            num_inference_steps=options.steps,
            output_type="np",
        )
        timing.synchronize(options)

    return timing.Program(run, samples=options.batch)


if __name__ == "__main__":
    timing.main("benchmarks.sampling")
