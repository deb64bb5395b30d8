"""What identity cannot see: is it a picture at all, does it show the prompt, is it a copy of a reference photo.

Each floor judges finished pictures: `judge(images, prompt)` gives one reason per picture, "" for those that pass.
`near_duplicates` finds copies among the candidates themselves. Copies are told from pixels, the rest from encoders.

Shape letters: N pictures, M others, R references, T tokens, D width, S side in pixels.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from nearid_personalize.checkpoints import TOKENIZER_FILES, checkpoint_folder, load_weights
from nearid_personalize.encoder import NearIDModel, load_encoder
from nearid_personalize.errors import InputError
from nearid_personalize.images import to_square, write_atomically
from nearid_personalize.preprocessing import Preprocessing
from nearid_personalize.trunks import default_preprocessing

if TYPE_CHECKING:
    from nearid_personalize.scorer import IdentityScorer


class Floor(Protocol):
    """Anything that can say why a finished picture is not to be accepted, whatever its identity score."""

    def judge(self, images: Sequence[Image.Image], prompt: str) -> list[str]:
        """One reason per picture, "" for those that pass."""
        ...


def _short(value: float) -> str:
    """.12, 1.00, -.03"""
    return f"{value:.2f}".replace("0.", ".", 1)


# --- picture quality -------------------------------------------------------------------------------------------------

QUALITY_FILE = "quality.safetensors"
"""The probe of a checkpoint's trunk, beside its weights; `trainers/train_quality.py` writes it."""

_SAME_TRUNK = 0.999  # cosine of answers to the same picture: float types differ by less, trunks by more


