"""NearIDModel: a frozen vision trunk, and an attention-pooling head that makes an identity embedding of its tokens.

SigLIP trunks have the released layout (NearID, Cvejic et al., arXiv 2604.01973): their own attention pooling, trained
further, then L2 normalisation. Other trunks get a head beside them. Importing this module registers
`model_type="nearid"` with transformers' auto classes.

Letters: N images, T tokens, D width, H and W pixels.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead
from transformers.utils import ModelOutput

from nearid_personalize.encoder.pooling import MeanPoolingHead, attention_pool
from nearid_personalize.encoder.trunks import (
    TRUNK_TYPES,
    has_class_token,
    read_tokens,
)

DEFAULT_TRUNK = "siglip_vision_model"


class NearIDConfig(PretrainedConfig):
    """A trunk's own configuration, and what is made of its tokens.

    vision_config: the trunk's config or its dict, one of `trunks.TRUNK_TYPES`; without a `model_type` SigLIP's.
    embed_dim: width of the embedding. normalize_embeddings: whether `image_embeds` have unit length.
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
            trunk = CONFIG_MAPPING[_known(fields.pop("model_type", DEFAULT_TRUNK))](**fields)
        _known(trunk.model_type)
        self.vision_config = trunk
        if self.embed_dim is None:
            self.embed_dim = trunk.hidden_size
        if self.embed_dim != trunk.hidden_size:
            raise ValueError(
                f"embed_dim {self.embed_dim} differs from the trunk's hidden_size {trunk.hidden_size}: "
                "the pooling head has no projection"
            )
        super().__post_init__(**kwargs)


def _known(trunk_type: str) -> str:
    if trunk_type not in TRUNK_TYPES:
        raise ValueError(f"vision_config of type {trunk_type!r}; one of {', '.join(TRUNK_TYPES)} works")
    return trunk_type


@dataclass
class NearIDOutput(ModelOutput):
    """image_embeds [N,D] (unit length), pooler_output [N,D] (before normalisation), last_hidden_state [N,T,D]."""

    image_embeds: Tensor | None = None
    pooler_output: Tensor | None = None
    last_hidden_state: Tensor | None = None


class NearIDModel(PreTrainedModel):
    """`backbone`, the trunk, and its head -> identity embedding, normalised in float32.

    The head is `backbone.head` where the trunk has one, else a `MeanPoolingHead` at `pooling_head`; float32 in
    `from_pretrained`. Loads both released spellings of keys: `backbone.vision_model.*` and `backbone.*`.
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
        trunk = config.vision_config
        assert isinstance(trunk, PretrainedConfig), "NearIDConfig turns a dict into a config"
        self.backbone = AutoModel.from_config(trunk)
        if not hasattr(self.backbone, "head"):
            self.pooling_head = MeanPoolingHead(trunk.hidden_size, trunk.num_attention_heads)
        self._keep_in_fp32_modules_strict = ["backbone.head", "pooling_head"]
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MeanPoolingHead):
            module.reset()

    @classmethod
    def from_vision_model(cls, vision_model: PreTrainedModel) -> "NearIDModel":
        """A float32 copy of a trunk: the frozen baseline (see `frozen_pool`), and where training starts."""
        model = cls(cls.config_class(vision_config=vision_model.config.to_dict()))
        model.backbone.load_state_dict(vision_model.state_dict())
        model.name_or_path = vision_model.name_or_path
        return model.float().eval()

    @property
    def head(self) -> SiglipMultiheadAttentionPoolingHead:
        """The attention pooling: tokens [N,T,D] -> [N,D]. All that is trained."""
        return self.backbone.head if hasattr(self.backbone, "head") else self.pooling_head

    def reset_head(self) -> "NearIDModel":
        """Give the head random weights from torch's generator, the trunk's own head included."""
        # A head that starts as its trunk's own has to forget first; a random one got further (docs/LOG.md)
        if isinstance(self.head, MeanPoolingHead):
            self.head.reset()
        else:
            self.backbone.head = type(self.head)(self.config.vision_config).to(self.device)
        return self

    def trunk_state(self) -> dict[str, Tensor]:
        """The trunk's tensors by name, the head's left out."""
        return {name: value for name, value in self.backbone.state_dict().items() if not name.startswith("head.")}

    def freeze_trunk(self) -> "NearIDModel":
        """Leave only the head trainable."""
        self.requires_grad_(False)
        self.head.requires_grad_(True)
        return self

    def cast_trunk(self, dtype: torch.dtype) -> "NearIDModel":
        """Hold the trunk's parameters in `dtype`, the head in float32."""
        # Buffers stay as they are: DINOv3's rotary frequencies, rounded, would turn every position wrongly
        for parameter in self.backbone.parameters():
            parameter.data = parameter.data.to(dtype)
        self.head.float()
        return self

    def tokens(self, pixel_values: Tensor) -> Tensor:
        """[N,3,H,W] normalised pixels -> [N,T,D]: the last layer's tokens after the final norm, see `trunks`."""
        return read_tokens(self.backbone, pixel_values)

    def pool(self, tokens: Tensor) -> Tensor:
        """[N,T,D] tokens of any float type -> [N,D] float32 embeddings of unit length."""
        return self._embed(self._pool_raw(tokens))

    def frozen_pool(self, tokens: Tensor) -> Tensor:
        """[N,T,D] -> [N,D] float32, unit length: the trunk's own pooled output, the baseline of a trained head.

        The class token where there is one (CLIP, DINO). SigLIP's is its head's: no baseline once that is trained.
        """
        return self._embed(tokens[:, 0]) if has_class_token(self.config.vision_config) else self.pool(tokens)

    def mean_pool(self, tokens: Tensor) -> Tensor:
        """[N,T,D] -> [N,D] float32, unit length: the mean patch token, as in the paper's DreamBench++ column."""
        first_patch = 1 if has_class_token(self.config.vision_config) else 0
        return self._embed(tokens[:, first_patch:].float().mean(dim=1))

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


AutoConfig.register(NearIDConfig.model_type, NearIDConfig, exist_ok=True)


AutoModel.register(NearIDConfig, NearIDModel, exist_ok=True)
