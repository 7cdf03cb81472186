"""Several workers share what there is, are begun again when they end, and never outlive who began them."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glmjax import serve
from glmjax.fleet.child import Child
from glmjax.fleet.devices import devices, devices_of
from glmjax.fleet.gateway import command
from glmjax.fleet.replica import arguments_of
from glmjax.worker.arguments import Arguments


def flags(words):
    return dict(zip(words[1::2], words[2::2], strict=True))


def test_workers_have_ports_of_their_own():
    several = arguments_of(Arguments(replicas=3, port=600, metrics_port=700, host="0.0.0.0", api_key="secret"))
    assert [(one.port, one.metrics_port) for one in several] == [(600, 700), (601, 701), (602, 702)]
    assert {(one.host, one.api_key) for one in several} == {("0.0.0.0", "secret")}
    assert [one.port for one in arguments_of(Arguments(replicas=2, port=0))] == [0, 0]


def test_behind_a_gateway_they_listen_to_this_machine_alone():
    certificate = {"ssl_certfile": Path("a.pem"), "ssl_keyfile": Path("a.key")}
    given = Arguments(replicas=2, host="0.0.0.0", api_key="secret", gateway=True, **certificate)
    for one in arguments_of(given):
        assert (one.host, one.api_key, one.ssl_certfile, one.ssl_keyfile) == ("127.0.0.1", None, None, None)
        assert one.metrics_host == "0.0.0.0"
    found = flags(command(given, Path("workers.json")))
    assert (found["--host"], found["--api-key"]) == ("0.0.0.0", "secret")
    assert (found["--tls-cert-path"], found["--tls-key-path"]) == ("a.pem", "a.key")
    assert (found["--discovery-file"], found["--block-size"]) == ("workers.json", "64")


@pytest.mark.parametrize(
    ("words", "variable", "key"),
    [([], None, None), ([], "secret", "secret"), (["--api-key", "mine"], "secret", "mine"), ([], "", None)],
)
def test_the_environments_key_is_the_gateways_too(monkeypatch, words, variable, key):
    monkeypatch.setenv("GLMJAX_API_KEY", variable) if variable is not None else monkeypatch.delenv(
        "GLMJAX_API_KEY", raising=False
    )
    given = []
    monkeypatch.setattr(serve.fleet, "run", lambda arguments: given.append(arguments) or 0)
    assert serve.main(["--gateway", *words]) == 0
    [arguments] = given
    assert flags(command(arguments, Path("workers.json"))).get("--api-key") == key
    assert {one.api_key for one in arguments_of(arguments)} == {None}


def test_without_the_package_there_is_no_gateway(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="install it"):
        command(Arguments(gateway=True), Path("workers.json"))


def test_gpus_are_shared_equally():
    assert devices_of(2, []) == [{}, {}]
    assert devices_of(2, ["0", "1", "2", "3", "4"]) == [
        {"CUDA_VISIBLE_DEVICES": "0,1"},
        {"CUDA_VISIBLE_DEVICES": "2,3"},
    ]
    with pytest.raises(ValueError, match="--replicas 3 exceeds the 2 GPUs"):
        devices_of(3, ["0", "1"])


def test_gpus_are_those_that_may_be_seen(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert devices() == ["2", "5"]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert devices() == []


# Processes


def echo(say, words):
    """Say what one is told, and sleep."""
    say(words)
    time.sleep(60)
    return 0


def deaf(say):
    """Not leave when asked."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say("here")
    time.sleep(60)
    return 0


def over(say, status):
    """End at once."""
    return status


def child(*arguments):
    """A process, and what it says first."""
    heard = asyncio.get_running_loop().create_future()
    made = Child("child", *arguments, heard=lambda message: heard.done() or heard.set_result(message))
    return made, heard


def test_a_child_says_what_it_has_to_say_and_leaves_when_asked():
    async def run():
        made, heard = child(echo, ["a", 1])
        assert await asyncio.wait_for(heard, 60) == ["a", 1]
        return await made.leave(30)

    assert asyncio.run(run()) == -signal.SIGTERM


def test_who_does_not_leave_is_made_to():
    async def run():
        made, heard = child(deaf)
        assert await asyncio.wait_for(heard, 60) == "here"
        return await made.leave(0.2)

    assert asyncio.run(run()) == -signal.SIGKILL


def test_its_status_is_told():
    async def run():
        made, _ = child(over, 7)
        return await asyncio.wait_for(made.ended(), 60)

    assert asyncio.run(run()) == 7


PARENT = """
import asyncio
from glmjax.fleet.child import Child
from tests.fleet.test_fleet import echo

async def run():
    heard = asyncio.get_running_loop().create_future()
    child = Child("child", echo, [], heard=heard.set_result)
    await heard
    print(child.pid, flush=True)
    await asyncio.sleep(60)

if __name__ == "__main__":
    asyncio.run(run())
"""


def test_a_child_does_not_outlive_its_parent(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    with subprocess.Popen([sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, env=environment) as parent:
        pid = int(parent.stdout.readline())
        parent.kill()
    end = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]:
        assert time.monotonic() < end
        time.sleep(0.05)
