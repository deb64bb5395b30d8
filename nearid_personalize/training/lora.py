"""DreamBooth-LoRA: teach a Stable Diffusion pipeline one subject from a few pictures.

DreamBooth (Ruiz et al. 2023, arXiv:2208.12242) binds a rare token to the subject and keeps the class with generated
prior pictures; LoRA (Hu et al. 2022, arXiv:2106.09685) trains low-rank updates instead of the weights. Whatever is
trained here, the rare token's embedding row included, lies in one `pytorch_lora_weights.safetensors` that a stock
`pipe.load_lora_weights(folder)` reloads with difference 0.

Pictures, and prompts while the text encoder is frozen, are encoded once. Every random draw is a function of (seed,
step, process), so an interrupted and resumed run ends at the weights of an uninterrupted one.

Letters: M pictures, P prompts, B batch, C h w latent channels and size, L tokens, D text width.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from nearid_personalize.errors import InputError
from nearid_personalize.images import load_images, to_tensor

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
ATTENTION_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
CONVOLUTION_LAYERS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
TOKEN_LAYER = "token_embedding"


@dataclass(frozen=True)
class LoraOptions:
    """What to train, on which pictures, for how long."""

    base_model: str
    """StableDiffusionPipeline: folder, Hub id, or "miniworld"."""
    references: Path
    """Folder with a few pictures of the subject."""
    output: Path
    """Folder that receives pytorch_lora_weights.safetensors."""
    prompt: str = "a photo of sks dog"
    """What the reference pictures show; contains the token."""
    token: str = "sks"
    """Rare word that comes to mean the subject; one piece of the tokenizer."""
    token_init: tuple[str, ...] = ()
    """Words whose mean embedding the token starts from; none: its own."""
    class_prompts: tuple[str, ...] = ()
    """Prompts of the prior pictures, e.g. "a photo of a dog"; used in turn."""
    prior_pictures: int = 0
    """Pictures of the class the base model draws for prior preservation; half of every batch. 0: none."""
    prior_weight: float = 1.0
    """Weight of the prior pictures' loss, >= 0."""
    prior_guidance_scale: float = 3.0
    """Classifier-free guidance for the prior pictures, >= 1."""
    rank: int = 16
    """LoRA rank in the denoiser."""
    alpha: float | None = None
    """LoRA alpha in the denoiser: updates are scaled by alpha / rank. None: alpha = rank."""
    layers: Literal["attention", "attention+convolutions"] = "attention+convolutions"
    """Denoiser layers that are trained."""
    text_rank: int = 8
    """LoRA rank in the text encoder; alpha is the same. 0: frozen, prompts are encoded once."""
    train_token: bool = True
    """Train the token's embedding row too, which needs a text rank of at least 1."""
    steps: int = 400
    """Optimizer steps."""
    batch_size: int = 8
    """Pictures per step and process."""
    learning_rate: float = 1e-3
    """AdamW learning rate of the denoiser's LoRA; warm-up 5 %, then cosine to 0."""
    text_learning_rate: float = 5e-4
    """AdamW learning rate of the text encoder's LoRA."""
    token_learning_rate: float = 5e-3
    """AdamW learning rate of the token's row."""
    resolution: int | None = None
    """Picture side in pixels. None: the base model's own."""
    horizontal_flips: bool = False
    """Train on mirrored pictures too; wrong for subjects that are not symmetric."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast. auto: what `accelerate launch --mixed_precision` says, else bf16 where the hardware multiplies it."""
    seed: int = 0
    """Seed of everything random, >= 0."""
    checkpoint_every: int = 0
    """Steps between checkpoints under OUTPUT/checkpoint. 0: none. Removed once training is done."""
    resume: bool = False
    """Go on from the newest checkpoint in OUTPUT."""

    def __post_init__(self) -> None:
        for name in ("rank", "steps", "batch_size"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("text_rank", "prior_pictures", "prior_weight", "seed", "checkpoint_every"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("learning_rate", "text_learning_rate", "token_learning_rate"):
            _require(0 < getattr(self, name) < 1, name, getattr(self, name), "between 0 and 1")
        _require(self.alpha is None or self.alpha > 0, "alpha", self.alpha, "above 0")
        _require(self.prior_guidance_scale >= 1, "prior_guidance_scale", self.prior_guidance_scale, "at least 1")
        _require(self.resolution is None or self.resolution >= 8, "resolution", self.resolution, "at least 8 pixels")
        _require(self.token in self.prompt.split(), "prompt", self.prompt, f"a text with the word {self.token!r}")
        if bool(self.prior_pictures) != bool(self.class_prompts):
            raise InputError(
                f"--prior-pictures {self.prior_pictures} with {len(self.class_prompts)} --class-prompts: give both "
                '(say, --prior-pictures 16 --class-prompts "a photo of a dog") or neither'
            )
        if self.train_token and not self.text_rank:
            # diffusers cannot tell the naming scheme of a text encoder's LoRA that has an embedding layer alone
            raise InputError("--text-rank 0 freezes the text encoder: add --no-train-token, or give a rank above 0")
        if self.prior_pictures:
            _require(self.batch_size >= 2, "batch_size", self.batch_size, "at least 2 with prior pictures")


def _require(condition: bool, field: str, value: object, wanted: str) -> None:
    if not condition:
        raise InputError(f"--{field.replace('_', '-')} must be {wanted}, got {value!r}")


# --- noising ---------------------------------------------------------------------------------------------------------

Noising = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(latents [B,C,h,w], noise [B,C,h,w], level [B] uniform in (0, 1)) -> (noisy, target, timesteps [B])."""


def flow_noising(latents: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Flow matching: x_t = (1 - t) x_0 + t noise, target noise - x_0, with logit-normal t (arXiv:2403.03206, 3.1)."""
    t = torch.sigmoid(torch.special.ndtri(level))  # [B]
    column = t.view(-1, 1, 1, 1)
    return (1 - column) * latents + column * noise, noise - latents, 1000 * t


def diffusion_noising(scheduler: DDPMScheduler) -> Noising:
    """DDPM noising with uniform timesteps and the scheduler's own target, epsilon or v."""

    def apply(latents: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        timesteps = (level * scheduler.config.num_train_timesteps).long()
        noisy = scheduler.add_noise(latents, noise, timesteps)
        if scheduler.config.prediction_type == "v_prediction":
            return noisy, scheduler.get_velocity(latents, noise, timesteps), timesteps
        return noisy, noise, timesteps

    return apply


def noising_of(scheduler_config: dict) -> Noising:
    """Choose the noising the base model was trained with; InputError when its prediction type is unknown."""
    prediction_type = scheduler_config.get("prediction_type", "epsilon")
    if prediction_type == "flow_prediction":
        return flow_noising
    if prediction_type in ("epsilon", "v_prediction"):
        return diffusion_noising(DDPMScheduler.from_config(scheduler_config))
    raise InputError(
        f"--base-model: its scheduler has prediction_type {prediction_type!r}; "
        "epsilon, v_prediction and flow_prediction can be trained"
    )


def stratified_levels(rng: np.random.Generator, count: int) -> Tensor:
    """Draw one level in (0, 1) from each of `count` equal slices, float `[count]`: steadier losses than free draws."""
    return torch.from_numpy((rng.permutation(count) + rng.uniform(0.001, 0.999, count)) / count).float()


# --- pictures, once --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingSet:
    """Encoded pictures: references first, then prior pictures."""

    latents: Tensor  # [M,C,h,w] scaled, float32, CPU
    prompts: tuple[str, ...]  # P, the instance prompt first
    prompt_index: Tensor  # [M] long, into prompts
    num_references: int


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL | AutoencoderTiny, pictures: Sequence[Image.Image], size: int) -> Tensor:
    """Encode centre squares of `size` pixels to scaled latents `[M,C,h,w]` on the CPU, one at a time.

    A variational encoder gives its mean. StableDiffusionPipeline decodes `latents / scaling_factor` and knows no
    shift, so none is applied.
    """
    squares = [ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC) for picture in pictures]
    encoded = [vae.encode(pixels[None].to(vae.device) * 2 - 1) for pixels in to_tensor(squares)]
    latents = [e.latents if hasattr(e, "latents") else e.latent_dist.mode() for e in encoded]
    return torch.cat(latents).cpu() * vae.config.scaling_factor


@torch.no_grad()
def draw_prior(pipe: StableDiffusionPipeline, options: LoraOptions, size: int) -> Tensor:
    """Draw the base model's own pictures of the class as latents `[N,C,h,w]`: no decoding, no encoding."""
    latents = []
    for index in tqdm(range(options.prior_pictures), desc="prior pictures"):
        output = pipe(
            options.class_prompts[index % len(options.class_prompts)],
            height=size,
            width=size,
            num_inference_steps=20,
            guidance_scale=options.prior_guidance_scale,
            generator=torch.Generator("cpu").manual_seed(options.seed + index),
            output_type="latent",
        )
        latents.append(output.images.float().cpu())
    return torch.cat(latents)


def build_training_set(pipe: StableDiffusionPipeline, options: LoraOptions) -> TrainingSet:
    """Read, encode and draw every picture that training uses."""
    factor = pipe.vae_scale_factor
    size = options.resolution or pipe.unet.config.sample_size * factor
    _require(size % factor == 0, "resolution", size, f"a multiple of {factor}")
    pictures = load_images(options.references)
    if options.horizontal_flips:
        pictures = [*pictures, *(ImageOps.mirror(picture) for picture in pictures)]
    latents = encode_pictures(pipe.vae, pictures, size)
    prompt_index = [0] * len(pictures)
    if options.prior_pictures:
        latents = torch.cat([latents, draw_prior(pipe, options, size)])
        prompt_index += [1 + index % len(options.class_prompts) for index in range(options.prior_pictures)]
    return TrainingSet(latents, (options.prompt, *options.class_prompts), torch.tensor(prompt_index), len(pictures))


# --- what is trained -------------------------------------------------------------------------------------------------


class PromptedDenoiser(nn.Module):
    """UNet and text encoder as one module, so that one `prepare` covers both.

    `prompt_input` is token ids `[P,L]` while the text encoder learns, else embeddings `[P,L,D]` made once. Autocast is
    entered here because accelerate's own precision is fixed once for a whole process.
    """

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, bf16: bool = False) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder
        self.bf16 = bf16

    def forward(self, noisy: Tensor, timesteps: Tensor, prompt_input: Tensor, prompt_index: Tensor) -> Tensor:
        with torch.autocast(noisy.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            embeddings = prompt_input if prompt_input.is_floating_point() else self.text_encoder(prompt_input)[0]
            return self.unet(noisy, timesteps, embeddings[prompt_index]).sample


def add_adapters(pipe: StableDiffusionPipeline, options: LoraOptions, bf16: bool = False) -> PromptedDenoiser:
    """Freeze the pipeline's models and put LoRA layers into them."""
    pipe.unet.requires_grad_(False)
    pipe.text_encoder.requires_grad_(False)
    layers = ATTENTION_LAYERS + (CONVOLUTION_LAYERS if options.layers == "attention+convolutions" else ())
    pipe.unet.add_adapter(
        LoraConfig(r=options.rank, lora_alpha=options.alpha or options.rank, target_modules=list(layers))
    )
    if options.text_rank:
        text_layers = TEXT_LAYERS + ((TOKEN_LAYER,) if options.train_token else ())
        pipe.text_encoder.add_adapter(
            LoraConfig(r=options.text_rank, lora_alpha=options.text_rank, target_modules=list(text_layers))
        )
    if options.train_token:
        free_token_row(pipe.text_encoder, pipe.tokenizer, options.token, options.token_init)
    return PromptedDenoiser(pipe.unet, pipe.text_encoder, bf16)


def token_id(tokenizer: CLIPTokenizer, word: str, flag: str) -> int:
    """Return the one id of `word`; InputError naming `flag` when the tokenizer splits or does not know it."""
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise InputError(f"--{flag} {word!r} is {len(ids)} pieces of this tokenizer; choose a one-piece word, e.g. sks")
    return ids[0]


def free_token_row(text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, token: str, init: Sequence[str]) -> None:
    """Make the token embedding's LoRA (A `[rank,vocabulary]`, B `[D,rank]`) the update of one row.

    The update of row i is `B A[:, i]`: with A frozen to a single 1 in the token's column, the first column of B *is*
    the change of the token's row. The rank stays that of the other text layers, because diffusers reads one rank for
    all of them from files that lost their metadata.
    """
    row = token_id(tokenizer, token, "token")
    layer = text_encoder.get_input_embeddings()
    with torch.no_grad():
        layer.lora_embedding_A["default"].zero_()[0, row] = 1
        layer.lora_embedding_B["default"].zero_()
        if init:
            words = layer.base_layer.weight[[token_id(tokenizer, word, "token-init") for word in init]]  # [words,D]
            layer.lora_embedding_B["default"][:, 0] = words.mean(0) - layer.base_layer.weight[row]
    layer.lora_embedding_A["default"].requires_grad_(False)


def parameter_groups(model: PromptedDenoiser, options: LoraOptions) -> list[dict]:
    """Sort trained parameters by learning rate: denoiser, text layers, token row."""
    text = {name: p for name, p in model.text_encoder.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for p in model.unet.parameters() if p.requires_grad], "lr": options.learning_rate},
        {"params": [p for n, p in text.items() if TOKEN_LAYER not in n], "lr": options.text_learning_rate},
        {"params": [p for n, p in text.items() if TOKEN_LAYER in n], "lr": options.token_learning_rate},
    ]
    return [group for group in groups if group["params"]]


