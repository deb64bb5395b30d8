"""How every program of the project begins and ends: flags in, one line out when they are wrong.

The `nearid` command and the trainers share this, so that the same mistake reads the same everywhere.
"""

import errno
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import tyro

from nearid_personalize.commands.console import DONE, WRONG_INPUT
from nearid_personalize.errors import InputError

# Seconds that the other processes of a run leave to the first one. All of them find the same mistake, and a launcher
# ends them as soon as the first one has failed; whoever is still there by then has found a mistake of its own.
_OTHERS_WAIT = 10.0

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # a full disk, a spent quota, a file above what is allowed

_CHATTY = r"(torch|diffusers|transformers|peft|accelerate|huggingface_hub)\b"


def run_program(program: Callable[[], int | None]) -> int:
    """Run it; returns its exit status (None: 0), or 2 after one line on stderr for wrong input or a full disk.

    Of several processes (`accelerate launch`, `torchrun`) the first one writes that line.
    """
    try:
        return program() or DONE
    except InputError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(_OTHERS_WAIT)
        print(f"error: {error}", file=sys.stderr)
        return WRONG_INPUT
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        print(f"error: {error.filename or 'disk'}: {error.strerror}; make room, or write elsewhere", file=sys.stderr)
        return WRONG_INPUT


def parse_flags(
    options: Any,
    arguments: Sequence[str] | None,
    prog: str,
    description: str | None,
    helper: str | None = None,
    **settings: Any,
) -> Any:
    """What `arguments` spell, those of the process by default.

    helper: the command whose --help tells more, `prog` by default. settings: see `tyro.cli`.

    Raises:
        InputError: unknown flag, missing flag, or a value that does not fit.
        SystemExit: after --help.
    """
    complaint = StringIO()
    try:
        with redirect_stderr(complaint):
            return tyro.cli(options, prog=prog, description=description, args=arguments, **settings)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise InputError(f"{_one_line(complaint.getvalue())}; see {helper or prog} --help") from None


def quieten_libraries() -> None:
    """Keep the libraries' advice off the terminal, so that an error stays one line. What the user has set wins.

    Progress of downloads stays: they can take an hour.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    if os.environ["TRANSFORMERS_VERBOSITY"] == "error":
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        enable_progress_bars()  # the line above stops the Hub's too
    if "diffusers" in sys.modules and os.environ["DIFFUSERS_VERBOSITY"] == "error":
        from diffusers.utils import logging as diffusers_logging

        diffusers_logging.set_verbosity_error()
        diffusers_logging.disable_progress_bar()
    if not sys.warnoptions:
        for category in (UserWarning, FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=_CHATTY)


def _one_line(box: str) -> str:
    """What tyro complains of, as one line without its frame; of missing flags only their names.

    tyro prints a title, the complaint, a rule, and a footer. The title is in the upper edge of a frame; where the
    terminal has no such characters, it is a line with a rule under it.
    """
    lines = [line.strip("│╰╯ ") for line in box.splitlines()]
    rules = [number for number, line in enumerate(lines) if line and set(line) <= {"─", "-"}]
    first = 1 if box.startswith("╭") else rules[0] + 1
    last = next(number for number in rules if number >= first)
    complaint = lines[first:last]
    if complaint[0].startswith("Missing from"):
        return "missing " + ", ".join(line.split()[0] for line in complaint if line.startswith("--"))
    # A class name tells the reader nothing; a flag does
    return re.sub(r"^Error parsing (\w+: )?", "", " ".join(complaint)).rstrip(".")
