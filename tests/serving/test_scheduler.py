"""Any schedule gives every request its own tokens, and loses neither page nor slot."""

import dataclasses
from collections import deque

import hypothesis
import hypothesis.strategies as st
import pytest

from glmjax.model.sampling_params import SamplingParams
from glmjax.model.stops import Stops
from glmjax.serving.anomaly import AnomalyRules
from glmjax.serving.config import EngineConfig
from glmjax.serving.errors import AnomalyError, DeadlineError
from glmjax.serving.outcome import Outcome
from glmjax.serving.request import Request
from glmjax.serving.running import Running
from glmjax.serving.scheduler import Scheduler
from glmjax.serving.shapes import Shapes
from tests.serving.paper_device import STOP, PaperDevice, expected

A, LENGTH = 4, 64
CONFIG = EngineConfig(
    max_model_len=LENGTH, max_num_seqs=4, page_size=A, pages=20, chunk_tokens=8, num_draft=2, max_rounds=4
)


class Bench:
    """A scheduler with a device on paper, whose logs are read `behind` dispatches late.

    Args:
        config: the engine's.
        behind: see above.
        pace: seconds of a round without drafts, and of each draft.
    """

    def __init__(self, config=CONFIG, behind=1, pace=(0.01, 0.001)):
        self.pace = pace
        self.running = Running(config, config.pages)
        self.scheduler = Scheduler(config, Shapes(config, LENGTH), self.running)
        self.outcome = Outcome(self.running, config, 1e-4)
        self.device = PaperDevice(config.pages, config.page_size, config.max_num_seqs)
        self.behind, self.unread, self.plans, self.now = behind, deque(), [], 0.0

    def add(self, prompt, new_tokens=5, **fields):
        params = SamplingParams(temperature=0, ignore_eos=False)
        request = Request(list(prompt), params, new_tokens, Stops(frozenset({STOP})), arrived=self.now, **fields)
        self.running.waiting.reserve(request.client)
        self.running.add(request)
        return request

    def step(self):
        """One turn of the engine's thread; whether there was anything to do."""
        self.now += 0.1
        plan = self.scheduler.plan(self.now)
        if plan is not None:
            self.plans.append(plan)
            log = self.device.dispatch(plan)
            if log is not None:
                self.unread.append((plan, log))
        did = plan is not None or bool(self.unread)
        while len(self.unread) > (self.behind if plan is not None else 0):
            read, log = self.unread.popleft()
            if read.shape.kind == "decode":
                self.scheduler.learn(read, log, log.rounds * (self.pace[0] + self.pace[1] * (read.shape.width - 1)))
            self.outcome.read(read, log, self.now)
        self.running.check()
        return did

    def run(self, most=2000):
        for _ in range(most):
            if not self.step():
                assert not self.running.busy, "somebody waits and nothing happens"
                return
        raise AssertionError("it does not come to an end")


def told(request):
    """The tokens a client got."""
    return [token for chunk in request.stream for token in chunk.ids]


@pytest.mark.parametrize("behind", [0, 1, 3])
@pytest.mark.parametrize("length", [1, A - 1, A, A + 1, 2 * A, 17, 40])
def test_a_request_gets_its_tokens(length, behind):
    bench, prompt = Bench(behind=behind), range(length)
    request = bench.add(prompt, 20)
    bench.run()
    assert told(request) == expected(prompt, 20)


def test_only_one_token():
    bench = Bench()
    request = bench.add(range(9), 1)
    bench.run()
    assert told(request) == expected(range(9), 1)
    assert request.reply.finish_reason == "length"


def test_a_prefix_is_read_once():
    bench = Bench()
    bench.add(range(17))
    bench.run()
    again = bench.add(range(30))
    bench.run()
    assert again.cached == 16
    assert told(again) == expected(range(30), 5)


def test_a_prompt_that_is_cached_as_a_whole_is_not_read_at_all():
    bench = Bench()
    bench.add(range(16))
    bench.run()
    again = bench.add(range(16))
    before = len(bench.plans)
    bench.run()
    assert told(again) == expected(range(16), 5)
    reads = [plan for plan in bench.plans[before:] if plan.chunks is not None]
    assert [plan.chunks.count_B.sum() for plan in reads] == [0]


