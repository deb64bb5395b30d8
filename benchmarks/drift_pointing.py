"""Does the drift map point at what changed? `python benchmarks/drift_pointing.py` (mini-world test subjects).

The pointing game: one attribute of a subject is edited in a picture, the references are views of the true subject, none
of them the picture that was edited, and a map scores when its hottest pixel is one that the edit changed, without any
tolerance. Edits that changed fewer than `min_pixels` pixels cannot be seen and are left out. Maps of one value per
patch are enlarged bilinearly, so that their peak is the middle of a patch, except those said to lie on displaced grids.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from nearid_personalize.driftmap import SHIFTS, average_grids, drift_map, shifted_grids
from nearid_personalize.evaluation import with_interval
from nearid_personalize.images import save_image
from nearid_personalize.metrics import bootstrap_interval
from nearid_personalize.miniworld import part_edit, photos
from nearid_personalize.report import drift_sheet
from nearid_personalize.scorer.scorer import IdentityScorer
from nearid_personalize.scorer.subject import identity_scores

NEAR = 2
"""Pixels of tolerance in the second figure."""


@dataclass(frozen=True)
class Options:
    """What is measured."""

    num_subjects: int = 400
    """Subjects with a visible edit, one edit each."""
    split: Literal["val", "test"] = "test"
    num_references: int = 4
    """The same subject on another background under another view, and more photos in any context under any view."""
    min_pixels: int = 4
    """Smallest edit that counts as visible, pixels of 64 x 64."""
    shifts: int = SHIFTS
    model: str = "miniworld"
    """Folder of a NearID model for the mini-world. Default: the packaged one."""
    sheets: str = ""
    """Existing folder for the first 24 cases as pictures: edited, nearest reference, map, truth. Default: none."""


@dataclass(frozen=True, eq=False)
class Case:
    """Bytes [3,64,64] of an edited picture, [R,3,64,64] of the references; bool [64,64]: what changed, the subject."""

    picture: Tensor
    references: Tensor
    changed: Tensor
    subject: Tensor
    attribute: str


def visible_case(index: int, options: Options) -> Case | None:
    """Edit number `index`; None where too little of it is seen."""
    edit = part_edit(options.split, index)
    if edit.part_masks[0].sum() < options.min_pixels:
        return None
    others = [shot.image for shot, _ in photos(edit.pet, options.num_references - 1, wide=True)]
    views = [
        torch.from_numpy(view).permute(2, 0, 1) for view in (edit.edited[0].image, edit.originals[1].image, *others)
    ]
    return Case(
        views[0],
        torch.stack(views[1:]),
        torch.from_numpy(edit.part_masks[0]),
        torch.from_numpy(edit.originals[0].mask | edit.edited[0].mask),
        edit.attribute,
    )


def pixels(image: np.ndarray) -> Tensor:
    """[H,W,3] -> [3,H,W]."""
    return torch.from_numpy(image).permute(2, 0, 1)


class Maps:
    """The maps that are compared, each [64,64], of one case."""

    def __init__(self, scorer: IdentityScorer, case: Case, shifts: int) -> None:
        self.scorer, self.case, self.shifts = scorer, case, shifts
        self.model, self.patch_size = scorer.model, scorer.model.config.vision_config.patch_size
        self.prepared = scorer.preprocessing(case.picture[None])
        with torch.no_grad():
            tokens = self.model.tokens(scorer.preprocessing(case.references))
            self.references = self.model.pool(tokens)
        self.patches = F.normalize(tokens.flatten(0, 1), dim=-1)
        self.aggregation = scorer.calibration.aggregation if scorer.calibration else "mean"

    def drift(self) -> Tensor:
        """The library's."""
        return drift_map(self.scorer, self.case.picture, self.case.references, shifts=self.shifts).heat

    def pixel_gradient(self) -> Tensor:
        """|d score / d pixel|, summed over channels."""
        pixels = self.prepared.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self._score(self.model.tokens(pixels)), pixels)
        return gradient[0].abs().sum(0)

    def blurred_gradient(self) -> Tensor:
        """The same under a Gaussian of 2 pixels."""
        line = torch.exp(-(torch.arange(-6.0, 7.0) ** 2) / 8)
        kernel = (line[:, None] * line / line.sum() ** 2)[None, None]
        return F.conv2d(F.pad(self.pixel_gradient()[None, None], [6] * 4, mode="replicate"), kernel)[0, 0]

    def gradient_times_token(self) -> Tensor:
        """- <d score / d token, token> of each patch."""
        tokens = self.model.tokens(self.prepared).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self._score(tokens), tokens)
        return self._enlarged(-(gradient * tokens).sum(-1).detach())

    def patch_similarity(self) -> Tensor:
        """1 - the cosine of each patch token with the most alike of the references'."""
        return self._enlarged(self._unlikeness(self.prepared))

    def displaced_patch_similarity(self) -> Tensor:
        """The same on the drift map's displaced grids."""
        moved, offsets = shifted_grids(self.prepared[0], self.patch_size, self.shifts)
        return average_grids(self._unlikeness(moved), offsets, self.patch_size, 64)

    def _score(self, tokens: Tensor) -> Tensor:
        return identity_scores(self.model.pool(tokens), self.references, self.aggregation).sum()  # type: ignore[arg-type]

    @torch.no_grad()
    def _unlikeness(self, pixels: Tensor) -> Tensor:
        return 1 - (F.normalize(self.model.tokens(pixels), dim=-1) @ self.patches.T).amax(-1)

    def _enlarged(self, values: Tensor) -> Tensor:
        side = 64 // self.patch_size
        return F.interpolate(values.view(1, 1, side, side), (64, 64), mode="bilinear")[0, 0]


