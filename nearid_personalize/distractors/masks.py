"""Where the subject is: masks that lie beside the photos, from a segmentation model, or from a callable; and parts.

A mask is bool [H,W], True = the subject.
"""

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image

from nearid_personalize.distractors.regions import Mask, bounding_box
from nearid_personalize.errors import InputError
from nearid_personalize.floors.adherence import TextImageEncoder
from nearid_personalize.hub import HUB_ERRORS, download_fault

LEAST_COVERAGE, MOST_COVERAGE = 0.02, 0.90
"""Share of the photo that a subject may take; less is too small to repaint, more leaves no background to keep."""
PART_SHARES = (0.05, 0.60)
"""Share of the subject that an edited part may take, as in Mind-the-Glitch."""
_POINTS = 5  # along each axis at which a SAM is asked what is there
_SURE = 0.88  # what a SAM must think of its mask, the default of transformers' pipeline
_GRID = 64  # cells along the longer side in which a random part grows

MaskFinder: TypeAlias = Callable[[Image.Image, str], "Mask | Image.Image"]
"""(photo, category) -> where the subject is; raises InputError where it finds none."""


def mask_fault(mask: Mask) -> str:
    """Why a photo cannot be repainted inside this mask, "" where it can."""
    share = float(mask.mean())
    if share < LEAST_COVERAGE:
        return f"the mask covers {share:.1%} of the photo; it must be {LEAST_COVERAGE:.0%} or more"
    if share > MOST_COVERAGE:
        return f"the mask covers {share:.1%} of the photo; it must be {MOST_COVERAGE:.0%} or less"
    if all(edge.any() for edge in (mask[0], mask[-1], mask[:, 0], mask[:, -1])):
        return "the mask touches all four borders; is it the background?"
    return ""


def as_mask(found: Any, photo: Image.Image, name: str) -> Mask:
    """A mask of any kind as bool [H,W]; raises InputError when its size is not the photo's."""
    mask = np.asarray(found.convert("L") if isinstance(found, Image.Image) else found) > 0
    height, width = mask.shape[:2]
    if mask.ndim != 2 or (width, height) != photo.size:
        raise InputError(
            f"{name}: the mask is {width} x {height}, the photo {photo.width} x {photo.height} once upright; "
            "give one mask pixel for each pixel of the photo"
        )
    return mask


# --- models ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Segment:
    """One thing that a model found in a photo."""

    mask: Mask
    label: str = ""
    """What the model calls it; "" where it does not say."""


@dataclass(frozen=True, eq=False)
class ModelMasks:
    """A `MaskFinder`: the largest object that is the category, as far as the models can say.

    Args:
        segments: photo -> what is in it.
        text_image: tells which segments show the category. Without it the segments' own labels are gone by, and
            where those do not help, size alone.
    """

    segments: Callable[[Image.Image], list[Segment]]
    text_image: TextImageEncoder | None = None

    def __call__(self, photo: Image.Image, category: str) -> Mask:
        """See `MaskFinder`."""
        usable = [segment for segment in self.segments(photo) if not mask_fault(segment.mask)]
        if not usable:
            raise InputError("the mask model found no object that covers 2 % to 90 % of the photo")
        named = [segment for segment in usable if category and _same_word(segment.label, category)]
        if named:
            usable = named
        elif category and self.text_image is not None:
            usable = self._of_category(photo, usable, category)
        return max(usable, key=lambda segment: segment.mask.sum()).mask

    def _of_category(self, photo: Image.Image, segments: list[Segment], category: str) -> list[Segment]:
        """The segments that fit the category's name better than no name at all; raises InputError without any."""
        assert self.text_image is not None, "asked only where there is one"
        texts = self.text_image.embed_texts([f"a photo of a {category}", "a photo of a background"])
        pictures = self.text_image.embed_images([cut_out(photo, segment.mask) for segment in segments])
        fits = pictures @ texts.T
        found = [segment for segment, (own, other) in zip(segments, fits.tolist(), strict=True) if own > other]
        if not found:
            raise InputError(f"the mask model found nothing that looks like {category!r}")
        return found


def cut_out(photo: Image.Image, mask: Mask) -> Image.Image:
    """The masked thing on grey, cropped to it."""
    pixels = np.where(mask[..., None], np.asarray(photo), np.uint8(128))
    return Image.fromarray(pixels).crop(bounding_box(mask))


def _same_word(label: str, category: str) -> bool:
    """Whether a label ("dining table, desk") names the category."""
    wanted = category.lower().strip()
    return any(part.strip() == wanted for part in label.lower().replace("-", " ").split(",")) if label else False


def load_mask_model(name: str, device: str, text_image: TextImageEncoder | None = None) -> MaskFinder:
    """A mask finder from a segmentation or mask-generation checkpoint of transformers, or "rembg".

    name: Hub id or folder; safetensors only, and no remote code is run.

    Raises:
        InputError: it cannot be loaded, or is a model of another kind.
    """
    if name == "rembg":
        return _rembg_masks()
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        load = _generating if "sam" in config.model_type else _segmenting
        segments = load(name, device)
    except (*HUB_ERRORS, ValueError, KeyError, ImportError) as error:
        raise InputError(
            f"--mask-model {name}: {download_fault(error)}; give a segmentation or mask-generation model (MaskFormer, "
            "Mask2Former, SegFormer, DETR, SAM), or put photo.mask.png beside each photo"
        ) from None
    return ModelMasks(segments=segments, text_image=text_image)


