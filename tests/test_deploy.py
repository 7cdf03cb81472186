"""What is deployed fits the code: flags are there, probes ask for what is answered, nobody is killed who still drains."""

import argparse
import configparser
import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from smg.router_args import RouterArgs

from glmjax.worker.arguments import Arguments
from glmjax.worker.protocol import SERVICE

DEPLOY = Path(__file__).parents[1] / "deploy"
OURS = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(Arguments)}


@pytest.fixture(scope="module")
def unit():
    """The unit's sections; of fields that stand there twice, the last."""
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str
    assert parser.read(DEPLOY / "glmjax.service")
    return parser


@pytest.fixture(scope="module")
def objects():
    """Of the cluster, by kind and name."""
    found = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    return {(one["kind"], one["metadata"]["name"]): one for one in found}


def pod(objects, name):
    spec = objects["Deployment", name]["spec"]["template"]["spec"]
    [container] = spec["containers"]
    return spec, container


def flag(container, name):
    [value] = [word.split("=", 1)[1] for word in container["args"] if word.startswith(f"{name}=")]
    return value


def gateways():
    """Flags of the gateway."""
    parser = argparse.ArgumentParser()
    RouterArgs.add_cli_args(parser, use_router_prefix=False)
    return {word for action in parser._actions for word in action.option_strings}


def test_the_units_flags_are_the_workers(unit):
    words = unit["Service"]["ExecStart"].split()
    assert words[1:3] == ["-m", "glmjax.serve"]
    used = {word for word in words if word.startswith("--")}
    assert used <= OURS
    assert {"--gateway", "--replicas", "--compilation-cache"} <= used


def test_the_unit_gives_everybody_time_to_drain(unit):
    service = unit["Service"]
    [drain] = re.findall(r"--drain-seconds (\d+)", service["ExecStart"])
    assert int(service["TimeoutStopSec"]) > 2 * int(drain) + 30  # the gateway's, then the workers'
    assert (service["KillMode"], service["KillSignal"]) == ("mixed", "SIGTERM")
    assert service["RestartPreventExitStatus"] == "2"
    assert "-HUP" in service["ExecReload"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd")
def test_systemd_can_read_the_unit():
    told = subprocess.run(
        ["systemd-analyze", "verify", DEPLOY / "glmjax.service"], capture_output=True, text=True, check=False
    )
    assert "Unknown" not in told.stderr


def test_the_clusters_flags_are_the_workers_and_the_gateways(objects):
    for name, known in (("glmjax-worker", OURS), ("glmjax-gateway", gateways())):
        _, container = pod(objects, name)
        used = {word.split("=")[0] for word in container["args"]}
        assert used <= known
        assert len(used) > 5


def test_probes_ask_for_what_the_worker_answers(objects):
    _, worker = pod(objects, "glmjax-worker")
    port = int(flag(worker, "--port"))
    assert worker["livenessProbe"]["grpc"] == {"port": port}
    for probe in ("readinessProbe", "startupProbe"):
        assert worker[probe]["grpc"] == {"port": port, "service": SERVICE}
    assert port in {one["containerPort"] for one in worker["ports"]}


def test_nobody_is_killed_who_still_drains(objects):
    spec, worker = pod(objects, "glmjax-worker")
    waits = int(worker["lifecycle"]["preStop"]["exec"]["command"][1])
    assert spec["terminationGracePeriodSeconds"] > waits + int(flag(worker, "--drain-seconds"))
    spec, gateway = pod(objects, "glmjax-gateway")
    assert spec["terminationGracePeriodSeconds"] > int(flag(gateway, "--shutdown-grace-period-secs"))


def test_the_gateway_finds_the_workers_and_knows_their_pages(objects):
    _, gateway = pod(objects, "glmjax-gateway")
    _, worker = pod(objects, "glmjax-worker")
    labels = objects["Deployment", "glmjax-worker"]["spec"]["template"]["metadata"]["labels"]
    assert flag(gateway, "--selector") == f"app={labels['app']}"
    assert flag(gateway, "--service-discovery-port") == flag(worker, "--port")
    assert flag(gateway, "--block-size") == flag(worker, "--page-size")
    assert {one["metadata"]["namespace"] for one in objects.values() if one["kind"] != "Namespace"} == {
        flag(gateway, "--service-discovery-namespace")
    }


def test_only_the_gateway_gets_to_the_workers(objects):
    policy = objects["NetworkPolicy", "glmjax-worker"]["spec"]
    assert policy["podSelector"] == objects["Deployment", "glmjax-worker"]["spec"]["selector"]
    _, worker = pod(objects, "glmjax-worker")
    open_to_all = {port["port"] for rule in policy["ingress"] if "from" not in rule for port in rule["ports"]}
    assert open_to_all == {int(flag(worker, "--metrics-port"))}
    selector = objects["Service", "glmjax"]["spec"]["selector"]
    assert selector == objects["Deployment", "glmjax-gateway"]["spec"]["selector"]["matchLabels"]


def test_the_image_runs_the_worker_as_nobody_in_particular():
    text = (DEPLOY / "Containerfile").read_text()
    assert 'ENTRYPOINT ["python", "-m", "glmjax.serve"]' in text
    assert re.search(r"^USER \d+$", text, re.MULTILINE)
    assert "STOPSIGNAL SIGTERM" in text
    exposed = set(map(int, re.search(r"^EXPOSE (.*)$", text, re.MULTILINE)[1].split()))
    defaults = Arguments()
    assert exposed == {defaults.port, defaults.gateway_port, defaults.metrics_port}