def test_prompts_with_little_left_end_together_when_one_of_them_is_the_next():
    bench = Bench()
    bench.add(range(16))
    bench.run()
    prompts = [range(50, 80), range(16), [*range(16), 99], [*range(16), 98, 97, 96, 95]]
    requests = [bench.add(prompt) for prompt in prompts]
    before = len(bench.plans)
    bench.run()
    first, second, *_ = [plan for plan in bench.plans[before:] if plan.chunks is not None]
    assert [sequence.request for sequence in first.sequences] == requests[:1]
    assert [sequence.request for sequence in second.sequences] == requests[1:]
    assert second.chunks.count_B.tolist() == [0, 1, 4, 0]
    assert [told(request) for request in requests] == [expected(prompt, 5) for prompt in prompts]


def test_a_prefix_that_somebody_is_reading_is_not_read_twice():
    bench = Bench(dataclasses.replace(CONFIG, pages=60))
    prompts = [[*range(40), *tail] for tail in ([1, 2, 3], range(100, 120), [])]
    requests = [bench.add(prompt) for prompt in prompts]
    bench.run()
    for request, prompt in zip(requests, prompts, strict=True):
        assert told(request) == expected(prompt, 5)
    assert [request.cached for request in requests] == [0, 40, 40]


def test_who_waited_for_a_prefix_reads_on_where_its_reader_left():
    bench = Bench(dataclasses.replace(CONFIG, pages=60))
    leader, follower = bench.add(range(48)), bench.add(range(48))
    bench.step()
    while bench.running.sequences[0].rows < 16:
        bench.step()
    bench.running.end(leader, 0.0)
    bench.run()
    assert told(follower) == expected(range(48), 5)
    assert 16 <= follower.cached < 48


def test_other_salts_and_the_unwilling_share_nothing():
    bench = Bench()
    bench.add(range(17), namespace="a")
    bench.run()
    others = [bench.add(range(17), namespace="b"), bench.add(range(17), namespace="a", reuse=False)]
    bench.run()
    assert [request.cached for request in others] == [0, 0]


def test_long_prompts_neither_starve_those_who_decode_nor_each_other():
    bench = Bench(dataclasses.replace(CONFIG, pages=60))
    decoding = bench.add(range(3), 40)
    while not decoding.reply.ids:
        bench.step()
    long = [bench.add(range(seed, seed + 48), 2) for seed in (1, 2)]
    short = bench.add([9, 9, 9], 2)
    kinds = []
    while not all(request.reply.finish_reason for request in [*long, short]):
        before = len(bench.plans)
        bench.step()
        kinds += [plan.shape.kind for plan in bench.plans[before:] if plan.shape]
    assert short.began < min(request.began for request in long)
    longest_read = max(len(run) for run in "".join(kind[0] for kind in kinds).split("d"))
    assert longest_read <= 2 or decoding.reply.finish_reason


def test_who_grows_beyond_the_pages_takes_those_of_the_newest():
    bench = Bench(dataclasses.replace(CONFIG, pages=17))
    first, second = bench.add(range(20), 40), bench.add(range(100, 120), 40)
    bench.run()
    for request, prompt in ((first, range(20)), (second, range(100, 120))):
        assert told(request) == expected(prompt, 40)
    assert first.preemptions == 0


def test_who_is_more_urgent_keeps_its_pages():
    bench = Bench(dataclasses.replace(CONFIG, pages=17))
    patient, urgent = bench.add(range(20), 40, priority=1), bench.add(range(100, 120), 40, priority=0)
    bench.run()
    assert urgent.preemptions == 0
    assert told(patient) == expected(range(20), 40)


