"""What `test_hub` runs in a process of its own: load things by name, and print as JSON what became of each."""

import json
import sys
from pathlib import Path


def load_encoder(name: str) -> str:
    from nearid_personalize import IdentityScorer

    return str(IdentityScorer.from_pretrained(name).model.dtype)


def load_base(name: str) -> str:
    import torch

    from nearid_personalize.loading import load_pipeline

    return type(load_pipeline(name, "cpu", torch.float32)).__name__


def load_base_to_train(name: str) -> str:
    from nearid_personalize.training.lora.loop import LoraOptions, load_family

    return type(load_family(LoraOptions.of(base_model=name, references=Path("."), output=Path(".")))).__name__


def find_lora(name: str) -> str:
    from nearid_personalize.lora.files import check_lora_file, find_lora_file, find_loras

    assert list(find_loras([Path(name)]).values()) == [find_lora_file(name)]
    return str(check_lora_file(find_lora_file(name)).rank)


def load_data(name: str) -> str:
    from nearid_personalize.data.sources import load_rows

    return " ".join(load_rows(name).ids)


def find_pictures(name: str) -> str:
    """The pictures that `nearid embed` finds in a data set."""
    from nearid_personalize.bulk import parts_of

    records = [record for part in parts_of(name) for record in part.records()]
    return " ".join(f"{called} {isinstance(content, bytes)}" for called, content in records)


def score_by_default(photos: str) -> str:
    """`nearid score` of photos against themselves, by the released encoder, whose name nobody gives."""
    from nearid_personalize.cli import parse, run

    return str(run(parse(["score", "--references", photos, "--images", photos])))


def outcome(kind: str, name: str) -> str:
    """What was loaded, or the line that the user is told."""
    from nearid_personalize.errors import InputError

    try:
        return globals()[kind](name)
    except InputError as error:
        return f"error: {error}"


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    found = {f"{kind} {name}": outcome(kind, name) for kind, name in asked}
    print(json.dumps(found))
