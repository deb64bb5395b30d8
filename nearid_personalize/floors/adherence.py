"""Adherence: does the picture show the prompt? By any SigLIP or CLIP."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from nearid_personalize.encoder.checkpoints import CONFIG_ERRORS, TOKENIZER_FILES, checkpoint_folder, load_weights
from nearid_personalize.encoder.preprocessing import Preprocessing
from nearid_personalize.encoder.trunks import default_preprocessing
from nearid_personalize.errors import InputError, in_one_line
from nearid_personalize.floors.base import _short
from nearid_personalize.names import packaged

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
        name_or_folder = packaged(name_or_folder, "siglip")
        folder = checkpoint_folder(name_or_folder)
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except CONFIG_ERRORS as error:
            raise InputError(f"{name_or_folder}: config.json cannot be read ({in_one_line(error)})") from None
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
    """Refuses pictures that do not show the prompt, by a text-image model.

    The level of a cosine differs by model and prompt. So the floor is on the lead over what a picture that ignores
    the prompt would reach.
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
        """The floor of a checkpoint; 0 with contrasts or references unless given, without them it must be given.

        contrasts: texts that must fit worse than the prompt, such as "a photo of a dog". references [R,D]: embedded
        photos of the subject, without those of the prompted scene; the picture must fit the prompt better. floor: the
        smallest lead over the best of these, else the smallest cosine. text: stands for the prompt where that has a
        rare token.

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
