"""Places: nobody has more than its own, and nobody more than there are."""

import contextlib

import pytest

from jaxlora.core.errors import Overloaded, RateLimited
from serve.access.places import Places


def test_an_owner_at_its_own_limit_is_told_so_and_others_get_in():
    places = Places("uploads", 3)
    with places.held("a", 2), places.held("a", 2):
        with pytest.raises(RateLimited, match="2 uploads"), places.held("a", 2):
            pass
        with places.held("b", 2), pytest.raises(Overloaded, match="3 uploads"), places.held("c", 2):
            pass
        with places.held("c", 2):
            pass


def test_a_place_comes_back_however_its_holder_ends():
    places = Places("uploads", 1)
    for _ in range(3):
        with contextlib.suppress(RuntimeError), places.held("a", 1):
            raise RuntimeError
    assert places._held == {}
