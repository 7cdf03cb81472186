"""The network: pure functions of (weights, tokens, cache)."""
