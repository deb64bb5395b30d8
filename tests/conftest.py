"""Fixtures shared by all tests: tiny real models built from config, offline, in a second or two.

The folders are laid out exactly as real checkpoints are, so loading, hooks, LoRA and saving run the true code paths;
only the widths are small and the weights random.
"""

import json
import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"  # before any hub library is imported: no test may reach for the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is: tiny models only lose time waiting for each other

from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import HubServer
from PIL import Image

TINY_IMAGE_SIZE = 32


def checkered(seed: int, size: int = 48) -> Image.Image:
    """A small picture that differs clearly from one seed to the next: 8 x 8 random colour blocks, RGB."""
    blocks = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((size, size), Image.Resampling.NEAREST)


def tiny_tokenizer():
    """A byte-level `CLIPTokenizer` built offline, with `sks` as one token, as the shipped tokenizer has it."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    pieces = [*letters, *(letter + "</w>" for letter in letters), "sk", "sks</w>", "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=[("s", "k"), ("sk", "s</w>")], model_max_length=77)


def tiny_stable_diffusion(vae, scheduler):
    """A `StableDiffusionPipeline` of ~0.3 M parameters around the given VAE and scheduler; pictures are 32 x 32."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = tiny_tokenizer()
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def tiny_pipeline_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flow-matching pipeline with an `AutoencoderTiny` (factor 4), the layout of the shipped one."""
    from diffusers import AutoencoderTiny, DPMSolverMultistepScheduler

    torch.manual_seed(0)
    vae = AutoencoderTiny(
        latent_channels=4,
        encoder_block_out_channels=(16, 16, 16),
        decoder_block_out_channels=(16, 16, 16),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        upsampling_scaling_factor=2,
    )
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, steps_offset=1)
    folder = tmp_path_factory.mktemp("models") / "tiny-pipeline"
    tiny_stable_diffusion(vae, scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_kl_pipeline_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An epsilon-predicting pipeline with an `AutoencoderKL` (factor 4), the layout of Stable Diffusion 1.5."""
    from diffusers import AutoencoderKL, DDIMScheduler

    torch.manual_seed(0)
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
    )
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    folder = tmp_path_factory.mktemp("models") / "tiny-kl-pipeline"
    tiny_stable_diffusion(vae, scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_nearid_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `NearIDModel` checkpoint folder: SigLIP trunk 32 px, patch 8, width 32, two layers."""
    from transformers import SiglipVisionConfig

    from nearid_personalize import NearIDModel
    from nearid_personalize.encoder.model import NearIDConfig

    torch.manual_seed(0)
    vision_config = SiglipVisionConfig(
        image_size=TINY_IMAGE_SIZE,
        patch_size=8,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-nearid"
    NearIDModel(NearIDConfig(vision_config=vision_config, embed_dim=32)).save_pretrained(folder)
    processor = {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": TINY_IMAGE_SIZE, "width": TINY_IMAGE_SIZE},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))
    return folder


@pytest.fixture
def photo_dir(tmp_path: Path) -> Path:
    """A folder of four distinct valid pictures, `photo-0.png` … `photo-3.png`."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(4):
        checkered(seed).save(folder / f"photo-{seed}.png")
    return folder


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A model hub on this machine, empty; processes started with `hub.environment(home)` know no other."""
    with HubServer() as server:
        yield server
