"""`nearid generate`: candidates from a pipeline, those kept that show the subject."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from nearid_personalize.attention import check_attention, denoiser_of, using_attention
from nearid_personalize.commands.console import Stopwatch, conclude, picture_paths, say
from nearid_personalize.commands.enrolment import enrolled, negative_paths
from nearid_personalize.commands.options import Generate, Quickstart
from nearid_personalize.files import check_writable
from nearid_personalize.images import load_images
from nearid_personalize.loading import choose_device, choose_dtype, load_pipeline
from nearid_personalize.report import write_generation

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from nearid_personalize.guard.result import GuardResult
    from nearid_personalize.scorer.scorer import IdentityScorer


def run_generate(options: Generate) -> int:
    """`nearid generate`."""
    references = load_images(picture_paths(options.references))
    negative_paths(options)
    check_writable(options.out)
    say(
        options.json,
        f"plan: {options.num_candidates} candidates of {options.prompt!r} from {options.base_model}"
        f" (LoRA: {options.lora or 'none'}), scored by {options.model} against {len(references)} references",
    )
    clock = Stopwatch()
    with clock.stage("load"):
        from nearid_personalize.scorer.scorer import IdentityScorer

        device = choose_device(options.device)
        check_attention(options.attention, device)
        scorer = IdentityScorer.from_pretrained(options.model, device, trunk=options.trunk)
        dtype = choose_dtype(options.dtype, device)
        pipe = load_pipeline(options.base_model, device, dtype, options.base_config)
        if options.lora is not None:
            from nearid_personalize.training.lora.loop import load_lora

            load_lora(pipe, options.lora)
    with using_attention(denoiser_of(pipe), options.attention, device):
        result = guarded(pipe, scorer, references, options.prompt, options)
    lora = None if options.lora is None else str(options.lora)
    models = {"base": options.base_model, "lora": lora, "scorer": options.model}
    return finish_generation(result, references, models, clock, options.out, options.json)


def guarded(
    pipe: "DiffusionPipeline",
    scorer: "IdentityScorer",
    references: Sequence[Image.Image],
    prompt: str,
    options: Generate | Quickstart,
) -> "GuardResult":
    """The guard's candidates of `prompt`, as `options` have them raced and judged."""
    from nearid_personalize.commands.racing import choose_racing, record
    from nearid_personalize.floors.chosen import chosen_floors
    from nearid_personalize.floors.copies import COPY_LIMIT
    from nearid_personalize.guard.guard import IdentityGuard
    from nearid_personalize.guard.result import NothingAcceptedWarning

    subject = enrolled(scorer, references, options)
    say(options.json, subject.describe())
    base, encoder = (options.base_model, options.model) if isinstance(options, Generate) else ("miniworld",) * 2
    racing = choose_racing(options, base, encoder)
    if racing.shown:
        say(options.json, racing.shown)
    guard = IdentityGuard(
        pipe,
        scorer,
        subject,
        max_batch_size=options.max_batch_size,
        policy=racing.policy,
        floors=chosen_floors(encoder, scorer, references, options.reject_copies, options.text_image_model),
        duplicate_limit=COPY_LIMIT if options.reject_copies else None,
    )
    guidance: dict[str, Any] = {} if options.guidance_scale is None else {"guidance_scale": options.guidance_scale}
    with warnings.catch_warnings():
        # The table and the exit status say it
        warnings.simplefilter("ignore", NothingAcceptedWarning)
        result = guard(
            prompt,
            num_images=options.num_images,
            num_candidates=racing.num_candidates,
            seed=options.seed,
            budget=options.budget,
            until_accepted=options.until_accepted,
            num_inference_steps=options.steps,
            **guidance,
        )
    record(racing, result, options)
    return result


def finish_generation(
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
    return conclude(as_json, report, rows, result.threshold, out)
