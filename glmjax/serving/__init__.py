"""Requests over time: versioned pages, what is shared of them, and the engine that serves many requests at once."""
