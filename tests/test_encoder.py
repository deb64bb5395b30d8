import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.clip import CLIPVisionConfig

from nearid_personalize.encoder import NearIDConfig, NearIDModel, Preprocessing, attention_pool, load_encoder
from nearid_personalize.errors import InputError


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


def released_layout(model, folder, prefix):
    """A folder as the released checkpoint spells it: no model_type in vision_config, an auto_map, one prefix."""
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    renamed = {prefix + name.removeprefix("backbone."): value.half() for name, value in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["vision_config"]["model_type"]
    config["auto_map"] = {
        "AutoConfig": "other.NearIDConfig",
        "AutoModel": "other.NearIDModel",
    }
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("prefix", ["backbone.vision_model.", "backbone."])
@torch.no_grad()
def test_released_spellings_load_with_nothing_missing(model, pixels, tmp_path, prefix):
    released_layout(model, tmp_path, prefix)
    again, info = NearIDModel.from_pretrained(
        tmp_path, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert again.dtype == torch.float32
    assert torch.allclose(again(pixels).image_embeds, model(pixels).image_embeds, atol=5e-3)
    # Saved again without the loaded spelling, the keys are the stable ones.
    again.save_pretrained(tmp_path / "again", save_original_format=False)
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == set(model.state_dict())


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
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    with pytest.raises(ValueError, match="no attention-pooling head"):
        NearIDModel(NearIDConfig(vision_config={**small, "vision_use_head": False}))
    with pytest.raises(ValueError, match="clip_vision_model"):
        NearIDModel(NearIDConfig(vision_config=CLIPVisionConfig(**small)))


def test_preprocessing_reads_what_it_and_transformers_write(tmp_path):
    written = Preprocessing(48, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    (tmp_path / "preprocessor_config.json").write_text(written.to_json())
    assert Preprocessing.from_folder(tmp_path, default_size=7) == written
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    processor.save_pretrained(tmp_path / "again")
    assert Preprocessing.from_folder(tmp_path / "again", default_size=7) == written


def test_preprocessing_defaults_to_siglips(tmp_path):
    assert Preprocessing.from_folder(tmp_path, default_size=384) == Preprocessing(384, (0.5,) * 3, (0.5,) * 3)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(InputError, match=r"preprocessor_config\.json: no JSON"):
        Preprocessing.from_folder(tmp_path, default_size=384)


def test_trunks_of_either_siglip_layout_load(tmp_path):
    torch.manual_seed(0)
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision = tiny_vision_model().config.to_dict()
    both = SiglipModel(SiglipConfig(vision_config=vision, text_config={**text, "vocab_size": 64}))
    both.save_pretrained(tmp_path / "both")
    both.vision_model.save_pretrained(tmp_path / "vision")
    expected = NearIDModel.from_vision_model(both.vision_model).state_dict()
    for name in ("both", "vision"):
        model, preprocessing, folder = load_encoder(tmp_path / name)
        assert model.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
        assert preprocessing == Preprocessing(32) and folder == tmp_path / name


def test_folders_without_a_model_are_refused(model, tmp_path):
    with pytest.raises(InputError, match=r"missing: no such folder"):
        load_encoder(tmp_path / "missing")
    with pytest.raises(InputError, match=r"lacks config\.json and model\.safetensors"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match=r"lacks model\.safetensors"):
        load_encoder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="'bert'"):
        load_encoder(tmp_path)
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        load_encoder(tmp_path)


def test_damaged_weights_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    # Cloned: what safetensors loads is the file itself, mapped into memory, and the file is cut short next.
    whole, weights = path.read_bytes(), {name: value.clone() for name, value in load_file(path).items()}
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read"):
        load_encoder(tmp_path)
    del weights["backbone.head.probe"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 weights, backbone\.head\.probe"):
        load_encoder(tmp_path)


def test_unreachable_hub_says_how_to_get_the_model():
    with pytest.raises(InputError, match=r"hf download nobody/nothing.*miniworld.*toy world") as refused:
        load_encoder("nobody/nothing")
    assert "\n" not in str(refused.value)
