"""Makes checkpoints/mini: trains (or continues), publishes, evaluates, writes the card."""

from pathlib import Path

import click

from recipes.mini import evaluate, publish, run


@click.command()
@click.option("--data", type=click.Path(path_type=Path), default=Path("../shared/data"), show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/mini"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("checkpoints/mini"), show_default=True)
@click.option("--minutes", type=float, help="End the training after this many minutes, as far as that is.")
def main(data: Path, work: Path, out: Path, minutes: float | None) -> None:
    """Make the mini model; run it again to continue after a stop."""
    arguments = ["--data", str(data), "--work", str(work)] + (["--minutes", str(minutes)] if minutes else [])
    run.main.main(arguments, standalone_mode=False)
    publish.main.main(["model", "--work", str(work), "--out", str(out)], standalone_mode=False)
    figures = ["--data", str(data), "--out", str(out / "evaluation.json")]
    evaluate.main.main([str(out), *figures], standalone_mode=False)
    publish.main.main(["card", "--out", str(out)], standalone_mode=False)


if __name__ == "__main__":
    main()
