"""Floors: copies of references and of one another, prompts that are not shown, pictures that are none."""

import io
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import checkered, tiny_tokenizer
from PIL import Image, ImageEnhance, ImageOps
from safetensors.torch import save
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from nearid_personalize.encoder.checkpoints import load_encoder
from nearid_personalize.errors import InputError
from nearid_personalize.floors.adherence import AdherenceFloor, TextImageEncoder
from nearid_personalize.floors.copies import (
    COPY_LIMIT,
    CopyFloor,
    copy_rate,
    copy_similarity,
    diversity,
    near_duplicates,
    thumbnails,
)
from nearid_personalize.floors.quality import QualityFloor, QualityProbe, QualityRates, find_quality_floor, save_quality
from nearid_personalize.miniworld import View, example_references, photos, render, sample_pet
from nearid_personalize.scorer.scorer import IdentityScorer


@pytest.fixture(scope="module")
def references() -> list[Image.Image]:
    return example_references(0)[0]


def as_jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=50)
    return Image.open(buffer)


COPIES = {
    "itself": lambda image: image,
    "mirrored": ImageOps.mirror,
    "compressed": as_jpeg,
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.75),
    "paler": lambda image: ImageEnhance.Contrast(image).enhance(0.7),
    "cropped": lambda image: image.crop((4, 4, 60, 60)).resize((64, 64)),
    "enlarged": lambda image: image.resize((300, 300)),
    "moved": lambda image: Image.fromarray(np.roll(np.asarray(image), (3, -4), (0, 1))),
    "mirrored and cropped": lambda image: ImageOps.mirror(image).crop((3, 0, 61, 58)),
}

# --- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", COPIES)
def test_altered_copies_of_a_reference_are_named(references, how):
    copies = [COPIES[how](reference) for reference in references]
    reasons = CopyFloor.from_references(references).judge(copies)
    for number, reason in enumerate(reasons, start=1):
        assert reason.startswith(f"copies reference {number} (")


def test_the_same_subject_elsewhere_is_no_copy(references):
    elsewhere = [Image.fromarray(shot.image) for shot, _ in photos(example_references(0)[2], 8)[5:]]
    assert CopyFloor.from_references(references).judge(elsewhere, "a photo") == [""] * 3


def test_another_subject_in_the_same_place_is_no_copy():
    a, b = (Image.fromarray(render(sample_pet("test", index), "park", View()).image) for index in (0, 5))
    copied, other = CopyFloor.from_references([a]).judge([a, b])
    assert copied and not other


def test_similarity_is_one_for_itself_and_falls_with_damage(references):
    small = thumbnails(references)
    assert copy_similarity(small, small).diagonal() == pytest.approx(torch.ones(len(small)), abs=1e-4)
    steps = [Image.blend(references[0], checkered(1, 64), share) for share in (0.0, 0.3, 0.6, 0.9)]
    fallen = copy_similarity(thumbnails(steps), small[:1])[:, 0].tolist()
    assert fallen == sorted(fallen, reverse=True) and fallen[-1] < COPY_LIMIT
    assert min(fallen) >= -1 and max(fallen) <= 1 + 1e-5


def test_flat_pictures_copy_nothing():
    flat = Image.new("RGB", (20, 30), (90, 90, 90))
    assert copy_rate([flat], [flat]) == 0


def test_the_limit_decides_and_rates_count(references):
    images = [references[1], checkered(3)]
    assert CopyFloor.from_references(references, limit=1.1).judge(images) == ["", ""]
    assert CopyFloor.from_references(references, limit=-1.0).judge(images) != ["", ""]
    assert copy_rate(images, references) == 0.5


