"""What the page does, without the page: every action is a call of the library, on models that are loaded once."""

import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image

from nearid_personalize.attention import Attention, denoiser_of, using_attention
from nearid_personalize.commands.quickstart import quickstart_lora
from nearid_personalize.demo.jobs import Device, Job
from nearid_personalize.driftmap import drift_map
from nearid_personalize.errors import InputError
from nearid_personalize.floors.chosen import chosen_floors
from nearid_personalize.floors.copies import COPY_LIMIT
from nearid_personalize.guard.guard import IdentityGuard
from nearid_personalize.guard.policy import DEFAULT_POLICY
from nearid_personalize.guard.result import GuardResult, RaceProgress
from nearid_personalize.images import load_image, save_image
from nearid_personalize.loading import load_pipeline
from nearid_personalize.photos import PhotoCheck, check_photos
from nearid_personalize.report import heat_overlay, write_generation
from nearid_personalize.scorer.scorer import IdentityScorer
from nearid_personalize.scorer.subject import Subject
from nearid_personalize.verification import Verification, verify

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from nearid_personalize.gallery import Gallery
    from nearid_personalize.lora.card import ReportCard
    from nearid_personalize.training.lora.loop import LoraOptions, Snapshot

TOKEN = "sks"
"""The rare word that the page's LoRAs teach."""

CARD_SCALES, CARD_SEEDS = (0.8, 1.0), 2
"""LoRA scales that a report card tries, and pictures for each of its prompts."""

HALF: dict[torch.dtype, Literal["bf16", "fp16"]] = {torch.bfloat16: "bf16", torch.float16: "fp16"}
"""What the trainer calls a precision."""

LOOKS_WHILE_TRAINING = 4
SAMPLE_STEPS, SAMPLES = 10, 2  # pictures drawn at each look, and their denoising steps

# --- what is asked, what is told -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingRequest:
    """A LoRA to train. photos: a folder. word: what the subject is, "dog". steps: None for the base model's usual."""

    base_model: str
    photos: Path
    word: str
    output: Path
    steps: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class TrainingProgress:
    """A training as it goes.

    seconds_left: None before it can be told. curve: (step, mean identity of the samples in [-1, 1]) at each look.
    samples: the pictures of the latest look. lora: the folder with the finished LoRA, None before.
    """

    step: int
    steps: int
    seconds_left: float | None = None
    curve: tuple[tuple[int, float], ...] = ()
    samples: tuple[Image.Image, ...] = ()
    lora: Path | None = None


@dataclass(frozen=True)
class DrawingRequest:
    """Pictures to draw.

    photos: the subject's. prompt: the whole of it. lora: a file or folder. strictness: a key of `FALSE_ACCEPT_RATES`.
    num_images: accepted pictures wanted, of num_candidates. spend: "save" the compute that stopping saves, or "retry"
    with more seeds, or "enough": stop once there are enough. steps: denoising steps. guidance_scale: None for the
    pipeline's own. output: an empty folder.
    """

    base_model: str
    photos: tuple[Path, ...]
    prompt: str
    output: Path
    lora: Path | None = None
    num_images: int = 4
    num_candidates: int = 16
    strictness: str = "strict"
    spend: Literal["save", "retry", "enough"] = "save"
    race: bool = True
    seed: int = 0
    steps: int = 20
    guidance_scale: float | None = None
    reject_copies: bool = True


@dataclass(frozen=True)
class DrawingResult:
    """What came of a request to draw: the guard's result, and a zip of pictures, contact sheet and report.json."""

    request: DrawingRequest
    result: GuardResult
    subject: Subject
    report: dict
    archive: Path


@dataclass(frozen=True)
class DrawingProgress:
    """An order under way: the race as it is, or in the end the outcome."""

    progress: RaceProgress | None = None
    outcome: DrawingResult | None = None
    threshold: float = 0.0


