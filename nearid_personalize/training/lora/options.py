"""What the LoRA trainer can be told, in groups; contradictions are refused by the name of the flag.

A group's name is no part of its flags: `options.adapter.rank` is --rank.
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from nearid_personalize.attention import Attention
from nearid_personalize.errors import InputError

FlowWeighting = Literal["logit-normal", "mode", "cosmap", "sigma-sqrt", "none"]
Schedule = Literal["cosine", "linear", "constant", "polynomial"]
RATES = ("learning_rate", "text_learning_rate", "token_learning_rate")
"""The learning rates that a base model's folder may ask for."""


def require(condition: bool, field: str, value: object, wanted: str) -> None:
    """Raise InputError naming the flag of `field` unless the condition holds."""
    if not condition:
        raise InputError(f"--{field.replace('_', '-')} must be {wanted}, got {value!r}")


@dataclass(frozen=True)
class DataOptions:
    """The pictures, what they show, and how they become batches."""

    references: Path
    """Folder with a few pictures of the subject. Captions: photo.txt beside photo.jpg, or metadata.jsonl."""
    prompt: str = "a photo of sks dog"
    """What the reference pictures without a caption show; contains the token."""
    token: str = "sks"
    """Rare word that comes to mean the subject; one piece of the tokenizer where its row is trained."""
    class_prompts: tuple[str, ...] = ()
    """Prompts of the prior pictures, e.g. "a photo of a dog"; used in turn."""
    prior_pictures: int = 0
    """Pictures of the class for prior preservation; half of every batch. 0: none."""
    class_pictures: Path | None = None
    """Folder of class pictures; the base model draws those that are missing. None: OUTPUT/class_pictures."""
    prior_weight: float = 1.0
    """Weight of the prior pictures' loss, >= 0."""
    prior_guidance_scale: float = 3.0
    """Classifier-free guidance for the prior pictures, >= 1."""
    masks: Path | None = None
    """Folder of subject masks named as the photos, white on the subject. None: photo.mask.png beside photo.jpg."""
    background_weight: float = 1.0
    """Weight of the loss outside the mask, in [0, 1]. Below 1 every reference needs a mask."""
    caption_dropout: float = 0.0
    """Share of pictures that are trained on without their caption, in [0, 1); for classifier-free guidance."""
    batch_size: int = 8
    """Pictures per batch and process."""
    resolution: int | None = None
    """Picture side in pixels. None: the base model's own."""
    aspect_buckets: bool = False
    """Keep each picture's shape, about as many pixels as a square of `resolution`, instead of its centre square."""
    horizontal_flips: bool = False
    """Train on mirrored pictures too; wrong for subjects that are not symmetric."""

    def __post_init__(self) -> None:
        require(self.token in self.prompt.split(), "prompt", self.prompt, f"a text with the word {self.token!r}")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        for name in ("prior_pictures", "prior_weight"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(self.prior_guidance_scale >= 1, "prior_guidance_scale", self.prior_guidance_scale, "at least 1")
        require(0 <= self.background_weight <= 1, "background_weight", self.background_weight, "in [0, 1]")
        require(0 <= self.caption_dropout < 1, "caption_dropout", self.caption_dropout, "in [0, 1)")
        require(self.resolution is None or self.resolution >= 8, "resolution", self.resolution, "at least 8 pixels")
        if bool(self.prior_pictures) != bool(self.class_prompts):
            raise InputError(
                f"--prior-pictures {self.prior_pictures} with {len(self.class_prompts)} --class-prompts: give both "
                '(say, --prior-pictures 16 --class-prompts "a photo of a dog") or neither'
            )
        if self.prior_pictures:
            require(self.batch_size >= 2, "batch_size", self.batch_size, "at least 2 with prior pictures")
        if self.masks and self.background_weight == 1:
            raise InputError(f"--masks {self.masks} changes nothing at --background-weight 1; try 0.1")

    @property
    def subject_name(self) -> str:
        """The prompt from its token on, e.g. "sks dog"."""
        words = self.prompt.split()
        return " ".join(words[words.index(self.token) :])


@dataclass(frozen=True)
class NoiseOptions:
    """How latents are noised, and how much each noise level counts."""

    noise_offset: float = 0.0
    """Strength of noise that is the same all over a latent channel, >= 0, e.g. 0.05: darker and lighter pictures are
    learnt better. Not for flow prediction."""
    distilled_guidance: float | None = None
    """Guidance that a guidance-distilled transformer (FLUX.1 [dev]) is told while it trains. None: 1."""
    min_snr_gamma: float | None = None
    """Cap on the signal-to-noise weight of epsilon and v prediction (arXiv:2303.09556), e.g. 5. None: no weights."""
    flow_weighting: FlowWeighting = "logit-normal"
    """Flow prediction: how noise levels are drawn or weighted (arXiv:2403.03206, 3.1)."""
    logit_mean: float = 0.0
    """Mean of the logit-normal noise levels; above 0: noisier."""
    logit_std: float = 1.0
    """Standard deviation of the logit-normal noise levels, above 0."""

    def __post_init__(self) -> None:
        require(self.noise_offset >= 0, "noise_offset", self.noise_offset, "0 or more")
        guidance, gamma = self.distilled_guidance, self.min_snr_gamma
        require(guidance is None or guidance >= 0, "distilled_guidance", guidance, "0 or more")
        require(gamma is None or gamma > 0, "min_snr_gamma", gamma, "above 0")
        require(self.logit_std > 0, "logit_std", self.logit_std, "above 0")


@dataclass(frozen=True)
class AdapterOptions:
    """Which layers get a LoRA, and how large it is."""

    rank: int = 16
    """LoRA rank in the denoiser."""
    alpha: float | None = None
    """LoRA alpha in the denoiser: updates are scaled by alpha / rank. None: alpha = rank."""
    dropout: float = 0.0
    """Share of a LoRA layer's inputs that is dropped, in [0, 1)."""
    dora: bool = False
    """Train magnitude and direction of the denoiser's weights apart (DoRA, arXiv:2402.09353)."""
    layers: Literal["attention", "attention+convolutions"] = "attention+convolutions"
    """Denoiser layers that are trained; transformers have no convolutions."""
    target_modules: tuple[str, ...] = ()
    """Denoiser layers by the end of their names, e.g. to_q to_v; replaces `layers`."""
    text_rank: int | None = None
    """LoRA rank in the CLIP text encoders; alpha is the same. 0: frozen. None: 8 for Stable Diffusion, else 0."""
    train_token: bool = True
    """Where a text encoder is trained, train the token's embedding row too."""
    token_init: tuple[str, ...] = ()
    """Words whose mean embedding the token starts from; none: its own."""

    def __post_init__(self) -> None:
        require(self.rank >= 1, "rank", self.rank, "at least 1")
        require(self.alpha is None or self.alpha > 0, "alpha", self.alpha, "above 0")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")
        require((self.text_rank or 0) >= 0, "text_rank", self.text_rank, "0 or more")
        if self.token_init and (self.text_rank == 0 or not self.train_token):
            raise InputError("--token-init needs a trained token: drop --no-train-token, give a --text-rank above 0")


@dataclass(frozen=True)
class OptimizerOptions:
    """How the LoRA is optimized."""

    optimizer: Literal["adamw", "adamw8bit", "prodigy"] = "adamw"
    """adamw8bit needs bitsandbytes; prodigy needs prodigyopt and finds its learning rates itself."""
    learning_rate: float | None = None
    """Learning rate of the denoiser's LoRA. None: what the base model's folder asks for in lora_training.json,
    else 1e-4."""
    text_learning_rate: float | None = None
    """Learning rate of the text encoders' LoRA. None: likewise, else 1e-5 for Stable Diffusion, 5e-6 from SDXL on."""
    token_learning_rate: float | None = None
    """Learning rate of the token's row. None: likewise, else 5e-4."""
    lr_scheduler: Schedule = "cosine"
    """How the learning rates fall after the warm-up, by its name in diffusers."""
    warmup_steps: int | None = None
    """Optimizer steps over which the learning rates rise. None: 5 % of the steps."""
    weight_decay: float = 0.0
    """AdamW's and Prodigy's weight decay, >= 0."""
    max_gradient_norm: float = 1.0
    """Gradients of a greater norm are cut down to it; above 0. inf: never."""
    gradient_accumulation_steps: int = 1
    """Batches per optimizer step."""
    ema_decay: float = 0.0
    """Decay of the average of the LoRA over the steps, which is then what is saved; in [0, 1). 0: none."""

    def __post_init__(self) -> None:
        for name in RATES:
            rate = getattr(self, name)
            require(rate is None or 0 < rate < 1, name, rate, "between 0 and 1")
        require((self.warmup_steps or 0) >= 0, "warmup_steps", self.warmup_steps, "0 or more")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        require(self.max_gradient_norm > 0, "max_gradient_norm", self.max_gradient_norm, "above 0")
        passes = self.gradient_accumulation_steps
        require(passes >= 1, "gradient_accumulation_steps", passes, "at least 1")
        require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "in [0, 1)")

    def warmup(self, steps: int) -> int:
        """Steps of the warm-up of a run of so many."""
        return max(1, steps // 20) if self.warmup_steps is None else self.warmup_steps


@dataclass(frozen=True)
class ComputeOptions:
    """Precision, memory and speed; none of it changes what is learnt but for rounding."""

    micro_batch_size: int | Literal["auto"] = "auto"
    """Pictures of a batch that are on the device at once; what is learnt does not depend on it. auto: by base model
    and resolution. Halved when memory runs out."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the arithmetic. auto: what `accelerate launch` says, else bf16 where the hardware multiplies it."""
    base_precision: Literal["auto", "fp32", "same"] = "auto"
    """Of the frozen weights. same: as `precision`. auto: same on an accelerator, else fp32."""
    attention: Attention = "auto"
    """What computes the denoiser's attention. auto: the fastest for training on the device. xformers and flash need a
    CUDA GPU and their package."""
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Recompute activations instead of keeping them: less memory, slower by 1.4 to 2. auto: for the large base models
    on an accelerator, and when one picture does not fit."""

    def __post_init__(self) -> None:
        size = self.micro_batch_size
        require(size == "auto" or size >= 1, "micro_batch_size", size, "auto, or at least 1")


@dataclass(frozen=True)
class RewardOptions:
    """Identity as reward beside the denoising loss."""

    reward_weight: float = 0.0
    """Weight of identity as reward, beside the denoising loss, once the warm-up is over. 0: none."""
    reward_model: str = ""
    """NearID model that rewards: folder, Hub id, or "miniworld"; its head must not be the validation's."""
    reward_prompts: tuple[str, ...] = ()
    """Prompts of the rewarded pictures, with the token, used in turn. None given: those of the references."""
    reward_warmup: float = 0.5
    """Share of the steps without reward, in [0, 1)."""
    reward_every: int = 1
    """From then on every so many steps are rewarded."""
    reward_steps: int = 1
    """Last denoising steps of a rewarded picture that are differentiated through (DRaFT-K, arXiv:2309.17400)."""
    reward_sampling_steps: int = 10
    """Denoising steps of a rewarded picture."""
    reward_batch_size: int = 2
    """Rewarded pictures per step and process."""
    reward_guidance_scale: float = 1.0
    """Classifier-free guidance of rewarded pictures, >= 1. 1: none."""
    reward_max_drop: float = 0.05
    """Share that adherence or diversity may lose to what it was before the reward, which ends there; in (0, 1)."""

    def __post_init__(self) -> None:
        for name in ("reward_every", "reward_steps", "reward_sampling_steps", "reward_batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        most = self.reward_sampling_steps
        require(self.reward_steps <= most, "reward_steps", self.reward_steps, f"at most --reward-sampling-steps {most}")
        require(self.reward_weight >= 0, "reward_weight", self.reward_weight, "0 or more")
        require(0 <= self.reward_warmup < 1, "reward_warmup", self.reward_warmup, "in [0, 1)")
        require(self.reward_guidance_scale >= 1, "reward_guidance_scale", self.reward_guidance_scale, "at least 1")
        require(0 < self.reward_max_drop < 1, "reward_max_drop", self.reward_max_drop, "in (0, 1)")
        if self.reward_weight and not self.reward_model:
            raise InputError(f"--reward-weight {self.reward_weight} needs a --reward-model: a NearID folder or Hub id")

    @property
    def texts(self) -> tuple[str, ...]:
        """Texts to encode for the rewarded pictures, besides those of the training pictures."""
        if not self.reward_weight:
            return ()
        return self.reward_prompts + (("",) if self.reward_guidance_scale > 1 else ())

    def first_step(self, steps: int) -> int:
        """The first rewarded step, counted from 1, of a run of so many."""
        return int(self.reward_warmup * steps) + 1


@dataclass(frozen=True)
class CheckpointOptions:
    """What is kept to resume from."""

    checkpoint_every: int = 0
    """Steps between checkpoints under OUTPUT/checkpoint. 0: none."""
    checkpoints_total_limit: int = 1
    """Checkpoints that are kept; the oldest go."""
    keep_checkpoints: bool = False
    """Keep the checkpoints once training is done; each also holds the LoRA as it was."""
    resume: bool = False
    """Go on from the newest checkpoint in OUTPUT."""

    def __post_init__(self) -> None:
        require(self.checkpoint_every >= 0, "checkpoint_every", self.checkpoint_every, "0 or more")
        limit = self.checkpoints_total_limit
        require(limit >= 1, "checkpoints_total_limit", limit, "at least 1")


@dataclass(frozen=True)
class BaseSource:
    """Which of a base model's files are read."""

    variant: str | None = None
    """Weights of that name, e.g. fp16 for diffusion_pytorch_model.fp16.safetensors. None: those without."""
    revision: str | None = None
    """Branch, tag or commit of a Hub repository. None: main."""
    base_config: str | None = None
    """Of a base model that is one .safetensors file: folder or Hub id of a pipeline of the same architecture, whose
    configuration, tokenizers and missing parts are taken. None: found by the file's layers, on the Hub or in its
    cache."""


@dataclass(frozen=True)
class Publishing:
    """Where a run is told of while it trains, and where its LoRA goes afterwards."""

    report_to: tuple[str, ...] = ()
    """Trackers that are told the loss and the learning rate of every step, and the figures of validations, through
    accelerate: tensorboard (into OUTPUT/logs), wandb, mlflow, ..."""
    push_to_hub: str | None = None
    """Hub repository owner/name that receives the LoRA and a model card; made anew it is private. Needs `hf auth login`
    or HF_TOKEN."""


FLAT = tyro.conf.arg(name="")
"""A group whose name is no part of its flags."""


@dataclass(frozen=True)
class LoraOptions:
    """What to train, on which pictures, for how long."""

    data: Annotated[DataOptions, FLAT]
    base_model: str
    """Stable Diffusion 1.5 or 2, SDXL, SD3, FLUX.1, Qwen-Image or Z-Image pipeline: folder, Hub id, one .safetensors
    file, or "miniworld"."""
    output: Path
    """Folder that receives pytorch_lora_weights.safetensors."""
    steps: int = 400
    """Optimizer steps."""
    seed: int = 0
    """Seed of everything random, >= 0."""
    validate_every: int = 0
    """Steps between validations; the last step has one too. 0: none."""
    noise: Annotated[NoiseOptions, FLAT] = NoiseOptions()
    adapter: Annotated[AdapterOptions, FLAT] = AdapterOptions()
    optimization: Annotated[OptimizerOptions, FLAT] = OptimizerOptions()
    compute: Annotated[ComputeOptions, FLAT] = ComputeOptions()
    reward: Annotated[RewardOptions, FLAT] = RewardOptions()
    checkpoints: Annotated[CheckpointOptions, FLAT] = CheckpointOptions()
    source: Annotated[BaseSource, FLAT] = BaseSource()
    publishing: Annotated[Publishing, FLAT] = Publishing()

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", self.steps, "at least 1")
        for name in ("seed", "validate_every"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        warmup = self.optimization.warmup_steps or 0
        require(warmup < self.steps, "warmup_steps", warmup, f"below --steps {self.steps}")
        token = self.data.token
        for prompt in self.reward.reward_prompts:
            require(token in prompt.split(), "reward_prompts", prompt, f"a text with the word {token!r}")

    @classmethod
    def of(cls, **values: Any) -> "LoraOptions":
        """Options from values by their flags' names, whichever group each is in. TypeError for a name that is none."""
        for group, kind in GROUPS.items():
            own = {field.name: values.pop(field.name) for field in fields(kind) if field.name in values}
            values[group] = values.get(group) or kind(**own)
        return cls(**values)

    def but(self, **values: Any) -> "LoraOptions":
        """The same options with other values, by their flags' names."""
        return self.of(**{**flat(self), **values})

    @property
    def first_reward_step(self) -> int:
        """The first optimizer step, counted from 1, that is rewarded."""
        return self.reward.first_step(self.steps)


GROUPS: dict[str, type[Any]] = {
    "data": DataOptions,
    "noise": NoiseOptions,
    "adapter": AdapterOptions,
    "optimization": OptimizerOptions,
    "compute": ComputeOptions,
    "reward": RewardOptions,
    "checkpoints": CheckpointOptions,
    "source": BaseSource,
    "publishing": Publishing,
}


def flat(options: Any) -> dict[str, Any]:
    """Every option by its flag's name, those of groups among the rest."""
    told: dict[str, Any] = {}
    for name, value in asdict(options).items():
        told |= value if isinstance(value, dict) else {name: value}
    return told