def prompt_inputs(pipe: StableDiffusionPipeline, prompts: Sequence[str], as_ids: bool) -> Tensor:
    """Return token ids `[P,L]`, or, for a frozen text encoder, embeddings `[P,L,D]`."""
    ids = pipe.tokenizer(
        list(prompts),
        padding="max_length",
        max_length=pipe.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids.to(pipe.device)
    if as_ids:
        return ids
    with torch.no_grad():
        return pipe.text_encoder(ids)[0]


# --- one step --------------------------------------------------------------------------------------------------------


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over 5 % of `steps`, then cosine to 0; in (0, 1]."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def shuffled_indices(start: int, count: int, size: int, seed: int) -> list[int]:
    """Return entries `start … start + count - 1` of an endless row of seeded permutations of `range(size)`."""
    positions = [divmod(position, size) for position in range(start, start + count)]
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(size) for epoch, _ in positions}
    return [int(orders[epoch][offset]) for epoch, offset in positions]


def batch_indices(data: TrainingSet, batch_size: int, turn: int, seed: int) -> tuple[list[int], int]:
    """Choose the pictures of batch number `turn`, and how many of them are references (they come first)."""
    num_prior = len(data.latents) - data.num_references
    references = batch_size - batch_size // 2 if num_prior else batch_size
    chosen = shuffled_indices(turn * references, references, data.num_references, seed)
    if num_prior:
        count = batch_size - references
        chosen += [data.num_references + i for i in shuffled_indices(turn * count, count, num_prior, seed)]
    return chosen, references


