import io

import numpy as np
import pytest
from PIL import Image

from sd_jax import config as configs


def jpeg(seed: int, height: int = 40, width: int = 48) -> bytes:
    """A picture whose first pixel tells its number: grey, 10 * seed."""
    out = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), 10 * seed, np.uint8)).save(out, "JPEG", quality=95)
    return out.getvalue()


def number_of(record: dict) -> int:
    return round(float(record["pixels"].mean()) / 10)


@pytest.fixture
def config():
    """A training config for small pictures; tests change what they are about."""
    config = configs.training_defaults("full")
    config.batch_size = 4
    config.eval_batches = 2
    config.data.resolution = 16
    config.data.num_examples = 10
    config.data.num_workers = 0
    config.data.held_out = 0.0
    return config


@pytest.fixture
def photos(tmp_path):
    """Twelve pictures 00.jpg ... 11.jpg in a folder, with .txt captions "picture 0" ..."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i:02d}.jpg").write_bytes(jpeg(i))
        (folder / f"{i:02d}.txt").write_text(f"picture {i}\n")
    return folder
