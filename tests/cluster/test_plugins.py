import sys

import pytest

from cluster.errors import ConfigError
from cluster.plugins import discover, first_line, load_plugin, plugin_files, suggestion


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "some_plugins"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "full_softmax.py").write_text('"""Softmax over all items.\n\nMore."""\nVALUE = 1\n')
    (folder / "sampled.py").write_text("VALUE = 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "some_plugins"
    for name in [name for name in sys.modules if name.startswith("some_plugins")]:
        del sys.modules[name]


def test_each_file_of_a_folder_is_a_plugin_named_in_kebab_case(package):
    plugins = discover(package)
    assert {name: module.VALUE for name, module in plugins.items()} == {"full-softmax": 1, "sampled": 2}


def test_plugins_are_listed_with_their_first_line_and_without_import(package):
    files = plugin_files(package)
    assert first_line(files["full-softmax"]) == "Softmax over all items."
    assert f"{package}.full_softmax" not in sys.modules


def test_an_unknown_plugin_is_answered_with_the_nearest_name(package):
    with pytest.raises(ConfigError, match="has no 'ful-softmax'; did you mean 'full-softmax'"):
        load_plugin(package, "ful-softmax")


def test_of_many_valid_names_the_nearest_and_the_first_are_told():
    told = suggestion("title 99x", [f"title {number:03}" for number in range(12_000)])
    assert told.startswith("; did you mean 'title ") and told.endswith("title 059 and 11940 more)")


def test_a_plugin_that_cannot_be_imported_names_its_file(package, tmp_path):
    (tmp_path / package / "broken.py").write_text("import a_module_that_is_not_there\n")
    with pytest.raises(
        ConfigError, match=r"'broken' cannot be imported from .*broken\.py.*a_module_that_is_not"
    ):
        load_plugin(package, "broken")
