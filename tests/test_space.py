"""Vectors in pieces: their probes are those of the whole vector, bit for bit, and so are all inner products."""

from __future__ import annotations

import math

import pytest
import torch

from curvdiag.errors import ArgumentError
from curvdiag.space import Piece, ShardedSpace, WholeSpace, probes
from curvdiag.space import pieces as boxes
from curvdiag.space.probes import gaussian, rademacher

SHAPES = [(7, 300), (513,), (), (3, 5, 70), (1,), (257, 9), (2, 3, 4, 11)]
OFFSETS = [sum(math.prod(s) for s in SHAPES[:i]) for i in range(len(SHAPES))]
SIZE = sum(math.prod(s) for s in SHAPES)


def piece(i: int, start: tuple[int, ...], extent: tuple[int, ...], counted: bool = True) -> Piece:
    return Piece(OFFSETS[i], torch.Size(SHAPES[i]), start, torch.Size(extent), counted)


def cut(i: int, dim: int, part: int, parts: int) -> Piece:
    """Piece ``part`` of parameter ``i`` along ``dim``, in chunks of equal length but the last, as torch.chunk."""
    shape = SHAPES[i]
    each = -(-shape[dim] // parts)
    low, high = min(part * each, shape[dim]), min((part + 1) * each, shape[dim])
    start, extent = [0] * len(shape), list(shape)
    start[dim], extent[dim] = low, high - low
    return piece(i, tuple(start), tuple(extent))


def shard(rank: int, world: int, dim: int) -> list[Piece]:
    """All parameters along their first or last dimension; scalars are on rank 0, and a copy on the others."""
    found = []
    for i, shape in enumerate(SHAPES):
        if shape:
            found.append(cut(i, -1 % len(shape) if dim else 0, rank, world))
        else:
            found.append(piece(i, (), (), counted=rank == 0))
    return found


def spaces(world: int, dim: int) -> list[ShardedSpace]:
    return [ShardedSpace(shard(rank, world, dim), SIZE, WholeSpace(SIZE).ranks) for rank in range(world)]


@pytest.fixture(params=[1 << 20, 256, 11], ids=lambda n: f"{n} at once")
def at_once(request, monkeypatch):
    monkeypatch.setattr(probes, "AT_ONCE", request.param)


@pytest.mark.parametrize("draw", ["rademacher", "gaussian"])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_probes_of_shards_are_those_of_the_whole_vector_bit_for_bit(at_once, world, dim, draw):
    whole = {"rademacher": rademacher, "gaussian": gaussian}[draw](3, SIZE, seed=11, first=4, dtype=torch.float64)
    held = torch.zeros(SIZE)
    for space in spaces(world, dim):
        own = getattr(space, draw)(3, seed=11, first=4, dtype=torch.float64, device="cpu")
        assert own.shape == (3, space.local)
        assert torch.equal(own, space.part(whole))
        for one, numbers in zip(space.pieces, space.parts(own[1]), strict=True):
            assert torch.equal(numbers, one.of(whole[1]))
            one.of(held).add_(one.counted)
    assert torch.equal(held, torch.ones(SIZE))  # the shards are the whole vector


@pytest.mark.parametrize("draw", ["rademacher", "gaussian"])
def test_boxes_in_the_middle_of_a_parameter_and_two_of_one_parameter_are_found(at_once, draw):
    own = [
        piece(3, (1, 2, 13), (2, 2, 40)),
        piece(0, (5, 10), (2, 20)),  # two boxes of one parameter, the later first
        piece(0, (1, 17), (3, 111)),
        piece(6, (1, 0, 2, 3), (1, 3, 1, 7)),
        piece(5, (250, 1), (7, 1), counted=False),
        piece(1, (500,), (0,)),
    ]
    space = ShardedSpace(own, SIZE, WholeSpace(SIZE).ranks)
    whole = {"rademacher": rademacher, "gaussian": gaussian}[draw](2, SIZE, seed=5)
    found = getattr(space, draw)(2, seed=5, dtype=torch.float32, device="cpu")
    for row, reference in zip(found, whole, strict=True):
        for one, numbers in zip(space.pieces, space.parts(row), strict=True):
            assert torch.equal(numbers, one.of(reference))


def test_counted_pieces_come_first_by_their_offsets_and_copies_last():
    own = [piece(5, (0, 0), (10, 9)), piece(2, (), (), counted=False), piece(0, (0, 0), (2, 300)), piece(1, (3,), (4,))]
    space = ShardedSpace(own, SIZE, WholeSpace(SIZE).ranks)
    assert [one.offset for one in space.pieces] == [OFFSETS[0], OFFSETS[1], OFFSETS[5], OFFSETS[2]]
    assert (space.size, space.owned, space.local) == (SIZE, 600 + 4 + 90, 600 + 4 + 90 + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inner_products_leave_copies_out_and_add_up_to_those_of_whole_vectors(dtype):
    whole = gaussian(4, SIZE, seed=3, dtype=dtype)
    x, y = whole[:2], whole[2:]
    dots, cross, parts = torch.zeros(2), torch.zeros(2, 2), torch.zeros(2)
    for space in spaces(3, 0):
        own_x, own_y = space.part(x), space.part(y)
        assert space.dots(own_x, own_y).dtype == torch.float64
        dots = dots + space.dots(own_x, own_y)
        cross = cross + space.cross(own_x, own_y)
        parts = parts + space.components(own_x, own_y[1])
    wide = whole.double()
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(dots, (wide[:2] * wide[2:]).sum(1), atol=tolerance, rtol=0)
    torch.testing.assert_close(cross, wide[:2] @ wide[2:].T, atol=tolerance, rtol=0)
    torch.testing.assert_close(parts.double(), wide[:2] @ wide[3], atol=tolerance, rtol=0)


def test_a_whole_space_has_the_same_bits_as_plain_arithmetic():
    space, whole = WholeSpace(SIZE), gaussian(3, SIZE, seed=0)
    assert torch.equal(space.rademacher(2, seed=1, dtype=torch.float32, device="cpu"), rademacher(2, SIZE, seed=1))
    assert torch.equal(space.gaussian(3, seed=0, dtype=torch.float32, device="cpu"), whole)
    assert torch.equal(space.components(whole[:2], whole[2]), torch.mv(whole[:2], whole[2]))
    assert space.gathered(whole) is whole
    assert space.part(whole) is whole
    assert (space.size, space.local, space.owned) == (SIZE, SIZE, SIZE)
    assert space.whole


def test_what_fits_is_counted_in_whole_things_and_nothing_takes_no_room():
    space, device = WholeSpace(SIZE), torch.device("cpu")
    assert [space.fitting(11, each, device) for each in (5, 11, 12, 0)] == [2, 1, 0, 11]
    assert space.free_bytes("cpu") > 1 << 20


def test_normal_numbers_of_a_shard_never_take_memory_for_the_whole_vector(monkeypatch):
    asked: list[int] = []
    draw = torch.from_numpy

    def watched(array):
        asked.append(array.size)
        return draw(array)

    monkeypatch.setattr(probes.torch, "from_numpy", watched)
    shape = torch.Size([4096, 2048])  # 8.4 million numbers
    space = ShardedSpace([Piece(0, shape, (0, 1000), torch.Size([4096, 10]))], shape.numel(), WholeSpace(1).ranks)
    for name in ("rademacher", "gaussian"):
        getattr(space, name)(1, seed=0, dtype=torch.float32, device="cpu")
    assert sum(asked) == 2 * shape.numel()  # all of it is passed, for a box of columns
    assert max(asked) <= shape.numel() // 8  # a little at a time


def test_a_contiguous_shard_of_signs_is_drawn_alone(monkeypatch):
    words: list[int] = []
    unpack = probes.np.unpackbits
    monkeypatch.setattr(probes.np, "unpackbits", lambda raw, count: words.append(len(raw)) or unpack(raw, count=count))
    shape = torch.Size([1 << 12, 1 << 12])
    space = ShardedSpace([Piece(0, shape, (4000, 0), torch.Size([8, 1 << 12]))], shape.numel(), WholeSpace(1).ranks)
    space.rademacher(1, seed=0, dtype=torch.float32, device="cpu")
    assert sum(words) * 8 <= 8 * (1 << 12) + 512


def test_boxes_outside_their_parameter_or_vector_are_refused():
    with pytest.raises(ArgumentError, match="does not lie in a parameter"):
        piece(0, (6, 0), (2, 300))
    with pytest.raises(ArgumentError, match="outside a vector of 10"):
        ShardedSpace([piece(0, (0, 0), (1, 300))], 10, WholeSpace(1).ranks)


def test_stretches_of_a_piece_hold_each_of_its_numbers_once():
    one = piece(3, (1, 2, 13), (2, 2, 40))
    for most in (1, 37, 71, 1 << 20):
        found = list(boxes.blocks(one, most))
        assert sum(block.kept for block in found) == one.size
        assert max(block.length for block in found) <= max(most, 1)
