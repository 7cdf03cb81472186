"""What xz learns from texts that it read before."""

import random

from glmjax.evaluation.compression import xz_size, xz_size_after
from glmjax.training.corpus import Document


def noise(seed):
    return Document(f"{seed}.py", "".join(random.Random(seed).choices("abcdefghij", k=4000)))


def test_what_was_read_before_costs_next_to_nothing():
    assert xz_size_after([noise(1)], [noise(2), noise(1)]) < 0.05 * xz_size([noise(1)])


def test_what_was_not_costs_nearly_all_of_it():
    assert xz_size_after([noise(1)], [noise(2)]) > 0.9 * xz_size([noise(1)])
