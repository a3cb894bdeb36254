"""What sizes and crops tell a model, as a table. `python -m benchmarks.micro_conditioning [--steps=300] [--sheet=PATH]`

Needs no other library. Every picture of the data has its object in the middle, but half of them are wide and cut to
squares at random, so that many objects are cut too (Podell et al. 2023, section 2.2). A small SDXL-like model, told of
each cut, is trained from nothing on the bundled model's latents. Asked for a picture that was never cut, it should draw
whole objects in the middle; asked for a cut, it should put them where that cut leaves them. The command ends with
status 1 where it does not.
"""

import argparse
import dataclasses
import sys
import time

SIDE, WIDE = 64, 128  # of the square pictures, and the width of the others
LEFTS = (0, 16, 32, 48, 64)  # crops of a wide picture that are asked for
PROMPTS = 16  # pictures of each
MOST_OFF = 2.0  # pixels that an object may be off its place, on average
BATCH, EXAMPLES = 48, 3072


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--sheet", default="", help="where to write the pictures")
    options = parser.parse_args()

    import numpy as np

    import sd_jax
    from sd_jax import media

    begun, bundled = time.monotonic(), sd_jax.load()
    source = CutShapes()
    pipe, cut_in_data = _train(bundled, source, options.steps)
    print(f"trained for {time.monotonic() - begun:.0f} s", flush=True)
    prompts = [source.fields(i)[0][0] for i in range(PROMPTS)]
    recipe = {"sampler": "dpmpp_2m", "schedule": "karras", "steps": 12, "guidance_scale": 2.0}
    draw = lambda **told: pipe.text_to_image(prompts, **recipe, **told)  # noqa: E731

    whole = draw()
    cut = float(np.mean([_is_cut(picture) for picture in whole]))
    print("\n| told | cut at a side | place of the object, pixels from the left | in such pictures of the data |")
    print("|---|---|---|---|")
    print(f"| (the data) | {cut_in_data:.0%} | | |")
    print(f"| {SIDE}x{SIDE}, cut at 0 | {cut:.0%} | {_place(whole):.1f} | {SIDE / 2:.1f} |")
    sheet, off = [*whole], [abs(_place(whole) - SIDE / 2)]
    for left in LEFTS:
        pictures = draw(original_size=(SIDE, WIDE), crops_coords_top_left=(0, left))
        true = [source.draw(i, WIDE)[:, left : left + SIDE] for i in range(PROMPTS)]
        share = float(np.mean([_is_cut(picture) for picture in pictures]))
        off.append(abs(_place(pictures) - _place(true)))
        print(f"| {SIDE}x{WIDE}, cut at {left} | {share:.0%} | {_place(pictures):.1f} | {_place(true):.1f} |")
        sheet.extend(pictures)
    print(f"\nobjects are {np.mean(off):.1f} pixels off on average; {time.monotonic() - begun:.0f} s in all")
    if options.sheet:
        media.write_png(options.sheet, media.contact_sheet(np.stack(sheet), columns=PROMPTS), {})
    if np.mean(off) > MOST_OFF or cut >= cut_in_data / 2:
        sys.exit("micro-conditioning does not steer as it should")


