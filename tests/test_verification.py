"""Same, different or unsure: p-values against their definition, sets of pictures, refusals, and the mini-world."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from nearid_personalize import InputError
from nearid_personalize.cli import main
from nearid_personalize.miniworld import identity_row, photos
from nearid_personalize.scorer.calibration import combined, conformal_threshold, p_values
from nearid_personalize.scorer.scorer import IdentityScorer
from nearid_personalize.scorer.subject import Subject
from nearid_personalize.verification import judge, judge_by_threshold, verify


@pytest.fixture(scope="module")
def scorer():
    return IdentityScorer.from_pretrained("miniworld")


@pytest.fixture(scope="module")
def pictures():
    """Four photos of a test subject, then four more of it, and four of a near-identity."""
    row = identity_row("test", 11)
    shown = [Image.fromarray(rendering.image) for rendering, _ in photos(row.pet, 8)]
    strangers = [Image.fromarray(rendering.image) for rendering, _ in photos(row.distractor_pets[0], 4, seed=1)]
    return shown[:4], shown[4:], strangers


def test_a_p_value_counts_as_the_definition_says():
    generator = torch.Generator().manual_seed(0)
    known = torch.randn(7, 3, generator=generator)
    for score in torch.randn(20, generator=generator):
        higher = sum(float(value) >= float(score) for value in known.flatten())
        assert p_values(score[None], known).item() == pytest.approx((higher + 3) / (8 * 3))


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5])
def test_accepting_by_p_value_is_accepting_by_the_threshold(rate):
    generator = torch.Generator().manual_seed(1)
    known = torch.randn(40, 2, generator=generator)
    scores = torch.randn(200, generator=generator)
    assert ((p_values(scores, known) <= rate) == (scores >= conformal_threshold(known, rate))).all()


@pytest.mark.parametrize("rate", [1 / 61, 0.03, 0.1])
def test_the_stated_rate_holds_for_items_of_several_dependent_pictures(rate):
    generator = torch.Generator().manual_seed(2)
    wrong, trials = 0, 2000
    for _ in range(trials):
        scores = torch.randn(61, 1, generator=generator) + 0.5 * torch.randn(61, 3, generator=generator)
        known, item = scores[:60, :1], scores[60]
        wrong += combined(p_values(item, known), 1 / 61) <= rate
    assert wrong / trials <= rate


def test_two_pictures_can_state_what_one_can():
    best, next_best = torch.tensor([0.05, 0.05]).double(), torch.tensor([0.05, 0.1]).double()
    assert combined(best[:1], float(best[0])) == combined(best, float(best[0])) == pytest.approx(0.05)
    assert combined(next_best, 0.05) == pytest.approx(0.15)


def test_a_higher_score_is_never_less_the_same():
    known = torch.linspace(-0.5, 0.5, 99)[:, None]
    p = p_values(torch.linspace(-1, 1, 50), known)
    assert (p.diff() <= 0).all()


def test_a_score_that_fits_both_or_neither_is_unsure():
    assert judge(0.001, 0.5, 0.01, 0.05) == "same"
    assert judge(0.5, 0.001, 0.01, 0.05) == "different"
    assert judge(0.5, 0.5, 0.01, 0.05) == "unsure"
    assert judge(0.001, 0.001, 0.01, 0.05) == "unsure"
    assert [judge_by_threshold(score, 0.6) for score in (0.5, 0.7, 0.9)] == ["different", "unsure", "same"]


def test_the_subject_is_the_same_and_its_near_identity_is_not(scorer, pictures):
    references, others, strangers = pictures
    answers = verify(scorer, references, [*others, *strangers])
    assert [answer.verdict for answer in answers[:4]] == ["same"] * 4
    assert "same" not in [answer.verdict for answer in answers[4:]]
    assert all(answer.false_accept_rate <= 0.01 < answer.false_reject_rate for answer in answers[:4])
    assert min(answer.score for answer in answers[:4]) > max(answer.score for answer in answers[4:])


def test_several_pictures_of_one_item_are_one_question(scorer, pictures):
    references, others, strangers = pictures
    same, different = verify(scorer, references, [others, strangers], false_accept_rate=0.05)
    singles = verify(scorer, references, others)
    assert (same.verdict, different.verdict) == ("same", "different")
    assert same.score == pytest.approx(float(np.mean([single.score for single in singles])), abs=1e-5)
    # Every picture is more alike than all that is known: the pair states no less than one of them
    assert same.false_accept_rate == max(single.false_accept_rate for single in singles)
    assert 0 <= same.nearest_picture < 4


def test_where_it_differs_is_told_when_the_photos_are_at_hand(scorer, pictures):
    references, _, strangers = pictures
    (answer,) = verify(scorer, references, strangers[:1])
    assert answer.where.heat.max() == 1 and answer.where.score == pytest.approx(answer.score, abs=1e-4)
    (answer,) = verify(scorer, scorer.enroll(references), strangers[:1])
    assert answer.where is None


def test_an_encoder_without_calibration_states_no_rates(scorer, pictures):
    references, others, _ = pictures
    subject = scorer.enroll(references)
    bare = Subject(embeddings=subject.embeddings, threshold=0.8)
    (answer,) = verify(scorer, bare, others[:1])
    assert answer.false_accept_rate is None and answer.false_reject_rate is None
    assert answer.verdict == judge_by_threshold(answer.score, 0.8)


def test_what_cannot_be_answered_is_refused(scorer, pictures):
    references, others, _ = pictures
    with pytest.raises(InputError, match="false_accept_rate 0: give a share between 0 and 1"):
        verify(scorer, references, others, false_accept_rate=0)
    with pytest.raises(InputError, match=r"false_accept_rate 0.0001: 400 known subjects or negatives can state 0.0025"):
        verify(scorer, references, others, false_accept_rate=0.0001)
    with pytest.raises(InputError, match="images: empty"):
        verify(scorer, references, [])
    with pytest.raises(InputError, match="item 1 has no pictures"):
        verify(scorer, references, [others[0], []])


@pytest.fixture(scope="module")
def folders(pictures, tmp_path_factory):
    references, others, strangers = pictures
    root = tmp_path_factory.mktemp("verify")
    for folder, images in (("references", references), ("items/mine", others), ("items/theirs", strangers)):
        (root / folder).mkdir(parents=True)
        for number, image in enumerate(images):
            image.save(root / folder / f"{number}.png")
    others[0].save(root / "items" / "single.png")
    return root


def test_the_command_writes_a_page_and_a_report(folders, tmp_path, capsys):
    arguments = ["verify", "--references", str(folders / "references"), "--images", str(folders / "items")]
    arguments += ["--model", "miniworld", "--out", str(tmp_path / "out"), "--false-accept-rate", "0.05"]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {row["item"]: row["verdict"] for row in report["items"]} == {
        "mine": "same",
        "theirs": "different",
        "single.png": "same",
    }
    assert report["counts"] == {"same": 2, "unsure": 0, "different": 1}
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<article") == 3 and "http" not in page.replace("http-equiv", "")
    printed = capsys.readouterr().out
    assert "same 2  unsure 0  different 1" in printed and "400 subjects of the encoder's calibration bank" in printed


def test_the_command_says_when_nothing_is_the_same(folders, tmp_path, capsys):
    arguments = ["verify", "--references", str(folders / "references"), "--images", str(folders / "items" / "theirs")]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--model", "miniworld", "--out", str(tmp_path), "--maps", "0", "--json"])
    assert stop.value.code == 3
    assert json.loads(capsys.readouterr().out)["counts"]["same"] == 0


def test_the_command_refuses_in_one_line(folders, tmp_path, capsys):
    arguments = ["verify", "--references", str(folders / "references"), "--out", str(tmp_path), "--model", "miniworld"]
    for more, message in (
        (["--images", str(tmp_path / "none")], "none"),
        (["--images", str(folders / "items"), "--false-accept-rate", "2"], "--false-accept-rate 2: give a share"),
        (["--images", str(folders / "items"), "--false-reject-rate", "0.0001"], "false_reject_rate 0.0001: 400 known"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, *more])
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 2 and error.startswith("error: ") and message in error
