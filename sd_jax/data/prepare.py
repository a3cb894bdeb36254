"""Prepares data for training: python -m sd_jax.data.prepare --data='tars/*.tar' --out=DIR --filters=aesthetic=5,unsafe

Shards in (webdataset tars, parquet files, folders of pictures, saved Hugging Face data sets) -> decoded once, measured,
scored, filtered, sized -> webdataset shards out, with report.json and sheet.png; `preparation` says what DIR holds. The
same command goes on where it was stopped. Filters and the thresholds that they have by default: `filters`. With --clip
(and --aesthetic) a model scores the pictures: `clip_scorer`.

Several machines share the work by --shard_index and --num_shards (of a Slurm array: --shard_index=$SLURM_ARRAY_TASK_ID
--num_shards=$SLURM_ARRAY_TASK_COUNT) on one DIR; who finds all shards finished takes out the doubles and writes the
report. Or --executor=ray does (`prepare_ray`), on the cluster that RAY_ADDRESS names.

config.data.path=DIR trains on what comes out. Its latents and text states hang on more than pictures (sizes, the
model, the captions drawn), so they are the step after this one: training makes them, once, in its cache
(config.data.cache_latents and .cache_text, kept beside the shards with config.data.cache_dir=DIR/cache), or
`python train.py --precompute` with the same config does before it, on a machine or several that need not train.
"""

import functools
import json
import os
import pathlib
import sys
from collections.abc import Callable
from concurrent.futures import BrokenExecutor

from absl import app, flags, logging

flags.DEFINE_multi_string(
    "data", None, "A folder or a pattern of shards, one or more; what may be there, `shards` says.", required=True
)
flags.DEFINE_string("out", None, "The folder for the shards that come out.", required=True)
flags.DEFINE_string("filters", "", "Names, or name=threshold, joined by commas: aesthetic=5,watermark,resolution=256.")
flags.DEFINE_integer("resolution", 0, "Sort pictures into sizes of about this square's area; 0 = do not.")
flags.DEFINE_integer("bucket_step", 64, "Sides of these sizes are multiples of this; 0 = squares only.")
flags.DEFINE_bool("shrink", False, "Make pictures that more than cover their size smaller, as JPEG of quality 95.")
flags.DEFINE_bool("exact", True, "Leave out what has the same bytes as an earlier picture.")
flags.DEFINE_integer("near", None, "Leave out what differs from an earlier one in at most so many of 64 bits (0 to 7).")
flags.DEFINE_string("clip", "", "A CLIP that scores: a folder, a file, or a workdir of ours.")
flags.DEFINE_string("aesthetic", "", "A head on it: a file of LAION's layout, or a workdir of ours.")
flags.DEFINE_string("tokenizer", "", "Of the CLIP, where its own is not beside it.")
flags.DEFINE_string("dtype", "float32", "Of the CLIP's computation; bfloat16 on accelerators that have it.")
flags.DEFINE_string("rank", "aesthetic", "The column by which the sheet's best and worst are chosen.")
flags.DEFINE_string("image_key", "image", "The column of pictures; of a tar the ending.")
flags.DEFINE_string("caption_key", "text", "The columns of captions, joined by commas.")
flags.DEFINE_integer("shard_size", 10_000, "Pictures to a shard, where --data is not cut into shards already.")
flags.DEFINE_integer("batch_size", 64, "Records that are decoded and judged together.")
flags.DEFINE_enum("executor", "processes", ("processes", "ray"), "Who runs the stages.")
flags.DEFINE_integer(
    "workers", None, "Processes that decode; 0 = this one; none = one for each core. Of Ray the actors."
)
flags.DEFINE_integer("shard_index", 0, "Of this process among --num_shards.")
flags.DEFINE_integer("num_shards", 1, "Processes that share the work.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)  # each bad picture is told of below that; the report names some
    try:
        report = _prepare(flags.FLAGS)
    except BrokenExecutor:
        sys.exit("error: a process that decodes was killed, perhaps for want of memory: the same command goes on")
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    if report is None:
        print("the shards of this process are finished, others are not: the last process writes the report")
    else:
        print(json.dumps({name: value for name, value in report.items() if name != "histograms"}, indent=1))


def _prepare(options) -> dict | None:
    from sd_jax.data import filters, preparation, shards
    from sd_jax.data.stages import Sizes

    if options.shard_size < 1 or options.batch_size < 1:
        raise ValueError(f"--shard_size={options.shard_size} --batch_size={options.batch_size}: give 1 or more")
    settings = preparation.Settings(
        filters=filters.parse(options.filters),
        sizes=Sizes(options.resolution, options.bucket_step, options.shrink),
        exact=options.exact,
        distance=options.near,
        rank=options.rank,
        image_key=options.image_key,
        caption_key=options.caption_key,
        batch_size=options.batch_size,
    )
    found, out = shards.find(options.data, options.shard_size), pathlib.Path(options.out)
    workers = len(os.sched_getaffinity(0)) if options.workers is None else options.workers
    make_scorer = _scorer_maker(options)
    share = (workers, options.shard_index, options.num_shards)
    if options.executor == "ray":
        from sd_jax.data import prepare_ray

        return prepare_ray.prepare(found, out, settings, make_scorer, *share)
    return preparation.prepare(found, out, settings, make_scorer() if make_scorer else None, *share)


def _scorer_maker(options) -> Callable | None:
    """Picklable; JAX is imported where it is called."""
    if not options.clip:
        if options.aesthetic:
            raise ValueError("--aesthetic needs --clip, whose features it reads")
        return None
    return functools.partial(
        _make_scorer, options.clip, options.aesthetic, options.tokenizer, options.batch_size, options.dtype
    )


def _make_scorer(*arguments):
    from sd_jax.data.clip_scorer import clip_scorer

    return clip_scorer(*arguments)


if __name__ == "__main__":
    app.run(main)
