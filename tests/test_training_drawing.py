"""What a pipeline has on the device while it draws beside its training: text encoders and denoiser by turns.

There is no second device here. "cpu:0" stands for it: modules stay where they are, and a spy notes where each was sent.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from test_training_lora_families import folders, load  # noqa: F401 - a fixture
from torch import nn

from nearid_personalize.training.lora.families import FAMILIES, Family
from nearid_personalize.training.lora.loop import LoraOptions, LoraRun
from nearid_personalize.training.lora.memory import needs_of, outline
from nearid_personalize.training.lora.pictures import read_references
from nearid_personalize.training.memory import bytes_of

DEVICE = torch.device("cpu:0")
NAMES = ("sd", "sdxl", "sd3", "flux", "qwen", "z_image")


class Spy:
    """Where each module of a pipeline was sent last, and who was there when one of them was called."""

    def __init__(self, family: Family) -> None:
        self.place = {name: "cpu" for name, part in self.parts(family).items()}
        self.calls: list[tuple[str, frozenset[str]]] = []
        for name, part in self.parts(family).items():
            self.watch(name, part)

    @staticmethod
    def parts(family: Family) -> dict[str, nn.Module]:
        return {"denoiser": family.denoiser, "vae": family.pipe.vae, **family.text_encoders()}

    def watch(self, name: str, part: nn.Module) -> None:
        send = part.to

        def to(*args: Any, **kwargs: Any) -> Any:
            places = [str(value) for value in (*args, *kwargs.values()) if isinstance(value, str | torch.device)]
            self.place[name] = places[0] if places else self.place[name]
            return send(*args, **kwargs)

        part.to = to
        part.register_forward_pre_hook(lambda module, args: self.calls.append((name, self.present)))

    @property
    def present(self) -> frozenset[str]:
        return frozenset(name for name, place in self.place.items() if place == str(DEVICE))

    def called(self, name: str) -> list[frozenset[str]]:
        return [present for called, present in self.calls if called == name]


def draw(family: Family, prompt: str = "a photo of sks dog") -> torch.Tensor:
    size = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt"}
    generator = torch.Generator("cpu").manual_seed(3)
    return family.pipe(prompt, generator=generator, **size, **family.guidance(3.0)).images


@contextmanager
def drawing(family: Family) -> Iterator[Spy]:
    """Ready to draw on the stand-in, the denoiser there already."""
    spy = Spy(family)
    family.denoiser.to(DEVICE)
    with family.ready_to_draw(DEVICE):
        yield spy


@pytest.mark.parametrize("name", NAMES)
def test_text_encoders_and_denoiser_are_there_by_turns_and_the_picture_is_the_same(name, folders):  # noqa: F811
    family = family_of(folders(name))
    plain = draw(family)
    with drawing(family) as spy:
        first, second = draw(family), draw(family)
        encoders = set(family.text_encoders())
        assert encoders and all(spy.called("denoiser")) and spy.present == {"denoiser", "vae"}
    for picture in (first, second):  # sums of weights that lie elsewhere in memory are rounded differently
        torch.testing.assert_close(picture, plain, rtol=0, atol=2e-6)
    for present in spy.called("denoiser"):
        assert present == {"denoiser", "vae"}
    for encoder in encoders:
        assert spy.called(encoder), "each has a part in it"
        assert all("denoiser" not in present and encoder in present for present in spy.called(encoder))
    assert spy.present == {"denoiser"}, "where it was before"


def family_of(folder: Path) -> Family:
    pipe = load(folder)
    return FAMILIES[type(pipe).__name__](pipe)


def test_a_prompt_is_encoded_once_a_run(folders):  # noqa: F811
    family = family_of(folders("sdxl"))
    with drawing(family) as spy:
        draw(family), draw(family)
        once = len(spy.called("text_encoder"))
        other = draw(family, "sks")
        assert len(spy.called("text_encoder")) == 2 * once > 0
    with family.ready_to_draw(DEVICE):
        assert torch.equal(draw(family, "sks"), other)
    assert len(spy.called("text_encoder")) == 2 * once
    assert "encode_prompt" not in vars(family.pipe)


def test_embeddings_that_are_given_are_not_remembered(folders):  # noqa: F811
    family = family_of(folders("sd"))
    given = [torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    call = {"height": 32, "width": 32, "num_inference_steps": 1, "output_type": "pt", "negative_prompt": "x"}

    def pictures() -> list[torch.Tensor]:
        generators = [torch.Generator("cpu").manual_seed(3) for _ in given]
        return [family.pipe(prompt_embeds=one, generator=g, **call).images for one, g in zip(given, generators)]

    plain = pictures()
    with family.ready_to_draw(DEVICE):
        lent = pictures()
    assert not torch.equal(*plain) and all(torch.equal(*pair) for pair in zip(plain, lent))
    assert not family.embeddings


@pytest.mark.parametrize("text_rank", [0, 2])
def test_encoders_that_are_trained_stay(text_rank, tiny_kl_pipeline_dir, photo_dir, tmp_path):
    """And what they say of a prompt is asked anew each time, for it changes."""
    options = LoraOptions.of(
        base_model=str(tiny_kl_pipeline_dir),
        references=photo_dir,
        output=tmp_path,
        text_rank=text_rank,
        rank=2,
        batch_size=1,
        resolution=32,
        precision="fp32",
    )
    run = LoraRun.open(options, Accelerator(), read_references(options.data))
    calls: list[int] = []
    run.family.pipe.text_encoder.register_forward_pre_hook(lambda module, args: calls.append(1))
    for _ in range(2):
        with run.ready_to_draw():
            draw(run.family)
    assert bool(run.family.embeddings) == (not text_rank)
    assert len(calls) == (4 if text_rank else 2), "prompt and negative prompt"


def test_a_sharded_denoiser_stays(folders):  # noqa: F811
    family = family_of(folders("flux"))
    spy = Spy(family)
    family.denoiser.to(DEVICE)
    with family.ready_to_draw(DEVICE, sharded=True):
        draw(family)
    assert all("denoiser" in present for present in spy.called("text_encoder_2"))
    assert all("text_encoder_2" not in present for present in spy.called("denoiser"))


def test_the_plan_counts_the_larger_of_the_two(folders):  # noqa: F811
    options = LoraOptions.of(base_model=str(folders("sd")), references=Path(), output=Path(), resolution=32)
    options = options.but(validate_every=1, batch_size=1)

    def drawing_phase(text_rank: int) -> tuple[int, int]:
        family = outline(options, torch.bfloat16)
        texts = sum(bytes_of(encoder) for encoder in family.text_encoders().values())
        told = options.but(text_rank=text_rank)
        return needs_of(family, told, "cuda", torch.bfloat16).phases["drawing"], texts

    (frozen, texts), (trained, _) = drawing_phase(0), drawing_phase(4)
    assert trained - frozen == texts > 0