def test_the_best_of_each_group_of_duplicates_stays(references):
    a, b = references[:2]
    images = [COPIES["compressed"](a), b, a, COPIES["mirrored"](b), checkered(0)]
    assert near_duplicates(images, [0, 1, 2, 3, 4]) == [None, None, 0, 1, None]
    assert near_duplicates(images, [3, 2, 4, 1, 0]) == [2, 3, None, None, None]
    assert near_duplicates(images, [4, 2]) == [None] * 5
    assert near_duplicates(images, range(5), limit=1.1) == [None] * 5


def test_diversity_falls_when_pictures_repeat(references):
    assert diversity([references[0]] * 3) == pytest.approx(0, abs=1e-4)
    assert diversity(references) > diversity([references[0], *references[:3]]) > 0
    assert math.isnan(diversity(references[:1]))


def test_no_pictures_are_refused():
    with pytest.raises(InputError, match=r"^images: "):
        CopyFloor.from_references([])


# --- prompt adherence ------------------------------------------------------------------------------------------------

PLACES = ("space", "park", "kitchen")


@pytest.fixture(scope="module")
def encoder() -> TextImageEncoder:
    return TextImageEncoder.from_pretrained("miniworld")


@pytest.fixture(scope="module")
def shown() -> dict[str, Image.Image]:
    """One test subject (a dog), by place."""
    pet = sample_pet("test", 0, "dog")
    return {context: Image.fromarray(shot.image) for shot, context in photos(pet, 8)}


def in_place(place: str) -> str:
    return f"a photo of a dog in {place}"


@pytest.mark.parametrize("place", PLACES)
def test_what_shows_the_prompt_passes_and_the_rest_says_why(encoder, shown, place):
    floor = AdherenceFloor(encoder, contrasts=tuple(in_place(other) for other in shown if other != place))
    reasons = floor.judge(list(shown.values()), in_place(place))
    for context, reason in zip(shown, reasons):
        assert (reason == "") == (context == place)
        assert reason == "" or (reason.startswith("does not show the prompt (-") and reason.endswith(" below .00)"))


def test_references_are_what_must_be_beaten(encoder, shown):
    elsewhere = [image for context, image in shown.items() if context not in ("space", "sea")]
    floor = AdherenceFloor.from_pretrained("miniworld", floor=0.1, references=elsewhere)
    assert floor.judge([shown["space"]], in_place("space")) == [""]
    assert all(floor.judge([shown["sea"], *elsewhere], in_place("space")))


def test_the_lead_is_over_the_best_rival(encoder, shown):
    images, contrasts = list(shown.values()), (in_place("park"), in_place("sea"))
    references = encoder.embed_images(images[:2])
    pictures = encoder.embed_images(images)
    prompt, *rivals = encoder.embed_texts([in_place("space"), *contrasts])
    scores = AdherenceFloor(encoder, 0, None, contrasts, references).scores(images, in_place("space"))
    for image, score in zip(pictures, scores):
        against = [float(image @ rival) for rival in rivals] + [float(row @ prompt) for row in references]
        assert float(score) == pytest.approx(float(image @ prompt) - max(against), abs=1e-5)
    plain = AdherenceFloor(encoder).scores(images, in_place("space"))
    assert plain == pytest.approx(pictures @ prompt, abs=1e-5)


def test_text_stands_for_the_prompt(encoder, shown):
    images = list(shown.values())
    with_text = AdherenceFloor(encoder, text=in_place("sea")).scores(images, "sks")
    assert torch.equal(with_text, AdherenceFloor(encoder).scores(images, in_place("sea")))


def test_batches_do_not_change_embeddings(encoder, shown):
    images = list(shown.values())
    one_by_one = TextImageEncoder(encoder.model, encoder.tokenizer, encoder.preprocessing, batch_size=1)
    assert one_by_one.embed_images(images) == pytest.approx(encoder.embed_images(images), abs=1e-5)


def test_a_floor_needs_something_to_stand_on():
    with pytest.raises(InputError, match=r"^floor: "):
        AdherenceFloor.from_pretrained("miniworld")


