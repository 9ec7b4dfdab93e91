"""`moedge plan` says what a token costs when its experts are all on disk."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from moedge.runtime import device
from moedge.runtime.verb_plan import command


@pytest.mark.parametrize("speed", [2e9, None])
def test_the_disk_is_measured_on_the_largest_file(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, speed: float | None
) -> None:
    measured: list[Path] = []

    def read_speed(file: Path) -> float | None:
        measured.append(file)
        return speed

    monkeypatch.setattr(device, "read_speed", read_speed)
    folder = tiny("mixtral")
    done = CliRunner().invoke(command, [str(folder), "--json"])
    assert done.exit_code == 0, done.output
    sizes = {file: file.stat().st_size for file in folder.glob("*.safetensors")}
    assert len(set(sizes.values())) > 1
    assert [file.stat().st_size for file in measured] == [max(sizes.values())]
    worst = json.loads(done.stdout)["worst_token"]
    firsts = [t.nbytes for file in sizes for name, t in load_file(file).items() if ".experts.0." in name]  # all layers
    top_k = json.loads((folder / "config.json").read_text())["num_experts_per_tok"]
    needed = top_k * sum(firsts)
    seconds = None if speed is None else needed / speed
    assert worst == {"bytes": needed, "disk_bytes_per_second": speed, "seconds": seconds}
