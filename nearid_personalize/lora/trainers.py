"""What other trainers leave beside their LoRAs: what the subject is called, and which prompts they drew samples of.

Read are the metadata that Kohya's sd-scripts write into a file and the prompt list of its samples, ai-toolkit's
config.yaml, and the model cards (README.md) of SimpleTuner and of diffusers' scripts. All of it is a stranger's: what
cannot be read counts as not there.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nearid_personalize.files import parse_json

MAX_NOTE_BYTES = 1_000_000
"""Larger files are no notes of a trainer."""

MAX_PROMPTS = 8
"""Sample prompts that are taken over."""

PROMPT_FILES = ("sample/prompt.txt", "sample_prompts.txt", "prompts.txt")
"""Where sd-scripts' sample prompts lie, in the output folder."""

_REPEATS = re.compile(r"\d+_(?=\S)")  # of Kohya's "10_sks dog"
_PHOTO_OF = re.compile(r"(an? |the )?(\w+ )?(photo|picture|image|portrait) of (an? |the )?", re.IGNORECASE)


@dataclass(frozen=True)
class TrainerNotes:
    """What a trainer's files say. subject: what the LoRA calls it, "sks dog"; None: they do not say."""

    trainer: str
    subject: str | None = None
    prompts: tuple[str, ...] = ()

    @property
    def token(self) -> str:
        """The subject's first word, which is the rare one as a rule; "" where it is not known."""
        return self.subject.split()[0] if self.subject else ""


def notes_beside(lora: Path, metadata: Mapping[str, str]) -> TrainerNotes | None:
    """What the trainer of a LoRA file left in the file (`metadata`), in its folder, or one folder up; None: nothing."""
    folders = (lora.parent, lora.parent.parent)
    found = [*kohya_notes(metadata, folders), *ai_toolkit_notes(folders), *model_card_notes(folders)]
    if not found:
        return None
    subject = next((notes.subject for notes in found if notes.subject), None)
    prompts = next((notes.prompts for notes in found if notes.prompts), ())
    return TrainerNotes(trainer=found[0].trainer, subject=subject, prompts=about(prompts, subject))


def about(prompts: Sequence[str], subject: str | None) -> tuple[str, ...]:
    """The prompts that name the subject, the first few; all where it is not known what that is called."""
    token = subject.split()[0] if subject else ""
    named = [prompt for prompt in dict.fromkeys(prompts) if prompt and token in prompt]
    return tuple(named[:MAX_PROMPTS])


# --- Kohya's sd-scripts ----------------------------------------------------------------------------------------------
def kohya_notes(metadata: Mapping[str, str], folders: Sequence[Path]) -> Iterator[TrainerNotes]:
    """From the file's own metadata, and the prompt file of the samples."""
    if not any(name.startswith("ss_") for name in metadata):
        return
    prompts: tuple[str, ...] = ()
    for folder in folders:
        for name in PROMPT_FILES:
            prompts = prompts or kohya_prompts(read_note(folder / name))
    subject = kohya_subject(metadata)
    if subject or prompts:  # ai-toolkit writes a name of this kind too
        yield TrainerNotes(trainer="sd-scripts", subject=subject, prompts=prompts)


def kohya_subject(metadata: Mapping[str, str]) -> str | None:
    """What sd-scripts were told: class tokens, or the name of the photos' folder, "10_sks dog"."""
    for part in dictionaries(from_json(metadata.get("ss_datasets", ""))):
        if isinstance(part.get("class_tokens"), str) and part["class_tokens"].strip():
            return part["class_tokens"].strip()
    folders = from_json(metadata.get("ss_dataset_dirs", "")) or from_json(metadata.get("ss_tag_frequency", ""))
    for name in folders if isinstance(folders, dict) else ():
        if _REPEATS.match(name):
            return _REPEATS.sub("", name, count=1).strip() or None
    return None


def kohya_prompts(text: str) -> tuple[str, ...]:
    """A prompt a line, "#" before comments, options from " --" on."""
    lines = [line.split(" --")[0].strip() for line in text.splitlines() if not line.startswith("#")]
    return tuple(line for line in lines if line)


# --- ai-toolkit ------------------------------------------------------------------------------------------------------
def ai_toolkit_notes(folders: Sequence[Path]) -> Iterator[TrainerNotes]:
    """From the config.yaml that it copies into its output folder."""
    for folder in folders:
        for process in dictionaries(from_yaml(read_note(folder / "config.yaml"))):
            if not isinstance(process.get("sample"), dict):
                continue
            word = process.get("trigger_word")
            word = word.strip() if isinstance(word, str) and word.strip() else None
            told = process["sample"].get("prompts")
            texts = [text for text in told if isinstance(text, str)] if isinstance(told, list) else []
            prompts = tuple(text.replace("[trigger]", word or "").split(" --")[0].strip() for text in texts)
            yield TrainerNotes(trainer="ai-toolkit", subject=word, prompts=prompts)
            return


# --- SimpleTuner, diffusers ------------------------------------------------------------------------------------------
def model_card_notes(folders: Sequence[Path]) -> Iterator[TrainerNotes]:
    """From the header of a README.md: instance_prompt, and the prompts of the pictures shown."""
    for folder in folders:
        card = read_note(folder / "README.md")
        if not card.startswith("---"):
            continue
        header = from_yaml(card.split("\n---", 1)[0].removeprefix("---"))
        if not isinstance(header, dict):
            continue
        shown = header.get("widget")
        texts = [part.get("text") for part in shown if isinstance(part, dict)] if isinstance(shown, list) else []
        prompts = tuple(t for t in texts if isinstance(t, str) and t.strip() and not t.startswith("unconditional"))
        told = header.get("instance_prompt")
        subject = _PHOTO_OF.sub("", told, count=1).strip() if isinstance(told, str) else None
        if subject or prompts:
            yield TrainerNotes(trainer="SimpleTuner or diffusers", subject=subject or None, prompts=prompts)
            return


# --- reading ---------------------------------------------------------------------------------------------------------
def read_note(path: Path) -> str:
    """A small text file, "" for none."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_NOTE_BYTES:
            return ""
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def from_json(text: str) -> Any:
    """The value of a JSON text, None where it is none."""
    try:
        return parse_json(text)
    except ValueError:
        return None


def from_yaml(text: str) -> Any:
    """The value of a YAML text, None where it is none; plain values only, nothing is built."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None


def dictionaries(value: Any, depth: int = 8) -> Iterator[dict]:
    """All dictionaries inside a value, the outermost first, to a depth."""
    if isinstance(value, dict):
        yield value
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in inside if depth else ():
        yield from dictionaries(part, depth - 1)
