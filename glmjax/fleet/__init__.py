"""Several workers on one machine, and the gateway before them: processes that are begun, kept running and ended in order.

`fleet` is the whole of it, `replica` one worker, `gateway` the one HTTP server, `child` a process. Only
`glmjax.serve` imports it; it imports `glmjax.worker`.
"""
