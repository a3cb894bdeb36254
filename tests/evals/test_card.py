import pytest

from sd_jax.evals.card import check_licence, model_card

REPORT = {
    "model": {"checkpoint": "runs/shapes", "sha256": "0123456789"},
    "accuracy": {"seen": {"colour": 1.0, "relation": None}, "held_out": {"colour": 0.5, "relation": None}},
    "figures": {"fid": 12.3456, "shapes_seen": 1.0},
    "judges": {"fid": "Inception x.pth (sha256 aaaaaaaaaa, not known as published)", "shapes_seen": "no network"},
    "pictures": {"captions": 5000, "reference": 4000, "one_object": 8, "two_objects": 4},
    "data": "shapes",
    "recipe": {"steps": 16, "sampler": "euler", "guidance_scale": 2.5, "seed": 3},
}
CONFIG = {
    "method": "full",
    "init": "runs/vae",
    "total_steps": 10,
    "batch_size": 4,
    "data": {"path": "shapes", "num_examples": 60, "resolution": 32},
}


def test_a_card_has_what_the_hub_reads_and_what_people_ask():
    import yaml

    card = model_card(REPORT, [], ["samples.png"], "openrail++", config=CONFIG)
    _, front, body = card.split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["library_name"] == "sd_jax" and front["license"] == "openrail++"
    assert front["pipeline_tag"] == "text-to-image" and "text-to-image" in front["tags"]
    assert "# shapes\n" in body and "weights 0123456789" in body
    assert "| FID | 12.35 | Inception x.pth (sha256 aaaaaaaaaa, not known as published) |" in body
    assert "5000 pictures of captions, 4000 real pictures" in body
    assert "steps 16, sampler euler, guidance scale 2.5, seed 3. Data: shapes." in " ".join(body.split())
    assert "| held out | 0.5 |  |" in body and "(samples.png)" in body and "sweep.png" not in body
    assert "Trained on `shapes` (60 drawn pictures): 10 steps of 4 pictures at 32 pixels, from `runs/vae`" in body
    assert '"total_steps": 10' in body and "## Licence\n\n`openrail++`" in body


def test_a_sweep_is_a_table_and_a_curve():
    sweep = [{"guidance_scale": 1.0, "fid": 20.0}, {"guidance_scale": 2.0, "fid": 15.0}]
    card = model_card(REPORT, sweep, [], "mit", trained_on="pictures of mine")
    assert "| guidance scale | FID |\n| --- | --- |\n| 1 | 20 |\n| 2 | 15 |" in card and "(sweep.png)" in card
    assert "Trained on pictures of mine." in card and "## Pictures" not in card
    assert "What it was trained on is not told." in model_card(REPORT, sweep, [], "mit")


def test_a_licence_is_an_identifier():
    with pytest.raises(ValueError, match="--card=Apache 2: give an identifier of the hub, such as apache-2.0"):
        check_licence("Apache 2")
    check_licence("creativeml-openrail-m")
