"""Shards to batches: every sample once, any workers and ranks, exact resume, clear errors."""

from __future__ import annotations

import json
import os
import re
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_specs.rated import read_rated
from tests.train_helpers import (
    flac_bytes,
    members_of,
    record,
    state_sha256,
    tone_pcm,
    write_dataset,
    write_rated,
    write_tar,
)
from train.data.loading import _Ring, loader
from train.data.order import Order, epoch_order
from train.data.shards import list_shards, read_dataset_info
from train.data.stream import Batch, Batches, DecodedCache, ShardSamples


@pytest.fixture
def folder(tmp_path):
    return write_dataset(tmp_path / "shards", shards=3, samples=4)


def batches_of(folder, **changes):
    shards = list_shards(folder)
    counts = tuple(shard.samples for shard in shards)
    values = {"rated_clips": 0, "seed": 1, "batch": 5} | changes
    return Batches(ShardSamples(shards), Order(counts, **values))


def same(left, right):
    return len(left) == len(right) and all(
        all(torch.equal(mine, theirs) for mine, theirs in zip(a, b, strict=True))
        for a, b in zip(left, right, strict=True)
    )


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 5),
    buffer=st.integers(1, 50),
)
def test_an_epoch_has_every_sample_once(counts, seed, epoch, buffer):
    order = epoch_order(counts, seed, epoch, buffer)
    assert sorted(order) == list(range(sum(counts)))
    assert np.array_equal(order, epoch_order(counts, seed, epoch, buffer))


def test_the_silence_behind_a_short_sample_is_no_part_of_it(tmp_path):
    """The pipeline pads short recordings: rotation must not move that into the speech."""
    folder = write_dataset(tmp_path / "shards", 1, 1)
    pcm_T = tone_pcm(1)
    pcm_T[50_000:] = 0
    members = [
        ("00000000.flac", flac_bytes(pcm_T)),
        ("00000000.json", json.dumps(record("00000000", 3.0, pcm_T)).encode()),
    ]
    write_tar(folder / "shard-000000.tar", members, 1)
    (length, *_) = batches_of(folder, batch=2)[0].lengths_B.tolist()
    assert 49_000 < length <= 50_000


def test_epochs_and_seeds_differ():
    orders = {tuple(epoch_order([50, 50], *key, 100)) for key in [(0, 0), (0, 1), (1, 0)]}
    assert len(orders) == 3


def test_batches_cross_epochs_without_loss():
    order = Order((3, 4), 0, seed=0, batch=5)
    numbers = [item.number for step in range(7) for item in order.items(step)]
    for epoch in range(5):
        assert sorted(numbers[7 * epoch : 7 * epoch + 7]) == list(range(7))


@pytest.mark.parametrize("share", [0.2, 0.33, 0.5])
def test_rated_share_is_exact(share):
    order = Order((10,), 3, seed=0, batch=6, rated_share=share)
    for steps in (1, 7, 50):
        rated = sum(item.rated for step in range(steps) for item in order.items(step))
        assert rated == int(steps * 6 * share + 1e-9)
    assert {len(order.items(step)) for step in range(20)} == {6}


def test_workers_do_not_change_the_sequence(folder):
    batches = batches_of(folder)
    alone = list(loader(batches, 0, 6, workers=0))
    assert same(alone, list(loader(batches, 0, 6, workers=2)))
    assert same(alone[3:], list(loader(batches, 3, 6, workers=2)))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_batch_is_not_overwritten_by_later_ones(folder, workers):
    """Workers fill a few places in turn, far ahead of a slow reader."""
    batches, kept = batches_of(folder), []
    for batch in loader(batches, 0, 25, workers):
        kept.append(batch)
        time.sleep(0.02)
    assert same(kept, [batches[step] for step in range(25)])


