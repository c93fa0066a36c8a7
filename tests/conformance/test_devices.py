"""Checks 18, 19 and 20: a converted model on two ranks has the gradients of one process."""

import pytest
from devices import WAYS, compare
from ranks import Ranks
from test_conversion import MODELS

FAST = ("gpt2", "timm ViT")  # two models stand for all where time counts

# Relative to the greatest gradient of a parameter: sums over half a batch each, through the model.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.mark.parametrize("relay", [False, True], ids=["explicit", "relay"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in MODELS]
)
def test_gradients(ranks, name, way, relay):
    errors = ranks.run(compare, name, way, relay)
    if None in errors:
        pytest.skip("the model itself leaves parameters unused")
    assert max(errors) < TOLERANCE
