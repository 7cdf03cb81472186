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
from glmjax.fleet import replica
from glmjax.fleet.child import Child
from glmjax.fleet.devices import devices, devices_of
from glmjax.fleet.gateway import command
from glmjax.fleet.replica import REFUSED, arguments_of
from glmjax.worker.arguments import Arguments


def flags(words):
    return dict(zip(words[1::2], words[2::2], strict=True))


def test_workers_have_ports_of_their_own():
    several = arguments_of(Arguments(replicas=3, port=600, metrics_port=700, host="0.0.0.0", api_key="secret"))
    assert [(one.port, one.metrics_port) for one in several] == [(600, 700), (601, 701), (602, 702)]
    assert {(one.host, one.api_key) for one in several} == {("0.0.0.0", "secret")}
    assert [one.port for one in arguments_of(Arguments(replicas=2, port=0))] == [0, 0]


def test_workers_have_folders_of_their_own():
    several = arguments_of(Arguments(replicas=2, flight_recorder=Path("/flights")))
    assert [one.flight_recorder for one in several] == [Path("/flights/worker-0"), Path("/flights/worker-1")]
    assert arguments_of(Arguments(replicas=1))[0].flight_recorder is None


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


def test_the_gateways_metrics_are_told_to_others_only_where_metrics_are_asked_for():
    for asked, host in ((False, "127.0.0.1"), (True, "0.0.0.0")):
        given = Arguments(gateway=True, host="0.0.0.0", replicas=2, metrics_port=700, enable_metrics=asked)
        found = flags(command(given, Path("workers.json")))
        assert (found["--prometheus-host"], found["--prometheus-port"]) == (host, "702")


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


def troubled(say, number, arguments, environment):
    """Serve and die, then be unable to, then serve."""
    folder = Path(environment["FOLDER"])
    times = len(list(folder.glob("began*")))
    (folder / f"began{times}").touch()
    if times == environment["REFUSES"]:
        return REFUSED
    say("an address")
    while not (folder / "heard").exists() or times > environment["REFUSES"]:
        time.sleep(0.01)
    return 1


@pytest.fixture
def keeps(monkeypatch, tmp_path):
    """A replica whose process is `troubled`, refusing the n-th time; until it is begun the m-th time or is over."""
    monkeypatch.setattr(replica, "serve", troubled)
    monkeypatch.setattr(replica, "_LONGEST_PAUSE", 0.01)

    async def run(refuses, times):
        environment = {"FOLDER": str(tmp_path), "REFUSES": refuses}
        one = replica.Replica(0, Arguments(), environment, lambda: one.address and (tmp_path / "heard").touch())
        keeping = asyncio.create_task(one.keep())
        while not keeping.done() and not (tmp_path / f"began{times - 1}").exists():
            await asyncio.sleep(0.01)
        if not keeping.done():
            await one.serving()
            await one.leave(30)
        return await keeping

    return lambda refuses, times: asyncio.run(asyncio.wait_for(run(refuses, times), 60))


def test_a_worker_that_cannot_serve_is_given_up(keeps):
    assert keeps(refuses=0, times=2) == REFUSED


def test_one_that_has_served_is_begun_again_whatever_it_met(keeps):
    assert keeps(refuses=1, times=3) == -signal.SIGTERM


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
