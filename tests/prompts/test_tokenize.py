import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import types
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from sd_jax.models.presets import CLIPTextConfig
from sd_jax.prompts import tokenize
from sd_jax.prompts.tokenize import load_tokenizer, train_tokenizer

CAPTIONS = [
    "a small red circle in the top left on a striped grey background",
    "A Large BLUE square's shadow, to the left of a cyan star!",
    "there is a green ring & a yellow moon; 12 of them",
    "naïve café, 日本の猫",
] * 3
TEXTS = [
    "",
    "a red circle",
    "  The RED   circle's\n ring, isn't it?  1234 !!! ",
    "cafe\u0301 und Straße, 猫 🐈 &amp; <b>",
    "unheard-of wörds",
    "the mark <|endoftext|> inside",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    train_tokenizer(CAPTIONS, path, vocab_size=700)
    return path


def reference_ids(folder, texts, length=77):
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(str(folder))
    return theirs(texts, padding="max_length", max_length=length, truncation=True, return_tensors="np").input_ids


def test_trained_files_are_in_clips_form(folder):
    vocabulary = json.loads((folder / "vocab.json").read_text())
    merges = (folder / "merges.txt").read_text().splitlines()
    assert list(vocabulary.values()) == list(range(len(vocabulary)))
    assert list(vocabulary)[:3] == ["!", '"', "#"] and vocabulary["!</w>"] == 256 and list(vocabulary)[255] == "Ń"
    assert list(vocabulary)[-2:] == ["<|startoftext|>", "<|endoftext|>"]
    assert merges[0].startswith("#version") and len(merges) - 1 == len(vocabulary) - 514
    assert all(merge.replace(" ", "") in vocabulary for merge in merges[1:])
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == 77 and settings["pad_token"] == "<|endoftext|>"
    assert sorted(os.listdir(folder)) == [
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer_config.json",
        "vocab.json",
    ]


def test_ids_are_those_of_transformers(folder):
    tokenizer = load_tokenizer(folder)
    ids = tokenizer(TEXTS)
    assert ids.dtype == np.int32 and ids.shape == (6, 77)
    np.testing.assert_array_equal(ids, reference_ids(folder, TEXTS))
    np.testing.assert_array_equal(tokenizer(TEXTS, 40), reference_ids(folder, TEXTS, 40))
    assert (ids[0] == [tokenizer.bos_token_id] + [tokenizer.eos_token_id] * 76).all()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == tokenizer.vocab_size - 1


def test_frequent_words_are_one_token(folder):
    tokenizer = load_tokenizer(folder)
    ids = tokenizer(["A small RED circle"])[0]
    assert (ids != tokenizer.pad_token_id).sum() == 1 + 4
    assert (ids[5:] == tokenizer.eos_token_id).all()


def test_training_is_deterministic_across_processes(folder, tmp_path):
    code = (
        "import json, sys; from sd_jax.prompts.tokenize import train_tokenizer;"
        "train_tokenizer(json.loads(sys.argv[1]), sys.argv[2], 700)"
    )
    again = tmp_path / "again"
    subprocess.run([sys.executable, "-c", code, json.dumps(CAPTIONS[::-1]), str(again)], check=True)
    for name in os.listdir(folder):
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name


def test_sizes_of_vocabulary(tmp_path):
    assert train_tokenizer(CAPTIONS, tmp_path / "least", 514).vocab_size == 514
    assert train_tokenizer(CAPTIONS, tmp_path / "exact", 530).vocab_size == 530
    assert 530 < train_tokenizer(CAPTIONS, tmp_path / "all", 49408).vocab_size < 1000  # no more pairs occur twice
    assert train_tokenizer([], tmp_path / "nothing", 1000).vocab_size == 514
    with pytest.raises(ValueError, match="vocab_size=513 is too small"):
        train_tokenizer(CAPTIONS, tmp_path / "less", 513)


def test_long_prompts_show_the_dropped_words(folder):
    tokenizer = load_tokenizer(folder)
    prompt = "a Red circle " * 30 + "and a Blue square"
    with pytest.warns(UserWarning) as caught:
        ids = tokenizer([prompt])
    said = str(caught[0].message)
    assert said.endswith("'" + "a Red circle " * 5 + "and a Blue square'")  # 75 words are kept
    assert ids[0, -1] == tokenizer.eos_token_id and ids[0, -2] != tokenizer.eos_token_id
    np.testing.assert_array_equal(ids, reference_ids(folder, [prompt]))
    tokenizer(["a red circle " * 25])  # exactly 77: no warning
    with pytest.warns(UserWarning, match="dropped: 'square'"):
        tokenizer(["a red circle " * 25 + "square"])


def test_threads_share_a_tokenizer(folder):
    tokenizer = load_tokenizer(folder)
    want = tokenizer(TEXTS)
    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda n: tokenizer(TEXTS, 30 + n % 48), range(200)):
            np.testing.assert_array_equal(got, want[:, : got.shape[1]])


