import pytest
import torch

from nearid_personalize import InputError
from nearid_personalize.data.reconstruct import Reconstruction, load_reconstruction


@pytest.mark.parametrize("fixture", ["tiny_pipeline_dir", "tiny_kl_pipeline_dir"])
def test_a_seeded_share_passes_through_the_autoencoder(fixture, request):
    augment = load_reconstruction(request.getfixturevalue(fixture), 0.5)
    pixels = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    once, again, other = (augment(pixels, seed) for seed in (1, 1, 2))
    changed = (once != pixels).flatten(1).any(dim=1)
    assert 10 <= changed.sum() <= 30
    assert torch.equal(once, again) and not torch.equal(once, other)
    assert once.shape == pixels.shape and once.min() >= 0 and once.max() <= 1


def test_a_reconstruction_is_what_the_autoencoder_makes(tiny_pipeline_dir):
    augment = load_reconstruction(tiny_pipeline_dir, 1.0)
    exact = Reconstruction(augment.autoencoder, 1.0, latent_noise=0.0)
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = augment.autoencoder.encode(pixels * 2 - 1).latents
        expected = (augment.autoencoder.decode(latents).sample + 1) / 2
    assert torch.allclose(exact(pixels, 0), expected.clamp(0, 1), atol=1e-6)
    assert not torch.equal(augment(pixels, 0), exact(pixels, 0))


def test_nothing_is_changed_at_share_zero(tiny_pipeline_dir):
    pixels = torch.rand(3, 3, 32, 32)
    assert load_reconstruction(tiny_pipeline_dir, 0.0)(pixels, 0) is pixels


def test_the_fingerprint_names_all_that_reconstructions_depend_on(tiny_pipeline_dir, tiny_kl_pipeline_dir):
    augment = load_reconstruction(tiny_pipeline_dir, 0.5)
    assert augment.fingerprint == load_reconstruction(tiny_pipeline_dir, 0.5).fingerprint
    others = [
        load_reconstruction(tiny_pipeline_dir, 0.4),
        load_reconstruction(tiny_kl_pipeline_dir, 0.5),
        Reconstruction(augment.autoencoder, 0.5, latent_noise=0.0),
    ]
    assert len({augment.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_wrong_input_names_its_flag(tmp_path, tiny_pipeline_dir):
    with pytest.raises(InputError, match="--reconstruct-with"):
        load_reconstruction(tmp_path, 0.5)
    with pytest.raises(InputError, match="--reconstructed"):
        load_reconstruction(tiny_pipeline_dir, 1.5)
