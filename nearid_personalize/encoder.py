"""NearIDModel: a frozen vision trunk and the attention-pooling head that makes an identity embedding of its tokens.

The layout is the released one (NearID, Cvejic et al., arXiv 2604.01973): the trunk's own multi-head attention pooling
(MAP), read after the post-layernorm and trained further, then L2 normalisation. Importing this module registers
`model_type="nearid"` with transformers' auto classes, so `AutoModel.from_pretrained(folder)` needs no remote code.

Shape letters: N images, T tokens, D width, H and W pixels.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    PretrainedConfig,
    PreTrainedModel,
    SiglipVisionModel,
)
from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead
from transformers.utils import ModelOutput

from nearid_personalize.errors import InputError

DEFAULT_TRUNK = "siglip_vision_model"


class NearIDConfig(PretrainedConfig):
    """A trunk's own configuration and what is made of its tokens.

    vision_config: the trunk's config, or its dict; without a `model_type` it is SigLIP's.
    embed_dim: width of the embedding; the trunk's hidden size, as the MAP head keeps it.
    normalize_embeddings: whether `image_embeds` have unit length.
    """

    model_type = "nearid"
    sub_configs: ClassVar[dict[str, type]] = {"vision_config": AutoConfig}

    vision_config: dict | PretrainedConfig | None = None
    embed_dim: int | None = None
    normalize_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        trunk = self.vision_config
        if not isinstance(trunk, PretrainedConfig):
            fields = dict(trunk or {})
            trunk = CONFIG_MAPPING[fields.pop("model_type", DEFAULT_TRUNK)](**fields)
        self.vision_config = trunk
        if self.embed_dim is None:
            self.embed_dim = trunk.hidden_size
        if self.embed_dim != trunk.hidden_size:
            raise ValueError(
                f"embed_dim {self.embed_dim} differs from the trunk's hidden_size {trunk.hidden_size}: "
                "the pooling head has no projection"
            )
        super().__post_init__(**kwargs)


@dataclass
class NearIDOutput(ModelOutput):
    """image_embeds [N,D] (unit length), pooler_output [N,D] (before normalisation), last_hidden_state [N,T,D]."""

    image_embeds: Tensor | None = None
    pooler_output: Tensor | None = None
    last_hidden_state: Tensor | None = None


class NearIDModel(PreTrainedModel):
    """`backbone` (trunk with its MAP head at `backbone.head`) -> identity embedding.

    Loads both spellings of the released keys: `backbone.vision_model.*` and `backbone.*`. In half precision
    `from_pretrained` keeps the head in float32; embeddings are always normalised in float32.
    """

    config_class = NearIDConfig
    base_model_prefix = "nearid"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: NearIDConfig) -> None:
        super().__init__(config)
        assert isinstance(config.vision_config, PretrainedConfig), "NearIDConfig turns a dict into a config"
        self.backbone = AutoModel.from_config(config.vision_config)
        if not isinstance(self.backbone, SiglipVisionModel) or not self.backbone.use_head:
            raise ValueError(
                f"vision_config of type {config.vision_config.model_type!r} has no attention-pooling head: "
                "give a SigLIP vision trunk with vision_use_head"
            )
        self._keep_in_fp32_modules_strict = ["backbone.head"]
        self.post_init()

    @classmethod
    def from_vision_model(cls, vision_model: SiglipVisionModel) -> "NearIDModel":
        """A float32 copy of a trunk, pooled by its own head: the frozen baseline, and where training starts."""
        model = cls(cls.config_class(vision_config=vision_model.config.to_dict()))
        model.backbone.load_state_dict(vision_model.state_dict())
        return model.float().eval()

    @property
    def head(self) -> SiglipMultiheadAttentionPoolingHead:
        """The attention pooling: tokens [N,T,D] -> [N,D]. All that is trained."""
        return self.backbone.head

    def freeze_trunk(self) -> "NearIDModel":
        """Leave only the head trainable."""
        self.requires_grad_(False)
        self.head.requires_grad_(True)
        return self

    def tokens(self, pixel_values: Tensor) -> Tensor:
        """[N,3,H,W] normalised pixels -> [N,T,D]: the last layer's tokens after the post-layernorm."""
        trunk = self.backbone
        # Part by part rather than `trunk(...)`, which would also run the head, and in the trunk's precision.
        hidden = trunk.embeddings(pixel_values)
        return trunk.post_layernorm(trunk.encoder(inputs_embeds=hidden).last_hidden_state)

    def pool(self, tokens: Tensor) -> Tensor:
        """[N,T,D] tokens of any float type -> [N,D] float32 embeddings of unit length."""
        return self._embed(self._pool_raw(tokens))

    def forward(self, pixel_values: Tensor) -> NearIDOutput:
        """[N,3,H,W] normalised pixels -> embeddings, the pooled vector they come from, and the tokens."""
        tokens = self.tokens(pixel_values)
        pooled = self._pool_raw(tokens)
        return NearIDOutput(
            image_embeds=self._embed(pooled),
            pooler_output=pooled,
            last_hidden_state=tokens,
        )

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """[N,3,H,W] normalised pixels -> [N,D] embeddings of unit length."""
        return self.pool(self.tokens(pixel_values))

    def _pool_raw(self, tokens: Tensor) -> Tensor:
        return attention_pool(self.head, tokens.to(self.head.probe.dtype))

    def _embed(self, pooled: Tensor) -> Tensor:
        return F.normalize(pooled.float(), dim=-1) if self.config.normalize_embeddings else pooled.float()


