"""The parts of `benchmarks.compare_hf`: Hugging Face's side, ours, and what is told of both."""
