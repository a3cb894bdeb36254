"""Makes pictures: python sample.py --checkpoint=PATH --prompt="...". Without --checkpoint the bundled model draws.

Writes OUT/00000.png, 00001.png, ..., each carrying its recipe, and OUT/sheet.png.
"""

import dataclasses
import pathlib
import sys

from absl import app, flags

from sd_jax.types import Recipe

flags.DEFINE_string(
    "checkpoint", None, "A workdir, a diffusers folder or a .safetensors file; none = the bundled model."
)
flags.DEFINE_string("out", "samples", "The folder that pictures are written to.")
flags.DEFINE_string("dtype", "float32", "Of weights and computation: float32, bfloat16 or float16.")
flags.DEFINE_string("tokenizer", None, "A folder or hub name, for files without one.")
flags.DEFINE_string("vae", None, "Another checkpoint to take the autoencoder from.")
flags.DEFINE_enum("weights", "ema", ["ema", "raw"], "The averaged weights, or those of the last step.")

# A flag for every field of a Recipe; what is not given has the field's default, or the model's own
_KINDS = {str: flags.DEFINE_string, int: flags.DEFINE_integer, float: flags.DEFINE_float}
for field in dataclasses.fields(Recipe):
    kind = field.type if field.type in _KINDS else int  # the optional fields are whole numbers
    _KINDS[kind](field.name, field.default, f"Recipe: {field.name}.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    options = flags.FLAGS

    from sd_jax.sampling.pipeline import load
    from sd_jax.sampling.recipe import StepBar, write_pictures

    recipe = Recipe(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Recipe)})
    try:
        pipe = load(options.checkpoint, options.dtype, options.tokenizer, options.vae, options.weights)
        with StepBar(recipe.steps) as bar:
            images = pipe.text_to_image(**recipe.to_dict(), callback=bar.step)
        for path in write_pictures(pathlib.Path(options.out), images, recipe, options.checkpoint):
            print(path)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
