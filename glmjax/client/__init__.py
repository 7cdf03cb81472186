"""A client for notebooks, scripts and the terminal (``python -m glmjax.client``). Without JAX; nothing else imports it."""
