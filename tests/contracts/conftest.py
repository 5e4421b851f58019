"""vLLM engines hold memory and process-wide state: each test ends those that it started."""

import pytest


@pytest.fixture(autouse=True)
def _end_engines():
    yield
    from test_engine import started

    while started:
        started.pop().close()
