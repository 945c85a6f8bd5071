"""Asset: a file of the store that works as a path."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from gen_worker import Asset
from gen_worker.errors import ValidationError


@pytest.fixture
def asset(tmp_path: Path) -> Asset:
    file = tmp_path / "in.txt"
    file.write_bytes(b"hello")
    return Asset("in.txt", local_path=str(file))


def test_only_the_ref_is_required() -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode({"ref": "a"}), type=Asset) == Asset("a")
    fields = ("ref", "tenant_id", "local_path", "mime_type", "size_bytes", "sha256")
    assert Asset.__struct_fields__ == fields


def test_a_local_asset(asset: Asset) -> None:
    assert os.fspath(asset) == asset.local_path
    assert Path(asset).read_text() == "hello"
    assert asset.exists()
    with asset.open() as file:
        assert file.read() == b"hello"
    with asset.open("r") as file:
        assert file.read() == "hello"
    assert asset.read_bytes() == asset.read_bytes(max_bytes=5) == b"hello"


def test_too_large(asset: Asset) -> None:
    with pytest.raises(ValidationError, match=r"asset 'in.txt' has 5 bytes, at most 4 are allowed"):
        asset.read_bytes(4)


@pytest.mark.parametrize("mode", ["w", "a", "r+b", "x"])
def test_never_opened_for_writing(asset: Asset, mode: str) -> None:
    with pytest.raises(ValueError, match="opened for reading only"):
        asset.open(mode)


def test_an_asset_that_was_not_downloaded() -> None:
    asset = Asset("a/b")
    assert not asset.exists()
    with pytest.raises(FileNotFoundError, match="asset 'a/b' has no local file"):
        os.fspath(asset)
    with pytest.raises(FileNotFoundError, match="asset 'a/b' has no local file"):
        asset.read_bytes()
    assert not Asset("a", local_path="/nowhere/at/all").exists()
