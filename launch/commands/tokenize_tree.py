"""Build the tree of a tree index: grail tokenize tree --data DIR --out DIR [--from-run RUN --how cluster|joint]"""

from launch.options import parse
from launch.progress import start_console
from launch.tree_tables import TreeOptions, make_tree


def run(arguments: list[str]) -> int:
    options = parse(TreeOptions, arguments, program="grail tokenize tree")
    start_console()
    make_tree(options)
    return 0
