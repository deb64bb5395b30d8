"""What a validation leaves beside its journal: sheets of pictures, kept LoRAs, the events of TensorBoard."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nearid_personalize.files import write_atomically
from nearid_personalize.images import load_image, save_image, to_tensor
from nearid_personalize.lora.files import WEIGHTS_NAME
from nearid_personalize.lora.samples import SampleScores
from nearid_personalize.report import COLUMNS, Tile, contact_sheet
from nearid_personalize.training.lora.validation_plan import ValidationPlan
from nearid_personalize.training.lora.validation_records import Record, headline

JOURNAL, BEST, LAST, PICTURES = "validation.jsonl", "best", "last", "validation"


def write_sheet(
    output: Path,
    images: Sequence[Sequence[Any]],
    scores: SampleScores,
    record: Record,
    plan: ValidationPlan,
    references: Sequence[Any],
) -> None:
    """Write OUTPUT/validation/step-000100.png: the references, then a row of pictures per prompt."""
    same = len(shared_beginning(plan.prompts))  # there is little room for names
    tiles = []
    for row, prompt in enumerate(plan.prompts):
        for seed, image in enumerate(images[row]):
            title, identity = f"seed {seed}: {prompt[same:]}", float(scores.identity[row, seed])
            tiles.append(Tile(image, title, identity, status_of(scores, row, seed)))
    threshold = record["threshold"]
    columns = plan.seeds * max(1, COLUMNS // plan.seeds)  # the seeds of a prompt beside each other
    title = f"{headline(record)}; threshold {threshold:.3f}"
    sheet = contact_sheet(references, tiles, title, threshold, columns, "Prompt by prompt")
    path = sheet_path(output, record["step"])
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(sheet, path)


def sheet_path(output: Path, step: int) -> Path:
    """Where the sheet of a step lies."""
    return output / PICTURES / f"step-{step:06d}.png"


def status_of(scores: SampleScores, row: int, seed: int) -> str:
    """What the sheet says of a picture."""
    if scores.copied[row, seed]:
        return "copy"
    return "accepted" if scores.accepted[row, seed] else "rejected"


def shared_beginning(prompts: Sequence[str]) -> str:
    """The words that all prompts begin with; "" for a lone one."""
    words = [prompt.split(" ") for prompt in prompts]
    same = next((n for n, column in enumerate(zip(*words)) if len(set(column)) > 1), 0)
    return "".join(word + " " for word in words[0][:same])


def forget(output: Path) -> None:
    """Remove what an earlier run's validation left."""
    (output / JOURNAL).unlink(missing_ok=True)
    for folder in (BEST, LAST, PICTURES):
        shutil.rmtree(output / folder, ignore_errors=True)


def promote(output: Path) -> None:
    """Make OUTPUT/best the file of OUTPUT, and what was there OUTPUT/last; at every moment OUTPUT holds a whole one."""
    (output / LAST).mkdir(exist_ok=True)
    write_atomically(output / LAST / WEIGHTS_NAME, (output / WEIGHTS_NAME).read_bytes())
    write_atomically(output / WEIGHTS_NAME, (output / BEST / WEIGHTS_NAME).read_bytes())


def open_tensorboard(output: Path) -> Any:
    """A writer of event files."""
    from torch.utils.tensorboard import SummaryWriter  # an extra

    return SummaryWriter(str(output / "tensorboard"))


def figures(record: Mapping[str, Any]) -> dict[str, float]:
    """What a record measured, by the name that trackers show it under."""
    names = ("identity", "leave_one_out", "accept_rate", "copy_rate", "adherence", "diversity", "validation_loss")
    return {f"validation/{name}": record[name] for name in names if record[name] is not None}


def log_to_tensorboard(writer: Any, record: Mapping[str, Any], output: Path) -> None:
    """Write the figures of a record, and its sheet."""
    for name, value in figures(record).items():
        writer.add_scalar(name, value, record["step"])
    sheet = to_tensor([load_image(sheet_path(output, record["step"]))])[0]
    writer.add_image("validation/samples", sheet, record["step"])
    writer.flush()
