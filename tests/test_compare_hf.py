"""The comparison with Hugging Face, its worker replaced by small scripts: the margin rule, counts, protocol and table."""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import pytest

import glmjax
from benchmarks import compare_hf
from benchmarks.hf.client import REQUIREMENTS, Run, Worker, WorkerError, environment
from benchmarks.hf.report import MARGIN, Context, Divergence, Limits, document, first_divergence, summary, table
from benchmarks.measure import busy_seconds, cpu_seconds, prefill_flops
from glmjax.model.census import active
from glmjax.model.config import GlmConfig

ROOT = Path(__file__).parents[1]
SPARSE = ROOT / "tests" / "golden" / "sparse"


def side(ids=(1, 2, 3), margins=(), seconds=1.0, speed=10.0, foreign=0.0) -> Run:
    return Run(list(ids), seconds, speed, list(margins), foreign_cores=foreign)


# The margin rule


def test_equal_tokens_agree_whatever_the_margins():
    assert first_divergence(side([5, 6]), side([5, 6], [0.0, 0.0])) is None


def test_the_first_difference_counts_and_nothing_after_it():
    found = first_divergence(side([5, 6, 7, 8]), side([5, 9, 9, 8], [1.0, 1e-6, 2.0, 2.0]))
    assert found == Divergence(position=1, margin=1e-6)


@pytest.mark.parametrize(("margin", "tie"), [(0.0, True), (MARGIN / 2, True), (MARGIN, False), (0.3, False)])
def test_only_logits_closer_than_the_margin_are_a_tie(margin, tie):
    found = Divergence(0, margin)
    assert found.tie is tie
    assert ("a tie" in str(found)) is tie


def test_different_numbers_of_tokens_are_no_agreement():
    with pytest.raises(ValueError, match="argument 2 is longer"):
        first_divergence(side([5]), side([5, 6], [1.0, 1.0]))


def test_a_divergence_seen_in_every_repeat_is_named_once():
    parted = side([1, 2, 4], [1.0, 1.0, 0.5])
    context = Context(8, 1, [side()] * 3, [parted, parted, side(margins=[1.0] * 3)])
    assert context.divergences == [Divergence(2, 0.5)]


# Counting