def text_image_model(kind: str):
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**vision, "vocab_size": len(tiny_tokenizer()), "max_position_embeddings": 20, "projection_size": 32}
    vision |= {"image_size": 32, "patch_size": 8}
    ends = {"bos_token_id": tiny_tokenizer().bos_token_id, "eos_token_id": tiny_tokenizer().eos_token_id}
    torch.manual_seed(0)
    if kind == "siglip":
        return SiglipModel(SiglipConfig(text_config=text | ends | {"pad_token_id": 1}, vision_config=vision))
    return CLIPModel(CLIPConfig(text_config=text | ends, vision_config=vision, projection_dim=16))


@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_any_siglip_or_clip_folder_works(tmp_path, kind):
    text_image_model(kind).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    floor = AdherenceFloor.from_pretrained(tmp_path, floor=-1.1)
    images = [checkered(seed) for seed in range(3)]
    scores = floor.scores(images, "sks dog " * 40)  # longer than the model reads
    assert scores.shape == (3,) and scores.abs().max() <= 1 + 1e-5 and len(set(scores.tolist())) == 3
    assert floor.judge(images, "sks dog") == ["", "", ""]


def test_text_is_read_to_its_end(tmp_path):
    text_image_model("clip").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    encoder = TextImageEncoder.from_pretrained(tmp_path)
    alone, beside = encoder.embed_texts(["sks"]), encoder.embed_texts(["sks", "a much longer text"])
    assert alone[0] == pytest.approx(beside[0], abs=1e-5) and not torch.allclose(beside[0], beside[1], atol=1e-3)


def test_encoders_without_text_and_folders_without_tokenizer_are_refused(tiny_nearid_dir, tmp_path):
    with pytest.raises(InputError, match="embed texts too"):
        TextImageEncoder.from_pretrained(tiny_nearid_dir)
    text_image_model("siglip").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"lacks its tokenizer; put tokenizer\.json or spiece\.model"):
        TextImageEncoder.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="its tokenizer cannot be read") as error:
        TextImageEncoder.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        TextImageEncoder.from_pretrained(tmp_path)