def attention_pool(head: SiglipMultiheadAttentionPoolingHead, tokens: Tensor) -> Tensor:
    """`head(tokens)`, [N,T,D] -> [N,D], reordered: equal up to rounding, with about D / (2 * heads) times less work.

    There is one query, the probe. So its logits are tokens @ (W_k^T q), and the values' projection commutes with the
    weighted mean over tokens: neither keys nor values are ever formed. (The keys' bias shifts all logits alike.)
    """
    attention = head.attention
    heads, width = attention.num_heads, tokens.shape[-1]
    w_query, w_key, w_value = attention.in_proj_weight.view(3, heads, width // heads, width)  # each [heads,d,D]
    b_query, _, b_value = attention.in_proj_bias.view(3, heads, width // heads)  # each [heads,d]
    query = torch.einsum("hdi,i->hd", w_query, head.probe[0, 0]) + b_query
    key = torch.einsum("hd,hdi->hi", query, w_key) * (width // heads) ** -0.5  # [heads,D]
    weights = (tokens @ key.T).softmax(dim=1)  # [N,T,heads]
    mixed = weights.transpose(1, 2) @ tokens  # [N,heads,D]
    value = torch.einsum("nhi,hdi->nhd", mixed, w_value) + b_value
    pooled = attention.out_proj(value.flatten(1))
    return pooled + head.mlp(head.layernorm(pooled))


AutoConfig.register(NearIDConfig.model_type, NearIDConfig, exist_ok=True)
AutoModel.register(NearIDConfig, NearIDModel, exist_ok=True)


@dataclass(frozen=True)
class Preprocessing:
    """How pictures become pixel values: squashed to size x size pixels, then (x - mean) / std per channel."""

    size: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @classmethod
    def from_folder(cls, folder: str | Path, default_size: int) -> "Preprocessing":
        """Read `preprocessor_config.json`; without the file, or for what it leaves out, SigLIP's values.

        Raises InputError when the file is no JSON.
        """
        path = Path(folder) / "preprocessor_config.json"
        try:
            fields = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except ValueError as error:
            raise InputError(f"{path}: no JSON ({error}); get the file again, or remove it") from None
        size = fields.get("size", default_size)
        return cls(
            size=size["height"] if isinstance(size, dict) else size,
            mean=tuple(fields.get("image_mean", cls.mean)),
            std=tuple(fields.get("image_std", cls.std)),
        )

    def to_json(self) -> str:
        """The content of a `preprocessor_config.json` that transformers' image processors read too."""
        fields = {
            "image_processor_type": "SiglipImageProcessor",
            "do_resize": True,
            "size": {"height": self.size, "width": self.size},
            "resample": 3,  # bicubic
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "do_convert_rgb": True,
        }
        return json.dumps(fields, indent=2) + "\n"


_NEEDED = "config.json and model.safetensors"


def checkpoint_folder(name_or_folder: str | Path) -> Path:
    """The local folder of a checkpoint: a folder itself, or a Hub id, downloaded unless it is in the cache.

    Raises InputError when a folder lacks config.json or model.safetensors, or the Hub id cannot be had.
    """
    folder = Path(name_or_folder)
    if not folder.is_dir():
        if folder.is_absolute() or str(name_or_folder).startswith(".") or str(name_or_folder).count("/") != 1:
            raise InputError(f"{name_or_folder}: no such folder; give a folder with {_NEEDED}, or a Hub id owner/name")
        folder = _download(str(name_or_folder))
    # Large models are split; their index then stands where the one file would.
    needed = {
        "config.json": ["config.json"],
        "model.safetensors": ["model.safetensors", "model.safetensors.index.json"],
    }
    missing = [name for name, files in needed.items() if not any((folder / file).is_file() for file in files)]
    if missing:
        raise InputError(f"{name_or_folder}: lacks {' and '.join(missing)}; a model folder holds {_NEEDED}")
    return folder


def load_encoder(
    name_or_folder: str | Path, dtype: torch.dtype = torch.float32
) -> tuple[NearIDModel, Preprocessing, Path]:
    """A NearID checkpoint, or a SigLIP one under its own pooling head; its preprocessing; its local folder.

    Weights are read from safetensors only and no code comes with them. Raises InputError when the checkpoint cannot
    be found, is of another kind, cannot be read, or leaves weights of the model unset.
    """
    folder = checkpoint_folder(name_or_folder)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"{name_or_folder}: config.json cannot be read ({str(error).splitlines()[0]})") from None
    classes = {"nearid": NearIDModel, "siglip": SiglipVisionModel, "siglip_vision_model": SiglipVisionModel}
    if config.model_type not in classes:
        raise InputError(f"{name_or_folder}: a model of type {config.model_type!r}; give a NearID or SigLIP checkpoint")
    try:
        model, info = classes[config.model_type].from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except SafetensorError as error:
        raise InputError(f"{name_or_folder}: model.safetensors cannot be read ({error}); get the file again") from None
    if info["missing_keys"]:
        # transformers would fill them with random numbers and go on.
        some = sorted(info["missing_keys"])[0]
        raise InputError(f"{name_or_folder}: model.safetensors lacks {len(info['missing_keys'])} weights, {some} first")
    if not isinstance(model, NearIDModel):
        model = NearIDModel.from_vision_model(model)
    return model.eval(), Preprocessing.from_folder(folder, model.config.vision_config.image_size), folder


def _download(repository: str) -> Path:
    try:
        # Weights as safetensors only, and no code: what is not asked for cannot be loaded.
        return Path(snapshot_download(repository, allow_patterns=["*.json", "*.safetensors"]))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        absent = isinstance(error, RepositoryNotFoundError)
        reason = "not on the Hub, or not open to you" if absent else "the Hub cannot be reached"
        raise InputError(
            f"{repository}: {reason}; run `hf download {repository}` where there is a network, or give a folder "
            "(the built-in `miniworld` is only for the toy world)"
        ) from None
