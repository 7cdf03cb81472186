"""The worker's flags: SGLang's spellings where the thing is the same; defaults are those of the engine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

import tyro

from glmjax.glm import GLM, load
from glmjax.model.checkpoint import Fp8, LoadFormat
from glmjax.model.tokenizer import read_json
from glmjax.nano import NANO
from glmjax.serving.config import EngineConfig
from glmjax.worker.memory import fitting_pages
from glmjax.worker.service import ModelCard

_DEFAULTS = EngineConfig()
_SAMPLED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Serve a model over gRPC, by the protocol of vLLM's engine (vllm.grpc.engine.VllmEngine).

    The port is open at once; grpc.health.v1 answers NOT_SERVING for the service until its programs are compiled, and again
    once SIGTERM has come: then requests under way may end within --drain-seconds, and new ones are sent to other replicas.

    Attributes:
        model_path: directory of a checkpoint; default the model in the box.
        tokenizer_path: directory of tokenizer.json, where it is not beside the weights.
        served_model_name: by which clients ask for the model; default the directory's name.
        host: address to listen on; 0.0.0.0 for all.
        port: to listen on; 0 for any that is free, which the log tells.
        load_format: where weights come from; "dummy" makes random ones.
        dtype: of weights and activations; default float32 on CPU, bfloat16 elsewhere.
        kv_cache_dtype: of cached rows; default that of the model.
        fp8: keep an FP8 checkpoint's matrices as FP8, or dequantise them while loading.
        random_seed: of the weights that --load-format dummy makes.
        context_length: most tokens of a sequence, prompt and new ones; default the model's context.
        max_running_requests: sequences that decode at once.
        max_total_tokens: rows of the cache; default what --mem-fraction-static has room for, and on a CPU enough for as many
            sequences of half the length, and one of the whole.
        mem_fraction_static: share of the device's memory for the model and its cache; default 0.85 on a GPU.
        page_size: rows of a page: what is shared between requests, and granted, at a time.
        chunked_prefill_size: most prompt tokens of a dispatch, while which nobody decodes.
        max_queued_requests: that may wait; more are told to come again.
        speculative_num_draft_tokens: that the MTP layer drafts in a round, at most; fewer where that is faster. Default 3
            where the checkpoint has an MTP layer and a GPU runs it, else 0.
        disable_grammars: do without JSON schemas, regular expressions and grammars, and the programs for them.
        disable_radix_cache: share nothing between requests.
        hicache_size: gigabytes of the host's memory for pages that the cache lets go of.
        stream_holdback: tokens of a stream that are kept back, so that an anomaly among them is mended or retried unseen.
        drain_seconds: that requests under way have after SIGTERM.
        flight_recorder: folder for recordings of what was dispatched lately, for python -m glmjax.serving.replay: written
            where an output was garbled, and on SIGUSR1; with --replicas or --gateway each worker has a folder of its own in
            it. Default none: nothing is recorded.
        compilation_cache: folder that keeps compiled programs; default JAX_COMPILATION_CACHE_DIR or the user's cache.
        watchdog_timeout: seconds after which a step of the engine that does not end ends the worker.
        api_key: that calls must carry (authorization: Bearer API_KEY), probes aside; default GLMJAX_API_KEY, else none.
        ssl_certfile: PEM chain of the certificate, for TLS.
        ssl_keyfile: PEM of its private key.
        ssl_ca_certs: PEM of the CAs that clients' certificates must be from, for mutual TLS.
        decode_log_interval: dispatches of decoding in a line of the log.
        enable_metrics: answer Prometheus at http://HOST:METRICS_PORT/metrics.
        metrics_port: where; of several, worker i answers at METRICS_PORT + i, and the gateway at METRICS_PORT + REPLICAS.
        metrics_host: address for that; default --host.
        otlp_traces_endpoint: of an OpenTelemetry collector (http://localhost:4317), for spans of requests; default none.
        replicas: workers, each with an engine of its own, on ports from --port on; on GPUs each gets its share of them. One
            that ends is begun again; SIGHUP begins all of them anew, one after another.
        gateway: put the Shepherd Model Gateway before the workers: OpenAI's and Anthropic's HTTP at
            http://HOST:GATEWAY_PORT, which gets --api-key and the certificate, while workers listen to this machine alone.
        gateway_port: where.
        log_level: least of what is logged.
    """

    model_path: Path = NANO
    tokenizer_path: Path | None = None
    served_model_name: str | None = None
    host: str = "127.0.0.1"
    port: int = 50051
    load_format: LoadFormat = "auto"
    dtype: Literal["float32", "bfloat16"] | None = None
    kv_cache_dtype: Literal["float32", "bfloat16", "fp8"] | None = None
    fp8: Fp8 = "keep"
    random_seed: int = 0
    context_length: int | None = None
    max_running_requests: int = _DEFAULTS.max_num_seqs
    max_total_tokens: int | None = None
    mem_fraction_static: float | None = None
    page_size: int = _DEFAULTS.page_size
    chunked_prefill_size: int = _DEFAULTS.chunk_tokens
    max_queued_requests: int = _DEFAULTS.max_queued
    speculative_num_draft_tokens: int | None = None
    disable_grammars: tyro.conf.FlagCreatePairsOff[bool] = False
    disable_radix_cache: tyro.conf.FlagCreatePairsOff[bool] = False
    hicache_size: float = 0.0
    stream_holdback: int = 0
    drain_seconds: float = 30.0
    flight_recorder: Path | None = None
    compilation_cache: Path | None = None
    watchdog_timeout: float = 300.0
    api_key: str | None = None
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    ssl_ca_certs: Path | None = None
    decode_log_interval: int = 40
    enable_metrics: tyro.conf.FlagCreatePairsOff[bool] = False
    metrics_port: int = 9090
    metrics_host: str | None = None
    otlp_traces_endpoint: str | None = None
    replicas: int = 1
    gateway: tyro.conf.FlagCreatePairsOff[bool] = False
    gateway_port: int = 30000
    log_level: Annotated[Literal["debug", "info", "warning", "error"], tyro.conf.arg(metavar="LEVEL")] = "info"

    def __post_init__(self):
        if not 0 <= self.port < 2**16:
            raise ValueError(f"--port {self.port} is outside 0..65535; 50051 is usual")
        if self.replicas < 1:
            raise ValueError(f"--replicas {self.replicas} must be at least 1")
        if self.gateway and self.ssl_ca_certs is not None:
            raise ValueError("--ssl-ca-certs is given and the gateway asks nobody for a certificate; use --api-key")
        if self.stream_holdback < 0 or self.drain_seconds < 0 or self.hicache_size < 0:
            raise ValueError(
                f"--stream-holdback {self.stream_holdback}, --drain-seconds {self.drain_seconds} and --hicache-size "
                f"{self.hicache_size} must not be negative"
            )
        if self.mem_fraction_static is not None and not 0 < self.mem_fraction_static <= 1:
            raise ValueError(f"--mem-fraction-static {self.mem_fraction_static} is outside 0..1; 0.85 is usual")
        if self.mem_fraction_static is not None and self.max_total_tokens is not None:
            raise ValueError("--mem-fraction-static and --max-total-tokens both say how large the cache is; give one")
        if self.watchdog_timeout <= 0 or self.decode_log_interval < 1:
            raise ValueError(
                f"--watchdog-timeout {self.watchdog_timeout} and --decode-log-interval {self.decode_log_interval} must be "
                "positive"
            )
        if self.max_total_tokens is not None and self.max_total_tokens < self.page_size:
            raise ValueError(
                f"--max-total-tokens {self.max_total_tokens} is less than a page of {self.page_size}; raise it"
            )

    def card(self) -> ModelCard:
        """What the service tells of its model."""
        path = self.model_path.resolve()
        tokenizer = (self.tokenizer_path or path).resolve()
        return ModelCard(str(path), str(tokenizer), self.served_model_name or path.name, _sampling_defaults(path))

    def model(self) -> GLM:
        """The model, loaded.

        Raises:
            ValueError: it cannot be served.
            OSError: it is not there.
        """
        return load(
            self.model_path,
            dtype=self.dtype,
            load_format=self.load_format,
            fp8=self.fp8,
            seed=self.random_seed,
            kv_cache_dtype=self.kv_cache_dtype,
            tokenizer_path=self.tokenizer_path,
        )

    def engine(self, glm: GLM, on_gpu: bool) -> EngineConfig:
        """Of the engine.

        Args:
            glm: the model.
            on_gpu: whether a GPU runs it: there drafts pay, and the cache takes what memory is left.

        Raises:
            ValueError: the device has no room for it; says for what it has.
        """
        drafts = self.speculative_num_draft_tokens
        if drafts is None:
            drafts = 3 if on_gpu and glm.weights.mtp is not None else 0
        return EngineConfig(
            max_model_len=self.context_length,
            max_num_seqs=self.max_running_requests,
            page_size=self.page_size,
            pages=self._pages(glm, on_gpu),
            chunk_tokens=self.chunked_prefill_size,
            num_draft=drafts,
            grammars=not self.disable_grammars and glm.tokenizer is not None,
            max_queued=self.max_queued_requests,
            max_queued_per_client=self.max_queued_requests,
            prefix_cache=not self.disable_radix_cache,
            offload_bytes=int(self.hicache_size * 1e9),
            recorded_dispatches=_DEFAULTS.recorded_dispatches if self.flight_recorder else 0,
        )

    def _pages(self, glm: GLM, on_gpu: bool) -> int | None:
        """Of the cache."""
        if self.max_total_tokens is not None:
            return self.max_total_tokens // self.page_size
        fraction = self.mem_fraction_static or (0.85 if on_gpu else None)
        if fraction is None:
            return None
        pages = fitting_pages(glm, self.page_size, fraction)
        length = self.context_length or glm.config.max_position_embeddings
        if pages * self.page_size < length:
            raise ValueError(
                f"--context-length {length} is more than the device's memory has room for beside the model at "
                f"--mem-fraction-static {fraction}; the longest that fits is {pages * self.page_size}"
            )
        return pages


def _sampling_defaults(folder: Path) -> str:
    """What a checkpoint's author would sample with, as JSON; "" where nothing is said."""
    path = folder / "generation_config.json"
    given = read_json(path) if path.exists() else {}
    found = {name: given[name] for name in _SAMPLED if given.get(name) is not None}
    return json.dumps(found) if found else ""
