"""Every family of trunks: which tokens are read, checked against transformers' own forward pass of each."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel
from transformers import CLIPVisionConfig as Clip
from transformers import Dinov2Config as Dinov2
from transformers import Dinov2WithRegistersConfig as Dinov2WithRegisters
from transformers import DINOv3ViTConfig as Dinov3
from transformers import Siglip2VisionConfig as Siglip2
from transformers import SiglipVisionConfig as Siglip
from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

from nearid_personalize.encoder.checkpoints import load_encoder
from nearid_personalize.encoder.model import NearIDConfig, NearIDModel
from nearid_personalize.encoder.preprocessing import Preprocessing
from nearid_personalize.encoder.trunks import TRUNK_TYPES, default_preprocessing

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8}
CONFIGS = {
    "siglip": Siglip(**SHAPE, intermediate_size=64, image_size=32),
    "siglip without head": Siglip(**SHAPE, intermediate_size=64, image_size=32, vision_use_head=False),
    "naflex": Siglip2(**SHAPE, intermediate_size=64, num_patches=16),
    "clip": Clip(**SHAPE, intermediate_size=64, image_size=32),
    "dinov2": Dinov2(**SHAPE, image_size=48),  # as published: position embeddings of a larger picture, interpolated
    "dinov2 registers": Dinov2WithRegisters(**SHAPE, image_size=32, num_register_tokens=4),
    "dinov3": Dinov3(**SHAPE, intermediate_size=64, image_size=32, num_register_tokens=4),
}
POOLS_ITSELF = ("siglip", "naflex")
HAS_CLASS_TOKEN = ("clip", "dinov2", "dinov2 registers", "dinov3")


def tiny_trunk(family):
    torch.manual_seed(0)
    trunk = AutoModel.from_config(CONFIGS[family]).eval()
    with torch.no_grad():  # away from the stock 0 and 1, where a norm left out would not show
        for parameter in trunk.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return trunk


@pytest.fixture(params=CONFIGS)
def family(request):
    return request.param


@pytest.fixture
def pixels():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def own_output(trunk, pixels):
    """transformers' own forward pass; NaFlex gets its patches from its own processor's function."""
    if trunk.config.model_type != "siglip2_vision_model":
        return trunk(pixels)
    patches = torch.stack([torch.from_numpy(convert_image_to_patches(p.numpy(), 8)) for p in pixels])
    mask, shapes = torch.ones(len(pixels), 16, dtype=torch.long), torch.tensor([[4, 4]] * len(pixels))
    return trunk(patches, pixel_attention_mask=mask, spatial_shapes=shapes)


def test_every_type_there_is_code_for_is_tested():
    assert {config.model_type for config in CONFIGS.values()} == set(TRUNK_TYPES)


@torch.no_grad()
def test_tokens_are_the_class_token_and_the_patches_after_the_final_norm(family, pixels):
    trunk = tiny_trunk(family)
    tokens = NearIDModel.from_vision_model(trunk).tokens(pixels)
    expected = own_output(trunk, pixels).last_hidden_state
    if family == "clip":
        expected = trunk.post_layernorm(expected)
    registers = getattr(trunk.config, "num_register_tokens", 0)
    class_token = family in HAS_CLASS_TOKEN
    assert tokens.shape == (3, 16 + class_token, 32) and expected.shape[1] == tokens.shape[1] + registers
    assert torch.allclose(tokens[:, class_token:], expected[:, class_token + registers :], atol=1e-5)
    assert torch.allclose(tokens[:, :class_token], expected[:, :class_token], atol=1e-5)


@torch.no_grad()
def test_frozen_pool_is_the_trunks_own_pooled_output(family, pixels):
    trunk = tiny_trunk(family)
    model = NearIDModel.from_vision_model(trunk)
    frozen = model.frozen_pool(model.tokens(pixels))
    own = own_output(trunk, pixels).pooler_output
    if own is None:  # a SigLIP trunk without its head pools nothing: the mean token stands in
        assert F.cosine_similarity(frozen, model.tokens(pixels).mean(dim=1)).min() > 0.999
    else:
        assert torch.allclose(frozen, F.normalize(own, dim=-1), atol=1e-5)
    if family in HAS_CLASS_TOKEN:  # it does not move with the head
        model.head.probe.add_(1)
        model.head.attention.out_proj.weight.mul_(torch.randn(32))
        assert torch.equal(model.frozen_pool(model.tokens(pixels)), frozen)
        assert not torch.allclose(model.get_image_features(pixels), frozen, atol=1e-2)


@torch.no_grad()
def test_outputs_and_a_round_trip(family, pixels, tmp_path):
    model = NearIDModel.from_vision_model(tiny_trunk(family))
    out = model(pixels)
    assert torch.equal(out.last_hidden_state, model.tokens(pixels))
    assert torch.allclose(out.image_embeds, F.normalize(out.pooler_output, dim=-1))
    assert torch.allclose(out.image_embeds.norm(dim=-1), torch.ones(3))
    model.save_pretrained(tmp_path)
    again, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert again.backbone.config._attn_implementation == "eager"
    assert torch.allclose(again(pixels).image_embeds, out.image_embeds, atol=1e-5)
    prefix = "backbone.head." if family in POOLS_ITSELF else "pooling_head."
    assert {name for name in model.state_dict() if "head." in name} == {prefix + n for n in model.head.state_dict()}


@torch.no_grad()
def test_a_bare_trunk_loads_from_its_folder(family, pixels, tmp_path):
    trunk = tiny_trunk(family)
    trunk.save_pretrained(tmp_path)
    model, preprocessing, _ = load_encoder(tmp_path)
    assert preprocessing == default_preprocessing(trunk.config) and model.head is not None
    expected = NearIDModel.from_vision_model(trunk)
    tokens = model.tokens(pixels)
    assert torch.allclose(tokens, expected.tokens(pixels), atol=1e-6)
    # A probe drawn anew is as faint as another, so both start as nearly the same head.
    cosines = F.cosine_similarity(model.pool(tokens), expected.pool(tokens))
    assert cosines.min() > (1 - 1e-6 if family in POOLS_ITSELF else 0.99)


def test_a_fresh_model_is_initialised_whole(family):
    model = NearIDModel(NearIDConfig(vision_config=CONFIGS[family].to_dict()))
    tensors = [*model.parameters(), *model.buffers()]
    assert all(tensor.isfinite().all() and tensor.float().abs().max() < 1e3 for tensor in tensors)
    if family not in POOLS_ITSELF:
        assert torch.equal(model.head.attention.out_proj.weight, torch.eye(32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_casts_the_trunk_alone(family, pixels, tmp_path, dtype):
    model = NearIDModel.from_vision_model(tiny_trunk(family))
    expected = model.get_image_features(pixels)
    model.save_pretrained(tmp_path)
    for half in (NearIDModel.from_pretrained(tmp_path, dtype=dtype), model.cast_trunk(dtype)):
        assert {value.dtype for name, value in half.backbone.named_parameters() if "head." not in name} == {dtype}
        assert {value.dtype for value in half.head.parameters()} == {torch.float32}
        # Rotary frequencies and the like are no weights: rounded, they would turn every position wrongly.
        assert all(value.dtype != dtype for value in half.backbone.buffers())
        embeds = half.get_image_features(pixels)
        assert embeds.dtype == torch.float32 and F.cosine_similarity(embeds, expected).min() > 0.995


def test_only_the_head_is_trained_and_all_of_it(family, pixels):
    model = NearIDModel.from_vision_model(tiny_trunk(family)).freeze_trunk()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    target = torch.randn(32, generator=torch.Generator().manual_seed(2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(3):  # a branch that ends in zeros learns from the second step on
        optimizer.zero_grad()
        (model.get_image_features(pixels) @ target).sum().backward()
        optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    prefix = "backbone.head." if family in POOLS_ITSELF else "pooling_head."
    assert changed == {prefix + name for name in model.head.state_dict()}


def test_default_preprocessing_is_each_familys(family):
    siglip, clip = (0.5,) * 3, (0.48145466, 0.4578275, 0.40821073)
    expected_mean = clip if family == "clip" else (0.485, 0.456, 0.406) if "dino" in family else siglip
    preprocessing = default_preprocessing(CONFIGS[family])
    assert isinstance(preprocessing, Preprocessing) and preprocessing.mean == expected_mean
    assert preprocessing.size == (48 if family == "dinov2" else 32)
    assert preprocessing.resample == ("bilinear" if family in ("naflex", "dinov3") else "bicubic")