def first_siglip(folder: Path, vocabulary: bytes) -> Path:
    """A folder as those of SigLIP's first version: the vocabulary is a SentencePiece model."""
    text_image_model("siglip").save_pretrained(folder)
    (folder / "spiece.model").write_bytes(vocabulary)
    settings = {"tokenizer_class": "SiglipTokenizer", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_the_first_siglips_vocabulary_is_read(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    vocabulary = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a photo of a dog in space", "a photo of a cat in the snow"] * 20),
        model_writer=vocabulary,
        vocab_size=40,
        hard_vocab_limit=False,
        bos_id=-1,
        pad_id=-1,
        eos_id=1,
        unk_id=0,
        minloglevel=2,
    )
    encoder = TextImageEncoder.from_pretrained(first_siglip(tmp_path, vocabulary.getvalue()))
    dog, same, cat = encoder.embed_texts(["a photo of a dog", "A photo of a DOG!", "a photo of a cat"])
    assert torch.equal(dog, same) and not torch.allclose(dog, cat, atol=1e-3)


def test_without_sentencepiece_the_first_siglip_says_what_it_needs(tmp_path):
    # In a process of its own: transformers looks for the package once.
    code = f"""
import sys
sys.modules["sentencepiece"] = None
from nearid_personalize.floors import TextImageEncoder
TextImageEncoder.from_pretrained({str(first_siglip(tmp_path, b"never read"))!r})
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stderr.splitlines()[-1].endswith("its tokenizer needs sentencepiece; pip install sentencepiece")


# --- picture quality -------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tiny_nearid_dir, tmp_path) -> Path:
    """A copy of the tiny checkpoint, to be given a quality floor."""
    return Path(shutil.copytree(tiny_nearid_dir, tmp_path / "checkpoint"))


def rates(threshold: float = 0.5) -> QualityRates:
    return QualityRates(threshold, {"finished": 0.01}, {"blur": 0.1}, {"finished": 100}, {"blur": 50}, "test pictures")


def give_floor(folder: Path, threshold: float = 0.5) -> None:
    torch.manual_seed(1)
    model, preprocessing, _ = load_encoder(folder)
    save_quality(folder, model, preprocessing, QualityProbe(32, hidden=8), rates(threshold))


def test_a_saved_floor_comes_back_with_its_rates(checkpoint):
    give_floor(checkpoint)
    images = [checkered(seed) for seed in range(3)]
    floor = QualityFloor.from_pretrained(checkpoint)
    assert floor.rates == rates() and floor.threshold == 0.5
    scorer = IdentityScorer.from_pretrained(checkpoint)
    shared = QualityFloor.from_pretrained(checkpoint, scorer)
    assert shared.model is scorer.model and torch.equal(shared.scores(images), floor.scores(images))
    assert floor.scores(images).min() >= 0 and floor.scores(images).max() <= 1
    found = find_quality_floor(checkpoint, scorer)
    assert found is not None and torch.equal(found.scores(images), floor.scores(images))


def test_reasons_say_the_quality_and_the_threshold(checkpoint):
    give_floor(checkpoint)
    images = [checkered(seed) for seed in range(4)]
    scores = QualityFloor.from_pretrained(checkpoint).scores(images)
    middle = float(scores.sort().values[1:3].mean())
    reasons = QualityFloor.from_pretrained(checkpoint, threshold=middle).judge(images, "any prompt")
    assert [reason == "" for reason in reasons] == (scores >= middle).tolist()
    refused = int(scores.argmin())
    assert reasons[refused] == f"quality {scores[refused]:.2f} below {middle:.2f}".replace("0.", ".")


def test_the_probe_reads_tokens_in_any_order_and_number():
    torch.manual_seed(0)
    probe, tokens = QualityProbe(16, hidden=4), torch.randn(3, 9, 16)
    assert torch.allclose(probe(tokens), probe(tokens[:, torch.randperm(9)]), atol=1e-5)
    assert torch.allclose(probe(tokens), probe(torch.cat([tokens, tokens], dim=1)), atol=1e-5)


def test_half_precision_is_the_same_trunk_and_another_trunk_is_not(checkpoint, tmp_path):
    give_floor(checkpoint)
    images = [checkered(seed) for seed in range(3)]
    half = QualityFloor.from_pretrained(checkpoint, dtype=torch.bfloat16)
    assert torch.allclose(half.scores(images), QualityFloor.from_pretrained(checkpoint).scores(images), atol=0.02)
    model, _, _ = load_encoder(checkpoint)
    with torch.no_grad():
        model.backbone.encoder.layers[1].mlp.fc2.weight.mul_(-3)
    model.save_pretrained(checkpoint)
    with pytest.raises(InputError, match="another trunk"):
        QualityFloor.from_pretrained(checkpoint)


def test_a_new_head_keeps_the_floor(checkpoint):
    give_floor(checkpoint)
    before = QualityFloor.from_pretrained(checkpoint).scores([checkered(0)])
    model, _, _ = load_encoder(checkpoint)
    model.reset_head().save_pretrained(checkpoint)
    assert torch.equal(QualityFloor.from_pretrained(checkpoint).scores([checkered(0)]), before)


def test_without_a_file_there_is_no_floor_and_it_says_so(checkpoint):
    with pytest.raises(InputError, match=r"quality.safetensors: no such file.*train_quality"):
        QualityFloor.from_pretrained(checkpoint)
    with pytest.warns(UserWarning, match=r"has no quality.safetensors"):
        assert find_quality_floor(checkpoint) is None


@pytest.mark.parametrize("content", [b"", b"no safetensors", save({"answer": torch.zeros(2)})])
def test_damaged_files_are_refused(checkpoint, content):
    (checkpoint / "quality.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="not a saved quality probe"):
        QualityFloor.from_pretrained(checkpoint)