@dataclass(frozen=True)
class CardRequest:
    """A LoRA to be tried: with the photos it was trained on, in some places, at some scales.

    prompts: whole ones. output: an empty folder.
    """

    base_model: str
    photos: tuple[Path, ...]
    lora: Path
    name: str
    prompts: tuple[str, ...]
    output: Path
    steps: int = 20
    guidance_scale: float | None = None


@dataclass(frozen=True)
class CardProgress:
    """A report card as it is filled in: the share done, in [0, 1], and in the end the report card."""

    share: float
    card: "ReportCard | None" = None


@dataclass(frozen=True)
class Drift:
    """One picture beside its nearest reference (by place), and under its heat; peak_rise: see `DriftMap`."""

    nearest: int
    overlay: Image.Image
    score: float
    peak_rise: float


@dataclass(frozen=True)
class Comparison:
    """Two pictures or sets: `verify` of the second against the first, and where its nearest picture differs."""

    answer: Verification
    drift: Drift


# --- the studio ------------------------------------------------------------------------------------------------------


@dataclass
class Studio:
    """The models, and the device that long jobs share.

    encoder: name of the scorer's checkpoint. base_models: those that may be asked for; the pipeline of one of them is
    kept loaded. lora_steps: of a training that asks for no number; None for the base model's usual. attention: what
    denoisers compute it with.
    """

    scorer: IdentityScorer
    encoder: str
    base_models: tuple[str, ...]
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    lora_steps: int | None = None
    attention: Attention = "auto"
    line: Device = field(default_factory=Device)
    _pipeline: "tuple[str, DiffusionPipeline] | None" = None
    _looking: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._floors = chosen_floors(self.encoder, self.scorer, ())

    # Short looks: beside a long job, one at a time

    def check(self, photos: Sequence[Image.Image]) -> PhotoCheck:
        """See `check_photos`; an encoder that has a quality floor looks for damage too."""
        with self._looking:
            return check_photos(self.scorer, photos, self._floors)

    def drift(self, picture: Image.Image, photos: Sequence[Image.Image]) -> Drift:
        """Where a picture drifted from the subject of the photos."""
        with self._looking:
            found = drift_map(self.scorer, picture, photos)
        overlay = heat_overlay(picture, found.at(*picture.size).numpy())
        return Drift(found.reference_index, overlay, found.score, found.peak_rise)

    def compare(self, first: Sequence[Image.Image], second: Sequence[Image.Image]) -> Comparison:
        """Do two pictures, or sets of them, show the same subject? The second's are pictures of one item."""
        if not first or not second:
            raise InputError("compare: one side is empty; give a picture on each")
        with self._looking:
            (answer,) = verify(self.scorer, self.scorer.enroll(first), [list(second)])
        return Comparison(answer=answer, drift=self.drift(second[answer.nearest_picture], first))

    @contextmanager
    def gallery(self, folder: Path) -> "Iterator[Gallery]":
        """The gallery in a folder, made where there is none."""
        from nearid_personalize.gallery import Gallery

        with self._looking:
            yield Gallery.open(folder, self.scorer)

    # Long jobs: one at a time

    def training(self, request: TrainingRequest) -> Job[TrainingProgress]:
        """A job that trains a LoRA."""
        return Job(lambda report_progress: self._train(request, report_progress), self.line)

    def drawing(self, request: DrawingRequest) -> Job[DrawingProgress]:
        """A job that draws pictures and keeps those of the subject."""
        return Job(lambda report_progress: self._draw(request, report_progress), self.line)

    def card(self, request: CardRequest) -> Job[CardProgress]:
        """A job that fills in a LoRA's report card."""
        return Job(lambda report_progress: self._fill_card(request, report_progress), self.line)

    def _fill_card(self, request: CardRequest, report_progress: Callable[[CardProgress], None]) -> CardProgress:
        from nearid_personalize.lora.card import SampleJudge, report_card
        from nearid_personalize.lora.card_page import write_card

        photos = [load_image(path) for path in request.photos]
        report_progress(CardProgress(0.0))
        pipe = self._loaded(request.base_model, None)
        batch = len(request.prompts) * CARD_SEEDS
        total, done = (1 + len(CARD_SCALES)) * request.steps, 0

        def on_step(pipe: "DiffusionPipeline", index: int, step: int, values: dict) -> dict:
            nonlocal done
            done += 1
            report_progress(CardProgress(min(done / total, 1.0)))
            return {}

        floors = chosen_floors(self.encoder, self.scorer, photos, reject_copies=True)
        sample_judge = SampleJudge(self.scorer, self.scorer.enroll(photos), photos, floors, token=TOKEN)
        guidance: dict[str, Any] = {} if request.guidance_scale is None else {"guidance_scale": request.guidance_scale}
        with using_attention(denoiser_of(pipe), self.attention, self.device):
            card = report_card(
                pipe,
                {"this LoRA": request.lora},
                sample_judge,
                request.name,
                CARD_SCALES,
                request.prompts,
                CARD_SEEDS,
                batch,
                progress=False,
                num_inference_steps=request.steps,
                callback_on_step_end=on_step,
                **guidance,
            )
        loras = {"this LoRA": request.lora.name}
        models = {"base": request.base_model, "lora": loras, "scorer": self.encoder}
        write_card(card, request.output, models)
        return CardProgress(1.0, card)

    def _train(self, request: TrainingRequest, report_progress: Callable[[TrainingProgress], None]) -> TrainingProgress:
        from nearid_personalize.training.lora.loop import train_lora

        self._known(request.base_model)
        options = lora_options(request, self.lora_steps, self.dtype).but(attention=self.attention)
        if self.device != "cpu":
            self._pipeline = None  # two base models would not fit
        subject = self.scorer.enroll(request.photos)
        told = TrainingProgress(0, options.steps)
        report_progress(told)
        started = time.perf_counter()

        def on_step(step: int, loss: float) -> None:
            nonlocal told
            left = (time.perf_counter() - started) / step * (options.steps - step)
            told = replace(told, step=step, seconds_left=left)
            report_progress(told)

        def look(snapshot: "Snapshot") -> None:
            nonlocal told
            samples = draw_samples(snapshot.pipe, options.data.prompt)
            identity = float(self.scorer.score(samples, subject).mean())
            told = replace(told, samples=tuple(samples), curve=(*told.curve, (snapshot.step, identity)))
            report_progress(told)

        folder = train_lora(options, look, on_step)
        return replace(told, lora=folder, seconds_left=0.0)

    def _draw(self, request: DrawingRequest, report_progress: Callable[[DrawingProgress], None]) -> DrawingProgress:
        photos = [load_image(path) for path in request.photos]
        subject = enrolled(self.scorer, photos, request.strictness)

        def watch(progress: RaceProgress) -> None:
            report_progress(DrawingProgress(progress, threshold=subject.threshold))

        watch(RaceProgress(0, request.steps, {}, ()))
        started = time.perf_counter()
        result = self._guarded(request, subject, photos, watch)
        seconds = {"total": time.perf_counter() - started}
        models = {
            "base": request.base_model,
            "lora": request.lora.name if request.lora else None,
            "scorer": self.encoder,
        }
        for place, photo in enumerate(photos):
            save_image(photo, request.output / f"reference-{place}.png")
        report = write_generation(result, photos, models, seconds, request.output)
        archive = zipped(request.output)
        return DrawingProgress(None, DrawingResult(request, result, subject, report, archive), subject.threshold)

    def _guarded(
        self,
        request: DrawingRequest,
        subject: Subject,
        photos: Sequence[Image.Image],
        watch: Callable[[RaceProgress], None],
    ) -> GuardResult:
        pipe = self._loaded(request.base_model, request.lora)
        guard = IdentityGuard(
            pipe,
            self.scorer,
            subject,
            policy=DEFAULT_POLICY if request.race else None,
            floors=chosen_floors(self.encoder, self.scorer, photos, reject_copies=request.reject_copies),
            duplicate_limit=COPY_LIMIT if request.reject_copies else None,
        )
        guidance: dict[str, Any] = {} if request.guidance_scale is None else {"guidance_scale": request.guidance_scale}
        with using_attention(denoiser_of(pipe), self.attention, self.device):
            return guard(
                request.prompt,
                num_images=request.num_images,
                num_candidates=request.num_candidates,
                seed=request.seed,
                budget=None if request.spend == "save" else float(request.num_candidates),
                until_accepted=request.spend == "enough",
                watch=watch,
                num_inference_steps=request.steps,
                **guidance,
            )

    def _loaded(self, base_model: str, lora: Path | None) -> "DiffusionPipeline":
        """The base model's pipeline with this LoRA and no other; a LoRA that fails takes the pipeline with it."""
        from nearid_personalize.training.lora.loop import load_lora

        self._known(base_model)
        kept, self._pipeline = self._pipeline, None
        pipe = kept[1] if kept and kept[0] == base_model else load_pipeline(base_model, self.device, self.dtype)
        pipe.set_progress_bar_config(disable=True)
        pipe.unload_lora_weights()
        if lora is not None:
            load_lora(pipe, lora)
        self._pipeline = base_model, pipe
        return pipe

    def _known(self, base_model: str) -> None:
        if base_model not in self.base_models:
            raise InputError(f"base model {base_model!r}: this page offers {', '.join(self.base_models)}")


