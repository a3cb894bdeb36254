from sd_jax import names

FRUIT = ("apple", "apricot", "cherry", "dpmpp_2m", "sgm_uniform")


def test_the_nearest_come_first():
    assert names.nearest("aple", FRUIT) == ["apple"]
    assert names.nearest("apricott", FRUIT)[0] == "apricot"
    assert names.nearest("xyz", FRUIT) == []


def test_names_as_others_spell_them():
    assert names.nearest("DPM++ 2M", FRUIT)[0] == "dpmpp_2m"
    assert names.nearest(" SGM Uniform ", FRUIT)[0] == "sgm_uniform"
    assert names.nearest("CHERRY", FRUIT)[0] == "cherry"


def test_hint():
    assert names.hint("aple", FRUIT) == "did you mean apple?"
    assert names.hint("ap", ("ape", "apt")) == "did you mean apt or ape?"
    assert names.hint("xyz", ("a", "b")) == "use one of a, b"
