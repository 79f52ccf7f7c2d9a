"""A pattern by a rule for pairs: what its rule may give."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

import visattn
from visattn import Layout
from visattn.patterns import RuledPattern

GRID = (6, 8)


def ruled(rule):
    @dataclass(frozen=True)
    class Ruled(RuledPattern):
        name: ClassVar[str] = "ruled"

        def check(self, grid):
            """Any grid."""

        def sees(self, query, key):
            return rule(query, key)

    return Ruled()


@pytest.mark.parametrize(
    ("rule", "seen"),
    [
        (lambda query, key: True, np.ones((6, 8, 6, 8), bool)),
        (lambda query, key: query[0] == key[0], np.eye(6, dtype=bool)[:, None, :, None] & np.ones((1, 8, 1, 8), bool)),
        (lambda query, key: key[1] < 2, np.broadcast_to((np.arange(8) < 2), (6, 8, 6, 8))),
    ],
)
def test_a_rule_may_give_bools_that_broadcast(rule, seen):
    assert np.array_equal(visattn.dense_mask(ruled(rule), Layout(GRID)), seen.reshape(48, 48))
    assert visattn.plan(ruled(rule), Layout(GRID)).visible == seen.sum()


@pytest.mark.parametrize("rule", [lambda query, key: query[0] - key[0], lambda query, key: np.ones((3, 5), bool)])
def test_what_is_no_rule_is_told(rule):
    q = torch.randn(1, 48, 2, 16)
    for call in (visattn.plan, visattn.dense_mask, lambda pattern, layout: visattn.attention(q, q, q, pattern, layout)):
        with pytest.raises(ValueError, match=r"sees of Ruled gave (int64|bool) \[.*\] but must give bools"):
            call(ruled(rule), Layout(GRID))
