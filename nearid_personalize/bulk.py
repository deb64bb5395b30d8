"""Embeddings of millions of pictures, in shards: on one machine, or on a cluster with Ray Data.

A source is cut into parts, and each part becomes one shard, written whole. A run that was stopped goes on with the
parts that have no shard yet, so nothing is in there twice and nothing is missing.

Shape letters: N pictures, D width.
"""

import hashlib
import io
import json
import logging
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from nearid_personalize.errors import InputError
from nearid_personalize.files import check_writable, write_atomically
from nearid_personalize.hub import download, is_hub_id
from nearid_personalize.images import IMAGE_SUFFIXES, is_mask
from nearid_personalize.scorer.content import content_hash, encoder_fingerprint, same_encoder, square_of
from nearid_personalize.scorer.scorer import DECODING_THREADS, IdentityScorer

if TYPE_CHECKING:
    import pyarrow as pa

Engine: TypeAlias = Literal["local", "ray"]
Batch: TypeAlias = dict[str, np.ndarray]
"""Columns of equal length, as Ray Data, `datasets.map` and a test hand them over."""
Record: TypeAlias = tuple[str, bytes]
"""A picture: what to call it, and its file."""

PART_FILES = 1000
"""Pictures of a folder that make a part."""

_ABOUT = b"nearid_embeddings"  # the key of what a shard says of itself, in its schema's metadata


@dataclass(frozen=True, kw_only=True)
class EncoderOptions:
    """Which encoder embeds; plain values, so that they travel to other machines."""

    model: str
    trunk: str | None = None
    device: str = "cpu"
    batch_size: int = 64

    def load(self) -> IdentityScorer:
        """The encoder."""
        scorer = IdentityScorer.from_pretrained(self.model, self.device, trunk=self.trunk)
        scorer.batch_size = self.batch_size
        return scorer


class Embedder:
    """Embeds batches of pictures: {"id", "bytes"} -> {"id", "embedding", "hash", "error"}, all of length N.

    embedding: float32 [N,D], zeros where error says why there is none.
    """

    def __init__(self, encoder: EncoderOptions) -> None:
        self.encoder = encoder

    @cached_property
    def scorer(self) -> IdentityScorer:
        """Loaded where the work is done, when it begins."""
        return self.encoder.load()

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(DECODING_THREADS)

    def __call__(self, batch: Batch) -> Batch:
        """Embed a batch."""
        decoded = list(self._threads.map(partial(_decoded, self.scorer), batch["bytes"]))
        squares = [square for square in decoded if isinstance(square, Tensor)]
        embedded = iter(self.scorer.embed(torch.stack(squares))) if squares else iter(())
        embeddings, hashes, errors = [], [], []
        nothing = np.zeros(self.scorer.model.config.embed_dim, np.float32)
        for square in decoded:
            if isinstance(square, Tensor):
                embeddings.append(next(embedded).numpy())
                hashes.append(content_hash(square))
                errors.append("")
            else:
                embeddings.append(nothing)
                hashes.append("")
                errors.append(square)
        return {
            "id": as_objects(batch["id"]),
            "embedding": np.stack(embeddings),
            "hash": as_objects(hashes),
            "error": as_objects(errors),
        }


def _decoded(scorer: IdentityScorer, content: bytes) -> Tensor | str:
    """uint8 [3,S,S], or why there is none."""
    try:
        return square_of(scorer, content)
    except InputError as error:
        return str(error)


# --- sources ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of a source: files of a folder, a tar, or a parquet file."""

    kind: Literal["files", "tar", "parquet"]
    root: str
    """A folder or URI that paths start at."""
    paths: tuple[str, ...]
    column: str | None = None
    """Of parquet: where the pictures are. None: the first that holds any."""

    @property
    def name(self) -> str:
        """Of its shard: hex digits, the same for the same part."""
        return hashlib.sha256(json.dumps([self.kind, self.root, *self.paths]).encode()).hexdigest()[:24]

    def records(self) -> Iterator[Record | tuple[str, InputError]]:
        """Its pictures; in the place of a file that cannot be read, why."""
        filesystem, root = filesystem_of(self.root)
        readers: dict[str, Callable[..., Iterator[Record | tuple[str, InputError]]]] = {
            "files": _files,
            "tar": _tar,
            "parquet": partial(_parquet, self.column),
        }
        read = readers[self.kind]
        for path in self.paths:
            yield from read(filesystem, f"{root}/{path}", path)


def _files(filesystem: Any, path: str, name: str) -> Iterator[Record | tuple[str, InputError]]:
    try:
        with filesystem.open_input_stream(path) as file:
            yield name, file.read()
    except OSError as error:
        yield name, InputError(f"{name}: {error.strerror or error}")