def test_a_deadline_ends_a_request_where_it_is():
    bench = Bench(dataclasses.replace(CONFIG, max_num_seqs=1))
    running, waiting = bench.add(range(5), 50, deadline=1.0), bench.add(range(7), 5, deadline=1.0)
    while not running.reply.ids:
        bench.step()
    bench.now = 1.0
    bench.run()
    for request in (running, waiting):
        with pytest.raises(DeadlineError, match="deadline has passed"):
            told(request)
    assert 0 < len(running.reply.ids) < 50


def test_plans_are_never_changed():
    bench = Bench(behind=3)
    request = bench.add(range(20), 30)
    bench.run()
    for plan in bench.plans:
        with pytest.raises(ValueError, match="read-only"):
            plan.batch.table.pages_BM[...] = 0
    assert told(request) == expected(range(20), 30)


# Suspicions

ALWAYS = AnomalyRules(window=2, least_tokens=4, shortest_length=3.0, largest_rate=1.0)  # with two drafts


def test_a_suspicion_that_is_wrong_is_not_noticed():
    bench = Bench(dataclasses.replace(CONFIG, anomalies=ALWAYS), behind=0)
    requests = [bench.add(range(seed, seed + 9), 40, rules=ALWAYS) for seed in range(3)]
    bench.run()
    assert bench.running.counts["suspicions"] == bench.running.counts["benign"] > 3
    for seed, request in enumerate(requests):
        assert told(request) == expected(range(seed, seed + 9), 40)


def garbled(bench, seen):
    """A request of whose prompt a page is garbled once it has been read; the reader has seen something of it or not."""
    request = bench.add(range(9), 40, rules=ALWAYS)
    while not request.reply.ids:
        bench.step()
    if seen:
        next(request.stream)
    bench.device.garble(bench.running.sequences[0].leases[0].page)
    return request


def test_what_nobody_has_seen_is_generated_again():
    bench = Bench(dataclasses.replace(CONFIG, anomalies=ALWAYS), behind=0)
    request = garbled(bench, seen=False)
    bench.run()
    assert bench.running.counts["restarts"] == 1
    assert told(request) == expected(range(9), 40)


def test_what_is_garbled_again_fails_unseen():
    bench = Bench(dataclasses.replace(CONFIG, anomalies=ALWAYS), behind=0)
    request = garbled(bench, seen=False)
    while not bench.running.counts["restarts"]:
        bench.step()
    while not request.reply.ids:
        bench.step()
    request.reply.ids[0] = (request.reply.ids[0] + 1) % STOP
    bench.running.suspect(bench.running.sequences[0])
    bench.run()
    assert bench.running.counts["restarts"] == bench.running.counts["aborts"] == 1
    with pytest.raises(AnomalyError) as error:
        next(request.stream)
    assert error.value.good_tokens == 0


def test_what_was_seen_ends_with_the_count_of_good_tokens():
    bench = Bench(dataclasses.replace(CONFIG, anomalies=ALWAYS), behind=0)
    request = garbled(bench, seen=True)
    bench.run()
    with pytest.raises(AnomalyError, match="became wrong after") as error:
        told(request)
    good, ids = error.value.good_tokens, request.reply.ids
    wanted = expected(range(9), 40)
    assert ids[:good] == wanted[:good]
    assert ids[good] != wanted[good]
    assert len(bench.running.tree) == 0 or bench.add(range(9)).cached == 0


@pytest.mark.parametrize("page_size", [1, A])
@pytest.mark.parametrize("n", range(12))
def test_no_token_of_a_record_goes_unconfirmed(n, page_size):
    """What a chain draws after the last token that it was given is compared with nothing."""
    bench = Bench(dataclasses.replace(CONFIG, page_size=page_size, pages=80), behind=0)
    request = bench.add(range(9), 40, rules=dataclasses.replace(ALWAYS, enabled=False))
    while len(request.reply.ids) < 12:
        bench.step()
    next(request.stream)
    request.reply.ids[n] = (request.reply.ids[n] + 1) % STOP
    bench.running.suspect(bench.running.sequences[0])
    bench.run()
    with pytest.raises(AnomalyError) as error:
        told(request)
    assert error.value.good_tokens == n


