"""`nearid serve`: its endpoints, who is let in, and what it does under load."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO

import pytest
from conftest import checkered
from fastapi.testclient import TestClient
from PIL import Image

from nearid_personalize import Gallery, IdentityScorer, cli
from nearid_personalize.commands.options import Serve
from nearid_personalize.commands.serve import listen, token_of
from nearid_personalize.errors import InputError
from nearid_personalize.miniworld import example_references
from nearid_personalize.service.app import Limits, Service, create_app
from nearid_personalize.service.subjects import SubjectStore
from nearid_personalize.verification import verify


@pytest.fixture(scope="module")
def scorer() -> IdentityScorer:
    return IdentityScorer.from_pretrained("miniworld")


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    return example_references(0)[0]


@pytest.fixture(scope="module")
def others() -> list[Image.Image]:
    return example_references(1)[0]


@pytest.fixture
def service(scorer, tmp_path) -> Service:
    return Service(scorer=scorer, encoder="miniworld", subjects=SubjectStore(tmp_path / "subjects"))


@pytest.fixture
def client(service) -> TestClient:
    return TestClient(create_app(service))


def png(picture: Image.Image) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def uploads(field: str, pictures) -> list:
    return [(field, (f"{place}.png", png(picture), "image/png")) for place, picture in enumerate(pictures)]


def test_what_is_enrolled_can_be_asked_for(client, scorer, photos, others):
    told = client.post("/enroll", data={"name": "rex"}, files=uploads("photos", photos)).json()
    subject = scorer.enroll(photos)
    assert told["photos"] == len(photos) and told["threshold"] == pytest.approx(subject.threshold)
    assert told["photo_scores"] == pytest.approx(subject.reference_scores.tolist(), abs=1e-5)
    assert client.get("/subjects").json() == {"subjects": ["rex"]}
    answer = client.post("/score", data={"subject": "rex"}, files=uploads("images", [others[0], photos[1]])).json()
    assert [image["name"] for image in answer["images"]] == ["0.png", "1.png"]
    assert [image["accepted"] for image in answer["images"]] == [False, True] and answer["accepted"] == 1
    expected = scorer.score([others[0], photos[1]], subject).tolist()
    assert [image["score"] for image in answer["images"]] == pytest.approx(expected, abs=1e-5)
    assert answer["images"][0]["reason"].startswith("score") and answer["images"][1]["reason"] == ""
    assert client.delete("/subjects/rex").json() == {"removed": True}
    assert client.delete("/subjects/rex").json() == {"removed": False}
    gone = client.post("/score", data={"subject": "rex"}, files=uploads("images", photos[:1]))
    assert gone.status_code == 422 and "not enrolled" in gone.json()["detail"]


def test_a_subject_outlives_the_service(service, photos, others):
    TestClient(create_app(service)).post("/enroll", data={"name": "rex"}, files=uploads("photos", photos))
    later = TestClient(create_app(replace(service)))
    assert later.post("/score", data={"subject": "rex"}, files=uploads("images", others)).json()["accepted"] == 0


def test_references_stand_for_a_subject_and_rates_move_the_threshold(client, scorer, photos, others):
    files = uploads("references", photos) + uploads("images", others)
    subject = scorer.enroll(photos)
    thresholds = []
    for asked in ({"strictness": "lenient"}, {"strictness": "strict"}, {"false_accept_rate": "0.2"}):
        thresholds.append(client.post("/score", data=asked, files=files).json()["threshold"])
    assert thresholds == pytest.approx([subject.at(rate).threshold for rate in (0.1, 0.01, 0.2)])


def test_verify_answers_as_the_library_does(client, scorer, photos, others):
    files = uploads("references", photos[:3]) + uploads("images", [others[0], photos[3]])
    answer = client.post("/verify", data={"false_accept_rate": "0.05"}, files=files).json()["items"]
    expected = verify(scorer, scorer.enroll(photos[:3]), [[others[0]], [photos[3]]], 0.05, 0.05)
    assert [item["name"] for item in answer] == ["0.png", "1.png"]
    for item, own in zip(answer, expected, strict=True):
        assert item["verdict"] == own.verdict and item["score"] == pytest.approx(own.score, abs=1e-5)
        assert item["false_accept_rate"] == pytest.approx(own.false_accept_rate)
    (together,) = client.post("/verify", data={"one_item": "true"}, files=files).json()["items"]
    assert together["name"] == "1.png"  # the nearer of the two


@pytest.fixture(scope="module")
def gallery(scorer, tmp_path_factory) -> Gallery:
    """Three pets."""
    found = Gallery.open(tmp_path_factory.mktemp("gallery") / "pets", scorer)
    for number in range(3):
        found.add(f"pet {number}", example_references(number)[0][:3], shelf=number)
    return found


def test_search_answers_as_the_gallery_does(service, gallery, photos, others):
    client = TestClient(create_app(replace(service, gallery=gallery)))
    asked = [others[3], checkered(0, 64), photos[3]]
    answer = client.post("/search", data={"limit": "2"}, files=uploads("images", asked)).json()
    expected = gallery.search(asked, None, limit=2)
    assert [item["name"] for item in answer["items"]] == ["0.png", "1.png", "2.png"]
    assert [item["subject"] for item in answer["items"]] == ["pet 1", None, "pet 0"]
    assert answer["subjects"] == 3 and answer["threshold"] == pytest.approx(expected[0].threshold)
    assert answer["false_accept_rate"] == expected[0].rule.rate
    for item, own in zip(answer["items"], expected, strict=True):
        assert [match["subject"] for match in item["matches"]] == [match.name for match in own.matches]
        assert item["score"] == pytest.approx(own.score, abs=1e-5)
        assert item["false_accept_rate"] == pytest.approx(own.false_accept_rate)
    assert answer["items"][0]["matches"][0]["metadata"] == {"shelf": 1}
    both = [photos[3], photos[2]]
    asked = {"one_item": "true", "false_accept_rate": "0.9"}
    (together,) = client.post("/search", data=asked, files=uploads("images", both)).json()["items"]
    (own,) = gallery.search([both], 0.9)
    assert together["name"] == "0.png" and together["subject"] == own.name == "pet 0"
    assert together["score"] == pytest.approx(own.score, abs=1e-5)


def test_search_refuses_in_a_sentence(service, client, gallery, photos):
    absent = client.post("/search", files=uploads("images", photos[:1]))
    assert absent.status_code == 422 and "nearid serve --gallery" in absent.json()["detail"]
    searching = TestClient(create_app(replace(service, gallery=gallery)))
    for asked, fault in (({"false_accept_rate": "0.0001"}, "--negatives"), ({"limit": "0"}, "greater than or equal")):
        refused = searching.post("/search", data=asked, files=uploads("images", photos[:1]))
        assert refused.status_code == 422 and fault in json.dumps(refused.json())


def test_the_service_opens_no_gallery_that_is_not_there(capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", "--model", "miniworld", "--port", "0", "--gallery", str(tmp_path / "none")])
    assert ended.value.code == 2 and "no such folder" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("data", "files", "fault"),
    [
        ({}, uploads("images", [checkered(0)]), "give subject"),
        ({"subject": "no one"}, uploads("images", [checkered(0)]), "name 'no one'"),
        ({"subject": "../x"}, uploads("images", [checkered(0)]), "letters, digits"),
        ({"subject": "rex"}, uploads("images", [checkered(0)]), "not enrolled"),
        ({"subject": "rex"}, uploads("references", [checkered(0)]) + uploads("images", [checkered(0)]), "one of the"),
        ({}, [*uploads("references", [checkered(0)]), ("images", ("../a b.png", b"x", "image/png"))], "a_b.png: not a"),
        ({}, uploads("references", [checkered(0)]) + uploads("images", [checkered(0, 400)]), "at most 100,000"),
        ({}, uploads("references", [checkered(0)]) + uploads("images", [checkered(0)] * 5), "6 pictures are too many"),
        ({"strictness": "very"}, uploads("images", [checkered(0)]), "'strict', 'balanced' or 'lenient'"),
        ({"false_accept_rate": "2"}, uploads("images", [checkered(0)]), "less than 1"),
        ({"false_accept_rate": "1e-9"}, uploads("references", [checkered(0)]) + uploads("images", [checkered(0)]), "e"),
        ({"subject": "rex"}, None, "Field required"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_in_a_sentence(service, data, files, fault):
    small = replace(service, limits=Limits(max_images=5, max_pixels=100_000))
    answer = TestClient(create_app(small)).post("/score", data=data, files=files)
    assert answer.status_code == 422 and fault in json.dumps(answer.json(), ensure_ascii=False)


def test_a_damaged_subject_file_is_the_answer_not_a_crash(client, service, photos):
    client.post("/enroll", data={"name": "rex"}, files=uploads("photos", photos))
    (service.subjects.folder / "rex.safetensors").write_bytes(b"x" * 50)
    answer = client.post("/score", data={"subject": "rex"}, files=uploads("images", photos))
    assert answer.status_code == 422 and "not a saved subject" in answer.json()["detail"]


def test_a_token_is_asked_for_before_the_body_is_read(service, photos):
    client = TestClient(create_app(service, token="secret"))
    assert client.get("/health").json() == {"status": "ok", "model": "miniworld"}
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}, {"Authorization": "é"}):
        encoded = {name: value.encode("latin-1") for name, value in headers.items()}
        answer = client.post("/enroll", data={"name": "rex"}, files=uploads("photos", photos), headers=encoded)
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert client.get("/openapi.json", headers=encoded).status_code == 401
    known = {"Authorization": "bearer secret"}
    assert client.post("/enroll", data={"name": "a"}, files=uploads("photos", photos), headers=known).status_code == 200


@pytest.mark.parametrize("told", [True, False])
def test_a_request_that_is_too_large_is_refused_whether_or_not_it_says_so(service, told):
    client = TestClient(create_app(replace(service, limits=Limits(max_bytes=1000))))
    body = (b"x" * 600 for _ in range(2))
    headers = {"Content-Type": "multipart/form-data; boundary=b"} | ({"Content-Length": "1200"} if told else {})
    answer = client.post("/score", content=body, headers=headers)
    assert answer.status_code == 413 and "at most 0.001 MB" in answer.json()["detail"]


def test_a_full_line_is_told_to_come_back(service, photos):
    service = replace(service, limits=Limits(max_waiting=0))
    client = TestClient(create_app(service))
    with service.turns.place():
        busy = client.post("/enroll", data={"name": "rex"}, files=uploads("photos", photos))
    assert busy.status_code == 503 and busy.headers["retry-after"] == "1"
    assert client.post("/enroll", data={"name": "rex"}, files=uploads("photos", photos)).status_code == 200


def test_openapi_describes_every_endpoint_and_no_page_loads_from_elsewhere(client):
    told = client.get("/openapi.json").json()
    assert set(told["paths"]) == {"/health", "/enroll", "/subjects", "/subjects/{name}", "/score", "/verify", "/search"}
    for path in told["paths"].values():
        assert all(endpoint["description"] for endpoint in path.values())
    assert "HTTPBearer" in told["components"]["securitySchemes"]
    assert client.get("/docs").status_code == client.get("/redoc").status_code == 404


def test_twenty_callers_at_once_lose_and_mix_nothing(client, scorer, photos, others):
    """Twenty callers with five requests each, every one with a picture of its own."""
    client.post("/enroll", data={"name": "rex"}, files=uploads("photos", photos))
    subject = scorer.enroll(photos)
    pictures = [checkered(seed, 64) for seed in range(100)]
    expected = scorer.score(pictures, subject).tolist()
    together = threading.Barrier(20)

    def ask(caller: int) -> list[float]:
        together.wait()
        found = []
        for place in range(caller * 5, caller * 5 + 5):
            files = [("images", (f"{place}.png", png(pictures[place]), "image/png"))]
            (answer,) = client.post("/score", data={"subject": "rex"}, files=files).json()["images"]
            assert answer["name"] == f"{place}.png"
            found.append(answer["score"])
        return found

    with ThreadPoolExecutor(20) as pool:
        answers = [score for scores in pool.map(ask, range(20)) for score in scores]
    assert answers == pytest.approx(expected, abs=1e-4)


def test_the_command_refuses_what_is_unsafe_or_taken(capsys):
    with pytest.raises(InputError, match="--token"):
        token_of(Serve(host="0.0.0.0"))
    assert token_of(Serve(host="0.0.0.0", token="x")) == "x" and token_of(Serve()) is None
    with listen(Serve(port=0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as ended:
            cli.main(["serve", "--model", "miniworld", "--port", str(port)])
    assert ended.value.code == 2 and f"--port {port}" in capsys.readouterr().err
    with pytest.raises(InputError, match="--max-images 0"):
        Serve(max_images=0)
