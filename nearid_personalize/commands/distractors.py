"""`nearid distractors`: near-identity distractors from photos, with any inpainting pipeline."""

import json
import os
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nearid_personalize.commands.console import DONE, NONE_ACCEPTED, aligned, say
from nearid_personalize.commands.options import Distractors
from nearid_personalize.data import Rows, load_rows
from nearid_personalize.errors import InputError
from nearid_personalize.files import check_writable
from nearid_personalize.loading import choose_device, choose_dtype, load_pipeline
from nearid_personalize.report import to_json

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from nearid_personalize.distractors.build import Builder
    from nearid_personalize.distractors.inpaint import Inpainter
    from nearid_personalize.distractors.nearness import Measuring
    from nearid_personalize.distractors.prompts import Prompts


def run_distractors(options: Distractors) -> int:
    """`nearid distractors`."""
    from nearid_personalize.distractors.build import Builder, Share, build_distractors
    from nearid_personalize.distractors.places import list_places
    from nearid_personalize.distractors.records import Records

    rows = _rows(options)
    prompts, settings = _prompts(options), _settings(options)
    share = Share.of_process()
    places = list_places(rows, options.out, options.limit)
    quiet = options.json or share.rank > 0
    say(
        quiet,
        f"plan: {len(places)} views of {len({place.row for place in places})} subjects, {options.tries} tries at most",
    )
    check_writable(options.out)

    device = _device(options)
    inpaint = load_inpainter(options, device)
    measure = load_measuring(options, device)
    text_image = measure.text_image
    find_mask = None
    if options.mask_model is not None:
        from nearid_personalize.distractors.masks import load_mask_model

        find_mask = load_mask_model(options.mask_model, device, text_image)
    known: dict[str, Any] = {"find_mask": find_mask, "captions": _captions(rows)}
    if options.dry_run:
        records = Records(options.out)
        builder = Builder(
            rows=rows,
            records=records,
            inpaint=inpaint,
            options=options.building,
            prompts=prompts,
            measure=measure,
            share=share,
            **known,
        )
        return _estimate(options, builder, len(places))
    report = build_distractors(
        rows,
        options.out,
        inpaint,
        options=options.building,
        prompts=prompts,
        measure=measure,
        settings=settings,
        show=not options.json,
        **known,
    )
    if share.rank > 0:
        return DONE
    if options.parquet is not None:
        from nearid_personalize.distractors.outputs import write_parquet

        write_parquet(rows, places, Records(options.out), options.parquet, options.base_model)
    return _conclude(options, report)


def _rows(options: Distractors) -> Rows:
    from nearid_personalize.miniworld import rows

    if Path(options.views).resolve() == options.out.resolve():
        raise InputError(f"--out {options.out}: is --views; give another folder, for the views are copied into it")
    if options.views == "miniworld":
        return rows("train", options.limit or 100, num_views=2, sources={})
    return load_rows(options.views, split=options.split)


def _device(options: Distractors) -> str:
    """The device of this process: of several, each its own GPU."""
    device = choose_device(options.device)
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device


def _prompts(options: Distractors) -> "Prompts":
    from nearid_personalize.distractors.prompts import VOCABULARY, Prompts, read_prompts, read_vocabulary

    return Prompts(
        listed=read_prompts(options.prompts) if options.prompts else (),
        vocabulary=read_vocabulary(options.vocabulary) if options.vocabulary else VOCABULARY,
    )


def _settings(options: Distractors) -> dict[str, Any]:
    """The models of a run, by flag."""
    return {
        "base_model": options.base_model,
        "inpaint_class": options.inpaint_class,
        "controlnet": options.controlnet,
        "lora": None if options.lora is None else str(options.lora),
        "mask_model": options.mask_model,
        "model": options.model,
        "text_image_model": options.text_image_model,
    }


def _captions(rows: Rows) -> Mapping[tuple[int, int], str]:
    """Captions that lie beside the views (photo.txt, or metadata.jsonl in a subject's folder), by row and slot."""
    from nearid_personalize.training.lora.pictures import read_captions

    found: dict[tuple[int, int], str] = {}
    read: dict[Path, dict[str, str]] = {}
    for number, row in enumerate(rows):
        for slot, view in enumerate(row.views):
            if not isinstance(view, Path):
                continue
            if view.parent not in read:
                read = {view.parent: read_captions(view.parent)}  # of one subject at a time
            if view.name in read[view.parent]:
                found[number, slot] = read[view.parent][view.name]
    return found


# --- models ----------------------------------------------------------------------------------------------------------
def load_inpainter(options: Distractors, device: str) -> "Inpainter":
    """The base model as an inpainter, as the flags say."""
    from nearid_personalize.distractors.inpaint import inpainter_for

    dtype = choose_dtype(options.dtype, device)
    pipe = load_pipeline(options.base_model, device, dtype)
    pipe = _as_inpainting(pipe, options, device, dtype)
    if options.lora is not None:
        from nearid_personalize.lora.files import load_lora

        load_lora(pipe, options.lora)
    pipe.set_progress_bar_config(disable=True)
    return inpainter_for(
        pipe,
        size=options.size,
        steps=options.steps,
        guidance_scale=options.guidance_scale,
        strength=options.strength,
    )


