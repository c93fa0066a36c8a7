"""A converted model on two ranks has the gradients of one process."""

import pytest
from devices import WAYS, compare
from matrix import MODELS, covers
from ranks import Ranks

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
@covers("18", "19", "20", slow=tuple(name for name in MODELS if name not in FAST))
def test_gradients(ranks, name, way, relay):
    assert max(ranks.run(compare, name, way, relay)) < TOLERANCE
