"""What tests of packs share: the bytes of a folder, a model's logits, a full disk, and a run that is killed often."""

import shutil
import subprocess
import sys
from pathlib import Path

import torch

from moedge.models.backbone import matrices
from moedge.models.load import draw
from moedge.runtime.lm import LM

KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from moedge.runtime import pack as module
from moedge.runtime.formats import Format

times, *cases = sys.argv[1:]
record = module.Unfinished.record

def slowly(self, *args):  # so that kills fall between and inside all steps
    time.sleep(0.1)
    record(self, *args)
    time.sleep(0.1)

module.Unfinished.record = slowly
for model, out, format in zip(cases[::3], cases[1::3], cases[2::3]):
    chance, kills = random.Random(0), 0
    while not Path(out).exists():
        child = os.fork()
        if child == 0:
            module.pack(model, out, Format.parse(format))
            os._exit(0)
        if kills < int(times):
            time.sleep(chance.uniform(0.05, 0.4))
            os.kill(child, signal.SIGKILL)
            kills += 1
        os.waitpid(child, 0)
    print(kills)
"""


def kill_and_go_on(times: int, *cases: tuple[Path, Path, str]) -> list[int]:
    """Pack each (model, out, format), killed up to `times` times; how often each was. One process for all."""
    command = [sys.executable, "-c", KILLED, str(times), *(str(word) for case in cases for word in case)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


def take_all(path: Path) -> None:
    """Write until the disk is full."""
    with open(path, "wb", buffering=0) as file:
        while shutil.disk_usage(path).free:
            file.write(bytes(4096))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def logits(lm: LM) -> torch.Tensor:
    ids = torch.randint(3, 280, (2, 11), generator=torch.Generator().manual_seed(3))
    more = {"decoder_input_ids": ids[:, 4:]} if lm.model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        value: torch.Tensor = lm.model(input_ids=ids, **more).logits
    return value


def coded_names(folder: Path) -> set[str]:
    """The tensors of a checkpoint's backbone that packing may store in groups."""
    blueprint = draw(folder)
    blueprint.checkpoint.close()
    return matrices(blueprint.meta, blueprint.anatomy, blueprint.checkpoint.tensors) - blueprint.experts.tensors
