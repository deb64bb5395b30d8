"""Enrolled subjects by name, each in a file of one folder."""

import re
from pathlib import Path

from nearid_personalize.errors import InputError
from nearid_personalize.scorer.subject import Subject

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class SubjectStore:
    """Subjects on disk. folder: made if absent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, name: str, subject: Subject) -> None:
        """Keep a subject, in place of an earlier one of this name."""
        path = self._path(name)
        self.folder.mkdir(parents=True, exist_ok=True)
        subject.save(path)

    def load(self, name: str) -> Subject:
        """The subject of a name; InputError when there is none."""
        path = self._path(name)
        if not path.is_file():
            raise InputError(f"subject {name!r}: not enrolled; POST its photos to /enroll first")
        return Subject.load(path)

    def remove(self, name: str) -> bool:
        """Forget a subject; whether there was one."""
        path = self._path(name)
        known = path.is_file()
        path.unlink(missing_ok=True)
        return known

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(path.stem for path in self.folder.glob("*.safetensors") if _NAME.fullmatch(path.stem))

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise InputError(f"name {name[:80]!r}: 1 to 64 letters, digits, - and _ work, a letter or digit first")
        return self.folder / f"{name}.safetensors"
