"""IdentityScorer: how much pictures look like one subject, known by its reference photos.

Letters: N pictures, R references, D width.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from itertools import islice
from pathlib import Path
from threading import Lock

import torch
import torch.nn.functional as F
from PIL import ImageFile
from torch import Tensor

from nearid_personalize.encoder.checkpoints import load_encoder
from nearid_personalize.encoder.model import NearIDModel
from nearid_personalize.encoder.preprocessing import Preprocessing
from nearid_personalize.errors import InputError
from nearid_personalize.images import ImageSource, Resample, check_pixel_range, iterate_sources, load_image, to_square
from nearid_personalize.names import packaged
from nearid_personalize.scorer.calibration import (
    DEFAULT_FALSE_ACCEPT_RATE,
    Aggregation,
    CalibrationBank,
    KnownScores,
    leave_one_out_scores,
)
from nearid_personalize.scorer.ranking import Ranking, rank_candidates
from nearid_personalize.scorer.subject import Subject, identity_scores, read_calibration, uncalibrated_threshold

Images = ImageSource | Iterable[ImageSource]
"""A folder, a picture, an iterable of pictures, or a tensor [N,3,H,W]: uint8, or float in [0, 1]."""


OnError = Callable[[int, InputError], None]
"""Told of each picture that cannot be read: its place in the input, and the error that names it."""


DECODING_THREADS = min(16, os.cpu_count() or 1)
"""Threads that decode and shrink pictures while the model runs."""


class IdentityScorer:
    """Embeds pictures, enrols a subject, scores and ranks pictures against it.

    Args:
        model: any `NearIDModel`; moved to `device`, its trunk cast to `dtype` (the head stays float32).
        image_size, image_mean, image_std: side in pixels, and per-channel values for pixels in [0, 1].
        calibration: what accept thresholds are set from; None: negatives, else `uncalibrated_threshold`.
        batch_size: pictures embedded at once.
        resample: the filter that resizes pictures.
        compile_backend: a `torch.compile` backend, "inductor" as a rule; None: uncompiled.
    """

    def __init__(
        self,
        model: NearIDModel,
        image_size: int,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        calibration: CalibrationBank | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 64,
        resample: Resample = "bicubic",
        compile_backend: str | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model = model.to(device=device).cast_trunk(dtype).eval()
        self.image_size, self.image_mean, self.image_std = image_size, tuple(image_mean), tuple(image_std)
        self.calibration, self.batch_size, self.resample = calibration, batch_size, resample
        features = self.model.get_image_features
        self._features = torch.compile(features, backend=compile_backend) if compile_backend else features

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        trunk: str | Path | None = None,
        compile_backend: str | None = None,
    ) -> "IdentityScorer":
        """Load a checkpoint: a folder, a Hub id, or "miniworld" for the toy world's.

        A bare trunk gives its own likeness, not identity. trunk: where the trunk of a head saved alone is, if it has
        moved. A `calibration.safetensors` beside the weights is read, see `enroll`.

        Raises InputError when the checkpoint cannot be found or read.
        """
        model, preprocessing, folder = load_encoder(packaged(name_or_folder, "nearid"), dtype, trunk)
        return cls(
            model,
            preprocessing.size,
            preprocessing.mean,
            preprocessing.std,
            read_calibration(folder),
            device,
            dtype,
            resample=preprocessing.resample,
            compile_backend=compile_backend,
        )

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "IdentityScorer":
        """Move the model to `device`, its trunk in `dtype` (the head stays float32); returns this scorer."""
        self.model.to(device=device).cast_trunk(dtype)
        return self

    @property
    def preprocessing(self) -> Preprocessing:
        """How pictures become pixel values."""
        return Preprocessing(self.image_size, self.image_mean, self.image_std, self.resample)

    @torch.no_grad()
    def embed(self, images: Images, on_error: OnError | None = None) -> Tensor:
        """Pictures -> float32 [N,D] of unit length, on the CPU, in order, whatever the batch size.

        Threads decode while the model runs, at most three batches ahead, so a generator of any length can be given.

        on_error: called for each picture that cannot be read, whose row is NaN; without it the first raises
        InputError.
        """
        unreadable: list[int] = []

        def report(index: int, error: InputError) -> None:
            if on_error is None:
                raise error
            on_error(index, error)
            unreadable.append(index)

        embeddings: list[Tensor] = []
        running: Tensor | None = None
        with closing(self._batches(images, report)) as batches:
            for batch in batches:
                embedded = F.normalize(self._features(self.preprocessing(self._upload(batch))), dim=-1)
                # An accelerator works on in the background: fetch a batch only when the next one is under way.
                if running is not None:
                    embeddings.append(running.cpu())
                running = embedded
        if running is None:
            raise InputError("images: empty; give at least one picture")
        result = torch.cat([*embeddings, running.cpu()])
        result[unreadable] = float("nan")
        return result

    def _upload(self, batch: Tensor) -> Tensor:
        device = self.model.device
        if device.type == "cuda" and batch.device.type == "cpu":
            return batch.pin_memory().to(device, non_blocking=True)
        return batch.to(device)

    def _batches(self, images: Images, report: OnError) -> Generator[Tensor]:
        """Batches [B,3,H,W], uint8 or float; an unreadable picture is reported and stands there black."""
        if isinstance(images, Tensor) and images.ndim == 4:
            for batch in images.split(self.batch_size) if len(images) else ():
                check_pixel_range(batch)
                yield batch
            return
        with closing(self._decoded(images, report)) as pictures:
            while batch := list(islice(pictures, self.batch_size)):
                yield torch.stack(batch)

    def _decoded(self, images: Images, report: OnError) -> Generator[Tensor]:
        """uint8 [3,S,S] for each picture in order, decoded by threads up to two batches ahead."""
        pool, lock = ThreadPoolExecutor(DECODING_THREADS), Lock()

        def decode(source: ImageSource) -> Tensor:
            # A picture that Pillow has opened but not read may be in the input twice, and is not safe to read twice.
            with lock if isinstance(source, ImageFile.ImageFile) else nullcontext():
                image = load_image(source)
            return to_square(image, self.image_size, self.resample)

        ahead: deque[Future[Tensor]] = deque()
        sources = iterate_sources(images)
        index = 0
        try:
            while True:
                wanted = 2 * self.batch_size - len(ahead)
                ahead.extend(pool.submit(decode, source) for source in islice(sources, wanted))
                if not ahead:
                    return
                try:
                    picture = ahead.popleft().result()
                except InputError as error:
                    report(index, error)
                    picture = torch.zeros(3, self.image_size, self.image_size, dtype=torch.uint8)
                yield picture
                index += 1
        finally:
            pool.shutdown(cancel_futures=True)

    def enroll(
        self,
        photos: Images,
        aggregation: Aggregation | None = None,
        negatives: Images | None = None,
        false_accept_rate: float | None = None,
    ) -> Subject:
        """Reference photos -> Subject, with an accept threshold; `subject.origin` has its error rates.

        Args:
            aggregation: the calibration's unless given, and "mean" without one.
            negatives: pictures of similar subjects. At most a share `false_accept_rate` of pictures like them is
                accepted. With a calibration bank too, the higher of the two thresholds is taken.
            false_accept_rate: share in (0, 1) of pictures that are not the subject. Default: the bank's, or 0.01; of
                too few negatives the smallest that they can state, 1 / (n + 1).

        Raises InputError when the rate asked for takes more negatives, or bank subjects, than there are.
        """
        return self.enroll_embeddings(self.embed(photos), aggregation, negatives, false_accept_rate)

    def enroll_embeddings(
        self,
        references: Tensor,
        aggregation: Aggregation | None = None,
        negatives: Images | None = None,
        false_accept_rate: float | None = None,
    ) -> Subject:
        """`enroll` for photos that were embedded before: float32 [R,D], unit rows, from `embed`."""
        chosen = aggregation or (self.calibration.aggregation if self.calibration else "mean")
        bank = self.calibration
        known = [bank.known_scores(len(references), chosen)] if bank else []
        if negatives is not None:
            impostor = identity_scores(self.embed(negatives), references, chosen)[:, None]
            own = leave_one_out_scores(references, chosen)
            known.insert(0, KnownScores("negatives", impostor, known[0].genuine if known else own[~own.isnan()]))
        subject = Subject(references, uncalibrated_threshold(references, chosen), chosen, known=tuple(known))
        if false_accept_rate is not None:
            return subject.at(false_accept_rate)
        usual = bank.false_accept_rate if bank else DEFAULT_FALSE_ACCEPT_RATE
        return subject._at_highest(*(scores.threshold_near(usual) for scores in known)) if known else subject

    def score(self, images: Images, subject: Subject, on_error: OnError | None = None) -> Tensor:
        """Pictures -> float32 [N] in [-1, 1]; with `on_error`, NaN for those that cannot be read, see `embed`.

        Raises InputError when the subject was enrolled with another model.
        """
        embeddings = self.embed(images, on_error)
        if embeddings.shape[1] != subject.embeddings.shape[1]:
            raise InputError(
                f"subject: embeddings of width {subject.embeddings.shape[1]}, this model makes {embeddings.shape[1]}; "
                "enroll the photos again with this scorer"
            )
        return identity_scores(embeddings, subject.embeddings, subject.aggregation)

    def rank(self, images: Images, subject: Subject, on_error: OnError | None = None) -> Ranking:
        """Score pictures and put them best first; those below the subject's threshold are rejected."""
        return Ranking(rank_candidates(self.score(images, subject, on_error), subject.threshold))
