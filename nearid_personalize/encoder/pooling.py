"""Attention pooling (MAP): one learned query, the probe, reads a picture's tokens into one vector.

The head is SigLIP's own module, so that released weights fit. Letters: N images, T tokens, D width.
"""

import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig
from transformers import initialization as init
from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead


class MeanPoolingHead(SiglipMultiheadAttentionPoolingHead):
    """A head for trunks that have none: laid out as SigLIP's, starting as the mean token.

    width: D, of the trunk's tokens. num_heads: the trunk's; divides `width`. The MLP is 4 D wide.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__(
            SiglipVisionConfig(hidden_size=width, intermediate_size=4 * width, num_attention_heads=num_heads)
        )

    def reset(self) -> None:
        """Start anew; through `initialization`, which leaves alone what was loaded from a file."""
        # The mean token, whatever the seed: a faint probe attends to all tokens alike, values and output are the
        # identity, the MLP ends in zeros. Every weight gets a gradient within two steps
        attention, width = self.attention, self.probe.shape[-1]
        query_and_key = nn.init.xavier_uniform_(torch.empty(2 * width, width))
        init.normal_(self.probe, std=0.02)
        init.copy_(attention.in_proj_weight, torch.cat([query_and_key, torch.eye(width)]))
        init.zeros_(attention.in_proj_bias)
        init.eye_(attention.out_proj.weight)
        init.zeros_(attention.out_proj.bias)
        init.xavier_uniform_(self.mlp.fc1.weight)
        for tensor in (self.mlp.fc1.bias, self.mlp.fc2.weight, self.mlp.fc2.bias):
            init.zeros_(tensor)


def attention_pool(head: SiglipMultiheadAttentionPoolingHead, tokens: Tensor) -> Tensor:
    """`head(tokens)`, [N,T,D] -> [N,D], reordered: equal up to rounding, with about D / (2 * heads) times less work.

    With one query, logits are tokens @ (W_k^T q), and the values' projection commutes with the weighted mean over
    tokens: keys and values are never formed. The keys' bias shifts all logits alike.
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