def batch_loss(
    model: nn.Module,
    data: TrainingSet,
    prompt_input: Tensor,
    noising: Noising,
    options: LoraOptions,
    turn: int,
) -> Tensor:
    """Mean squared error of batch `turn`: references' mean plus `prior_weight` times the prior pictures' mean."""
    rng = np.random.default_rng([options.seed, turn])
    chosen, references = batch_indices(data, options.batch_size, turn, options.seed)
    latents = data.latents[chosen]  # [B,C,h,w]
    noise = torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32))
    levels = torch.cat([stratified_levels(rng, references), stratified_levels(rng, len(chosen) - references)])
    noisy, target, timesteps = noising(latents, noise, levels)

    device = prompt_input.device
    predicted = model(noisy.to(device), timesteps.to(device), prompt_input, data.prompt_index[chosen].to(device))
    errors = F.mse_loss(predicted.float(), target.to(device), reduction="none").mean(dim=(1, 2, 3))  # [B]
    loss = errors[:references].mean()
    return loss + options.prior_weight * errors[references:].mean() if len(chosen) > references else loss


# --- checkpoints -----------------------------------------------------------------------------------------------------


def save_only_adapters(accelerator: Accelerator, model: PromptedDenoiser) -> None:
    """Let `save_state` and `load_state` handle the LoRA layers alone, instead of the whole frozen base model."""

    def save(models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        adapters = {name: p.detach().contiguous() for name, p in model.named_parameters() if "lora_" in name}
        save_file(adapters, Path(folder, "adapters.safetensors"))
        weights.clear()  # accelerate writes what is left in here

    def load(models: list[nn.Module], folder: str) -> None:
        model.load_state_dict(load_file(Path(folder, "adapters.safetensors")), strict=False)
        models.clear()  # and reads what is left in here

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def checkpoints(output: Path) -> list[Path]:
    """List whole checkpoints, oldest first."""
    return sorted(output.glob("checkpoint/step-??????"))


def save_checkpoint(accelerator: Accelerator, options: LoraOptions, step: int) -> None:
    """Write the state after `step` steps, under a temporary name until it is whole, then drop older ones."""
    folder = options.output / "checkpoint" / f"step-{step:06d}"
    partial = folder.with_name(folder.name + ".partial")
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / "options.json").write_text(json.dumps(asdict(options), default=str))
        partial.rename(folder)
        for older in checkpoints(options.output)[:-1]:
            shutil.rmtree(older)


