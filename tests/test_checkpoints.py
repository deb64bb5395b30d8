"""Checkpoints on disk, against slow restatements: the released layout by hand, the authors' class in three lines."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from nearid_personalize.encoder.checkpoints import (
    attach_head,
    check_precision,
    export_released_layout,
    head_trunk,
    load_encoder,
    save_head,
    trunk_fingerprint,
)
from nearid_personalize.encoder.model import NearIDModel
from nearid_personalize.encoder.preprocessing import Preprocessing
from nearid_personalize.errors import InputError

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
PREPROCESSING = Preprocessing(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def moved(model):
    """Weights away from the stock 0 and 1, where a key loaded wrongly would not show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def tiny_vision_model(seed=0):
    torch.manual_seed(seed)
    return moved(SiglipVisionModel(SiglipVisionConfig(**SHAPE, image_size=32, patch_size=8)))


def tiny_dino(seed=0):
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return moved(Dinov2Model(Dinov2Config(**shape, image_size=32, patch_size=8)))


@pytest.fixture
def model():
    return NearIDModel.from_vision_model(tiny_vision_model())


@pytest.fixture
def pixels():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# --- the released layout


def released_by_hand(trunk, folder, prefix, dtype=torch.float32, auto_map=True):
    """A folder as the authors' converter writes it, from a bare trunk and nothing of ours."""
    folder.mkdir(exist_ok=True)
    weights = {prefix + name: value.to(dtype).contiguous() for name, value in trunk.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    names = ("image_size", "patch_size", "hidden_act", "layer_norm_eps", *SHAPE)
    config = {
        "model_type": "nearid",
        "architectures": ["NearIDModel"],
        "embed_dim": 32,
        "normalize_embeddings": True,
        "vision_config": {name: getattr(trunk.config, name) for name in names},
    }
    if auto_map:
        config["auto_map"] = {"AutoConfig": "other.NearIDConfig", "AutoModel": "other.NearIDModel"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(PREPROCESSING.to_json())


def authors_embeddings(folder, pixels):
    """What the authors' class makes of a released folder: SigLIP's trunk, its own head, L2 normalisation."""
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "nearid" and config["architectures"] == ["NearIDModel"]
    trunk = SiglipVisionModel(SiglipVisionConfig(**config["vision_config"])).eval()
    weights = {}
    for name, value in load_file(folder / "model.safetensors").items():
        assert name.startswith("backbone.vision_model.")
        weights[name[len("backbone.vision_model.") :]] = value.float()
    trunk.load_state_dict(weights, strict=True)
    pooled = trunk(pixels).pooler_output
    return pooled / pooled.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("auto_map", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("prefix", ["backbone.vision_model.", "backbone."])
@torch.no_grad()
def test_released_checkpoints_load_in_either_spelling(pixels, tmp_path, prefix, dtype, auto_map):
    trunk = tiny_vision_model()
    released_by_hand(trunk, tmp_path, prefix, dtype, auto_map)
    model, preprocessing, _ = load_encoder(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32} and preprocessing == PREPROCESSING
    pooled = trunk.to(dtype).float()(pixels).pooler_output
    expected = pooled / pooled.norm(dim=-1, keepdim=True)
    out = model(pixels)
    assert (out.image_embeds - expected).abs().max() < 1e-5
    assert (out.pooler_output - pooled).abs().max() < 1e-4
    assert (AutoModel.from_pretrained(tmp_path, dtype=torch.float32)(pixels).image_embeds - expected).abs().max() < 1e-5
    # Saved again without the loaded spelling, the keys are the stable ones.
    model.save_pretrained(tmp_path / "again", save_original_format=False)
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == set(model.state_dict())


@torch.no_grad()
def test_what_is_exported_reads_alike_in_the_authors_class_and_in_ours(model, pixels, tmp_path):
    export_released_layout(model, tmp_path / "out", PREPROCESSING)
    expected = model.get_image_features(pixels)
    assert (authors_embeddings(tmp_path / "out", pixels) - expected).abs().max() < 1e-5
    again, preprocessing, _ = load_encoder(tmp_path / "out")
    assert torch.allclose(again.get_image_features(pixels), expected, atol=1e-6) and preprocessing == PREPROCESSING
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["config.json", "model.safetensors", "preprocessor_config.json"]
    # File by file what the authors' converter writes.
    released_by_hand(tiny_vision_model(), tmp_path / "theirs", "backbone.vision_model.", torch.float16, auto_map=False)
    export_released_layout(model, tmp_path / "half", PREPROCESSING, torch.float16)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "theirs"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("half", "theirs"))
    assert ours == theirs


def test_other_trunks_have_no_released_layout(tmp_path):
    with pytest.raises(InputError, match="trunk dinov2: the released layout is for SigLIP"):
        export_released_layout(NearIDModel.from_vision_model(tiny_dino()), tmp_path, PREPROCESSING)
    assert not list(tmp_path.iterdir())


# --- heads alone


def trained(model, seed=3):
    """The model with another head, as if trained."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("make_trunk", [tiny_vision_model, tiny_dino])
@torch.no_grad()
def test_a_head_alone_finds_its_trunk_again(pixels, tmp_path, make_trunk):
    make_trunk().save_pretrained(tmp_path / "trunk")
    model = trained(load_encoder(tmp_path / "trunk")[0])
    save_head(model, tmp_path / "head", str(tmp_path / "trunk"), PREPROCESSING)
    written = load_file(tmp_path / "head" / "head.safetensors")
    assert written.keys() == model.head.state_dict().keys()
    assert head_trunk(tmp_path / "head") == (str(tmp_path / "trunk"), trunk_fingerprint(model))
    config = AutoConfig.from_pretrained(tmp_path / "head")
    assert config.model_type == "nearid" and config.vision_config.model_type == model.config.vision_config.model_type
    again, preprocessing, folder = load_encoder(tmp_path / "head")
    assert preprocessing == PREPROCESSING and folder == tmp_path / "head"
    assert torch.equal(again.get_image_features(pixels), model.get_image_features(pixels))
    half, _, _ = load_encoder(tmp_path / "head", torch.bfloat16)
    assert half.head.probe.dtype == torch.float32
    assert {value.dtype for value in half.trunk_state().values()} == {torch.bfloat16}
    # Moved, the trunk is found where the caller says.
    (tmp_path / "trunk").rename(tmp_path / "elsewhere")
    moved_there, _, _ = load_encoder(tmp_path / "head", trunk=tmp_path / "elsewhere")
    assert torch.equal(moved_there.get_image_features(pixels), model.get_image_features(pixels))
    with pytest.raises(
        InputError, match=r"a head alone, for trunk .*trunk \(fingerprint \w{12}\).*no such folder"
    ) as e:
        load_encoder(tmp_path / "head")
    assert "\n" not in str(e.value)


def test_a_head_on_another_trunk_is_an_error_that_names_both(model, tmp_path):
    save_head(model, tmp_path / "head", "owner/right-trunk", PREPROCESSING)
    tiny_vision_model(seed=1).save_pretrained(tmp_path / "wrong")
    wrong, _, _ = load_encoder(tmp_path / "wrong")
    before = {name: value.clone() for name, value in wrong.state_dict().items()}
    attempts = (
        lambda: attach_head(wrong, tmp_path / "head"),
        lambda: load_encoder(tmp_path / "head", trunk=tmp_path / "wrong"),
    )
    for attach in attempts:
        with pytest.raises(InputError) as refused:
            attach()
        message = str(refused.value)
        assert "\n" not in message and "owner/right-trunk" in message and str(tmp_path / "wrong") in message
        assert trunk_fingerprint(model)[:12] in message and trunk_fingerprint(wrong)[:12] in message
    assert all(torch.equal(value, before[name]) for name, value in wrong.state_dict().items())
    with pytest.raises(InputError, match="has its own; only a head saved alone needs one"):
        load_encoder(tmp_path / "wrong", trunk=tmp_path / "wrong")


def test_fingerprint_is_sha256_of_names_shapes_and_half_precision_values(model):
    slow = hashlib.sha256()
    for name in sorted(name for name in model.backbone.state_dict() if not name.startswith("head.")):
        value = model.backbone.state_dict()[name]
        slow.update(f"{name} {list(value.shape)}\n".encode() + value.half().numpy().tobytes())
    assert trunk_fingerprint(model) == slow.hexdigest()


def test_fingerprint_tells_trunks_apart_and_nothing_else(model, tmp_path):
    fingerprint = trunk_fingerprint(model)
    copies = {"theirs": "backbone.vision_model.", "stable": "backbone."}
    for name, prefix in copies.items():
        released_by_hand(tiny_vision_model(), tmp_path / name, prefix)
    released_by_hand(tiny_vision_model(), tmp_path / "half", "backbone.", torch.float16)
    tiny_vision_model().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    for name in (*copies, "half", "sharded"):
        assert trunk_fingerprint(load_encoder(tmp_path / name)[0]) == fingerprint, name
    assert trunk_fingerprint(load_encoder(tmp_path / "stable", torch.float16)[0]) == fingerprint
    assert trunk_fingerprint(trained(model)) == fingerprint  # the head is no part of it
    with torch.no_grad():
        model.backbone.post_layernorm.bias[0] += 0.01
    assert trunk_fingerprint(model) != fingerprint
    with pytest.raises(InputError, match="bfloat16"):
        trunk_fingerprint(model.cast_trunk(torch.bfloat16))


def test_files_that_are_no_head_are_refused(model, tmp_path):
    with pytest.raises(InputError, match=r"head\.safetensors: no such file"):
        attach_head(model, tmp_path)
    (tmp_path / "head.safetensors").write_text("hello")
    with pytest.raises(InputError, match=r"head\.safetensors: cannot be read"):
        attach_head(model, tmp_path)
    save_file({"probe": torch.zeros(1)}, tmp_path / "head.safetensors")
    with pytest.raises(InputError, match="name no trunk"):
        head_trunk(tmp_path)


# --- trunks, and folders that hold none


@pytest.mark.parametrize(
    ("whole", "config"), [(SiglipModel, SiglipConfig), (Siglip2Model, Siglip2Config), (CLIPModel, CLIPConfig)]
)
def test_the_vision_half_of_a_text_and_image_checkpoint_loads(tmp_path, whole, config, capfd):
    torch.manual_seed(0)
    place = {"num_patches": 16} if config is Siglip2Config else {"image_size": 32}
    text = {**SHAPE, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    both = moved(whole(config(vision_config={**SHAPE, **place, "patch_size": 8}, text_config=text)))
    both.save_pretrained(tmp_path / "both")
    both.vision_model.save_pretrained(tmp_path / "vision")
    trunk = both.vision_model.state_dict()
    capfd.readouterr()
    for name in ("both", "vision"):
        model, preprocessing, folder = load_encoder(tmp_path / name)
        assert model.backbone.state_dict().keys() == trunk.keys()
        assert all(torch.equal(value, trunk[key]) for key, value in model.backbone.state_dict().items())
        assert preprocessing.size == 32 and folder == tmp_path / name
    assert "UNEXPECTED" not in "".join(capfd.readouterr())


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


def test_weights_of_another_precision_than_asked_for_are_refused_with_the_package_and_its_version():
    check_precision("transformers", torch.float16, torch.float16)
    with pytest.raises(
        InputError, match=r"transformers \d+\.\d+\S*: loaded the weights as torch.float32 where torch.bf"
    ):
        check_precision("transformers", torch.float32, torch.bfloat16)
