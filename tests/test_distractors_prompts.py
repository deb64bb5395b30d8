"""What is asked for: another individual of the subject's kind."""

import json

import pytest

from nearid_personalize.distractors.prompts import (
    ANIMAL,
    GOODS,
    VOCABULARY,
    Kind,
    Prompts,
    contradicted,
    drawn,
    read_prompts,
    read_vocabulary,
)
from nearid_personalize.errors import InputError

CAPTION = "a photo of a brown dog with spotted fur and floppy ears in a park"


def test_a_contradicted_caption_differs_in_as_many_words_as_asked_for():
    for number in (1, 2, 3):
        for seed in range(20):
            other = contradicted(ANIMAL, CAPTION, str(seed), (number, number))
            changed = [(a, b) for a, b in zip(CAPTION.split(), other.split(), strict=True) if a != b]
            assert len(changed) == number
            for old, new in changed:
                assert any(old in group and new in group for group in ANIMAL.groups.values())


def test_a_contradicted_caption_keeps_the_place():
    assert all(contradicted(ANIMAL, CAPTION, str(seed), (3, 3)).endswith("in a park") for seed in range(20))


def test_no_two_colours_of_a_caption_become_one():
    kind = Kind(template="", groups={"colour": ("red", "green", "blue", "white", "black", "pink")})
    for seed in range(50):
        other = contradicted(kind, "a red dog with a green hat and blue eyes", str(seed), (2, 3)).split()
        assert len({other[1], other[5], other[8]}) == 3


def test_words_inside_other_words_are_no_words():
    assert contradicted(GOODS, "a sacred bored teapot", "0", (2, 4)) == "a sacred bored teapot"


def test_the_longest_words_are_found_first():
    kind = Kind(template="", groups={"a": ("golden", "silver"), "b": ("golden retriever", "pug")})
    assert contradicted(kind, "a golden retriever", "0", (1, 2)) == "a pug"


def test_draws_repeat_by_seed_and_differ_between_seeds():
    found = {drawn(ANIMAL, "dog", str(seed)) for seed in range(30)}
    assert len(found) > 25
    assert drawn(ANIMAL, "dog", "7") == drawn(ANIMAL, "dog", "7")


def test_a_breed_may_stand_for_its_category():
    assert any("corgi" in drawn(ANIMAL, "dog", str(seed)) for seed in range(200))
    assert all("horse" in drawn(ANIMAL, "horse", str(seed)) for seed in range(20))


def test_a_category_of_several_words_is_of_its_last_words_kind():
    assert VOCABULARY.kind("old street dog") is ANIMAL
    assert VOCABULARY.kind("dog bowl") is GOODS
    assert VOCABULARY.kind("espresso machine") is GOODS


def test_prompts_prefer_a_list_then_the_caption_then_the_vocabulary():
    assert Prompts(listed=("another {category}",)).prompt("cat", CAPTION, "1") == "another cat"
    assert Prompts().prompt("dog", CAPTION, "1").endswith("in a park")
    assert Prompts().prompt("dog", None, "1") == drawn(ANIMAL, "dog", "1")
    assert Prompts().prompt("dog", "my best friend", "1") == drawn(ANIMAL, "dog", "1")


def test_a_vocabulary_of_ones_own(tmp_path):
    file = tmp_path / "words.json"
    file.write_text(json.dumps({"robot": {"template": "a {metal} {category}", "metal": ["tin", "steel"]}}))
    vocabulary = read_vocabulary(file)
    assert drawn(vocabulary.kind("robot"), "robot", "0") in ("a tin robot", "a steel robot")
    assert vocabulary.kind("dog") is ANIMAL


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "no json",
        '{"dog": {"colour": ["a", "b"]}}',
        '{"dog": {"template": "a {size} dog", "colour": ["a", "b"]}}',
        '{"dog": {"template": "a {colour} dog", "colour": ["a"]}}',
    ],
)
def test_a_bad_vocabulary_is_one_line(tmp_path, content):
    file = tmp_path / "words.json"
    file.write_text(content)
    with pytest.raises(InputError, match="--vocabulary") as caught:
        read_vocabulary(file)
    assert "\n" not in str(caught.value)


def test_prompts_from_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a red {category}\n\n  a blue one \n")
    assert read_prompts(file) == ("a red {category}", "a blue one")
    file.write_text("\n")
    with pytest.raises(InputError, match="--prompts"):
        read_prompts(file)
    with pytest.raises(InputError, match="--prompts"):
        read_prompts(tmp_path / "none.txt")
