"""``rl-system study``: a blind user study in the browser, and what its votes say."""

from __future__ import annotations

import argparse
import sqlite3
import sys
from pathlib import Path

from rl_system.commands import exit_codes
from rl_system.commands.arguments import add_address, named_folder

PROGRAM = "rl-system study"


def run(args: list[str]) -> int:
    """Serve a study or write its results; returns the exit code: 0 done or stopped, 1 error, 2 refused."""
    options = _parser().parse_args(args)
    from rl_system.studies.evaluate.images import EvaluationRefused

    try:
        options.action(options)
    except EvaluationRefused as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    except (OSError, sqlite3.Error) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return exit_codes.ERROR
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return exit_codes.INTERRUPTED
    return exit_codes.OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(PROGRAM, description="A blind user study: which method restores best?")
    actions = parser.add_subparsers(metavar="serve | results", required=True)
    serve = actions.add_parser("serve", help="serve the page; the same command goes on with the same votes")
    add = serve.add_argument
    add(
        "--data",
        metavar="DATA=PHOTOGRAPHS",
        action="append",
        required=True,
        type=named_folder,
        help="a data set and the folder of its low-quality photographs",
    )
    add(
        "--method",
        metavar="NAME=FOLDER",
        action="append",
        required=True,
        type=named_folder,
        help="a method and its results, named like the photographs; a folder per data set if there are several",
    )
    add("--votes", metavar="FILE", required=True, type=Path, help="SQLite file of the study; made if it is missing")
    add("--seed", metavar="N", type=int, help="of the random orders; default: random, kept in the file")
    add_address(serve, 8321)
    serve.set_defaults(action=_serve)
    results = actions.add_parser("results", help="print the table; write results.html and results.json")
    results.add_argument("--votes", metavar="FILE", required=True, type=Path, help="SQLite file of the study")
    results.add_argument("--output", metavar="DIR", required=True, type=Path, help="folder to write; must not exist")
    results.set_defaults(action=_results)
    return parser


def _serve(options: argparse.Namespace) -> None:
    from rl_system.studies.evaluate.images import EvaluationRefused, check_named
    from rl_system.studies.study.app import study_app
    from rl_system.studies.study.material import collect
    from rl_system.studies.study.votes import VoteBook
    from rl_system.studies.web import is_loopback, serve

    check_named("--data", options.data, folders=True)
    check_named("--method", options.method, folders=True)
    if options.seed is not None and not 0 <= options.seed < 2**63:
        raise EvaluationRefused(f"--seed {options.seed}: a whole number from 0, below 2**63")
    print(f"reading {len(options.method)} methods", file=sys.stderr)
    material = collect(options.data, options.method)
    book = VoteBook(options.votes, material, options.seed)
    try:
        images = f"{len(material.items)} images, votes in {options.votes}"
        serve(
            study_app(material, book, local=is_loopback(options.host)),
            options.host,
            options.port,
            lambda address: print(f"{address}  ({images}; Ctrl-C ends)", flush=True),
        )
    finally:
        book.close()


def _results(options: argparse.Namespace) -> None:
    from rl_system.studies.evaluate.images import EvaluationRefused
    from rl_system.studies.study.results import results_of, to_text, write_results
    from rl_system.studies.study.votes import tallies

    found, votes_each = tallies(options.votes)
    if not votes_each:
        raise EvaluationRefused(f"{options.votes} holds no vote yet")
    if options.output.exists():
        raise EvaluationRefused(f"--output {options.output} exists already; give a new folder")
    results = results_of(found, votes_each)
    write_results(options.output, results)
    print(to_text(results))
    print(f"{options.output}: results.html, results.json")
