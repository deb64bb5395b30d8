"""What embedding in bulk costs: `python benchmarks/bulk.py`.

overhead: the same tars of mini-world pictures by the local engine and by Ray with one worker; the encoder is the
mini-world's, so small that the engine's own work shows. memory: the peak of a process that embeds a thousand pictures
and of one that embeds more, each in a process of its own. Ray's workers run at this process's priority: by default Ray
gives them a lower one, and whatever else runs on the machine would be measured.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import tyro
from PIL import Image

from nearid_personalize.miniworld import photos, sample_pet


@dataclass(frozen=True)
class Options:
    """What is measured."""

    num_pictures: tuple[int, ...] = (500, 2500)
    """Pictures of the runs that compare the engines; two numbers tell Ray's start from its rate. May be none."""
    memory: tuple[int, ...] = (1_000, 10_000)
    """Pictures of each run whose memory is measured."""
    per_tar: int = 250
    """Pictures in a tar."""


RUN = """
import json, resource, sys, time
from nearid_personalize.bulk import EncoderOptions, embed_pictures
source, out, engine = sys.argv[1:]
started, cpu = time.perf_counter(), time.process_time()
encoder = EncoderOptions(model="miniworld")
encoder.load()
loaded = time.perf_counter()
result = embed_pictures(source, out, encoder, engine=engine)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"seconds": time.perf_counter() - loaded, "peak_mb": peak, "pictures": result.pictures,
                  "cpu": time.process_time() - cpu}))
"""


def distinct_pictures(count: int = 100) -> list[bytes]:
    """Files of a few pictures; what is in them does not matter here."""
    files = []
    for number in range(count):
        buffer = io.BytesIO()
        Image.fromarray(photos(sample_pet("test", number), 1)[0][0].image).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return files


def write_tars(folder: Path, count: int, per_tar: int, files: list[bytes]) -> None:
    """`count` pictures in tars."""
    folder.mkdir(parents=True)
    for start in range(0, count, per_tar):
        with tarfile.open(folder / f"{start // per_tar:05}.tar", "w") as tar:
            for number in range(start, min(start + per_tar, count)):
                content = files[number % len(files)]
                member = tarfile.TarInfo(f"{number}.png")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def run(source: Path, out: Path, engine: str) -> dict:
    """One run in a process of its own."""
    command = [sys.executable, "-c", RUN, str(source), str(out), engine]
    environment = {**os.environ, "RAY_worker_niceness": "0"}
    found = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(found.stdout.splitlines()[-1])


def main(options: Options) -> None:
    """Print what each run cost."""
    files = distinct_pictures()
    with TemporaryDirectory() as place:
        root = Path(place)
        for count in options.num_pictures:
            write_tars(root / f"tars-{count}", count, options.per_tar, files)
        for engine in ("local", "ray", "local", "ray"):
            for count in options.num_pictures:
                result = run(root / f"tars-{count}", root / f"{engine}-{time.time_ns()}", engine)
                print(f"{engine:5} {count} pictures in {result['seconds']:.1f} s", flush=True)
        for count in options.memory:
            write_tars(root / f"memory-{count}", count, options.per_tar, files)
            result = run(root / f"memory-{count}", root / f"out-{count}", "local")
            rate = result["pictures"] / result["cpu"]
            print(f"local {count} pictures: peak {result['peak_mb']:.0f} MB, {rate:.0f} per core second", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=f"{Path(__file__).name}: see its docstring"))
