"""Makes pictures: python sample.py --checkpoint=PATH --prompt="...". Without --checkpoint the bundled model draws.

Writes OUT/00000.png, 00001.png, ..., each carrying its recipe, and OUT/sheet.png. A flag for every field of a recipe;
what is not given has the field's default, or the model's own.

    --init_image=PICTURE [--mask=PICTURE]        start from a picture; redraw it where a mask is white, or enlarge it
    --refiner=PATH [--refiner_switch=0.8]        another model walks the last steps, as SDXL's refiner does
    --init_image=PICTURE --scale=2 [--enlarger=PATH]  draw it again, twice as large (--tile=512 in tiles)
    --clip=PATH --clip_guidance_scale=0.5        a CLIP guides, best one that was trained on noised pictures
    --clip=PATH --best_of=8                      of eight candidates each, that which a CLIP finds nearest the prompt
    --adapter=FILE:0.8 --adapter=OTHER           a LoRA or its kin, or a hypernetwork, on the model; several add up
    --control=PATH:MAP:0.8                       a ControlNet or T2I-Adapter follows a map; several add up
    --adapter=IP_ADAPTER --image_prompt=PICTURE  what a picture shows, beside the prompt; one for each IP-Adapter
    --embeddings=DIR                             words of textual inversion, for prompts to say
    --adapter_folder=DIR                         where `<lora:name:0.8>` in a prompt finds its file
    --recipe=PICTURE                             make that picture again; other flags win over its recipe
    --grid="sampler=euler,heun;steps=10,20"      a picture for each combination, and OUT/grid.png in place of the sheet
    --prompts_file=FILE --batch_size=8           a picture for each line, eight at a time
"""

import pathlib
import sys
from logging import INFO, getLogger

from absl import app, flags, logging

from sd_jax.media import FORMATS
from sd_jax.sampling.flags import INPUTS, LOADING
from sd_jax.sampling.recipe import FIELDS, kind_of, read_value, wanted
from sd_jax.types import Recipe

for name, text in (LOADING | {"init_image": "The picture to start from."} | INPUTS).items():
    flags.DEFINE_string(name, {"dtype": "float32", "weights": "ema"}.get(name), text)
flags.DEFINE_multi_string("adapter", [], "PATH, PATH:STRENGTH or PATH:STRENGTH:TEXT_STRENGTH; may be given again.")
flags.DEFINE_multi_string("control", [], "PATH:IMAGE, and :STRENGTH, and :START:END; may be given again.")
flags.DEFINE_multi_string(
    "image_prompt", [], "A picture that an IP-Adapter shows; again for each, or for the only one."
)
flags.DEFINE_integer("best_of", None, "Candidates for each picture, of which the CLIP keeps the nearest to its prompt.")
flags.DEFINE_string("out", "samples", "The folder that pictures are written to.")
flags.DEFINE_enum("format", "png", FORMATS, "Of the pictures.")
flags.DEFINE_bool("previews", False, "Whether OUT/preview.png shows what is being made.")

for name in FIELDS:  # as text, which is checked by `read_value`: "none" takes a value back that a recipe has
    kind, default = kind_of(name)[0], getattr(Recipe, name)
    define, default = (flags.DEFINE_bool, default) if kind is bool else (flags.DEFINE_string, str(default).lower())
    define(name, default, f"Recipe: {wanted(name)}.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    options = flags.FLAGS
    if not options["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # what JAX tells of itself is not for here,
        getLogger("sd_jax.sampling.pipeline").setLevel(INFO)  # but how a checkpoint was understood is

    def given(names) -> dict:
        return {name: getattr(options, name) for name in names if options[name].present}

    from sd_jax.sampling.command import Order, carry_out

    try:
        fields = {name: read_value(name, str(value)) for name, value in given(FIELDS).items()}
        files = {"image": options.init_image, "out": pathlib.Path(options.out), "adapters": options.adapter}
        files |= {"image_prompts": options.image_prompt} | given((*INPUTS, "best_of", "control"))
        for path in carry_out(Order(fields, given(LOADING), format=options.format, previews=options.previews, **files)):
            print(path)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
