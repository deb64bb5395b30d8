"""Train the mini-world's SigLIP-style backbone on captions: `accelerate launch trainers/miniworld/train_backbone.py`.

Contrast with terse captions ("a photo of a red dog with a hat in space"), such as the web's, entangles the subject
with its context, as it does in CLIP and SigLIP: the pooled embedding must carry where a picture was taken and needs
little of who is in it. What the patch tokens know comes from a caption decoder that reads them and writes the full
caption (CoCa, Yu et al., arXiv 2205.01917); the decoder is thrown away afterwards.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from captions import MAX_LENGTH, load_tokenizer, tokenize, training_caption
from loop import LoopOptions, rng_of, train
from pictures import Pictures
from torch import nn
from torch.nn import functional as F
from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel, SiglipTextConfig, SiglipVisionConfig

from nearid_personalize.miniworld.dataset import picture
from nearid_personalize.miniworld.subjects import caption


@dataclass(frozen=True)
class BackboneOptions(LoopOptions):
    """Options of the backbone's training."""

    state: Path = Path("runs/backbone")
    steps: int = 2300
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.05
    ema: float = 0.99
    save_every: int = 250
    pictures: Path = Path("runs/pictures_wide")
    terse_drop: float = 0.7
    """Probability of leaving an attribute out of the captions that are contrasted."""
    tokenizer: Path = Path("runs/pipeline/tokenizer")
    output: Path = Path("runs/siglip")


def build(vocab_size: int, end_token: int) -> SiglipModel:
    """A SigLIP of 2.9 M parameters: 64 px, patch 8, width 192, five layers; a two-layer text tower."""
    vision = SiglipVisionConfig(
        image_size=64,
        patch_size=8,
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=5,
        num_attention_heads=6,
    )
    text = SiglipTextConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        projection_size=192,
        bos_token_id=end_token - 1,
        eos_token_id=end_token,
        pad_token_id=end_token,
    )
    return SiglipModel(SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict()))


class Captioner(nn.Module):
    """The SigLIP model and, for training alone, a caption decoder on its patch tokens."""

    def __init__(self, siglip: SiglipModel) -> None:
        super().__init__()
        self.siglip = siglip
        width = siglip.config.vision_config.hidden_size
        self.words = nn.Embedding(siglip.config.text_config.vocab_size, width)
        nn.init.normal_(self.words.weight, std=0.02)  # tied to the output layer: logits must start small
        self.positions = nn.Parameter(torch.randn(MAX_LENGTH, width) * 0.02)
        layer = nn.TransformerDecoderLayer(width, 6, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2, nn.LayerNorm(width))

    def forward(self, pixels: torch.Tensor, terse: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
        """Contrast of pictures `[B,3,64,64]` and terse captions `[B,L]` plus next-word loss of full ones `[B,L]`."""
        output = self.siglip(input_ids=terse, pixel_values=pixels)
        image, text = (F.normalize(x.float(), dim=-1) for x in (output.image_embeds, output.text_embeds))
        logits = image @ text.T * self.siglip.logit_scale.exp().clamp(max=100)
        labels = torch.arange(len(logits), device=logits.device)
        contrast = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        tokens = output.vision_model_output.last_hidden_state  # [B,64,D]
        inputs, targets = full[:, :-1], full[:, 1:].clone()
        end = self.siglip.config.text_config.eos_token_id
        targets[inputs == end] = -100  # padding repeats the end token: only its first occurrence counts
        length = inputs.shape[1]
        causal = torch.full((length, length), -torch.inf, device=full.device).triu(1)
        hidden = self.decoder(self.words(inputs) + self.positions[:length], tokens, tgt_mask=causal)
        words = hidden @ self.words.weight.T  # [B,L-1,vocabulary]
        return contrast + F.cross_entropy(words.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)


def retrieval_check(tokenizer: object) -> Callable[[nn.Module, int], str]:
    """Reports how often a held-out picture finds its own caption among 256."""
    held_out = [picture("val", i, wide=True) for i in range(256)]
    pixels = torch.from_numpy(np.stack([p.rendering.image for p in held_out])).permute(0, 3, 1, 2) / 127.5 - 1
    ids = tokenize(tokenizer, [caption(p.pet, p.context) for p in held_out])  # type: ignore[arg-type]

    def check(model: nn.Module, step: int) -> str:
        device = next(model.parameters()).device
        output = model.siglip(input_ids=ids.to(device), pixel_values=pixels.to(device))
        best = output.logits_per_image.argmax(1).cpu()
        return f"caption retrieval among 256 held-out: {(best == torch.arange(256)).float().mean():.3f}"

    return check


def main(options: BackboneOptions) -> None:
    """Train on pictures of training subjects in wide views."""
    torch.manual_seed(options.seed)
    pictures = Pictures(options.pictures)
    tokenizer = load_tokenizer(options.tokenizer)
    model = build(len(tokenizer), tokenizer.eos_token_id)
    model.logit_scale.data.fill_(2.66)  # temperature .07

    def loss_of(model: nn.Module, step: int) -> torch.Tensor:
        device = next(model.parameters()).device
        numbers, _ = rng_of(options, step, device)
        indices = np.sort(numbers.integers(0, len(pictures), options.batch_size))
        terse, full = (
            tokenize(tokenizer, [training_caption(int(i), step, drop, 0.0, 0.0) for i in indices]).to(device)
            for drop in (options.terse_drop, 0.0)
        )
        return model(pictures.pixels(indices, device), terse, full)

    def export(model: nn.Module) -> None:
        model.siglip.save_pretrained(options.output)
        tokenizer.save_pretrained(options.output)
        SiglipImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(options.output)

    train(Captioner(model), loss_of, options, export, retrieval_check(tokenizer))


if __name__ == "__main__":
    main(tyro.cli(BackboneOptions))