def test_one_text_is_not_a_list_of_texts(folder):
    with pytest.raises(Exception, match="texts"):
        load_tokenizer(folder)("a cat")


# -- Words that are added --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grown(folder):
    return load_tokenizer(folder).with_tokens({"<sks>": 3, "Fancy": 1, "my style": 2})


def test_an_added_word_is_its_ids(folder, grown):
    plain = load_tokenizer(folder)
    first = plain.vocab_size
    sks, fancy, style = [first, first + 1, first + 2], [first + 3], [first + 4, first + 5]
    word = plain.token_ids
    assert grown.vocab_size == first + 6 and grown.token_ids("<sks>") == sks
    assert grown.token_ids("a red <sks>") == [*word("a red"), *sks]
    assert grown.token_ids("a <SKS>, red") == [*word("a"), *sks, *word(", red")]
    assert grown.token_ids("<sks><sks>, Fancy FANCY fancy!") == [*sks * 2, *word(","), *fancy * 3, *word("!")]
    assert grown.token_ids("(a<sks>b)") == [*word("(a"), *sks, *word("b)")]
    assert grown.token_ids("in  My\n Style.") == [*word("in"), *style, *word(".")]
    assert word("<sks> fancy") == load_tokenizer(folder).token_ids("<sks> fancy")  # the old one is as it was
    assert plain.vocab_size == first


def test_an_added_word_is_not_found_within_another(folder, grown):
    plain = load_tokenizer(folder)
    for text in ("fancyfree", "unfancy", "fancy2", "fancy_red", "<sk>", "< sks >", "sks", "my styles", "a red circle"):
        assert grown.token_ids(text) == plain.token_ids(text), text
    assert grown.token_ids("fancy's") == [plain.vocab_size + 3, *plain.token_ids("'s")]
    assert grown.token_ids("fancy-red") == [plain.vocab_size + 3, *plain.token_ids("-red")]


def test_added_words_are_framed_cut_and_named(folder, grown):
    row = grown(["a <sks>"], 8)[0].tolist()
    first, end = grown.token_ids("<sks>")[0], grown.eos_token_id
    assert row == [grown.bos_token_id, *load_tokenizer(folder).token_ids("a"), first, first + 1, first + 2] + [end] * 3
    with pytest.warns(UserWarning, match="dropped: '<sks> red'"):  # of which one id would have found room
        assert grown(["a a a <sks> red"], 6)[0, -2:].tolist() == [first, end]
    text = "a <SKS> small  Fancy red"
    starts = {0: text, 1: "<SKS> small  Fancy red", 3: "<SKS> small  Fancy red", 4: "small  Fancy red", 6: "red"}
    assert {token: grown.text_from(text, token) for token in starts} == starts


def test_the_longest_added_word_is_found(folder):
    tokenizer = load_tokenizer(folder).with_tokens({"hat": 1, "hat-rack": 2})
    first = tokenizer.token_ids("hat")[0]
    assert tokenizer.token_ids("hat-rack hat") == [first + 1, first + 2, first]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"red": 1}, "'red' is a token of .* already: choose another name, such as my-red"),
        ({"Red": 1}, "'Red' is a token"),
        ({"!": 1}, "'!' is a token"),
        ({"<sks>": 1}, "'<sks>' is a token of .* such as my-sks"),
        ({"<SKS>": 2}, "'<SKS>' is a token"),
        ({"<new>": 1, "<New>": 1}, "'<New>' is a token"),
        ({"<sks>_1": 1}, "'<sks>_1' is a token"),
        ({"<sks>_3": 1}, "would be a further vector of '<sks>'"),
        ({"<new>_1": 1, "<new>": 2}, "one of <new>, <new>_1 is a token already"),
        ({"<new>": 0}, "'<new>' of 0 vectors"),
        ({" ": 1}, "' ' cannot be a word"),
        ({"a<|endoftext|>": 1}, "cannot be a word"),
        ({"circle</w>": 1}, "is a token already"),
    ],
)
def test_words_that_cannot_be_added(grown, words, said):
    before = grown.vocab_size
    with pytest.raises(ValueError, match=said):
        grown.with_tokens(words)
    assert grown.vocab_size == before


