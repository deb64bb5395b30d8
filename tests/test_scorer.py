import json
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model

from nearid_personalize import IdentityScorer, InputError, NearIDModel, Subject
from nearid_personalize.driftmap import drift_map
from nearid_personalize.encoder.checkpoints import save_head
from nearid_personalize.images import load_image as decode
from nearid_personalize.rewards import identity_reward
from nearid_personalize.scorer.calibration import CalibrationBank, ThresholdOrigin, leave_one_out_scores
from nearid_personalize.scorer.subject import (
    SINGLE_REFERENCE_THRESHOLD,
    UNCALIBRATED_MARGIN,
    identity_scores,
    save_calibration,
    uncalibrated_threshold,
)

AGGREGATIONS = ("mean", "max", "centroid")


def picture(seed, size=(40, 30)):
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)


@pytest.fixture(scope="module")
def scorer(tiny_nearid_dir):
    return IdentityScorer.from_pretrained(tiny_nearid_dir)


@pytest.fixture
def pictures():
    return [picture(seed, (40 + seed, 30)) for seed in range(7)]


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


# --- scores of embeddings


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_scores_agree_with_plain_loops(aggregation):
    embeddings, references = unit(6, 8), unit(3, 8, seed=1)
    expected = []
    for e in embeddings.tolist():
        cosines = [sum(x * y for x, y in zip(e, r, strict=True)) for r in references.tolist()]
        total = [sum(column) for column in zip(*references.tolist(), strict=True)]
        centroid = sum(x * y for x, y in zip(e, total, strict=True)) / sum(x * x for x in total) ** 0.5
        expected.append({"mean": sum(cosines) / 3, "max": max(cosines), "centroid": centroid}[aggregation])
    assert identity_scores(embeddings, references, aggregation).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_better_match_scores_better(aggregation):
    references, stranger = unit(1, 8).expand(3, -1) + 0.1 * unit(3, 8, seed=1), unit(1, 8, seed=2)
    references = F.normalize(references, dim=-1)
    towards = F.normalize(references.mean(dim=0, keepdim=True), dim=-1)
    steps = torch.cat([F.normalize((1 - t) * stranger + t * towards, dim=-1) for t in (0, 0.3, 0.6, 0.9, 1)])
    scores = identity_scores(steps, references, aggregation).tolist()
    assert scores == sorted(scores) and scores[-1] > scores[0] + 0.3


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_order_of_references_changes_nothing(aggregation):
    embeddings, references = unit(6, 8), unit(4, 8, seed=1)
    shuffled = references[torch.tensor([2, 0, 3, 1])]
    expected = identity_scores(embeddings, references, aggregation)
    assert torch.allclose(identity_scores(embeddings, shuffled, aggregation), expected, atol=1e-6)
    expected_threshold = uncalibrated_threshold(references, aggregation)
    assert uncalibrated_threshold(shuffled, aggregation) == pytest.approx(expected_threshold, abs=1e-6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_scores_stay_in_range(aggregation):
    reference = unit(1, 512)
    scores = identity_scores(torch.cat([reference, -reference]), reference, aggregation)
    assert scores.tolist() == pytest.approx([1, -1]) and scores.abs().max() <= 1


def test_uncalibrated_threshold_is_the_references_own_likeness_less_a_margin():
    references = unit(3, 8)
    cosines = references @ references.T
    expected = float(cosines[0, 1] + cosines[0, 2] + cosines[1, 2]) / 3 - UNCALIBRATED_MARGIN
    assert uncalibrated_threshold(references) == pytest.approx(expected, abs=1e-6)
    assert uncalibrated_threshold(references[:1]) == SINGLE_REFERENCE_THRESHOLD
    alike = F.normalize(references[:1] + 0.1 * references, dim=-1)
    assert uncalibrated_threshold(alike) > uncalibrated_threshold(references)


# --- embedding pictures


def test_embeddings_are_unit_float32_and_independent_of_batch_size(tiny_nearid_dir, scorer, pictures):
    expected = scorer.embed(pictures)
    assert expected.shape == (7, 32) and expected.dtype == torch.float32
    assert torch.allclose(expected.norm(dim=1), torch.ones(7))
    for batch_size in (1, 2, 7):
        scorer_of = IdentityScorer(
            NearIDModel.from_pretrained(tiny_nearid_dir), 32, (0.5,) * 3, (0.5,) * 3, batch_size=batch_size
        )
        assert torch.allclose(scorer_of.embed(pictures), expected, atol=1e-5)


def test_float_batches_outside_their_range_are_refused(scorer):
    batch = torch.rand(3, 3, 40, 40)
    with pytest.raises(InputError, match=r"images: float pixels from -1 to .*\[0, 1\]"):
        scorer.embed(torch.where(torch.arange(3)[:, None, None, None] == 1, -1.0, batch))
    with pytest.raises(InputError, match="float pixels"):
        scorer.score(batch * 255, scorer.enroll(batch))
    with pytest.raises(InputError, match="references: float pixels"):
        drift_map(scorer, batch[:1], batch * 2 - 1)
    with pytest.raises(InputError, match="pixels: float pixels"):
        identity_reward(batch * 2 - 1, scorer, scorer.enroll(batch))


def test_a_picture_of_nan_has_no_score_and_spoils_no_other(scorer):
    batch = torch.rand(3, 3, 32, 32)
    subject = scorer.enroll(batch)
    expected = scorer.score(batch, subject)
    batch[1, 0, 0, 0] = float("nan")
    scores = scorer.score(batch, subject)
    assert scores[1].isnan() and torch.equal(scores[[0, 2]], expected[[0, 2]])


def test_every_kind_of_input_embeds_alike(scorer, pictures, tmp_path):
    same_size = [p.resize((32, 32)) for p in pictures]
    expected = scorer.embed(same_size)
    for index, image in enumerate(same_size):
        image.save(tmp_path / f"{index}.png")
    arrays = np.stack([np.asarray(image) for image in same_size])
    tensor = torch.from_numpy(arrays).permute(0, 3, 1, 2)
    for images in (tmp_path, sorted(tmp_path.iterdir()), tuple(same_size), iter(same_size), arrays, list(arrays)):
        assert torch.allclose(scorer.embed(images), expected, atol=1e-5)
    for images in (tensor, tensor.float() / 255, list(tensor)):
        assert torch.allclose(scorer.embed(images), expected, atol=1e-5)
    for image in (same_size[0], tmp_path / "0.png", (tmp_path / "0.png").read_bytes(), arrays[0], tensor[0]):
        assert torch.allclose(scorer.embed(image), expected[:1], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(tiny_nearid_dir, scorer, pictures, dtype):
    half = IdentityScorer.from_pretrained(tiny_nearid_dir, dtype=dtype)
    assert half.model.backbone.post_layernorm.weight.dtype == dtype
    assert half.model.head.probe.dtype == torch.float32
    embeddings = half.embed(pictures)
    assert embeddings.dtype == torch.float32
    assert F.cosine_similarity(embeddings, scorer.embed(pictures)).min() > 0.99


# --- streaming


def scorer_in_batches(folder, size, backend=None):
    model = NearIDModel.from_pretrained(folder)
    return IdentityScorer(model, 32, (0.5,) * 3, (0.5,) * 3, batch_size=size, compile_backend=backend)


def test_a_generator_is_read_only_as_far_as_needed_and_order_is_kept(tiny_nearid_dir, scorer):
    """At most two batches wait and one runs, however long the generator is."""
    taken = done = most = 0

    def many():
        nonlocal taken
        for seed in range(50):
            taken += 1
            yield picture(seed % 7, (20 + seed % 5, 30))

    small = scorer_in_batches(tiny_nearid_dir, 4)
    features = small._features

    def watched(pixels):
        nonlocal done, most
        most = max(most, taken - done)
        done += len(pixels)
        return features(pixels)

    small._features = watched
    embeddings = small.embed(many())
    assert taken == done == 50 and most <= 3 * 4
    assert torch.allclose(embeddings, scorer.embed(list(many())), atol=1e-5)


def test_decoding_goes_on_while_the_model_runs(tiny_nearid_dir, pictures, monkeypatch):
    """The model waits, in its first batch, until a picture of the second is decoded: so threads must decode it."""
    fifth_decoded = threading.Event()

    def load_image(source):
        image = decode(source)
        if source is pictures[4]:
            fifth_decoded.set()
        return image

    monkeypatch.setattr("nearid_personalize.scorer.scorer.load_image", load_image)
    small = scorer_in_batches(tiny_nearid_dir, 4)
    features, waited = small._features, []

    def slow(pixels):
        waited.append(fifth_decoded.wait(timeout=30))
        return features(pixels)

    small._features = slow
    assert small.embed(pictures[:6]).shape == (6, 32) and waited == [True, True]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_bad_file_is_reported_and_the_rest_go_on(tiny_nearid_dir, pictures, tmp_path, batch_size):
    for seed, image in enumerate(pictures):
        image.save(tmp_path / f"{seed}.png")
    (tmp_path / "2.png").write_text("no picture")
    (tmp_path / "5.png").write_bytes((tmp_path / "5.png").read_bytes()[:50])
    scorer = scorer_in_batches(tiny_nearid_dir, batch_size)
    with pytest.raises(InputError, match=r"2\.png"):
        scorer.embed(tmp_path)
    with pytest.raises(InputError, match=r"2\.png"):
        scorer.enroll(tmp_path)
    failures = {}
    embeddings = scorer.embed(tmp_path, on_error=failures.__setitem__)
    assert {index: f"{index}.png" in str(error) for index, error in failures.items()} == {2: True, 5: True}
    good = [0, 1, 3, 4, 6]
    assert embeddings[[2, 5]].isnan().all()
    assert torch.allclose(embeddings[good], scorer.embed([pictures[i] for i in good]), atol=1e-5)
    subject = scorer.enroll(pictures[:2])
    assert scorer.score(tmp_path, subject, failures.__setitem__).isnan().nonzero()[:, 0].tolist() == [2, 5]
    ranking = scorer.rank(tmp_path, subject, failures.__setitem__)
    assert sorted(entry.index for entry in ranking.rejected if entry.reason == "not scored") == [2, 5]
    assert sorted(entry.index for entry in ranking.entries[-2:]) == [2, 5]


def test_nothing_but_bad_files(scorer):
    failures = []
    embeddings = scorer.embed([b"x", b"y"], on_error=lambda index, error: failures.append(index))
    assert embeddings.shape == (2, 32) and embeddings.isnan().all() and failures == [0, 1]


def test_other_faults_are_raised_and_no_thread_is_left(scorer):
    before = threading.active_count()

    def broken():
        yield picture(0)
        raise RuntimeError("the generator's own fault")

    for images, fault in ((broken(), RuntimeError), ([picture(0), b"x"], InputError), ([picture(0), 3], InputError)):
        with pytest.raises(fault):
            scorer.embed(images)
    assert threading.active_count() == before


def test_one_opened_file_given_many_times(scorer, tmp_path):
    """Pillow reads an opened file on first use, which two threads must not do at once."""
    picture(0, (600, 600)).save(tmp_path / "a.jpg")
    expected = scorer.embed(tmp_path / "a.jpg")
    for _ in range(10):
        opened = Image.open(tmp_path / "a.jpg")
        assert torch.allclose(scorer.embed([opened] * 12), expected.expand(12, -1), atol=1e-5)


def test_compiled_embeddings_agree(tiny_nearid_dir, scorer, pictures):
    # "aot_eager" traces the model as "inductor" does, and spares the test a C++ compiler.
    compiled = scorer_in_batches(tiny_nearid_dir, 3, "aot_eager")
    assert torch.allclose(compiled.embed(pictures), scorer.embed(pictures), atol=1e-5)


@pytest.mark.parametrize("images", [[], (), iter([]), torch.zeros(0, 3, 8, 8), np.zeros((0, 8, 8, 3), np.uint8)])
def test_no_pictures_is_refused(scorer, images):
    with pytest.raises(InputError, match="empty"):
        scorer.embed(images)


# --- subjects


def test_identical_picture_scores_one(scorer):
    subject = scorer.enroll([picture(0)])
    assert scorer.score([picture(0)], subject).tolist() == pytest.approx([1], abs=1e-6)
    several = scorer.enroll([picture(0), picture(1)], aggregation="max")
    assert scorer.score([picture(0), picture(1)], several).tolist() == pytest.approx([1, 1], abs=1e-6)


def test_a_picture_like_the_reference_scores_above_another(scorer):
    subject = scorer.enroll([picture(0)])
    mixed = [Image.blend(picture(0), picture(5), t) for t in (0, 0.1, 0.5, 1)]
    scores = scorer.score(mixed, subject).tolist()
    assert scores == sorted(scores, reverse=True)


def test_order_of_photos_changes_nothing(scorer, pictures):
    forth, back = scorer.enroll(pictures[:4]), scorer.enroll(pictures[3::-1])
    assert back.threshold == pytest.approx(forth.threshold, abs=1e-6)
    assert torch.allclose(scorer.score(pictures, forth), scorer.score(pictures, back), atol=1e-6)


def test_each_score_is_its_pictures_own(scorer, pictures):
    subject = scorer.enroll(pictures[:3])
    expected = scorer.score(pictures, subject)
    assert torch.allclose(scorer.score(pictures[::-1], subject), expected.flip(0), atol=1e-6)
    assert torch.allclose(torch.cat([scorer.score(p, subject) for p in pictures]), expected, atol=1e-5)


def scorer_with(folder, calibration):
    return IdentityScorer(NearIDModel.from_pretrained(folder), 32, (0.5,) * 3, (0.5,) * 3, calibration)


def bank(rate=0.1, aggregation="centroid"):
    return CalibrationBank.from_embeddings(
        unit(30, 3, 32), unit(30, 2, 32, seed=1), unit(30, 2, 32, seed=2), rate, aggregation
    )


def test_the_bank_sets_the_threshold_for_the_number_of_photos(tiny_nearid_dir, pictures):
    scorer = scorer_with(tiny_nearid_dir, bank())
    for count, aggregation in ((1, None), (3, None), (3, "max"), (5, None)):
        subject = scorer.enroll(pictures[:count], aggregation)
        chosen = aggregation or "centroid"
        assert subject.aggregation == chosen
        assert (subject.threshold, subject.origin) == bank().known_scores(count, chosen).threshold_at(0.1)
        assert (subject.origin.source, subject.origin.guaranteed) == ("bank", count <= 3)
    strict = scorer.enroll(pictures[:3], false_accept_rate=0.04)
    assert strict.origin.false_accept_rate == 0.04 and strict.threshold > scorer.enroll(pictures[:3]).threshold
    with pytest.raises(InputError, match=r"takes 99 negatives .* here are 30;"):
        scorer.enroll(pictures[:3], false_accept_rate=0.01)


def test_given_negatives_set_the_threshold(scorer, pictures):
    negatives = [picture(seed) for seed in range(100, 120)]
    subject = scorer.enroll(pictures[:3], negatives=negatives, false_accept_rate=0.05)
    scores = scorer.score(negatives, subject)
    assert scores.max() < subject.threshold < scores.max() + 1e-6
    own = leave_one_out_scores(subject.embeddings)
    assert subject.origin == ThresholdOrigin(
        "negatives", 0.05, True, 20, float((own < subject.threshold).double().mean()), 3
    )
    assert [entry.accepted for entry in scorer.rank(negatives, subject)] == [False] * 20
    lenient = scorer.enroll(pictures[:3], negatives=negatives, false_accept_rate=0.5)
    assert (scorer.score(negatives, lenient) >= lenient.threshold).sum() == 9  # floor(.5 * 21) of 21, one to come
    assert scorer.enroll(pictures[0], negatives=negatives).origin.false_reject_rate is None


def test_negatives_come_on_top_of_the_bank_which_knows_genuine_pictures(tiny_nearid_dir, pictures):
    negatives = [picture(seed) for seed in range(100, 115)]
    own = scorer_with(tiny_nearid_dir, None).enroll(pictures[:3], "centroid", negatives, 0.1)
    lax = bank()
    strict = replace(lax, impostor=lax.genuine[:, :1] * 0 + 0.999)  # [B,1,R]: all but the subject itself
    sources = []
    for calibration in (lax, strict):
        scorer = scorer_with(tiny_nearid_dir, calibration)
        alone, subject = scorer.enroll(pictures[:3]), scorer.enroll(pictures[:3], negatives=negatives)
        assert subject.threshold == max(own.threshold, alone.threshold)
        genuine, _ = calibration.scores(3, "centroid")
        assert subject.origin.num_genuine == 60
        assert subject.origin.false_reject_rate == float((genuine < subject.threshold).double().mean())
        assert scorer.enroll(pictures[:3], negatives=negatives[:2]).threshold >= alone.threshold
        with pytest.raises(InputError, match=r"takes 49 negatives .* here are 15;"):
            subject.at(0.02)
        sources.append(subject.origin.source)
    assert sources == ["negatives", "bank"]


def test_too_few_negatives(scorer, pictures):
    subject = scorer.enroll(pictures[:3], negatives=pictures[3:])
    assert subject.origin.false_accept_rate == pytest.approx(1 / 5)
    assert "at most 20.00%" in subject.describe()
    with pytest.raises(InputError, match=r"0\.05: takes 19 negatives .* here are 4; .* ask for 0\.2 or"):
        scorer.enroll(pictures[:3], negatives=pictures[3:], false_accept_rate=0.05)
    with pytest.raises(InputError, match="negatives"):
        scorer.enroll(pictures[:3], false_accept_rate=0.05)
    with pytest.raises(InputError, match="empty"):
        scorer.enroll(pictures[:3], negatives=[])


def test_another_rate_needs_no_pictures(scorer, pictures):
    negatives = [picture(seed) for seed in range(100, 120)]
    subject = scorer.enroll(pictures[:3], "max", negatives, 0.05)
    for rate in (0.05, 0.1, 0.4):
        again, enrolled = subject.at(rate), scorer.enroll(pictures[:3], "max", negatives, rate)
        assert again.threshold == pytest.approx(enrolled.threshold, abs=1e-6)
        assert (again.origin, again.aggregation) == (enrolled.origin, "max")
    assert subject.at(0.4).threshold < subject.threshold and subject.at(0.4).at(0.05).threshold == subject.threshold
    with pytest.raises(InputError, match="nothing is known"):
        scorer.enroll(pictures[:3]).at(0.05)


def test_references_that_would_be_rejected_are_pointed_out(scorer, pictures):
    subject = scorer.enroll(pictures[:3])
    own = subject.reference_scores
    assert torch.equal(own, leave_one_out_scores(subject.embeddings))
    assert "references" not in Subject(subject.embeddings, float(own.min()) - 0.01).describe()
    odd = Subject(subject.embeddings, float(own.sort().values[1]))
    assert odd.describe().endswith("; 1 of 3 references score less against the others")


def test_the_fingerprint_is_the_references_own(scorer, pictures):
    subject = scorer.enroll(pictures[:3])
    assert subject.fingerprint == Subject(subject.embeddings.clone(), 0.1).fingerprint
    others = [scorer.enroll(pictures[1:4]), scorer.enroll(pictures[2::-1]), scorer.enroll(pictures[:3], "max")]
    assert len({subject.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_subject_round_trip(scorer, pictures, tmp_path):
    path = tmp_path / "me.safetensors"
    negatives = [picture(seed) for seed in range(100, 120)]
    for subject in (
        scorer.enroll(pictures[:3], aggregation="centroid"),
        scorer.enroll(pictures[0], negatives=negatives),
        scorer.enroll(pictures[:3], "max", negatives, 0.1),
    ):
        subject.save(path)
        again = Subject.load(path)
        assert torch.equal(again.embeddings, subject.embeddings) and again.fingerprint == subject.fingerprint
        assert (again.threshold, again.aggregation) == (subject.threshold, subject.aggregation)
        assert again.origin == subject.origin
        if subject.known:
            assert again.at(0.3).threshold == subject.at(0.3).threshold
            assert again.at(0.3).origin == subject.at(0.3).origin
        assert len(again.known) == len(subject.known)
    assert [path.name for path in tmp_path.iterdir()] == ["me.safetensors"]


def test_files_that_are_no_subject_are_refused(tiny_nearid_dir, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        Subject.load(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    for path in (tmp_path / "text.safetensors", tiny_nearid_dir / "model.safetensors"):
        with pytest.raises(InputError, match="not a saved subject"):
            Subject.load(path)


def test_subjects_that_cannot_be_are_refused(scorer, pictures):
    with pytest.raises(ValueError, match="at least one row"):
        Subject(torch.zeros(0, 8), 0.5)
    with pytest.raises(ValueError, match="mean, max, centroid"):
        scorer.enroll(pictures, aggregation="median")
    with pytest.raises(InputError, match="enroll the photos again"):
        scorer.score(pictures, Subject(unit(2, 8), 0.5))


# --- ranking


def test_ranking_is_best_first_and_splits_at_the_threshold(scorer, pictures):
    subject = scorer.enroll(pictures[2])
    scores = scorer.score(pictures, subject)
    middle = float(scores.median())
    ranking = scorer.rank(pictures, Subject(subject.embeddings, middle))
    assert [entry.index for entry in ranking] == scores.argsort(descending=True).tolist()
    assert ranking.entries[0].index == 2 and len(ranking) == 7
    assert [entry.index for entry in ranking.accepted] == [e.index for e in ranking if e.score >= middle]
    assert ranking.accepted + ranking.rejected == ranking.entries and len(ranking.accepted) == 4
    assert all(entry.reason == "" for entry in ranking.accepted)
    assert all(f"below threshold {middle:.3f}" in entry.reason for entry in ranking.rejected)


# --- loading


def test_preprocessing_comes_from_the_folder(tiny_nearid_dir, scorer, tmp_path, pictures):
    assert (scorer.image_size, scorer.image_mean, scorer.image_std) == (32, (0.5,) * 3, (0.5,) * 3)
    NearIDModel.from_pretrained(tiny_nearid_dir).save_pretrained(tmp_path)
    assert torch.equal(IdentityScorer.from_pretrained(tmp_path).embed(pictures), scorer.embed(pictures))
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"size": {"height": 32, "width": 32}, "image_mean": [0.1] * 3, "image_std": [0.9] * 3})
    )
    other = IdentityScorer.from_pretrained(str(tmp_path))
    assert (other.image_mean, other.image_std) == ((0.1,) * 3, (0.9,) * 3)
    assert not torch.allclose(other.embed(pictures), scorer.embed(pictures), atol=1e-3)


def test_a_head_alone_and_a_bare_trunk_of_another_family(tmp_path, pictures):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    Dinov2Model(Dinov2Config(**shape, image_size=32, patch_size=8)).save_pretrained(tmp_path / "trunk")
    processor = {"size": {"shortest_edge": 37}, "crop_size": {"height": 32, "width": 32}, "resample": 2}
    (tmp_path / "trunk" / "preprocessor_config.json").write_text(json.dumps(processor))
    bare = IdentityScorer.from_pretrained(tmp_path / "trunk")
    assert (bare.image_size, bare.resample, bare.image_mean) == (32, "bilinear", (0.485, 0.456, 0.406))
    save_head(bare.model, tmp_path / "head", str(tmp_path / "trunk"), bare.preprocessing)
    expected = bare.embed(pictures)
    assert torch.allclose(IdentityScorer.from_pretrained(tmp_path / "head").embed(pictures), expected, atol=1e-6)
    (tmp_path / "trunk").rename(tmp_path / "moved")
    moved = IdentityScorer.from_pretrained(tmp_path / "head", trunk=tmp_path / "moved")
    assert torch.allclose(moved.embed(pictures), expected, atol=1e-6)


def test_a_bank_is_read_and_checked(tiny_nearid_dir, tmp_path, pictures):
    NearIDModel.from_pretrained(tiny_nearid_dir).save_pretrained(tmp_path)
    save_calibration(bank(), tmp_path)
    scorer = IdentityScorer.from_pretrained(tmp_path)
    expected = scorer_with(tiny_nearid_dir, bank()).enroll(pictures[:2])
    subject = scorer.enroll(pictures[:2])
    assert (subject.threshold, subject.origin) == (expected.threshold, expected.origin)
    whole = (tmp_path / "calibration.safetensors").read_bytes()
    tensors = {name: tensor.contiguous() for name, tensor in bank().tensors().items()}
    for damage in (
        lambda path: path.write_bytes(whole[:100]),
        lambda path: save_file(tensors, path),
        lambda path: save_file(tensors, path, {"false_accept_rate": "x", "aggregation": "mean"}),
        lambda path: save_file(tensors, path, {"false_accept_rate": "0.1", "aggregation": "median"}),
        lambda path: save_file(
            {"likeness": tensors["likeness"]}, path, {"false_accept_rate": "0.1", "aggregation": "max"}
        ),
    ):
        damage(tmp_path / "calibration.safetensors")
        with pytest.raises(InputError, match=r"calibration\.safetensors") as refused:
            IdentityScorer.from_pretrained(tmp_path)
        assert "\n" not in str(refused.value)


def test_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"lacks model\.safetensors"):
        IdentityScorer.from_pretrained(tmp_path)


def test_scorer_imports_no_pipeline_library():
    # accelerate is not listed: transformers imports it by itself wherever it is installed.
    code = "import sys, nearid_personalize.scorer; print({'diffusers', 'peft', 'gradio'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
