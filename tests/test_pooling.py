import torch
import torch.nn.functional as F
from transformers import Siglip2VisionConfig, SiglipVisionConfig
from transformers.models.siglip2.modeling_siglip2 import Siglip2MultiheadAttentionPoolingHead

from nearid_personalize.encoder.pooling import MeanPoolingHead, SiglipMultiheadAttentionPoolingHead, attention_pool

SHAPE = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}


def mean_head():
    torch.manual_seed(0)
    head = MeanPoolingHead(64, 4)
    with torch.no_grad():
        head.reset()
    return head


def tokens_of(num_pictures, seed=0):
    """Layer-normed tokens as a trunk gives them: a mean all share, an identity per picture, and much noise."""
    generator = torch.Generator().manual_seed(seed)
    shared = 2 * torch.randn(64, generator=generator)
    identity = 0.5 * torch.randn(num_pictures, 1, 64, generator=generator)
    views = identity + torch.randn(num_pictures, 2 * 16, 64, generator=generator)
    return F.layer_norm(shared + views, (64,)).view(num_pictures, 2, 16, 64)


def test_attention_pool_is_either_stock_head():
    torch.manual_seed(0)
    tokens = torch.randn(3, 16, 64)
    heads = SiglipMultiheadAttentionPoolingHead, Siglip2MultiheadAttentionPoolingHead
    for kind, config in zip(heads, (SiglipVisionConfig(**SHAPE), Siglip2VisionConfig(**SHAPE)), strict=True):
        head = kind(config)
        torch.nn.init.normal_(head.attention.in_proj_bias)  # starts at 0, where a bias forgotten would not show
        assert torch.allclose(attention_pool(head, tokens), head(tokens), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_untrained_head_gives_the_mean_token():
    head, tokens = mean_head(), tokens_of(8).flatten(0, 1)
    pooled = attention_pool(head, tokens)
    assert F.cosine_similarity(pooled, tokens.mean(dim=1)).min() > 0.9999
    assert torch.allclose(pooled, tokens.mean(dim=1), atol=0.1)


@torch.no_grad()
def test_an_untrained_head_keeps_the_tokens_likeness_and_a_random_one_does_not():
    """Cosines between pictures, against those between their mean tokens."""
    tokens = tokens_of(32).flatten(0, 1)

    def distortion(head):
        pooled, means = (F.normalize(rows, dim=-1) for rows in (attention_pool(head, tokens), tokens.mean(dim=1)))
        return float((pooled @ pooled.T - means @ means.T).abs().mean())

    random = []
    for seed in range(5):
        torch.manual_seed(seed)
        random.append(distortion(SiglipMultiheadAttentionPoolingHead(SiglipVisionConfig(**SHAPE))))
    assert distortion(mean_head()) < 0.1 * min(random)