def _segmenting(name: str, device: str) -> Callable[[Image.Image], list[Segment]]:
    """Labelled segments of a semantic, instance or panoptic segmentation model."""
    from transformers import pipeline

    model_options = {"use_safetensors": True}
    run = pipeline("image-segmentation", model=name, device=torch.device(device), model_kwargs=model_options)

    def segments(photo: Image.Image) -> list[Segment]:
        found = run(photo)
        return [Segment(mask=as_mask(entry["mask"], photo, "--mask-model"), label=entry["label"]) for entry in found]

    return segments


def _generating(name: str, device: str) -> Callable[[Image.Image], list[Segment]]:
    """What a SAM finds at a grid of points.

    The pipeline of transformers drops masks that repeat others, for which it needs torchvision. Here repeated masks do
    no harm, for one is chosen in the end.
    """
    from transformers import AutoModelForMaskGeneration, AutoProcessor

    model = AutoModelForMaskGeneration.from_pretrained(name, use_safetensors=True).to(device).eval()
    processor = AutoProcessor.from_pretrained(name)

    @torch.no_grad()
    def segments(photo: Image.Image) -> list[Segment]:
        shares = [(number + 0.5) / _POINTS for number in range(_POINTS)]
        points = [[[x * photo.width, y * photo.height]] for y in shares for x in shares]
        inputs = processor(images=photo, input_points=[points], return_tensors="pt").to(device)
        outputs = model(**inputs)
        sizes = [inputs[key].cpu() for key in ("original_sizes", "reshaped_input_sizes") if key in inputs]
        masks = processor.post_process_masks(outputs.pred_masks.cpu(), *sizes)[0].flatten(0, 1)  # [points x 3,H,W]
        sure = outputs.iou_scores[0].flatten().cpu() >= _SURE
        return [Segment(mask=as_mask(mask.numpy(), photo, "--mask-model")) for mask in masks[sure]]

    return segments


def _rembg_masks() -> MaskFinder:
    try:
        import rembg
    except ModuleNotFoundError as error:
        raise InputError(f"--mask-model rembg: needs {error.name}; pip install 'rembg[cpu]'") from None
    session = rembg.new_session()
    return lambda photo, category: as_mask(
        np.asarray(rembg.remove(photo, session=session, only_mask=True)) > 127, photo, "--mask-model rembg"
    )


# --- parts -----------------------------------------------------------------------------------------------------------
def random_part(subject: Mask, seed: str, shares: tuple[float, float] = PART_SHARES) -> Mask:
    """A random connected piece of a subject: it grows from a random place, faster where chance has it.

    seed: any text; the same text gives the same piece. shares: smallest and largest part of the subject.

    The piece grows on a grid of 64 cells along the subject's longer side, and takes whole cells.
    """
    rng = random.Random(f"part/{seed}")
    share = shares[0] + (shares[1] - shares[0]) * rng.random()
    box = bounding_box(subject)
    cells, areas = _cells(subject, box)
    wanted = share * float(areas.sum())
    piece = _grow(cells, areas, wanted, rng)
    whole = Image.fromarray(piece.astype(np.uint8)).resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.NEAREST)
    part = np.zeros_like(subject)
    part[box[1] : box[3], box[0] : box[2]] = np.asarray(whole) > 0
    return part & subject


def _cells(subject: Mask, box: tuple[int, int, int, int]) -> tuple[Mask, np.ndarray]:
    """The subject on a coarse grid: which cells it is in, and how many of its pixels are in each."""
    width, height = box[2] - box[0], box[3] - box[1]
    scale = min(_GRID / max(width, height), 1.0)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    share = Image.fromarray(subject.astype(np.float32)).crop(box).resize(size, Image.Resampling.BOX)
    areas = np.asarray(share)
    return areas > 0, areas


def _grow(cells: Mask, areas: np.ndarray, wanted: float, rng: random.Random) -> Mask:
    """Cells reached first from a random one, until they hold `wanted`; each cell takes a random time to enter."""
    places = [(int(row), int(column)) for row, column in np.argwhere(cells)]
    start = places[int(rng.random() * len(places))]
    grown, seen, held = np.zeros_like(cells), {start}, 0.0
    front = [(0.0, start)]
    while front and held < wanted:
        time, (row, column) = heapq.heappop(front)
        grown[row, column] = True
        held += float(areas[row, column])
        for near in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            inside = 0 <= near[0] < cells.shape[0] and 0 <= near[1] < cells.shape[1]
            if inside and cells[near] and near not in seen:
                seen.add(near)
                heapq.heappush(front, (time + 0.3 + rng.random(), near))
    return grown


def part_fault(part: Mask, subject: Mask, shares: tuple[float, float] = PART_SHARES) -> str:
    """Why a part cannot be edited, "" where it can."""
    share = float((part & subject).sum()) / float(subject.sum())
    low, high = shares
    slack = 0.02  # of whole grid cells
    if not low - slack <= share <= high + slack:
        return f"the part is {share:.1%} of the subject; {low:.0%} to {high:.0%} works"
    return ""
