"""What sharing memory costs, measured side by side with what else one would use: `python -m benchmarks`."""
