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


@pytest.fixture(scope="session")
def record():
    """Measure a small shape once, into such a record as the benchmark keeps."""
    from tests.benchmarks import layer
    from tests.benchmarks.shapes import Shape

    return layer.measure(
        Shape(64, 16, num_experts=4, top_k=2, d_hidden=8),
        device=torch.device("cpu"),
        seconds=0.0,
        fewest=2,
        most=2,
        compiled=False,
        only=["none"],
    )
