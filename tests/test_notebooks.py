"""Every notebook runs from top to bottom."""

import pathlib

import pytest

# The story trains a dozen models: with four steps each it takes some minutes, which its compilations do. Of those that
# fine-tune one is enough: they are built alike, and tests/training tries what they do
SLOW = ("story", "dreambooth", "hypernetwork", "lcm_lora", "lora")
NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=pytest.mark.slow if path.stem in SLOW else ()) for path in NOTEBOOKS],
)
def test_notebook_runs(path, monkeypatch, tmp_path):
    import nbclient
    import nbformat

    monkeypatch.setenv("SD_JAX_STORY_FAST", "1")
    monkeypatch.setenv("SD_JAX_STEPS", "4")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parents[1])}})
    client.execute()
    pictures = [o for c in notebook.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert pictures