def test_pinned_batches_are_the_same(folder, monkeypatch):
    """Pinning itself needs a GPU; here it is a copy."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    batches = batches_of(folder)
    ring = _Ring(batches, places=2)
    pinned = [ring[step].pin_memory() for step in range(4)]
    assert same(pinned, list(loader(batches, 0, 4, workers=0)))
    assert same(pinned, list(loader(batches, 0, 4, workers=0, pin=True)))


def test_cache_gives_the_same(folder):
    batches = batches_of(folder)
    cached = Batches(ShardSamples(list_shards(folder), DecodedCache(12)), batches.order)
    expected = list(loader(batches, 0, 6, workers=0))
    assert same(expected, list(loader(cached, 0, 6, workers=1)))
    assert same(expected, list(loader(cached, 0, 6, workers=0)))


def test_rated_clips_are_mixed_in(folder, tmp_path):
    clips = read_rated(write_rated(tmp_path / "rated"))
    shards = list_shards(folder)
    order = Order((4, 4, 4), len(clips), seed=0, batch=5, rated_share=0.2)
    batch = Batches(ShardSamples(shards), order, clips)[0]
    assert batch.pcm_BT.shape == (5, 122_880)
    assert float(batch.mos_B[-1]) in {np.float32(clip.mos) for clip in clips}
    assert batch.lengths_B.tolist() == [122_880] * 4 + [32_000]
    assert not batch.pcm_BT[-1, 32_000:].any()


def ranks_of(folder, world, **changes):
    """The batches of every rank of a run."""
    alone = batches_of(folder, **changes)
    return [Batches(alone.samples, alone.order, (), rank, world) for rank in range(world)]


def interleaved(parts):
    """The batch that the ranks' shares make together."""
    world, total = len(parts), sum(len(part.mos_B) for part in parts)
    whole = Batch(
        *(torch.empty((total, *field.shape[1:]), dtype=field.dtype) for field in parts[0])
    )
    for rank, part in enumerate(parts):
        for ours, theirs in zip(whole, part, strict=True):
            ours[rank::world] = theirs
    return whole


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    world=st.integers(1, 4),
    each=st.integers(1, 3),
    seed=st.integers(0, 2**40),
)
def test_ranks_see_every_sample_of_an_epoch_once(counts, world, each, seed):
    order = Order(tuple(counts), 0, seed, batch=world * each)
    shares = [Batches(ShardSamples([]), order, (), rank, world) for rank in range(world)]
    steps = range(sum(counts))  # a whole number of epochs
    numbers = [[item.number for k in steps for item in share._items(k)] for share in shares]
    assert {len(mine) for mine in numbers} == {each * len(steps)}
    once = sorted(list(range(sum(counts))) * world * each)
    assert sorted(number for mine in numbers for number in mine) == once


def test_two_ranks_make_the_batch_of_one_process(folder):
    alone = [batches_of(folder, batch=4)[step] for step in range(6)]
    both = ranks_of(folder, 2, batch=4)
    assert same(alone, [interleaved([share[step] for share in both]) for step in range(6)])


def test_a_run_goes_on_with_another_number_of_ranks_and_workers(folder):
    expected = list(loader(batches_of(folder, batch=4), 0, 9, workers=0))
    got = []
    for first, last, world, workers in ((0, 2, 1, 0), (2, 5, 2, 2), (5, 7, 4, 1), (7, 9, 1, 2)):
        feeds = [loader(share, first, last, workers) for share in ranks_of(folder, world, batch=4)]
        got += [interleaved(parts) for parts in zip(*feeds, strict=True)]
    assert same(expected, got)


@pytest.mark.parametrize(("batch", "world"), [(5, 2), (4, 8)])
def test_a_batch_that_cannot_be_shared(folder, batch, world):
    with pytest.raises(ValueError, match=rf"batch of {batch} .* {world} processes.*multiple"):
        ranks_of(folder, world, batch=batch)


def test_more_shards_than_are_kept_open(folder, monkeypatch):
    expected = list(loader(batches_of(folder), 0, 4, workers=0))
    monkeypatch.setattr("train.data.stream.OPEN_SHARDS", 1)
    batches = batches_of(folder)
    assert same(expected, list(loader(batches, 0, 4, workers=0)))
    assert len(batches.samples._files) == 1


