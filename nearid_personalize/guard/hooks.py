"""How a stock diffusers pipeline is watched while it denoises a batch, and the batch's denoiser calls shrunk.

The pipeline itself keeps every row to the end of its loop: its latents, the scheduler's memory, the generators and
whatever else the loop holds stay as they are in a plain call. Only the denoiser, where the time goes, gets fewer rows:
a forward pre-hook takes the stopped ones out of everything it is called with, and a forward hook puts the output of a
row that goes on in their place. What the loop makes of a stopped row is therefore meaningless, and is cut before the
VAE decodes. A row that goes on meets the arithmetic of a plain call, under any scheduler, with guidance or without.

Letters: N candidates, the rows of the batch as it starts; n of them that go on; F = 2 where one call of the denoiser
holds both halves of classifier-free guidance, else 1: candidate `row` is then at `row` and at `N + row` of F·N rows.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nearid_personalize.errors import InputError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
from nearid_personalize.guard.families import family_of
from nearid_personalize.guard.previews import TESTED_SCHEDULERS, decode_latents, predict_clean


@dataclass(frozen=True)
class Moment:
    """One finished denoising step, as `on_step` sees it.

    `step` counts finished steps from 1 to `num_steps` (calls of the scheduler: a second-order one has two to a step);
    `rows` are the candidates still denoised, by their number in the batch that started, ascending.
    """

    step: int
    num_steps: int
    rows: tuple[int, ...]
    _preview: Callable[[], torch.Tensor] | None

    @property
    def fraction(self) -> float:
        """Finished part of the denoising, in (0, 1]."""
        return self.step / self.num_steps

    def preview(self) -> torch.Tensor:
        """The clean pictures predicted at this step, one per entry of `rows`: `[n,3,H,W]` in [0, 1], float32, CPU.

        Decoded when first asked for. Raises InputError at a step that is none of those named by `preview_at`.
        """
        if self._preview is None:
            raise InputError(f"preview_at does not name step {self.step} of {self.num_steps}; no preview was kept")
        return self._preview()


OnStep = Callable[[Moment], Collection[int] | None]
"""Called after every step; returns which of `Moment.rows` go on, None for all of them."""


@dataclass(frozen=True)
class Denoised:
    """What came of one batch.

    `images` is what the pipeline returned for the rows that reached the end, in its own output type, and `rows` says
    which candidates they are; `stopped_at` maps every other candidate to the step it was stopped after. `denoiser_rows`
    counts the rows the denoiser was really called with, both halves of classifier-free guidance included;
    `nsfw_content_detected` is the safety checker's word on each of `images`, None where the pipeline has no checker;
    `size` is height and width in pixels, where the positions of tokens tell them, as FLUX's do.
    """

    images: Any
    rows: tuple[int, ...]
    stopped_at: dict[int, int]
    denoiser_rows: int
    nsfw_content_detected: list[bool] | None = None
    size: tuple[int, int] | None = None


class _NobodyGoesOn(Exception):
    """Ends the pipeline's loop once every candidate is stopped; never leaves this module."""


# --- the pipeline ----------------------------------------------------------------------------------------------------
def find_denoiser(pipe: DiffusionPipeline) -> torch.nn.Module:
    """Return the pipeline's `unet` or `transformer`; InputError when it has neither."""
    for name in ("unet", "transformer"):
        if isinstance(module := getattr(pipe, name, None), torch.nn.Module):
            return module
    raise InputError(f"pipe {type(pipe).__name__} has neither a unet nor a transformer; use a text-to-image pipeline")


def can_race(pipe: DiffusionPipeline) -> bool:
    """Whether candidates can be stopped half-way: the classes of pipeline and scheduler are tested ones, by exact name.

    ControlNet pipelines are not among them. A denoiser whose outputs are cached between steps (`enable_cache`) cannot
    change its batch, so neither can its pipeline.
    """
    scheduler = getattr(pipe, "scheduler", None)
    family = family_of(pipe)
    tested = family is not None and family.races and type(scheduler).__name__ in TESTED_SCHEDULERS
    return tested and not getattr(find_denoiser(pipe), "is_cache_enabled", False)


