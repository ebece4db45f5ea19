"""How far a long pass over users is, told now and then."""

import logging
import time
from collections.abc import Iterator, Sequence

from cluster.logs import duration
from data_streams.canonical import Piece

logger = logging.getLogger(__name__)

_EVERY_S = 10.0


def told(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """The pieces, with a line every ten seconds: users passed, how many a second, and the time left.

    A piece counts as passed when the next one is asked for.
    """
    total, done = sum(piece.num_users for piece in pieces), 0
    begun = last = time.monotonic()
    for piece in pieces:
        yield piece
        done += piece.num_users
        now = time.monotonic()
        if now - last > _EVERY_S and done < total:
            last, rate = now, done / (now - begun)
            left = duration((total - done) / rate)
            logger.info(
                "%s of %s users of this worker, %.0f users/s, %s left", f"{done:,}", f"{total:,}", rate, left
            )
