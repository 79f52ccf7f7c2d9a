"""What compiled code remembers of a forward for its backward."""

import pytest

pytest.importorskip("diffusers")

from visattn.layout import Layout
from visattn.patterns import parse
from visattn.pipelines.patch.decision import Cut, Decision
from visattn.pipelines.patch.stock import Stock


@pytest.mark.parametrize(
    "layouts",
    [
        (),
        (Layout((6, 8), 5, 1),),
        (Layout((2, 3), 0, 4), Layout((3, 2), 1, 3)),
        (Layout((6, 8), 0, 4, Layout((6, 8), 13, 4)),),
    ],
    ids=["stock", "one", "of each sample", "keys of their own"],
)
def test_a_decision_comes_back_from_its_bytes(layouts):
    made = Decision(layouts, parse("na(window=3x3)"), "triton", -1, Stock(True, "flash"), ("a",))
    assert Decision.decode(made.encode()) == made
    shared = made._replace(cut=Cut(1, (5, 3), True, "0"))
    assert Decision.decode(shared.encode()) == shared
