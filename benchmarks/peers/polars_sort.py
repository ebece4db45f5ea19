"""`python -m benchmarks.peers.polars_sort EVENTS OUT`: users in the order of time by plain polars, all in memory.

The shortest way to per-user histories with a stock library: no vocabulary, no split, no checksums, no shards that can
be read in part. It is a yardstick of speed, not of the same work.
"""

import sys

import polars as pl


def main(events: str, out: str) -> None:
    users = (
        pl.scan_parquet(events)
        .sort("user_id", "timestamp_s", maintain_order=True)
        .group_by("user_id", maintain_order=True)
        .agg(pl.all())
    )
    users.collect().write_parquet(out, compression="zstd")


if __name__ == "__main__":
    main(*sys.argv[1:])
