from sd_jax.data import fingerprints

SOURCE = '''"""A module."""

def double(x):
    """Twice."""
    return 2 * x  # exact
'''


def test_code_is_what_it_does():
    code = fingerprints._code(SOURCE)
    assert fingerprints._code(SOURCE.replace("Twice", "Two times").replace("  # exact", "")) == code
    assert fingerprints._code(SOURCE.replace("2 *", "3 *")) != code
    assert fingerprints.code_of("data/shapes.py") != fingerprints.code_of("data/shapes.py", "data/loader.py")


def test_files_are_their_names_sizes_and_times(tmp_path):
    path = tmp_path / "a.png"
    missing = fingerprints.of_files([path])
    path.write_bytes(b"1")
    there = fingerprints.of_files([path])
    path.write_bytes(b"12")
    assert len({missing, there, fingerprints.of_files([path])}) == 3
