"""A node for a real ComfyUI, to try the pack by hand without any model: the mini-world's pipeline as a sampler.

Link this file into `custom_nodes`, beside the pack; CONTRIBUTING.md has the commands.
"""

import functools

import numpy as np
import torch
from comfy_api.latest import ComfyExtension, io
from diffusers import DiffusionPipeline

from nearid_personalize.lora.files import load_lora
from nearid_personalize.names import packaged


@functools.lru_cache(maxsize=1)
def pipeline(lora: str) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(packaged("miniworld", "pipeline"))
    pipe.set_progress_bar_config(disable=True)
    if lora:
        load_lora(pipe, lora)
    return pipe


class ToySampler(io.ComfyNode):
    """Text and seed -> pictures of the toy world."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ToySampler",
            display_name="Toy sampler",
            category="NearID/testing",
            inputs=[
                io.String.Input("prompt", default="a photo of sks dog in space"),
                io.String.Input("lora", default=""),
                io.Int.Input("seed", default=0, min=0, max=2**31, control_after_generate=True),
                io.Int.Input("batch", default=4, min=1, max=64),
                io.Int.Input("steps", default=20, min=1, max=100),
            ],
            outputs=[io.Image.Output("images", display_name="images")],
        )

    @classmethod
    def execute(cls, prompt: str, lora: str, seed: int, batch: int, steps: int) -> io.NodeOutput:
        generators = [torch.Generator().manual_seed(seed * 1000 + place) for place in range(batch)]
        pipe = pipeline(lora)
        drawn = pipe([prompt] * batch, generator=generators, num_inference_steps=steps, guidance_scale=3.0).images
        return io.NodeOutput(torch.from_numpy(np.stack([np.asarray(image) for image in drawn])).float() / 255)


class ToyExtension(ComfyExtension):
    """The one node."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [ToySampler]


async def comfy_entrypoint() -> ComfyExtension:
    return ToyExtension()
