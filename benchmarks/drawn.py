"""Candidates that other benchmarks score: of held-out mini-world subjects, each with a LoRA of its own, judged.

Drawn and judged once (about 80 s a subject on one core), kept in a folder, and scored by any encoder in seconds.
"""

import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from nearid_personalize.commands.quickstart import quickstart_lora
from nearid_personalize.files import write_atomically
from nearid_personalize.guard.hooks import Moment, denoise
from nearid_personalize.metrics import bootstrap_interval
from nearid_personalize.miniworld import CONTEXTS, Pet, Split, photos, sample_pet, weights_dir
from nearid_personalize.miniworld.judge import judge
from nearid_personalize.training.lora.loop import load_lora, train_lora

PREVIEWS = 9
"""Previews kept of each candidate: after every tenth of the steps but the last."""
STEP_FRACTIONS = tuple(i / 10 for i in range(1, PREVIEWS + 1))


@dataclass(frozen=True)
class Drawing:
    """Which candidates there are."""

    folder: Path = Path("runs/drawn")
    """Where they are kept; finished subjects are not drawn again."""
    num_subjects: int = 24
    first_subject: int = 2000
    """Index of the first subject of the split; the quickstart shows the ones from 0."""
    split: Split = "test"
    num_drawn: int = 32
    """Candidates for each of two prompts."""
    steps: int = 30
    """Denoising steps, a multiple of ten."""
    lora_steps: int = 50
    """LoRA steps: few, so that candidates differ."""
    workers: int = 1
    """Processes; each uses one thread."""

    @property
    def indices(self) -> range:
        """Of the subjects."""
        return range(self.first_subject, self.first_subject + self.num_subjects)


@dataclass(frozen=True, eq=False)
class Prompt:
    """Candidates for one prompt that all ran to the end: uint8 pictures [M,H,W,3] and previews [M,S,H,W,3]; what the
    judge says of each picture: the share of eight attributes that are right [M], and which are wrong."""

    context: str
    pictures: np.ndarray
    previews: np.ndarray
    agreement: np.ndarray
    wrong: list[list[str]]


@dataclass(frozen=True, eq=False)
class Drawn:
    """All that was drawn of a subject, and the seconds that its LoRA took."""

    references: list[Image.Image]
    prompts: list[Prompt]
    lora_seconds: float


def shots_of(split: Split, index: int) -> tuple[Pet, list[Image.Image], tuple[str, str]]:
    """A subject, four reference photos of it, and two contexts that are in none of them."""
    pet = sample_pet(split, index)
    elsewhere = [(shot, context) for shot, context in photos(pet, len(CONTEXTS)) if context != "space"]
    return pet, [Image.fromarray(shot.image) for shot, _ in elsewhere[:4]], ("space", elsewhere[4][1])


def personalised(
    split: Split, index: int, lora_steps: int | None
) -> tuple[Pet, tuple[str, str], StableDiffusionPipeline]:
    """A subject, its two contexts, and the packaged pipeline with the quickstart's LoRA trained on its references."""
    pet, references, contexts = shots_of(split, index)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "references"
        folder.mkdir()
        for i, reference in enumerate(references):
            reference.save(folder / f"{i}.png")
        lora = train_lora(quickstart_lora(folder, Path(scratch) / "lora", pet.category, lora_steps))
        pipe = StableDiffusionPipeline.from_pretrained(weights_dir("pipeline"), use_safetensors=True)
        load_lora(pipe, lora)
    pipe.set_progress_bar_config(disable=True)
    return pet, contexts, pipe


def draw(drawing: Drawing) -> None:
    """Draw and judge the subjects that are missing."""
    drawing.folder.mkdir(parents=True, exist_ok=True)
    jobs = [(drawing, index) for index in drawing.indices if not (drawing.folder / f"{index}.json").exists()]
    with multiprocessing.get_context("spawn").Pool(drawing.workers) as pool:
        pool.map(_draw_subject, jobs, chunksize=1)


def read(drawing: Drawing, index: int) -> Drawn:
    """One drawn subject."""
    record = json.loads((drawing.folder / f"{index}.json").read_text(encoding="utf-8"))
    arrays = np.load(drawing.folder / f"{index}.npz")
    _, references, contexts = shots_of(drawing.split, index)
    prompts = [
        Prompt(context, pictures, previews, np.array(judged["agreement"]), judged["wrong"])
        for context, pictures, previews, judged in zip(
            contexts, arrays["pictures"], arrays["previews"], record["prompts"], strict=True
        )
    ]
    return Drawn(references, prompts, record["seconds"]["lora"])


def interval(rows: np.ndarray, statistic: Callable[[np.ndarray], float]) -> tuple[float, float]:
    """A 95 % bootstrap interval over subjects of a statistic of rows `[N,X]`; `rows` is `[subjects, prompts, X]`."""
    return bootstrap_interval(
        torch.from_numpy(rows), lambda drawn: float(statistic(drawn.reshape(-1, rows.shape[-1]).numpy()))
    )


def _draw_subject(job: tuple[Drawing, int]) -> None:
    """Writes `<index>.npz` and then `<index>.json`."""
    drawing, index = job
    torch.set_num_threads(1)
    started = time.perf_counter()
    pet, contexts, pipe = personalised(drawing.split, index, drawing.lora_steps)
    trained = time.perf_counter()
    pictures, previews, prompts = [], [], []
    for context in contexts:
        prompt = f"a photo of sks {pet.category} in {context}"
        images, seen = _candidates(pipe, prompt, drawing)
        verdicts = [judge(image, pet, context) for image in images]
        pictures.append(np.stack([np.asarray(image) for image in images]))
        previews.append(seen)
        judged = {"agreement": [v.agreement for v in verdicts], "wrong": [v.wrong for v in verdicts]}
        prompts.append({"prompt": prompt, **judged})
    seconds = {"lora": trained - started, "all": time.perf_counter() - started}
    np.savez_compressed(drawing.folder / f"{index}.npz", pictures=np.stack(pictures), previews=np.stack(previews))
    record = {"pet": asdict(pet), "prompts": prompts, "seconds": seconds}
    write_atomically(drawing.folder / f"{index}.json", json.dumps(record))


def _candidates(pipe: StableDiffusionPipeline, prompt: str, drawing: Drawing) -> tuple[list[Image.Image], np.ndarray]:
    """Pictures from generator seeds 0, 1, ..., and their previews uint8 `[M,S,H,W,3]`."""
    seen: list[np.ndarray] = []

    def keep(moment: Moment) -> None:
        if moment.step % (drawing.steps // (PREVIEWS + 1)) == 0 and moment.step < drawing.steps:
            seen.append((moment.preview() * 255).round().byte().permute(0, 2, 3, 1).numpy())

    arguments = {"prompt": prompt, "num_inference_steps": drawing.steps, "guidance_scale": 3.0}
    generators = [torch.Generator().manual_seed(seed) for seed in range(drawing.num_drawn)]
    return denoise(pipe, arguments, generators, keep).images, np.stack(seen, axis=1)
