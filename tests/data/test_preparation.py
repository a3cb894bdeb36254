"""Preparing data: all forms of shards in, one form out; what is filtered, named, found twice, stopped, gone on with."""

import functools
import hashlib
import io
import json
import pathlib
import tarfile

import numpy as np
import pytest
from PIL import Image

from sd_jax.data import DataError, filters, preparation, shards, stages
from sd_jax.data.clip_pixels import square
from sd_jax.data.preparation import Settings
from sd_jax.data.sources import open_source
from sd_jax.data.stages import Scorer, Sizes

COUNT, SHARD = 24, 8  # pictures, of a shard


def picture(seed: int, height: int = 48, width: int = 64, format: str = "JPEG") -> bytes:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    out = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(out, format)
    return out.getvalue()


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Pictures with the columns that LAION has; of each shard one broken, and number 20 the same as number 2."""
    made = []
    for i in range(COUNT):
        data = picture(2 if i == 20 else i, 48 + 16 * (i % 3), 64, "PNG" if i % 4 == 1 else "JPEG")
        data = data[: len(data) // 2] if i % SHARD == 5 else data
        made.append(
            {"key": f"{i:04d}", "data": data, "text": f"picture {i}", "pwatermark": i / COUNT, "NSFW": "UNLIKELY"}
        )
    return made


def write_tar(path: pathlib.Path, rows: list[dict]) -> None:
    with shards.TarWriter(path) as tar:
        for row in rows:
            columns = {name: value for name, value in row.items() if name not in ("data", "text")}
            tar.add_member(f"{row['key']}.png", row["data"])
            tar.add_member(f"{row['key']}.txt", row["text"].encode())
            tar.add_member(f"{row['key']}.json", json.dumps(columns).encode())


def as_tars(root, rows):
    root.mkdir()
    for at in range(0, COUNT, SHARD):
        write_tar(root / f"{at:03d}.tar", rows[at : at + SHARD])


def as_parquet(root, rows):
    import pyarrow
    import pyarrow.parquet

    root.mkdir()
    for at in range(0, COUNT, SHARD):
        part = [{"image": {"bytes": row["data"], "path": None}, **row} for row in rows[at : at + SHARD]]
        table = pyarrow.Table.from_pylist([{k: v for k, v in row.items() if k != "data"} for row in part])
        pyarrow.parquet.write_table(table, root / f"{at:03d}.parquet")


def as_folder(root, rows):
    root.mkdir()
    for row in rows:
        columns = {name: value for name, value in row.items() if name not in ("data", "text")}
        (root / f"{row['key']}.jpg").write_bytes(row["data"])
        (root / f"{row['key']}.txt").write_text(row["text"] + "\n")
        (root / f"{row['key']}.json").write_text(json.dumps(columns))


def as_saved(root, rows):
    import datasets

    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "data"}
    made = datasets.Dataset.from_dict({"image": [{"bytes": row["data"], "path": None} for row in rows], **columns})
    made.cast_column("image", datasets.Image(decode=False)).save_to_disk(str(root))


FORMS = {"tars": as_tars, "parquet": as_parquet, "folder": as_folder, "saved": as_saved}


def small(pixels: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((side, side)))


def brightness(columns: dict) -> dict:
    """The lighter the better; and a column that says what was handed in."""
    assert columns["inputs"].shape[1:] == (4, 4, 3) and len(columns["caption"]) == len(columns["inputs"])
    return {"aesthetic": columns["inputs"].mean((1, 2, 3)) / 25.5, "read": list(columns["caption"])}


SCORER = Scorer("brightness", brightness, functools.partial(small, side=4))
SETTINGS = Settings(
    filters=filters.resolve({"watermark": 0.9, "aesthetic": 4.8}), sizes=Sizes(32, 16, shrink=True), batch_size=3
)


def run(data, out, settings=SETTINGS, scorer=SCORER, **kwargs):
    return preparation.prepare(shards.find([str(data)], SHARD), pathlib.Path(out), settings, scorer, **kwargs)


def files_of(out) -> dict[str, str]:
    """Of all that a run leaves, the hashes."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())}


def records_of(out) -> dict[str, dict[str, bytes]]:
    found = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, ending = member.name.partition(".")
                found.setdefault(key, {})[ending] = tar.extractfile(member).read()
    return found


@pytest.fixture(scope="module")
def tars(rows, tmp_path_factory):
    root = tmp_path_factory.mktemp("in") / "tars"
    as_tars(root, rows)
    return root


