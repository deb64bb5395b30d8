"""The `nearid` command: parse, validate, show the plan, call the library, write what came out.

Exit status: 0 done; 2 wrong input, with one line on stderr; 3 done, but nothing was accepted.
"""

import itertools
import json
import math
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import torch
import tyro
from PIL import Image
from tqdm import tqdm

from nearid_personalize.errors import InputError
from nearid_personalize.images import list_images, load_image, load_images, save_image, write_atomically
from nearid_personalize.report import (
    Tile,
    contact_sheet,
    evaluation_report,
    score_report,
    to_json,
    write_generation,
    write_report,
)
from nearid_personalize.selection import rank_candidates

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from nearid_personalize.data import Rows
    from nearid_personalize.floors import Floor
    from nearid_personalize.guard import GuardResult
    from nearid_personalize.report_card import Jury
    from nearid_personalize.scorer import IdentityScorer, Subject
    from nearid_personalize.selection import PreviewProfile
    from nearid_personalize.training.lora import LoraOptions

DONE, WRONG_INPUT, NONE_ACCEPTED = 0, 2, 3

QUICKSTART_LORA_STEPS = 120
RELEASED_MODEL = "Aleksandar/nearid-siglip2"
SHEET_LIMIT = 48  # tiles of a score sheet: six rows
ADHERENCE_LEAD = 0.1  # over the references; at 0 an eighth of pictures of another place pass (quality_floor.py)
SCORE_CHUNK = 64  # pictures in memory at once

Device: TypeAlias = Literal["auto", "cpu", "cuda", "mps"]


# --- options ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Guarding:
    """How candidates are raced and judged; shared by the commands that draw."""

    race: bool = True
    """Stop candidates half-way whose previews say that they will not be among the best."""
    budget: float | None = None
    """Compute, in candidates run to the end: what stopped ones leave of it begins new seeds. Default: it is saved."""
    until_accepted: bool = False
    """Begin no more candidates once num-images are accepted; the budget is then num-candidates by default."""
    false_accept_rate: float | None = None
    """Share of near-identical strangers that may be accepted, 0 to 1. Default: that of the encoder's calibration."""
    reject_copies: bool = False
    """Reject pictures that repeat a reference photo, and those that repeat a better candidate."""
    text_image_model: str | None = None
    """SigLIP or CLIP (Hub id or folder, or "miniworld"): reject pictures that fit the prompt no better than the
    references do."""
    preview_profile: Path | None = None
    """JSON file that knows how previews foretell final scores with this base model and encoder, so that candidates are
    stopped sooner. Read if it is there; what this run teaches is added. Default: the toy world has one of its own."""
    max_batch_size: int = 8
    """Candidates denoised together: memory against speed; halved by itself when memory runs out."""

    def __post_init__(self) -> None:
        _at_least("max-batch-size", self.max_batch_size, 1)


@dataclass(frozen=True)
class Quickstart(Guarding):
    """The whole job on the embedded toy world: train a LoRA on four pictures of a pet, draw, keep what is that pet."""

    out: Path = Path("quickstart")
    """Folder for the references, LoRA, candidates, contact sheet and report.json."""
    subject_index: int = 0
    """Which pet, 0 or more; none of them was seen in training."""
    category: str | None = None
    """dog, cat, bear, robot or teapot. Default: the one that subject-index happens to be."""
    prompt: str | None = None
    """What to draw; holds "sks CATEGORY". Default: "a photo of sks CATEGORY in space"."""
    seed: int = 0
    """Candidate k is drawn from seed + k."""
    num_candidates: int = 16
    """Pictures to draw."""
    num_images: int = 4
    """Accepted pictures wanted."""
    steps: int = 20
    """Denoising steps."""
    guidance_scale: float = 3.0
    """Classifier-free guidance."""
    lora_steps: int = QUICKSTART_LORA_STEPS
    """LoRA training steps."""
    json: bool = False
    """Print report.json to stdout, and nothing else."""

    def __post_init__(self) -> None:
        _at_least("subject-index", self.subject_index, 0)
        super().__post_init__()
        _check_generation(self.seed, self.num_images, self.num_candidates, self.steps)
        _at_least("lora-steps", self.lora_steps, 1)


@dataclass(frozen=True)
class Score:
    """Score pictures against photos of a subject, most alike first."""

    references: Path
    """Folder with photos of the subject."""
    images: Path
    """Folder with the pictures to score, or one picture."""
    model: str = RELEASED_MODEL
    """NearID encoder: Hub id, folder, or "miniworld" (for the toy world only)."""
    trunk: str | None = None
    """Trunk of a head that was saved alone, when it is not where it was: Hub id or folder."""
    false_accept_rate: float | None = None
    """Share of near-identical strangers that may be accepted, 0 to 1. Default: that of the encoder's calibration."""
    device: Device = "auto"
    """Where the encoder runs."""
    out: Path | None = None
    """Folder for report.json and contact_sheet.png. Default: nothing is written."""
    json: bool = False
    """Print the report to stdout as JSON, and nothing else."""


