"""The gRPC worker: an engine behind the protocol of vLLM's, so that existing gateways and tools know how to use it.

Builds on `glmjax.serving`; `glmjax.serve` is its command line, and nothing else imports it.
"""
