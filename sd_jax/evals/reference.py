"""Real pictures, which generated ones are held against: from any data that training takes, or statistics of others.

A picture is cut to the model's size as in training, in the middle. What the network says of them is kept in a file
whose name hangs on the data, the size, the network and the code in between, and is read when it is asked for again.
"""

import json
import pathlib
from collections.abc import Iterator
from logging import getLogger

import jax
import numpy as np
from ml_collections import ConfigDict

from sd_jax import config as configs
from sd_jax.checkpoints import detect
from sd_jax.data import DataError, fingerprints, sources, transforms
from sd_jax.evals.features import gathered_rows
from sd_jax.evals.fid import Statistics, load_statistics, save_statistics
from sd_jax.evals.networks import Network
from sd_jax.media import BadImage

logger = getLogger(__name__)

# Source files between a record and its features
_CODE = ("media.py", "data/transforms.py", "evals/features.py", "models/inception.py", "models/clip_vision.py")


def data_config(
    checkpoint: str | None,  # of the model; a workdir's own data where `path` is empty
    path: str,  # as config.data.path
    image_key: str,
    caption_key: str,
    side: int,  # pixels of the model's pictures
) -> ConfigDict:
    """The config of the data that a model is held against. Raises ValueError where neither says which."""
    config = configs.training_defaults("full")
    if path:
        config.data.update({"path": path, "image_key": image_key, "caption_key": caption_key})
    elif trained := trained_with(checkpoint):
        config.seed = trained["seed"]
        config.data.update({name: trained["data"][name] for name in config.data if name in trained["data"]})
    else:
        raise ValueError("no data to hold pictures against: give --data=, a folder, a data set's name, or 'shapes'")
    config.data.resolution = side
    config.data.buckets.step = 0
    return config


def trained_with(checkpoint: str | None) -> dict | None:
    """The config in the workdir of a checkpoint, where it has one."""
    location = detect.native_location(checkpoint) if checkpoint else None
    file = location[0].parent / "config.json" if location else None
    return json.loads(file.read_text()) if file and file.is_file() else None


class RealPictures:
    """This process' share of at most `most` records, evenly spread over the data, cut to one size."""

    def __init__(self, config: ConfigDict, size: tuple[int, int], most: int):
        self.source, self.size = sources.open_source(config), size
        self.name = str(config.data.path)
        self.records = np.linspace(0, len(self.source) - 1, min(len(self.source), most)).astype(np.int64)

    def captions(self) -> list[str]:
        """The first of each record, those of all processes."""
        texts = (self.source.fields(int(index)) for index in self.records)
        return [next((text for field in fields for text in field), "") for fields in texts]

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """uint8 [at most `size`, height, width, 3]. What cannot be read is left out, and counted in the log."""
        batch, bad = [], 0
        for index in share(self.records):
            try:
                batch.append(transforms.fit(self.source[int(index)]["pixels"], self.size).pixels)
            except BadImage as error:
                bad += 1
                logger.info("left out %s", error)
            if len(batch) == size:
                yield np.stack(batch)
                batch = []
        if batch:
            yield np.stack(batch)
        if bad:
            logger.warning("%d of %d pictures of %s cannot be read", bad, len(share(self.records)), self.name)

    def statistics(self, network: Network, folder: pathlib.Path, batch_size: int) -> Statistics:
        """From `folder`, or computed and put there."""
        says = (self.source.fingerprint(), self.records.tobytes().hex(), str(self.size), network.name)
        path = folder / f"reference-{fingerprints.digest(*says, fingerprints.code_of(*_CODE))[:16]}.npz"
        if path.exists():
            logger.info("reading %s", path)
            return load_statistics(path)
        rows = [network.run(pixels) for pixels in self.batches(batch_size)]
        if not rows:
            raise DataError(f"{self.name}: no picture of it can be read")
        found = Statistics.of(gathered_rows(np.concatenate(rows)))
        if jax.process_index() == 0:
            save_statistics(path, found)
        return found


def share(items):
    """This process' part of a sequence, in one piece: of n processes the i-th has the i-th n-th."""
    count, index = jax.process_count(), jax.process_index()
    return items[len(items) * index // count : len(items) * (index + 1) // count]
