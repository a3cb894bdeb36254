"""Weights and their names; that the networks equal their references is tested where they are."""

import hashlib

import numpy as np
import pytest

from sd_jax.evals import networks


def test_a_name_has_the_hash_of_the_file(tmp_path):
    files = [tmp_path / "vgg16.pth", tmp_path / "vgg.pth"]
    for file in files:
        file.write_bytes(file.name.encode())
    first, second = (hashlib.sha256(file.name.encode()).hexdigest()[:10] for file in files)
    said = f"vgg16.pth (sha256 {first}, not known as published) and vgg.pth (sha256 {second}, not known as published)"
    assert networks.name_of(f"{files[0]},{files[1]}") == said


def test_published_weights_are_told_by_their_hash_and_not_by_their_name(tmp_path, monkeypatch):
    (tmp_path / "pt_inception-2015-12-05-6726825d.pth").write_bytes(b"random numbers")
    assert networks.name_of(tmp_path / "pt_inception-2015-12-05-6726825d.pth").endswith("not known as published)")
    (tmp_path / "renamed").write_bytes(b"weights")
    digits = hashlib.sha256(b"weights").hexdigest()[:8]
    monkeypatch.setitem(networks.PUBLISHED, digits, "FID's Inception")
    assert networks.name_of(tmp_path / "renamed").endswith(", FID's Inception)")


def test_features_of_a_clip_have_length_one(files):
    clip = networks.open_clip(str(files / "clip"), batch_size=4)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), np.uint8)
    for rows in (clip.pictures(pixels), clip.texts(["a red circle", "a star"])):
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, rtol=1e-5)
        assert rows.std(0).max() > 0.01


def test_an_aesthetic_head_is_its_line(files):
    from sd_jax.checkpoints import aesthetic

    config, variables = aesthetic.load(files / "head.safetensors")
    rows = np.random.default_rng(0).normal(size=(5, config.width)).astype(np.float32)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    expected = unit @ np.asarray(variables["params"]["kernel"])[:, 0] + float(variables["params"]["bias"][0])
    found = networks.open_aesthetic(str(files / "head.safetensors"), batch_size=4).run(rows)
    assert found == pytest.approx(expected, rel=1e-5)
