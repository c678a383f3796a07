"""The commands `import` and `export`: poisoned sets of other benchmarks, and torchvision's data sets."""

from pathlib import Path
from typing import Any

import click

from pipelines.options import ATTACKS, as_json, new_place, out_option, settings_option, tell


@click.group("import")
def import_group() -> None:
    """Poisoned sets of other benchmarks and torchvision's data sets, as deliveries."""


@import_group.command()
@click.argument("record", type=click.Path(path_type=Path))
@click.option("--clean", required=True, help="The training set that was attacked, in its order: Parquet with class names.")
@click.option("--target-label", type=click.IntRange(0), help="Given label of all touched images, where there is no labels.csv.")
@click.option("--attack", type=click.Choice(ATTACKS), help="If the trigger is one of ours, its name.")
@settings_option
@out_option
@as_json
def backdoorbench(
    record: Path, clean: str, out: Path, as_json: bool, attack: str | None, trigger: dict[str, Any] | None, **options: Any
) -> int:
    """RECORD, the folder of an attack of BackdoorBench with `bd_train_dataset`; its pickled results are never opened."""
    from components.backdoorbench import import_backdoorbench
    from components.exchange import UNKNOWN
    from pipelines.launch import check_uri

    check_uri("--clean", clean)
    outputs = import_backdoorbench(record, clean, new_place(out), attack=attack or UNKNOWN, trigger=trigger, **options)
    return tell(outputs, as_json, _following(out))


@import_group.command()
@click.argument("images", type=click.Path(path_type=Path))
@click.argument("labels", type=click.Path(path_type=Path))
@click.option("--poisoned", type=click.Path(path_type=Path), help="Indices of what the attack touched, .npy.")
@click.option("--original", type=click.Path(path_type=Path), help="True labels, .npy; needed with --poisoned.")
@click.option("--classes", default="", help="Names of the classes, comma-separated.  [default: their numbers]")
@out_option
@as_json
def abl(images: Path, labels: Path, out: Path, as_json: bool, classes: str, **options: Any) -> int:
    """Arrays as ABL and others keep them: IMAGES (uint8 [N, H, W, 3]) and LABELS (as given), both .npy."""
    from components.exchange import import_arrays

    names = tuple(name.strip() for name in classes.split(",") if name.strip())
    return tell(import_arrays(images, labels, new_place(out), class_names=names, **options), as_json, _following(out))


@import_group.command()
@click.argument("name")
@click.option(
    "--root", type=click.Path(path_type=Path), default=Path("torchvision-data"), show_default=True, help="Where its files lie or go."
)
@click.option("--split", default="train", show_default=True, help="train, test, or another that the data set has.")
@out_option
@as_json
def torchvision(name: str, root: Path, split: str, out: Path, as_json: bool) -> int:
    """NAME, one of torchvision's image data sets, such as MNIST, GTSRB or STL10; downloaded where it is missing."""
    from components.exchange import import_torchvision

    return tell(
        import_torchvision(name, root, new_place(out), split=split), as_json, f"cbd run --data {out / 'delivery'} --trusted TRUSTED"
    )


@click.group("export")
def export_group() -> None:
    """Poisoned data sets in the layout of other benchmarks."""


@export_group.command("backdoorbench")
@click.argument("dataset", type=click.Path(path_type=Path))
@click.option("--truth", type=click.Path(path_type=Path), required=True, help="Truth of DATASET, as `cbd poison` wrote it.")
@out_option
@as_json
def to_backdoorbench(dataset: Path, truth: Path, out: Path, as_json: bool) -> int:
    """DATASET in BackdoorBench's layout."""
    from components.backdoorbench import export_backdoorbench

    return tell(export_backdoorbench(dataset, truth, new_place(out)), as_json, f"cbd import backdoorbench {out} --clean CLEAN --out AGAIN")


def _following(out: Path) -> str:
    return f"cbd run --data {out / 'delivery'} --truth {out / 'truth'} --trusted TRUSTED"


COMMANDS = (import_group, export_group)
