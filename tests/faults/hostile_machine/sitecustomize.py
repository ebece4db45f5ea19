"""Python runs this at its start where its folder is on PYTHONPATH: a slow disk and a clock that jumps, on demand.

The folder named by GRAIL_HOSTILE holds `slow`, the seconds that every write to disk takes longer, and `clock`, the
seconds by which the clock is wrong; either may come, change and go at any moment. What C++ code does is not touched.
"""

import os
import time

_FOLDER = os.environ.get("GRAIL_HOSTILE")
_LOOK_S = 0.05
_known: dict[str, tuple[float, float]] = {}
_clock, _clock_ns, _fsync, _replace = time.time, time.time_ns, os.fsync, os.replace


def _number(name: str) -> float:
    value, looked_at = _known.get(name, (0.0, -1.0))
    if time.monotonic() - looked_at > _LOOK_S:
        try:
            with open(f"{_FOLDER}/{name}") as file:
                value = float(file.read() or 0)
        except OSError:
            value = 0.0
        _known[name] = (value, time.monotonic())
    return value


def _slow(operation):
    def slowly(*arguments, **options):
        time.sleep(_number("slow"))
        return operation(*arguments, **options)

    return slowly


if _FOLDER:
    time.time = lambda: _clock() + _number("clock")
    time.time_ns = lambda: _clock_ns() + int(_number("clock") * 1e9)
    os.fsync, os.replace = _slow(_fsync), _slow(_replace)