@pytest.fixture(scope="module")
def prepared(tars, tmp_path_factory):
    """(the folder, the report) of an undisturbed run."""
    out = tmp_path_factory.mktemp("out") / "whole"
    return out, run(tars, out)


def test_what_is_kept_and_counted(prepared, rows):
    out, report = prepared
    expected = {}
    for i, row in enumerate(rows):
        try:
            mean = np.asarray(Image.open(io.BytesIO(row["data"])).convert("RGB").resize((4, 4))).mean() / 25.5
        except OSError:
            continue
        expected[i] = (mean > 4.8, row["pwatermark"] < 0.9)
    kept = [i for i, both in expected.items() if all(both) and i != 20]
    found = records_of(out)
    assert [int(json.loads(parts["json"])["key"]) for parts in found.values()] == kept and 5 < len(kept) < 20
    assert list(found) == [f"{i // SHARD:05d}{i % SHARD:06d}" for i in kept]
    assert report["records"] == COUNT and report["bad"] == 3 and report["kept"] == len(kept)
    assert report["duplicates"] == {"exact": 1, "near": 0} and all(expected[20])
    aesthetic, watermark = (report["filters"][name] for name in ("aesthetic", "watermark"))
    assert aesthetic["kept"] == sum(a for a, _ in expected.values()) and watermark["dropped"] == 2
    assert aesthetic["dropped_first"] + watermark["dropped_first"] == 21 - sum(map(all, expected.values()))
    assert sum(report["histograms"]["aesthetic"]["all"]) == 21
    assert sum(report["histograms"]["aesthetic"]["kept"]) == sum(map(all, expected.values()))
    assert set(report["bad_names"]) == {f"{at:03d}.tar: {at + 5:04d}" for at in range(0, COUNT, SHARD)}
    assert json.loads((out / "report.json").read_text()) == report
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width > 8 * 96 and sheet.height > 2 * 96


def test_what_is_written(prepared, rows):
    out, _ = prepared
    for parts in records_of(out).values():
        columns = json.loads(parts["json"])
        row = rows[int(columns["key"])]
        assert parts["txt"].decode() == row["text"] == columns["caption"] == columns["read"]
        assert columns["NSFW"] == "UNLIKELY" and columns["pwatermark"] == row["pwatermark"]
        size = np.array(Image.open(io.BytesIO(parts["jpg"])).size[::-1])
        bucket = np.array([columns["bucket_height"], columns["bucket_width"]])
        # It covers its size, and no more; all of these were larger
        assert (size >= bucket).all() and (size == bucket).any()
        assert [columns["height"], columns["width"]] == size.tolist()
        assert [columns["original_height"], columns["original_width"]] == [48 + 16 * (int(columns["key"]) % 3), 64]
        assert columns["digest"] == hashlib.blake2b(row["data"], digest_size=8).hexdigest()


def test_original_bytes_stay(tars, rows, tmp_path):
    run(tars, tmp_path / "out", Settings(sizes=Sizes(128, 16, shrink=True), exact=False), None)
    found = {json.loads(parts["json"])["key"]: parts["jpg"] for parts in records_of(tmp_path / "out").values()}
    assert found == {row["key"]: row["data"] for i, row in enumerate(rows) if i % SHARD != 5}


@pytest.mark.parametrize("form", [form for form in FORMS if form != "tars"])
def test_every_form_gives_the_same_shards(prepared, rows, tmp_path, form):
    out, report = prepared
    FORMS[form](tmp_path / form, rows)
    found = run(tmp_path / form, tmp_path / "out")
    tars_of = lambda out: {name: file for name, file in files_of(out).items() if name.endswith(".tar")}  # noqa: E731
    assert tars_of(tmp_path / "out") == tars_of(out)
    same = set(report) - {"bad_names"}
    assert {name: found[name] for name in same} == {name: report[name] for name in same}


def test_processes_decode_alike_and_import_no_jax(prepared, rows, tars, tmp_path):
    # CLIP's own preprocessing: test modules cannot be imported by name in another process
    scorer = Scorer("brightness", brightness, functools.partial(square, size=4))
    run(tars, tmp_path / "here", scorer=scorer)
    run(tars, tmp_path / "there", scorer=scorer, workers=2)
    assert files_of(tmp_path / "here") == files_of(tmp_path / "there")
    stage = functools.partial(stages.look, preprocess=scorer.preprocess, sizes=SETTINGS.sizes)
    record = shards.Record(0, "a", rows[0]["data"], (), {})
    with preparation._looking(1) as look:
        ((_, (seen,)),) = look([[record]], stage)
        assert seen.inputs.shape == (4, 4, 3)
        pool = look.args[0]
        assert pool.submit(eval, "'jax' in __import__('sys').modules").result() is False


