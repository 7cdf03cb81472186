"""The Shepherd Model Gateway as a process, and the list of workers that it follows."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import ssl
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

from glmjax.fleet.child import Child
from glmjax.worker.arguments import Arguments

_LONGEST_WAIT, _ASKED_EVERY = 60.0, 0.2
"""Seconds that the gateway may take to notice who serves, and between questions about it."""

_LEVELS = {"debug": "debug", "info": "warn", "warning": "warn", "error": "error"}
"""Of our log to the gateway's, which has much to tell."""


class Gateway:
    """The gateway, from its beginning to its end.

    Args:
        arguments: of the workers.
        folder: for the file in which it finds them.

    Attributes:
        process: it runs in.
        url: by which it is reached from this machine.

    Raises:
        ValueError: it is not installed.
    """

    def __init__(self, arguments: Arguments, folder: Path):
        self._arguments, self._manifest = arguments, folder / "workers.json"
        host = "127.0.0.1" if arguments.host == "0.0.0.0" else arguments.host
        self.url = f"{'https' if arguments.ssl_certfile else 'http'}://{host}:{arguments.gateway_port}"
        self.send_to(())
        self.process = Child("glmjax-gateway", serve, command(arguments, self._manifest), heard=lambda message: None)

    def send_to(self, addresses: Iterable[str]) -> None:
        """Have it find these workers from now on, and no others; it looks whenever the file changes."""
        workers = [{"url": f"grpc://{address}"} for address in addresses]
        new = self._manifest.with_suffix(".new")
        new.write_text(json.dumps({"version": 1, "workers": workers}), encoding="utf-8")
        new.replace(self._manifest)

    async def sends_to(self, addresses: Iterable[str]) -> bool:
        """Wait until these are whom it sends requests to; whether it has come to that."""
        wanted, end = {f"grpc://{address}" for address in addresses}, time.monotonic() + _LONGEST_WAIT
        key, secure = self._arguments.api_key, None
        if self._arguments.ssl_certfile:  # who answers at this port of this machine has been started here
            secure = ssl.create_default_context()
            secure.check_hostname, secure.verify_mode = False, ssl.CERT_NONE
        while time.monotonic() < end:
            if await asyncio.to_thread(healthy_workers, self.url, key, secure) == wanted:
                return True
            await asyncio.sleep(_ASKED_EVERY)
        return False


def healthy_workers(url: str, key: str | None = None, secure: ssl.SSLContext | None = None) -> set[str]:
    """Workers that a gateway asks, in its own words; none where it does not answer.

    Args:
        url: of the gateway.
        key: that it asks for.
        secure: how its certificate is checked, where it has one.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(urljoin(url, "workers"), headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=5, context=secure) as told:
            return {worker["url"] for worker in json.load(told)["workers"] if worker["is_healthy"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def command(arguments: Arguments, manifest: Path) -> list[str]:
    """The gateway's command line.

    Args:
        arguments: of the workers.
        manifest: the file in which it finds them.

    Raises:
        ValueError: the gateway is not installed.
    """
    if importlib.util.find_spec("smg") is None:
        raise ValueError('--gateway needs the package smg; install it: pip install "glmjax[gateway]"')
    given = {
        "--host": arguments.host,
        "--port": arguments.gateway_port,
        "--discovery-provider": "file",
        "--discovery-file": manifest,
        "--model-path": arguments.card().tokenizer_path,
        "--reasoning-parser": "glm45",
        "--tool-call-parser": "glm47_moe",
        "--policy": "cache_aware",
        "--block-size": arguments.page_size,
        # A worker that has died is found out by the next request to it; the others take that over.
        "--health-check-interval-secs": 2,
        "--health-failure-threshold": 1,
        "--health-success-threshold": 1,
        "--cb-failure-threshold": 1000,  # a worker refuses while it drains or its queue is full: it is not broken
        "--worker-wedge-secs": 120,  # whoever does not stream is silent until the end
        "--shutdown-grace-period-secs": max(1, round(arguments.drain_seconds)),
        "--log-level": _LEVELS[arguments.log_level],
        # It always answers Prometheus; unasked, this machine alone.
        "--prometheus-host": (arguments.metrics_host or arguments.host) if arguments.enable_metrics else "127.0.0.1",
        "--prometheus-port": arguments.metrics_port + arguments.replicas,
        "--api-key": arguments.api_key,
        "--tls-cert-path": arguments.ssl_certfile,
        "--tls-key-path": arguments.ssl_keyfile,
    }
    return ["launch", *(str(word) for flag, value in given.items() if value is not None for word in (flag, value))]


def serve(say: Callable[[Any], None], words: list[str]) -> int:
    """Be the gateway, in a process of its own, until a signal comes.

    Args:
        say: to the parent.
        words: of the command line.
    """
    from smg.cli import main

    sys.argv = ["smg", *words]
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0
