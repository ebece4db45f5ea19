"""Comparisons of quality by whole runs; each is a command that writes a table, see docs/results.md."""