class Killed(BaseException):
    pass


@pytest.mark.parametrize("calls", [1, 4, 7])
def test_killed_and_resumed_equals_undisturbed(prepared, tars, tmp_path, calls):
    left = [calls]

    def dies(columns):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return brightness(columns)

    with pytest.raises(Killed):
        run(tars, tmp_path / "out", scorer=Scorer("brightness", dies, SCORER.preprocess))
    # What a machine that lost its power leaves besides
    (tmp_path / "out" / ".00001.tar.partial-99").write_bytes(b"half")
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    run(tars, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(prepared[0])
    finished = {name: time for name, time in done.items() if name != "00002.tar"}  # that one loses its double
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in finished} == finished
    before = files_of(tmp_path / "out")
    run(tars, tmp_path / "out", scorer=Scorer("brightness", dies, SCORER.preprocess))  # nothing is scored again
    assert files_of(tmp_path / "out") == before


def test_killed_while_doubles_are_taken_out(prepared, tars, tmp_path):
    out = tmp_path / "out"
    run(tars, out, Settings(**{**vars(SETTINGS), "exact": False}))
    told = json.loads((out / "prepare.json").read_text())
    (out / "prepare.json").write_text(preparation._json({**told, "exact": True}) + "\n")
    # The shard was written again, what says so was not
    shards.rewrite(out / "00002.tar", out / "new", json.loads((prepared[0] / "00002_duplicates.json").read_text()))
    (out / "new").rename(out / "00002.tar")
    run(tars, out)
    assert files_of(out) == files_of(prepared[0])


def test_shards_are_shared(prepared, tars, tmp_path):
    assert run(tars, tmp_path / "out", shard_index=1, num_shards=2) is None
    assert [path.name for path in sorted((tmp_path / "out").glob("*.tar"))] == ["00001.tar"]
    assert run(tars, tmp_path / "out", shard_index=0, num_shards=2)["shards"] == 3
    assert files_of(tmp_path / "out") == files_of(prepared[0])
    with pytest.raises(ValueError, match="--shard_index=2"):
        run(tars, tmp_path / "out", shard_index=2, num_shards=2)


@pytest.mark.parametrize("ruin", ["cut", "overwritten", "no tar"])
def test_a_damaged_tar_is_named_and_the_run_goes_on(rows, tmp_path, caplog, ruin):
    as_tars(tmp_path / "in", rows)
    path = tmp_path / "in" / "008.tar"
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        fourth = [member.offset for member in tar][9]  # the first member of the fourth record
    data = {
        "cut": data[: fourth + 700],
        "overwritten": data[:fourth] + b"\xff" * 1024 + data[fourth + 1024 :],
        "no tar": b"<html>not found</html>" * 100,
    }[ruin]
    path.write_bytes(data)
    report = run(tmp_path / "in", tmp_path / "out", Settings(exact=False), None)
    assert len(report["damaged"]) == 1 and str(path) in report["damaged"][0] and str(path) in caplog.text
    keys = [int(json.loads(parts["json"])["key"]) for parts in records_of(tmp_path / "out").values()]
    # The third is not used: whether it was whole is not known
    assert [key for key in keys if 8 <= key < 16] == ([] if ruin == "no tar" else [8, 9])
    assert len([key for key in keys if not 8 <= key < 16]) == 14


def test_damaged_parquet(rows, tmp_path):
    as_parquet(tmp_path / "in", rows)
    path = tmp_path / "in" / "008.parquet"
    path.write_bytes(path.read_bytes()[:-50])
    report = run(tmp_path / "in", tmp_path / "out", Settings(exact=False), None)
    assert len(report["damaged"]) == 1 and str(path) in report["damaged"][0] and report["kept"] == 14


