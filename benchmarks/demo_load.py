"""Many clients of the page at once: is an answer lost or mixed up, does memory grow, is the device freed?

Each client compares photos of its own pet, and draws candidates from seeds of its own; the answers are known before.
Then the same again, for the memory; then a client begins a long training and leaves.

    python benchmarks/demo_load.py --clients 20 --requests 5
"""

import argparse
import socket
import statistics
import tempfile
import threading
import time
from pathlib import Path

import psutil
from gradio_client import Client, handle_file

from nearid_personalize import IdentityScorer
from nearid_personalize.commands.options import Demo
from nearid_personalize.demo.server import serve
from nearid_personalize.miniworld import example_references


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def pet_files(folder: Path, number: int) -> list[Path]:
    """Four photos of a client's pet."""
    paths = [folder / f"{number}-{place}.png" for place in range(4)]
    for path, photo in zip(paths, example_references(number, split="val", category="dog")[0]):
        photo.save(path)
    return paths


def one_client(url: str, number: int, requests: int, files: list[Path], expected: float, answers: list) -> None:
    """Ask; every third time for pictures, else for a comparison."""
    client = Client(url, verbose=False)
    photos = [handle_file(path) for path in files]
    for turn in range(requests):
        started = time.perf_counter()
        if turn % 3 == 2:
            seed = 1000 * number + turn
            report, *_ = client.predict(
                photos, "in space", "dog", None, "miniworld", 1, 2, "strict", seed, 4, api_name="/generate"
            )
            right = {c["seed"] for c in report["candidates"]} == {seed, seed + 1}
        else:
            told, _ = client.predict(photos[:2], photos[2:], api_name="/compare")
            right = abs(told["score"] - expected) < 1e-4
        answers.append((right, time.perf_counter() - started))


def one_round(url: str, options: argparse.Namespace, folder: Path, scorer: IdentityScorer) -> tuple[list, float]:
    """All clients at once; (right, seconds) of every answer, and the seconds that it took."""
    answers: list[tuple[bool, float]] = []
    threads = []
    for number in range(options.clients):
        files = pet_files(folder, number)
        subject = scorer.enroll(files[:2])
        expected = float(scorer.score(files[2:], subject).mean())
        threads.append(
            threading.Thread(target=one_client, args=[url, number, options.requests, files, expected, answers])
        )
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers, time.perf_counter() - started


def seconds_to_free(url: str, folder: Path) -> float:
    """From when a client that trains leaves until the device works for the next."""
    photos = [handle_file(path) for path in pet_files(folder, 0)]
    leaving, next_one = Client(url, verbose=False), Client(url, verbose=False)
    job = leaving.submit(photos, "dog", "miniworld", 5000, 0, api_name="/train")
    while not any(told.get("step", 0) > 1 for told, _ in job.outputs()):
        time.sleep(0.1)
    left = time.perf_counter()
    job.cancel()
    following = next_one.submit(
        photos, "in space", "dog", None, "miniworld", 1, 1, "strict", 0, 1, api_name="/generate"
    )
    while not any(told.get("status") in ("drawing", "done") for told, *_ in following.outputs()):
        time.sleep(0.02)
    return time.perf_counter() - left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--requests", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    server = serve(Demo(port=free_port(), lora_steps=3, steps=4), block=False)
    scorer, process = IdentityScorer.from_pretrained("miniworld"), psutil.Process()
    try:
        with tempfile.TemporaryDirectory() as folder:
            for number in range(options.rounds):
                answers, seconds = one_round(server.url, options, Path(folder), scorer)
                took = sorted(t for _, t in answers)
                print(
                    f"round {number + 1}: {len(answers)} of {options.clients * options.requests} answered,"
                    f" {sum(not right for right, _ in answers)} wrong, {seconds:.0f} s; one takes"
                    f" {statistics.median(took):.1f} s (median), {took[-1]:.1f} s (longest);"
                    f" memory {process.memory_info().rss / 1e6:.0f} MB,"
                    f" folders left {sum(1 for _ in (server.root / 'visitors').iterdir())}",
                    flush=True,
                )
            print(f"device free {seconds_to_free(server.url, Path(folder)):.2f} s after its client left", flush=True)
    finally:
        server.close()


if __name__ == "__main__":
    main()