def _as_inpainting(
    pipe: "DiffusionPipeline", options: Distractors, device: str, dtype: torch.dtype
) -> "DiffusionPipeline":
    """The base model's parts as another pipeline class, with a ControlNet where one is given."""
    if options.inpaint_class is None:
        return pipe
    import diffusers

    from nearid_personalize.distractors.inpaint import RECORDS

    if options.inpaint_class not in RECORDS or not hasattr(diffusers, options.inpaint_class):
        raise InputError(f"--inpaint-class {options.inpaint_class}: unknown; give one of {', '.join(RECORDS)}")
    parts: dict[str, Any] = {}
    if options.controlnet is not None:
        parts["controlnet"] = _load_controlnet(options.controlnet, device, dtype)
    try:
        return getattr(diffusers, options.inpaint_class).from_pipe(pipe, dtype=dtype, **parts)
    except (ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--inpaint-class {options.inpaint_class}: cannot be made of {type(pipe).__name__} ({reason})"
        ) from None


def _load_controlnet(name: str, device: str, dtype: torch.dtype) -> Any:
    import diffusers

    from nearid_personalize.hub import HUB_ERRORS, download_fault

    try:
        config = diffusers.ControlNetModel.load_config(name)
        kind = getattr(diffusers, config["_class_name"])
        return kind.from_pretrained(name, dtype=dtype, use_safetensors=True).to(device)
    except (*HUB_ERRORS, ValueError, KeyError, AttributeError) as error:
        raise InputError(
            f"--controlnet {name}: {download_fault(error)}; give a ControlNet's folder or Hub id"
        ) from None


def load_measuring(options: Distractors, device: str) -> "Measuring":
    """The models of the nearness filter; none where nothing is filtered."""
    from nearid_personalize.distractors.nearness import OTHER_CATEGORIES, Measuring
    from nearid_personalize.floors.adherence import TextImageEncoder
    from nearid_personalize.floors.quality import find_quality_floor
    from nearid_personalize.scorer.scorer import IdentityScorer

    text_image = None
    if options.text_image_model is not None:
        text_image = TextImageEncoder.from_pretrained(options.text_image_model, device)
    if not options.filter:
        return Measuring(text_image=text_image)
    scorer = IdentityScorer.from_pretrained(options.model, device, trunk=options.trunk)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is no quality floor is no news
        quality = find_quality_floor(options.model, scorer)
    return Measuring(
        scorer=scorer,
        has_identity=not _is_bare_trunk(options),
        text_image=text_image,
        categories=OTHER_CATEGORIES,
        quality=quality,
    )


def _is_bare_trunk(options: Distractors) -> bool:
    """Whether --model has no identity head: it is a vision model as it was published."""
    from nearid_personalize.encoder.checkpoints import checkpoint_folder, holds_head_alone
    from nearid_personalize.names import packaged

    folder = checkpoint_folder(packaged(options.model, "nearid"))
    if holds_head_alone(folder):
        return False
    return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type") != "nearid"


# --- what is said ----------------------------------------------------------------------------------------------------
def _estimate(options: Distractors, builder: "Builder", num_views: int) -> int:
    """Draw one distractor, in memory, and say what the whole run would take."""
    from tempfile import TemporaryDirectory

    from nearid_personalize.distractors.places import list_places, write_picture

    with TemporaryDirectory() as folder:  # preparing a view writes its copy
        view = None
        for place in list_places(builder.rows, Path(folder), options.limit):
            try:
                view = builder.prepare(place)
                break
            except InputError as error:
                say(options.json, f"would be skipped: {error}")
        if view is None:
            raise InputError(f"--views {options.views}: no view can be repainted")
        started = time.perf_counter()
        (painted,) = builder.inpaint([builder.job(view, 0)])
        seconds = time.perf_counter() - started
        sample = Path(folder) / "sample.png"
        write_picture(builder.paste(view, painted), sample)
        megabytes = (sample.stat().st_size + view.place.view_file.stat().st_size) / 1e6
    shared = seconds * num_views / builder.share.count
    facts = {
        "views": num_views,
        "tries": options.tries,
        "seconds_per_picture": round(seconds, 3),
        "hours_at_least": round(shared / 3600, 3),
        "hours_at_most": round(shared * options.tries / 3600, 3),
        "gigabytes": round(num_views * megabytes / 1e3, 3),
    }
    if options.json:
        sys.stdout.write(to_json(facts))
    else:
        print(
            f"{num_views} views, {seconds:.2f} s a picture (the first one, unbatched): {shared / 3600:.2f} to "
            f"{shared * options.tries / 3600:.2f} hours for 1 to {options.tries} tries; about "
            f"{facts['gigabytes']:.2f} GB of views and distractors. Nothing was written."
        )
    return DONE


def _conclude(options: Distractors, report: Mapping[str, Any]) -> int:
    counts = report["counts"]
    if options.json:
        sys.stdout.write(to_json(report))
        return DONE if counts["kept"] else NONE_ACCEPTED
    for view in report["views"]:
        if view["status"] == "skipped":
            print(f"skipped: {view['reason']}")
    if counts["refusals"]:
        refused = [("refused because", "tries"), *((reason, str(n)) for reason, n in counts["refusals"].items())]
        print(aligned(refused))
    proof = report["background"]
    print(
        f"kept {counts['kept']} of {counts['kept'] + counts['refused']} views' distractors in {counts['tries']} tries, "
        f"{counts['skipped']} views skipped"
    )
    print(f"background: {proof['pixels_compared']:,} pixels of {proof['files']} files compared, none differs")
    print(f"look at {options.out / 'contact_sheet.png'} and {options.out / 'limits.png'}")
    return DONE if counts["kept"] else NONE_ACCEPTED
