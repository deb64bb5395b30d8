"""Where the subject is: masks from models and callables, what is refused, and random parts."""

import numpy as np
import pytest
import torch
from conftest import checkered
from PIL import Image, ImageDraw

from nearid_personalize.distractors.masks import (
    PART_SHARES,
    ModelMasks,
    Segment,
    as_mask,
    load_mask_model,
    mask_fault,
    part_fault,
    random_part,
)
from nearid_personalize.errors import InputError


def box_mask(left: int, top: int, right: int, bottom: int, size: int = 40) -> np.ndarray:
    mask = np.zeros((size, size), bool)
    mask[top:bottom, left:right] = True
    return mask


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (box_mask(10, 10, 30, 30), ""),
        (box_mask(0, 0, 20, 40), ""),  # touches three borders
        (box_mask(10, 10, 15, 15), "2%"),
        (box_mask(1, 1, 40, 40), "90%"),
        (box_mask(0, 18, 40, 22) | box_mask(18, 0, 22, 40), "all four borders"),
    ],
)
def test_what_is_no_subject_is_refused(mask, reason):
    assert reason in mask_fault(mask) and bool(reason) == bool(mask_fault(mask))


def test_a_mask_of_another_size_is_refused_with_both_sizes():
    photo = checkered(0, 40)
    assert as_mask(Image.fromarray(box_mask(1, 1, 9, 9)), photo, "x").sum() == 64
    with pytest.raises(InputError, match="20 x 20, the photo 40 x 40"):
        as_mask(np.zeros((20, 20)), photo, "x")


# --- models ----------------------------------------------------------------------------------------------------------
def test_the_largest_segment_that_can_be_a_subject_is_chosen():
    segments = [Segment(box_mask(5, 5, 15, 15)), Segment(box_mask(5, 5, 25, 25)), Segment(np.ones((40, 40), bool))]
    assert ModelMasks(lambda photo: segments)(checkered(0, 40), "").sum() == 400


def test_a_segment_labelled_as_the_category_goes_before_a_larger_one():
    segments = [Segment(box_mask(5, 5, 30, 30), "sofa, couch"), Segment(box_mask(5, 5, 15, 15), "dog")]
    find = ModelMasks(lambda photo: segments)
    assert find(checkered(0, 40), "dog").sum() == 100
    assert find(checkered(0, 40), "couch").sum() == 625


def test_without_labels_the_text_image_model_tells_the_category():
    from nearid_personalize.floors.adherence import TextImageEncoder
    from nearid_personalize.miniworld import identity_row

    row = next(row for row in (identity_row("test", i, 1) for i in range(50)) if row.pet.category == "teapot")
    view = row.views[0]
    rest = ~view.mask
    rest[:, 60:] = False
    segments = [Segment(rest), Segment(view.mask)]
    find = ModelMasks(lambda photo: segments, TextImageEncoder.from_pretrained("miniworld"))
    assert rest.sum() > view.mask.sum()
    assert np.array_equal(find(Image.fromarray(view.image), "teapot"), view.mask)


def test_a_photo_without_a_subject_is_refused():
    with pytest.raises(InputError, match="found no object"):
        ModelMasks(lambda photo: [Segment(np.ones((40, 40), bool))])(checkered(0, 40), "dog")


@pytest.fixture(scope="module")
def segformer(tmp_path_factory: pytest.TempPathFactory):
    """A real SegFormer checkpoint of two labels, tiny."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessorPil

    torch.manual_seed(0)
    config = SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[7, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        id2label={0: "wall", 1: "dog"},
        label2id={"wall": 0, "dog": 1},
    )
    model = SegformerForSemanticSegmentation(config)
    folder = tmp_path_factory.mktemp("models") / "segformer"
    model.save_pretrained(folder)
    SegformerImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sam(tmp_path_factory: pytest.TempPathFactory):
    """A real SAM checkpoint, tiny."""
    from transformers import SamConfig, SamImageProcessorPil, SamModel, SamProcessor

    torch.manual_seed(0)
    config = SamConfig(
        vision_config={
            "hidden_size": 16,
            "num_pos_feats": 4,
            "output_channels": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "global_attn_indexes": [0],
            "mlp_dim": 16,
        },
        prompt_encoder_config={"hidden_size": 8, "image_size": 32, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config={"hidden_size": 8, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 8},
    )
    folder = tmp_path_factory.mktemp("models") / "sam"
    model = SamModel(config)
    # So sure of its masks that the pipeline does not drop them all
    torch.nn.init.constant_(model.mask_decoder.iou_prediction_head.proj_out.bias, 2.0)
    model.save_pretrained(folder)
    sizes = {"size": {"longest_edge": 32}, "pad_size": {"height": 32, "width": 32}}
    sizes |= {"mask_size": {"longest_edge": 8}, "mask_pad_size": {"height": 8, "width": 8}}
    SamProcessor(SamImageProcessorPil(**sizes)).save_pretrained(folder)
    return folder


def test_a_segmentation_checkpoint_gives_labelled_segments_of_the_photos_size(segformer):
    find = load_mask_model(str(segformer), "cpu")
    found = find.segments(checkered(3, 50).resize((60, 44)))
    assert found and all(segment.mask.shape == (44, 60) for segment in found)
    assert {segment.label for segment in found} <= {"wall", "dog"}


def test_a_mask_generation_checkpoint_gives_segments_of_the_photos_size(sam):
    find = load_mask_model(str(sam), "cpu")
    found = find.segments(checkered(3, 50).resize((60, 44)))
    assert len(found) == 75  # three at each of 25 points: none is doubted
    assert all(segment.mask.shape == (44, 60) and segment.label == "" for segment in found)


def test_what_is_no_mask_model_is_refused_by_name(tmp_path, tiny_nearid_dir):
    for name in (tmp_path / "nothing", tiny_nearid_dir):
        with pytest.raises(InputError, match="--mask-model") as caught:
            load_mask_model(str(name), "cpu")
        assert "\n" not in str(caught.value)


# --- parts -----------------------------------------------------------------------------------------------------------
def connected(mask: np.ndarray) -> bool:
    """By a flood fill from one of its pixels."""
    picture = Image.fromarray(mask.astype(np.uint8) * 255).copy()  # an array's own memory cannot be drawn on
    row, column = np.argwhere(mask)[0]
    ImageDraw.floodfill(picture, (int(column), int(row)), 100)
    return not (np.asarray(picture) == 255).any()


@pytest.mark.parametrize("size", [40, 64, 300])
def test_a_random_part_is_a_connected_piece_of_five_to_sixty_percent(size):
    rows, columns = np.mgrid[:size, :size]
    subject = (rows - size / 2) ** 2 / 1.5 + (columns - size / 2) ** 2 < (0.35 * size) ** 2
    shares = []
    for seed in range(12):
        part = random_part(subject, str(seed))
        assert not (part & ~subject).any() and connected(part)
        assert not part_fault(part, subject)
        shares.append(part.sum() / subject.sum())
    assert min(shares) >= PART_SHARES[0] - 0.02 and max(shares) <= PART_SHARES[1] + 0.02
    assert max(shares) - min(shares) > 0.2
    assert np.array_equal(random_part(subject, "7"), random_part(subject, "7"))


def test_a_part_that_is_nearly_nothing_or_everything_is_refused():
    subject = box_mask(0, 0, 40, 20)
    assert "5% to 60%" in part_fault(box_mask(0, 0, 40, 18), subject)
    assert part_fault(box_mask(0, 0, 4, 4), subject)
    assert not part_fault(box_mask(0, 0, 40, 10), subject)
