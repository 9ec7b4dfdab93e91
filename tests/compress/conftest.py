"""What tests of whole fits share."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def few_objects() -> Iterator[None]:
    """A fit collects garbage whenever it closes a model: what there is before is not looked at each time."""
    gc.freeze()
    yield
    gc.unfreeze()