class QualityProbe(nn.Module):
    """A trunk's tokens -> is this a picture? Every token is read alone, then their mean and their maximum decide.

    width: D of the tokens. hidden: how many things are read from each.
    """

    def __init__(self, width: int, hidden: int = 48) -> None:
        super().__init__()
        self.read = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU())
        self.decide = nn.Linear(2 * hidden, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """[N,T,D] -> log-odds [N], larger = more of a picture."""
        read = self.read(tokens)  # [N,T,hidden]
        return self.decide(torch.cat([read.mean(dim=1), read.amax(dim=1)], dim=1))[:, 0]


@dataclass(frozen=True)
class QualityRates:
    """A quality threshold and how it errs, all in [0, 1].

    false_alarm: share of good pictures refused, by kind. miss: share of bad pictures that pass, by kind. The counts
    say of how many; measured_on says of which.
    """

    threshold: float
    false_alarm: Mapping[str, float]
    miss: Mapping[str, float]
    num_good: Mapping[str, int]
    num_bad: Mapping[str, int]
    measured_on: str


@torch.no_grad()
def picture_tokens(model: NearIDModel, preprocessing: Preprocessing, images: Sequence[Image.Image]) -> Tensor:
    """Pictures -> float32 [N,T,D] on the CPU, 64 at a time."""
    batches = [images[start : start + 64] for start in range(0, len(images), 64)]
    return torch.cat([model.tokens(preprocessing(batch, model.device)).float().cpu() for batch in batches])


def _answer(model: NearIDModel, preprocessing: Preprocessing) -> Tensor:
    """[D]: what the trunk says to one fixed picture, by which it is known again in any float type."""
    ramp = Image.linear_gradient("L")
    picture = Image.merge("RGB", [ramp, ramp.rotate(90), ramp.rotate(180)])
    return picture_tokens(model, preprocessing, [picture])[0].mean(dim=0)


def save_quality(
    folder: str | Path, model: NearIDModel, preprocessing: Preprocessing, probe: QualityProbe, rates: QualityRates
) -> Path:
    """Write `quality.safetensors`, whole or not at all, the rates as JSON in its metadata; returns its path."""
    tensors = {name: value.detach().contiguous() for name, value in probe.state_dict().items()}
    tensors["answer"] = _answer(model, preprocessing)
    path = Path(folder) / QUALITY_FILE
    write_atomically(path, save(tensors, {"format": "pt", "quality": json.dumps(asdict(rates))}))
    return path


@dataclass(frozen=True, eq=False)
class QualityFloor:
    """Refuses what is no picture, half-formed, damaged, however alike it scores.

    rates: what `probe` was measured to do at its threshold. threshold: the smallest quality, in [0, 1], that passes.
    """

    model: NearIDModel
    preprocessing: Preprocessing
    probe: QualityProbe
    rates: QualityRates
    threshold: float

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        scorer: "IdentityScorer | None" = None,
        threshold: float | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "QualityFloor":
        """The floor beside a NearID checkpoint: folder, Hub id, or "miniworld".

        scorer: the scorer made of the same checkpoint, so that its model is not loaded twice.
        threshold: the measured one unless given; higher is stricter.

        Raises InputError when there is no such file (see `find_quality_floor`), it cannot be read, or it belongs to
        another trunk.
        """
        folder = _quality_folder(name_or_folder)
        path = folder / QUALITY_FILE
        if not path.is_file():
            raise InputError(f"{path}: no such file, so this checkpoint has no quality floor; {_HOW_TO_GET_ONE}")
        if scorer is None:
            model, preprocessing, _ = load_encoder(folder, dtype)
            model = model.to(device)
        else:
            model, preprocessing = scorer.model, scorer.preprocessing
        probe, rates, answer = _read_quality(path)
        given = _answer(model, preprocessing)
        if given.shape != answer.shape or F.cosine_similarity(given, answer, dim=0) < _SAME_TRUNK:
            raise InputError(f"{path}: measured on another trunk than this one; {_HOW_TO_GET_ONE}")
        return cls(model, preprocessing, probe, rates, rates.threshold if threshold is None else threshold)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "QualityFloor":
        """Move the model to `device`, its trunk in `dtype`; returns this floor."""
        self.model.to(device=device).cast_trunk(dtype)
        return self

    @torch.no_grad()
    def scores(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures -> quality [N] in [0, 1], larger = more of a picture."""
        return self.probe(picture_tokens(self.model, self.preprocessing, images)).sigmoid()

    def judge(self, images: Sequence[Image.Image], prompt: str = "") -> list[str]:
        """ "quality .12 below .50". The prompt plays no part."""
        return [
            f"quality {_short(score)} below {_short(self.threshold)}" if score < self.threshold else ""
            for score in self.scores(images).tolist()
        ]


_HOW_TO_GET_ONE = "train one with trainers/train_quality.py"


def find_quality_floor(name_or_folder: str | Path, scorer: "IdentityScorer | None" = None) -> QualityFloor | None:
    """The checkpoint's quality floor; where it has none, None and a warning that says so."""
    folder = _quality_folder(name_or_folder)
    if not (folder / QUALITY_FILE).is_file():
        warnings.warn(
            f"{name_or_folder} has no {QUALITY_FILE}: damaged pictures are not told from good ones; {_HOW_TO_GET_ONE}",
            stacklevel=2,
        )
        return None
    return QualityFloor.from_pretrained(folder, scorer)


def _quality_folder(name_or_folder: str | Path) -> Path:
    if str(name_or_folder) == "miniworld":
        from nearid_personalize.miniworld import weights_dir  # the toy world's code is not needed otherwise

        return weights_dir("nearid")
    return checkpoint_folder(name_or_folder)


def _read_quality(path: Path) -> tuple[QualityProbe, QualityRates, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            rates = QualityRates(**json.loads((file.metadata() or {})["quality"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        answer = tensors.pop("answer")
        hidden, width = tensors["read.1.weight"].shape
        probe = QualityProbe(width, hidden)
        probe.load_state_dict(tensors)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError):
        raise InputError(f"{path}: not a saved quality probe; {_HOW_TO_GET_ONE}") from None
    return probe.eval(), rates, answer


# --- copies ----------------------------------------------------------------------------------------------------------

COPY_LIMIT = 0.9
"""From this similarity on a picture counts as a copy; benchmarks/quality_floor.py measures what it misses."""

_KEPT = 0.8  # share of a picture's side that is compared: its centre, against windows of the other picture
_COMPARED = 24  # pixels a side
_THUMBNAIL = round(_COMPARED / _KEPT)
_SIZES = (0.66, 0.7, 0.75, 0.8, 0.85, 0.91, 0.96)  # of the windows, as shares of the side: for crops both ways
_REACH, _STEPS = 0.1, 9  # how far windows are shifted, as a share of the side, and in how many steps


def thumbnails(images: Sequence[Image.Image]) -> Tensor:
    """Pictures of any sizes -> float32 [N,3,S,S] in [0, 1], all that `copy_similarity` looks at."""
    if not images:
        raise InputError("images: an empty sequence; give at least one picture")
    return torch.stack([to_square(image, _THUMBNAIL) for image in images]).float() / 255


def copy_similarity(images: Tensor, originals: Tensor) -> Tensor:
    """Thumbnails [N,3,S,S], [M,3,S,S] -> [N,M] in [-1, 1]: how well a picture is explained as a copy of an original.

    The picture's centre against windows of the original, of any of seven sizes, shifted and mirrored: the largest
    normalised correlation of their colours (each channel less its mean). High only where the whole picture, subject,
    pose and background, is the same up to a small crop or shift, a mirror, brightness, contrast and compression. Two
    cut-outs on the same plain ground come close to it, too: their common silhouette is most of what there is.
    """
    centre = F.affine_grid(torch.tensor([[[_KEPT, 0, 0], [0, _KEPT, 0]]]), [1, 3, _COMPARED, _COMPARED], False)
    grid = F.affine_grid(_window_placements(), [2 * len(_SIZES) * _STEPS**2, 3, _COMPARED, _COMPARED], False)
    queries = torch.cat([_pattern(image, centre) for image in images])  # [N,D]
    # One original at a time: its windows take 8 MB.
    return torch.stack([(queries @ _pattern(original, grid).T).amax(dim=1) for original in originals], dim=1)


def _window_placements() -> Tensor:
    """[W,2,3] for `affine_grid`: every size at every shift, as it is and mirrored."""
    shifts = (2 * torch.linspace(-_REACH, _REACH, _STEPS)).tolist()  # grid coordinates span 2
    return torch.tensor(
        [[[m * s, 0, x], [0, s, y]] for s in _SIZES for x in shifts for y in shifts for m in (1, -1)],
    )


def _pattern(image: Tensor, grid: Tensor) -> Tensor:
    """[3,S,S] seen through grids [W,24,24,2] -> [W,D] of unit length, channels less their means; near 0 where flat."""
    seen = F.grid_sample(image.expand(len(grid), -1, -1, -1), grid, padding_mode="border", align_corners=False)
    return F.normalize((seen - seen.mean(dim=(2, 3), keepdim=True)).flatten(1), dim=1, eps=1e-2)


@dataclass(frozen=True, eq=False)
class CopyFloor:
    """Refuses pictures that repeat a reference photo, so that identity is not bought by copying.

    originals: thumbnails [R,3,S,S] of the references. limit: the smallest similarity, in [-1, 1], that is a copy.
    """

    originals: Tensor
    limit: float = COPY_LIMIT

    @classmethod
    def from_references(cls, references: Sequence[Image.Image], limit: float = COPY_LIMIT) -> "CopyFloor":
        """Raises InputError without references."""
        return cls(thumbnails(references), limit)

    def similarities(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures -> [N,R], see `copy_similarity`."""
        return copy_similarity(thumbnails(images), self.originals)

    def judge(self, images: Sequence[Image.Image], prompt: str = "") -> list[str]:
        """ "copies reference 2 (.98)", references counted from 1 in the order given. The prompt plays no part."""
        nearest, which = self.similarities(images).max(dim=1)
        return [
            f"copies reference {index + 1} ({_short(value)})" if value >= self.limit else ""
            for value, index in zip(nearest.tolist(), which.tolist())
        ]


def copy_rate(images: Sequence[Image.Image], references: Sequence[Image.Image], limit: float = COPY_LIMIT) -> float:
    """The share of pictures, 0 to 1, that copy a reference."""
    similarity = copy_similarity(thumbnails(images), thumbnails(references))  # [N,R]
    return float((similarity.amax(dim=1) >= limit).double().mean())


def near_duplicates(images: Sequence[Image.Image], order: Sequence[int], limit: float = COPY_LIMIT) -> list[int | None]:
    """For each picture the better one that it repeats, or None: of every group of copies the best stays.

    order: indices of the pictures, best first; those left out are nobody's copy and nobody copies them.
    """
    small = thumbnails(images)
    copies = copy_similarity(small, small) >= limit  # [N,N]
    kept: list[int] = []
    repeats: list[int | None] = [None] * len(images)
    for index in order:
        repeats[index] = next((better for better in kept if copies[index, better]), None)
        if repeats[index] is None:
            kept.append(index)
    return repeats


def diversity(images: Sequence[Image.Image]) -> float:
    """Mean of 1 - `copy_similarity` over pairs of pictures: 0 when all are copies of one; NaN for a lone picture."""
    small = thumbnails(images)
    between = ~torch.eye(len(small), dtype=torch.bool)
    return float((1 - copy_similarity(small, small))[between].mean()) if len(small) > 1 else nan


# --- prompt adherence ------------------------------------------------------------------------------------------------

_TEXT_IMAGE_CLASSES = {"siglip": "SiglipModel", "clip": "CLIPModel"}


@dataclass(frozen=True, eq=False)
class TextImageEncoder:
    """A model that embeds texts and pictures in one space."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    preprocessing: Preprocessing
    batch_size: int = 64

    @classmethod
    def from_pretrained(
        cls, name_or_folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> "TextImageEncoder":
        """A SigLIP, SigLIP 2 (fixed size) or CLIP checkpoint: folder, Hub id, or "miniworld", the toy world's.

        Raises InputError when it cannot be found or read, is of another kind, or lacks its tokenizer.
        """
        if str(name_or_folder) == "miniworld":
            from nearid_personalize.miniworld import weights_dir  # the toy world's code is not needed otherwise

            name_or_folder = weights_dir("siglip")
        folder = checkpoint_folder(name_or_folder)
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"{name_or_folder}: config.json cannot be read ({reason})") from None
        if config.model_type not in _TEXT_IMAGE_CLASSES:
            known = ", ".join(_TEXT_IMAGE_CLASSES)
            raise InputError(f"{name_or_folder}: a model of type {config.model_type!r}; {known} embed texts too")
        tokenizer = _load_tokenizer(folder, name_or_folder)
        model_class = getattr(transformers, _TEXT_IMAGE_CLASSES[config.model_type])
        model = load_weights(model_class, folder, name_or_folder, dtype).to(device).eval()
        preprocessing = Preprocessing.from_folder(folder, default_preprocessing(config.vision_config))
        return cls(model, tokenizer, preprocessing)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts -> float32 [N,D] of unit length, on the CPU; what exceeds the model's length is cut off."""
        length = self.model.config.text_config.max_position_embeddings
        # Padded to full length and without a mask: how SigLIP was trained; CLIP reads up to the end token only.
        tokens = self.tokenizer(
            list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return _unit(self.model.get_text_features(input_ids=tokens.input_ids.to(self.model.device)))

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures -> float32 [N,D] of unit length, on the CPU."""
        batches = [images[start : start + self.batch_size] for start in range(0, len(images), self.batch_size)]
        pixels = (self.preprocessing(batch, self.model.device).to(self.model.dtype) for batch in batches)
        return torch.cat([_unit(self.model.get_image_features(pixel_values=batch)) for batch in pixels])


def _load_tokenizer(folder: Path, name: str | Path) -> PreTrainedTokenizerBase:
    """A checkpoint's tokenizer. Raises InputError, naming `name`, when its file or what reads that is missing."""
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise InputError(f"{name}: lacks its tokenizer; put {' or '.join(TOKENIZER_FILES)} of the model beside it")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except ImportError as error:
        # SigLIP's first version, whose vocabulary is a SentencePiece model, is the one that needs a further package.
        if find_spec("sentencepiece") is None:
            raise InputError(f"{name}: its tokenizer needs sentencepiece; pip install sentencepiece") from None
        reason = str(error).strip().splitlines()[0]
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
    raise InputError(f"{name}: its tokenizer cannot be read ({reason}); get the file again")


def _unit(features: Any) -> Tensor:
    pooled = features if isinstance(features, Tensor) else features.pooler_output  # depends on transformers' version
    return F.normalize(pooled.float(), dim=-1).cpu()


@dataclass(frozen=True, eq=False)
class AdherenceFloor:
    """Refuses pictures that do not show the prompt, by any text-image model.

    A cosine of picture and prompt means little by itself: its level differs from model to model and prompt to prompt.
    So it is measured against what a picture that ignores the prompt would reach, and the floor is on the lead:

    contrasts: texts that must fit worse than the prompt does, as "a photo of a dog", or the same in other places.
    references [R,D]: embedded photos of the subject; the picture must fit the prompt better than they do. Leave out
    photos that show the prompted scene already. The weaker rival of the two: a picture elsewhere may beat them by
    chance, so ask for a lead (benchmarks/quality_floor.py measures both).
    floor: the smallest lead over the best-fitting contrast or reference that passes; with neither, the smallest cosine.
    text: stands for the prompt, where that has words the model never learnt, such as a rare token.
    """

    encoder: TextImageEncoder
    floor: float = 0.0
    text: str | None = None
    contrasts: tuple[str, ...] = ()
    references: Tensor | None = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        floor: float | None = None,
        text: str | None = None,
        contrasts: Sequence[str] = (),
        references: Sequence[Image.Image] = (),
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "AdherenceFloor":
        """With contrasts or references the floor is 0 unless given; with neither it must be given.

        Raises InputError as `TextImageEncoder.from_pretrained` does, and without anything to set the floor by.
        """
        if floor is None and not contrasts and not references:
            raise InputError("floor: a cosine has no natural floor; give contrasts, references, or a floor")
        encoder = TextImageEncoder.from_pretrained(name_or_folder, device, dtype)
        embedded = encoder.embed_images(references) if references else None
        return cls(encoder, 0.0 if floor is None else floor, text, tuple(contrasts), embedded)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "AdherenceFloor":
        """Move the text-image model to `device`, in `dtype`; returns this floor."""
        self.encoder.model.to(device=device, dtype=dtype)
        return self

    def scores(self, images: Sequence[Image.Image], prompt: str) -> Tensor:
        """Pictures -> [N]: the lead of the prompt, in [-2, 2]; without contrasts and references the cosine."""
        pictures = self.encoder.embed_images(images)
        texts = self.encoder.embed_texts([self.text or prompt, *self.contrasts])
        cosines = pictures @ texts.T  # [N, 1 + contrasts]
        rivals = [cosines[:, 1:]]
        if self.references is not None:
            rivals.append((self.references @ texts[0]).expand(len(pictures), -1))
        against = torch.cat(rivals, dim=1)
        return cosines[:, 0] - against.amax(dim=1) if against.shape[1] else cosines[:, 0]

    def judge(self, images: Sequence[Image.Image], prompt: str) -> list[str]:
        """ "does not show the prompt (.03 below .10)"."""
        return [
            f"does not show the prompt ({_short(score)} below {_short(self.floor)})" if score < self.floor else ""
            for score in self.scores(images, prompt).tolist()
        ]


# --- all of them -----------------------------------------------------------------------------------------------------

ADHERENCE_LEAD = 0.1  # over the references; at 0 an eighth of pictures of another place pass (quality_floor.py)


def chosen_floors(
    model: str,
    scorer: "IdentityScorer",
    references: Sequence[Image.Image],
    reject_copies: bool = False,
    text_image_model: str | None = None,
) -> list[Floor]:
    """What else a picture must pass: the quality floor of an encoder that has one, and what is asked for.

    Their models work on the scorer's device and in its precision.
    """
    floors: list[Floor] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is none is no news on every run
        if quality := find_quality_floor(model, scorer):
            floors.append(quality)
    if reject_copies:
        floors.append(CopyFloor.from_references(references))
    if text_image_model is not None:
        encoder = scorer.model
        adherence = AdherenceFloor.from_pretrained(
            text_image_model,
            ADHERENCE_LEAD,
            references=references,
            device=encoder.device,
            dtype=encoder.backbone.dtype,
        )
        floors.append(adherence)
    return floors