def test_unfinished_shards_are_left_out(folder):
    (folder / "shard-000001.json").unlink()
    assert [shard.tar.name for shard in list_shards(folder)] == [
        "shard-000000.tar",
        "shard-000002.tar",
    ]


def test_counts_come_from_the_tar_where_the_record_has_none(tmp_path):
    write_tar(tmp_path / "shard-000000.tar", members_of(range(3)))
    assert list_shards(tmp_path)[0].samples == 3


def test_no_shards(tmp_path):
    with pytest.raises(ValueError, match="no shards"):
        list_shards(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        list_shards(tmp_path / "none")
    with pytest.raises(ValueError, match=r"dataset\.json is missing"):
        read_dataset_info(tmp_path)


def test_no_whole_shard(folder):
    for path in folder.glob("shard-*.json"):
        path.unlink()
    with pytest.raises(ValueError, match="none of its 3 shards is whole"):
        list_shards(folder)


def test_truncated_tar(folder):
    tar = folder / "shard-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=r"shard-000001\.tar.*truncated"):
        list_shards(folder)


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:200_000], lambda data: b"\xff" * (1 << 16) + data[1 << 16 :]],
    ids=["cut", "overwritten"],
)
def test_a_damaged_tar_whose_record_fits(folder, damage):
    tar = folder / "shard-000001.tar"
    tar.write_bytes(damage(tar.read_bytes()))
    about = {"tar_bytes": tar.stat().st_size, "samples": 4}
    tar.with_suffix(".json").write_text(json.dumps(about))
    samples = ShardSamples(list_shards(folder))
    with pytest.raises(ValueError, match=r"shard-000001\.tar"):
        samples.read(4)


@pytest.fixture
def hashed(folder):
    """The folder's records have their tars' hashes, as the pipeline writes them."""
    for tar in folder.glob("*.tar"):
        state_sha256(tar)
    return folder


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shard", [0, 1, 2])
def test_a_changed_label_is_not_trained_on(hashed, shard, workers):
    tar = hashed / f"shard-{shard:06d}.tar"
    data, old = bytearray(tar.read_bytes()), tar.stat()
    digit = re.search(rb'"mos": \d\.(\d)', data)
    data[digit.start(1)] ^= 1  # '2' becomes '3'
    tar.write_bytes(data)
    os.utime(tar, ns=(old.st_atime_ns, old.st_mtime_ns))
    with pytest.raises(ValueError, match=rf"{tar.name}: content differs from its record's hash"):
        list(loader(batches_of(hashed), 0, 4, workers))
    with pytest.raises(ValueError, match=rf"{tar.name}: content differs"):  # evaluate's way
        samples = ShardSamples(list_shards(hashed))
        [samples.record(number) for number in range(len(samples))]


def test_a_tar_is_hashed_once_in_a_run_and_again_when_it_changes(hashed, monkeypatch):
    found = []
    monkeypatch.setattr("train.data.stream.OPEN_SHARDS", 1)
    monkeypatch.setattr(
        "train.data.stream.require_sha256", lambda file, where, _: found.append(where)
    )
    batches = batches_of(hashed)
    list(loader(batches, 0, 8, workers=0))
    assert sorted(found) == sorted(str(tar) for tar in hashed.glob("*.tar"))
    os.utime(hashed / "shard-000001.tar", ns=(1, 1))
    list(loader(batches, 0, 8, workers=0))
    assert found[3:] == [str(hashed / "shard-000001.tar")]


def test_errors_come_through_workers(tmp_path):
    label = json.dumps(record("00000000", None, tone_pcm(0))).encode()
    members = [("00000000.flac", flac_bytes(tone_pcm(0))), ("00000000.json", label)]
    write_tar(tmp_path / "shard-000000.tar", members, 1)
    with pytest.raises(ValueError, match="mos"):
        list(loader(batches_of(tmp_path, batch=2), 0, 2, workers=1))
