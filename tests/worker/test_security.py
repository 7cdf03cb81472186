"""Who may call: certificates and tokens, as a server with them meets clients with and without."""

import grpc
import pytest
import trustme
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc

from glmjax.client.__main__ import main
from glmjax.client.client import Client
from glmjax.worker.security import credentials
from tests.worker.running import SERVING, Running


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Of one CA, a certificate for the server and one for a client."""
    folder, ca = tmp_path_factory.mktemp("certificates"), trustme.CA()
    ca.cert_pem.write_to_path(folder / "ca.pem")
    for name in ("127.0.0.1", "client"):
        issued = ca.issue_cert(name)
        issued.private_key_pem.write_to_path(folder / f"{name}.key")
        issued.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
    return {
        "ca": folder / "ca.pem",
        "server": (folder / "127.0.0.1.pem", folder / "127.0.0.1.key"),
        "client": {"certificate": folder / "client.pem", "key": folder / "client.key"},
    }


@pytest.fixture(scope="module")
def secured(files):
    certificate, key = files["server"]
    own = grpc.ssl_channel_credentials(
        files["ca"].read_bytes(), files["client"]["key"].read_bytes(), files["client"]["certificate"].read_bytes()
    )
    running = Running(
        channel=lambda address: grpc.secure_channel(address, own),
        api_key="secret",
        ssl_certfile=certificate,
        ssl_keyfile=key,
        ssl_ca_certs=files["ca"],
    )
    yield running.ready()
    running.leave()
    assert running.closed() == 0


def test_who_has_all_of_it_is_served(secured, files):
    with Client(secured.address, api_key="secret", ca=files["ca"], **files["client"]) as client:
        [answer] = client.generate("give me ", max_new_tokens=4, temperature=0, ignore_eos=True)
        assert len(answer.ids) == 4


def test_the_terminal_takes_the_token_from_the_environment(secured, files, monkeypatch, capsys):
    monkeypatch.setenv("GLMJAX_API_KEY", "secret")
    tls = {"ca": files["ca"]} | files["client"]
    flags = [f"--{name}={path}" for name, path in tls.items()]
    asked = [
        "give me ",
        "--max-new-tokens=4",
        "--temperature=0",
        "--ignore-eos",
        f"--address={secured.address}",
        *flags,
    ]
    assert main(asked) == 0
    assert "4 new" in capsys.readouterr().err
    assert main([*asked, "--api-key=wrong"]) == 1
    assert "UNAUTHENTICATED" in capsys.readouterr().err


def test_a_probe_needs_no_token(secured):
    assert secured.serving() == SERVING


@pytest.mark.parametrize("token", [None, "", "Bearer wrong", "secret"])
def test_a_call_without_the_token_is_refused(secured, token):
    metadata = () if token is None else (("authorization", token),)
    stub = vllm_engine_pb2_grpc.VllmEngineStub(secured.channel)
    for call in (stub.GetModelInfo, lambda *args, **kw: list(stub.Generate(*args, **kw))):
        with pytest.raises(grpc.RpcError) as error:
            call(
                pb.GetModelInfoRequest() if call == stub.GetModelInfo else pb.GenerateRequest(text="x"),
                metadata=metadata,
            )
        assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert "send authorization: Bearer" in error.value.details()


def test_a_client_without_a_certificate_does_not_get_through(secured, files):
    known = grpc.ssl_channel_credentials(files["ca"].read_bytes())
    with grpc.secure_channel(secured.address, known) as channel:
        with pytest.raises(grpc.RpcError) as error:
            vllm_engine_pb2_grpc.VllmEngineStub(channel).HealthCheck(pb.HealthCheckRequest(), timeout=10)
        assert error.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def test_half_a_pair_is_refused(files):
    certificate, key = files["server"]
    for given in ((certificate, None, None), (None, key, None), (None, None, files["ca"])):
        with pytest.raises(ValueError, match="TLS needs both --ssl-certfile and --ssl-keyfile"):
            credentials(*given)
    assert credentials(None, None, None) is None
