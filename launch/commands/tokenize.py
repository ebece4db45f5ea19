"""Give every item a semantic ID: grail tokenize TOKENIZER --data DIR --out DIR [options]"""

from dataclasses import make_dataclass
from pathlib import Path
from typing import Annotated

from cluster.errors import ConfigError
from cluster.plugins import first_line, plugin_config, plugin_files, suggestion
from launch.options import parse, split_name
from launch.progress import start_console
from launch.semantic_id_tables import TokenizeOptions, make_table

TOKENIZERS = "models.tokenizers"


def run(arguments: list[str]) -> int:
    name, options = split_name(arguments)
    tokenizers = tokenizer_files()
    if name is None and {"-h", "--help"} & set(options):
        print("usage: grail tokenize TOKENIZER --data DIR --out DIR [options]\n\ntokenizers:")
        for tokenizer, path in tokenizers.items():
            print(f"  {tokenizer:18}{first_line(path)}")
        print("\nAll options of a tokenizer: grail tokenize TOKENIZER --help")
        print("Also: grail tokenize add | import | report | tree")
        return 0
    if name is None or name not in tokenizers:
        raise ConfigError(
            f"grail tokenize needs a tokenizer in front of the options, got '{name or ''}'"
            f"{suggestion(name or '', tokenizers)}"
        )
    config, chosen = _parse(name, options)
    start_console()
    make_table(config, chosen)
    return 0


def tokenizer_files() -> dict[str, Path]:
    """Files that tokenizers share have no Config of their own."""
    return {
        name: path for name, path in plugin_files(TOKENIZERS).items() if "class Config" in path.read_text()
    }


def _parse(name: str, options: list[str]) -> tuple:
    """The options of a tokenizer and of the command together."""
    import tyro

    flat = tyro.conf.arg(name="")
    form = make_dataclass(
        "Options",
        [
            ("tokenizer", Annotated[plugin_config(TOKENIZERS, name), flat]),
            ("table", Annotated[TokenizeOptions, flat]),
        ],
        frozen=True,
        kw_only=True,
    )
    parsed = parse(form, options, program=f"grail tokenize {name}")
    return parsed.tokenizer, parsed.table
