"""The `nearid` command: parse, validate, and hand over to the command's module.

Exit status: 0 done; 2 wrong input, with one line on stderr; 3 done, but nothing was accepted.
"""

import itertools
import os
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from typing import Annotated, TypeAlias

import tyro

from nearid_personalize.commands.console import DONE, WRONG_INPUT
from nearid_personalize.commands.options import Demo, Evaluate, Generate, Pairs, Quickstart, ReportCard, Score
from nearid_personalize.errors import InputError

Command: TypeAlias = (
    Annotated[Quickstart, tyro.conf.subcommand("quickstart")]
    | Annotated[Score, tyro.conf.subcommand("score")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Pairs, tyro.conf.subcommand("pairs")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[ReportCard, tyro.conf.subcommand("report-card")]
)
COMMANDS = ("quickstart", "score", "generate", "evaluate", "pairs", "demo", "report-card")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its status; `arguments` default to those of the process."""
    try:
        status = run(parse(sys.argv[1:] if arguments is None else arguments))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        status = WRONG_INPUT
    sys.exit(status)


def parse(arguments: Sequence[str]) -> Command:
    """The command that `arguments` spell.

    Raises:
        InputError: unknown command or flag, missing flag, or a value that does not fit.
        SystemExit: after --help.
    """
    command = arguments[0] if arguments and not arguments[0].startswith("-") else ""
    if command and command not in COMMANDS:
        raise InputError(f"unknown command {command!r}; give {', '.join(COMMANDS)}")
    complaint = StringIO()
    try:
        with redirect_stderr(complaint):
            return tyro.cli(
                Command,
                prog="nearid",
                description="An eye for identity for diffusers personalization pipelines.",
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise InputError(f"{_one_line(complaint.getvalue())}; see nearid {command} --help".replace("  ", " ")) from None


def run(command: Command) -> int:
    """Run a parsed command; returns its exit status."""
    _quieten_libraries()
    if isinstance(command, Quickstart):
        from nearid_personalize.commands.quickstart import run_quickstart

        return run_quickstart(command)
    if isinstance(command, Score):
        from nearid_personalize.commands.score import run_score

        return run_score(command)
    if isinstance(command, Evaluate):
        from nearid_personalize.commands.evaluate import run_evaluate

        return run_evaluate(command)
    if isinstance(command, Pairs):
        from nearid_personalize.commands.pairs import run_pairs

        return run_pairs(command)
    if isinstance(command, ReportCard):
        from nearid_personalize.commands.report_card import run_report_card

        return run_report_card(command)
    if isinstance(command, Demo):
        from nearid_personalize.demo.server import serve

        serve(command)
        return DONE
    from nearid_personalize.commands.generate import run_generate

    return run_generate(command)


def _one_line(boxed: str) -> str:
    """The message inside tyro's box, below its title and above the next rule; of missing flags only their names."""
    texts = [line.strip("│ ") for line in boxed.splitlines()]
    paragraphs = [list(group) for rule, group in itertools.groupby(texts, _is_rule) if not rule]
    # The title is the box's upper edge, or where stdout cannot hold such an edge, a paragraph of its own.
    message = paragraphs[0][1:] if boxed.startswith("╭") else paragraphs[1]
    if message[0].startswith("Missing from"):
        return "missing " + ", ".join(text.split()[0] for text in message if text.startswith("--"))
    return re.sub(r"^Error parsing \w+: ", "", " ".join(message)).rstrip(".")


def _is_rule(text: str) -> bool:
    return bool(text) and set(text) <= {"─", "-"}


def _quieten_libraries() -> None:
    """Keep the libraries' advice off the terminal, so that an error stays one line. Flags set by the user win."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    from transformers.utils import logging

    if os.environ["TRANSFORMERS_VERBOSITY"] == "error":
        logging.set_verbosity_error()
        logging.disable_progress_bar()
