"""configs/finetune.py opens every family as diffusers writes it, and its loss takes what the loader gives."""

import jax
import numpy as np
import pytest
from PIL import Image

from configs import finetune
from sd_jax.data import loader, sources
from sd_jax.diffusion import noise
from sd_jax.training import start
from sd_jax.training.conditioning import make_empty
from sd_jax.training.context import Context
from sd_jax.training.methods import method_of
from tests.reference_families import saved_family

pytestmark = pytest.mark.parity

TRAINED = {"sd15": 0, "sd2_base": 0, "sd2_v": 0, "sdxl": 6, "sdxl_refiner": 5}


@pytest.mark.parametrize("name", TRAINED)
def test_a_family_is_fine_tuned_as_it_is(name, tmp_path):
    config = finetune.get_config("runlocal")
    config.init, config.data.path = str(saved_family(name)[0]), str(tmp_path / "pictures")
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (96, 64)).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "a.txt").write_text("a red circle")
    method = method_of(config)
    model = start.build_model(config, method, tmp_path, None)
    spec = model.networks.spec
    assert model.frozen == ("vae", *spec.text_encoders) and set(model.loaded) == set(spec.parts)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(model.loaded))

    tokenize = model.caption_tokenizer()
    batches = loader.make_loader(sources.open_source(config), tokenize, config, num_time_ids=model.num_time_ids)
    batch = {name: value for name, value in next(batches).items() if name != "index"}
    batches.close()
    assert ("time_ids" in batch) == (TRAINED[name] > 0) and model.num_time_ids == TRAINED[name]
    pads = next(iter(spec.text_encoders.values())).pad_token_id
    assert (batch["input_ids"][:, -1] == pads).all()
    context = Context(model.networks, config, make_empty(tokenize, model.networks, {}, config))
    batch = jax.tree.map(jax.numpy.asarray, {**batch, "slot": np.arange(2, dtype=np.int32)})
    shape, _ = jax.eval_shape(lambda params: method.loss(context, params, batch, noise.image_keys(0, 2)), model.loaded)
    assert shape.shape == () and shape.dtype == np.float32
