"""The published files of the networks that judge -> our parameters."""

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util

from sd_jax.checkpoints import CheckpointError, judges
from sd_jax.checkpoints.read_safetensors import write
from tests.checkpoints.tiny import shapes_only

VGG = [(0, 3, 64), (2, 64, 64), (5, 64, 128), (7, 128, 128), (10, 128, 256), (12, 256, 256), (14, 256, 256)]
VGG += [(17, 256, 512), (19, 512, 512), (21, 512, 512), (24, 512, 512), (26, 512, 512), (28, 512, 512)]
VGG_FILE = {f"features.{i}.weight": (out, width, 3, 3) for i, width, out in VGG}
VGG_FILE |= {f"features.{i}.bias": (out,) for i, _, out in VGG}
WEIGHTS_FILE = {f"lin{i}.model.1.weight": (1, width, 1, 1) for i, width in enumerate((64, 128, 256, 512, 512))}


def names(tree):
    return {name: leaf.shape for name, leaf in traverse_util.flatten_dict(tree, sep="/").items()}


@pytest.fixture(scope="module")
def inception_file():
    """As pt_inception-2015-12-05-6726825d.pth has it: 94 convolutions of 6 tensors each, and a classifier."""
    shapes = {
        judges._their_name(name): judges._their_shape(shape) for name, shape in judges._shapes(judges.INCEPTION).items()
    }
    counters = {name.replace("running_var", "num_batches_tracked"): () for name in shapes if "running_var" in name}
    return {**shapes, **counters, "fc.weight": (1008, 2048), "fc.bias": (1008,)}


def test_inception(inception_file):
    assert len(inception_file) == 94 * 6 + 2
    known = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Conv2d_1a_3x3.bn.weight": (32,),
        "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
        "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
        "Mixed_6b.branch7x7dbl_2.bn.running_mean": (128,),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
    }
    assert {name: inception_file[name] for name in known} == known
    found = names(judges.from_torch(judges.INCEPTION, shapes_only(inception_file), "a file"))
    assert len(found) == 94 * 5
    assert found["Mixed_6b/branch7x7_2/conv/kernel"] == (1, 7, 128, 128)
    assert found["Conv2d_1a_3x3/bn/scale"] == found["Conv2d_1a_3x3/bn/running_var"] == (32,)


def test_torchvisions_own_inception_is_named(inception_file):
    other = {**inception_file, "AuxLogits.fc.weight": (1000, 768), "Mixed_5b.branch_pool.conv.weight": (64, 192, 1, 1)}
    del other["Mixed_7c.branch1x1.bn.bias"]
    said = (
        r"x\.pth: not FID's InceptionV3: AuxLogits.fc.weight is unexpected; "
        r"Mixed_5b.branch_pool.conv.weight is \(64, 192, 1, 1\), not \(32, 192, 1, 1\); "
        r"Mixed_7c.branch1x1.bn.bias is missing: get pt_inception-2015-12-05-6726825d.pth of pytorch-fid"
    )
    with pytest.raises(CheckpointError, match=said):
        judges.from_torch(judges.INCEPTION, shapes_only(other), "x.pth")


def test_lpips_is_of_two_files(tmp_path):
    rng = np.random.default_rng(0)
    vgg, weights = tmp_path / "vgg16.safetensors", tmp_path / "vgg.safetensors"
    # As far as the trunk goes half precision is enough here: it is read as float32
    trunk = {name: np.zeros(shape, ml_dtypes.bfloat16) for name, shape in VGG_FILE.items()}
    trunk["features.5.weight"] = rng.normal(size=(128, 64, 3, 3)).astype(ml_dtypes.bfloat16)
    write(vgg, {**trunk, "classifier.6.bias": np.zeros(1000, np.float32)})
    linear = {name: rng.uniform(size=shape).astype(np.float32) for name, shape in WEIGHTS_FILE.items()}
    write(weights, linear)
    params = judges.load_lpips(vgg, weights)
    assert names(params) == judges._shapes(judges.VGG16) | judges._shapes(judges.LPIPS_WEIGHTS)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(
        params["lin3"]["model_1"]["kernel"][0, 0, :, 0], linear["lin3.model.1.weight"].ravel()
    )
    expected = trunk["features.5.weight"].astype(np.float32).transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(params["features_5"]["kernel"], expected)

    linear["lin0.model.1.weight"][0, 3] = np.nan
    write(weights, linear)
    with pytest.raises(CheckpointError, match=r"vgg\.safetensors: lin0/model_1/kernel has 1 values that are not fini"):
        judges.load_lpips(vgg, weights)


def test_lpips_of_another_trunk_is_named():
    alex = {f"lin{i}.model.1.weight": (1, width, 1, 1) for i, width in enumerate((64, 192, 384, 256, 256))}
    said = r"alex: not LPIPS' weights for VGG16: lin1.model.1.weight is \(1, 192, 1, 1\), not \(1, 128, 1, 1\)"
    with pytest.raises(CheckpointError, match=said):
        judges.from_torch(judges.LPIPS_WEIGHTS, shapes_only(alex), "alex")
    with pytest.raises(CheckpointError, match=r"VGG16: lin0\.model\.1\.weight is unexp.*features\.0\.weight is mi"):
        judges.from_torch(judges.VGG16, shapes_only(WEIGHTS_FILE), "swapped")
    with pytest.raises(CheckpointError, match=r"features\.30\.weight is unexpected: get vgg16-397923af\.pth"):
        judges.from_torch(judges.VGG16, shapes_only({**VGG_FILE, "features.30.weight": (512, 512, 3, 3)}), "vgg19")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        judges.load_inception(tmp_path / "nowhere.pth")
