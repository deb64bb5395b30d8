"""`nearid report-card`: what a finished LoRA is worth, by prompt, scale and checkpoint."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from nearid_personalize.attention import check_attention, denoiser_of, using_attention
from nearid_personalize.commands.console import DONE, NONE_ACCEPTED, Stopwatch, picture_paths, say
from nearid_personalize.commands.enrolment import enrolled, negative_paths
from nearid_personalize.commands.options import ReportCard
from nearid_personalize.errors import InputError
from nearid_personalize.files import check_writable
from nearid_personalize.images import load_images
from nearid_personalize.loading import choose_device, choose_dtype, load_pipeline
from nearid_personalize.report import to_json

if TYPE_CHECKING:
    from nearid_personalize.lora.card import SampleJudge


def run_report_card(options: ReportCard) -> int:
    """`nearid report-card`."""
    from nearid_personalize.lora.card import report_card
    from nearid_personalize.lora.card_page import write_card
    from nearid_personalize.lora.files import find_loras

    loras = find_loras(options.lora)
    subject_name, token, prompts = _card_prompts(options, list(loras.values()))
    references = load_images(picture_paths(options.references))
    negative_paths(options)
    check_writable(options.out)
    count = (1 + len(loras) * len(options.scales)) * len(prompts) * options.seeds
    say(
        options.json,
        f"plan: {count} pictures of {subject_name!r}: {len(prompts)} prompts from {options.seeds} seeds each, of"
        f" {len(loras)} LoRAs at {len(options.scales)} scales and of none, scored by {options.model}",
    )
    clock = Stopwatch()
    with clock.stage("load"):
        device = choose_device(options.device)
        check_attention(options.attention, device)
        sample_judge = _sample_judge(options, references, token, device)
        dtype = choose_dtype(options.dtype, device)
        pipe = load_pipeline(options.base_model, device, dtype, options.base_config)
        pipe.set_progress_bar_config(disable=True)
    say(options.json, sample_judge.subject.describe())
    arguments: dict = {"num_inference_steps": options.steps}
    if options.guidance_scale is not None:
        arguments["guidance_scale"] = options.guidance_scale
    with clock.stage("draw"), using_attention(denoiser_of(pipe), options.attention, device):
        card = report_card(
            pipe,
            loras,
            sample_judge,
            subject_name,
            options.scales,
            prompts,
            options.seeds,
            options.max_batch_size,
            **arguments,
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
    from nearid_personalize.lora.check import check_lora_file
    from nearid_personalize.lora.files import subject_of
    from nearid_personalize.lora.samples import default_prompts
    from nearid_personalize.lora.trainers import notes_beside

    infos = [check_lora_file(file) for file in loras]
    notes = notes_beside(loras[0], infos[0].metadata)
    told = subject_of(infos)
    if told is None and notes and notes.subject:
        told = (notes.subject, notes.token)
    if options.subject:
        told = (options.subject, options.subject.split()[0])
    drawn = options.prompts or (notes.prompts if notes else ())
    if told is None and not drawn:
        raise InputError(f'--lora {loras[0]}: does not say what it calls the subject; give --subject "sks dog"')
    if drawn and not options.prompts and notes:
        say(options.json, f"prompts: the {len(drawn)} that {notes.trainer} drew samples of; --prompts sets others")
    name, token = told or (loras[0].stem, "")
    return name, token, drawn or default_prompts(name, options.living)


def _sample_judge(options: ReportCard, references: Sequence[Image.Image], token: str, device: str) -> "SampleJudge":
    from nearid_personalize.floors.adherence import TextImageEncoder
    from nearid_personalize.floors.chosen import chosen_floors
    from nearid_personalize.lora.card import SampleJudge
    from nearid_personalize.scorer.scorer import IdentityScorer

    scorer = IdentityScorer.from_pretrained(options.model, device, trunk=options.trunk)
    subject = enrolled(scorer, references, options)
    floors = chosen_floors(options.model, scorer, references, True, options.text_image_model)
    text_image = (
        TextImageEncoder.from_pretrained(options.text_image_model, device) if options.text_image_model else None
    )
    return SampleJudge(scorer, subject, references, floors, text_image, token)