METHODS: dict[str, Callable[[Maps], Tensor]] = {
    "pixel gradient": Maps.pixel_gradient,
    "  blurred": Maps.blurred_gradient,
    "gradient x token": Maps.gradient_times_token,
    "patch similarity": Maps.patch_similarity,
    "  displaced grids": Maps.displaced_patch_similarity,
    "drift map": Maps.drift,
}


def peaks(scorer: IdentityScorer, case: Case, shifts: int) -> list[int]:
    """The hottest pixel of every method's map, a position in the flattened picture."""
    maps = Maps(scorer, case, shifts)
    return [int(method(maps).argmax()) for method in METHODS.values()]


def save_sheet(scorer: IdentityScorer, case: Case, shifts: int, path: Path) -> None:
    """The case as a person would see it, and beside it the truth as the same kind of overlay."""
    found = drift_map(scorer, case.picture, case.references, shifts=shifts)
    pair = (case.picture, case.references[found.reference_index])
    picture, reference = (Image.fromarray(view.permute(1, 2, 0).numpy()) for view in pair)
    drawn = [drift_sheet(picture, reference, heat) for heat in (found.heat, case.changed.float())]
    both = Image.new("RGB", (drawn[0].width, 2 * drawn[0].height))
    for row, sheet in enumerate(drawn):
        both.paste(sheet, (0, row * sheet.height))
    save_image(both, path)


def shares(hits: Tensor, members: Mapping[str, Tensor]) -> str:
    """The mean of hits [N] in each group of cases."""
    return "  ".join(f"{name} {hits[among].mean():.2f}" for name, among in members.items())


def main(options: Options) -> None:
    """Print for each map the share of its peaks that lie in the edited part, near it, and on the subject."""
    scorer = IdentityScorer.from_pretrained(options.model)
    scorer.model.requires_grad_(False)
    visible = (case for index in count() if (case := visible_case(index, options)))
    cases = list(islice(visible, options.num_subjects))
    for number, case in enumerate(cases[:24] if options.sheets else ()):
        save_sheet(scorer, case, options.shifts, Path(options.sheets) / f"{number:02}-{case.attribute}.png")
    found = torch.tensor([peaks(scorer, case, options.shifts) for case in tqdm(cases, leave=False)])  # [N,methods]

    names = [case.attribute for case in cases]
    members = {name: torch.tensor([name == other for other in names]) for name in sorted(set(names))}
    changed = torch.stack([case.changed for case in cases]).double()
    near = F.max_pool2d(changed, 2 * NEAR + 1, 1, NEAR)
    subjects = torch.stack([case.subject for case in cases]).double()
    numbers = "  ".join(f"{name} {int(among.sum())}" for name, among in members.items())
    print(f"{options.split} subjects, {options.num_references} references each; edits: {numbers}")
    for column, name in enumerate(["chance", *METHODS], start=-1):
        # Chance is a pixel drawn at random: the share of all pixels that would hit.
        hit, close, on = (
            (m.flatten(1) if column < 0 else m.flatten(1).gather(1, found[:, [column]])).mean(1)
            for m in (changed, near, subjects)
        )
        figure = with_interval(float(hit.mean()), bootstrap_interval(hit))
        print(f"{name:18} n {len(hit)}  {figure}  within {NEAR} px {close.mean():.3f}  on the subject {on.mean():.3f}")
        print(f"{'':18} {shares(hit, members)}")


if __name__ == "__main__":
    main(tyro.cli(Options))
