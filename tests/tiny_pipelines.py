"""One real diffusers pipeline per model family, built from config with random weights: a picture in no time.

Each builder returns the pipeline and the arguments of a call that makes one 32-pixel picture; the test adds the steps.
Families whose text encoder is a language model get prompt embeddings and no text encoder.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from conftest import checkered, tiny_stable_diffusion, tiny_tokenizer

SIZE = 32
Built = tuple[Any, dict[str, Any]]


def kl_vae(latent_channels: int = 4, **config: Any) -> Any:
    """`AutoencoderKL` of factor 4 (`[3,32,32]` to `[latent_channels,8,8]`)."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(**vae_config(latent_channels), **config)


def vae_config(latent_channels: int) -> dict[str, Any]:
    return {
        "latent_channels": latent_channels,
        "block_out_channels": (8, 8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }


def tiny_vae() -> Any:
    """`AutoencoderTiny` of factor 4 and four channels, for previews."""
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )


def clip(width: int = 32, projection: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = tiny_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5(width: int = 32) -> Built:
    """T5 encoder and tokenizer."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((chr(97 + i), -2.0) for i in range(26))]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0)
    config = T5Config(vocab_size=64, d_model=width, d_ff=2 * width, d_kv=8, num_layers=2, num_heads=4)
    return T5EncoderModel(config).eval(), tokenizer


def sd() -> Built:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    return tiny_stable_diffusion(kl_vae(), scheduler), {"prompt": "sks dog"}


def sd_v_prediction() -> Built:
    """Stable Diffusion 2: the network predicts v."""
    from diffusers import DDIMScheduler

    pipe, arguments = sd()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    return pipe, arguments


def sd_img2img() -> Built:
    pipe, arguments = from_a_picture("StableDiffusionImg2ImgPipeline", *sd())
    return pipe, {**arguments, "strength": 0.8}


def sd_inpaint() -> Built:
    """The inpainting pipeline on an ordinary UNet of four channels, which blends latents in its loop."""
    return from_a_picture("StableDiffusionInpaintPipeline", *sd())


def sd_inpaint_9() -> Built:
    """The inpainting pipeline on a UNet that is shown the mask and the masked picture."""
    from diffusers import UNet2DConditionModel

    pipe, arguments = sd_inpaint()
    pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config, in_channels=9)
    return pipe, arguments


def from_a_picture(name: str, pipe: Any, arguments: dict[str, Any]) -> Built:
    """The pipeline of this class, made of another's parts, and a picture to start from; its left half is masked."""
    import diffusers
    from PIL import Image

    kind = getattr(diffusers, name)
    known = inspect.signature(kind.__init__).parameters
    parts = {part: module for part, module in pipe.components.items() if part in known}
    options = {"requires_safety_checker": False} if "requires_safety_checker" in known else {}
    picture = {"image": checkered(1, SIZE), "strength": 0.9}
    if "mask_image" in inspect.signature(kind.__call__).parameters:
        picture["mask_image"] = Image.new("L", (SIZE, SIZE))
        picture["mask_image"].paste(255, (0, 0, SIZE // 2, SIZE))
    if "height" in inspect.signature(kind.__call__).parameters:
        picture |= {"height": SIZE, "width": SIZE}
    return kind(**parts, **options), {**arguments, **picture}


def sdxl_img2img() -> Built:
    return from_a_picture("StableDiffusionXLImg2ImgPipeline", *sdxl())


def sdxl_inpaint() -> Built:
    return from_a_picture("StableDiffusionXLInpaintPipeline", *sdxl())


def flux_img2img() -> Built:
    return from_a_picture("FluxImg2ImgPipeline", *flux())


def flux_inpaint() -> Built:
    return from_a_picture("FluxInpaintPipeline", *flux())


def qwen_img2img() -> Built:
    return from_a_picture("QwenImageImg2ImgPipeline", *qwen())


def qwen_inpaint() -> Built:
    return from_a_picture("QwenImageInpaintPipeline", *qwen())


def sdxl(second_width: int = 32) -> Built:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=48 + second_width,
        cross_attention_dim=32 + second_width,
        norm_num_groups=8,
    )
    pipe = StableDiffusionXLPipeline(
        vae=kl_vae(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 0.5, 1.5]),
        text_encoder=clip(),
        text_encoder_2=clip(second_width, projection=True),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"),
    )
    return pipe, {"prompt": "sks dog"}


def sd3(second_width: int = 32) -> Built:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32 + second_width,
        out_channels=4,
    )
    text_encoder_3, tokenizer_3 = t5()
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(projection=True),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=clip(second_width, projection=True),
        tokenizer_2=tiny_tokenizer(),
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )
    return pipe, {"prompt": "sks dog", "height": SIZE, "width": SIZE, "max_sequence_length": 16}


def flux(guidance_embeds: bool = True) -> Built:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    )
    text_encoder_2, tokenizer_2 = t5()
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=kl_vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )
    # As many text tokens as the batch of four has rows, and as many image tokens as two such batches: 4 x 2 patches
    return pipe, {"prompt": "sks dog", "height": SIZE, "width": SIZE // 2, "max_sequence_length": 4}


def flux2() -> Built:
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel

    vae = AutoencoderKLFlux2(**vae_config(4))
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 4, 4),
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = Flux2Pipeline(scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None, transformer=transformer)
    return pipe, {"prompt_embeds": embeddings(), "height": SIZE, "width": SIZE // 2}


def qwen() -> Built:
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.0, 2.0, 0.5, 1.5],
    )
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = QwenImagePipeline(scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None, transformer=transformer)
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    return pipe, {"prompt_embeds": embeddings(), "prompt_embeds_mask": mask, "height": SIZE, "width": SIZE // 2}


def z_image() -> Built:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[4, 4, 8],
        axes_lens=[64, 32, 32],
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    vae = kl_vae(shift_factor=0.1)
    pipe = ZImagePipeline(scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None, transformer=transformer)
    return pipe, {"prompt_embeds": list(embeddings()), "height": SIZE, "width": SIZE, "guidance_scale": 0.0}


def embeddings(seed: int = 0) -> torch.Tensor:
    """Prompt embeddings `[1,5,32]`."""
    return torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(seed))


BUILDERS: dict[str, Callable[..., Built]] = {
    builder.__name__: builder
    for builder in (
        sd,
        sd_v_prediction,
        sd_img2img,
        sd_inpaint,
        sd_inpaint_9,
        sdxl,
        sdxl_img2img,
        sdxl_inpaint,
        sd3,
        flux,
        flux_img2img,
        flux_inpaint,
        flux2,
        qwen,
        qwen_img2img,
        qwen_inpaint,
        z_image,
    )
}


def build(family: str, **options: Any) -> Built:
    """The pipeline and arguments of one family, with the same random weights every time."""
    torch.manual_seed(0)
    pipe, arguments = BUILDERS[family](**options)
    pipe.set_progress_bar_config(disable=True)
    return pipe, arguments
