"""Benchmarks of `liar`: each module is run as `python -m benchmarks.NAME`; README.md says what they measure."""
