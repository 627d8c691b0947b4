"""Seeded checkpoints in the layout of the Hub, for tests and benchmarks: nothing has to be downloaded."""
