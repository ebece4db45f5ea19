import logging

import pytest
import torch

from models.kernels import triton

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def anew():
    triton._can_compile.cache_clear()
    yield
    triton._can_compile.cache_clear()


def test_without_a_compiler_kernels_are_left_for_padded_attention_and_that_is_said_once(monkeypatch, caplog):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(triton.shutil, "which", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert not triton.is_available(CUDA)
        assert not triton.is_available(CUDA)
    assert [
        record.getMessage().startswith("missing: a C compiler (gcc or clang") for record in caplog.records
    ] == [True]
    triton.load_kernels(CUDA)


def test_processors_have_no_kernels_and_nothing_is_said(monkeypatch, caplog):
    monkeypatch.setattr(triton, "find_spec", lambda name: None)
    assert not triton.is_available(torch.device("cpu"))
    assert not caplog.records


def test_with_all_that_triton_needs_kernels_are_there(monkeypatch, tmp_path):
    monkeypatch.setattr(triton, "find_spec", lambda name: name)
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(triton.sysconfig, "get_paths", lambda: {"include": tmp_path})
    assert not triton.is_available(CUDA)
    (tmp_path / "Python.h").touch()
    triton._can_compile.cache_clear()
    assert triton.is_available(CUDA)
