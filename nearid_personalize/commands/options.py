"""The options of every `nearid` command, checked as they are built."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from nearid_personalize.attention import Attention
from nearid_personalize.errors import InputError
from nearid_personalize.loading import Device

if TYPE_CHECKING:
    from nearid_personalize.distractors.options import BuildOptions

RELEASED_MODEL = "Aleksandar/nearid-siglip2"
RELEASED_TRUNK = "google/siglip2-so400m-patch14-384"
QUICKSTART_LORA_STEPS = 120


@dataclass(frozen=True, kw_only=True)
class Accepting:
    """What decides the score from which on a picture is accepted; shared by the commands that enroll a subject."""

    false_accept_rate: float | None = None
    """Share of near-identical strangers that may be accepted, 0 to 1. Default: that of the encoder's calibration, and
    0.01 or the smallest that they can state of --negatives."""
    negatives: Path | None = None
    """Folder of pictures that are not the subject, but near to it (similar subjects, others of its class), to set the
    accept threshold by: 99 of them can state a rate of 0.01. Default: the encoder's calibration alone."""

    def __post_init__(self) -> None:
        if self.false_accept_rate is not None and not 0 < self.false_accept_rate < 1:
            raise InputError(
                f"--false-accept-rate {self.false_accept_rate:g}: give a share between 0 and 1, such as 0.01"
            )


@dataclass(frozen=True, kw_only=True)
class Guarding(Accepting):
    """How candidates are raced and judged; shared by the commands that draw."""

    race: bool = True
    """Stop candidates half-way whose previews say that they will not be among the best."""
    budget: float | None = None
    """Compute, in candidates run to the end: what stopped ones leave of it begins new seeds. Default: it is saved."""
    until_accepted: bool = False
    """Begin no more candidates once num-images are accepted; the budget is then num-candidates by default."""
    reject_copies: bool = False
    """Reject pictures that repeat a reference photo, and those that repeat a better candidate."""
    text_image_model: str | None = None
    """SigLIP or CLIP (Hub id or folder, or "miniworld"): reject pictures that fit the prompt no better than the
    references do."""
    learn_plan: Path | None = None
    """JSON file that learns how to race on this base model. Prompts are recorded there, with nobody stopped and a
    quarter more candidates, until they tell when to stop whom at a loss of at most 2 %; later runs race by that plan.
    Put it into the base model's folder as race_plan.json to be used without this flag. Default: race carefully."""
    max_batch_size: int = 8
    """Candidates denoised together: memory against speed; halved by itself when memory runs out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("max-batch-size", self.max_batch_size, 1)
        if self.learn_plan is not None and not self.race:
            raise InputError("--learn-plan: cannot be learnt with --no-race; leave one of them out")


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
class Score(Accepting):
    """Score pictures against photos of a subject, most alike first."""

    references: Path
    """Folder with photos of the subject."""
    images: Path | None = None
    """Folder with the pictures to score, or one picture."""
    embeddings: Path | None = None
    """Folder that `nearid embed` wrote, in the place of images."""
    model: str = RELEASED_MODEL
    """NearID encoder: Hub id, folder, or "miniworld" (for the toy world only)."""
    trunk: str | None = None
    """Trunk of a head that was saved alone, when it is not where it was: Hub id or folder."""
    device: Device = "auto"
    """Where the encoder runs."""
    out: Path | None = None
    """Folder for report.json and contact_sheet.png. Default: nothing is written."""
    json: bool = False
    """Print the report to stdout as JSON, and nothing else."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.images is None) == (self.embeddings is None):
            raise InputError("--images: give either --images or --embeddings")


