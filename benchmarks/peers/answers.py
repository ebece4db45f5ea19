"""How a peer answers: one JSON line for each question, where nothing else is written.

Packages of peers print what they like while they are imported, so answers have a pipe of their own.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

ANSWERS = "GRAIL_PEER_ANSWERS"
"""Environment variable with the number of the pipe; without it answers go to standard output."""


def answer_questions(answer: Callable[..., dict[str, Any]]) -> None:
    """Until the input is closed."""
    with os.fdopen(int(os.environ.get(ANSWERS, sys.stdout.fileno())), "w") as answers:
        for line in sys.stdin:
            print(json.dumps(answer(**json.loads(line))), file=answers, flush=True)
