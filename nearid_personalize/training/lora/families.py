"""What differs from one model family to the next: a few lines each, so that the training loop exists once.

A family says how its pipeline encodes prompts and pictures, how its denoiser is called, and which layers a LoRA goes
into. Prompts become a *table*: named tensors with one row per prompt. Text that is trained stays token ids in there and
is embedded in every step; all else is embedded once, by the pipeline's own `encode_prompt`.

Letters: B batch, P prompts, L tokens, D text width, C h w latent channels and size, H W picture size.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.training_utils import offload_models
from torch import Tensor, nn

from nearid_personalize.errors import InputError
from nearid_personalize.guard.previews import latents_for_vae
from nearid_personalize.training.lora.drawing import Embeddings, cast_weights, encoding_apart

Table = dict[str, Tensor]


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")


CLIP_TOKENS = 77


PROMPT_TOKENS = 64  # of a prompt of a sentence or two, where prompts are not padded


CONTEXT_FEED_FORWARD = ("ff_context.net.0.proj", "ff_context.net.2")


class Family:
    """One model family around its pipeline. Subclasses state what is theirs.

    Learning rates are those in common use for DreamBooth-LoRA: 1e-4 for the denoiser (diffusers'
    `train_dreambooth_lora_sdxl.py` and `_flux.py` by default, kohya's sd-scripts by advice), 5e-6 for text encoders
    (diffusers' default), 1e-5 and 5e-4 for a text encoder and a token's row trained beside a Stable Diffusion UNet
    (cloneofsimo's `lora_pti`; textual inversion's row rate, arXiv:2208.01618, is of that size too).
    """

    denoiser_name: ClassVar[str] = "transformer"
    text_names: ClassVar[tuple[str, ...]] = ()  # text encoders whose LoRA the pipeline's loader reads
    attention_layers: ClassVar[tuple[str, ...]] = ATTENTION
    convolution_layers: ClassVar[tuple[str, ...]] = ()
    has_checker: ClassVar[bool] = False  # whether a safety checker is to be left out
    learning_rate: float = 1e-4
    text_learning_rate: float = 5e-6
    token_learning_rate: float = 5e-4
    distilled_guidance: float = 1.0  # what a guidance-distilled denoiser is told
    text_rank: ClassVar[int] = 0
    patch: ClassVar[int] = 2  # latent rows and columns that the denoiser takes as one
    pixels_at_once: ClassVar[int] = 1024**2  # of a micro-batch in the memory that docs/memory.md names
    checkpointed: ClassVar[bool] = False  # whether gradients need to be checkpointed there

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.pipe = pipe
        self.embeddings: Embeddings = {}  # of prompts that were drawn, while no text encoder is trained

    @property
    def denoiser(self) -> Any:
        """The pipeline's UNet or transformer."""
        return getattr(self.pipe, self.denoiser_name)

    @property
    def divisor(self) -> int:
        """What picture sides must be a multiple of, pixels."""
        return self.pipe.vae_scale_factor * self.patch

    @property
    def picture_size(self) -> int:
        """Side of the pictures that the base model was made for, pixels; 1024 where it does not say."""
        sample = getattr(self.pipe, "default_sample_size", None) or self.denoiser.config.get("sample_size", 128)
        return sample * self.pipe.vae_scale_factor

    def text_encoders(self) -> dict[str, nn.Module]:
        """Name every text encoder that the pipeline has, to be trained or not."""
        names = (name for name in self.pipe.components if name.startswith("text_encoder"))
        return {name: getattr(self.pipe, name) for name in names if getattr(self.pipe, name) is not None}

    @contextmanager
    def ready_to_draw(self, device: torch.device, sharded: bool = False) -> Iterator[DiffusionPipeline]:
        """Lend the pipeline on `device`, where the denoiser has to be already; its VAE in the denoiser's precision.

        Frozen text encoders come only to encode a prompt, and the denoiser goes meanwhile, unless it is sharded.
        Pipelines give the VAE latents of the denoiser's precision. SDXL's pipeline itself decodes in float32 in place
        of float16.
        """
        vae, encoders = self.pipe.vae, list(self.text_encoders().values())
        with ExitStack() as stack:
            stack.enter_context(cast_weights(vae, self.denoiser.dtype))  # before it moves: what is kept stays behind
            stack.enter_context(offload_models(vae, device=device))
            if any(getattr(encoder, "peft_config", None) for encoder in encoders):
                stack.enter_context(offload_models(*encoders, device=device))
            elif encoders:
                aside = None if sharded else self.denoiser
                stack.enter_context(encoding_apart(self.pipe, encoders, aside, device, self.embeddings))
            yield self.pipe

    def tokenize(self, prompts: Sequence[str]) -> Table:
        """Token ids [P,L] for each text encoder that can be trained, named as the encoder."""
        ids = {}
        for name in self.text_names:
            tokenizer = self.tokenizer(name)
            tokens = tokenizer(
                list(prompts),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            ids[name] = tokens.input_ids
        return ids

    def tokenizer(self, text_name: str) -> Any:
        """The tokenizer of a text encoder."""
        return getattr(self.pipe, text_name.replace("text_encoder", "tokenizer"))

    def guidance(self, scale: float) -> dict[str, Any]:
        """Arguments of a pipeline call that draws with guidance."""
        return {"guidance_scale": scale}

    def told_guidance(self, timesteps: Tensor) -> Tensor | None:
        """The guidance [B] that a guidance-distilled transformer is told; None: it takes none."""
        return torch.full_like(timesteps, self.distilled_guidance) if self.takes_guidance else None

    @property
    def takes_guidance(self) -> bool:
        """Whether guidance was distilled into the denoiser."""
        return bool(self.denoiser.config.get("guidance_embeds", False))

    def encode_prompts(self, prompts: Sequence[str], device: torch.device) -> Table:
        """Embed prompts with the frozen text encoders, as sampling does."""
        raise NotImplementedError

    def blank_rows(self, count: int, dtype: torch.dtype) -> Table:
        """Rows of `count` prompts of the usual length, of the right shapes: what memory is planned with."""
        raise NotImplementedError

    def embed(self, text: Mapping[str, nn.Module], table: Table) -> Table:
        """Replace what depends on the trained encoders `text` by embeddings of the ids in `table`, with gradients."""
        raise NotImplementedError

    def latent_affine(self) -> tuple[Tensor | float, Tensor | float]:
        """(shift, scale): the denoiser sees (VAE latents - shift) * scale; tensors are [C,1,1]."""
        config = self.pipe.vae.config
        return config.shift_factor or 0.0, config.scaling_factor

    def encode_pictures(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [B,3,H,W] in [-1, 1] -> mean and deviation [B,C,h,w] of the denoiser's latents, on the CPU."""
        encoded = self.pipe.vae.encode(pixels)
        shift, scale = self.latent_affine()
        if hasattr(encoded, "latents"):  # AutoencoderTiny: no distribution
            mean, std = encoded.latents, torch.zeros_like(encoded.latents)
        else:
            mean, std = encoded.latent_dist.mode(), encoded.latent_dist.std
        return (mean.cpu() - shift) * scale, std.cpu() * scale

    def decode(self, latents: Tensor) -> Tensor:
        """The denoiser's latents [B,C,h,w] -> pixels [B,3,H,W] in [0, 1], as the pipeline does, with gradients."""
        vae = self.pipe.vae
        decoded = vae.decode(latents_for_vae(self.pipe, latents, None, None, vae.config)).sample
        return (decoded / 2 + 0.5).clamp(0, 1)

    def denoise(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, rows: Table, frame: Tensor) -> Tensor:
        """Predict the noising's target [B,C,h,w].

        noisy: [B,C,h,w]. timesteps: [B] in [0, 1000]. rows: the table's rows of the batch. frame: [B,6], see
        `cached.Sample.frame`.
        """
        raise NotImplementedError


class StableDiffusion(Family):
    """Stable Diffusion 1.5 and 2, and the mini-world's pipeline."""

    denoiser_name = "unet"
    text_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    attention_layers = (*ATTENTION, *FEED_FORWARD, "proj_in", "proj_out")
    convolution_layers = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
    has_checker = True
    text_learning_rate = 1e-5
    text_rank = 8
    patch = 1

    def encode_prompts(self, prompts: Sequence[str], device: torch.device) -> Table:
        return {"encoder_hidden_states": self.pipe.encode_prompt(list(prompts), device, 1, False)[0]}

    def embed(self, text: Mapping[str, nn.Module], table: Table) -> Table:
        return {"encoder_hidden_states": text["text_encoder"](table["text_encoder"])[0]}

    def blank_rows(self, count: int, dtype: torch.dtype) -> Table:
        width = self.denoiser.config.cross_attention_dim
        return {"encoder_hidden_states": torch.empty(count, CLIP_TOKENS, width, dtype=dtype)}

    def latent_affine(self) -> tuple[Tensor | float, Tensor | float]:
        return 0.0, self.pipe.vae.config.scaling_factor  # its pipeline knows no shift

    def denoise(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, rows: Table, frame: Tensor) -> Tensor:
        return denoiser(noisy, timesteps, **rows).sample


class StableDiffusionXL(StableDiffusion):
    """SDXL: two text encoders, and a UNet that is told the picture's size and crop."""

    text_names = ("text_encoder", "text_encoder_2")
    has_checker = False
    text_learning_rate = Family.text_learning_rate
    text_rank = 0

    def encode_prompts(self, prompts: Sequence[str], device: torch.device) -> Table:
        hidden, _, pooled, _ = self.pipe.encode_prompt(
            list(prompts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": hidden, "text_embeds": pooled}

    def embed(self, text: Mapping[str, nn.Module], table: Table) -> Table:
        first, second = (text[name](table[name], output_hidden_states=True) for name in self.text_names)
        hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return {"encoder_hidden_states": hidden, "text_embeds": second.text_embeds}

    def blank_rows(self, count: int, dtype: torch.dtype) -> Table:
        config = self.denoiser.config
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return super().blank_rows(count, dtype) | {"text_embeds": torch.empty(count, pooled, dtype=dtype)}

    def latent_affine(self) -> tuple[Tensor | float, Tensor | float]:
        config = self.pipe.vae.config
        if config.latents_mean is None or config.latents_std is None:
            return super().latent_affine()
        return column(config.latents_mean), config.scaling_factor / column(config.latents_std)

    def denoise(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, rows: Table, frame: Tensor) -> Tensor:
        added = {"text_embeds": rows["text_embeds"], "time_ids": frame}
        return denoiser(noisy, timesteps, rows["encoder_hidden_states"], added_cond_kwargs=added).sample


class StableDiffusion3(Family):
    """SD3: two CLIPs that can be trained, and a T5 that stays frozen."""

    pixels_at_once = 4 * 1024**2
    checkpointed = True
    text_names = ("text_encoder", "text_encoder_2")
    attention_layers = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

    def encode_prompts(self, prompts: Sequence[str], device: torch.device) -> Table:
        prompts = list(prompts)
        hidden, _, pooled, _ = self.pipe.encode_prompt(prompts, prompts, prompts, device, 1, False)
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}

    def blank_rows(self, count: int, dtype: torch.dtype) -> Table:
        return pooled_rows(self.denoiser.config, count, CLIP_TOKENS + 256, dtype)

    def embed(self, text: Mapping[str, nn.Module], table: Table) -> Table:
        outputs = [text[name](table[name], output_hidden_states=True) for name in self.text_names]
        clip = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)  # [P,L,D_1+D_2]
        frozen = table["encoder_hidden_states"]
        clip = F.pad(clip, (0, frozen.shape[-1] - clip.shape[-1]))
        return {
            "encoder_hidden_states": torch.cat([clip, frozen[:, clip.shape[1] :]], dim=1),  # then T5's part
            "pooled_projections": torch.cat([output.text_embeds for output in outputs], dim=-1),
        }

    def denoise(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, rows: Table, frame: Tensor) -> Tensor:
        return denoiser(noisy, timestep=timesteps, **rows).sample


class Flux(Family):
    """FLUX.1: patches packed as tokens, with positions; CLIP gives the pooled text, a frozen T5 the tokens."""

    pixels_at_once = 4 * 1024**2
    checkpointed = True
    text_names = ("text_encoder",)
    attention_layers = (*StableDiffusion3.attention_layers, *FEED_FORWARD, *CONTEXT_FEED_FORWARD)

    def encode_prompts(self, prompts: Sequence[str], device: torch.device) -> Table:
        hidden, pooled, _ = self.pipe.encode_prompt(list(prompts), list(prompts), device)
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}

    def blank_rows(self, count: int, dtype: torch.dtype) -> Table:
        return pooled_rows(self.denoiser.config, count, 512, dtype)

    def embed(self, text: Mapping[str, nn.Module], table: Table) -> Table:
        pooled = text["text_encoder"](table["text_encoder"]).pooler_output
        return {"encoder_hidden_states": table["encoder_hidden_states"], "pooled_projections": pooled}

    def denoise(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, rows: Table, frame: Tensor) -> Tensor:
        h, w = noisy.shape[-2] // 2, noisy.shape[-1] // 2
        places = torch.cartesian_prod(torch.arange(1), torch.arange(h), torch.arange(w)).to(noisy)  # [h*w,3]
        predicted = denoiser(
            pack(noisy),
            timestep=timesteps / 1000,
            guidance=self.told_guidance(timesteps),
            txt_ids=noisy.new_zeros(rows["encoder_hidden_states"].shape[1], 3),
            img_ids=places,
            **rows,
        ).sample
        return unpack(predicted, h, w)


class QwenImage(Family):
    """Qwen-Image: packed patches; a language model whose padding is masked."""

    checkpointed = True

    def encode_prompts(self, prompts: Sequence[str], device: torch.device) -> Table:
        hidden, mask = self.pipe.encode_prompt(list(prompts), device)
        mask = torch.ones(hidden.shape[:2], dtype=torch.long) if mask is None else mask
        return {"encoder_hidden_states": hidden, "encoder_hidden_states_mask": mask}

    def blank_rows(self, count: int, dtype: torch.dtype) -> Table:
        hidden = torch.empty(count, PROMPT_TOKENS, self.denoiser.config.joint_attention_dim, dtype=dtype)
        return {"encoder_hidden_states": hidden, "encoder_hidden_states_mask": torch.ones(count, PROMPT_TOKENS).long()}

    def guidance(self, scale: float) -> dict[str, Any]:
        return {"true_cfg_scale": scale, "negative_prompt": " "}

    def latent_affine(self) -> tuple[Tensor | float, Tensor | float]:
        config = self.pipe.vae.config
        return column(config.latents_mean), 1 / column(config.latents_std)

    def encode_pictures(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        distribution = self.pipe.vae.encode(pixels[:, :, None]).latent_dist  # a film of one picture
        shift, scale = self.latent_affine()
        return (distribution.mode()[:, :, 0].cpu() - shift) * scale, distribution.std[:, :, 0].cpu() * scale

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents[:, :, None])[:, :, 0]

    def denoise(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, rows: Table, frame: Tensor) -> Tensor:
        h, w = noisy.shape[-2] // 2, noisy.shape[-1] // 2
        predicted = denoiser(
            pack(noisy),
            timestep=timesteps / 1000,
            guidance=self.told_guidance(timesteps),
            img_shapes=[[(1, h, w)]] * len(noisy),
            **rows,
        ).sample
        return unpack(predicted, h, w)


class ZImage(Family):
    """Z-Image: lists of pictures and of prompts of different lengths; time runs from noise, the sign is turned."""

    pixels_at_once = 4 * 1024**2
    checkpointed = True

    def encode_prompts(self, prompts: Sequence[str], device: torch.device) -> Table:
        hidden, _ = self.pipe.encode_prompt(list(prompts), device, do_classifier_free_guidance=False)
        lengths = torch.tensor([len(one) for one in hidden])
        return {"hidden": nn.utils.rnn.pad_sequence(hidden, batch_first=True), "length": lengths}

    def blank_rows(self, count: int, dtype: torch.dtype) -> Table:
        hidden = torch.empty(count, PROMPT_TOKENS, self.denoiser.config.cap_feat_dim, dtype=dtype)
        return {"hidden": hidden, "length": torch.tensor([PROMPT_TOKENS] * count)}

    def denoise(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, rows: Table, frame: Tensor) -> Tensor:
        prompts = [hidden[:length] for hidden, length in zip(rows["hidden"], rows["length"].tolist())]
        pictures = list(noisy[:, :, None].unbind())  # films of one picture
        predicted = denoiser(pictures, 1 - timesteps / 1000, prompts).sample
        return -torch.stack(predicted)[:, :, 0]


FAMILIES: dict[str, type[Family]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "QwenImagePipeline": QwenImage,
    "ZImagePipeline": ZImage,
}


def family_class(pipeline_class: str, base_model: str) -> type[Family]:
    """Return the family of a pipeline class; InputError when it cannot be trained here."""
    if pipeline_class not in FAMILIES:
        raise InputError(f"--base-model {base_model} is a {pipeline_class}; give one of {', '.join(FAMILIES)}")
    return FAMILIES[pipeline_class]


def column(values: Sequence[float]) -> Tensor:
    """Per-channel constants as [C,1,1]."""
    return torch.tensor(values).view(-1, 1, 1)


def pooled_rows(config: Any, count: int, tokens: int, dtype: torch.dtype) -> Table:
    """Blank rows of a transformer that is given tokens and a pooled text."""
    return {
        "encoder_hidden_states": torch.empty(count, tokens, config.joint_attention_dim, dtype=dtype),
        "pooled_projections": torch.empty(count, config.pooled_projection_dim, dtype=dtype),
    }


def pack(latents: Tensor) -> Tensor:
    """Latents [B,C,h,w] -> tokens [B,h/2*w/2,C*4] of two by two."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """Tokens [B,h*w,C*4] -> latents [B,C,2h,2w]: the inverse of `pack`."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (h, w)), 2)
