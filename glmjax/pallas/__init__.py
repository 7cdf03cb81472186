"""The ops: a reference in XLA, a Mosaic GPU kernel beside it, one dispatch."""
