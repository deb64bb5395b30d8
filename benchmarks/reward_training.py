"""Does identity as reward make a better LoRA? `python benchmarks/reward_training.py`.

For held-out subjects of the mini-world: the quickstart's LoRA trained plainly, and trained with the reward of a second
head, for equally many steps on the same noise. Both draw the same seeds; the judge, which is no network, says which
attributes each picture really shows. Differences are paired by subject, with 95 % bootstrap intervals over subjects.
"""

import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from diffusers import StableDiffusionPipeline
from drawn import shots_of
from PIL import Image

from nearid_personalize.commands.quickstart import quickstart_lora
from nearid_personalize.files import write_atomically
from nearid_personalize.floors.adherence import TextImageEncoder
from nearid_personalize.lora.samples import draw_samples, measure_samples
from nearid_personalize.metrics import bootstrap_interval
from nearid_personalize.miniworld import CONTEXTS, Split, context_prompts, weights_dir
from nearid_personalize.miniworld.judge import judge
from nearid_personalize.scorer.scorer import IdentityScorer
from nearid_personalize.training.lora.loop import LoraOptions, load_lora, train_lora
from nearid_personalize.training.lora.reward import load_reward_model

ARMS = ("plain", "longer", "reward")
VALUES = ("agreement", "adherence", "diversity", "identity", "reward_identity", "copy_rate", "seconds", "cpu_seconds")


@dataclass(frozen=True)
class Options:
    """What is trained and drawn."""

    reward_model: str = "miniworld"
    """Head that rewards; the pictures are scored by the packaged one."""
    out: Path = Path("runs/reward")
    """Folder for the records; subjects that have one are not trained again."""
    plain: Path | None = None
    """Folder of the plain arm's records, to share them between settings. Default: OUT."""
    num_subjects: int = 24
    first_subject: int = 2200
    """Index of the first subject of the split."""
    split: Split = "test"
    lora_steps: int = 60
    """Optimizer steps of the plain and of the rewarded arm."""
    longer: int = 0
    """Optimizer steps of a third arm, plain and longer, to compare at equal time. 0: none."""
    num_drawn: int = 6
    """Pictures for each of two prompts."""
    num_judged: int = 3
    """How many of them the judge sees: it takes longer than drawing."""
    steps: int = 15
    """Denoising steps."""
    reward_weight: float = 1.0
    reward_warmup: float = 0.34
    reward_every: int = 1
    reward_steps: int = 1
    reward_sampling_steps: int = 4
    reward_batch_size: int = 2
    reward_guidance_scale: float = 3.0
    learning_rate: float | None = None
    """Of the denoiser's LoRA in both arms. Default: the quickstart's."""
    workers: int = 1
    """Processes; each uses one thread."""

    @property
    def arms(self) -> tuple[str, ...]:
        """What is trained for each subject."""
        return ARMS if self.longer else ("plain", "reward")

    def record(self, arm: str, index: int) -> Path:
        """Where an arm's record of a subject lies."""
        folder = self.plain if arm != "reward" and self.plain else self.out
        return folder / f"{arm}-{index}.json"


def lora_options(options: Options, arm: str, index: int, scratch: Path) -> LoraOptions:
    """An arm's LoRA run; rewarded pictures are of contexts that are not drawn later."""
    pet, references, contexts = shots_of(options.split, index)
    folder = scratch / "references"
    folder.mkdir()
    for number, reference in enumerate(references):
        reference.save(folder / f"{number}.png")
    plain = quickstart_lora(
        folder, scratch / "lora", pet.category, options.longer if arm == "longer" else options.lora_steps
    )
    plain = plain.but(learning_rate=options.learning_rate)
    if arm != "reward":
        return plain
    prompts = dict(zip(CONTEXTS, context_prompts(plain.subject_name)))
    return replace(
        plain,
        reward_weight=options.reward_weight,
        reward_model=options.reward_model,
        reward_prompts=tuple(prompt for context, prompt in prompts.items() if context not in contexts),
        reward_warmup=options.reward_warmup,
        reward_every=options.reward_every,
        reward_steps=options.reward_steps,
        reward_sampling_steps=options.reward_sampling_steps,
        reward_batch_size=options.reward_batch_size,
        reward_guidance_scale=options.reward_guidance_scale,
    )


def train_and_draw(
    options: Options, arm: str, index: int, prompts: list[str]
) -> tuple[list[list[Image.Image]], float, float]:
    """Train an arm of a subject; its pictures [P][S], wall and processor seconds of the training."""
    with tempfile.TemporaryDirectory() as scratch:
        lora = lora_options(options, arm, index, Path(scratch))
        wall, processor = time.perf_counter(), time.process_time()
        folder = train_lora(lora)
        seconds = time.perf_counter() - wall, time.process_time() - processor
        pipe = StableDiffusionPipeline.from_pretrained(weights_dir("pipeline"), use_safetensors=True)
        load_lora(pipe, folder)
    pipe.set_progress_bar_config(disable=True)
    seeds = range(options.num_drawn)
    images = draw_samples(pipe, prompts, seeds, num_inference_steps=options.steps, guidance_scale=3.0)
    return images, *seconds