def _tar(filesystem: Any, path: str, name: str) -> Iterator[Record | tuple[str, InputError]]:
    """WebDataset: the pictures of a tar, whose other members are passed over."""
    try:
        with filesystem.open_input_stream(path) as stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
            for member in tar:
                if not member.isfile() or not is_picture(member.name):
                    continue
                content = tar.extractfile(member)
                assert content is not None, "a regular file has content"
                yield f"{name}/{member.name}", content.read()
    except (OSError, EOFError, tarfile.TarError) as error:
        yield name, InputError(f"{name}: not a tar that can be read to its end ({error})")


def _parquet(column: str | None, filesystem: Any, path: str, name: str) -> Iterator[Record | tuple[str, InputError]]:
    """The pictures of a column of files' bytes, or of {"bytes", "path"} as `datasets` writes them."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(filesystem.open_input_file(path)) as file:
            chosen = column or picture_column(file.schema_arrow)
            if chosen is None or chosen not in file.schema_arrow.names:
                raise InputError(f"{name}: no column of pictures; give --column, one of {file.schema_arrow.names}")
            ids = "id" if "id" in file.schema_arrow.names else None
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=[chosen, *([ids] if ids else [])]):
                for values in batch.to_pylist():
                    content = values[chosen]
                    content = content.get("bytes") if isinstance(content, dict) else content
                    called = str(values[ids]) if ids else f"{name}#{number}"
                    number += 1
                    yield (called, content) if content else (called, InputError(f"{called}: no picture in this row"))
    except (OSError, pa.ArrowException) as error:
        yield name, InputError(f"{name}: not a parquet file that can be read ({error})")


def picture_column(schema: "pa.Schema") -> str | None:
    """The first column that can hold pictures."""
    import pyarrow as pa

    for column in schema:
        kind = column.type
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            return column.name
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            return column.name
    return None


def is_picture(name: str) -> bool:
    """Whether a file is a picture by its name, and no mask of one."""
    path = Path(name)
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and not is_mask(path)


def parts_of(source: str, column: str | None = None, done: Iterable[str] = ()) -> Iterator[Part]:
    """The parts of a source: a folder of pictures (searched to its depth), of parquet files or of tars, one such file,
    a URI of these, or a Hub data set.

    done: ids of pictures of a folder that need no more work. Raises InputError where there is nothing to embed.
    """
    if not Path(source).exists() and "://" not in source and is_hub_id(source):
        source = str(download(source, ["*.parquet", "*.tar"], repository_type="dataset"))
    filesystem, root = filesystem_of(source)
    names = listed(filesystem, root, source)
    tables = [name for name in names if name.endswith(".parquet")]
    tars = [name for name in names if name.endswith((".tar", ".tar.gz", ".tgz"))]
    for kind, files in (("parquet", tables), ("tar", tars)):
        for name in files:
            yield Part(kind=kind, root=parent_of(source, name), paths=(name,), column=column)  # type: ignore[arg-type]
    if tables or tars:
        return
    pictures = [name for name in names if is_picture(name)]
    if not pictures:
        raise InputError(f"--images {source}: no pictures, parquet files or tars there")
    known = set(done)
    waiting = (name for name in pictures if name not in known)
    while chunk := tuple(islice(waiting, PART_FILES)):
        yield Part(kind="files", root=parent_of(source, chunk[0]), paths=chunk)


def filesystem_of(place: str) -> tuple[Any, str]:
    """The file system of a folder or URI, and the path in it."""
    from pyarrow import fs

    if "://" not in place:
        return fs.LocalFileSystem(), str(Path(place).absolute())
    try:
        filesystem, path = fs.FileSystem.from_uri(place)
    except (ValueError, OSError) as error:
        raise InputError(f"{place}: {error}") from None
    return filesystem, path.rstrip("/")


def listed(filesystem: Any, root: str, source: str) -> list[str]:
    """Paths of the files below `root`, sorted; of a file its own name."""
    from pyarrow import fs

    (found,) = filesystem.get_file_info([root])
    if found.type == fs.FileType.File:
        return [Path(root).name]
    if found.type == fs.FileType.NotFound:
        raise InputError(f"--images {source}: no such file or folder; give a folder, a URI or a Hub data set")
    below = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
    files = [file.path for file in below if file.type == fs.FileType.File]
    return sorted(os.path.relpath(path, root).replace(os.sep, "/") for path in files)


def parent_of(source: str, name: str) -> str:
    """What `name` is relative to: the source, or the folder of a source that is a file; however it was spelled."""
    place = source.rstrip("/") if "://" in source else str(Path(source).absolute())
    folder, _, last = place.rpartition("/")
    return folder if last == name else place


# --- shards ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Shard:
    """What a shard holds."""

    ids: list[str]
    embeddings: Tensor
    """float32 [N,D]; zeros where there is an error."""
    hashes: list[str]
    errors: list[str]
    """Why a picture has no embedding; empty where it has one."""


def shard_bytes(rows: Batch, about: dict[str, Any]) -> bytes:
    """A shard as a parquet file."""
    import pyarrow as pa
    from pyarrow import parquet

    width = rows["embedding"].shape[1]
    failed = pa.array([bool(error) for error in rows["error"]])
    flat = pa.array(rows["embedding"].astype(np.float32).reshape(-1))
    columns = {
        "id": pa.array(rows["id"].tolist(), pa.string()),
        "embedding": pa.FixedSizeListArray.from_arrays(flat, width, mask=failed),
        "hash": pa.array([text or None for text in rows["hash"]], pa.string()),
        "error": pa.array([text or None for text in rows["error"]], pa.string()),
    }
    table = pa.table(columns).replace_schema_metadata({_ABOUT: json.dumps(about)})
    buffer = io.BytesIO()
    parquet.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def shard_names(out: str) -> list[str]:
    """Files of the shards in a folder or at a URI."""
    from pyarrow import fs

    filesystem, root = filesystem_of(out)
    found = filesystem.get_file_info(fs.FileSelector(root, allow_not_found=True))
    return sorted(file.base_name for file in found if file.extension == "parquet" and file.base_name[0] != ".")


def read_shards(out: str, scorer: IdentityScorer | None = None) -> Iterator[Shard]:
    """The shards that `embed_pictures` wrote.

    Raises InputError where there are none, one is something else, or it is by another encoder than `scorer`.
    """
    import pyarrow as pa
    from pyarrow import parquet

    names = shard_names(out)
    if not names:
        raise InputError(f"--embeddings {out}: no shards there; give a folder that `nearid embed` wrote")
    filesystem, root = filesystem_of(out)
    fingerprint = None if scorer is None else encoder_fingerprint(scorer)
    for name in names:
        try:
            table = parquet.read_table(f"{root}/{name}", filesystem=filesystem)
            about = json.loads((table.schema.metadata or {})[_ABOUT])
        except (OSError, KeyError, pa.ArrowException):
            raise InputError(f"{out}/{name}: not a shard that `nearid embed` wrote; remove it") from None
        if fingerprint is not None and not same_encoder(fingerprint, torch.tensor(about["fingerprint"])):
            raise InputError(f"{out}/{name}: embedded with {about['model']}, another encoder; give --model")
        column = table.column("embedding").combine_chunks()
        embeddings = np.zeros((len(column), column.type.list_size), np.float32)
        there = column.is_valid().to_numpy(zero_copy_only=False)
        embeddings[there] = column.flatten().to_numpy().reshape(-1, column.type.list_size)
        yield Shard(
            ids=table.column("id").to_pylist(),
            embeddings=torch.from_numpy(embeddings),
            hashes=[text or "" for text in table.column("hash").to_pylist()],
            errors=[text or "" for text in table.column("error").to_pylist()],
        )


def done_ids(out: str) -> Iterator[str]:
    """Ids of all pictures in shards."""
    from pyarrow import parquet

    filesystem, root = filesystem_of(out)
    for name in shard_names(out):
        yield from parquet.read_table(f"{root}/{name}", filesystem=filesystem, columns=["id"]).column("id").to_pylist()


# --- the work --------------------------------------------------------------------------------------------------------


class PartEmbedder:
    """Embeds parts and writes their shards: {"part"} -> {"pictures", "errors"}, one for each part.

    Args:
        encoder: what embeds.
        out: folder or URI of the shards.
    """

    def __init__(self, encoder: EncoderOptions, out: str) -> None:
        self.out, self.embed = out, Embedder(encoder)

    def __call__(self, batch: Batch) -> Batch:
        """Embed the parts of a batch."""
        pictures, errors = [], []
        for text in batch["part"]:
            part = Part(**json.loads(text))
            rows = self._rows(part)
            write_shard(self.out, part.name, shard_bytes(rows, self._about))
            pictures.append(len(rows["id"]))
            errors.append(sum(bool(error) for error in rows["error"]))
        return {"pictures": np.asarray(pictures), "errors": np.asarray(errors)}

    @cached_property
    def _about(self) -> dict[str, Any]:
        encoder = self.embed.encoder
        return {"model": encoder.model, "fingerprint": encoder_fingerprint(self.embed.scorer).tolist()}

    def _rows(self, part: Part) -> Batch:
        """What became of each picture of a part; a batch of pictures is held at a time."""
        done = []
        records = iter(part.records())
        while chunk := list(islice(records, self.embed.encoder.batch_size)):
            contents = [content if isinstance(content, bytes) else b"" for _, content in chunk]
            rows = self.embed({"id": as_objects([name for name, _ in chunk]), "bytes": as_objects(contents)})
            for place, (_, content) in enumerate(chunk):
                if isinstance(content, InputError):  # the source's complaint says more than that of no bytes
                    rows["error"][place] = str(content)
            done.append(rows)
        width = self.embed.scorer.model.config.embed_dim
        none = {name: as_objects([]) for name in ("id", "hash", "error")}
        done = done or [{**none, "embedding": np.zeros((0, width), np.float32)}]
        return {name: np.concatenate([rows[name] for rows in done]) for name in done[0]}


def as_objects(values: Sequence[Any] | np.ndarray) -> np.ndarray:
    """A column of Python objects."""
    column = np.empty(len(values), object)
    column[:] = list(values)
    return column


def write_shard(out: str, name: str, content: bytes) -> None:
    """Write a shard whole or not at all; object storage does so by itself."""
    if "://" not in out:
        write_atomically(Path(out) / f"{name}.parquet", content)
        return
    filesystem, root = filesystem_of(out)
    with filesystem.open_output_stream(f"{root}/{name}.parquet") as file:
        file.write(content)


@dataclass(frozen=True)
class BulkResult:
    """What a run did."""

    pictures: int
    """Embedded in this run, errors included."""
    errors: int
    already: int
    """Parts that had their shard before."""
    parts: int = field(default=0)
    """Shards written in this run."""


def embed_pictures(
    source: str,
    out: str,
    encoder: EncoderOptions,
    engine: Engine = "local",
    workers: int = 1,
    gpus_per_worker: float = 0.0,
    column: str | None = None,
    report_progress: Callable[[int, int], None] | None = None,
) -> BulkResult:
    """Embed every picture of a source into shards; what has a shard already is left alone.

    Args:
        source: see `parts_of`. out: folder or URI of the shards.
        engine: "local": in this process; "ray": on Ray Data, on this machine or the cluster that RAY_ADDRESS names.
        workers: Ray actors, each with an encoder of its own. gpus_per_worker: share of a GPU that each takes.
        column: of parquet: where the pictures are.
        report_progress: told the parts that are done, and of how many.

    Raises InputError where there is nothing to embed, the output cannot be written, or the engine is not installed.
    """
    if "://" not in out:
        check_writable(Path(out))
    shards = set(shard_names(out))
    parts = list(parts_of(source, column, done_ids(out)))
    waiting = [part for part in parts if f"{part.name}.parquet" not in shards]
    run = {"local": _run_local, "ray": _run_ray}[engine]
    pictures = errors = done = 0
    for result in run(waiting, encoder, out, workers, gpus_per_worker):
        pictures += int(result["pictures"].sum())
        errors += int(result["errors"].sum())
        done += len(result["pictures"])
        if report_progress is not None:
            report_progress(done, len(waiting))
    return BulkResult(pictures=pictures, errors=errors, already=len(parts) - len(waiting), parts=done)


def _as_text(part: Part) -> str:
    return json.dumps({"kind": part.kind, "root": part.root, "paths": part.paths, "column": part.column})


def _run_local(
    parts: Sequence[Part], encoder: EncoderOptions, out: str, workers: int, gpus_per_worker: float
) -> Iterator[Batch]:
    embed = PartEmbedder(encoder, out)
    for part in parts:
        yield embed({"part": as_objects([_as_text(part)])})


def _run_ray(
    parts: Sequence[Part], encoder: EncoderOptions, out: str, workers: int, gpus_per_worker: float
) -> Iterator[Batch]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError:
        raise InputError("--engine ray: Ray is not installed; pip install 'nearid-personalize[bulk]'") from None
    if not parts:
        return
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
    # A part is a unit of work that an actor may be given again when its machine is lost: its shard is written anew.
    texts = ray.data.from_items([{"part": _as_text(part)} for part in parts], override_num_blocks=len(parts))
    ray.data.DataContext.get_current().enable_progress_bars = False
    done = texts.map_batches(
        PartEmbedder,
        fn_constructor_kwargs={"encoder": encoder, "out": out},
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_gpus=gpus_per_worker or None,
    )
    yield from done.iter_batches(batch_size=1, batch_format="numpy")