@dataclass(frozen=True)
class Verify:
    """Say of each picture whether it shows the same subject, another, or that it cannot be told."""

    references: Path
    """Folder with photos of the subject."""
    images: Path
    """One picture, or a folder: each picture in it is an item, and so is each of its folders, with all its pictures."""
    out: Path
    """Folder for report.html, contact_sheet.png and report.json."""
    model: str = RELEASED_MODEL
    """NearID encoder: Hub id, folder, or "miniworld" (for the toy world only)."""
    trunk: str | None = None
    """Trunk of a head that was saved alone, when it is not where it was: Hub id or folder."""
    negatives: Path | None = None
    """Folder with pictures of similar subjects: error rates are stated for pictures like them too."""
    false_accept_rate: float = 0.01
    """Share of near-identical strangers that may be called the same, 0 to 1."""
    false_reject_rate: float = 0.05
    """Share of the subject's own pictures that may be called different, 0 to 1."""
    maps: int = 24
    """Show where an item differs for the first so many in the report; a map takes seconds on a CPU."""
    device: Device = "auto"
    """Where the encoder runs."""
    json: bool = False
    """Print the report to stdout as JSON, and nothing else."""

    def __post_init__(self) -> None:
        _at_least("maps", self.maps, 0)
        for name in ("false_accept_rate", "false_reject_rate"):
            rate = getattr(self, name)
            if not 0 < rate < 1:
                raise InputError(f"--{name.replace('_', '-')} {rate:g}: give a share between 0 and 1, such as 0.01")


@dataclass(frozen=True, kw_only=True)
class InGallery:
    """Which gallery; shared by what is done with one."""

    gallery: str
    """Folder of the gallery (LanceDB, or what else that opens), or qdrant://host:port/collection."""
    json: bool = False
    """Print the report to stdout as JSON, and nothing else."""


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """The encoder of a command; shared by those that need one alone."""

    model: str = RELEASED_MODEL
    """NearID encoder: Hub id, folder, or "miniworld" (for the toy world only)."""
    trunk: str | None = None
    """Trunk of a head that was saved alone, when it is not where it was: Hub id or folder."""
    device: Device = "auto"
    """Where the encoder runs."""


@dataclass(frozen=True, kw_only=True)
class GalleryAdd(Encoding, InGallery):
    """Add photos of subjects to a gallery, or pictures that show none of them. Makes the gallery if there is none."""

    photos: Path | None = None
    """Folder of photos of the subject --name; without a name a folder of folders, each a subject of that name."""
    embeddings: Path | None = None
    """Folder that `nearid embed` wrote, in the place of photos: the folder of a picture is its subject."""
    negatives: Path | None = None
    """Folder of pictures that show none of the subjects, to set the accept threshold by: 99 state a rate of 0.01."""
    name: str | None = None
    """The subject that all of it shows."""
    metadata: tuple[str, ...] = ()
    """Facts of these subjects to search by: owner=me age=3."""

    def __post_init__(self) -> None:
        if self.photos is None and self.embeddings is None and self.negatives is None:
            raise InputError("--photos: missing; give --photos, --embeddings or --negatives")


@dataclass(frozen=True, kw_only=True)
class GallerySearch(Encoding, InGallery):
    """Say which subject of a gallery each picture shows, if any."""

    images: Path
    """One picture, or a folder: each picture in it is a query, and so is each of its folders, with all its pictures."""
    false_accept_rate: float | None = None
    """Share of strangers that may be taken for a subject of the gallery, 0 to 1. Default: 0.01, or the smallest that
    the gallery can state."""
    where: tuple[str, ...] = ()
    """Search only subjects with these facts: owner=me owner=you age=3."""
    limit: int = 5
    """Subjects named for each query in the report."""
    exact: bool = False
    """Look at every subject of a gallery with an index, too."""
    out: Path | None = None
    """Folder for report.json. Default: nothing is written."""

    def __post_init__(self) -> None:
        _at_least("limit", self.limit, 1)
        rate = self.false_accept_rate
        if rate is not None and not 0 < rate < 1:
            raise InputError(f"--false-accept-rate {rate:g}: give a share between 0 and 1, such as 0.01")


@dataclass(frozen=True, kw_only=True)
class GalleryList(InGallery):
    """List the subjects of a gallery."""

    where: tuple[str, ...] = ()
    """List only subjects with these facts: owner=me owner=you age=3."""


@dataclass(frozen=True, kw_only=True)
class GalleryRename(InGallery):
    """Give a subject of a gallery another name."""

    name: str
    """The subject."""
    to: str
    """Its new name."""


