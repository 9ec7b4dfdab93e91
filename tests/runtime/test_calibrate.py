"""Clipping: each group gets the ratio of the grid that is best for its inputs, as a brute-force search finds it."""

from pathlib import Path

import pytest
import torch

from moedge.runtime.calibrate import ALIKE, RATIOS, Moments, best_clip, second_moments
from moedge.runtime.formats import Format, dequantise, quantise


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def correlated(tokens: int, columns: int) -> torch.Tensor:
    """Inputs that are not alike: correlated, and of sizes that differ a hundredfold."""
    mixing = torch.randn(columns, columns, generator=generator(1)) / columns**0.5 + torch.eye(columns)
    sizes = torch.logspace(-1, 1, columns)
    return torch.randn(tokens, columns, generator=generator(2)) @ mixing * sizes


@pytest.mark.parametrize("columns", [32, 96, 140])
def test_second_moments_are_the_sums(columns: int) -> None:
    x, gate = correlated(17, columns), torch.rand(17, generator=generator())
    found = second_moments(x, gate)
    whole = torch.einsum("t,ti,tj->ij", gate.double() ** 2, x.double(), x.double())
    for block in range(-(-columns // 32)):
        begin, end = 32 * block, min(columns, 32 * block + 32)
        part = found[block, : end - begin, : end - begin].double()
        torch.testing.assert_close(part, whole[begin:end, begin:end], rtol=1e-5, atol=1e-4)
        assert not found[block, end - begin :].any()


@pytest.mark.parametrize("text", ["int4-g32", "int4-g32-asym", "int4-g64", "int4-g128-asym", "int8-g64"])
def test_each_group_gets_the_best_ratio(text: str) -> None:
    format, columns = Format.parse(text), 140
    w, x = torch.randn(5, columns, generator=generator(3)), correlated(400, columns)
    clip = best_clip(w, format, second_moments(x, torch.ones(len(x))))
    assert clip.shape == (5, -(-columns // format.group))
    ratios, size = torch.tensor(RATIOS), x.square().sum() / columns
    for row in range(5):
        for group in range(clip.shape[1]):
            errors = []
            for ratio in RATIOS:
                difference = dequantise(quantise(w, format, ratio), format, columns)[row] - w[row]
                total = 0.0
                for begin in range(group * format.group, min(columns, (group + 1) * format.group), 32):
                    end = min(columns, begin + 32)
                    some = difference[begin:end].double()
                    seen = (x[:, begin:end].double() @ some).square().sum()
                    total += float((1 - ALIKE) * seen + ALIKE * size * some.square().sum())
                errors.append(total)
            chosen = int((ratios - clip[row, group]).abs().argmin())
            assert errors[chosen] <= min(errors) * 1.0001, (row, group)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_products_change_less(group: int) -> None:
    format = Format("int4", group)
    w, x = torch.randn(48, 256, generator=generator(3)), correlated(2000, 256)
    seen, held = x[:1000], x[1000:]
    clip = best_clip(w, format, second_moments(seen, torch.ones(len(seen))))
    errors = [
        (held @ (dequantise(quantise(w, format, each), format, 256) - w).T).norm() / (held @ w.T).norm()
        for each in (1.0, clip)
    ]
    assert errors[1] < 0.97 * errors[0]


def test_without_inputs_nothing_is_clipped() -> None:
    w = torch.randn(4, 64, generator=generator())
    assert (best_clip(w, Format("int4"), torch.zeros(2, 32, 32)) == 1).all()
    assert (best_clip(torch.zeros(4, 64), Format("int4"), torch.ones(2, 32, 32)) == 1).all()


def test_a_cut_into_rows_changes_nothing() -> None:
    w, x = torch.randn(6, 64, generator=generator()), correlated(100, 64)
    moments = second_moments(x, torch.ones(100))
    parts = [best_clip(w[at : at + 2], Format("int4"), moments) for at in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), best_clip(w, Format("int4"), moments))


def made() -> Moments:
    moments = Moments([2, 3], [{"up": 40, "down": 32}, {"up": 40, "down": 32}])
    for expert in (0, 2):
        inputs = {"up": correlated(5 + expert, 40), "down": correlated(5 + expert, 32)}
        moments.add(1, expert, inputs, torch.full((5 + expert,), 0.5))
    return moments


def test_an_expert_without_tokens_takes_its_layers() -> None:
    moments = made()
    assert moments.unseen == 3
    assert torch.equal(moments.of(1, 0)["up"], second_moments(correlated(5, 40), torch.full((5,), 0.5)))
    assert torch.equal(moments.of(1, 1)["up"], moments.of(1, 0)["up"] + moments.of(1, 2)["up"])
    assert not moments.of(0, 1)["down"].any(), "nobody in that layer saw a token"


def test_saved_and_read_again(tmp_path: Path) -> None:
    moments, other = made(), Moments([2, 3], [{"up": 40, "down": 32}, {"up": 40, "down": 32}])
    moments.save(tmp_path / "moments")
    assert other.checksum != moments.checksum
    other.load(tmp_path / "moments")
    assert other.checksum == moments.checksum
    assert other.unseen == 3
    assert torch.equal(other.of(1, 2)["down"], moments.of(1, 2)["down"])
    counts = (tmp_path / "moments").stat().st_size - Moments.nbytes_of([2, 3], [{"up": 40, "down": 32}] * 2)
    assert counts == 8 * 5
