"""Files and folders appear whole or not at all: they are written aside, then renamed."""

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def aside(target: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """Yields a path beside `target` at which the block writes a file or a folder; afterwards it is renamed to `target`.

    Nothing that was there is lost: an existing target (but for an empty folder) raises FileExistsError before anything
    is written, and with `overwrite` it goes only once the new one is complete. A failure leaves no trace; a failed
    write (a full disk) raises OSError naming the target.
    """
    target = Path(os.path.abspath(target))
    if _occupied(target) and not overwrite:
        raise FileExistsError(f"{target} already exists and is left as it is: choose another path or remove it first")
    work = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(work)
        yield work
        _replace(work, target)
    except OSError as error:
        remove_unfinished(work)
        if error.errno == errno.ENOENT:  # something that the block wanted to read
            raise
        raise OSError(error.errno, f"could not write: {error.strerror or error}", str(target)) from error
    except BaseException:
        remove_unfinished(work)
        raise


def remove_unfinished(path: Path, quiet: float = 0.2, at_most: float = 5.0) -> None:
    """Removes what a failed write left, until it has stayed away for `quiet` seconds.

    Orbax's threads do not stop where one of them fails: what the others have begun appears a moment later.
    """
    start = seen = time.monotonic()
    while (now := time.monotonic()) < min(start + at_most, seen + quiet):
        if os.path.lexists(path):
            _remove(path)
            seen = now
        time.sleep(quiet / 20)


def _occupied(path: Path) -> bool:
    return os.path.lexists(path) and not (path.is_dir() and not path.is_symlink() and not any(path.iterdir()))


def _replace(work: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if _occupied(target) and (target.is_dir() or work.is_dir()):  # a rename replaces files and empty folders only
        os.rename(target, old)
        try:
            os.rename(work, target)
        except OSError:
            os.rename(old, target)
            raise
        _remove(old)
    else:
        os.replace(work, target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
