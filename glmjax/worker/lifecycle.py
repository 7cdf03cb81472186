"""A worker's life: the port is open at once, requests are taken once everything is compiled, and it leaves in good order."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator

import grpc
import jax
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from smg_grpc_proto import vllm_engine_pb2_grpc

from glmjax.kept_programs import compilation_cache
from glmjax.serving.engine import Engine
from glmjax.worker.arguments import Arguments
from glmjax.worker.batch_log import BatchLog
from glmjax.worker.decoding import Decoding
from glmjax.worker.flight_files import FlightFiles
from glmjax.worker.protocol import SERVICE
from glmjax.worker.security import Bearer, credentials
from glmjax.worker.service import Service
from glmjax.worker.threads import in_thread
from glmjax.worker.tracing import traces_to

_LOG = logging.getLogger(__name__)
_RECEIVED_BYTES, _SENT_BYTES = 16 << 20, 64 << 20
"""Most of a message: some million tokens; and a prompt's logprobs with their alternatives."""
_WATCH_SECONDS = 0.5
_GRACE_SECONDS = 2.0
"""For answers on their way, once nothing is under way any more."""
_LAST_STEP_SECONDS = 10.0
"""For the step that the engine is in when it is closed."""
_OPTIONS = (
    ("grpc.max_receive_message_length", _RECEIVED_BYTES),
    ("grpc.max_send_message_length", _SENT_BYTES),
    ("grpc.keepalive_time_ms", 30_000),  # connections whose other end is gone are closed
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),  # a port that is taken is an error
)
_SERVING, _NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Worker:
    """One worker.

    Args:
        arguments: its flags.
        make_engine: what is served; it may take its time. Default what the flags say.
        told: is called with whether requests are taken, whenever that changes.

    Raises:
        ValueError: flags that cannot be followed here.

    Attributes:
        port: that it listens on, once it has started.
        service: its calls.
    """

    def __init__(
        self,
        arguments: Arguments,
        make_engine: Callable[[], Engine] | None = None,
        told: Callable[[bool], None] = lambda serving: None,
    ):
        self._arguments, self._make_engine = arguments, make_engine or (lambda: engine_of(arguments))
        self._told = told
        self._traces = traces_to(arguments.otlp_traces_endpoint, arguments.card().served_model_name)
        self.service = Service(arguments.card(), arguments.stream_holdback, self._traces)
        guards = [Bearer(arguments.api_key)] if arguments.api_key else []
        self._server = grpc.aio.server(options=_OPTIONS, interceptors=[*guards, Decoding()])
        self._health = health.aio.HealthServicer()
        self._leaving = asyncio.Event()
        self._engine: Engine | None = None
        self._flights: FlightFiles | None = None
        self._close_metrics: Callable[[], None] = lambda: None
        self.port = 0

    async def run(self) -> int:
        """From the beginning to the end; the exit status: 0 after a signal, 1 where the engine has died or does not end.

        Raises:
            ValueError: the model cannot be served this way.
            OSError: the port is taken, or the model is not there.
        """
        began = time.monotonic()
        await self._listen()
        with self._signals():
            starting = in_thread(self._make_engine)
            leaving = asyncio.create_task(self._leaving.wait())
            await asyncio.wait([starting, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                _LOG.warning("leaving before everything is compiled")
                await self._server.stop(0)
                return 0
            try:
                self._engine = starting.result()
                if self._arguments.flight_recorder is not None:
                    self._flights = FlightFiles(self._engine, self._arguments.flight_recorder)
                self.service.serve(self._engine)
                await self._health.set(SERVICE, _SERVING)
                self._told(True)
                _LOG.info("ready after %.1f s", time.monotonic() - began)
                watching = asyncio.create_task(self._watch())
                await asyncio.wait([leaving, watching], return_when=asyncio.FIRST_COMPLETED)
                if watching.done():
                    return await self._die(watching.result())
                watching.cancel()
            except BaseException:
                await self._server.stop(0)
                raise
            return await self._drain()

    def leave(self) -> None:
        """Begin to drain."""
        self._leaving.set()

    async def _watch(self) -> str:
        """Why the engine cannot go on, once it cannot."""
        timeout, looking = self._arguments.watchdog_timeout, None
        while self._engine.alive:
            if self._engine.stalled_seconds > timeout:
                return f"a step of the engine has not ended after --watchdog-timeout {timeout:.0f} s"
            if self._flights is not None and (looking is None or looking.done()):
                looking = in_thread(self._flights.look)  # asks the engine's thread, so it is not waited for
            await asyncio.sleep(min(_WATCH_SECONDS, timeout))
        return "the engine's thread has ended"

    async def _die(self, reason: str) -> int:
        """Say why, and leave at once: who has requests here sends them elsewhere."""
        _LOG.critical("%s; leaving", reason)
        faulthandler.dump_traceback(all_threads=True)
        self._told(False)
        self.service.refuse("failed")
        await self._health.enter_graceful_shutdown()
        await self._server.stop(0)
        await asyncio.to_thread(self._close_metrics)
        return 1

    async def _listen(self) -> None:
        vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(self.service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        await self._health.set("", _SERVING)
        await self._health.set(SERVICE, _NOT_SERVING)
        address = f"{self._arguments.host}:{self._arguments.port}"
        files = self._arguments
        secure = credentials(files.ssl_certfile, files.ssl_keyfile, files.ssl_ca_certs)
        try:
            add = self._server.add_insecure_port if secure is None else self._server.add_secure_port
            self.port = add(address, *(() if secure is None else (secure,)))
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: {error}; give another --host or --port") from error
        await self._server.start()
        if self._arguments.enable_metrics:
            host = self._arguments.metrics_host or self._arguments.host
            self._close_metrics = self.service.metrics.serve(self._arguments.metrics_port, host)
        _LOG.info("listening on %s:%d", self._arguments.host, self.port)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # which alone can have any
            yield
            return
        loop, names = asyncio.get_running_loop(), (signal.SIGTERM, signal.SIGINT)

        def asked() -> None:
            if self._leaving.is_set():
                _LOG.warning("a second signal: leaving at once")
                for name in names:
                    loop.remove_signal_handler(name)
                signal.raise_signal(signal.SIGTERM)
            self.leave()

        def record() -> None:
            if self._flights is None:
                _LOG.warning("SIGUSR1: nothing is recorded before it is ready, or without --flight-recorder")
            else:
                in_thread(lambda: self._flights.write("asked"))

        for name in names:
            loop.add_signal_handler(name, asked)
        loop.add_signal_handler(signal.SIGUSR1, record)
        yield
        for name in (*names, signal.SIGUSR1):
            loop.remove_signal_handler(name)

    async def _drain(self) -> int:
        """No new requests; those under way may end; then everything is closed. The exit status."""
        self._told(False)
        self.service.refuse("draining")
        await self._health.enter_graceful_shutdown()
        count, seconds = len(self.service.live), self._arguments.drain_seconds
        _LOG.info("draining: %d requests under way, %.0f s for them", count, seconds)
        if not await self.service.live.idle(seconds):
            _LOG.warning("%d requests are not finished; they fail", len(self.service.live))
        closing = in_thread(self._engine.close)
        await asyncio.wait([closing], timeout=_LAST_STEP_SECONDS)
        if not closing.done():
            return await self._die(f"a step of the engine has not ended after {_LAST_STEP_SECONDS:.0f} s")
        closing.result()
        await self._server.stop(_GRACE_SECONDS)
        await asyncio.to_thread(self._close_metrics)
        await asyncio.to_thread(self._traces.close)
        _LOG.info("closed")
        return 0


def run(arguments: Arguments) -> int:
    """Serve until a signal comes; the exit status.

    Args:
        arguments: of the worker.

    Raises:
        ValueError: the model cannot be served this way.
        OSError: the port is taken, or the model is not there.
    """

    async def main() -> int:
        return await Worker(arguments).run()

    return asyncio.run(main())


def engine_of(arguments: Arguments) -> Engine:
    """The engine that flags ask for; loads and compiles.

    Args:
        arguments: of the worker.

    Raises:
        ValueError: it cannot be served this way.
        OSError: the model is not there.
    """
    folder = compilation_cache(arguments.compilation_cache)
    began = time.monotonic()
    glm = arguments.model()
    loaded = time.monotonic()
    config = arguments.engine(glm, jax.default_backend() == "gpu")
    engine = Engine(glm, config, progress=True, observer=BatchLog(arguments.decode_log_interval))
    ready, memory = time.monotonic(), engine.memory()
    _LOG.info(
        "model: %s, loaded in %.1f s from %s", arguments.card().served_model_name, loaded - began, arguments.model_path
    )
    _LOG.info(
        "memory: %.1f MB of weights, %.1f of cache, up to %.1f while a program runs",
        memory.weights / 1e6,
        memory.cache / 1e6,
        memory.temporaries / 1e6,
    )
    _LOG.info(
        "cache: %d pages of %d rows, sequences of up to %d tokens, %d at once, %d drafts a round",
        engine.pages,
        config.page_size,
        engine.max_model_len,
        config.max_num_seqs,
        config.num_draft,
    )
    _LOG.info("buckets: %s", engine.shapes)
    _LOG.info("programs: %d in %.1f s, kept in %s", engine.stats().programs, ready - loaded, folder)
    return engine
