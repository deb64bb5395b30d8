"""The `nearid` command: parse, validate, and hand over to the command's module.

Exit status: 0 done; 2 wrong input, with one line on stderr; 3 done, but nothing was accepted.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Annotated, Any, Union

import tyro

from nearid_personalize.commands.flags import parse_flags, quieten_libraries, run_program
from nearid_personalize.commands.options import (
    Demo,
    Distractors,
    Embed,
    Evaluate,
    Gallery,
    Generate,
    Pairs,
    Quickstart,
    ReportCard,
    Score,
    Serve,
    Verify,
)
from nearid_personalize.errors import InputError

COMMANDS: dict[str, tuple[type[Any], str]] = {
    "quickstart": (Quickstart, "commands.quickstart:run_quickstart"),
    "score": (Score, "commands.score:run_score"),
    "verify": (Verify, "commands.verify:run_verify"),
    "gallery": (Gallery, "commands.gallery:run_gallery"),
    "embed": (Embed, "commands.embed:run_embed"),
    "generate": (Generate, "commands.generate:run_generate"),
    "distractors": (Distractors, "commands.distractors:run_distractors"),
    "evaluate": (Evaluate, "commands.evaluate:run_evaluate"),
    "pairs": (Pairs, "commands.pairs:run_pairs"),
    "demo": (Demo, "demo.server:serve"),
    "report-card": (ReportCard, "commands.report_card:run_report_card"),
    "serve": (Serve, "commands.serve:run_serve"),
}
"""Each command's options, and the function of this package that runs it. Its module is imported only then."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its status; `arguments` default to those of the process."""
    sys.exit(run_program(lambda: run(parse(sys.argv[1:] if arguments is None else arguments))))


def parse(arguments: Sequence[str]) -> Any:
    """The options of the command that `arguments` spell.

    Raises:
        InputError: unknown command or flag, missing flag, or a value that does not fit.
        SystemExit: after --help.
    """
    command = arguments[0] if arguments and not arguments[0].startswith("-") else ""
    if command and command not in COMMANDS:
        raise InputError(f"unknown command {command!r}; give {', '.join(COMMANDS)}")
    subcommands = tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, (kind, _) in COMMANDS.items())
    return parse_flags(
        Union[subcommands],  # noqa: UP007
        arguments,
        prog="nearid",
        description="An eye for identity for diffusers personalization pipelines.",
        helper=f"nearid {command}".strip(),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def run(options: Any) -> int | None:
    """Run the command that these are the options of; returns its exit status, None for 0."""
    quieten_libraries()
    (place,) = (place for kind, place in COMMANDS.values() if type(options) is kind)
    module, function = place.split(":")
    command: Callable[[Any], int | None] = getattr(import_module(f"nearid_personalize.{module}"), function)
    return command(options)


if __name__ == "__main__":
    main()
