"""Figures in every look: with --long those that the ordinary tests leave out."""

from collections.abc import Callable

import pytest

from tests.figures.test_looks import FIGURES, LOOKS, TRIED, check_texts


@pytest.mark.parametrize(("name", "look"), [(name, look) for name in FIGURES for look in LOOKS if (name, look) not in TRIED])
def test_nothing_is_cut_too_small_or_over_other_text(name: str, look: str, times: Callable[[int, int], int], tries) -> None:
    if not times(0, 1):
        pytest.skip("with --long")
    with tries("a figure in another look"):
        check_texts(name, look)