def find_checkpoint(options: LoraOptions) -> Path | None:
    """Return the checkpoint to resume from, None for a fresh start; InputError when `--resume` and OUTPUT disagree."""
    found = checkpoints(options.output)
    if not options.resume:
        if found:
            raise InputError(f"--output {options.output} holds a checkpoint; pass --resume or choose another folder")
        return None
    if not found:
        raise InputError(f"--resume: no checkpoint under {options.output / 'checkpoint'}; start without --resume")
    before = json.loads((found[-1] / "options.json").read_text())
    now = json.loads(json.dumps(asdict(options), default=str))
    for field in fields(options):
        if field.name not in ("resume", "checkpoint_every", "output") and before[field.name] != now[field.name]:
            flag = f"--{field.name.replace('_', '-')}"
            raise InputError(f"--resume: {flag} was {before[field.name]!r}, now {now[field.name]!r}; keep it as it was")
    return found[-1]


# --- base model and result -------------------------------------------------------------------------------------------


def load_base(base_model: str) -> StableDiffusionPipeline:
    """Load the pipeline to personalize in float32, without a safety checker."""
    if base_model == "miniworld":
        from nearid_personalize.miniworld import weights_dir

        base_model = str(weights_dir("pipeline"))
    try:
        class_name = DiffusionPipeline.load_config(base_model)["_class_name"]
        if class_name != "StableDiffusionPipeline":
            raise InputError(f"--base-model {base_model} is a {class_name}; give a StableDiffusionPipeline")
        pipe = StableDiffusionPipeline.from_pretrained(
            base_model,
            dtype=torch.float32,
            use_safetensors=True,
            safety_checker=None,
            requires_safety_checker=False,
        )
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--base-model {base_model}: {reason} Give a pipeline folder or Hub id") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def adapter_metadata(model: UNet2DConditionModel | CLIPTextModel) -> dict:
    """Return the adapter's configuration, which carries alpha; without it a reload falls back to alpha = rank."""
    metadata = model.peft_config["default"].to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in metadata.items()}