@pytest.fixture
def tiny() -> GlmConfig:
    """D = E = J = K = P = 2, V = 3 and everything else 1: layer 0 dense with an indexer, layer 1 sparse without."""
    ones = ("num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "index_n_heads")
    return GlmConfig(
        **dict.fromkeys(ones, 1),
        vocab_size=3,
        hidden_size=2,
        num_hidden_layers=2,
        qk_rope_head_dim=2,
        intermediate_size=1,
        moe_intermediate_size=1,
        n_routed_experts=2,
        num_experts_per_tok=1,
        mlp_layer_types=("dense", "sparse"),
        indexer_types=("full", "shared"),
        index_topk=2,
        index_head_dim=2,
    )


def test_the_operations_of_three_tokens_by_hand(tiny):
    attention = 3 * (2 + 3 + 6 + 1 + 1 + 2) + (1 + 2 + 2) * (3 + 1)  # projections; attended positions
    indexer = 3 * (2 + 4 + 2) + (1 + 2 + 3) * (2 + 1)  # projections; visible positions
    dense, sparse, head = 3 * 6, 3 * (4 + 6 + 6), 6
    assert prefill_flops(tiny, 3) == 2 * (2 * attention + indexer + dense + sparse + head)


def test_a_lone_token_costs_two_operations_per_active_parameter():
    """Counted from the weights instead; norms and one position's attention are in the tolerance."""
    config = GlmConfig.from_dir(ROOT / "configs" / "glm-5.1.json")
    assert prefill_flops(config, 1) == pytest.approx(2 * active(config), rel=1e-3)


def test_attention_stops_growing_at_the_selection_and_the_indexer_does_not(tiny):
    """Of two tokens more, the second differences are what grows with the pairs: J + 1 = 3 multiplications here."""
    cost = [prefill_flops(tiny, tokens) for tokens in (5, 6, 7)]
    assert cost[2] - 2 * cost[1] + cost[0] == 2 * 3


# Whose the cores are


def test_a_process_has_the_cpu_time_that_it_counts_itself():
    assert cpu_seconds(os.getpid()) == pytest.approx(time.process_time(), abs=0.1)


def test_what_a_process_uses_is_part_of_what_everybody_uses():
    before, began = busy_seconds(), time.process_time()
    while time.process_time() < began + 0.3:
        pass
    assert busy_seconds() - before > 0.2


# The worker


@pytest.fixture
def command(tmp_path):
    """The command of a worker that greets and then runs `body` for every request."""

    def command(body: str, greeting: str = '{"checkpoint": "here"}') -> list[str]:
        lines = [
            "import json, sys",
            f"print({greeting!r}, flush=True)",
            "for line in sys.stdin:",
            "    request = json.loads(line)",
            f"    {body}",
        ]
        (tmp_path / "worker.py").write_text("\n".join(lines))
        return [sys.executable, str(tmp_path / "worker.py")]

    return command


ECHO = """print(json.dumps({"ids": request["prompt"][-request["new_tokens"]:], "margins": [0.0] * request["new_tokens"],
        "first_token_seconds": 0.5, "tokens_per_second": 4.0}), flush=True)"""


def test_a_worker_greets_and_answers_line_by_line(command):
    with Worker(command(ECHO)) as worker:
        assert worker.greeting == {"checkpoint": "here"}
        for last in (7, 8):
            assert worker.generate([5, 6, last], 2) == Run([6, last], 0.5, 4.0, [0.0, 0.0])


def test_a_worker_ends_with_its_context(command):
    with Worker(command(ECHO)) as worker:
        pass
    assert worker._process.returncode == 0


def test_a_worker_at_work_is_killed_when_the_parent_fails(command):
    with pytest.raises(KeyboardInterrupt), Worker(command("pass")) as worker:
        raise KeyboardInterrupt
    assert worker._process.returncode < 0


def test_a_worker_that_fails_is_told_with_its_status(command):
    with pytest.raises(WorkerError, match="ended with status 3"), Worker(command("sys.exit(3)")) as worker:
        worker.generate([1], 3)


def test_a_worker_that_never_starts_is_told_with_its_status():
    with pytest.raises(WorkerError, match="ended with status 4"):
        Worker([sys.executable, "-c", "raise SystemExit(4)"])


@pytest.mark.parametrize("noise", ["Loading weights …", "17"])
def test_noise_between_the_answers_is_named(command, noise):
    with pytest.raises(WorkerError, match=f"said '{noise}"):
        Worker(command(ECHO, greeting=noise))


# Its environment


def test_an_environment_that_is_ready_is_taken_as_it_is(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    (tmp_path / "ready").write_text("\n".join(REQUIREMENTS))
    assert environment(tmp_path, "no-such-python") == tmp_path / "bin" / "python"


@pytest.mark.parametrize("made_for", [None, "torch==1.0"], ids=["unfinished", "outdated"])
def test_any_other_is_made_anew(tmp_path, made_for):
    if made_for:
        (tmp_path / "ready").write_text(made_for)
    with pytest.raises(WorkerError, match=r"venv --clear .* failed, as told above; name another Python"):
        environment(tmp_path, "false")


def test_a_missing_interpreter_is_told_with_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no no-such-python; install Python 3\.11, or name .* with --python"):
        environment(tmp_path, "no-such-python")


# The benchmark


LIMITS = Limits(gemm=8e9, bandwidth=1e9, weights=10_000_000)


def test_medians_ratios_and_fractions():
    ours = [side(seconds=seconds, speed=speed) for seconds, speed in ((1, 30), (2, 20), (9, 10))]
    theirs = [side(margins=[1.0] * 3, seconds=6, speed=5)] * 3
    found = summary(Context(512, 4_000_000_000, ours, theirs), LIMITS)
    assert (found["glmjax_prefill_seconds"], found["glmjax_decode_tokens_per_second"]) == (2, 20)
    assert (found["prefill_ratio"], found["decode_ratio"]) == (3, 4)
    assert (found["prefill_of_gemm"], found["decode_of_bandwidth"]) == (0.25, 0.2)


def test_the_table_has_a_line_for_each_context_and_one_for_each_divergence():
    same, parted = side(margins=[1.0] * 3), side([1, 2, 9], [1.0, 1.0, 0.5])
    contexts = [Context(512, 10**9, [side()], [same]), Context(2048, 10**9, [side()], [parted])]
    _, columns, first, second, divergence, *_ = table(contexts, LIMITS).splitlines()
    assert len(first.split()) == len(columns.replace("of GEMM", "of_GEMM").replace("of read", "of_read").split())
    assert first.split()[0] == "512"
    assert first.endswith("equal")
    assert second.endswith("equal up to 2")
    assert (
        divergence
        == "context 2,048: tokens part at position 2, the best two logits 5.0e-01 apart: no tie, 1e-04 or more"
    )


@pytest.mark.parametrize(("foreign", "told"), [(0.1, False), (1.3, True)])
def test_a_busy_machine_is_told(foreign, told):
    context = Context(512, 10**9, [side()], [side(margins=[1.0] * 3, foreign=foreign)])
    beside_glmjax, beside_hf = table([context], LIMITS).splitlines()[-2:]
    assert "quiet" not in beside_glmjax
    assert f"{foreign:.2f} with others" in beside_hf
    assert ("repeat this on a quiet machine" in beside_hf) is told


def test_both_sides_run_by_turns_and_hugging_face_less_often_with_long_contexts(command, monkeypatch):
    monkeypatch.setattr(compare_hf, "LONG", 10)
    arguments = compare_hf.Arguments(
        contexts=(8, 12), new_tokens=3, repeats=2, long_repeats=1, gemm_size=16, read_mib=1
    )
    glm = glmjax.load(SPARSE, dtype="float32")
    with Worker(command(ECHO)) as worker:
        contexts, limits = compare_hf.run(glm, worker, arguments)
    assert [(c.tokens, len(c.ours), len(c.theirs)) for c in contexts] == [(8, 2, 2), (12, 2, 1)]
    assert contexts[0].ours[0].ids == contexts[0].ours[1].ids
    assert all(run.first_token_seconds > 0 and run.tokens_per_second > 0 for c in contexts for run in c.ours)
    assert min(limits.gemm, limits.bandwidth, limits.weights) > 0
    written = json.loads(json.dumps(document(contexts, limits, worker.greeting, dataclasses.asdict(arguments))))
    assert {"date", "machine", "hugging_face", "arguments", "limits", "contexts"} == set(written)
    assert "checkpoint" not in written["hugging_face"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"new_tokens": 2}, "new_tokens 2 gives no decoding speed; ask for at least 3"),
        ({"repeats": 0}, "must be at least 1"),
        ({"python": "no-such-python"}, "there is no no-such-python"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, fields, message):
    monkeypatch.setattr(compare_hf, "CACHE", tmp_path)
    assert compare_hf.main(compare_hf.Arguments(**fields)) == 2
    assert message in capsys.readouterr().err