def can_batch(pipe: DiffusionPipeline) -> bool:
    """Whether candidate k of a batch is the picture that its seed makes alone.

    False for pipelines that start from a picture (which have a `strength`), or enlarge one (a `noise_level`), and are
    not known to draw its latents and its noise by each row's generator.
    """
    starts_from_picture = {"strength", "noise_level"} & set(inspect.signature(pipe.__call__).parameters)
    family = family_of(pipe)
    return not starts_from_picture or (family is not None and family.source != "none")


def denoise(
    pipe: DiffusionPipeline,
    arguments: Mapping[str, Any],
    generators: Sequence[torch.Generator],
    on_step: OnStep | None = None,
    preview_at: Collection[float] | None = None,
    preview_vae: torch.nn.Module | None = None,
) -> Denoised:
    """Run `pipe(**arguments)` for one candidate per generator, asking `on_step` after every step who goes on.

    Args:
        arguments: of the pipeline's call, but for `generator`, `num_images_per_prompt` and `return_dict`. A
            `callback_on_step_end` of the user's is called first, with all rows, stopped ones included.
        generators: N >= 1, a multiple of the number of prompts: as in the pipeline, each prompt's candidates are
            neighbours.
        on_step: None runs all candidates to the end, and so does a pipeline that cannot race: `on_step` is not called.
        preview_at: fractions of the denoising, in (0, 1], at which a preview may be asked for; None for every step.
        preview_vae: decodes previews in place of the pipeline's VAE: an `AutoencoderTiny` of the same latents, say.

    Once nobody goes on the denoising ends, with no images. The pipeline is left as a plain call leaves it, also when
    this one is broken off by an exception.

    Raises:
        InputError: generators and prompts do not fit, `on_step` named a row not in the batch, or a fraction is off.
    """
    watch = _Watch(pipe, arguments, generators, on_step, preview_at, preview_vae)
    call = call_arguments(arguments, len(generators)) | watch.callbacks()
    with watch.attached():
        try:
            output = pipe(**call, generator=list(generators), return_dict=True)
        except _NobodyGoesOn:
            pipe.maybe_free_model_hooks()  # as at the end of the pipeline's own call
            return Denoised(images=[], rows=(), stopped_at=watch.stopped_at, denoiser_rows=watch.denoiser_rows)
    rows, images, nsfw = tuple(watch.rows), output.images, getattr(output, "nsfw_content_detected", None)
    if len(images) != len(rows):
        # The user's callback interrupted the pipeline: it left its loop without the last step, where the rows are cut
        images, nsfw = _pick(images, rows), nsfw and _pick(nsfw, rows)
    return Denoised(
        images=images,
        rows=rows,
        stopped_at=watch.stopped_at,
        denoiser_rows=watch.denoiser_rows,
        nsfw_content_detected=nsfw,
        size=watch.size(images),
    )


def steps_at(fractions: Collection[float], num_steps: int) -> frozenset[int]:
    """The steps, from 1 to `num_steps`, that end at or first after each fraction of the denoising, in (0, 1]."""
    for fraction in fractions:
        if not 0 < fraction <= 1:
            raise InputError(f"preview_at holds {fraction}; fractions of the denoising are in (0, 1]")
    # 0.3 * 10 is a hair above 3
    return frozenset(max(1, math.ceil((fraction - 1e-6) * num_steps)) for fraction in fractions)


