"""The benchmark for GPUs, at a size for the CPU: what it writes, what it keeps when a case fails, what it counts."""

import json

import pytest

from benchmarks import gpu
from benchmarks.measure import weight_bytes
from glmjax.model.assemble import abstract

JUNIT = """<testsuites><testsuite><testcase classname="tests.gpu" name="test_golden[dense]" time="1.5">
<properties><property name="largest_error" value="1e-6"/></properties></testcase>
<testcase classname="tests.gpu" name="test_kernel" time="0.5"><failure message="wrong">...</failure></testcase>
</testsuite></testsuites>"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "junit.xml").write_text(JUNIT)
    out = folder / "new" / "results.json"
    status = gpu.main(gpu.Arguments(out=out, size="tiny", tests=folder / "junit.xml", repeats=1, limit=600))
    assert status == 0
    return json.loads(out.read_text())


def test_every_case_is_measured_and_finite(results):
    cases = [(c["kind"], c["tokens"], c.get("length")) for c in results["cases"]]
    assert cases == [("decode", 1, 16), ("decode", 1, 48), ("prefill", 32, None), ("gather", 64, None)]
    assert all(c["seconds"] > 0 and c["bytes_per_second"] > 0 and c["percent_of_memory"] > 0 for c in results["cases"])
    assert all(c["finite"] for c in results["cases"] if c["kind"] != "gather")
    assert all("flops_per_second" in c for c in results["cases"] if c["kind"] == "prefill")
    assert results["cases"][-1]["equal"] is True


def test_the_ceilings_and_the_device_are_written(results):
    assert all(rate > 0 for rate in results["ceilings"].values())
    assert results["device"]["platform"] == "cpu"


def test_the_tests_that_ran_before_are_taken_in(results, tmp_path):
    assert results["tests"] == [
        {"name": "tests.gpu.test_golden[dense]", "outcome": "passed", "seconds": "1.5", "largest_error": "1e-6"},
        {"name": "tests.gpu.test_kernel", "outcome": "failure", "seconds": "0.5", "message": "wrong"},
    ]
    assert gpu.tested(tmp_path / "killed.xml") is None


def test_a_case_that_fails_is_named_and_the_others_are_measured(tmp_path, monkeypatch, capsys):
    def broken(self, ops):
        raise RuntimeError("no such device")
        yield

    monkeypatch.setattr(gpu.Slice, "decode", broken)
    monkeypatch.setattr(gpu.Slice, "prefill", broken)
    assert gpu.main(gpu.Arguments(out=tmp_path / "r.json", size="tiny", repeats=1, limit=600)) == 1
    cases = json.loads((tmp_path / "r.json").read_text())["cases"]
    assert [c.get("error") for c in cases] == ["RuntimeError: no such device"] * 2 + [None]
    assert "no such device" in capsys.readouterr().out


def test_after_the_limit_no_case_begins(tmp_path):
    gpu.main(gpu.Arguments(out=tmp_path / "r.json", size="tiny", repeats=1, limit=0))
    cases = json.loads((tmp_path / "r.json").read_text())["cases"]
    assert [sorted(c) for c in cases] == [["kind", "ops", "skipped"]] * 3


def test_of_a_token_the_chosen_experts_are_read_and_of_many_tokens_all():
    config = gpu.SIZES["glm-5.1"].config
    model = abstract(config, gpu.jnp.bfloat16, mtp=False, fp8=False)
    expert = 2 * 3 * 6144 * 2048
    one, many = (weight_bytes(model, tokens) for tokens in (1, 10**6))
    assert many - one == pytest.approx((256 - 8) * expert + 2 * (154880 - 1) * 6144, rel=1e-9)
