import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, SiglipVisionConfig, SiglipVisionModel, ViTConfig

from nearid_personalize.encoder.checkpoints import load_encoder
from nearid_personalize.encoder.model import NearIDConfig, NearIDModel
from nearid_personalize.encoder.pooling import attention_pool


def tiny_vision_model(seed=0):
    torch.manual_seed(seed)
    config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    model = SiglipVisionModel(config).eval()
    # The stock initialisation leaves layer norms and biases at 0 and 1, where a key loaded wrongly would not show.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture
def model():
    return NearIDModel.from_vision_model(tiny_vision_model())


@pytest.fixture
def pixels():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def assert_same(again, model, pixels):
    """Equal weights to the bit; results up to rounding, which depends on where a file's weights lie in memory."""
    expected = model.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())
    assert torch.allclose(again(pixels).image_embeds, model(pixels).image_embeds, atol=1e-6)


@torch.no_grad()
def test_starts_as_the_trunks_own_pooling(model, pixels):
    trunk = tiny_vision_model()(pixels)
    out = model(pixels)
    assert torch.allclose(out.last_hidden_state, trunk.last_hidden_state, atol=1e-6)
    assert torch.allclose(out.pooler_output, trunk.pooler_output, atol=1e-6)
    assert torch.allclose(
        out.image_embeds,
        torch.nn.functional.normalize(trunk.pooler_output, dim=-1),
        atol=1e-6,
    )
    assert out.last_hidden_state.shape == (3, 16, 32)


@torch.no_grad()
def test_every_way_to_the_embedding_agrees_and_has_unit_length(model, pixels):
    expected = model(pixels).image_embeds
    assert torch.equal(model.get_image_features(pixels), expected)
    assert torch.equal(model.pool(model.tokens(pixels)), expected)
    assert torch.allclose(expected.norm(dim=-1), torch.ones(3))


def test_attention_pool_is_the_stock_head_values_and_gradients(model):
    tokens = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(2), requires_grad=True)
    gradients = []
    for pooled in (model.head(tokens), attention_pool(model.head, tokens)):
        inputs = [tokens, *model.head.parameters()]
        gradients.append((pooled.detach(), *torch.autograd.grad(pooled.square().sum(), inputs)))
    for stock, ours in zip(*gradients, strict=True):
        assert torch.allclose(stock, ours, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_unnormalised_embeddings_when_the_config_says_so(pixels):
    config = NearIDConfig(vision_config=tiny_vision_model().config.to_dict(), normalize_embeddings=False)
    out = NearIDModel(config).eval()(pixels)
    assert torch.equal(out.image_embeds, out.pooler_output)


def test_is_a_copy_of_the_trunk(model, pixels):
    trunk = tiny_vision_model()
    copy = NearIDModel.from_vision_model(trunk)
    with torch.no_grad():
        trunk.head.probe.zero_()
    assert copy.head.probe.abs().sum() > 0


def test_copy_of_a_half_precision_trunk_is_float32():
    copy = NearIDModel.from_vision_model(tiny_vision_model().half())
    assert {parameter.dtype for parameter in copy.parameters()} == {torch.float32}


@torch.no_grad()
def test_round_trip(model, pixels, tmp_path):
    model.save_pretrained(tmp_path)
    again, info = NearIDModel.from_pretrained(tmp_path, use_safetensors=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same(again, model, pixels)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "nearid" and config["architectures"] == ["NearIDModel"]
    assert config["embed_dim"] == 32 and config["vision_config"]["model_type"] == "siglip_vision_model"


@torch.no_grad()
def test_auto_classes_need_no_remote_code(model, pixels, tmp_path):
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), NearIDConfig)
    again = AutoModel.from_pretrained(tmp_path)
    assert isinstance(again, NearIDModel)
    assert_same(again, model, pixels)


@torch.no_grad()
def test_half_precision_keeps_the_head_and_the_result_in_float32(model, pixels, tmp_path):
    model.save_pretrained(tmp_path)
    half = NearIDModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.backbone.post_layernorm.weight.dtype == torch.bfloat16
    assert half.head.probe.dtype == half.head.mlp.fc1.weight.dtype == torch.float32
    embeds = half.get_image_features(pixels)
    assert embeds.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(embeds, model.get_image_features(pixels)).min() > 0.999


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_attention_implementation_reaches_the_trunk(model, pixels, tmp_path, implementation):
    model.save_pretrained(tmp_path)
    again = NearIDModel.from_pretrained(tmp_path, attn_implementation=implementation)
    assert again.backbone.config._attn_implementation == implementation
    assert torch.allclose(again(pixels).image_embeds, model(pixels).image_embeds, atol=1e-5)


def test_a_fresh_model_has_no_uninitialised_weights():
    config = NearIDConfig(vision_config=tiny_vision_model().config.to_dict())
    assert all(parameter.isfinite().all() for parameter in NearIDModel(config).parameters())


def test_freezing_leaves_only_the_head(model, pixels):
    model.freeze_trunk()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith("backbone.head.")}
    model.get_image_features(pixels).sum().backward()
    assert model.head.probe.grad is not None and model.backbone.post_layernorm.weight.grad is None


def test_gradients_reach_the_pixels(model, pixels):
    pixels.requires_grad_()
    (model.get_image_features(pixels)[0] @ torch.ones(32)).backward()
    assert pixels.grad[0].abs().sum() > 0 and pixels.grad[1].abs().sum() == 0


@torch.no_grad()
def test_each_picture_is_embedded_alone(model, pixels):
    one_by_one = torch.cat([model.get_image_features(p[None]) for p in pixels])
    assert torch.allclose(one_by_one, model.get_image_features(pixels), atol=1e-6)


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="embed_dim 7"):
        NearIDConfig(vision_config=tiny_vision_model().config.to_dict(), embed_dim=7)
    for unknown in ({"model_type": "vit"}, {"model_type": "nonsense"}, ViTConfig()):
        with pytest.raises(ValueError, match=r"'(vit|nonsense)'; one of siglip_vision_model, .*dinov3_vit works"):
            NearIDConfig(vision_config=unknown)


def test_a_reset_head_is_random_and_the_trunk_stays(tiny_nearid_dir):
    model, _, _ = load_encoder(tiny_nearid_dir)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(1)
    first = {name: value.clone() for name, value in model.reset_head().state_dict().items()}
    torch.manual_seed(1)
    again = model.reset_head().state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    changed = {name for name in before if not torch.equal(before[name], first[name])}
    assert "backbone.head.probe" in changed and all(name.startswith("backbone.head.") for name in changed)
