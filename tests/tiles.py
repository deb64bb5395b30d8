"""A toy data set of identities, and the tiny model that learns from it: shared by the tests of cache and training."""

import torch
from torch.utils.data import Dataset
from transformers import SiglipVisionConfig, SiglipVisionModel

from nearid_personalize import NearIDModel
from nearid_personalize.encoder.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(size=32)


class Tiles(Dataset):
    """Identities as a coloured tile on backgrounds of any colour; a distractor is another tile in the same place.

    Every third row has only two views: its last slot is padding, filled with `padding`.
    """

    def __init__(self, num_rows, seed=0, padding=0.5):
        self.num_rows, self.seed, self.padding = num_rows, seed, padding

    def __len__(self):
        return self.num_rows

    def __getitem__(self, index):
        if not 0 <= index < self.num_rows:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(self.seed * 100_003 + index)
        views = torch.rand(3, 3, 1, 1, generator=generator).expand(-1, -1, 32, 32).clone()
        distractors = views.clone()
        colour = torch.rand(3, 1, 1, generator=generator)
        for v in range(3):
            views[v, :, 8:24, 8:24] = colour
            distractors[v, :, 8:24, 8:24] = torch.rand(3, 1, 1, generator=generator)
        mask = torch.tensor([True, True, index % 3 != 0])
        views[~mask] = distractors[~mask] = self.padding
        return {"views": views, "distractors": distractors, "view_mask": mask, "distractor_mask": mask.clone()}


def tiny_model():
    """A SigLIP of 32 px, patch 8, width 32, two layers, pooled by its own head; always the same weights."""
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    return NearIDModel.from_vision_model(SiglipVisionModel(config))


def weights(model):
    """A copy of a model's state."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    """Whether two states are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
