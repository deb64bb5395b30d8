"""A folder for each visitor, that nobody else is given, and that goes after a stated time."""

import secrets
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from nearid_personalize.errors import InputError
from nearid_personalize.images import load_upload, save_image


@dataclass
class Visitor:
    """One visitor's folder. `photos` are the files of their photos in it, in the order added.

    max_bytes: from which size of the folder on nothing more is added to it.
    """

    folder: Path
    max_photos: int
    max_bytes: int = 10**9
    photos: list[Path] = field(default_factory=list)
    last_seen: float = field(default_factory=time.monotonic)
    busy: int = 0
    """Jobs under way, which keep the folder whatever its age."""

    @property
    def size_bytes(self) -> int:
        """What lies in the folder."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def require_room(self) -> None:
        """Raise InputError when the folder is full."""
        if (size := self.size_bytes) >= self.max_bytes:
            raise InputError(
                f"your folder is full ({size / 1e6:.0f} MB, {self.max_bytes / 1e6:.0f} MB are yours): take home what "
                "you like, delete your data, and begin anew"
            )

    def new_folder(self, kind: str) -> Path:
        """A fresh folder inside the visitor's own; InputError when that is full."""
        self.require_room()
        folder = self.folder / f"{kind}-{secrets.token_hex(4)}"
        folder.mkdir(parents=True)
        return folder

    def add_photos(self, sources: Iterable[Path]) -> list[str]:
        """Take over pictures from files of any sort; returns a sentence for each that is refused.

        What is kept is written anew as PNG, without the metadata (place, camera) of the file it came in.
        """
        refused = []
        self.folder.mkdir(parents=True, exist_ok=True)
        for source in sources:
            try:
                if len(self.photos) >= self.max_photos:
                    raise InputError(f"{source.name}: left out, there is room for {self.max_photos} photos")
                self.require_room()
                path = self.folder / f"photo-{secrets.token_hex(4)}.png"
                save_image(load_upload(source, source.name), path)
                self.photos.append(path)
            except InputError as error:
                refused.append(str(error))
        return refused

    def remove_photos(self, places: Iterable[int]) -> None:
        """Delete photos by their places in `photos`; places that are none are passed over."""
        gone = {place for place in places if 0 <= place < len(self.photos)}
        for place in gone:
            self.photos[place].unlink(missing_ok=True)
        self.photos = [path for place, path in enumerate(self.photos) if place not in gone]

    def forget(self) -> None:
        """Delete everything that is theirs."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.photos = []

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The folder stays while the block runs."""
        self.busy += 1
        try:
            yield
        finally:
            self.busy -= 1
            self.last_seen = time.monotonic()


class Visitors:
    """All visitors of one server.

    root: the folder that holds theirs; made if absent. keep_seconds: how long a folder outlives its last use.
    max_photos, max_bytes: that one visitor may have.
    """

    def __init__(self, root: Path, keep_seconds: float, max_photos: int, max_bytes: int = 10**9) -> None:
        if keep_seconds <= 0 or max_photos < 1:
            raise InputError(f"--keep-hours {keep_seconds / 3600:g}, --max-photos {max_photos}: both must be above 0")
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.root, self.keep_seconds, self.max_photos, self.max_bytes = root, keep_seconds, max_photos, max_bytes
        self._all: list[Visitor] = []
        self._lock = threading.Lock()

    def new(self) -> Visitor:
        """A visitor whose folder has a name that cannot be guessed."""
        visitor = Visitor(self.root / secrets.token_urlsafe(18), self.max_photos, self.max_bytes)
        with self._lock:
            self._all.append(visitor)
        return visitor

    def forget(self, visitor: Visitor) -> None:
        """Delete what is theirs, and forget that they were here."""
        visitor.forget()
        with self._lock:
            self._all = [other for other in self._all if other is not visitor]

    def sweep(self, now: float | None = None) -> int:
        """Forget every visitor not seen for `keep_seconds` and not at work; returns how many.

        now: on the clock of `time.monotonic`.
        """
        now = time.monotonic() if now is None else now
        with self._lock:
            due = [v for v in self._all if not v.busy and now - v.last_seen > self.keep_seconds]
        for visitor in due:
            self.forget(visitor)
        return len(due)

    def __len__(self) -> int:
        return len(self._all)

    def sweep_forever(self) -> threading.Thread:
        """Sweep every tenth of the time things are kept, a minute at least, for as long as the process lives."""

        def run() -> None:
            while True:
                time.sleep(max(self.keep_seconds / 10, 60.0))
                self.sweep()

        thread = threading.Thread(target=run, name="sweep visitors", daemon=True)
        thread.start()
        return thread
