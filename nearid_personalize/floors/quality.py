"""The quality floor: is it a picture at all, whatever it shows.

Letters: N pictures, T tokens, D width.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from nearid_personalize.encoder.checkpoints import checkpoint_folder, load_encoder
from nearid_personalize.encoder.model import NearIDModel
from nearid_personalize.encoder.preprocessing import Preprocessing
from nearid_personalize.errors import InputError
from nearid_personalize.files import parse_json, write_atomically
from nearid_personalize.names import packaged

if TYPE_CHECKING:
    from nearid_personalize.scorer.scorer import IdentityScorer
from nearid_personalize.floors.base import _short

# --- picture quality -------------------------------------------------------------------------------------------------
QUALITY_FILE = "quality.safetensors"
"""The probe of a checkpoint's trunk, beside its weights; `trainers/train_quality.py` writes it."""


_SAME_TRUNK = 0.999  # cosine of answers to the same picture: float types differ by less, trunks by more


class QualityProbe(nn.Module):
    """A trunk's tokens -> a logit of being a good picture, from the mean and maximum of what each token is read as.

    width: D of the tokens. hidden: features read from each.
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

        scorer: of the same checkpoint, so that its model is not loaded twice. threshold: the measured one unless given;
        higher is stricter.

        Raises InputError when there is no such file, it cannot be read, or it belongs to another trunk.
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
    return checkpoint_folder(packaged(name_or_folder, "nearid"))


def _read_quality(path: Path) -> tuple[QualityProbe, QualityRates, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            rates = QualityRates(**parse_json((file.metadata() or {})["quality"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        answer = tensors.pop("answer")
        hidden, width = tensors["read.1.weight"].shape
        probe = QualityProbe(width, hidden)
        probe.load_state_dict(tensors)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError):
        raise InputError(f"{path}: not a saved quality probe; {_HOW_TO_GET_ONE}") from None
    return probe.eval(), rates, answer
