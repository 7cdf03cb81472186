"""What speed and memory cost: each module is run as `python -m benchmarks.<name>` and prints one table."""