@dataclass(frozen=True)
class Generate(Guarding):
    """Draw candidates with a diffusers pipeline, keep those that show the subject."""

    base_model: str
    """Text-to-image pipeline: folder, Hub id, or "miniworld"."""
    references: Path
    """Folder with photos of the subject."""
    prompt: str
    """What to draw."""
    out: Path
    """Folder for the candidates, contact sheet and report.json."""
    lora: Path | None = None
    """LoRA of the subject: a .safetensors file or its folder."""
    model: str = RELEASED_MODEL
    """NearID encoder: Hub id, folder, or "miniworld" (for the toy world only)."""
    trunk: str | None = None
    """Trunk of a head that was saved alone, when it is not where it was: Hub id or folder."""
    num_images: int = 4
    """Accepted pictures wanted."""
    num_candidates: int = 16
    """Pictures to draw."""
    seed: int = 0
    """Candidate k is drawn from seed + k."""
    steps: int = 30
    """Denoising steps."""
    guidance_scale: float | None = None
    """Classifier-free guidance. Default: the pipeline's own."""
    device: Device = "auto"
    """Where pipeline and encoder run."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Pipeline weights. auto: float32 on the CPU, else bfloat16."""
    json: bool = False
    """Print report.json to stdout, and nothing else."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_generation(self.seed, self.num_images, self.num_candidates, self.steps)


@dataclass(frozen=True)
class Evaluate:
    """Measure an encoder on identities and their near-identity distractors: SSR, PA, M-O, with 95 % intervals."""

    data: str
    """Identities: a Hub id (Aleksandar/NearID), parquet, a folder of subjects' folders, or "miniworld"."""
    model: str = RELEASED_MODEL
    """NearID encoder: Hub id, folder, or "miniworld" (for the toy world only)."""
    trunk: str | None = None
    """The encoder's frozen trunk, measured beside it: Hub id or folder. Default: of --model miniworld its own."""
    distractors: tuple[str, ...] = ()
    """Further sets of distractors for the identities: Aleksandar/NearID-Flux, …; each source is measured by itself."""
    split: Literal["train", "val", "test", "all"] = "test"
    """Which of the data's splits; all: the whole of data that has none."""
    limit: int = 0
    """Measure the first so many identities only; 0: all (of the toy world: 500)."""
    num_views: int = 3
    """Views of each identity that are compared, at most."""
    out: Path | None = None
    """Folder for report.json. Default: nothing is written."""
    device: Device = "auto"
    """Where the encoder runs."""
    json: bool = False
    """Print the report to stdout as JSON, and nothing else."""

    def __post_init__(self) -> None:
        _at_least("limit", self.limit, 0)
        _at_least("num-views", self.num_views, 2)


@dataclass(frozen=True)
class Pairs:
    """Write winner/loser pairs for DPO-like trainers from what `nearid generate` left."""

    runs: tuple[Path, ...]
    """Folders written by nearid generate, or folders of such folders."""
    out: Path
    """Folder for the pictures, metadata.jsonl and, where `datasets` is installed, pairs.parquet."""
    min_margin: float = 0.05
    """Smallest difference of the two identity scores, above 0."""
    max_pairs: int = 0
    """Pairs of each run, the clearest first; 0: all."""
    any_status: bool = False
    """Pair all finished pictures by score, not only accepted with rejected ones."""
    seed: int = 0
    """Of the order of winner and loser in pairs.parquet."""
    json: bool = False
    """Print what was written to stdout as JSON, and nothing else."""

    def __post_init__(self) -> None:
        _at_least("max-pairs", self.max_pairs, 0)
        if not self.min_margin > 0:
            raise InputError(f"--min-margin {self.min_margin}: must be above 0; smaller differences are noise")


