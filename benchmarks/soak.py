"""Many clients of `nearid serve` at once: is an answer lost or mixed up, does memory grow?

Each client asks about a pet of its own, by turns whether a picture shows it (/score) and which of all pets it is
(/search); the answers are known before. For the page see `demo_load.py`.

    python benchmarks/soak.py --clients 20 --requests 5
"""

import argparse
import socket
import statistics
import tempfile
import threading
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
import uvicorn
from PIL import Image

from nearid_personalize import Gallery, IdentityScorer
from nearid_personalize.miniworld import example_references
from nearid_personalize.service.app import Service, create_app
from nearid_personalize.service.subjects import SubjectStore


class Pets:
    """A service that knows a pet of each client, and the answers that it must give. folder: an empty one."""

    def __init__(self, clients: int, folder: Path) -> None:
        scorer = IdentityScorer.from_pretrained("miniworld")
        subjects, gallery = SubjectStore(folder / "subjects"), Gallery.open(folder / "gallery", scorer)
        self.photos = [example_references(number, split="val")[0] for number in range(clients)]
        self.scores = []
        for number, photos in enumerate(self.photos):
            subject = scorer.enroll(photos[:2])
            subjects.save(f"pet-{number}", subject)
            gallery.add(f"pet-{number}", photos[:2])
            self.scores.append(scorer.score(photos, subject).tolist())
        self.found = [gallery.search(photos, None) for photos in self.photos]
        self.service = Service(scorer=scorer, encoder="miniworld", subjects=subjects, gallery=gallery)

    def ask(self, client: httpx.Client, number: int, turn: int) -> bool:
        """One request of a client; whether its answer is right."""
        place = turn % len(self.photos[number])
        files = [("images", (f"{number}-{place}.png", png(self.photos[number][place]), "image/png"))]
        if turn % 2:
            (found,) = post(client, "/search", files)["items"]
            own = self.found[number][place]
            right, score = found["subject"] == own.name, own.score
        else:
            (found,) = post(client, "/score", files, subject=f"pet-{number}")["images"]
            right, score = True, self.scores[number][place]
        return right and found["name"] == f"{number}-{place}.png" and abs(found["score"] - score) < 1e-4


def png(picture: Image.Image) -> bytes:
    """A picture as a file."""
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def post(client: httpx.Client, path: str, files: list, **data: str) -> Any:
    """The answer; where the line is full, after coming again as it asks."""
    answer = client.post(path, data=data, files=files)
    while answer.status_code == 503:
        time.sleep(float(answer.headers["retry-after"]))
        answer = client.post(path, data=data, files=files)
    answer.raise_for_status()
    return answer.json()


def one_round(url: str, pets: Pets, clients: int, requests: int) -> tuple[list[tuple[bool, float]], float]:
    """All clients at once; (right, seconds) of every answer, and the seconds that it took."""
    answers: list[tuple[bool, float]] = []

    def one_client(number: int) -> None:
        with httpx.Client(base_url=url, timeout=600) as client:
            for turn in range(requests):
                started = time.perf_counter()
                right = pets.ask(client, number, turn)
                answers.append((right, time.perf_counter() - started))

    threads = [threading.Thread(target=one_client, args=[number]) for number in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--requests", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    process = psutil.Process()
    with tempfile.TemporaryDirectory() as folder:
        pets = Pets(options.clients, Path(folder))
        listening = socket.create_server(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(create_app(pets.service), log_level="error"))
        serving = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        serving.start()
        try:
            for number in range(options.rounds):
                answers, seconds = one_round(url, pets, options.clients, options.requests)
                took = sorted(one for _, one in answers)
                print(
                    f"round {number + 1}: {len(answers)} of {options.clients * options.requests} answered,"
                    f" {sum(not right for right, _ in answers)} wrong, {seconds:.1f} s; one takes"
                    f" {statistics.median(took):.2f} s (median), {took[-1]:.2f} s (longest);"
                    f" memory {process.memory_info().rss / 1e6:.0f} MB",
                    flush=True,
                )
        finally:
            server.should_exit = True
            serving.join()


if __name__ == "__main__":
    main()
