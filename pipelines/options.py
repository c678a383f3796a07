"""Options that several commands share, and what becomes of them."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cbd.errors import ConfigError

if TYPE_CHECKING:
    from cbd.config import Gate, Params

WORKSPACE = Path("cbd-workspace")
ATTACKS = ("badnets", "trojan", "blend", "sig", "dynamic", "wanet")
"""What `all` stands for."""
MORE_ATTACKS = ("adaptive",)
VARIANTS = (*MORE_ATTACKS, "clean", "all-to-all", "source-specific", "several")
"""What the red team knows besides; `clean` is no attack at all."""
PRESETS = ("none", "official", "paper", "cbd")
BASELINES = ("abl", "vb", "random-filter", "perfect-filter")
"""Other defences that the red team compares with."""
F = Callable[..., Any]

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line of stdout.")
workspace_option = click.option(
    "--workspace", type=click.Path(path_type=Path), default=WORKSPACE, show_default=True, help="Where all state lives."
)
out_option = click.option("--out", type=click.Path(path_type=Path), required=True, help="Where to write the result.")


def params_options(command: F) -> F:
    """Adds the options that choose and override `params.yaml`."""
    options = (
        click.option(
            "--params", "params_path", type=click.Path(path_type=Path), help="Parameter file  [default: ./params.yaml, else the project's]"
        ),
        click.option("--preset", help="Preset of the parameter file: cbd, paper, official or none."),
        click.option("--seed", type=click.IntRange(0), help="Seed of every generator."),
        click.option("--epochs", "deconfounded__epochs", type=click.IntRange(1), help="Passes of the deconfounded model over the data."),
        click.option(
            "--confounder-steps", "confounder__steps", type=click.IntRange(1), help="Budget of the confounder in optimizer steps."
        ),
        click.option(
            "--trusted-images", "ingest__trusted_images", type=click.IntRange(1), help="Use only so many images of the trusted set."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _settings(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[str, Any] | None:
    import yaml

    settings = {}
    for value in values:
        name, _, text = value.partition("=")
        try:
            settings[name] = yaml.safe_load(text)
        except yaml.YAMLError:
            settings[name] = None
        if not name or settings[name] is None:
            raise click.BadParameter(f"{value!r}: expected SETTING=VALUE, such as place=top-left or colour=[255,0,0]")
    return settings or None


settings_option = click.option(
    "--trigger",
    "trigger",
    multiple=True,
    metavar="SETTING=VALUE",
    callback=_settings,
    help="Of the trigger, such as place=top-left; may be repeated.",
)


def poison_options(command: F) -> F:
    """Adds the options of an attack."""
    options = (
        click.option(
            "--poison-rate",
            "poison__poison_rate",
            type=click.FloatRange(0, 1, min_open=True, max_open=True),
            help="Share that is poisoned.",
        ),
        click.option(
            "--target-label", "poison__target_label", type=click.IntRange(0), help="Index of the class that triggered images are sent to."
        ),
        click.option(
            "--mapping",
            "poison__mapping",
            type=click.Choice(["all-to-one", "all-to-all"]),
            help="all-to-all: each to the class after its own.",
        ),
        click.option(
            "--trigger",
            "poison__trigger",
            multiple=True,
            metavar="SETTING=VALUE",
            callback=_settings,
            help="Of the trigger, such as place=top-left; may be repeated.",
        ),
        click.option("--source-label", "poison__source_label", type=click.IntRange(0), help="Only images of this class are attacked."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def load(*, params_path: Path | None, preset: str | None, **overrides: Any) -> "Params":
    """The parameters that the options of `params_options` and `poison_options` stand for; raises ConfigError."""
    from cbd.config import load_params

    own = Path(__file__).resolve().parent.parent / "params.yaml"
    default = Path("params.yaml") if Path("params.yaml").is_file() else own
    if overrides.get("poison__attack") is None and any(
        overrides.get(f"poison__{key}") is not None for key in ("poison_rate", "target_label", "mapping", "source_label", "trigger")
    ):
        raise ConfigError("--poison-rate, --target-label, --mapping, --source-label and --trigger go with --poison; add --poison badnets")
    params = load_params(params_path or default, preset=preset, **overrides)
    if params.poison.attack and params.poison.trigger:
        from cbd.attacks import configure

        configure(params.poison.attack, params.poison.trigger)
    return params


def load_policy(path: Path) -> "Gate":
    """The section `gate` of a parameter file, or of a file that holds nothing else; raises ConfigError."""
    from cbd.config import load_params

    if not path.is_file():
        raise ConfigError(f"--policy {path}: no such file; give one with a section such as 'gate: {{min_clean_accuracy: 0.9}}'")
    return load_params(path).gate


def new_place(out: Path) -> Path:
    """The place where a command is to write; raises ConfigError if there is anything, which would be lost."""
    if out.exists():
        raise ConfigError(f"--out {out}: exists already; name a new place")
    return out


def split(text: str, known: tuple[str, ...], option: str, *, more: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The comma-separated names in `text`, `all` being the known ones; raises ConfigError on one that is neither known nor of `more`."""
    asked = [name.strip() for name in text.split(",") if name.strip()]
    names = tuple(dict.fromkeys(each for name in asked for each in (known if name == "all" else (name,))))
    for name in names:
        if name not in known + more:
            raise ConfigError(f"{option} {name!r}: expected all, or some of {','.join(known + more)}")
    if not names:
        raise ConfigError(f"{option}: expected all, or some of {','.join(known + more)}, found none")
    return names


def tell(outputs: dict[str, Any], as_json: bool, following: str, *, table: str | None = None) -> int:
    """Prints what a single step came to; returns 0."""
    from pipelines import console

    return console.tell_outputs(outputs, as_json, following, table=table)
