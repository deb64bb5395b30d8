"""The page's tab "Who is it?": a visitor's own gallery."""

import gradio as gr
import pytest
from PIL import Image

from nearid_personalize import InputError
from nearid_personalize.demo.handlers import Visit
from nearid_personalize.demo.studio import Studio
from nearid_personalize.demo.visitors import Visitors
from nearid_personalize.demo.who import Who, who_tab
from nearid_personalize.miniworld import example_references, photos, sample_pet
from nearid_personalize.scorer.scorer import IdentityScorer


@pytest.fixture(scope="module")
def studio():
    return Studio(IdentityScorer.from_pretrained("miniworld"), "miniworld", ("miniworld",))


@pytest.fixture
def visit(tmp_path):
    return Visit(Visitors(tmp_path, keep_seconds=60, max_photos=4).new())


def saved(tmp_path, images):
    paths = [str(tmp_path / f"{number}.png") for number in range(len(images))]
    for path, image in zip(paths, images):
        image.save(path)
    return paths


def test_a_pet_is_added_and_known_again_and_a_stranger_is_not(studio, visit, tmp_path):
    who = Who(studio, max_photos=4)
    with pytest.raises(InputError, match="nobody is known yet"):
        who.ask(visit, saved(tmp_path, example_references(0)[0][:1]))
    shown = who.borrow(visit)
    assert shown["who_family"].count("tile") > 10
    rex = [Image.fromarray(rendering.image) for rendering, _ in photos(sample_pet("test", 40), 4)]
    shown = who.add(visit, " Rex <b> ", saved(tmp_path, rex[:3]))
    assert "Rex &lt;b&gt;, 3 photos" in shown["who_family"]
    stranger = Image.fromarray(photos(sample_pet("test", 60), 1)[0][0].image)
    shown = who.ask(visit, saved(tmp_path, [rex[3], stranger]))["who_answer"]
    assert shown.count("It is Rex &lt;b&gt;.") == 1 and shown.count("None of yours.") == 1
    for wrong in (lambda: who.add(visit, "", saved(tmp_path, rex[:1])), lambda: who.add(visit, "x", None)):
        with pytest.raises(InputError):
            wrong()


def test_another_visitor_has_a_gallery_of_their_own(studio, tmp_path):
    visitors = Visitors(tmp_path, keep_seconds=60, max_photos=4)
    one, other = Visit(visitors.new()), Visit(visitors.new())
    who = Who(studio, max_photos=4)
    who.add(one, "Rex", saved(tmp_path, example_references(0)[0][:1]))
    with pytest.raises(InputError, match="nobody is known yet"):
        who.ask(other, saved(tmp_path, example_references(0)[0][1:2]))


def test_what_an_encoder_without_calibration_says(studio, visit, tmp_path):
    bare = IdentityScorer.from_pretrained("miniworld")
    bare.calibration = None
    alone = Studio(bare, "miniworld", ("miniworld",))
    who = Who(alone, max_photos=4)
    who.add(visit, "Rex", saved(tmp_path, example_references(0)[0][:1]))
    shown = who.ask(visit, saved(tmp_path, example_references(0)[0][:1]))["who_answer"]
    assert "It is Rex." in shown and "rule of thumb" in shown


def test_the_tab_is_built(studio):
    with gr.Blocks():
        who_tab(studio, 4, gr.State(None))
