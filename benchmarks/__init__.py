"""Benchmarks of speed and memory against a lower bound and other tools; `make bench` runs all of them."""
