"""The NF4 explorer: its numbers against bitsandbytes, its panel moved by hand."""

from __future__ import annotations

import bitsandbytes.functional as bnbf
import pytest
import torch

from helpers import widgets


def by_library(outlier, blocksize, double_quant):
    """Error of all weights, and of the first block without its first weight, through bitsandbytes' own functions."""
    weights = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    if outlier:
        weights[0] = outlier
    packed, state = bnbf.quantize_4bit(weights, blocksize=blocksize, quant_type="nf4", compress_statistics=double_quant)
    off = (bnbf.dequantize_4bit(packed, state).flatten() - weights).square()
    nibbles = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten()
    scales = state.absmax.numel() * state.absmax.element_size()
    return off.mean().sqrt(), off[1:blocksize].mean().sqrt(), torch.bincount(nibbles.long(), minlength=16), scales


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("outlier, blocksize", [(0, 64), (12, 64), (40, 256), (5, 4096)])
def test_its_numbers_are_bitsandbytes_numbers(outlier, blocksize, double_quant):
    found = widgets.nf4_explorer(outlier, blocksize, double_quant=double_quant)
    error, there, counts, scales = by_library(outlier, blocksize, double_quant)
    assert found["error"] == pytest.approx(error.item(), rel=1e-4)
    assert found["error_there"] == pytest.approx(there.item(), rel=1e-4)
    assert (torch.tensor(found["shares"]) * 4096 - counts).abs().sum() <= 4, "a tie may fall to either side"
    assert found["bits"] - (32 / (blocksize * 256) if double_quant else 0) == 4 + 8 * scales / 4096


def test_what_the_notebook_tells_about_outliers_and_blocks():
    calm, wild = widgets.nf4_explorer(), widgets.nf4_explorer(outlier=40)
    assert calm["bits"] == pytest.approx(4.127, abs=5e-4) and widgets.nf4_explorer(double_quant=False)["bits"] == 4.5
    assert wild["error_there"] > 5 * calm["error_there"] and wild["zeros"] > 0.9, "one outlier wipes out its block"
    assert wild["error"] < 2 * calm["error"], "and nothing beyond it"
    errors = [widgets.nf4_explorer(outlier=8, blocksize=b)["error"] for b in (32, 64, 256, 4096)]
    assert errors == sorted(errors), "larger blocks, larger errors"
    shares = {s: widgets.nf4_explorer(shape=s)["shares"] for s in widgets.NF4_SHAPES}
    spread = {s: max(v) - min(v) for s, v in shares.items()}
    assert spread["heavy tails"] > 2 * spread["normal"], "levels for normal weights are used unevenly by others"


def test_the_page_shows_every_level_and_the_panel_follows_its_controls():
    page = widgets.nf4_page(12, 256, "uniform", False)
    assert len([line for line in page.splitlines() if line[:1] in ("+", "-")]) == 16
    assert "blocks of 256" in page and "4.125" in page and "set to 12" in page
    panel = widgets.nf4_panel()
    shown = panel.children[-1]
    outlier, blocksize = panel.children[0].children
    shape, double = panel.children[1].children
    seen = {shown.value}
    for control, value in ((outlier, 20), (blocksize, 1024), (shape, "heavy tails"), (double, False)):
        control.value = value
        assert shown.value not in seen, control.description
        seen.add(shown.value)
    assert widgets.nf4_page(20, 1024, "heavy tails", False).splitlines()[-1] in shown.value
