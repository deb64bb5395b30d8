"""NearID nodes for ComfyUI: keep the pictures that show your subject. Put or link this folder into `custom_nodes`."""

from comfy_api.latest import ComfyExtension, io

from .gallery_nodes import AddToGallery, WhoIsIt
from .gate_nodes import DriftMap, Floors, Gate, Rank, Verify
from .reroll import RerollSeed, RerollUntilAccepted
from .subject_nodes import EnrollSubject, LoadFolder, LoadNearID, LoadSubject

NODES = [
    LoadNearID,
    EnrollSubject,
    LoadSubject,
    LoadFolder,
    Gate,
    Rank,
    Floors,
    DriftMap,
    Verify,
    AddToGallery,
    WhoIsIt,
    RerollSeed,
    RerollUntilAccepted,
]


class NearIDExtension(ComfyExtension):
    """What ComfyUI asks for its nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> ComfyExtension:
    return NearIDExtension()
