"""The `nearid` command: parse, validate, and hand over to the command's module.

Exit status: 0 done; 2 wrong input, with one line on stderr; 3 done, but nothing was accepted.
"""

import sys
from collections.abc import Sequence
from typing import Annotated, TypeAlias

import tyro

from nearid_personalize.commands.console import DONE
from nearid_personalize.commands.flags import parse_flags, quieten_libraries, run_program
from nearid_personalize.commands.options import (
    Demo,
    Evaluate,
    Generate,
    Pairs,
    Quickstart,
    ReportCard,
    Score,
    Serve,
    Verify,
)
from nearid_personalize.errors import InputError

Command: TypeAlias = (
    Annotated[Quickstart, tyro.conf.subcommand("quickstart")]
    | Annotated[Score, tyro.conf.subcommand("score")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Pairs, tyro.conf.subcommand("pairs")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[ReportCard, tyro.conf.subcommand("report-card")]
    | Annotated[Serve, tyro.conf.subcommand("serve")]
)
COMMANDS = ("quickstart", "score", "verify", "generate", "evaluate", "pairs", "demo", "report-card", "serve")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its status; `arguments` default to those of the process."""
    sys.exit(run_program(lambda: run(parse(sys.argv[1:] if arguments is None else arguments))))


def parse(arguments: Sequence[str]) -> Command:
    """The command that `arguments` spell.

    Raises:
        InputError: unknown command or flag, missing flag, or a value that does not fit.
        SystemExit: after --help.
    """
    command = arguments[0] if arguments and not arguments[0].startswith("-") else ""
    if command and command not in COMMANDS:
        raise InputError(f"unknown command {command!r}; give {', '.join(COMMANDS)}")
    return parse_flags(
        Command,
        arguments,
        prog="nearid",
        description="An eye for identity for diffusers personalization pipelines.",
        helper=f"nearid {command}".strip(),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def run(command: Command) -> int:
    """Run a parsed command; returns its exit status."""
    quieten_libraries()
    if isinstance(command, Quickstart):
        from nearid_personalize.commands.quickstart import run_quickstart

        return run_quickstart(command)
    if isinstance(command, Score):
        from nearid_personalize.commands.score import run_score

        return run_score(command)
    if isinstance(command, Verify):
        from nearid_personalize.commands.verify import run_verify

        return run_verify(command)
    if isinstance(command, Evaluate):
        from nearid_personalize.commands.evaluate import run_evaluate

        return run_evaluate(command)
    if isinstance(command, Pairs):
        from nearid_personalize.commands.pairs import run_pairs

        return run_pairs(command)
    if isinstance(command, ReportCard):
        from nearid_personalize.commands.report_card import run_report_card

        return run_report_card(command)
    if isinstance(command, Serve):
        from nearid_personalize.commands.serve import run_serve

        return run_serve(command)
    if isinstance(command, Demo):
        from nearid_personalize.demo.server import serve

        serve(command)
        return DONE
    from nearid_personalize.commands.generate import run_generate

    return run_generate(command)


if __name__ == "__main__":
    main()


if __name__ == "__main__":
    main()
