"""Networks in windows: how far they read, and that windows change nothing."""

import pytest
import torch

from ttsr_fast.model import LTE, TTSR
from ttsr_fast.model.main_net import MainNet
from ttsr_fast.model.windowed import (
    LTE_STAGE,
    Tiling,
    Window,
    lte_in_tiles,
    main_net_in_tiles,
    main_net_stages,
    part_of,
    run_in_tiles,
    windows,
)

CPU = torch.device("cpu")
each = pytest.mark.parametrize


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(4)
    return TTSR((2, 1, 3, 2), 8).double().requires_grad_(False)


@each(("grid", "tile"), [((1, 1), 8), ((7, 20), 3), ((8, 8), 8), ((9, 5), 8), ((30, 31), 100)])
def test_windows_cover_every_position_once(grid, tile):
    seen = torch.zeros(grid)
    for window in windows(grid, tile):
        assert max(window.size) <= tile
        window.of(seen, 1).add_(1)
    assert (seen == 1).all()


def test_windows_grow_to_the_sides_of_the_grid():
    window = Window(2, 5, 6, 9)
    assert window.grown(4, (8, 30)) == Window(0, 8, 2, 13)
    assert window.within(Window(1, 8, 2, 13)) == Window(1, 4, 4, 7)
    assert window.of(torch.arange(400.0).view(20, 20), 2).shape == (6, 6)


def reach(outs, scales, grid, at):
    """How many positions around `at` hold a NaN."""
    found = 0
    for out, scale in zip(outs, scales, strict=True):
        hit = torch.nn.functional.max_pool2d(out.isnan().double().amax(1), scale)[0].nonzero()
        if len(hit):
            found = max(found, int((hit - torch.tensor(at)).abs().max()))
    return found


def test_halos_hold_all_that_a_stage_reads(model):
    """A NaN in one position of the inputs spoils all that depends on it, and nothing else."""
    net, grid, at = model.MainNet, (29, 27), (14, 13)
    n = 8
    inputs = {
        "SFE": ([(3, 1)], lambda x: (net.SFE(x),), [1]),
        "attend1": ([(n, 1), (1, 1), (256, 1)], lambda *x: (net.attend1(*x),), [1]),
        "attend2": ([(n, 1), (1, 1), (128, 2)], net.attend2, [1, 2]),
        "integrate": (
            [(n, 1), (n, 2), (1, 1), (64, 4)],
            lambda x1, x2, s, t: net.ex123.integrate_lower(x1, x2, net.attend4(x2, s, t)),
            [1, 2],
        ),
        "refine": ([(n, 1), (n, 2), (n, 1), (n, 2)], net.refine, [1, 2]),
        "merge": (
            [(n, 1), (n, 2), (1, 1), (64, 4), (n, 1), (n, 2)],
            lambda x1, x2, s, t, r1, r2: (
                net.merge(r1, r2, y := net.attend4(x2, s, t), net.ex123.integrate4(x1, x2, y)),
            ),
            [4],
        ),
    }
    stages = main_net_stages(net)
    assert [stage.name for stage in stages] == list(inputs)
    for stage in stages:
        shapes, network, scales = inputs[stage.name]
        furthest = 0
        for spoilt in range(len(shapes)):
            maps = [torch.randn(1, c, *(s * g for g in grid)).double() for c, s in shapes]
            scale = shapes[spoilt][1]
            y, x = (scale * place for place in at)
            maps[spoilt][:, :, y : y + scale, x : x + scale] = torch.nan
            furthest = max(furthest, reach(network(*maps), scales, grid, at))
        assert furthest <= stage.halo <= furthest + 1, stage.name


def test_halo_of_the_texture_extractor(model):
    image = torch.rand(1, 3, 60, 60).double()
    image[:, :, 28:32, 28:32] = torch.nan
    assert reach(model.LTE(image), [4, 2, 1], (15, 15), (7, 7)) == LTE_STAGE.halo


@each("tile", [1, 3, 8, 100])
@each("levels", [[3], [1, 2, 3]])
def test_texture_extractor_in_tiles(model, levels, tile):
    image = torch.rand(2, 3, 44, 52).double()
    expected = [model.LTE(image)[level - 1] for level in levels]
    found = lte_in_tiles(model.LTE, image, levels, tile=tile, store=CPU)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-13)


@each("tile", [2, 5, 9, 100])
@each(
    ("blocks", "left_out"),
    [
        ((2, 1, 3, 2), []),
        ((0, 0, 0, 0), []),
        ((1, 1, 1, 1), ["soft_attention"]),
        ((1, 1, 1, 1), ["hard_attention", "csfi"]),
    ],
)
def test_main_network_in_tiles(blocks, left_out, tile):
    torch.manual_seed(5)
    net = MainNet(blocks, 6, **dict.fromkeys(left_out, False)).double().requires_grad_(False)
    grid = (13, 17)
    lr, score = torch.randn(2, 3, *grid).double(), torch.rand(2, 1, *grid).double()
    maps = {
        level: torch.randn(2, 32 << level, *(g << (3 - level) for g in grid)).double()
        for level in (1, 2, 3)
    }
    expected = net(lr, score, maps[3], maps[2], maps[1])
    steps = []
    found = main_net_in_tiles(
        net,
        lr,
        score,
        lambda level, window: window.of(maps[level], 1 << (3 - level)),
        tiles={stage.name: tile for stage in main_net_stages(net)},
        store=CPU,
        step=lambda: steps.append(1),
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert len(steps) == 6 * len(list(windows(grid, tile)))


def test_a_halo_that_is_too_small_shows():
    """Else the tests above could not fail."""
    torch.manual_seed(6)
    net = LTE().double().requires_grad_(False)
    image, grid = torch.rand(1, 3, 32, 32).double(), (8, 8)
    out = torch.empty(1, 256, *grid).double()

    def run(halo):
        run_in_tiles(
            lambda x: [net(x)[2]],
            [part_of(image, 4)],
            [(out, 1)],
            Tiling(grid, 4, halo),
            device=CPU,
        )
        return (out - net(image)[2]).abs().max()

    assert run(LTE_STAGE.halo) < 1e-13 < 1e-6 < run(LTE_STAGE.halo - 1)
