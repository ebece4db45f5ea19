"""The command `grail`: finds the command's file in launch/commands and runs it.

Nothing slow is imported before the command is known, so that help is instant.
"""

import difflib
import os
import select
import signal
import sys
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError, GrailError, ours
from cluster.plugins import first_line, load_plugin, plugin_files

COMMANDS = "launch.commands"


def main() -> None:
    """Entry point of the console command."""
    if {"-h", "--help"} & set(sys.argv):
        # `grail pretrain --help | head` ends in silence, as such a pipe does everywhere.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    # Commands that save at a SIGTERM take it for as long as they train.
    signal.signal(signal.SIGTERM, _end)
    sys.exit(run(sys.argv[1:]))


def _end(number: int, _: Any) -> None:
    """Leave as at an error, so that temporary files go; Ray, which takes the signal otherwise, would print a dump."""
    os.write(sys.stderr.fileno(), b"grail: ended by SIGTERM\n")
    sys.exit(128 + number)


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 wrong options, 75 stopped, resume me; 141 where
    nobody reads what it prints any more."""
    try:
        name, rest = find_command(arguments)
        if name is None:
            print(overview(rest))
            return 0
        code = load_plugin(COMMANDS, name).run(rest) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not _is_unread():
            raise
        return 128 + signal.SIGPIPE
    except (GrailError, OSError) as error:
        told = ours(error)
        if told is None:
            raise
        print(f"grail: {told}", file=sys.stderr)
        return 2 if isinstance(told, ConfigError) else 1
    except KeyboardInterrupt:
        print("grail: interrupted", file=sys.stderr)
        return 130


def _is_unread() -> bool:
    """Whether the reader of what is printed is gone, as `head` is once it has enough; then nothing more is printed."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    is_unread = any(event & select.POLLERR for _, event in poll.poll(0))
    if is_unread:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return is_unread


def find_command(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The command's file name and its own arguments; no name where help was asked for.

    Raises: ConfigError with the nearest valid command.
    """
    names = plugin_files(COMMANDS)
    words = [word for word in arguments[:2] if not word.startswith("-")]
    for count in (2, 1):
        if len(words) >= count and "-".join(words[:count]) in names:
            return "-".join(words[:count]), arguments[count:]
    if not words or (len(words) == 1 and any(name.startswith(f"{words[0]}-") for name in names)):
        return None, words
    asked = " ".join(words)
    spoken = [name.replace("-", " ") for name in names]
    near = difflib.get_close_matches(asked, spoken, n=1, cutoff=0.5) or difflib.get_close_matches(
        words[0], spoken, n=1, cutoff=0.5
    )
    nearest = f"; did you mean 'grail {near[0]}'?" if near else ""
    raise ConfigError(f"there is no command '{asked}'{nearest} (there are: {', '.join(spoken)})")


def overview(words: list[str]) -> str:
    """One line for each command, or for those that begin with the given word."""
    lines = [
        "grail: distributed training of generative recommenders",
        "",
        "usage: grail COMMAND [options]",
        "",
    ]
    files: dict[str, Path] = plugin_files(COMMANDS)
    chosen = {name: path for name, path in files.items() if not words or name.startswith(f"{words[0]}-")}
    width = max(len(name) for name in files) + 2
    lines += [f"  {name.replace('-', ' '):{width}}{first_line(path)}" for name, path in chosen.items()]
    return "\n".join([*lines, "", "Options of a command: grail COMMAND --help"])


if __name__ == "__main__":
    main()
