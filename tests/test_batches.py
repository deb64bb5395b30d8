"""Batches that are made smaller when memory runs out."""

import pytest
import torch

from nearid_personalize.batches import in_halves


def work_of(room: int):
    """Doubles numbers, at most `room` of them at once."""

    def work(numbers: list[int]) -> list[int]:
        if len(numbers) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return [2 * number for number in numbers]

    return work


def test_all_at_once_where_there_is_room():
    assert in_halves(work_of(5), [1, 2, 3, 4, 5]) == [[2, 4, 6, 8, 10]]


def test_halves_until_they_fit_in_the_order_given():
    sizes = []
    assert in_halves(work_of(2), [1, 2, 3, 4, 5], sizes.append) == [[2, 4], [6], [8, 10]]
    assert sizes == [3, 2]


def test_a_lone_item_that_does_not_fit_is_an_error():
    with pytest.raises(torch.OutOfMemoryError):
        in_halves(work_of(0), [1, 2])


def test_any_other_error_is_raised_at_once():
    asked = []

    def broken(numbers: list[int]) -> None:
        asked.append(len(numbers))
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        in_halves(broken, [1, 2])
    assert asked == [2]
