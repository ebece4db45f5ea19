import pytest

from cluster.storage import Storage


@pytest.fixture(params=["local", "memory"])
def storage(request, tmp_path) -> Storage:
    """A folder on disk and an object store."""
    return Storage(tmp_path if request.param == "local" else f"memory://{tmp_path}")


def test_a_file_written_in_parts_is_there_as_a_whole(storage):
    with storage.open_write("folder/big.bin") as file:
        file.write(b"abc")
        file.write(memoryview(b"defg"))
        if storage.is_local:
            assert not storage.exists("folder/big.bin")
    assert storage.read("folder/big.bin") == b"abcdefg" and storage.read("folder/big.bin", 2, 4) == b"cd"
    assert storage.list("folder") == ["big.bin"] and storage.size("folder/big.bin") == 7


def test_a_write_that_fails_leaves_nothing_of_it(storage):
    with pytest.raises(OSError, match="disk full"), storage.open_write("big.bin") as file:
        file.write(b"abc")
        raise OSError("disk full")
    assert storage.list() == []


def test_a_local_write_that_fails_keeps_the_file_of_before(tmp_path):
    storage = Storage(tmp_path)
    storage.write("state.json", b"old")
    with pytest.raises(OSError, match="disk full"), storage.open_write("state.json") as file:
        file.write(b"new")
        raise OSError("disk full")
    assert storage.read("state.json") == b"old" and storage.list() == ["state.json"]
