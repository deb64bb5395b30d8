"""Photos as a text-to-image model sees them half-way: an augmentation for scorers of previews.

While a picture is being denoised, the clean picture predicted so far can be decoded and scored. It is
blurred, and what the noise still hides is made up by the model; a head trained on finished pictures takes that for a
change of identity. So a share of the training pictures is noised as the model's own schedule does it, and shown as the
model predicts them, in one call without a prompt: at the noise levels that matter the prompt makes little difference,
and rows hold none.

Shape letters: m pictures, S noise levels, C h w latent channels and size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from nearid_personalize.data.reconstruct import Reconstruction
from nearid_personalize.encoder.checkpoints import weights_fingerprint
from nearid_personalize.errors import InputError
from nearid_personalize.names import packaged

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

BASES: Mapping[str, Mapping[str, Any]] = {
    "StableDiffusionPipeline": {"safety_checker": None, "requires_safety_checker": False},
    "StableDiffusionXLPipeline": {},
}
"""Pipelines whose denoiser can be called here, by exact class name, and what loading them takes."""


@dataclass(frozen=True)
class NoiseSchedule:
    """How a model was trained to see noise: noisy = signal · clean + noise · gaussian, in S steps from clean to noise.

    The first step is the clean picture itself.
    """

    signal: Tensor
    """Float [S], 1 first."""
    noise: Tensor
    """Float [S], 0 first."""
    timesteps: Tensor
    """[S]: what the denoiser is told."""
    prediction_type: str
    """epsilon, v_prediction or flow_prediction: what the denoiser answers."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
        """The schedule behind a diffusers scheduler's config, whichever solver it is for.

        Raises InputError for a scheduler of another kind.
        """
        from diffusers import DDPMScheduler  # the library does not need diffusers otherwise

        steps, prediction_type = config["num_train_timesteps"], config.get("prediction_type")
        if prediction_type == "flow_prediction":
            level, shift = torch.linspace(0, 1, steps + 1), config.get("flow_shift", 1.0)
            noise = shift * level / (1 + (shift - 1) * level)  # arXiv:2403.03206, eq. 23
            return cls(1 - noise, noise, steps * noise, prediction_type)
        if prediction_type in ("epsilon", "v_prediction") and "beta_schedule" in config:
            kept = torch.cat([torch.ones(1), DDPMScheduler.from_config(config).alphas_cumprod])
            return cls(kept.sqrt(), (1 - kept).sqrt(), torch.arange(-1, steps).clamp(min=0), prediction_type)
        raise InputError(
            f"--preview-augment: its scheduler, {config.get('_class_name')}, has prediction type {prediction_type!r}; "
            "epsilon, v_prediction and flow_prediction of a Stable Diffusion scheduler are understood"
        )

    def predict_clean(
        self, latents: Tensor, gaussian: Tensor, levels: Tensor, denoise: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """The clean latents [m,C,h,w] that `denoise(noisy, timesteps)` makes out under noise of `levels` [m].

        A level is the share of the schedule's steps that lie ahead: 0, nothing is hidden, to 1, pure noise.
        """
        steps = (levels * (len(self.signal) - 1)).round().long()
        signal, noise = (values[steps].view(-1, 1, 1, 1).to(latents) for values in (self.signal, self.noise))
        noisy = signal * latents + noise * gaussian
        answer = denoise(noisy, self.timesteps[steps].to(latents.device))
        if self.prediction_type == "epsilon":
            return (noisy - noise * answer) / signal
        if self.prediction_type == "v_prediction":
            return signal * noisy - noise * answer
        return noisy - noise * answer


@dataclass(frozen=True, eq=False)
class Previews:
    """A `PixelTransform`: shows a share of the pictures as previews at random noise levels, both chosen by seed."""

    base: "DiffusionPipeline"
    """A pipeline of one of `BASES`."""
    schedule: NoiseSchedule
    """The base's."""
    share: float = 0.15
    """Share of the pictures, 0 to 1."""
    levels: tuple[float, float] = (0.1, 0.6)
    """Noise levels are drawn evenly from this range, see `NoiseSchedule.predict_clean`. What a guided sampler shows at
    20 to 70 % of its steps lies about here: it is less blurred than a picture under as much noise as it has left, and
    further up the label says what the picture no longer shows."""
    rest: Reconstruction | None = None
    """For the pictures that are not shown as previews; None: they stay as they are."""
    max_batch_size: int = 8
    """Pictures that go through the base at once."""

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise InputError(f"--previewed {self.share}: give a share of the pictures, 0 to 1")

    @torch.no_grad()
    def __call__(self, pixels: Tensor, seed: int) -> Tensor:
        """Pictures [m,3,H,W] in [0, 1] -> such pictures. The base sees them at its own size."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.rand(len(pixels), generator=generator) < self.share
        rest_seed = int(torch.randint(2**62, (), generator=generator))
        shown = pixels.clone()
        if chosen.any():
            low, high = self.levels
            levels = low + (high - low) * torch.rand(int(chosen.sum()), generator=generator)
            shown[chosen] = self.previews(pixels[chosen], levels, generator)
        if self.rest and not chosen.all():
            shown[~chosen] = self.rest(pixels[~chosen], rest_seed)
        return shown

    @torch.no_grad()
    def previews(self, pixels: Tensor, levels: Tensor, generator: torch.Generator) -> Tensor:
        """Pictures [m,3,H,W] in [0, 1] as the base predicts them under noise of `levels` [m]."""
        vae, scale = self.base.vae, self.base.vae.config.scaling_factor
        encoded = [vae.encode(part * 2 - 1) for part in self._parts(_resized(pixels, (self.side, self.side)))]
        latents = scale * torch.cat([e.latents if hasattr(e, "latents") else e.latent_dist.mode() for e in encoded])
        gaussian = torch.randn(latents.shape, generator=generator).to(latents)
        noised = zip(self._parts(latents), self._parts(gaussian), self._parts(levels))
        clean = [self.schedule.predict_clean(*part, self._denoise) for part in noised]
        drawn = torch.cat([vae.decode(part / scale).sample for part in clean])
        return _resized((drawn / 2 + 0.5).clamp(0, 1), pixels.shape[-2:])

    @property
    def side(self) -> int:
        """Of the base's pictures, pixels."""
        return self.base.unet.config.sample_size * self.base.vae_scale_factor

    @cached_property
    def unprompted(self) -> tuple[Tensor, ...]:
        """What the base is told without a prompt: the text [1,L,D] and, for Stable Diffusion XL, its summary [1,D].

        The other half of classifier-free guidance: not always the empty prompt.
        """
        with torch.no_grad():
            embeddings = self.base.encode_prompt(
                prompt="", device=self.base.device, num_images_per_prompt=1, do_classifier_free_guidance=True
            )
        return tuple(embeddings[1::2])

    @property
    def fingerprint(self) -> str:
        """Changes with all that the pictures depend on but the seeds."""
        parts = {"vae": self.base.vae.state_dict(), "unet": self.base.unet.state_dict()}
        weights = {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}
        told = {f"unprompted.{number}": tensor for number, tensor in enumerate(self.unprompted)}
        told |= {"signal": self.schedule.signal, "timesteps": self.schedule.timesteps}
        digest = weights_fingerprint({**weights, **told})
        own = f"previewed {self.share} {self.levels} {self.schedule.prediction_type} {digest}"
        return f"{own} {self.rest.fingerprint}" if self.rest else own

    def _denoise(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """The denoiser's answer [m,C,h,w] for latents [m,C,h,w] at timesteps [m]."""
        text, *summary = (told.expand(len(noisy), *told.shape[1:]) for told in self.unprompted)
        sizes = torch.tensor([[self.side, self.side, 0, 0, self.side, self.side]])  # original, crop, target
        added = {"text_embeds": summary[0], "time_ids": sizes.to(noisy).expand(len(noisy), -1)} if summary else None
        return self.base.unet(noisy, timesteps, text, added_cond_kwargs=added).sample

    def _parts(self, values: Tensor) -> tuple[Tensor, ...]:
        return values.split(self.max_batch_size)


def load_previews(base: str | Path, share: float, rest: Reconstruction | None = None, device: Any = "cpu") -> Previews:
    """The augmentation with a pipeline folder, Hub id, or "miniworld", in float32.

    Raises InputError when there is none, when its class is not one of `BASES`, or its scheduler is not understood.
    """
    from diffusers import DiffusionPipeline  # the library does not need diffusers otherwise

    folder = packaged(base, "pipeline")
    try:
        kind = DiffusionPipeline.load_config(folder)["_class_name"]
        if kind not in BASES:
            raise InputError(f"--preview-augment {base}: is a {kind}; give a pipeline of class {' or '.join(BASES)}")
        pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, **BASES[kind])
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--preview-augment {base}: {reason} Give a pipeline folder, a Hub id or miniworld") from error
    return Previews(pipe.to(device), NoiseSchedule.of(pipe.scheduler.config), share, rest=rest)


def _resized(pixels: Tensor, size: tuple[int, ...]) -> Tensor:
    """Pictures [m,3,H,W] in [0, 1] -> [m,3,*size]."""
    if pixels.shape[-2:] == size:
        return pixels
    return interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