@dataclass(frozen=True, kw_only=True)
class GalleryRemove(InGallery):
    """Remove a subject from a gallery."""

    name: str
    """The subject."""


@dataclass(frozen=True)
class Gallery:
    """Keep many subjects, and say which of them a picture shows, if any."""

    command: Annotated[
        Annotated[GalleryAdd, tyro.conf.subcommand("add", prefix_name=False)]
        | Annotated[GallerySearch, tyro.conf.subcommand("search", prefix_name=False)]
        | Annotated[GalleryList, tyro.conf.subcommand("list", prefix_name=False)]
        | Annotated[GalleryRename, tyro.conf.subcommand("rename", prefix_name=False)]
        | Annotated[GalleryRemove, tyro.conf.subcommand("remove", prefix_name=False)],
        tyro.conf.arg(name=""),
    ]


@dataclass(frozen=True, kw_only=True)
class Embed(Encoding):
    """Embed any number of pictures into shards, for `gallery add --embeddings` and `score --embeddings`."""

    images: str
    """Folder of pictures, parquet files or WebDataset tars (searched to its depth), one such file, s3://..., or a Hub
    data set."""
    out: str
    """Folder or s3://... of the shards. A run that was stopped goes on where it was; one folder for each source."""
    engine: Literal["local", "ray"] = "local"
    """local: in this process. ray: on Ray, on this machine or the cluster that RAY_ADDRESS names; extra [bulk]."""
    workers: int = 1
    """Ray workers, each with an encoder of its own."""
    gpus_per_worker: float = 0.0
    """Share of a GPU that each Ray worker takes: 0.5 puts two on one, so that one decodes while the other embeds."""
    batch_size: int = 64
    """Pictures embedded at once."""
    column: str | None = None
    """Of parquet: the column of the pictures. Default: the first that holds any."""
    json: bool = False
    """Print the report to stdout as JSON, and nothing else."""

    def __post_init__(self) -> None:
        _at_least("workers", self.workers, 1)
        _at_least("batch-size", self.batch_size, 1)
        if self.gpus_per_worker < 0:
            raise InputError(f"--gpus-per-worker {self.gpus_per_worker:g}: must be 0 or more")
        if self.engine == "local" and (self.workers > 1 or self.gpus_per_worker):
            raise InputError("--workers, --gpus-per-worker: are Ray's; give --engine ray")