def test_added_words_survive_saving(folder, grown, tmp_path):
    grown.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    texts = ["a <sks> and Fancy <SKS>", "fancyfree in my style, my styles", *TEXTS]
    np.testing.assert_array_equal(again(texts), grown(texts))
    assert again.vocab_size == grown.vocab_size
    added = json.loads((tmp_path / "saved" / "added_tokens.json").read_text())
    first = load_tokenizer(folder).vocab_size
    names = ["<sks>", "<sks>_1", "<sks>_2", "Fancy", "my style", "my style_1"]
    assert added == {name: first + i for i, name in enumerate(names)}
    # As diffusers spells out a word of several vectors
    wanted = grown.token_ids("a <sks> red")
    assert reference_ids(tmp_path / "saved", ["a <sks> <sks>_1 <sks>_2 red"])[0, 1:6].tolist() == wanted
    more = again.with_tokens({"<new>": 2})
    assert more.token_ids("<new> <sks>") == [first + 6, first + 7, first, first + 1, first + 2]


def test_words_of_the_probe_may_be_added(folder, tmp_path):
    tokenizer = load_tokenizer(folder).with_tokens({"Photo": 2, "Red cats": 1})
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").token_ids("photo of red  cats") == tokenizer.token_ids(
        "photo of red cats"
    )


def test_padding_survives_added_words(folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.pad_as(dataclasses.replace(CLIPTextConfig(), pad_token_id=0))
    assert tokenizer.with_tokens({"<sks>": 1}).pad_token_id == 0


# -- Opening and saving ----------------------------------------------------------------------------------------------


def test_every_form_of_folder_gives_the_same_ids(folder, tmp_path):
    from transformers import CLIPTokenizer

    tokenizer = load_tokenizer(folder)
    tokenizer.save(tmp_path / "saved")
    CLIPTokenizer.from_pretrained(str(folder)).save_pretrained(tmp_path / "single")
    (tmp_path / "single" / "vocab.json").unlink(missing_ok=True)
    assert "tokenizer.json" in os.listdir(tmp_path / "single")
    bare = tmp_path / "model" / "tokenizer"  # of a diffusers folder, without settings
    bare.mkdir(parents=True)
    for name in ("vocab.json", "merges.txt"):
        (bare / name).write_bytes((folder / name).read_bytes())
    for path in (tmp_path / "saved", tmp_path / "single", tmp_path / "model", str(bare)):
        other = load_tokenizer(path)
        np.testing.assert_array_equal(other(TEXTS), tokenizer(TEXTS))
        assert (other.max_length, other.vocab_size) == (77, tokenizer.vocab_size)
    for name in os.listdir(folder):
        assert (tmp_path / "saved" / name).read_bytes() == (folder / name).read_bytes()


def test_saving_replaces_an_older_tokenizer(folder, tmp_path):
    from transformers import CLIPTokenizer

    CLIPTokenizer.from_pretrained(str(train_tokenizer([], tmp_path / "a", 514).source)).save_pretrained(tmp_path / "b")
    load_tokenizer(folder).save(tmp_path / "b")
    np.testing.assert_array_equal(load_tokenizer(tmp_path / "b")(TEXTS), load_tokenizer(folder)(TEXTS))
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]  # nothing left aside


def test_other_pad_tokens_and_added_words_survive(folder, tmp_path):
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(str(folder), pad_token="!", model_max_length=50)
    theirs.add_tokens(["<my-cat>"])
    tokenizer = tokenize.Tokenizer(theirs, "mine")
    assert (tokenizer.pad_token_id, tokenizer.max_length) == (0, 50)
    text = ["a <my-cat> on a red square !"]
    ids = tokenizer(text)
    assert ids.shape == (1, 50) and tokenizer.vocab_size - 1 in ids and ids[0, -1] == 0
    tokenizer.save(tmp_path / "saved")
    np.testing.assert_array_equal(load_tokenizer(tmp_path / "saved")(text), ids)
    np.testing.assert_array_equal(reference_ids(tmp_path / "saved", text, 50), ids)