def test_near_doubles(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(6):
        (tmp_path / "in" / f"{i}.jpg").write_bytes(picture(i, 96, 128))
        again = Image.open(io.BytesIO(picture(i, 96, 128))).resize((100, 75))
        again.save(tmp_path / "in" / f"{i}_again.jpg", quality=80)
    out = tmp_path / "out"
    report = preparation.prepare(shards.find([str(tmp_path / "in")], 5), out, Settings(distance=5))
    assert report["duplicates"] == {"exact": 0, "near": 6} and report["kept"] == 6
    assert [json.loads(parts["json"])["key"] for parts in records_of(out).values()] == list("012345")


def test_other_settings_or_other_shards_are_refused(prepared, tars, tmp_path):
    run(tars, tmp_path / "out")
    with pytest.raises(DataError, match=r"prepared with other settings: scorer \(brightness then,  now\)"):
        run(tars, tmp_path / "out", scorer=None)
    with pytest.raises(DataError, match="is of 000.tar, not of 008.tar"):
        run(tars / "0[01][86].tar", tmp_path / "out")
    (tmp_path / "out" / "prepare.json").unlink()
    with pytest.raises(DataError, match="prepare.json is gone"):
        run(tars, tmp_path / "out")


def test_a_shard_that_changed_is_prepared_again(rows, tmp_path):
    as_tars(tmp_path / "in", rows)
    first = run(tmp_path / "in", tmp_path / "out", Settings(exact=False), None)
    write_tar(tmp_path / "in" / "016.tar", rows[:4])
    second = run(tmp_path / "in", tmp_path / "out", Settings(exact=False), None)
    assert second["records"] == first["records"] - 4 and second["kept"] == first["kept"] - 3


@pytest.mark.parametrize("pattern", ["", "*.tar"])
def test_training_reads_what_comes_out(config, prepared, rows, pattern, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    out, report = prepared
    config.data.path = str(out / pattern)
    source = open_source(config)
    assert len(source) == report["kept"]
    kept = [json.loads(parts["json"])["key"] for parts in records_of(out).values()]
    assert [source.fields(i) for i in range(len(source))] == [((f"picture {int(key)}",),) for key in kept]
    assert source[0]["pixels"].shape[2] == 3


def test_nothing_kept_leaves_no_tar(tars, tmp_path):
    report = run(tars, tmp_path / "out", Settings(filters=filters.resolve({"resolution": 4096})), None)
    assert report["kept"] == 0 and not list((tmp_path / "out").glob("*.tar"))
    assert report["filters"]["resolution"]["dropped_first"] == 21


@pytest.mark.parametrize(
    ("columns", "wanted", "expected"),
    [
        ({"txt": "a\n", "caption": "b"}, "text", ("b",)),
        ({"txt": "a\n"}, "text", ("a",)),
        ({"text": ["a", "b"]}, "text", ("a", "b")),
        ({"blip": "c", "txt": "a"}, "blip,txt", ("c", "a")),
        ({"blip": "c"}, "text", ()),
    ],
)
def test_captions_are_taken_out_of_the_columns(columns, wanted, expected):
    assert shards._take_caption(columns, wanted) == expected
    assert "caption" not in columns and (wanted not in columns)


def test_several_paths_and_tables_beside_tars(rows, tmp_path):
    as_tars(tmp_path / "b", rows)
    (tmp_path / "b" / "000.parquet").write_bytes(b"what img2dataset tells of 000.tar")
    as_parquet(tmp_path / "a", rows)
    found = shards.find([str(tmp_path / "b"), str(tmp_path / "a" / "*.parquet")], SHARD)
    assert [shard.kind for shard in found] == ["tar"] * 3 + ["parquet"] * 3
    report = preparation.prepare(found, tmp_path / "out", Settings())
    assert report["records"] == 2 * COUNT and report["duplicates"]["exact"] == 1 + 21


def test_what_is_no_number_is_left_out():
    assert shards._plain({"punsafe": float("nan"), "a": [1.5, None]}) == {"a": [1.5, None]}


def test_paths_that_hold_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tars, parquet files, pictures"):
        shards.find([str(tmp_path / "*.tar")], 10)
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(DataError, match="a.zip is neither a .tar nor a .parquet"):
        shards.find([str(tmp_path / "a.*")], 10)
    (tmp_path / "a.jpg").write_bytes(picture(0))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.jpg"}\n')
    with pytest.raises(DataError, match="metadata.jsonl is not read here"):
        shards.find([str(tmp_path)], 10)


def test_a_scorer_that_forgets_some(tars, tmp_path):
    with pytest.raises(DataError, match="the scorer few gave no 3 values of 'aesthetic'"):
        run(tars, tmp_path / "out", scorer=Scorer("few", lambda columns: {"aesthetic": [1.0]}))
    assert stages.score(None, {}, []) == {}
