import pytest
import torch
from hypothesis import settings

# Looked into for doctests they would be imported by their bare names, which are not unique.
collect_ignore_glob = ["*conftest.py", "benchmarks/*"]

# Two hundred tiny examples of every property; none of them is a matter of time.
settings.register_profile("ecomoe", max_examples=200, deadline=None)
settings.load_profile("ecomoe")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
