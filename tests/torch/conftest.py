"""What several of these files use."""

from collections.abc import Iterator

import pytest

from .ranks import Ranks


@pytest.fixture(scope="module")  # their groups keep threads busy as long as they live
def ranks() -> Iterator[Ranks]:
    """Four processes on gloo, started when the first test asks for them."""
    processes = Ranks(4)
    yield processes
    processes.kill()