class CutShapes:
    """Records whose object lies in the middle of a square or of a wide picture, on plain white."""

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> dict:
        width = SIDE if index % 2 else WIDE
        return {"pixels": self.draw(index, width), "fields": self.fields(index), "index": int(index)}

    def _thing(self, index: int) -> tuple[str, str]:
        from sd_jax.data import shapes

        colours = tuple(colour for colour in shapes.COLOURS if colour != "yellow")  # which is hard to see on white
        number = int(index) * 7919
        return colours[number % len(colours)], shapes.SHAPES[number // len(colours) % len(shapes.SHAPES)]

    def draw(self, index: int, width: int):
        import numpy as np

        from sd_jax.data import shapes

        colour, shape = self._thing(index)
        scene = shapes.Scene((shapes.Thing(shape, colour, "medium", 0.5, 0.5),), "plain white")
        return np.pad(shapes.render(scene, SIDE), ((0, 0), ((width - SIDE) // 2,) * 2, (0, 0)), mode="edge")

    def fields(self, index: int) -> tuple[tuple[str, ...], ...]:
        return (("a {} {}".format(*self._thing(index)),),)

    def sizes(self):
        import numpy as np

        return np.array([(SIDE, SIDE if index % 2 else WIDE) for index in range(len(self))], np.int64)

    def full_size(self, index: int) -> None:
        return None

    def fingerprint(self) -> str:
        return "cut shapes"


def _spec(bundled):
    """A U-Net of two levels that is told the pooled state and sizes, and two text encoders, as SDXL has them."""
    text = dataclasses.replace(
        bundled.text_encoder,
        hidden_size=32,
        intermediate_size=128,
        num_attention_heads=2,
        num_hidden_layers=2,
        clip_skip=2,
        context_norm=False,
    )
    unet = dataclasses.replace(
        bundled.unet,
        block_out_channels=(32, 64),
        attention_blocks=(False, True),
        cross_attention_dim=64,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=32 + 6 * 32,
    )
    second = dataclasses.replace(text, projection_dim=32)
    return dataclasses.replace(
        bundled, unet=unet, text_encoder=text, text_encoder_2=second, force_zeros_for_empty_prompt=True
    )


def _train(bundled, source, steps: int):
    """-> (the trained model, the share of the data's pictures whose object is cut)."""
    import functools

    import jax.numpy as jnp
    import numpy as np

    from sd_jax import sharding
    from sd_jax.config import training_defaults
    from sd_jax.data.loader import make_loader
    from sd_jax.models.networks import Networks
    from sd_jax.models.vae import to_image
    from sd_jax.sampling.pipeline import Pipeline
    from sd_jax.training import setup
    from sd_jax.training.context import Context, EmptyPrompt
    from sd_jax.training.methods import METHODS
    from sd_jax.training.optimizers import make_optimizer
    from sd_jax.training.step import train_step

    spec = _spec(bundled.spec)
    networks, tokenizer = Networks.of(spec), bundled.tokenizer
    positions = spec.text_encoder.max_position_embeddings
    tokenize = functools.partial(tokenizer, max_length=positions)
    config = training_defaults("full")
    config.batch_size, config.total_steps, config.data.resolution = BATCH, steps, SIDE
    config.ema_decays = (0.99,)
    config.optimizer.update(
        {"name": "muon", "learning_rate": 4e-3, "schedule": "cosine", "warmup_steps": 50, "weight_decay": 0.0}
    )

    # Every record once, cut at random; latents as the loop caches them
    encode = sharding.jit(lambda params, pixels: _moments(networks.vae, params, to_image(pixels)))
    loader = make_loader(source, tokenize, config, num_time_ids=spec.num_time_ids)
    batches = [next(loader) for _ in range(EXAMPLES // BATCH)]
    loader.close()
    cut = float(np.mean([_is_cut(picture) for batch in batches for picture in batch["pixels"]]))
    vae = bundled.params["vae"]
    data = {name: np.concatenate([batch[name] for batch in batches]) for name in ("input_ids", "time_ids")}
    data["moments"] = np.concatenate([np.asarray(encode(vae, batch["pixels"])) for batch in batches])

    method, optimizer = METHODS["full"], make_optimizer(config)
    loss = functools.partial(method.loss, Context(networks, config, EmptyPrompt(tokenize([""])[0])))
    begin = sharding.jit(lambda vae: setup.initial_state(config, method, networks, {"vae": vae}))

    @sharding.jit(donate_argnums=0)
    def step(state, batch):
        return train_step(state, batch, loss=loss, optimizer=optimizer, ema_decays=config.ema_decays, seed=0)

    state, rng, slots = begin(vae), np.random.default_rng(0), np.arange(BATCH, dtype=np.int32)
    for at in range(steps):
        rows = rng.choice(EXAMPLES, BATCH, replace=False)
        state, metrics = step(state, {**{name: jnp.asarray(x[rows]) for name, x in data.items()}, "slot": slots})
        if at % 100 == 99:
            print(f"step {at + 1}: loss {float(metrics['loss']):.3f}", flush=True)
    return Pipeline(spec, state.ema_model, tokenizer), cut


def _moments(vae, params, image):
    import jax.numpy as jnp

    posterior = vae.apply({"params": params}, image, method="encode")
    return jnp.concatenate([posterior.mean, posterior.logvar], axis=-1)


def _objects(picture):
    """Where a picture is coloured, bool [height, width]: backgrounds and borders have no hue."""
    import numpy as np

    return np.ptp(np.asarray(picture).astype(int), axis=-1) > 60


def _is_cut(picture) -> bool:
    """An object touches the left or the right side; one in the middle is 17 pixels away."""
    object_ = _objects(picture)
    return bool(object_[:, :2].any() or object_[:, -2:].any())


def _place(pictures) -> float:
    """The mean column of all coloured pixels, averaged over pictures that have any."""
    import numpy as np

    columns = [np.nonzero(_objects(picture))[1] for picture in pictures]
    return float(np.mean([c.mean() + 0.5 for c in columns if len(c)]))


if __name__ == "__main__":
    main()