@dataclass(frozen=True)
class Generate(Guarding):
    """Draw candidates with a diffusers pipeline, keep those that show the subject."""

    base_model: str
    """Text-to-image pipeline: folder, Hub id, one .safetensors file, or "miniworld"."""
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
    base_config: str | None = None
    """Of a base model that is one file: folder or Hub id of a pipeline of its architecture, whose configuration,
    tokenizers and missing parts are taken. None: found by the file's layers, on the Hub or in its cache."""
    guidance_scale: float | None = None
    """Classifier-free guidance. Default: the pipeline's own."""
    device: Device = "auto"
    """Where pipeline and encoder run."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Pipeline weights. auto: float32 on the CPU, else bfloat16."""
    attention: Attention = "auto"
    """What computes the pipeline's attention. auto: its own. xformers and flash need a CUDA GPU and their package."""
    json: bool = False
    """Print report.json to stdout, and nothing else."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_generation(self.seed, self.num_images, self.num_candidates, self.steps)


@dataclass(frozen=True)
class Evaluate:
    """Measure an encoder on identities and their near-identity distractors: SSR, PA, M-O, with 95 % intervals; with
    --benchmark, the paper's table."""

    data: str
    """Identities: a Hub id (Aleksandar/NearID), parquet, a folder of subjects' folders, or "miniworld". For
    dreambench++ the folder where its samples were unpacked."""
    benchmark: Literal["nearid", "mtg", "dreambench++"] | None = None
    """Print a table of the paper: NearID (SSR and PA by source and pooled), Mind-the-Glitch (M-O, M-O pair, SSR, PA) or
    DreamBench++ (M-H by category); the frozen trunk beside the encoder."""
    ratings: Path | None = None
    """For dreambench++: the folder of its human ratings. Default: they are looked for in --data."""
    model: str = RELEASED_MODEL
    """NearID encoder: Hub id, folder, or "miniworld" (for the toy world only)."""
    trunk: str | None = None
    """The encoder's frozen trunk, measured beside it: Hub id or folder. Default: of --model miniworld its own; with
    --benchmark that of the released model too."""
    distractors: tuple[str, ...] = ()
    """Further sets of distractors for the identities: Aleksandar/NearID-Flux, …; each source is measured by itself.
    Default with --benchmark nearid --data Aleksandar/NearID: the seven of the paper's table."""
    split: Literal["train", "val", "test", "all"] = "test"
    """Which of the data's splits; all: the whole of data that has none."""
    hash_splits: bool = False
    """Identities whose split the data does not tell get one by a hash of their id (80 / 10 / 10 %), the one that
    `train_head.py --hash-splits` gives them: what it trained on is never measured."""
    limit: int = 0
    """Measure the first so many identities only (of dreambench++: subjects of each category); 0: all (of the toy
    world: 500)."""
    num_views: int = 3
    """Views of each identity that are compared, at most."""
    out: Path | None = None
    """Folder for report.json. Default: nothing is written."""
    device: Device = "auto"
    """Where the encoder runs."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """With --benchmark, the trunk's weights; heads stay float32. auto: float32 on the CPU, else bfloat16. The paper's
    figures are of float16."""
    json: bool = False
    """Print the report to stdout as JSON, and nothing else."""

    def __post_init__(self) -> None:
        _at_least("limit", self.limit, 0)
        _at_least("num-views", self.num_views, 2)
        if self.ratings is not None and self.benchmark != "dreambench++":
            raise InputError(f"--ratings {self.ratings}: only --benchmark dreambench++ has human ratings")
        if self.dtype != "float32" and self.benchmark is None:
            raise InputError(f"--dtype {self.dtype}: only with --benchmark; else the trunk is float32")
        if self.distractors and self.benchmark in ("mtg", "dreambench++"):
            raise InputError(
                f"--distractors {self.distractors[0]}: --benchmark {self.benchmark} brings its own pictures"
            )


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
    attention: Attention = "auto"
    """What computes the pipeline's attention. auto: its own. xformers and flash need a CUDA GPU and their package."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Base models' weights, for drawing and for training. auto: float32 on the CPU, else bfloat16."""
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


LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Serve:
    """Answer programs over HTTP: /enroll, /score, /verify, /search; /openapi.json describes them."""

    host: str = "127.0.0.1"
    """Address to listen on. Any but this machine's own needs --token."""
    port: int = 8000
    """Port to listen on; 0: any free one."""
    model: str = RELEASED_MODEL
    """NearID encoder: Hub id, folder, or "miniworld" (for the toy world only)."""
    trunk: str | None = None
    """Trunk of a head that was saved alone, when it is not where it was: Hub id or folder."""
    subjects: Path | None = None
    """Folder where enrolled subjects are kept. Default: a temporary one, gone when the service ends."""
    gallery: str | None = None
    """Gallery that /search looks through: folder (LanceDB, or what else that opens), or qdrant://host:port/collection."""
    token: str | None = None
    """What callers must send as "Authorization: Bearer TOKEN"; better in the environment, as NEARID_TOKEN."""
    max_images: int = 64
    """Pictures that one request may bring, references counted."""
    max_request_mb: int = 200
    """Largest request, megabytes."""
    max_megapixels: int = 50
    """Largest picture, millions of pixels."""
    max_waiting: int = 64
    """Requests that may wait for the model; further ones are told to try again."""
    device: Device = "auto"
    """Where the encoder runs."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The encoder's trunk. auto: float32 on the CPU, else bfloat16."""

    def __post_init__(self) -> None:
        for flag in ("max_images", "max_request_mb", "max_megapixels"):
            _at_least(flag.replace("_", "-"), getattr(self, flag), 1)
        _at_least("max-waiting", self.max_waiting, 0)
        if not 0 <= self.port <= 65535:
            raise InputError(f"--port {self.port}: 0 to 65535 works")


