"""Requests that no honest client sends: fuzzed, absurd, enormous, too many at once. Drawn by a seeded generator."""
