"""All tests of this folder carry the mark "trainers": ``pytest -m trainers``."""

from collections.abc import Generator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == HERE:
            item.add_marker("trainers")


@pytest.fixture(autouse=True)
def one_thread() -> Generator[None]:
    """Tiny models gain nothing by a second thread, and wait for it where test processes compete."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
