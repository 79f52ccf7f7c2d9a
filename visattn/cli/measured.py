"""What the commands that measure share: where results go, how they are reported, written and drawn."""

from __future__ import annotations

import json as json_text
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import typer

from visattn.cli.options import output_file, print_json

SaveOption = Annotated[Path | None, typer.Option(help="Write the results to this .json file too.")]
PlotOption = Annotated[Path | None, typer.Option(help="Draw time against tokens to this .png file.")]


class Measured(Protocol):
    """A result that can be reported."""

    def to_dict(self) -> dict[str, Any]:
        """The result for JSON."""
        ...


class Unable(Protocol):
    """A backend that cannot run a case."""

    @property
    def backend(self) -> str:
        """Its name."""
        ...

    @property
    def reason(self) -> str:
        """Why it cannot."""
        ...

    @property
    def other(self) -> bool:
        """Whether it is made for patterns of another kind."""
        ...


def say_who_cannot(lines: Sequence[Unable]) -> None:
    """Say why backends cannot run a case; of all that are made for other patterns in one line."""
    others = [line.backend for line in lines if line.other]
    for line in lines:
        if not line.other or len(others) == 1:
            typer.echo(f"{line.backend} cannot run it: {line.reason}")
    if len(others) > 1:
        typer.echo(f"made for other patterns: {', '.join(others)}")


Row = TypeVar("Row", bound=Measured)


def check_files(save: Path | None, plot: Path | None, force: bool) -> None:
    """Check before anything is measured that the files can be written.

    Raises:
        ValueError: If one cannot; see `output_file`.
    """
    for path, suffixes in ((save, (".json",)), (plot, (".png",))):
        if path is not None:
            output_file(path, suffixes, force)


def give(
    results: Sequence[Row],
    show: Callable[[Sequence[Row]], None],
    charts: Callable[[Sequence[Row]], list[Any]],
    save: Path | None,
    plot: Path | None,
    json: bool,
) -> None:
    """Write the results and print them.

    Args:
        results: What was measured.
        show: Prints them for people.
        charts: Draws them, one picture a chart; called only for `plot`.
        save: File for the report as JSON.
        plot: File for the charts, one below the other.
        json: Whether the report is printed as JSON instead.
    """
    from visattn.files import written_whole

    found = _report(results)
    if save is not None:
        with written_whole(save) as temporary:
            temporary.write_text(json_text.dumps(found, indent=2) + "\n")
    if plot is not None:
        from visattn.canvas import column

        picture = column(charts(results))
        with written_whole(plot) as temporary:
            picture.save(temporary)
    if json:
        print_json(found)
    else:
        show(results)
        typer.echo(found["busy"] and f"warning: {found['busy']}", nl=bool(found["busy"]))


def _report(results: Sequence[Measured]) -> dict[str, Any]:
    from visattn.environment import busy, devices, versions

    return {
        "versions": versions(),
        "devices": devices(),
        "busy": busy(),
        "results": [result.to_dict() for result in results],
    }
