"""Checkpoint files: whole or not at all, checked, read without running code, and only the newest kept."""

import os
import pickle
import resource
import struct

import pytest
import torch

from sparse_rtrl.training.checkpoint import (
    HEADER,
    CheckpointError,
    CheckpointFolder,
    load_checkpoint,
    save_checkpoint,
)

STATE = {
    "tensor": torch.arange(600.0).view(20, 30).t(),
    "view": torch.arange(10)[3:5],
    "nested": {"a": [1, 2.5, None, True, "text"], 3: (torch.tensor(True), {})},
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "update-000000001-step-000000000007.ckpt"
    save_checkpoint(path, STATE)
    return path


def test_what_was_saved_is_read_with_its_strides(path):
    found = load_checkpoint(path)
    assert torch.equal(found["tensor"], STATE["tensor"]) and found["tensor"].stride() == (1, 30)
    assert torch.equal(found["view"], STATE["view"])
    assert found["nested"]["a"] == STATE["nested"]["a"] and bool(found["nested"][3][0])
    assert list(path.parent.iterdir()) == [path]
    assert torch.equal(load_checkpoint(str(path))["tensor"], STATE["tensor"])


@pytest.mark.parametrize("length", [0, 5, 16, HEADER.size - 1, HEADER.size, HEADER.size + 100, -1])
def test_truncated(path, length):
    content = path.read_bytes()
    path.write_bytes(content[:length])
    with pytest.raises(CheckpointError, match="is truncated" if length not in (0, 5) else "is not a checkpoint"):
        load_checkpoint(path)
    assert path.read_bytes() == content[:length]


def test_any_flipped_bit_is_noticed(path):
    content = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    places = [*range(HEADER.size), *torch.randint(HEADER.size, len(content), (200,), generator=generator).tolist()]
    for place in places:
        bad = bytearray(content)
        bad[place] ^= 1 << (place % 8)
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"damaged|truncated|not a checkpoint|format version"):
            load_checkpoint(path)
    path.write_bytes(content + b"x")
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(path)
    path.write_bytes(content)
    load_checkpoint(path)


def test_foreign_and_newer(path, tmp_path):
    torch.save(STATE, tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match=r"foreign\.pt is not a checkpoint of sparse_rtrl"):
        load_checkpoint(tmp_path / "foreign.pt")
    magic, version, length, checksum = HEADER.unpack(path.read_bytes()[: HEADER.size])
    path.write_bytes(HEADER.pack(magic, version + 1, length, checksum) + path.read_bytes()[HEADER.size :])
    with pytest.raises(CheckpointError, match=r"format version 2, .* reads version 1: it was written by a newer one"):
        load_checkpoint(path)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_code_in_a_file_is_not_executed(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match=r"state\['deep'\]\[1\] must be a tensor, .* got Malicious"):
        save_checkpoint(path, {"deep": [1, Malicious()]})
    monkeypatch.setattr("sparse_rtrl.training.checkpoint._check_plain", lambda value, where: None)
    save_checkpoint(path, {"deep": [1, Malicious()]})
    with pytest.raises(CheckpointError, match="nothing of it was executed"):
        load_checkpoint(path)
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(Malicious()))  # what an ordinary load would have done
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("limit", [0, 10, HEADER.size + 500])
def test_a_full_disk_leaves_the_checkpoints_before(tmp_path, limit):
    folder = CheckpointFolder(tmp_path, keep=1)
    first, _ = folder.save(STATE, 1, 7)
    content = first.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Every write beyond the limit fails, as on a full disk, though with EFBIG instead of ENOSPC.
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(CheckpointError, match=rf"could not be written: File too large; {first} is intact"):
            folder.save(STATE, 2, 14)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert folder.paths() == list(tmp_path.iterdir()) == [first]
    assert first.read_bytes() == content
    second, _ = folder.save(STATE, 2, 14)
    assert folder.paths() == [second]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_save_that_fails_late_leaves_what_was_there(tmp_path, monkeypatch, call):
    folder = CheckpointFolder(tmp_path)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left on device; there is no"), monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        folder.save(STATE, 1, 7)
    assert not list(tmp_path.iterdir())
    path, _ = folder.save(STATE, 1, 7)
    content = path.read_bytes()
    with pytest.raises(CheckpointError), monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        save_checkpoint(path, {"other": 1})
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]


def test_the_rename_comes_after_the_content_is_on_the_disk(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, original=original: calls.append(name) or original(*a))
    save_checkpoint(tmp_path / "a.ckpt", STATE)
    assert calls == ["fsync", "replace", "fsync"]


def test_the_newest_are_kept_and_left_overs_removed(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    paths = [folder.save({"number": n}, n // 2, 10 * n)[0] for n in range(5)]
    assert folder.paths() == paths[-2:] and folder.load_newest() == (paths[-1], {"number": 4})
    (tmp_path / f".{paths[0].name}.new").write_bytes(b"half written")
    assert CheckpointFolder(tmp_path, keep=2).paths() == paths[-2:]
    assert sorted(tmp_path.iterdir()) == paths[-2:]
    paths[-1].write_bytes(paths[-1].read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=rf"truncated.*resume from an earlier one by its path: {paths[-2]}"):
        folder.load_newest()
    folder.set_aside_after(paths[-2])
    assert folder.load_newest() == (paths[-2], {"number": 3})
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        CheckpointFolder(tmp_path, keep=0)


def test_an_empty_folder_has_no_newest(tmp_path):
    assert CheckpointFolder(tmp_path / "new").load_newest() is None
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        (tmp_path / "new" / "update-1.ckpt").write_bytes(struct.pack("<I", 1))
        CheckpointFolder(tmp_path / "new").load_newest()
