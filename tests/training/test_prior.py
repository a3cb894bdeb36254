"""Pictures of a class that a run makes before it: which, from which seeds, and only those that are missing."""

import numpy as np
import pytest

from sd_jax import media
from sd_jax.config import training_defaults
from sd_jax.models.networks import Networks
from sd_jax.models.presets import TINY_SHAPES
from sd_jax.training import prior
from sd_jax.training.start import Model


class Pipe:
    """Draws picture i of a batch in one grey, its seed + i; keeps what it was asked for."""

    asked = []

    def __init__(self, *_):
        pass

    def text_to_image(self, prompts, seed, width, height, **fields):
        Pipe.asked.append((list(prompts), seed, fields["steps"]))
        return np.stack([np.full((height, width, 3), seed + i, np.uint8) for i in range(len(prompts))])


@pytest.fixture
def folder_of(tmp_path, monkeypatch):
    """(changes of the config) -> the folder of a run's pictures."""
    monkeypatch.setattr(prior, "Pipeline", Pipe)
    monkeypatch.setattr(Pipe, "asked", [])
    model = Model(Networks.of(TINY_SHAPES), ("unet",), (), {}, None)

    def of(**changes):
        config = training_defaults("dreambooth")
        config.data.resolution, config.batch_size, config.samples.steps = 8, 4, 7
        config.prior.update({"prompt": "a star", "count": 6, **changes})
        return prior.prior_folder(config, model, tmp_path)

    return of


def grey(path):
    return int(media.decode_image(path).mean())


def test_each_is_made_once_from_its_own_seed(folder_of, tmp_path):
    folder = tmp_path / "prior"
    assert folder_of() == str(folder)
    assert Pipe.asked == [(["a star"] * 4, 0, 7), (["a star"] * 4, 4, 7)]
    assert sorted(path.name for path in folder.glob("*.png")) == [f"{i:05d}.png" for i in range(6)]
    assert [grey(folder / f"{i:05d}.png") for i in range(6)] == list(range(6))
    assert (folder / "00005.txt").read_text() == "a star"
    Pipe.asked.clear()
    folder_of()
    assert not Pipe.asked
    (folder / "00004.png").unlink()
    media.write_png(folder / "00005.png", np.full((8, 8, 3), 99, np.uint8), {})
    folder_of()
    assert Pipe.asked == [(["a star"] * 4, 4, 7)]
    assert [grey(folder / f"0000{i}.png") for i in (4, 5)] == [4, 99]  # what was there stays


def test_the_lines_of_a_file_take_turns(folder_of, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red star\n\na blue star\n")
    folder = tmp_path / "prior"
    folder_of(prompt=str(tmp_path / "prompts.txt"), count=3)
    captions = [(folder / f"{i:05d}.txt").read_text() for i in range(3)]
    assert captions == ["a red star", "a blue star", "a red star"]


def test_pictures_that_are_given_are_taken(folder_of):
    assert folder_of(path="/elsewhere") == "/elsewhere" and not Pipe.asked
    with pytest.raises(ValueError, match="config.prior.count=0: at least 1"):
        folder_of(count=0)