def save_lora(model: PromptedDenoiser, output: Path) -> None:
    """Write `pytorch_lora_weights.safetensors` into `output`, whole or not at all.

    The layers keep peft's names: diffusers looks at the first key alone to tell the naming scheme, and the mixed names
    that `convert_state_dict_to_diffusers` gives a UNet with convolutions make it skip the attention layers silently.
    """
    trains_text_encoder = hasattr(model.text_encoder, "peft_config")
    with tempfile.TemporaryDirectory(dir=output, prefix=".lora-") as folder:
        StableDiffusionPipeline.save_lora_weights(
            folder,
            unet_lora_layers=get_peft_model_state_dict(model.unet),
            unet_lora_adapter_metadata=adapter_metadata(model.unet),
            text_encoder_lora_layers=get_peft_model_state_dict(model.text_encoder) if trains_text_encoder else None,
            text_encoder_lora_adapter_metadata=adapter_metadata(model.text_encoder) if trains_text_encoder else None,
        )
        os.replace(Path(folder, WEIGHTS_NAME), output / WEIGHTS_NAME)


def chooses_bf16(precision: str, accelerator: Accelerator) -> bool:
    """Resolve "auto": accelerate's precision when it has one, else bf16 where the hardware multiplies it."""
    if precision != "auto" or accelerator.mixed_precision != "no":
        return precision == "bf16"
    if accelerator.device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def train_lora(options: LoraOptions) -> Path:
    """Train as `options` say; return the folder that holds `pytorch_lora_weights.safetensors`.

    Raises InputError for unusable references, base model, token, checkpoint or output folder.
    """
    checkpoint = find_checkpoint(options)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=options.output).close()
    except OSError as error:
        raise InputError(f"--output {options.output}: {error.strerror}; choose another folder") from error
    accelerator = Accelerator(step_scheduler_with_optimizer=False)
    set_seed(options.seed)

    pipe = load_base(options.base_model).to(accelerator.device)
    token_id(pipe.tokenizer, options.token, "token")
    noising = noising_of(pipe.scheduler.config)
    data = build_training_set(pipe, options)
    prompt_input = prompt_inputs(pipe, data.prompts, as_ids=options.text_rank > 0)
    if accelerator.device.type == "cpu":
        pipe.unet.set_attn_processor(AttnProcessor())  # SDPA's backward pass is never faster there
    bf16 = chooses_bf16(options.precision, accelerator)
    if bf16:
        pipe.unet.to(memory_format=torch.channels_last)  # half-precision convolutions want channels last

    adapted = add_adapters(pipe, options, bf16)
    del pipe
    optimizer = torch.optim.AdamW(parameter_groups(adapted, options), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, options.steps))
    save_only_adapters(accelerator, adapted)
    model, optimizer, schedule = accelerator.prepare(adapted, optimizer, schedule)
    done = 0
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        done = int(checkpoint.name.removeprefix("step-"))

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    progress = tqdm(initial=done, total=options.steps, desc="LoRA", disable=not accelerator.is_local_main_process)
    for step in range(done, options.steps):
        turn = step * accelerator.num_processes + accelerator.process_index
        loss = batch_loss(model, data, prompt_input, noising, options, turn)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        progress.update()
        if options.checkpoint_every and (step + 1) % options.checkpoint_every == 0 and step + 1 < options.steps:
            save_checkpoint(accelerator, options, step + 1)

    progress.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save_lora(adapted, options.output)
        shutil.rmtree(options.output / "checkpoint", ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    return options.output


# --- loading ---------------------------------------------------------------------------------------------------------


def find_lora_file(path: str | Path) -> Path:
    """Return the safetensors file of `path`, a file or a folder; InputError when there is none, or more than one."""
    path = Path(path)
    if path.is_dir():
        inside = [path / WEIGHTS_NAME] if (path / WEIGHTS_NAME).exists() else sorted(path.glob("*.safetensors"))
        if len(inside) != 1:
            raise InputError(f"LoRA {path}: folder holds {len(inside)} .safetensors files; expected one {WEIGHTS_NAME}")
        return inside[0]
    if not path.is_file():
        raise InputError(f"LoRA {path}: no such file; give a .safetensors file or the folder train_lora.py wrote")
    return path


def check_lora_file(file: Path) -> None:
    """Raise InputError unless `file` is whole safetensors with at least one LoRA layer."""
    try:
        with safe_open(file, framework="pt") as content:
            names = list(content.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(f"LoRA {file}: not a safetensors file ({error}); download or train it again") from error
    if not any("lora" in name for name in names):
        raise InputError(f"LoRA {file}: none of its {len(names)} tensors is a LoRA layer; give a LoRA file")


def adapter_tensors(pipe: DiffusionPipeline, adapter_name: str) -> list[Tensor]:
    """List the tensors that one adapter holds in the pipeline's models."""
    models = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    layers = [layer for model in models for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    found = []
    for layer in layers:
        for kind in ("lora_A", "lora_B"):
            found += [getattr(layer, kind)[adapter_name].weight] if adapter_name in getattr(layer, kind) else []
        for kind in ("lora_embedding_A", "lora_embedding_B"):
            found += [getattr(layer, kind)[adapter_name]] if adapter_name in getattr(layer, kind) else []
    return [tensor.detach().cpu() for tensor in found]


def count_missing(wanted: Sequence[Tensor], loaded: Sequence[Tensor]) -> int:
    """Count tensors of `wanted` without an equal of their own in `loaded`, up to the cast to the loaded precision."""
    rest = list(loaded)
    missing = 0
    for tensor in wanted:
        equals = (
            index
            for index, other in enumerate(rest)
            if other.shape == tensor.shape and torch.equal(tensor.to(other.dtype), other)
        )
        if (match := next(equals, None)) is None:
            missing += 1
        else:
            del rest[match]
    return missing


def load_lora(pipe: DiffusionPipeline, path: str | Path, adapter_name: str = "subject") -> None:
    """Load a LoRA file or folder into `pipe`, making sure that every one of its tensors arrived in a layer.

    `pipe.load_lora_weights` only warns, or says nothing, when names fit no layer. Raises InputError for a missing or
    corrupt file and when any tensor was left behind; the pipeline is then without the adapter.
    """
    file = find_lora_file(path)
    check_lora_file(file)
    source = {"pretrained_model_name_or_path_or_dict": str(file.parent), "weight_name": file.name}
    wanted = {k: v for k, v in pipe.lora_state_dict(**source)[0].items() if not k.endswith("alpha")}
    advice = f"it does not fit this {type(pipe).__name__}; was it trained for another base model?"
    try:
        pipe.load_lora_weights(**source, adapter_name=adapter_name)
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        raise InputError(f"LoRA {file}: {advice} ({str(error).splitlines()[0]})") from error
    missing = count_missing(list(wanted.values()), adapter_tensors(pipe, adapter_name))
    if missing:
        pipe.delete_adapters(adapter_name)
        raise InputError(f"LoRA {file}: {missing} of its {len(wanted)} tensors reached no layer; {advice}")
