"""Ray gives the built-in executor's shards. `pip install ray[data]`, then by hand: pytest -m slow."""

import hashlib
import pathlib

import numpy as np
import pytest
from PIL import Image

from sd_jax.data import filters, preparation, prepare_ray, shards
from sd_jax.data.preparation import Settings
from sd_jax.data.stages import Scorer, Sizes

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


def files_of(out: pathlib.Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())}


def make_scorer() -> Scorer:
    # Local functions travel by value: an actor cannot import this module
    def small(pixels):
        return np.asarray(Image.fromarray(pixels).resize((4, 4)))

    def brightness(columns):
        return {"aesthetic": columns["inputs"].mean((1, 2, 3)) / 25.5}

    return Scorer("brightness", brightness, small)


@pytest.mark.parametrize("scored", [False, True])
def test_equals_the_built_in_executor(tmp_path, scored):
    pytest.importorskip("ray")
    (tmp_path / "in").mkdir()
    for i in range(24):
        pixels = np.random.default_rng(i // 2).integers(0, 200 + 2 * i // 2 * 2, (40, 60, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{i:02d}.png")
    (tmp_path / "in" / "05.png").write_bytes(b"broken")
    found = shards.find([str(tmp_path / "in")], 6)
    settings = Settings(filters.resolve({"aesthetic": 4.0} if scored else {}), Sizes(32, 16, True), batch_size=4)
    one, other = tmp_path / "built_in", tmp_path / "ray"
    report = preparation.prepare(found, one, settings, make_scorer() if scored else None)
    make = _by_value(make_scorer) if scored else None
    assert prepare_ray.prepare(found, other, settings, make, workers=2) == report
    assert files_of(one) == files_of(other) and report["kept"] and report["bad"] == 1
    assert prepare_ray.prepare(found, other, settings, make, workers=2) == report  # nothing is left to do


def _by_value(function):
    """As a function that somebody wrote in a notebook."""
    import types

    return types.FunctionType(function.__code__, {**function.__globals__, "__name__": "__main__"}, "make_scorer")
