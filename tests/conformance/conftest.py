import pytest
from matrix import build, inputs_of


@pytest.fixture
def dense(name):
    return build(name)


@pytest.fixture
def inputs(dense):
    return inputs_of(dense)