# --- steps -----------------------------------------------------------------------------------------------------------


def lora_options(
    request: TrainingRequest, usual_steps: int | None = None, dtype: torch.dtype = torch.float32
) -> "LoraOptions":
    """The options of a training: the quickstart's for the mini-world, else the trainer's defaults.

    dtype: what pictures are drawn in. In half precision, so are the frozen weights while the LoRA is trained.
    """
    from nearid_personalize.training.lora.loop import LoraOptions

    steps = request.steps or usual_steps
    if request.base_model == "miniworld":
        options = quickstart_lora(request.photos, request.output, request.word, steps, request.seed)
    else:
        prompt = f"a photo of {TOKEN} {request.word}"
        options = LoraOptions.of(
            base_model=request.base_model,
            references=request.photos,
            output=request.output,
            prompt=prompt,
            batch_size=1,
            seed=request.seed,
        )
        options = options.but(steps=steps or options.steps, gradient_checkpointing="on")
    if dtype in HALF:
        options = options.but(precision=HALF[dtype], base_precision="same")
    return options.but(validate_every=max(1, options.steps // LOOKS_WHILE_TRAINING))


def draw_samples(pipe: "DiffusionPipeline", prompt: str) -> list[Image.Image]:
    """The same seeds at every look, so that one sees the subject arrive in them."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in range(SAMPLES)]
    pipe.set_progress_bar_config(disable=True)
    return pipe([prompt] * SAMPLES, generator=generators, num_inference_steps=SAMPLE_STEPS).images


def enrolled(scorer: IdentityScorer, photos: Sequence[Image.Image], strictness: str) -> Subject:
    """The subject of the photos at a strictness; where nothing is known to set it by, at the rule of thumb."""
    return scorer.enroll(photos).at_strictness(strictness)


def whole_prompt(text: str, word: str) -> str:
    """What is asked of the model: "in space" becomes "a photo of sks dog in space"; whoever writes the token knows."""
    text = " ".join(text.split())
    if TOKEN in text.split():
        return text
    return f"a photo of {TOKEN} {word} {text}".strip()


def zipped(folder: Path) -> Path:
    """A zip of all the files of a folder, beside it."""
    archive = folder.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w") as file:  # pictures are compressed already
        for path in sorted(folder.iterdir()):
            file.write(path, f"{folder.name}/{path.name}")
    return archive