class _Watch:
    """The hooks around one call of a pipeline, and what they know: who goes on, what the scheduler was last given."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        arguments: Mapping[str, Any],
        generators: Sequence[torch.Generator],
        on_step: OnStep | None,
        preview_at: Collection[float] | None,
        preview_vae: torch.nn.Module | None,
    ) -> None:
        self.pipe = pipe
        self.family = family_of(pipe)
        self.arguments = arguments
        self.generators = list(generators)
        self.num_rows = len(self.generators)
        self.on_step = on_step if can_race(pipe) else None
        self.preview_at = preview_at
        self.preview_vae = preview_vae
        self.rows = list(range(self.num_rows))
        self.stopped_at: dict[int, int] = {}
        self.denoiser_rows = 0
        self.image_ids: torch.Tensor | None = None
        self.clean: Callable[[], torch.Tensor] | None = None
        self.user_callback = arguments.get("callback_on_step_end")
        self.user_inputs = callback_inputs(arguments)

    def callbacks(self) -> dict[str, Any]:
        """The pipeline's callback arguments, `on_step` asked in them."""
        if self.on_step is None and self.user_callback is None:
            return {}
        names = dict.fromkeys((*self.user_inputs, "latents"))
        return {"callback_on_step_end": self.step_ended, "callback_on_step_end_tensor_inputs": list(names)}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside the block: hooks on the denoiser, and whatever draws noise draws each row's by its own generator."""
        denoiser, scheduler = find_denoiser(self.pipe), self.pipe.scheduler
        with ExitStack() as stack:
            # First in, last out: whatever else hooks into the denoiser sees what it really computes
            before = denoiser.register_forward_pre_hook(self.before_denoiser, prepend=True, with_kwargs=True)
            stack.callback(before.remove)
            stack.callback(denoiser.register_forward_hook(self.after_denoiser).remove)
            step = with_generators(scheduler.step, self.generators)
            if self.on_step is not None:
                step = self.recording(step)
            stack.enter_context(_replaced(scheduler, "step", step))
            if hasattr(scheduler, "noise_sampler_seed"):  # DPMSolverSDE: a Brownian tree for each row
                stack.enter_context(_replaced(scheduler, "noise_sampler_seed", self.noise_seeds(scheduler)))
            if self.family is not None and self.family.source == "once":
                encode = encoding_rows(self.pipe._encode_vae_image, self.num_rows)
                stack.enter_context(_replaced(self.pipe, "_encode_vae_image", encode))
            yield

    def noise_seeds(self, scheduler: Any) -> list[int]:
        """The seed of each row's Brownian tree: the scheduler's own where it has one, else the candidate's."""
        if scheduler.noise_sampler_seed is not None:
            return [scheduler.noise_sampler_seed] * self.num_rows
        return [generator.initial_seed() for generator in self.generators]

    def before_denoiser(
        self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict] | None:
        """Take the stopped rows out of everything the denoiser is called with."""
        sample = args[0] if args else kwargs["hidden_states" if "hidden_states" in kwargs else "sample"]
        self.image_ids = kwargs.get("img_ids")
        if len(self.rows) == self.num_rows:
            self.denoiser_rows += len(sample)
            return None
        assert self.family is not None, "only known families race"
        halves, rest = divmod(len(sample), self.num_rows)
        assert rest == 0, f"a denoiser batch of {len(sample)} is no multiple of the {self.num_rows} candidates"
        index = [half * self.num_rows + row for half in range(halves) for row in self.rows]
        self.denoiser_rows += len(index)
        cut = functools.partial(_cut_rows, num_rows=len(sample), index=index)
        # Pipelines pass only what has rows by position
        batched = {name: cut(value) for name, value in kwargs.items() if name in self.family.batched}
        return tuple(map(cut, args)), kwargs | batched

    def after_denoiser(self, module: torch.nn.Module, args: tuple, output: Any) -> tuple | None:
        """Give the output one row per candidate again: that of the first row going on in place of each stopped one."""
        if len(self.rows) == self.num_rows:
            return None
        halves = len(output[0]) // len(self.rows)
        places = [self.rows.index(row) if row in self.rows else 0 for row in range(self.num_rows)]
        index = [half * len(self.rows) + place for half in range(halves) for place in places]
        return (_pick(output[0], index), *output[1:])

    def recording(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """`scheduler.step`, its inputs kept for a preview; under its own signature, which pipelines inspect."""

        @functools.wraps(step)
        def recorded(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            scheduler = self.pipe.scheduler
            # Half-way through a second-order step the sample is an intermediate one: the first half's preview stays
            first_order = getattr(scheduler, "state_in_first_order", True)
            result = step(model_output, timestep, sample, *args, **kwargs)
            if first_order:
                index = None if getattr(scheduler, "step_index", None) is None else scheduler.step_index - 1
                self.clean = functools.partial(predict_clean, scheduler, model_output, timestep, sample, index)
            return result

        return recorded

    def step_ended(self, pipe: DiffusionPipeline, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """The pipeline's `callback_on_step_end`: the user's own, then who goes on; the last step cuts the latents."""
        latents = tensors["latents"]
        outputs: dict[str, Any] = {}
        if self.user_callback is not None:
            given = {name: tensors[name] for name in self.user_inputs}
            outputs = self.for_each_row(self.user_callback(pipe, index, timestep, given))
        if self.on_step is None:
            return outputs
        self.ask(index + 1, pipe.num_timesteps)
        if index + 1 == pipe.num_timesteps and len(self.rows) < self.num_rows:
            outputs = {**outputs, "latents": _pick(outputs.get("latents", latents), self.rows)}
        return outputs

    def for_each_row(self, outputs: dict[str, Any]) -> dict[str, Any]:
        """What the user's callback returned; where that is of one row, a copy for each candidate.

        Callbacks that end classifier-free guidance keep the last row of the prompt's embeddings alone, which is enough
        for one picture. The candidates of one prompt have the same.
        """
        if self.num_rows == 1 or num_prompts(self.arguments) > 1:
            return outputs
        return {name: self.repeated(value) for name, value in outputs.items()}

    def repeated(self, value: Any) -> Any:
        """A tensor of one row, repeated for every candidate; anything else as it is."""
        of_one_row = isinstance(value, torch.Tensor) and value.ndim > 1 and len(value) == 1
        return value.expand(self.num_rows, *value.shape[1:]) if of_one_row else value

    def ask(self, step: int, num_steps: int) -> None:
        """Let `on_step` say who goes on after `step`."""
        assert self.on_step is not None, "without on_step no callback is set"
        preview = None
        if self.preview_at is None or step in steps_at(self.preview_at, num_steps):
            assert self.clean is not None, "the scheduler's step comes before the callback"
            preview = functools.cache(functools.partial(self.preview, tuple(self.rows), self.clean))
        going_on = self.on_step(Moment(step, num_steps, tuple(self.rows), preview))
        if going_on is None:
            return
        if unknown := set(going_on) - set(self.rows):
            raise InputError(f"on_step returned rows {sorted(unknown)}; in the batch are {self.rows}")
        self.stopped_at |= {row: step for row in self.rows if row not in going_on}
        self.rows = [row for row in self.rows if row in going_on]
        if not self.rows:
            raise _NobodyGoesOn

    def preview(self, rows: Sequence[int], clean: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Decode the clean prediction of `rows`: `[n,3,H,W]` in [0, 1], float32, CPU."""
        latents = _pick(clean(), rows)
        height, width = self.size(latents) or (self.arguments.get("height"), self.arguments.get("width"))
        return decode_latents(self.pipe, latents, height, width, self.preview_vae)

    def size(self, latents: Any) -> tuple[int, int] | None:
        """Height and width in pixels of latents that are tokens, by the tokens' positions; None: nothing tells."""
        if self.image_ids is None or getattr(latents, "ndim", 0) != 3:
            return None
        side = 2 * self.pipe.vae_scale_factor  # of a token's patch, in pixels
        # A picture that is edited has its tokens behind those of the picture that is made
        ids = self.image_ids.reshape(-1, self.image_ids.shape[-1])[: latents.shape[1]]
        return side * (int(ids[:, 1].max()) + 1), side * (int(ids[:, 2].max()) + 1)


def num_prompts(arguments: Mapping[str, Any]) -> int:
    """How many prompts a pipeline's arguments hold, as texts or as embeddings."""
    prompt = arguments.get("prompt")
    prompts = prompt if prompt is not None else arguments.get("prompt_embeds")
    return 1 if prompts is None or isinstance(prompts, str) else len(prompts)


def call_arguments(arguments: Mapping[str, Any], num_rows: int) -> dict[str, Any]:
    """The arguments of a call that makes `num_rows` pictures; InputError when the prompts do not divide them."""
    prompts = num_prompts(arguments)
    if not num_rows or num_rows % prompts:
        raise InputError(f"generators: got {num_rows} for {prompts} prompts; give each prompt equally many")
    kept = {name: value for name, value in arguments.items() if name not in ("generator", "return_dict")}
    return {**kept, "num_images_per_prompt": num_rows // prompts}


def with_generators(step: Callable[..., Any], generators: Sequence[torch.Generator]) -> Callable[..., Any]:
    """A scheduler's `step` that draws noise by each row's generator, also where the pipeline passes it none.

    The pipelines of SD3, FLUX and their kin pass none: `FlowMatchLCMScheduler` and those that sample stochastically
    then draw from torch's global generator, and no seed repeats the picture.
    """
    signature = inspect.signature(step)
    if "generator" not in signature.parameters:
        return step

    @functools.wraps(step)
    def drawing_by_row(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        sample = given.arguments.get("sample")
        if given.arguments.get("generator") is None and sample is not None and len(sample) == len(generators):
            kwargs = {**kwargs, "generator": list(generators)}  # as it was called: somebody else may wrap `step` too
        return step(*args, **kwargs)

    return drawing_by_row


def encoding_rows(encode: Callable[..., torch.Tensor], num_rows: int) -> Callable[..., torch.Tensor]:
    """A pipeline's `_encode_vae_image` that draws the latents of its source once a row, by the row's generator.

    A VAE's latents are drawn from a distribution. The pipelines draw them once for the whole batch, by the first
    generator, so that the picture of a seed would depend on who else is in its batch.
    """

    @functools.wraps(encode)
    def encoded(image: torch.Tensor, generator: Any) -> torch.Tensor:
        if len(image) == 1:
            image = image.expand(num_rows, *image.shape[1:])
        return encode(image=image, generator=generator)

    return encoded


def callback_inputs(arguments: Mapping[str, Any]) -> list[str]:
    """Names of the tensors that the user's callback is to get, by the pipelines' own rule."""
    # diffusers' ready-made callbacks carry their names with them
    own = getattr(arguments.get("callback_on_step_end"), "tensor_inputs", None)
    return list(own or arguments.get("callback_on_step_end_tensor_inputs") or ["latents"])


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute on this one object inside the block; what the object itself held before is put back."""
    held = {name: vars(owner)[name]} if name in vars(owner) else {}
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)
        vars(owner).update(held)


def _pick(values: Any, index: Sequence[int]) -> Any:
    """Rows `index` of a tensor or array, items `index` of a list."""
    return values[list(index)] if isinstance(values, torch.Tensor | np.ndarray) else [values[i] for i in index]


def _cut_rows(value: Any, num_rows: int, index: Sequence[int]) -> Any:
    """Rows `index` of what holds `num_rows`: a tensor, a list of tensors (a row each), a dict of tensors or of lists.

    Within a dict a list holds a tensor per adapter, each with all rows (IP-Adapter). All else is shared by the rows.
    """
    if isinstance(value, torch.Tensor):
        return _pick(value, index) if value.ndim and len(value) == num_rows else value
    if isinstance(value, dict):
        return {
            key: [_cut_rows(item, num_rows, index) for item in inner]
            if isinstance(inner, list)
            else _cut_rows(inner, num_rows, index)
            for key, inner in value.items()
        }
    if isinstance(value, list) and len(value) == num_rows and all(isinstance(item, torch.Tensor) for item in value):
        return _pick(value, index)
    return value
