import pytest

from nearid_personalize.training.patience import out_of_patience


@pytest.mark.parametrize(
    ("improved", "patience", "expected"),
    [
        ([], 2, False),
        ([False], 2, False),
        ([False, False], 2, True),
        ([True, False], 2, False),
        ([True, False, False], 2, True),
        ([True, False, False, True], 2, False),
        ([False] * 9, 0, False),
    ],
)
def test_patience_ends_after_so_many_measurements_without_a_better_one(improved, patience, expected):
    assert out_of_patience(improved, patience) is expected
