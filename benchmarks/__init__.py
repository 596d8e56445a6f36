"""Speed and memory, measured against peers from PyPI in the same run: `python -m benchmarks`."""
