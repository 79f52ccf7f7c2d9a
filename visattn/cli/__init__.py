"""The command line: one file a command. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from visattn.cli.bench import bench
from visattn.cli.bench_model import bench_model
from visattn.cli.classify import classify
from visattn.cli.comfy import comfy
from visattn.cli.doctor import doctor
from visattn.cli.errors import fixable
from visattn.cli.generate import generate
from visattn.cli.maps import maps
from visattn.cli.messages import held_messages
from visattn.cli.models import models
from visattn.cli.patterns import patterns
from visattn.cli.presets import presets
from visattn.cli.record import record
from visattn.cli.show import show
from visattn.cli.simulate import simulate
from visattn.cli.tune import tune
from visattn.version import __version__

# What the list of commands says of each, in this order: what a newcomer looks for first. Docstrings would be cut there.
SUMMARIES = {
    "generate": "Pictures and clips of a diffusion model with a pattern.",
    "patterns": "The patterns, and methods that have a name.",
    "show": "A picture of what a pattern sees.",
    "simulate": "Density and bounds of a pattern, without running it.",
    "tune": "Find the fastest schedule that holds a quality.",
    "presets": "Schedules that ship with the package.",
    "maps": "What the heads of a model look at.",
    "record": "Save queries, keys and values of a model's attention.",
    "bench": "Time the backends on patterns.",
    "bench-model": "Time a model of timm or transformers, stock and swapped.",
    "classify": "Classify an image, or train a probe.",
    "models": "Models that can be patched, and backbones for timm.",
    "doctor": "Versions, devices and backends of this machine.",
    "comfy": "Write the nodes for ComfyUI.",
}


class Commands(TyperGroup):
    """Lists the commands in the order of `SUMMARIES`."""

    def list_commands(self, ctx: Any) -> list[str]:
        """See the `list_commands` of click's groups."""
        return [*SUMMARIES]


# rich_markup_mode None: plain help text, because importing rich would cost a quarter of the time that --help takes.
app = typer.Typer(
    name="visattn",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = doctor, patterns, show, simulate, bench, models, presets, record, maps, classify, bench_model, comfy, tune
for command in COMMANDS:
    app.command(short_help=SUMMARIES[command.__name__.replace("_", "-")])(command)
app.add_typer(generate, name="generate", short_help=SUMMARIES["generate"])


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"visattn {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="VISATTN_DEBUG", help="Show the traceback of an error.")
    ] = False,
) -> None:
    """Make vision and diffusion models fast by changing their attention."""


def main() -> None:
    """Run the command line; what a user can fix is one line on stderr and exit status 2."""
    # --debug may stand anywhere, also behind the command, where typer would not look for it.
    args = [arg for arg in sys.argv[1:] if arg != "--debug"]
    debug = len(args) < len(sys.argv) - 1 or os.environ.get("VISATTN_DEBUG", "") not in ("", "0")
    # A polite kill cleans up like Ctrl-C does; by default Python would stop where it stands.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    if debug:
        app(args, prog_name="visattn")
        return
    with held_messages() as messages:
        try:
            app(args, prog_name="visattn")
        except Exception as error:
            said = fixable(error)
            if not said:
                raise
            messages.drop()
            typer.echo(f"visattn: {' '.join(said.split())}", err=True)
            sys.exit(2)
