"""A worker in a thread, with a small engine that speaks, and what tests ask of it."""

import asyncio
import threading
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc

from glmjax.serving.engine import Engine
from glmjax.worker.arguments import Arguments
from glmjax.worker.lifecycle import Worker
from glmjax.worker.protocol import SERVICE
from tests.serving.test_grammar import CONFIG, LENGTH, glm

PROMPT = "give me "
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Running:
    """A worker in a thread, and stubs to call it."""

    def __init__(self, make=lambda: Engine(glm(), CONFIG), channel=grpc.insecure_channel, **flags):
        self.loop, self.status, listening = None, None, threading.Event()
        arguments = Arguments(port=0, **{"drain_seconds": 10.0} | flags)

        def made():
            listening.set()  # the port is open before the engine is made
            self.engine = make()
            return self.engine

        async def main():
            self.loop, self.worker = asyncio.get_running_loop(), Worker(arguments, made)
            return await self.worker.run()

        def run():
            self.status = asyncio.run(main())

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        assert listening.wait(60)
        self.address = f"127.0.0.1:{self.worker.port}"
        self.channel = channel(self.address)
        self.stub = vllm_engine_pb2_grpc.VllmEngineStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)

    def serving(self, service=SERVICE):
        return self.health.Check(health_pb2.HealthCheckRequest(service=service)).status

    def ready(self):
        while self.serving() != SERVING:
            time.sleep(0.02)
        return self

    def leave(self):
        self.loop.call_soon_threadsafe(self.worker.leave)

    def closed(self):
        self.thread.join(60)
        self.channel.close()
        return self.status


def until(true, seconds=30):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def before_plans(monkeypatch, engine, do):
    """Have something done before each of an engine's plans."""
    plan = engine._scheduler.plan
    monkeypatch.setattr(engine._scheduler, "plan", lambda now: (do(), plan(now))[1])


def asked(text=PROMPT, stream=False, name="", **sampling):
    fields = {"temperature": 1.2, "seed": 3, "max_tokens": 12} | sampling
    return pb.GenerateRequest(request_id=name, text=text, stream=stream, sampling_params=pb.SamplingParams(**fields))


def alone(text=PROMPT, **fields):
    return glm().generate(text, temperature=1.2, seed=3, max_new_tokens=12, **fields).finish().ids


def complete(running, request):
    return [response.complete for response in running.stub.Generate(request) if response.HasField("complete")]


def failure(call):
    with pytest.raises(grpc.RpcError) as error:
        list(call)
    return error.value.code(), dict(error.value.trailing_metadata()).get("glmjax-reason"), error.value.details()


def endless(name=""):
    return asked(stream=True, name=name, ignore_eos=True, max_tokens=LENGTH)
