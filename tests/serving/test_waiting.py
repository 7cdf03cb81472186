"""Who waits is admitted in turn: by tokens between clients, by priority with age, within limits."""

import pytest

from glmjax.model.sampling_params import SamplingParams
from glmjax.serving.errors import QueueFullError
from glmjax.serving.request import Request
from glmjax.serving.waiting import Waiting


def asked(client="a", tokens=10, **fields):
    return Request([1] * tokens, SamplingParams(temperature=0), 1, client=client, arrived=0.0, **fields)


def waiting(**limits):
    return Waiting(**{"most": 100, "most_of_client": 100} | limits)


def put(queue, request):
    queue.reserve(request.client)
    queue.push(request)


def served(queue, now=0.0):
    order = []
    while len(queue):
        expected = queue.next(now)
        order.append(queue.pop(now))
        assert order[-1] is expected
    return order


def test_one_client_is_served_in_order():
    queue, requests = waiting(), [asked() for _ in range(5)]
    for request in requests:
        put(queue, request)
    assert served(queue) == requests


def test_a_flood_does_not_keep_others_waiting():
    queue = waiting()
    for _ in range(50):
        put(queue, asked("flood"))
    for _ in range(3):
        queue.pop(0.0)
    late = asked("late")
    put(queue, late)
    assert served(queue).index(late) <= 1


def test_clients_take_turns_by_tokens():
    """Who asks for three times as much gets a turn a third as often."""
    queue = waiting()
    for _ in range(12):
        put(queue, asked("small", tokens=9))
        put(queue, asked("large", tokens=29))
    first = [request.client for request in served(queue)[:12]]
    assert first.count("small") == 9


def test_a_lower_priority_goes_first_until_the_other_has_waited_long():
    queue, patient, urgent = waiting(ageing=5.0), asked(priority=2), asked(priority=0)
    urgent.arrived = 9.0
    put(queue, patient)
    put(queue, urgent)
    assert queue.next(9.0) is urgent
    assert queue.next(10.0) is patient  # has risen by two, and came first


def test_limits_are_named_and_nothing_is_lost():
    queue = waiting(most=3, most_of_client=2)
    put(queue, asked())
    put(queue, asked())
    with pytest.raises(QueueFullError, match="2 requests of this client"):
        put(queue, asked())
    put(queue, asked("b"))
    with pytest.raises(QueueFullError, match="3 requests wait already"):
        put(queue, asked("c"))
    assert len(served(queue)) == 3


def test_a_preempted_request_is_next_of_its_client_and_never_refused():
    queue, preempted = waiting(most=1), asked()
    put(queue, asked())
    queue.push_back(preempted)
    assert served(queue)[0] is preempted


def test_a_request_can_leave():
    queue, stays, leaves = waiting(), asked(), asked()
    put(queue, stays)
    put(queue, leaves)
    assert queue.remove(leaves)
    assert not queue.remove(leaves)
    assert served(queue) == [stays]


def test_an_empty_queue_has_nobody_next():
    assert waiting().next(0.0) is None
    with pytest.raises(IndexError, match="nobody waits"):
        waiting().pop(0.0)
