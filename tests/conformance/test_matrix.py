"""Every conformance check runs on every model, or says why it does not apply."""

import matrix
import pytest
from page import PAGE, table


def test_the_page_is_what_the_tests_say():
    assert PAGE.read_text() == table(), "run python tests/conformance/page.py"


@pytest.mark.parametrize("check", matrix.CHECKS)
def test_no_cell_is_empty(check):
    table()
    covered = {name for cover in matrix.COVERS[check] for name in cover.models}
    left_out = matrix.LEFT_OUT.get(check, {})
    assert covered, f"no test does check {check}"
    assert covered | left_out.keys() == set(matrix.MODELS)
    assert not covered & left_out.keys()


def test_all_checks_are_there():
    assert {int(check.split()[0]) for check in matrix.CHECKS} == set(range(1, 26))
