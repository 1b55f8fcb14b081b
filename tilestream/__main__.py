"""`python -m tilestream`, and the `tilestream` verb of `dask`, whose every command imports this file."""

import sys

import click


def _main(arguments: tuple[str, ...]) -> None:
    from tilestream import cli

    cli.main(arguments)


command = click.Command(
    "tilestream",
    callback=_main,
    add_help_option=False,
    help="Exact tile-wise passes of a CNN over full-resolution photographs.",
    params=[click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)],
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)

if __name__ == "__main__":
    _main(tuple(sys.argv[1:]))