@dataclass(frozen=True)
class Demo:
    """Open the page "My dog in space" in a browser: photos in, pictures of the subject out."""

    host: str = "127.0.0.1"
    """Address to listen on. Any but this machine's own needs --auth."""
    port: int = 7860
    """Port to listen on."""
    base_model: tuple[str, ...] = ("miniworld",)
    """Text-to-image pipelines to choose from: folders, Hub ids, or "miniworld"."""
    model: str | None = None
    """NearID encoder: Hub id or folder. Default: the toy world's for its base model, else the released one."""
    trunk: str | None = None
    """Trunk of a head that was saved alone, when it is not where it was: Hub id or folder."""
    lora: Path | None = None
    """LoRA that a visit starts with: a .safetensors file or its folder."""
    lora_steps: int | None = None
    """LoRA training steps that the page proposes. Default: the base model's usual."""
    steps: int = 20
    """Denoising steps that the page proposes."""
    device: Device = "auto"
    """Where everything runs."""
    auth: str | None = None
    """user:password that visitors must give; better in the environment, as NEARID_DEMO_AUTH."""
    max_photos: int = 20
    """Photos that a visitor may have."""
    max_upload_mb: int = 200
    """Largest file that is taken, megabytes."""
    max_visitor_mb: int = 1000
    """All that one visitor's photos, LoRAs and pictures may take, megabytes."""
    keep_hours: float = 2.0
    """Hours after their last use that visitors' photos, LoRAs and pictures are deleted."""

    def __post_init__(self) -> None:
        for flag in ("port", "steps", "max_upload_mb", "max_visitor_mb", "max_photos"):
            _at_least(flag.replace("_", "-"), getattr(self, flag), 1)
        _at_least("lora-steps", 1 if self.lora_steps is None else self.lora_steps, 1)
        if not self.base_model:
            raise InputError("--base-model: name at least one")
        if self.keep_hours <= 0:
            raise InputError(f"--keep-hours {self.keep_hours:g}: must be above 0")

    @property
    def encoder(self) -> str:
        """The encoder's name."""
        return self.model or ("miniworld" if self.base_model[0] == "miniworld" else RELEASED_MODEL)


@dataclass(frozen=True)
class ReportCard:
    """Draw a finished LoRA at several scales: how often it is the subject, at which scale and checkpoint most often."""

    lora: tuple[Path, ...]
    """LoRA files, or folders of checkpoints; from any trainer whose files diffusers reads."""
    base_model: str
    """Text-to-image pipeline: folder, Hub id, or "miniworld"."""
    references: Path
    """Folder with photos of the subject."""
    out: Path = Path("report-card")
    """Folder for report_card.html, contact_sheet.png and report.json."""
    model: str = RELEASED_MODEL
    """NearID encoder: Hub id, folder, or "miniworld" (for the toy world only)."""
    trunk: str | None = None
    """Trunk of a head that was saved alone, when it is not where it was: Hub id or folder."""
    subject: str | None = None
    """What the LoRA calls the subject, its rare word first: "sks dog". Default: what the LoRA file says."""
    prompts: tuple[str, ...] = ()
    """What to draw. Default: eight prompts for a living subject, or for a thing."""
    living: bool = True
    """The subject is an animal or a person; decides which default prompts."""
    scales: tuple[float, ...] = (0.6, 0.8, 1.0, 1.2)
    """LoRA scales to draw at, above 0."""
    seeds: int = 4
    """Pictures for each prompt, from seeds 0, 1, ..."""
    steps: int = 30
    """Denoising steps."""
    guidance_scale: float | None = None
    """Classifier-free guidance. Default: the pipeline's own."""
    false_accept_rate: float | None = None
    """Share of near-identical strangers that may be accepted, 0 to 1. Default: that of the encoder's calibration."""
    text_image_model: str | None = None
    """SigLIP or CLIP (Hub id or folder, or "miniworld"): reject pictures that fit the prompt no better than the
    references do."""
    max_batch_size: int = 8
    """Pictures denoised together: memory against speed; halved by itself when memory runs out."""
    device: Device = "auto"
    """Where pipeline and encoder run."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Pipeline weights. auto: float32 on the CPU, else bfloat16."""
    json: bool = False
    """Print report.json to stdout, and nothing else."""

    def __post_init__(self) -> None:
        for flag, value in (("seeds", self.seeds), ("steps", self.steps), ("max-batch-size", self.max_batch_size)):
            _at_least(flag, value, 1)
        for scale in self.scales:
            if not 0 < scale <= 10:
                raise InputError(f"--scales {scale}: must be above 0, at most 10")
        if len(set(self.scales)) < max(len(self.scales), 1) or not self.lora:
            raise InputError(f"--scales {self.scales}, --lora {self.lora}: give at least one of each, none twice")