def test_who_shares_a_garbled_page_is_confirmed_too():
    bench = Bench(dataclasses.replace(CONFIG, anomalies=ALWAYS), behind=0)
    bench.add(range(9), 1)
    bench.run()
    calm = dataclasses.replace(ALWAYS, enabled=False)
    sharer = bench.add(range(9), 30, rules=calm)
    while not sharer.reply.ids:
        bench.step()
    page = bench.running.sequences[0].leases[0].page
    garbled_one = bench.add([*range(9), 3], 30, rules=ALWAYS)
    while not garbled_one.reply.ids:
        bench.step()
    bench.device.garble(page)
    bench.run()
    assert told(garbled_one) == expected([*range(9), 3], 30)
    assert told(sharer) == expected(range(9), 30)
    assert bench.running.counts["restarts"] == 2


@pytest.mark.parametrize(("draft_seconds", "drafts"), [(0.0, True), (0.1, False)])
def test_much_is_drafted_where_it_pays(draft_seconds, drafts):
    bench = Bench(pace=(0.01, draft_seconds))
    request = bench.add(range(1), 62)
    bench.run()
    assert told(request) == expected(range(1), 62)
    widths = [plan.shape.width for plan in bench.plans if plan.shape and plan.shape.kind == "decode"]
    assert max(widths) == 3
    assert (widths.count(3) > len(widths) / 2) == drafts


def test_rounds_with_fewer_drafts_are_not_judged():
    bench, judged = Bench(pace=(0.01, 0.1)), []
    request = bench.add(range(1), 62)
    request.detector.push = lambda counts, drafts: judged.append(drafts)
    bench.run()
    widths = [plan.shape.width for plan in bench.plans if plan.shape and plan.shape.kind == "decode"]
    assert len(judged) == widths.count(3) < len(widths)
    assert set(judged) == {2}


def test_without_confirmation_a_suspicion_is_enough():
    rules = dataclasses.replace(ALWAYS, confirm=False)
    bench = Bench(dataclasses.replace(CONFIG, anomalies=rules))
    request = bench.add(range(9), 40, rules=rules)
    bench.run()
    with pytest.raises(AnomalyError):
        told(request)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    data=st.data(),
    behind=st.integers(0, 3),
    pages=st.integers(16, 40),
    num_draft=st.integers(0, 2),
    draft_seconds=st.sampled_from([0.0, 0.005, 0.1]),
    suspicious=st.booleans(),
)
def test_whatever_comes_and_goes_every_token_is_right(data, behind, pages, num_draft, draft_seconds, suspicious):
    config = dataclasses.replace(CONFIG, pages=pages, num_draft=num_draft)
    bench = Bench(config, behind, pace=(0.01, draft_seconds))
    requests, cancelled = [], set()
    for _ in range(data.draw(st.integers(1, 40))):
        what = data.draw(st.sampled_from(["add", "add", "step", "step", "step", "cancel"]))
        if what == "add" and len(requests) < 12:
            prompt = [
                *range(data.draw(st.integers(0, 20))),
                *data.draw(st.lists(st.integers(0, 90), min_size=1, max_size=9)),
            ]
            fields = {"rules": dataclasses.replace(ALWAYS, enabled=suspicious)}
            fields |= {"priority": data.draw(st.integers(0, 1)), "client": data.draw(st.sampled_from("ab"))}
            requests.append(bench.add(prompt, data.draw(st.integers(1, 64 - len(prompt))), **fields))
        elif what == "cancel" and requests:
            request = data.draw(st.sampled_from(requests))
            bench.running.end(request, bench.now)
            cancelled.add(request)
        else:
            bench.step()
    bench.run()
    for request in requests:
        wanted, found = expected(request.prompt, request.new_tokens), told(request)
        assert found == wanted[: len(found)], "a wrong token"
        assert found == wanted or request in cancelled
        assert request.replays == 0, "a lease did not hold"
    assert not bench.running.sequences
    assert bench.running.pool.free + bench.running.pool.retiring + len(bench.running.tree) == pages