def test_padding_is_the_text_encoders(folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.pad_as(dataclasses.replace(CLIPTextConfig(), pad_token_id=0))
    assert tokenizer([""], 4)[0].tolist() == [tokenizer.bos_token_id, tokenizer.eos_token_id, 0, 0]
    tokenizer.pad_as(CLIPTextConfig())  # 49407 is no token of this one
    assert tokenizer.pad_token_id == 0


def test_ids_must_have_rows_in_the_text_encoder(folder):
    tokenizer = load_tokenizer(folder)
    fitting = dataclasses.replace(CLIPTextConfig(), vocab_size=tokenizer.vocab_size)
    tokenizer.check(fitting)
    tokenizer.check(CLIPTextConfig())
    with pytest.raises(ValueError, match=r"ids up to \d+, but the text encoder has vocab_size=\d+.*--tokenizer"):
        tokenizer.check(dataclasses.replace(fitting, vocab_size=tokenizer.vocab_size - 1))


def test_degenerate_vocabularies_are_errors(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no tokenizer.*--tokenizer"):
        load_tokenizer(tmp_path)
    tiny = tmp_path / "tiny"
    tiny.mkdir()
    (tiny / "merges.txt").write_text("#version: 0.2\n")
    (tiny / "vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1}))
    with pytest.raises(ValueError, match="only 2 tokens.*--tokenizer"):
        load_tokenizer(tiny)
    words = {f"word{i}</w>": i for i in range(400)}  # large enough, but it spells nothing
    (tiny / "vocab.json").write_text(json.dumps({**words, "<|startoftext|>": 400, "<|endoftext|>": 401}))
    with pytest.raises(ValueError, match="turns .a photo.*--tokenizer"):
        load_tokenizer(tiny)
    (tiny / "vocab.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read.*--tokenizer"):
        load_tokenizer(tiny)


@pytest.mark.parametrize("name", [None, "openai/clip-vit-large-patch14", "someone/nothing"])
def test_without_the_hub_there_is_one_error(name):
    with warnings.catch_warnings(), pytest.raises(FileNotFoundError) as caught:
        load_tokenizer(name)
    said = str(caught.value)
    assert (name or "openai/clip-vit-large-patch14") in said and "--tokenizer=DIR" in said and "\n" not in said


def test_machines_without_network_learn_it_at_once(monkeypatch):
    import socket

    from huggingface_hub import constants

    def no_network(*_):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with pytest.raises(FileNotFoundError, match="Name or service not known"):
        load_tokenizer("openai/clip-vit-large-patch14")


@pytest.mark.parametrize("name", ["/nowhere/tokenizer", "./nowhere", "a/b/c"])
def test_missing_paths_do_not_ask_the_hub(name, monkeypatch):
    monkeypatch.setattr(tokenize, "_from_hub", lambda name: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match="is not a folder.*--tokenizer"):
        load_tokenizer(name)


def test_a_tokenizer_in_the_hubs_cache_needs_no_network(folder, tmp_path, monkeypatch):
    from huggingface_hub import constants

    repository = tmp_path / "models--someone--clip"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    for name in os.listdir(folder):
        (snapshot / name).write_bytes((folder / name).read_bytes())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    np.testing.assert_array_equal(load_tokenizer("someone/clip")(TEXTS), load_tokenizer(folder)(TEXTS))


@pytest.mark.parity
def test_openais_vocabulary_gives_openais_ids(tmp_path, monkeypatch):
    """The merges come with OpenAI's own tokenizer, of which one file is taken: the package wants old setuptools."""
    package = importlib.util.find_spec("clip")
    if package is None:
        pytest.skip("needs `pip install --no-deps clip-anytorch`")
    path = os.path.join(package.submodule_search_locations[0], "simple_tokenizer.py")
    spec = importlib.util.spec_from_file_location("clip_simple_tokenizer", path)
    module = importlib.util.module_from_spec(spec)
    # It cleans text with ftfy, which leaves plain text as it is
    monkeypatch.setitem(sys.modules, "ftfy", types.SimpleNamespace(fix_text=lambda text: text))
    spec.loader.exec_module(module)
    theirs = module.SimpleTokenizer()
    (tmp_path / "vocab.json").write_text(json.dumps(theirs.encoder), encoding="utf-8")
    merges = [" ".join(pair) for pair, _ in sorted(theirs.bpe_ranks.items(), key=lambda item: item[1])]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    ours = load_tokenizer(tmp_path)
    ours.check(CLIPTextConfig())
    assert (ours.vocab_size, ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (49408, 49406, 49407, 49407)
    for text in (*CAPTIONS, *TEXTS[:3], "a photograph of an astronaut riding a horse, 8k, trending on artstation"):
        want = [49406, *theirs.encode(text), 49407]
        assert ours([text])[0].tolist() == want + [49407] * (77 - len(want))
    # What is trained here numbers the alphabet as OpenAI does
    trained = train_tokenizer(CAPTIONS, tmp_path / "trained", 514)._hf.get_vocab()
    assert all(theirs.encoder[token] == i for token, i in trained.items() if i < 512)