Command: TypeAlias = (
    Annotated[Quickstart, tyro.conf.subcommand("quickstart")]
    | Annotated[Score, tyro.conf.subcommand("score")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Pairs, tyro.conf.subcommand("pairs")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[ReportCard, tyro.conf.subcommand("report-card")]
)
COMMANDS = ("quickstart", "score", "generate", "evaluate", "pairs", "demo", "report-card")


def _at_least(flag: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(f"--{flag} {value}: must be {least} or more")


def _check_generation(seed: int, num_images: int, num_candidates: int, steps: int) -> None:
    _at_least("seed", seed, 0)
    _at_least("num-images", num_images, 1)
    _at_least("steps", steps, 1)
    if num_candidates < num_images:
        raise InputError(f"--num-candidates {num_candidates}: must be --num-images ({num_images}) or more")


# --- entry -----------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its status; `arguments` default to those of the process."""
    try:
        status = run(parse(sys.argv[1:] if arguments is None else arguments))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        status = WRONG_INPUT
    sys.exit(status)


def parse(arguments: Sequence[str]) -> Command:
    """The command that `arguments` spell.

    Raises:
        InputError: unknown command or flag, missing flag, or a value that does not fit.
        SystemExit: after --help.
    """
    command = arguments[0] if arguments and not arguments[0].startswith("-") else ""
    if command and command not in COMMANDS:
        raise InputError(f"unknown command {command!r}; give {', '.join(COMMANDS)}")
    complaint = StringIO()
    try:
        with redirect_stderr(complaint):
            return tyro.cli(
                Command,
                prog="nearid",
                description="An eye for identity for diffusers personalization pipelines.",
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise InputError(f"{_one_line(complaint.getvalue())}; see nearid {command} --help".replace("  ", " ")) from None


def run(command: Command) -> int:
    """Run a parsed command; returns its exit status."""
    _quieten_libraries()
    if isinstance(command, Quickstart):
        return run_quickstart(command)
    if isinstance(command, Score):
        return run_score(command)
    if isinstance(command, Evaluate):
        return run_evaluate(command)
    if isinstance(command, Pairs):
        return run_pairs(command)
    if isinstance(command, Demo):
        return run_demo(command)
    if isinstance(command, ReportCard):
        return run_report_card(command)
    return run_generate(command)


def _one_line(boxed: str) -> str:
    """The message inside tyro's box, below its title and above the next rule; of missing flags only their names."""
    texts = [line.strip("│ ") for line in boxed.splitlines()]
    paragraphs = [list(group) for rule, group in itertools.groupby(texts, _is_rule) if not rule]
    # The title is the box's upper edge, or where stdout cannot hold such an edge, a paragraph of its own.
    message = paragraphs[0][1:] if boxed.startswith("╭") else paragraphs[1]
    if message[0].startswith("Missing from"):
        return "missing " + ", ".join(text.split()[0] for text in message if text.startswith("--"))
    return re.sub(r"^Error parsing \w+: ", "", " ".join(message)).rstrip(".")


def _is_rule(text: str) -> bool:
    return bool(text) and set(text) <= {"─", "-"}


def _quieten_libraries() -> None:
    """Keep the libraries' advice off the terminal, so that an error stays one line. Flags set by the user win."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    from transformers.utils import logging

    if os.environ["TRANSFORMERS_VERBOSITY"] == "error":
        logging.set_verbosity_error()
        logging.disable_progress_bar()


# --- commands --------------------------------------------------------------------------------------------------------


def run_score(options: Score) -> int:
    """`nearid score`."""
    from nearid_personalize.scorer import IdentityScorer

    references = load_images(picture_paths(options.references))
    paths = picture_paths(options.images)
    if options.out is not None:
        check_writable(options.out)
    _say(options.json, f"plan: score {len(paths)} pictures against {len(references)} references with {options.model}")

    clock = Stopwatch()
    with clock.stage("load"):
        scorer = IdentityScorer.from_pretrained(options.model, choose_device(options.device), trunk=options.trunk)
    with clock.stage("score"):
        subject = scorer.enroll(references, false_accept_rate=options.false_accept_rate)
        _say(options.json, subject.describe())
        ranking = rank_candidates(_score_files(scorer, subject, paths), subject.threshold)
    verdicts = [(paths[v.index], v.score, "accepted" if v.accepted else "rejected") for v in ranking]
    report = score_report(
        [Tile(None, path.name, score, status) for path, score, status in verdicts],
        subject.threshold,
        options.model,
        clock.seconds,
    )
    if options.out is not None:
        tiles = [Tile(load_image(path), path.name, score, status) for path, score, status in verdicts[:SHEET_LIMIT]]
        sheet = contact_sheet(references, tiles, str(options.images), subject.threshold)
        save_image(sheet, options.out / "contact_sheet.png")
        write_report(report, options.out / "report.json")
    rows = [(str(rank), path.name, score, status) for rank, (path, score, status) in enumerate(verdicts, start=1)]
    return _conclude(options.json, report, rows, subject.threshold, options.out)


def run_demo(options: Demo) -> int:
    """`nearid demo`."""
    from nearid_personalize.demo.server import serve

    serve(options)
    return DONE


def run_generate(options: Generate) -> int:
    """`nearid generate`."""
    references = load_images(picture_paths(options.references))
    check_writable(options.out)
    _say(
        options.json,
        f"plan: {options.num_candidates} candidates of {options.prompt!r} from {options.base_model}"
        f" (LoRA: {options.lora or 'none'}), scored by {options.model} against {len(references)} references",
    )
    clock = Stopwatch()
    with clock.stage("load"):
        from nearid_personalize.scorer import IdentityScorer

        device = choose_device(options.device)
        scorer = IdentityScorer.from_pretrained(options.model, device, trunk=options.trunk)
        pipe = load_pipeline(options.base_model, device, choose_dtype(options.dtype, device))
        if options.lora is not None:
            from nearid_personalize.training.lora import load_lora

            load_lora(pipe, options.lora)
    result = _guarded(pipe, scorer, references, options.prompt, options)
    lora = None if options.lora is None else str(options.lora)
    models = {"base": options.base_model, "lora": lora, "scorer": options.model}
    return _finish_generation(result, references, models, clock, options.out, options.json)


def run_evaluate(options: Evaluate) -> int:
    """`nearid evaluate`."""
    from nearid_personalize.encoder import load_encoder
    from nearid_personalize.evaluation import evaluate_rows

    if options.out is not None:
        check_writable(options.out)
    rows = evaluation_rows(options)
    encoders = {"encoder": options.model}
    if options.trunk is not None or options.model == "miniworld":
        encoders["frozen trunk"] = options.trunk or "miniworld"
    _say(options.json, f"plan: {len(rows)} identities of {rows.name}, distractors {', '.join(rows.sources)}")
    clock = Stopwatch()
    results = []
    for name, place in encoders.items():
        with clock.stage(name):
            folder = _packaged(place, "nearid" if name == "encoder" else "siglip")
            model, preprocessing, _ = load_encoder(folder)
            model = model.to(choose_device(options.device))
            frozen = name != "encoder"
            measured = evaluate_rows(model, preprocessing, rows, options.num_views, frozen, not options.json)
        results += [{"encoder": name, "source": source, **asdict(found)} for source, found in measured.items()]
    report = evaluation_report(rows.name, options.split, results, encoders, clock.seconds)
    if options.out is not None:
        write_report(report, options.out / "report.json")
    if options.json:
        sys.stdout.write(to_json(report))
    else:
        print(evaluation_table(results))
    return DONE


def run_pairs(options: Pairs) -> int:
    """`nearid pairs`."""
    from nearid_personalize.preferences import find_runs, pairs_of, write_pairs

    runs = find_runs(options.runs)
    check_writable(options.out)
    _say(options.json, f"plan: pairs from {len(runs)} runs, {len({run.prompt for run in runs})} prompts")
    found = [pairs_of(run, options.min_margin, options.max_pairs, not options.any_status) for run in runs]
    pairs = [pair for pairs in found for pair in pairs]
    written = [str(path) for path in write_pairs(pairs, options.out, options.seed)]
    margin = sum(pair.margin for pair in pairs) / len(pairs)
    if options.json:
        sys.stdout.write(to_json({"pairs": len(pairs), "mean_margin": margin, "written": written}))
    else:
        print(f"{len(pairs)} pairs, mean margin {margin:.3f}: {', '.join(written)}")
    return DONE


def run_report_card(options: ReportCard) -> int:
    """`nearid report-card`."""
    from nearid_personalize.report_card import find_loras, report_card, write_card

    loras = find_loras(options.lora)
    subject_name, token, prompts = _card_prompts(options, list(loras.values()))
    references = load_images(picture_paths(options.references))
    check_writable(options.out)
    count = (1 + len(loras) * len(options.scales)) * len(prompts) * options.seeds
    _say(
        options.json,
        f"plan: {count} pictures of {subject_name!r}: {len(prompts)} prompts from {options.seeds} seeds each, of"
        f" {len(loras)} LoRAs at {len(options.scales)} scales and of none, scored by {options.model}",
    )
    clock = Stopwatch()
    with clock.stage("load"):
        device = choose_device(options.device)
        jury = _card_jury(options, references, token, device)
        pipe = load_pipeline(options.base_model, device, choose_dtype(options.dtype, device))
        pipe.set_progress_bar_config(disable=True)
    _say(options.json, jury.subject.describe())
    arguments: dict = {"num_inference_steps": options.steps}
    if options.guidance_scale is not None:
        arguments["guidance_scale"] = options.guidance_scale
    with clock.stage("draw"):
        card = report_card(
            pipe, loras, jury, subject_name, options.scales, prompts, options.seeds, options.max_batch_size, **arguments
        )
    models = {"base": options.base_model, "lora": {k: str(v) for k, v in loras.items()}, "scorer": options.model}
    report = write_card(card, options.out, models, clock.seconds)
    if options.json:
        sys.stdout.write(to_json(report))
    else:
        print(f"{card.summary()}\nlook at {options.out / 'report_card.html'}")
    return DONE if card.best.num_accepted else NONE_ACCEPTED


def _card_prompts(options: ReportCard, loras: Sequence[Path]) -> tuple[str, str, tuple[str, ...]]:
    """The subject's name, its rare token, and the prompts to draw; InputError when nothing says what it is called."""
    from nearid_personalize.report_card import subject_of
    from nearid_personalize.samples import default_prompts
    from nearid_personalize.training.lora_check import check_lora_file

    told = subject_of([check_lora_file(file) for file in loras])
    if options.subject:
        told = (options.subject, options.subject.split()[0])
    if told is None and not options.prompts:
        raise InputError(f'--lora {loras[0]}: does not say what it calls the subject; give --subject "sks dog"')
    name, token = told or (loras[0].stem, "")
    return name, token, options.prompts or default_prompts(name, options.living)


def _card_jury(options: ReportCard, references: Sequence[Image.Image], token: str, device: str) -> "Jury":
    from nearid_personalize.floors import TextImageEncoder
    from nearid_personalize.report_card import Jury
    from nearid_personalize.scorer import IdentityScorer

    scorer = IdentityScorer.from_pretrained(options.model, device, trunk=options.trunk)
    subject = scorer.enroll(references, false_accept_rate=options.false_accept_rate)
    floors = chosen_floors(options.model, scorer, references, True, options.text_image_model)
    text_image = (
        TextImageEncoder.from_pretrained(options.text_image_model, device) if options.text_image_model else None
    )
    return Jury(scorer, subject, references, floors, text_image, token)


def evaluation_rows(options: Evaluate) -> "Rows":
    """The rows that `nearid evaluate` measures; at least one of them has distractors."""
    from nearid_personalize.data import load_rows

    if options.data == "miniworld":
        from nearid_personalize import miniworld

        split = options.split
        if split == "all":
            raise InputError("--split all: the toy world is endless; give train, val or test")
        return miniworld.rows(split, options.limit or 500, options.num_views)
    rows = load_rows(options.data, options.distractors, None if options.split == "all" else options.split)
    if not rows.sources:
        raise InputError(f"{options.data}: no distractors to tell the identities from; name sets with --distractors")
    return rows[: options.limit] if options.limit else rows


def evaluation_table(results: Sequence[dict]) -> str:
    """Measurements as aligned text: one line per encoder and distractor source."""
    from nearid_personalize.evaluation import with_interval

    lines = [f"{'encoder':13} {'distractors':12} {'n':>6}  {'SSR':24} {'PA':24} {'M-O':24} M-O pair"]
    for found in results:
        cells = [with_interval(found[name], found[f"{name}_interval"]) for name in ("ssr", "pa", "m_o", "m_o_pair")]
        lines.append(
            f"{found['encoder']:13} {found['source']:12} {found['num_identities']:6}  "
            + " ".join(f"{cell:24}" for cell in cells).rstrip()
        )
    return "\n".join(lines)


def _packaged(name: str, kind: str) -> str:
    """The folder of a packaged toy model for "miniworld", else the name itself."""
    if name != "miniworld":
        return name
    from nearid_personalize.miniworld import weights_dir

    return str(weights_dir(kind))


def run_quickstart(options: Quickstart) -> int:
    """`nearid quickstart`."""
    from nearid_personalize.miniworld import example_references

    references, category, _ = example_references(options.subject_index, category=options.category)
    prompt = choose_prompt(options.prompt, category, options.subject_index)
    check_writable(options.out)
    reference_dir = _write_references(references, options.out / "references")
    _say(
        options.json,
        f"plan: train a LoRA on {len(references)} pictures of {category} no. {options.subject_index}, then keep the"
        f" best {options.num_images} of {options.num_candidates} candidates of {prompt!r}",
    )
    clock = Stopwatch()
    device = choose_device("auto")
    with clock.stage("load"):
        from nearid_personalize.scorer import IdentityScorer

        scorer = IdentityScorer.from_pretrained("miniworld", device=device)
    with clock.stage("train_lora"):
        from nearid_personalize.training.lora import load_lora, train_lora

        lora = train_lora(
            quickstart_lora(reference_dir, options.out / "lora", category, options.lora_steps, options.seed)
        )
    with clock.stage("load"):
        pipe = load_pipeline("miniworld", device, torch.float32)
        load_lora(pipe, lora)
    result = _guarded(pipe, scorer, references, prompt, options)
    models: dict[str, str | None] = {"base": "miniworld", "lora": "lora", "scorer": "miniworld"}
    return _finish_generation(result, references, models, clock, options.out, options.json)


def quickstart_lora(
    references: Path, output: Path, category: str, steps: int | None = None, seed: int = 0
) -> "LoraOptions":
    """The LoRA recipe of the quickstart: rates, batch and no prior pictures as one validation subject favoured."""
    from nearid_personalize.training.lora import LoraOptions

    return LoraOptions(
        base_model="miniworld",
        references=references,
        output=output,
        prompt=f"a photo of sks {category}",
        batch_size=4,
        steps=steps or QUICKSTART_LORA_STEPS,
        seed=seed,
    )


# --- steps -----------------------------------------------------------------------------------------------------------


class Stopwatch:
    """Wall time by stage, seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside the block to stage `name`."""
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def picture_paths(path: Path) -> list[Path]:
    """The pictures that a flag means: those of a folder, or the one file."""
    return [path] if path.is_file() else list_images(path)


def check_writable(out: Path) -> None:
    """Create the output folder and try a file in it, so that no long work ends at a closed door.

    Raises:
        InputError: it cannot be created or written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"--out {out}: cannot be written ({reason}); give a folder that can") from None


def choose_device(wanted: Device) -> str:
    """The device to run on; "auto" is CUDA where there is one, else the CPU."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[wanted]:
        raise InputError(f"--device {wanted}: not available on this machine; use --device auto or cpu")
    return wanted


def choose_dtype(wanted: str, device: str) -> torch.dtype:
    """The precision of the pipeline's weights; "auto" is float32 on the CPU, else bfloat16."""
    if wanted == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[wanted]


def choose_prompt(wanted: str | None, category: str, subject_index: int) -> str:
    """The quickstart's prompt, which must speak of the subject by its rare token and true category."""
    if wanted is None:
        return f"a photo of sks {category} in space"
    if f"sks {category}" not in wanted:
        raise InputError(
            f'--prompt "{wanted}": subject {subject_index} is a {category}; write of it as "sks {category}"'
        )
    return wanted


def load_pipeline(base_model: str, device: str, dtype: torch.dtype) -> "DiffusionPipeline":
    """A text-to-image pipeline from a folder, the Hub, or the package ("miniworld"); safetensors only.

    Raises:
        InputError: the folder is no pipeline or lacks weights, a file is damaged, or the Hub cannot give it.
    """
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging
    from safetensors import SafetensorError

    if os.environ.get("DIFFUSERS_VERBOSITY") == "error":
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    if base_model == "miniworld":
        from nearid_personalize.miniworld import weights_dir

        source = str(weights_dir("pipeline"))
    else:
        source = base_model
    if Path(source).exists():
        _check_pipeline_folder(base_model, Path(source))
    try:
        return DiffusionPipeline.from_pretrained(source, dtype=dtype, use_safetensors=True).to(device)
    except SafetensorError as error:
        raise InputError(f"--base-model {base_model}: damaged weights ({error}); download the model again") from None
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--base-model {base_model}: {reason}; give a pipeline's folder or a Hub id") from None


def _check_pipeline_folder(flag_value: str, folder: Path) -> None:
    if not (folder / "model_index.json").is_file():
        raise InputError(f"--base-model {flag_value}: has no model_index.json; give the folder of a diffusers pipeline")
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(f"--base-model {flag_value}: model_index.json is damaged; download the model again") from None
    for part in (folder / name for name in index):
        # Only models keep a config.json; schedulers and tokenizers name theirs otherwise and have no weights.
        if (part / "config.json").is_file() and not any(part.glob("*.safetensors")):
            raise InputError(
                f"--base-model {flag_value}: {part.name}/ has no .safetensors weights; download the whole model"
            )


def _write_references(references: Sequence[Image.Image], folder: Path) -> Path:
    """The quickstart's reference pictures as files; the LoRA is trained on all that lies in `folder`."""
    names = [f"reference-{index}.png" for index in range(len(references))]
    folder.mkdir(exist_ok=True)
    strangers = sorted(path.name for path in folder.iterdir() if path.name not in names)
    if strangers:
        raise InputError(f"--out {folder.parent}: references/ already holds {strangers[0]}; give another folder")
    for name, image in zip(names, references):
        save_image(image, folder / name)
    return folder


def _score_files(scorer: "IdentityScorer", subject: "Subject", paths: Sequence[Path]) -> torch.Tensor:
    """Similarities `[N]`; never more than `SCORE_CHUNK` pictures are in memory."""
    chunks = [paths[start : start + SCORE_CHUNK] for start in range(0, len(paths), SCORE_CHUNK)]
    progress = tqdm(chunks, desc="score", disable=len(chunks) == 1)
    return torch.cat([scorer.score([load_image(path) for path in chunk], subject) for chunk in progress])


def chosen_floors(
    model: str,
    scorer: "IdentityScorer",
    references: Sequence[Image.Image],
    reject_copies: bool = False,
    text_image_model: str | None = None,
) -> "list[Floor]":
    """What else a picture must pass: the quality floor of an encoder that has one, and what is asked for."""
    from nearid_personalize.floors import AdherenceFloor, CopyFloor, find_quality_floor

    floors: list[Floor] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is none is no news on every run
        if quality := find_quality_floor(model, scorer):
            floors.append(quality)
    if reject_copies:
        floors.append(CopyFloor.from_references(references))
    if text_image_model is not None:
        floors.append(AdherenceFloor.from_pretrained(text_image_model, ADHERENCE_LEAD, references=references))
    return floors


def _guarded(
    pipe: "DiffusionPipeline",
    scorer: "IdentityScorer",
    references: Sequence[Image.Image],
    prompt: str,
    options: Generate | Quickstart,
) -> "GuardResult":
    from nearid_personalize.floors import COPY_LIMIT
    from nearid_personalize.guard import IdentityGuard, preview_profile
    from nearid_personalize.selection import DEFAULT_POLICY

    subject = scorer.enroll(references, false_accept_rate=options.false_accept_rate)
    _say(options.json, subject.describe())
    base, encoder = (options.base_model, options.model) if isinstance(options, Generate) else ("miniworld",) * 2
    profile = read_profile(options.preview_profile, base == encoder == "miniworld")
    guard = IdentityGuard(
        pipe,
        scorer,
        subject,
        max_batch_size=options.max_batch_size,
        policy=DEFAULT_POLICY if options.race else None,
        floors=chosen_floors(encoder, scorer, references, options.reject_copies, options.text_image_model),
        profile=profile,
        duplicate_limit=COPY_LIMIT if options.reject_copies else None,
    )
    guidance: dict[str, Any] = {} if options.guidance_scale is None else {"guidance_scale": options.guidance_scale}
    result = guard(
        prompt,
        num_images=options.num_images,
        num_candidates=options.num_candidates,
        seed=options.seed,
        budget=options.budget,
        until_accepted=options.until_accepted,
        num_inference_steps=options.steps,
        **guidance,
    )
    if options.preview_profile is not None and (learnt := preview_profile(result.candidates)):
        known = profile.joined(learnt) if profile else learnt
        write_atomically(options.preview_profile, json.dumps(known.to_dict()) + "\n")
    return result


def read_profile(path: Path | None, toy_world: bool) -> "PreviewProfile | None":
    """What `--preview-profile` means: what the file knows, or None where there is none yet.

    toy_world: base model and encoder are the packaged ones, whose profile comes with them.

    Raises InputError for a file that is no profile, or a folder that cannot be written to.
    """
    from nearid_personalize.selection import PreviewProfile

    if path is not None:
        check_writable(path.parent)
    elif toy_world:
        from nearid_personalize.miniworld import weights_dir

        path = weights_dir("pipeline") / "preview_profile.json"
    if path is None or not path.exists():
        return None
    try:
        return PreviewProfile.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (InputError, ValueError, OSError, AttributeError, KeyError) as error:
        raise InputError(f"--preview-profile {path}: not a preview profile ({error}); give another file name") from None


def _finish_generation(
    result: "GuardResult",
    references: Sequence[Image.Image],
    models: dict[str, str | None],
    clock: Stopwatch,
    out: Path,
    as_json: bool,
) -> int:
    """Write what came out, and print the table."""
    report = write_generation(result, references, models, clock.seconds, out)
    names = {c["seed"]: c["image"] for c in report["candidates"] if c["image"]}
    rows = [
        (str(rank), names.get(c.seed, f"seed {c.seed}"), c.score, c.status)
        for rank, c in enumerate(result.ranked, start=1)
    ]
    return _conclude(as_json, report, rows, result.threshold, out)


# --- words -----------------------------------------------------------------------------------------------------------


def _say(as_json: bool, text: str) -> None:
    """A line for the reader; stdout belongs to the report when that is asked for."""
    print(text, file=sys.stderr if as_json else sys.stdout, flush=True)


def _conclude(
    as_json: bool, report: dict, rows: Sequence[tuple[str, str, float, str]], threshold: float, out: Path | None
) -> int:
    """Print the report or a table of (rank, name, score, status); returns the exit status."""
    accepted = sum(status == "accepted" for *_, status in rows)
    if as_json:
        sys.stdout.write(to_json(report))
    else:
        print(table(rows))
        print(f"accepted {accepted} of {len(rows)} (similarity {threshold:.3f} or more)")
        print("  ".join(f"{stage} {value:.1f} s" for stage, value in report["cost"]["seconds"].items()))
        if out is not None:
            print(f"look at {out / 'contact_sheet.png'}")
    return DONE if accepted else NONE_ACCEPTED


def table(rows: Sequence[tuple[str, str, float, str]]) -> str:
    """(rank, name, score, status) rows as aligned text under a heading."""
    cells = [("rank", "picture", "score", "status")]
    cells += [(rank, name, "-" if math.isnan(score) else f"{score:.3f}", status) for rank, name, score, status in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(4)]
    return "\n".join(
        f"{rank:>{widths[0]}}  {name:<{widths[1]}}  {score:>{widths[2]}}  {status}"
        for rank, name, score, status in cells
    )
