"""Modular Diffusers blocks: reject hopeless candidates in the denoising loop, re-rank those that reach its end.

    blocks = ModularPipelineBlocks.from_pretrained("pipelines", trust_remote_code=True)  # FLUX; family= for others
    pipe = blocks.init_pipeline("black-forest-labs/FLUX.1-dev")
    pipe.load_components(dtype=torch.bfloat16)
    state = pipe(prompt="a photo of sks dog", num_images_per_prompt=8, num_images=2, scorer=scorer, subject=subject)
    state.images, state.verdicts, state.stopped_at
    pipe(..., profile=state.profile)  # knows what the first call taught

`guarded(blocks)` puts the two steps into blocks of your own. Unlike `IdentityGuard` these run one batch: no budget, no
smaller batches when memory runs out, no floors.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace

import diffusers
import torch
from diffusers import FluxPipeline, ModularPipelineBlocks
from diffusers.modular_pipelines import (
    InputParam,
    LoopSequentialPipelineBlocks,
    OutputParam,
    SequentialPipelineBlocks,
)

from nearid_personalize import InputError
from nearid_personalize.guard.acceptance import preview_scores
from nearid_personalize.guard.generation import to_pictures
from nearid_personalize.guard.policy import DEFAULT_POLICY
from nearid_personalize.guard.previews import as_pixels, decode_latents, predict_clean
from nearid_personalize.guard.race import Race
from nearid_personalize.scorer.ranking import best_accepted, rank_candidates

FAMILIES = {
    "flux": "FluxAutoBlocks",
    "stable-diffusion-3": "StableDiffusion3AutoBlocks",
    "stable-diffusion-xl": "StableDiffusionXLAutoBlocks",
}
"""What `IdentityGuardBlocks` is built around."""

MEMORYLESS_SCHEDULERS = frozenset(
    {"EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"}
)
"""Schedulers that remember no sample of an earlier step, whose batch may therefore shrink between steps."""

HOLDS_ROWS = (
    "latents",
    "noise_pred",
    "generator",
    "guidance",
    "prompt_embeds",
    "pooled_prompt_embeds",
    "negative_prompt_embeds",
    "negative_pooled_prompt_embeds",
    "add_time_ids",
    "negative_add_time_ids",
)
"""What the loops of these families keep with one row, or list item, per candidate."""


class RejectStep(ModularPipelineBlocks):
    """In the loop, between denoiser and scheduler: candidates that the policy gives up leave the batch."""

    description = "Stops candidates by a policy on the scores of their previews."

    @property
    def inputs(self) -> list[InputParam]:
        return [
            *(InputParam(name) for name in (*HOLDS_ROWS, "batch_size", "timesteps", "height", "width")),
            InputParam("scorer", required=True, description="an IdentityScorer"),
            InputParam("subject", required=True, description="from scorer.enroll(photos)"),
            InputParam("num_images", default=1, description="how many are wanted"),
            InputParam("policy", default=DEFAULT_POLICY, description="a StoppingPolicy"),
            InputParam("profile", default=None, description="a PreviewProfile: what earlier calls taught"),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("race", type_hint=Race, description="the race"),
            OutputParam("rows", type_hint=list[int], description="the candidates still in the batch"),
            OutputParam("stopped_at", type_hint=dict[int, int], description="of the others, the last step"),
        ]

    @torch.no_grad()
    def __call__(self, components, block_state, i: int, t: torch.Tensor):
        if i == 0:
            self.check(components, block_state)
            block_state.rows, block_state.stopped_at = list(range(len(block_state.latents))), {}
            block_state.race = begun_race(block_state)
        step, num_steps = i + 1, len(block_state.timesteps)
        if block_state.race.due(step / num_steps, i / num_steps):
            pixels = preview(components, block_state, t)
            scores = preview_scores(block_state.scorer, block_state.subject, pixels)
            going_on = block_state.race.decide(step / num_steps, block_state.rows, scores)
            cut(block_state, [place for place, row in enumerate(block_state.rows) if row in going_on], step)
        return components, block_state

    @staticmethod
    def check(components, block_state) -> None:
        """Raise InputError for what these blocks cannot do."""
        if block_state.batch_size > 1:
            raise InputError(f"prompt must be one text, got {block_state.batch_size}; call the pipeline once for each")
        if (name := type(components.scheduler).__name__) not in MEMORYLESS_SCHEDULERS:
            raise InputError(f"scheduler {name} cannot lose rows here; {', '.join(sorted(MEMORYLESS_SCHEDULERS))} can")
        if components.scheduler.config.get("stochastic_sampling"):
            # The loops of these families pass it no generator
            raise InputError(f"scheduler {name} draws noise by no seed here; set stochastic_sampling=False")


class RerankStep(ModularPipelineBlocks):
    """After decoding: only accepted images go on, best first."""

    description = "Keeps the accepted images, best first, at most `num_images`, and says what became of each candidate."

    @property
    def inputs(self) -> list[InputParam]:
        names = ("images", "race", "rows", "stopped_at", "scorer", "subject")
        return [
            *(InputParam(name, required=True) for name in names),
            InputParam("num_images", default=1),
            InputParam("output_type", default="pil"),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("images", description="the accepted ones, best first"),
            OutputParam("verdicts", description="a Verdict on every candidate, best first; `index` is its row"),
            OutputParam("profile", description="a PreviewProfile that this call added to: give it to the next one"),
        ]

    @torch.no_grad()
    def __call__(self, components, state):
        block_state = self.get_block_state(state)
        images, stopped_at = block_state.images, block_state.stopped_at
        pictures = images
        if block_state.output_type != "pil":
            pictures = to_pictures(as_pixels(images, block_state.output_type, components))
        scores = torch.full((len(block_state.rows) + len(stopped_at),), torch.nan)
        scores[block_state.rows] = block_state.scorer.score(pictures, block_state.subject)
        block_state.race.finish(block_state.rows, scores[block_state.rows].tolist())
        block_state.profile = block_state.race.learnt()
        block_state.verdicts = tuple(
            replace(verdict, reason=f"stopped after step {stopped_at[verdict.index]}")
            if verdict.index in stopped_at
            else verdict
            for verdict in rank_candidates(scores, block_state.subject.threshold)
        )
        best = [block_state.rows.index(v.index) for v in best_accepted(block_state.verdicts, block_state.num_images)]
        block_state.images = [images[place] for place in best] if isinstance(images, list) else images[best]
        self.set_block_state(state, block_state)
        return components, state


class IdentityGuardBlocks(SequentialPipelineBlocks):
    """The automatic blocks of a family ("flux", "stable-diffusion-3", "stable-diffusion-xl"), guarded."""

    def __init__(self, family: str = "flux") -> None:
        if family not in FAMILIES:
            raise InputError(f"family {family!r}; one of {', '.join(FAMILIES)} works, or guarded(your blocks)")
        self.sub_blocks = guarded(getattr(diffusers, FAMILIES[family])()).sub_blocks


def begun_race(block_state) -> Race:
    """A race whose only batch are the rows of this call."""
    num_rows = len(block_state.rows)
    race = Race(
        policy=block_state.policy,
        num_images=block_state.num_images,
        num_candidates=num_rows,
        profile=block_state.profile,
    )
    race.begin(race.next_batch())
    return race


def guarded(blocks: SequentialPipelineBlocks) -> SequentialPipelineBlocks:
    """A copy of blocks, with the reject step in every denoising loop and the re-rank step at the end."""
    blocks = copy.deepcopy(blocks)  # diffusers' blocks of one class share their steps
    for loop in loops(blocks):
        loop.sub_blocks.insert("reject", RejectStep(), list(loop.sub_blocks).index("after_denoiser"))
    blocks.sub_blocks["rerank"] = RerankStep()
    return blocks


def loops(blocks: ModularPipelineBlocks) -> Iterator[LoopSequentialPipelineBlocks]:
    """The denoising loops among blocks and the blocks in them."""
    for block in blocks.sub_blocks.values():
        if isinstance(block, LoopSequentialPipelineBlocks):
            yield block
        else:
            yield from loops(block)


def preview(components, block_state, t: torch.Tensor) -> torch.Tensor:
    """The clean pictures predicted at this step: `[n,3,H,W]` in [0, 1]."""
    scheduler = components.scheduler
    index = scheduler.index_for_timestep(t)
    clean = predict_clean(scheduler, block_state.noise_pred, t, block_state.latents, index)
    if clean.ndim == 3:  # tokens
        size = block_state.height, block_state.width
        clean = FluxPipeline._unpack_latents(clean, *size, components.vae_scale_factor)
    return decode_latents(components, clean)


def cut(block_state, places: list[int], step: int) -> None:
    """Keep the rows at `places` of the batch; the others were stopped after `step`."""
    if not places:
        raise InputError("policy stopped every candidate; it must let one go on")
    kept = [block_state.rows[place] for place in places]
    block_state.stopped_at |= {row: step for row in block_state.rows if row not in kept}
    block_state.rows = kept
    for name in HOLDS_ROWS:
        value = block_state[name]
        if isinstance(value, torch.Tensor):
            block_state[name] = value[places]
        elif isinstance(value, list):
            block_state[name] = [value[place] for place in places]