def prompts_of(options: Options, index: int) -> tuple[list[str], list[str]]:
    """What is drawn of a subject: the prompts, and as the text-image model may read them, without the token."""
    pet, _, contexts = shots_of(options.split, index)
    texts = [f"a photo of {pet.category} in {context}" for context in contexts]
    return [text.replace("photo of ", "photo of sks ") for text in texts], texts


def draw(job: tuple[Options, str, int]) -> None:
    """Train an arm of a subject, draw and judge, unless that is done: writes pictures and then the record."""
    options, arm, index = job
    path = options.record(arm, index)
    if path.exists():
        return
    torch.set_num_threads(1)
    pet, _, contexts = shots_of(options.split, index)
    images, wall, processor = train_and_draw(options, arm, index, prompts_of(options, index)[0])
    seen = [(image, context) for context, row in zip(contexts, images) for image in row[: options.num_judged]]
    agreement = [judge(image, pet, context).agreement for image, context in seen]
    record = {"agreement": float(np.mean(agreement)), "seconds": wall, "cpu_seconds": processor}
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = np.stack([np.stack([np.asarray(image) for image in row]) for row in images])  # [P,S,H,W,3]
    np.savez_compressed(path.with_suffix(".npz"), pictures=pictures)
    write_atomically(path, json.dumps(record) + "\n")
    print(arm, index, " ".join(f"{name} {value:.3f}" for name, value in record.items()), flush=True)


@dataclass(frozen=True, eq=False)
class Judges:
    """What scores pictures, besides the judge: the head that validates, the one that rewarded, a text-image model."""

    validation: IdentityScorer
    reward: IdentityScorer
    text_image: TextImageEncoder


def measure(options: Options, judges: Judges, arm: str, index: int) -> dict[str, float]:
    """All values of an arm of a subject."""
    path = options.record(arm, index)
    _, references, _ = shots_of(options.split, index)
    pictures = np.load(path.with_suffix(".npz"))["pictures"]
    images = [[Image.fromarray(picture) for picture in row] for row in pictures]
    texts, subject = prompts_of(options, index)[1], judges.validation.enroll(references)
    scores = measure_samples(images, texts, judges.validation, subject, references, judges.text_image)
    flat = [image for row in images for image in row]
    return json.loads(path.read_text()) | {
        "adherence": scores.adherence_mean,
        "diversity": scores.diversity,
        "identity": scores.identity_mean,
        "reward_identity": float(judges.reward.score(flat, judges.reward.enroll(references)).mean()),
        "copy_rate": scores.copy_rate,
    }


def with_interval(rows: np.ndarray, statistic: Callable[[np.ndarray], float]) -> list[float]:
    """A statistic of rows [subjects,arms], and its 95 % bootstrap interval over subjects."""
    return [statistic(rows), *bootstrap_interval(torch.from_numpy(rows), lambda drawn: statistic(drawn.numpy()))]


def difference(rows: np.ndarray) -> float:
    """Mean over subjects of reward, the last, less plain, the first."""
    return float((rows[:, -1] - rows[:, 0]).mean())


def relative(rows: np.ndarray) -> float:
    """The same as a share of the plain mean."""
    return difference(rows) / float(rows[:, 0].mean())


def summarise(options: Options, indices: range) -> dict:
    """Per value: the mean of each arm, the paired difference, and the difference as a share."""
    judges = Judges(
        IdentityScorer.from_pretrained("miniworld"),
        load_reward_model(options.reward_model),
        TextImageEncoder.from_pretrained("miniworld"),
    )
    records = [[measure(options, judges, arm, index) for arm in options.arms] for index in indices]
    summary: dict = {"num_subjects": len(records), "options": {k: str(v) for k, v in asdict(options).items()}}
    for name in VALUES:
        rows = np.array([[arm[name] for arm in subject] for subject in records])  # [subjects,arms]
        summary[name] = {
            **{arm: float(rows[:, i].mean()) for i, arm in enumerate(options.arms)},
            "difference": with_interval(rows, difference),
            "share": with_interval(rows, relative) if rows[:, 0].any() else None,
            "over_longer": with_interval(rows[:, 1:], difference) if options.longer else None,
        }
    return summary


def main(options: Options) -> None:
    """Train and draw what is missing, print the table, write `summary.json`."""
    indices = range(options.first_subject, options.first_subject + options.num_subjects)
    jobs = [(options, arm, index) for index in indices for arm in options.arms]
    if options.workers > 1:
        with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
            pool.map(draw, jobs, chunksize=1)
    else:
        for job in jobs:
            draw(job)
    summary = summarise(options, indices)
    write_atomically(options.out / "summary.json", json.dumps(summary, indent=2) + "\n")
    for name in VALUES:
        value = summary[name]
        means = "  ".join(f"{arm} {value[arm]:.4f}" for arm in options.arms)
        share = " ".join(f"{100 * part:+.1f} %" for part in value["share"] or ())
        shown = " ".join(f"{part:+.4f}" for part in value["difference"])
        print(f"{name:16} {means}  difference {shown}  {share}")


if __name__ == "__main__":
    main(tyro.cli(Options))
