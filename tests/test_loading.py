"""Loading a base pipeline: what the loader gave is what was asked for."""

import pytest
import torch
from tiny_pipelines import build

from nearid_personalize.errors import InputError
from nearid_personalize.loading import check_denoiser_precision


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_a_denoiser_in_another_precision_is_refused_with_the_release_of_diffusers(family: str) -> None:
    pipe, _ = build(family)
    check_denoiser_precision(pipe, torch.float32)
    with pytest.raises(
        InputError, match=r"diffusers \d+\.\d+\S*: loaded the weights as torch.float32 where torch.bfloat16"
    ):
        check_denoiser_precision(pipe, torch.bfloat16)
