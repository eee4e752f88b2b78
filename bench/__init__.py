"""Benchmarks: what failback costs, side by side with what administrators use today. See README.md beside this file."""