@dataclass(frozen=True)
class ReportCard(Accepting):
    """Draw a finished LoRA at several scales: how often it is the subject, at which scale and checkpoint most often."""

    lora: tuple[Path, ...]
    """LoRA files, or folders of checkpoints; from any trainer whose files diffusers reads."""
    base_model: str
    """Text-to-image pipeline: folder, Hub id, one .safetensors file, or "miniworld"."""
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
    """What to draw. Default: the sample prompts that the trainer left beside the LoRA, or eight for a living subject or
    for a thing."""
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
    base_config: str | None = None
    """Of a base model that is one file: folder or Hub id of a pipeline of its architecture, whose configuration,
    tokenizers and missing parts are taken. None: found by the file's layers, on the Hub or in its cache."""
    text_image_model: str | None = None
    """SigLIP or CLIP (Hub id or folder, or "miniworld"): reject pictures that fit the prompt no better than the
    references do."""
    max_batch_size: int = 8
    """Pictures denoised together: memory against speed; halved by itself when memory runs out."""
    device: Device = "auto"
    """Where pipeline and encoder run."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Pipeline weights. auto: float32 on the CPU, else bfloat16."""
    attention: Attention = "auto"
    """What computes the pipeline's attention. auto: its own. xformers and flash need a CUDA GPU and their package."""
    json: bool = False
    """Print report.json to stdout, and nothing else."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag, value in (("seeds", self.seeds), ("steps", self.steps), ("max-batch-size", self.max_batch_size)):
            _at_least(flag, value, 1)
        for scale in self.scales:
            if not 0 < scale <= 10:
                raise InputError(f"--scales {scale}: must be above 0, at most 10")
        if len(set(self.scales)) < max(len(self.scales), 1) or not self.lora:
            raise InputError(f"--scales {self.scales}, --lora {self.lora}: give at least one of each, none twice")


@dataclass(frozen=True)
class Distractors:
    """Build near-identity distractors from photos: another individual of the kind on each photo's own background."""

    views: str
    """Folder of subjects' folders (with photo.mask.png and category.txt beside the photos), parquet, a Hub id, or
    "miniworld"."""
    base_model: str
    """Inpainting or text-to-image pipeline: folder, Hub id, or "miniworld"."""
    out: Path
    """Folder for the built set, contact_sheet.png, limits.png and report.json. A run that was killed goes on there."""
    category: str | None = None
    """What all subjects are. Default: what category.txt, or the data's column, says."""
    mask_model: str | None = None
    """Finds subjects that have no photo.mask.png: a segmentation or mask-generation model (Hub id or folder), or
    "rembg"."""
    prompts: Path | None = None
    """Text file with prompts to draw from, one a line. Default: made of captions and the vocabulary."""
    vocabulary: Path | None = None
    """JSON file with words for categories. Default: the built-in one."""
    parts: Literal["none", "given", "random"] = "none"
    """Repaint a part of the subject in place of all of it: the one in photo.part.mask.png, or a random connected piece
    of 5 to 60 % of it."""
    seed: int = 0
    """Decides prompts, noise and random parts."""
    tries: int = 3
    """Seeds that are tried for a view until its distractor is kept."""
    steps: int = 30
    """Denoising steps."""
    guidance_scale: float | None = None
    """Classifier-free guidance. Default: the pipeline's own."""
    strength: float | None = None
    """How much of the subject is noised away, 0 to 1. Default: 0.99, or what the pipeline needs."""
    size: int | None = None
    """Longer side at which the model works, pixels. Default: what it was made for."""
    inpaint_class: str | None = None
    """Inpainting class of diffusers to run the base model's parts with, such as FluxInpaintPipeline. Default: the base
    model's own class; text-to-image classes blend latents."""
    controlnet: str | None = None
    """ControlNet for --inpaint-class, shown the photo with the subject black: folder or Hub id."""
    lora: Path | None = None
    """LoRA of the base model, such as one for few steps: a .safetensors file or its folder."""
    dilate: float = 0.04
    """How far beyond the mask is repainted, as a share of the photo's longer side."""
    feather: float = 0.0
    """Over which share of the photo's longer side, from the border inwards, the photo passes into the repainted."""
    padding: float = 0.5
    """Room around the subject in the crop that the model sees, as a share of the subject's longer side."""
    filter: bool = True
    """Refuse distractors that are not near enough, not different enough, or badly made, and try again."""
    model: str = RELEASED_MODEL
    """NearID encoder, or a bare trunk, of the filter: Hub id, folder, or "miniworld"."""
    trunk: str | None = None
    """Trunk of a head that was saved alone, when it is not where it was: Hub id or folder."""
    text_image_model: str | None = None
    """SigLIP or CLIP (Hub id or folder, or "miniworld") of the filter: what is not of the category is refused."""
    not_near: float = 0.1
    """Share of the first tries that is refused as not near enough, 0 to below 1; 0: none."""
    too_alike: float = 0.1
    """Share of the first tries that is refused as too much the same subject."""
    unchanged: float = 0.05
    """Share of the first tries that is refused as hardly changed."""
    seam: float = 0.05
    """Share of the first tries that is refused for a seam."""
    min_trunk_similarity: float | None = None
    """Set that limit, in place of --not-near."""
    max_identity_similarity: float | None = None
    """Set that limit, in place of --too-alike."""
    min_visible_change: float | None = None
    """Set that limit, in place of --unchanged."""
    max_seam: float | None = None
    """Set that limit, in place of --seam."""
    parquet: Path | None = None
    """Also write the set there as views.parquet and distractors.parquet, in the Hub's columns; not inside --out."""
    split: Literal["train", "val", "test"] | None = None
    """Of data that tells splits, build for this one only."""
    limit: int = 0
    """Build for the first so many subjects only; 0: all (of the toy world: 100)."""
    link: bool = False
    """Hard links to the photos in place of copies."""
    batch_size: int = 4
    """Pictures that text-to-image pipelines repaint together."""
    device: Device = "auto"
    """Where all models run."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Pipeline weights. auto: float32 on the CPU, else bfloat16."""
    dry_run: bool = False
    """Draw one distractor, say how many there would be, how long it would take and how much disk, and stop."""
    json: bool = False
    """Print report.json to stdout, and nothing else."""

    def __post_init__(self) -> None:
        _at_least("steps", self.steps, 1)
        if self.strength is not None and not 0 < self.strength <= 1:
            raise InputError(f"--strength {self.strength:g}: must be above 0, at most 1")
        if self.controlnet is not None and self.inpaint_class is None:
            raise InputError(f"--controlnet {self.controlnet}: needs --inpaint-class, the class that uses it")
        if self.parquet is not None and self.parquet.resolve().is_relative_to(self.out.resolve()):
            raise InputError(f"--parquet {self.parquet}: inside --out, whose pictures would then be read from it")
        assert self.building is not None, "raises for what cannot be"

    @property
    def building(self) -> "BuildOptions":
        """The options of the library's function."""
        from nearid_personalize.distractors.nearness import Limits, Quantiles
        from nearid_personalize.distractors.options import BuildOptions

        shared = {field.name for field in fields(BuildOptions)} - {"quantiles", "limits"}
        return BuildOptions(
            **{name: getattr(self, name) for name in shared},
            quantiles=Quantiles(
                not_near=self.not_near, too_alike=self.too_alike, unchanged=self.unchanged, seam=self.seam
            ),
            limits=Limits(
                min_trunk_similarity=self.min_trunk_similarity,
                max_identity_similarity=self.max_identity_similarity,
                min_visible_change=self.min_visible_change,
                max_seam=self.max_seam,
            ),
        )


def _at_least(flag: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(f"--{flag} {value}: must be {least} or more")


def _check_generation(seed: int, num_images: int, num_candidates: int, steps: int) -> None:
    _at_least("seed", seed, 0)
    _at_least("num-images", num_images, 1)
    _at_least("steps", steps, 1)
    if num_candidates < num_images:
        raise InputError(f"--num-candidates {num_candidates}: must be --num-images ({num_images}) or more")
