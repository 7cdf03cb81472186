"""What the benchmarks of workers share: workers and gateways that are served, requests for them, and who asks."""
