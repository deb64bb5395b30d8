"""Draw again, from the next seed, until enough pictures are accepted.

Two nodes make the loop: what lies between them (sampler, decoder, ...) is drawn again. ComfyUI knows no loop, but lets
a node hand back a graph in its place: the second node hands back a copy of everything between the two, with the next
seed, and the copy of itself at its end.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from comfy_api.latest import io
from torch import Tensor

from nearid_personalize.floors.base import Floor

from .gate_nodes import strictness_inputs, verdicts_on
from .wires import CATEGORY, EnrolledSubject, FloorsWire, LoadedModel, NearID, SubjectWire, lines, picked, to_pictures

Node: TypeAlias = dict[str, Any]
"""As in ComfyUI's API format: class_type, and inputs: values, or links [node id, place of its output]."""

Flow, State = io.Custom("NEARID_FLOW"), io.Custom("NEARID_STATE")


@dataclass(frozen=True, eq=False)
class RerollState:
    """What the rounds before found: accepted pictures [N,H,W,C] in the order drawn, None for none, and their lines."""

    accepted: Tensor | None = None
    rounds: int = 0
    report: str = ""


class RerollSeed(io.ComfyNode):
    """Where the loop begins."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NearIDRerollSeed",
            display_name="Re-roll: seed",
            category=CATEGORY,
            description="Connect the seed to your sampler, and the flow to Re-roll until accepted.",
            inputs=[
                io.Int.Input("start", default=0, min=0, max=2**63, control_after_generate=True),
                io.Int.Input("rounds", default=0, min=0, max=10**6, optional=True, tooltip="The loop's own"),
            ],
            outputs=[
                Flow.Output("flow", display_name="flow"),
                io.Int.Output("seed", display_name="seed", tooltip="start, then start + 1, ..."),
            ],
        )

    @classmethod
    def execute(cls, start: int, rounds: int = 0) -> io.NodeOutput:
        return io.NodeOutput(None, start + rounds)


class RerollUntilAccepted(io.ComfyNode):
    """Where the loop ends."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NearIDReroll",
            display_name="Re-roll until accepted",
            category=CATEGORY,
            description="Draws again from the next seed until enough pictures are accepted.",
            inputs=[
                Flow.Input("flow", extra_dict={"rawLink": True}),
                NearID.Input("nearid"),
                SubjectWire.Input("subject"),
                io.Image.Input("images"),
                FloorsWire.Input("floors", optional=True),
                *strictness_inputs(),
                io.Int.Input("wanted", default=1, min=1, max=1024, tooltip="Accepted pictures"),
                io.Int.Input("max_rounds", default=8, min=1, max=1000, tooltip="Times that the sampler runs at most"),
                State.Input("state", optional=True, tooltip="Used by the loop itself; leave it unconnected"),
            ],
            outputs=[
                io.Image.Output("accepted", display_name="accepted"),
                io.Int.Output("num_accepted", display_name="num_accepted"),
                io.Int.Output("rounds", display_name="rounds"),
                io.String.Output("report", display_name="report"),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            enable_expand=True,
        )

    @classmethod
    def execute(
        cls,
        flow: list,
        nearid: LoadedModel,
        subject: EnrolledSubject,
        images: Tensor,
        strictness: str,
        false_accept_rate: float,
        wanted: int,
        max_rounds: int,
        floors: Sequence[Floor] | None = None,
        state: RerollState | None = None,
    ) -> io.NodeOutput:
        verdicts = verdicts_on(nearid, subject, to_pictures(images), strictness, false_accept_rate, floors)
        so_far = after_round(state or RerollState(), images, verdicts)
        found = 0 if so_far.accepted is None else len(so_far.accepted)
        if found >= wanted or so_far.rounds >= max_rounds:
            kept = [] if so_far.accepted is None else so_far.accepted
            return io.NodeOutput(picked(kept, range(min(found, wanted))), found, so_far.rounds, so_far.report)
        prompt, end = cls.hidden.dynprompt, cls.hidden.unique_id
        copies = next_round(prompt.get_node, prompt.get_display_node_id, flow[0], end, so_far)
        again = name_in_round(end, so_far.rounds, prompt.get_display_node_id(end))
        return io.NodeOutput(*([again, place] for place in range(4)), expand=copies)


def after_round(before: RerollState, images: Tensor, verdicts: Sequence[Any]) -> RerollState:
    """What is known once a round's pictures have their verdicts."""
    new = [images[[verdict.index for verdict in verdicts if verdict.accepted]]]
    kept = torch.cat(new if before.accepted is None else [before.accepted, *new])
    return RerollState(
        accepted=kept if len(kept) else None,
        rounds=before.rounds + 1,
        report=f"{before.report}round {before.rounds + 1}\n{lines(verdicts)}\n",
    )


def next_round(
    node_of: Callable[[str], Node], name_of: Callable[[str], str], start: str, end: str, state: RerollState
) -> dict[str, Node]:
    """The nodes of the next round by their new ids: copies of all from `start` to `end`, with the next seed.

    node_of: id -> node. name_of: id -> the id that the user sees.
    """
    inside = nodes_between(node_of, start, end)
    new = {node: name_in_round(end, state.rounds, name_of(node)) for node in inside}
    copies = {}
    for node in inside:
        inputs = {}
        for name, value in node_of(node)["inputs"].items():
            inputs[name] = [new[value[0]], value[1]] if is_link(value) and value[0] in new else value
        copies[new[node]] = {
            "class_type": node_of(node)["class_type"],
            "inputs": inputs,
            "override_display_id": name_of(node),
        }
    copies[new[start]]["inputs"]["rounds"] = state.rounds
    copies[new[end]]["inputs"]["state"] = state
    return copies


def name_in_round(end: str, rounds: int, node: str) -> str:
    """The id of a node's copy: no other round, and no other loop, has it."""
    return f"{end}.{rounds}.{node}"


def nodes_between(node_of: Callable[[str], Node], start: str, end: str) -> list[str]:
    """The nodes on any path from `start` to `end`, both included; `end` comes last."""
    leads: dict[str, bool] = {start: True}

    def comes_from_start(node: str) -> bool:
        if node not in leads:
            sources = {value[0] for value in node_of(node)["inputs"].values() if is_link(value)}
            found = [comes_from_start(source) for source in sorted(sources)]  # all are visited, not up to the first
            leads[node] = any(found)
        return leads[node]

    comes_from_start(end)
    return [node for node, inside in leads.items() if inside]


def is_link(value: Any) -> bool:
    """Whether an input is a link to another node's output."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)
