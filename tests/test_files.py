"""Files that appear whole or not at all."""

import threading

import pytest

from simqat_jax.files import atomic_file, import_extra


def test_a_file_takes_its_name_once_it_is_whole(tmp_path):
    path = tmp_path / "model"
    path.write_bytes(b"old")
    with atomic_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
        (part,) = (p for p in tmp_path.iterdir() if p != path)
        assert part.read_bytes() == b"new"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_threads_that_write_under_one_name(tmp_path):
    """All of them are in the middle of their files at the same time."""
    path, threads = tmp_path / "model", 8
    halfway = threading.Barrier(threads, timeout=30)
    failures = []

    def write(number):
        try:
            with atomic_file(path) as file:
                file.write(bytes([number]) * 1000)
                file.flush()
                halfway.wait()
                file.write(bytes([number]) * 1000)
        except BaseException as error:
            failures.append(error)

    writers = [threading.Thread(target=write, args=(n,)) for n in range(threads)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not failures
    content = path.read_bytes()
    assert content in {bytes([n]) * 2000 for n in range(threads)}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
@pytest.mark.parametrize("before", [None, b"old"])
def test_interrupted_writing_leaves_what_was_there(error, before, tmp_path):
    path = tmp_path / "model"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(error), atomic_file(path) as file:
        file.write(b"new")
        raise error
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == (
        {} if before is None else {path: before}
    )


def test_a_directory_as_target(tmp_path):
    with pytest.raises(IsADirectoryError, match="Give the name of a file"), atomic_file(tmp_path):
        pytest.fail("there is nothing to write to")
    assert not list(tmp_path.iterdir())


def test_a_missing_directory(tmp_path):
    path = tmp_path / "missing" / "model"
    with pytest.raises(FileNotFoundError, match=r"no directory .*missing"), atomic_file(path):
        pytest.fail("there is nowhere to write to")
    assert not list(tmp_path.iterdir())


def test_a_package_of_the_extra_that_is_not_installed():
    assert import_extra("json").__name__ == "json"
    with pytest.raises(ImportError, match=r"needs no_such_package.*simqat-jax\[export\]"):
        import_extra("no_such_package")
