import pytest
import torch
from hypothesis import settings

# Two hundred tiny examples of every property; none of them is a matter of time.
settings.register_profile("ecomoe", max_examples=200, deadline=None)
settings.load_profile("ecomoe")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
