"""The command line: one verb a stage, its options made from the stage's configuration."""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
import threading
import time
import typing
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import BaseModel
from rich.console import Console

from . import stages
from .stages import ClusterConfig, Context

app = typer.Typer(
    help="Exact tile-wise saliency of full-resolution photographs, and what two published methods build on it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
BAD_INPUT = (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, ConnectionError)
"""What is the caller's to mend: exit status 2."""

Run = Annotated[Path, typer.Argument(metavar="RUN", help="the run's folder")]
StorePath = Annotated[str, typer.Argument(metavar="STORE", help="the data set: a folder, or a URL")]


STOP_S = 25.0
"""After a first signal to stop the process ends itself by force."""
SAME_S = 0.5
"""A second signal that comes so soon is the first one told twice, as `timeout` does it, to a process and its group."""


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM has come: what is finished is kept, and the process ends with 128 + the signal's number."""


@contextmanager
def stoppable() -> Iterator[list[int]]:
    """The first SIGINT or SIGTERM raises Stopped in the main thread, a second one ends the process at once."""
    received: list[int] = []
    first_s = 0.0

    def stop(number: int, frame: object) -> None:
        nonlocal first_s
        if received:
            if time.monotonic() - first_s > SAME_S:
                os._exit(128 + number)
            return
        received.append(number)
        first_s = time.monotonic()
        timer = threading.Timer(STOP_S, os._exit, [128 + number])
        timer.daemon = True
        timer.start()
        raise Stopped

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            if not received:
                signal.signal(number, handler)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: 0, 1 when the run failed, 2 for bad input, 130 or 143 when told to stop."""
    with stoppable() as received:
        status = _main(arguments, received)
    sys.exit(status)


def _main(arguments: Sequence[str] | None, received: list[int]) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    console = Console(stderr=True, soft_wrap=True)
    try:
        outcome = app([word for word in words if word != "--debug"], prog_name="tilestream", standalone_mode=False)
        status = outcome if isinstance(outcome, int) else 0  # typer returns the status of what has left early
        if status == 130:  # Ctrl-C, which typer has caught
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        name = signal.Signals(received[0]).name if received else "SIGINT"
        console.print(f"tilestream: stopped by {name}; --resume continues", highlight=False)
        status = 128 + (received[0] if received else signal.SIGINT)
    except Exception as error:
        if debug:
            console.print_exception()
        status, text = _explain(error)
        if text:
            console.print(f"tilestream: {text}", highlight=False, markup=False)
    return status


def _explain(error: Exception) -> tuple[int, str]:
    """Exit status and one line."""
    if hasattr(error, "format_message"):  # the command line's own errors: unknown options, missing arguments
        return int(getattr(error, "exit_code", 2)), str(error.format_message())
    if type(error).__name__ in ("Exit", "Abort"):
        return int(getattr(error, "exit_code", 1)), ""
    line = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, BAD_INPUT):
        return 2, line
    return 1, line if isinstance(error, RuntimeError) else f"{type(error).__name__}: {line}"


def options(model: type[BaseModel], hide: frozenset[str] = frozenset()) -> list[inspect.Parameter]:
    """A command-line option for each field of a configuration; not given, the field keeps its default."""
    parameters = []
    for name, field in model.model_fields.items():
        if name in hide:
            continue
        flag = f"--{name.removeprefix('as_').replace('_', '-')}"
        said = "(default" in str(field.description)
        quiet = said or field.is_required() or field.default_factory or field.default in (None, "")
        choices = typing.get_args(field.annotation) if typing.get_origin(field.annotation) is typing.Literal else ()
        among = f" ({', '.join(map(str, choices))})" if choices else ""
        text = f"{field.description or ''}{among}" + ("" if quiet else f" (default: {field.default})")
        kind: Any = bool | None if field.annotation is bool else str | None
        switch = field.annotation is bool
        names = [f"{flag}/--no-{flag[2:]}"] if switch and not name.startswith("as_") else [flag]
        option = typer.Option(*names, help=text, show_default=False)
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])
        )
    return parameters


def configured(model: type[BaseModel], values: dict[str, Any]) -> Any:
    """The configuration that the options given make; lists, tuples and mappings are written as YAML."""
    given = {}
    for name, value in values.items():
        if value is None or name not in model.model_fields:
            continue
        kind = str(model.model_fields[name].annotation)
        compound = any(word in kind for word in ("list[", "dict[", "tuple["))
        given[name] = _compound(name, value) if compound else value
    return stages.parse(model, given)  # type: ignore[arg-type]


def _compound(name: str, text: str) -> Any:
    """`a,b` as a list, or YAML."""
    try:
        value = yaml.safe_load(text)
        return [yaml.safe_load(part) for part in text.split(",")] if isinstance(value, str | int | float) else value
    except yaml.YAMLError as error:
        raise ValueError(f"{name}={text!r} is not YAML: {error}") from None


def with_options(
    *models: type[BaseModel], hide: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the options of configurations; it takes them as `values`."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "values"]
        extra = [p for model in models for p in options(model, frozenset(hide))]

        def command(**values: Any) -> None:
            mine = {p.name: values.pop(p.name) for p in own}
            function(**mine, values=values)

        command.__signature__ = inspect.Signature([*own, *extra])  # type: ignore[attr-defined]
        command.__doc__, command.__name__ = function.__doc__, function.__name__
        return command

    return decorate


Models = Annotated[Path | None, typer.Option(help="folder with the models of an old run (RUN/models)")]
Resume = Annotated[
    bool, typer.Option("--resume", help="continue a killed run; finished photographs are not done again")
]


def _stage_command(verb: str) -> None:
    stage = stages.STAGES[verb]

    @with_options(stage.config, ClusterConfig)
    def command(
        store: StorePath, run: Run, resume: Resume = False, models: Models = None, *, values: dict[str, Any]
    ) -> None:
        config, cluster = configured(stage.config, values), configured(ClusterConfig, values)
        with Context(run, store, cluster, models, resume) as context:
            stages.execute(verb, stage, config, context)

    app.command(verb, help=(stage.config.__doc__ or "").splitlines()[0])(command)


@app.command()
@with_options(stages.STAGES["synth"].config, ClusterConfig, hide=("folder", "memory", "device"))
def synth(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder to fill")], *, values: dict[str, Any]
) -> None:
    """Makes synthetic photographs with known lesions: OUT/*.jpeg, labels.csv, lesions.csv, legend.csv, lesions/."""
    stage = stages.STAGES["synth"]
    with Context(out, cluster=configured(ClusterConfig, values)) as context:
        stage.run(configured(stage.config, {**values, "folder": "."}), context)


@app.command()
@with_options(stages.STAGES["ingest"].config, ClusterConfig, hide=("folder", "memory", "device"))
def ingest(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="folder with the photographs")],
    store: StorePath,
    *,
    values: dict[str, Any],
) -> None:
    """Stores photographs as chunked Zarr, with their labels. What is stored already is not read again."""
    stage = stages.STAGES["ingest"]
    config = configured(stage.config, {**values, "folder": str(folder)})
    with Context(Path(), store, configured(ClusterConfig, values)) as context:
        stage.run(config, context)


@app.command()
def info(store: StorePath, as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False) -> None:
    """Says what a store holds."""
    facts = Context(Path(), store).store.info()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    for key, value in facts.items():
        shown = ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else value
        print(f"{key:12} {shown}")


@app.command()
@with_options(ClusterConfig, hide=("memory", "threads", "device", "as_json"))
def verify(
    store: StorePath,
    as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False,
    *,
    values: dict[str, Any],
) -> None:
    """Compares every file of a store with the hash that it was committed with; exit status 1 if any is damaged."""
    with Context(Path(), store, configured(ClusterConfig, values)) as context:
        found = stages.verify(context)
    if as_json:
        print(json.dumps([vars(damage) for damage in found], indent=2))
    raise typer.Exit(1 if found else 0)


@app.command()
def gc(
    store: StorePath,
    older: Annotated[float, typer.Option(help="seconds without a write after which an attempt is dead")] = 900.0,
) -> None:
    """Removes what killed runs of ingest have left in a store."""
    stages.clear(Context(Path(), store), older)


@app.command()
@with_options(ClusterConfig, hide=[n for n in ClusterConfig.model_fields if n != "scheduler" and "tls_" not in n])
def dashboard(
    run: Annotated[Path | None, typer.Argument(metavar="RUN", help="folder of a run that goes on")] = None,
    open_: Annotated[bool, typer.Option("--open", help="in the web browser")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False,
    *,
    values: dict[str, Any],
) -> None:
    """Prints the address of the page on which a run, or the cluster at --scheduler, is watched."""
    page = stages.page_of(run, configured(ClusterConfig, values))
    print(json.dumps({"page": page, "json": f"{page}.json"}) if as_json else page)
    if open_:
        webbrowser.open(page)


@app.command()
def plan(
    size: Annotated[str, typer.Option(help="HEIGHTxWIDTH in px")],
    net: Annotated[
        str, typer.Option(help="network: a name of tilestream.nets, package.module:factory, or a model file")
    ] = "ResidualNet",
    memory: Annotated[str | None, typer.Option(help="budget, like 2GiB [default: 2 GiB]")] = None,
    tile: Annotated[int | None, typer.Option(help="side of the tiles in px instead of a budget")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False,
) -> None:
    """Prints the tiles of a saliency pass with predicted peak memory and FLOPs, before anything runs."""
    print(stages.plan_text(net, size, memory, tile, as_json))


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="file of torch.save, of tensors alone")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="the model file to write, .safetensors")],
    net: Annotated[str, typer.Option(help="network: a name of tilestream.nets or package.module:factory")],
    parameters: Annotated[str, typer.Option(help="arguments of the network, as YAML")] = "{num_classes: 2}",
) -> None:
    """Makes a model file, which can be read without running code, from a pickled checkpoint."""
    stages.convert_checkpoint(checkpoint, out, net, parameters)


Settings = Annotated[list[str] | None, typer.Option("--set", help="stage.key=value, any number of times")]


@app.command("run")
@with_options(ClusterConfig)
def run_command(
    pipeline: Annotated[
        Path, typer.Argument(metavar="PIPELINE", help="a YAML file, or the name of one that comes along")
    ],
    out: Annotated[Path, typer.Option(help="the run's folder")],
    store: Annotated[str | None, typer.Option(help="the data set: a folder, or a URL")] = None,
    models: Models = None,
    set_: Settings = None,
    resume: Resume = False,
    *,
    values: dict[str, Any],
) -> None:
    """Runs a pipeline: stages in order, those that did not change are skipped."""
    _run(pipeline, out, store, models, set_ or [], resume, configured(ClusterConfig, values))


@app.command()
@with_options(ClusterConfig)
def demo(
    out: Annotated[Path, typer.Option(help="the run's folder")] = Path("demo"),
    set_: Settings = None,
    resume: Resume = False,
    *,
    values: dict[str, Any],
) -> None:
    """The main job on synthetic photographs, on a local cluster: from files to a page of results in a few minutes."""
    _run(Path("demo"), out, None, None, set_ or [], resume, configured(ClusterConfig, values))


def _run(
    pipeline: Path,
    out: Path,
    store: str | None,
    models: Path | None,
    settings: list[str],
    resume: bool,
    cluster: ClusterConfig,
) -> None:
    loaded = stages.load(pipeline, settings)
    place = store or (out / loaded.store if loaded.store else None)
    with Context(out, place, cluster, models or loaded.models, resume) as context:
        stages.run_pipeline(loaded, context)


for _verb in (verb for verb in stages.STAGES if verb not in ("synth", "ingest")):  # these two have forms of their own
    _stage_command(_verb)
