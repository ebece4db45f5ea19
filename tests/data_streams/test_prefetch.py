"""Reading ahead: same items, same errors, and no thread left behind."""

import threading
import time

import pytest

from cluster.errors import DataError
from data_streams.prefetch import prefetched


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_items_come_in_order_and_the_thread_ends():
    assert list(prefetched(iter(range(100)), 3)) == list(range(100))
    assert list(prefetched(iter(()), 3)) == []
    assert not prefetch_threads()


def test_an_error_comes_at_its_place_with_its_type():
    def failing():
        yield 1
        yield 2
        raise DataError("chunk 3 is bad")

    items = prefetched(failing(), 4)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(DataError, match="chunk 3 is bad"):
        next(items)
    assert not prefetch_threads()


def test_no_more_than_depth_items_are_made_ahead():
    made = []

    def source():
        for number in range(100):
            made.append(number)
            yield number

    items = prefetched(source(), 3)
    next(items)
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 4
    items.close()
    assert not prefetch_threads()


def test_an_abandoned_prefetch_ends_its_thread():
    items = prefetched(iter(range(10**9)), 2)
    next(items)
    assert len(prefetch_threads()) == 1
    del items
    assert not prefetch_threads()


def test_items_are_made_while_the_consumer_works():
    barrier = threading.Barrier(2, timeout=5)

    def source():
        yield "first"
        barrier.wait()
        yield "second"

    items = prefetched(source(), 1)
    next(items)
    barrier.wait()
    assert next(items) == "second"
