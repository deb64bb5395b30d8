"""Readers of strangers' files: whatever is in them, they read it or refuse it in one line. Found with hypothesis."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nearid_personalize.errors import InputError, in_one_line
from nearid_personalize.files import parse_json

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from mutations import DAMAGES, PICTURES, TEXTS, WEIGHTS, Samples, damaged, outcome, with_wrong_value

QUICK = settings(max_examples=25, deadline=None, derandomize=True, database=None)
DAMAGE = st.lists(
    st.tuples(st.sampled_from(DAMAGES), st.integers(0, 2**31 - 1) | st.integers(0, 200), st.integers(0, 2**31 - 1)),
    min_size=1,
    max_size=4,
)


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Samples:
    return Samples(tmp_path_factory.mktemp("samples"))


def check(samples: Samples, kind: str, content: bytes) -> None:
    path, whole, reader = samples.readers[kind]
    found = outcome(path, content, reader)
    path.write_bytes(whole)
    assert found in ("read", "refused"), found


@pytest.mark.parametrize("kind", [*PICTURES, *WEIGHTS, *TEXTS])
def test_whole_files_are_read(samples, kind):
    path, content, reader = samples.readers[kind]
    assert outcome(path, content, reader) == "read"


@pytest.mark.parametrize("kind", [*PICTURES, *WEIGHTS, *TEXTS])
def test_damaged_files_are_read_or_refused(samples, kind):
    @QUICK
    @given(damages=DAMAGE)
    def run(damages):
        check(samples, kind, damaged(samples.readers[kind][1], damages))

    run()


@pytest.mark.parametrize("kind", [*WEIGHTS, *TEXTS])
def test_whole_files_that_say_something_else_are_read_or_refused(samples, kind):
    @QUICK
    @given(seed=st.integers(0, 2**32 - 1))
    def run(seed):
        check(samples, kind, with_wrong_value(kind, samples.readers[kind][1], np.random.default_rng(seed)))

    run()


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("preprocessor", {"size": {"height": [1], "width": [1]}}),
        ("preprocessor", {"size": {"height": {"a": 1}}}),
        ("preprocessor", {"size": 10**30}),
        ("preprocessor", {"size": True}),
        ("preprocessor", {"image_mean": [0.5, "x", 0.5]}),
        ("preprocessor", {"image_std": [0, 1, 1]}),
        ("preprocessor", {"resample": [3]}),
        ("preprocessor", {"max_num_patches": "x"}),
        ("config", {"dtype": "../.."}),
        ("config", {"vision_config": {"layer_norm_eps": {"a": []}}}),
    ],
)
def test_what_broke_a_reader_once_is_refused(samples, kind, change):
    path, whole, reader = samples.readers[kind]
    found = outcome(path, json.dumps({**json.loads(whole), **change}).encode(), reader)
    path.write_bytes(whole)
    assert found == "refused"


@pytest.mark.parametrize("kind", ["preprocessor", "config", "report", "plan"])
def test_json_nested_without_end_is_refused(samples, kind):
    path, whole, reader = samples.readers[kind]
    found = outcome(path, b"[" * 100_000, reader)
    path.write_bytes(whole)
    assert found == "refused"


def test_a_head_with_other_weights_is_refused_in_one_line(samples):
    path, whole, reader = samples.readers["head"]
    found = outcome(path, whole.replace(b'"mlp.fc1.weight"', b'"mlp.xxx.weight"'), reader)
    path.write_bytes(whole)
    assert found == "refused"


def test_json_and_errors_in_one_line():
    with pytest.raises(ValueError, match="nested too deep"):
        parse_json("[" * 100_000)
    assert parse_json('{"a": 1}') == {"a": 1}
    assert in_one_line(InputError("a\n  b")) == "a b" and in_one_line(KeyError()) == "KeyError"
