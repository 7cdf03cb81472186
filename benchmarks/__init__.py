"""What speed and memory cost: each module beside this one is run as `python -m benchmarks.<name>` and prints one table."""
