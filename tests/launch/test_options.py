"""How options are written on the command line."""

from dataclasses import dataclass, field

import pytest

from launch.options import parse
from trainer.configuration import SearchConfig


@dataclass(frozen=True)
class Form:
    search: SearchConfig = field(default_factory=SearchConfig)
    path: str = ""


@pytest.mark.parametrize("given", [["50,100,200"], ["50", "100", "200"]])
def test_lists_of_numbers_may_have_commas(given):
    form = parse(Form, ["--search.prm", "--search.candidates", *given, "--path", "a,b"], program="x")
    assert form.search.candidates == (50, 100, 200)
    assert form.path == "a,b"
