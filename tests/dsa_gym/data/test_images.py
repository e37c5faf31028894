"""Images of users: folders, NPZ files and tables read alike, and what cannot be used is counted, not fatal."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dsa_gym.data import DataError
from dsa_gym.data.fetch import DownloadLimits
from dsa_gym.data.images import ImageReport, read_images


def png(value: int, shape: tuple[int, int] = (8, 8)) -> bytes:
    """A file with an image of one grey."""
    content = io.BytesIO()
    Image.new("L", shape, value).save(content, "PNG")
    return content.getvalue()


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows as a table of the kind that the name says."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    if path.suffix == ".jsonl":
        return write(path, "".join(json.dumps(row) + "\n" for row in rows))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
    writer.writeheader()
    writer.writerows(rows)
    return write(path, text.getvalue())


def read(path: Path, **arguments: Any) -> tuple[dict[str, list[tuple[str, int]]], ImageReport]:
    """Conditions and the greys of one pixel, by user."""
    users, report = read_images(path, **arguments)
    assert [user.user for user in users] == sorted(user.user for user in users)
    assert report.users == len(users) and report.kept == sum(len(user.images) for user in users)
    assert report.read == report.kept + sum(report.skipped.values())
    found = {}
    for user in users:
        greys = [int(grey) for grey in user.images.reshape(len(user.images), -1)[:, 0]]
        found[user.user] = list(zip(user.conditions, greys, strict=True))
    return found, report


# Folders


def test_folder(tmp_path: Path) -> None:
    write(tmp_path / "bob" / "cat" / "002.png", png(2))
    write(tmp_path / "bob" / "cat" / "001.PNG", png(1))
    write(tmp_path / "bob" / "animals" / "dog" / "x.png", png(3))
    write(tmp_path / "ann" / "a red car.png", png(4))
    write(tmp_path / "ann" / ".cache" / "a.png", png(9))
    write(tmp_path / ".git" / "a.png", png(9))
    write(tmp_path / "ann" / "notes.txt", "x")
    write(tmp_path / "ann" / "broken.jpg", "x")
    write(tmp_path / "stray.png", png(9))
    (tmp_path / "nobody").mkdir()
    users, report = read(tmp_path)
    assert users == {"ann": [("a red car", 4)], "bob": [("animals/dog", 3), ("cat", 1), ("cat", 2)]}
    assert report.skipped == {"corrupt": 1, "in no user's folder": 1, "not an image file": 1}


@pytest.mark.parametrize(("channels", "shape"), [(1, (1, 5, 5)), (3, (1, 5, 5, 3))])
def test_shapes(tmp_path: Path, channels: int, shape: tuple[int, ...]) -> None:
    write(tmp_path / "ann" / "a.png", png(7))
    ((user,), _) = read_images(tmp_path, size=5, channels=channels)
    assert user.images.shape == shape and user.images.dtype == np.uint8 and (user.images == 7).all()


# NPZ files


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **{name: np.asarray(values) for name, values in arrays.items()})
    return path


def greys(*values: int, shape: tuple[int, ...] = (4, 4)) -> np.ndarray:
    return np.stack([np.full(shape, value, np.uint8) for value in values])


def test_npz(tmp_path: Path) -> None:
    path = npz(tmp_path / "a.npz", image=greys(1, 2, 3), user=["b", "a", "b"])
    assert read(path)[0] == {"a": [("", 2)], "b": [("", 1), ("", 3)]}
    path = npz(tmp_path / "a.npz", image=greys(1, 2, 3, 4), user=[10, 9, 10, 9], condition=["x", "y", "z", ""])
    users, report = read(path)
    assert users == {"10": [("x", 1), ("z", 3)], "9": [("y", 2)]} and report.skipped == {"no caption": 1}
    path = npz(tmp_path / "a.npz", x=greys(1, 2), writer=["b", " "], label=[5, 6])
    users, report = read(path, image_column="x", user_column="writer", condition_column="label")
    assert users == {"b": [("5", 1)]} and report.skipped == {"no user": 1}


def test_omniglot(tmp_path: Path) -> None:
    arrays = {"alphabet": ["Greek", "Latin"], "character": ["alpha", "a"], "drawer": ["01", "01"]}
    path = npz(tmp_path / "a.npz", image=greys(1, 2), **arrays)
    assert read(path)[0] == {"Greek/01": [("Greek/alpha", 1)], "Latin/01": [("Latin/a", 2)]}
    assert read(path, user_column="drawer", condition_column="character")[0] == {"01": [("alpha", 1), ("a", 2)]}
    path = npz(tmp_path / "a.npz", image=greys(1, 2), user=["x", "y"], **arrays)
    assert list(read(path)[0]) == ["x", "y"]


@pytest.mark.parametrize("shape", [(6, 8), (8, 6, 1), (6, 6, 3), (6, 6, 4)])
@pytest.mark.parametrize("channels", [1, 3])
def test_npz_of_other_shapes(tmp_path: Path, shape: tuple[int, ...], channels: int) -> None:
    images = greys(255, shape=shape)
    ((user,), _) = read_images(npz(tmp_path / "a.npz", image=images, user=["a"]), size=4, channels=channels)
    assert user.images.shape == ((1, 4, 4) if channels == 1 else (1, 4, 4, 3)) and (user.images == 255).all()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"image": greys(1)}, "has no column 'user'; it has 'image'"),
        ({"user": ["a"]}, "has no column 'image'"),
        ({"image": greys(1).astype(np.float32), "user": ["a"]}, r"'image' has shape \(1, 4, 4\) and type float32"),
        ({"image": greys(1)[0], "user": list("abcd")}, r"'image' has shape \(4, 4\)"),
        ({"image": greys(1, shape=(4, 4, 2)), "user": ["a"]}, r"'image' has shape \(1, 4, 4, 2\)"),
        ({"image": greys(1, shape=(4, 0)), "user": ["a"]}, r"'image' has shape \(1, 4, 0\)"),
        ({"image": greys(1, 2), "user": ["a"]}, r"'user' has shape \(1,\) .* of shape \(2,\) as in 'image'"),
        ({"image": greys(1), "user": [1.5]}, "'user' has shape .* type float64, expected strings or integers"),
        ({"image": greys(1), "user": np.array([{}], dtype=object)}, "damaged, no NPZ file, or has arrays of objects"),
    ],
)
def test_wrong_arrays(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_images(npz(tmp_path / "a.npz", **arrays))


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    good = npz(tmp_path / "a.npz", image=greys(1, 2), user=["a", "b"]).read_bytes()
    np.save(tmp_path / "a.npy", greys(1))
    for content in (b"", b"nonsense", good[:100], good[:-30], (tmp_path / "a.npy").read_bytes()):
        with pytest.raises(DataError, match=r"b\.npz is (damaged, no NPZ file|no NPZ file)"):
            read_images(write(tmp_path / "b.npz", content))


# Tables


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    "names", [("path", "caption", "user"), ("filename", "TEXT", "uploader"), ("file_name", "text", "user_id")]
)
def test_tables_read_alike(tmp_path: Path, suffix: str, names: tuple[str, str, str]) -> None:
    for value in (1, 2, 3):
        write(tmp_path / "images" / f"{value}.png", png(value))
    data = [("images/2.png", "two", "b"), ("images/1.png", "one", "a"), ("images/3.png", " three ", "b")]
    rows = [{**dict(zip(names, row, strict=True)), "other": "x"} for row in data]
    path = table(tmp_path / f"t.{suffix}", rows)
    assert read(path)[0] == {"a": [("one", 1)], "b": [("two", 2), ("three", 3)]}


def test_named_columns(tmp_path: Path) -> None:
    write(tmp_path / "a.png", png(1))
    path = table(tmp_path / "t.csv", [{"who": "x", "what": "cat", "where": "a.png", "user": "y", "caption": "dog"}])
    assert read(path, image_column="where")[0] == {"y": [("dog", 1)]}
    columns = {"image_column": "where", "user_column": "who", "condition_column": "what"}
    assert read(path, **columns)[0] == {"x": [("cat", 1)]}
    for name in ("user_column", "condition_column", "image_column", "aesthetic_column"):
        with pytest.raises(DataError, match=r"t\.csv has no column 'none'"):
            read_images(path, **{name: "none"})
    with pytest.raises(DataError, match=r"has no column with images: give image_column, or call it 'image'"):
        read_images(path)


@pytest.mark.parametrize("packed", [False, True])
def test_parquet_with_images_inside(tmp_path: Path, packed: bool) -> None:
    rows = [{"image": {"bytes": png(5), "path": "a.png"} if packed else png(5), "label": 3, "user": "a"}] * 2
    assert read(table(tmp_path / "t.parquet", rows))[0] == {"a": [("3", 5), ("3", 5)]}


def test_flickr30k(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "1.jpg", png(1))
    write(tmp_path / "flickr30k_images" / "2.jpg", png(2))
    content = (
        "image_name| comment_number| comment\n"
        "1.jpg| 0| Two men , one with a hat | smile .\n1.jpg| 1| Men .\n"
        "2.jpg| 0   A row without its delimiter .\n2.jpg| 1| A dog .\n2.jpg| 2| A dog runs .\n3.jpg| 0| Not there .\n"
    )
    users, report = read(write(tmp_path / "results.csv", content))
    assert users == {"results": [("Two men , one with a hat | smile .", 1), ("A dog .", 2)]}
    assert report.skipped == {"another caption of the same image": 2, "missing file": 1, "no caption": 1}
    assert "no column with users" in caplog.text


def test_bad_rows_are_counted_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "good.png", png(1))
    write(tmp_path / "large.png", png(1, (101, 100)))
    write(tmp_path / "broken.png", png(1)[:40])
    write(tmp_path / "empty.png", b"")
    good = {"path": "good.png", "caption": "x", "user": "a", "aesthetic": 6.5}
    changes: list[dict[str, Any]] = [
        {},
        {"path": "large.png"},
        {"path": "broken.png"},
        {"path": "empty.png"},
        {"path": "none.png"},
        {"path": None},
        {"path": "."},
        {"path": "a\0b"},
        {"path": "x" * 5000},
        {"path": "http://127.0.0.1:1/a.png"},
        {"caption": "  "},
        {"caption": None},
        {"user": ""},
        {"user": 1.5},
        {"aesthetic": 5.9},
        {"aesthetic": None},
        {"aesthetic": "nan"},
    ]
    path = table(tmp_path / "t.jsonl", [good | change for change in changes] + [{"path": "good.png", "user": "a"}])
    with caplog.at_level(logging.WARNING):
        users, report = read(path, max_pixels=10_000, min_aesthetic=6)
    assert users == {"a": [("x", 1)]}
    assert json.loads(json.dumps(asdict(report))) == {
        "read": 18,
        "kept": 1,
        "users": 1,
        "skipped": {
            "below aesthetic score": 1,
            "corrupt": 2,
            "missing file": 4,
            "no aesthetic score": 2,
            "no caption": 3,
            "no image": 1,
            "no user": 2,
            "not downloaded": 1,
            "too large": 1,
        },
    }
    assert "skipped 17 of 18 images: below aesthetic score 1, corrupt 2" in caplog.text


def test_paths_do_not_lead_outside_the_folder(tmp_path: Path) -> None:
    write(tmp_path / "secret.png", png(9))
    folder = tmp_path / "data"
    write(folder / "good.png", png(1))
    os.symlink(tmp_path / "secret.png", folder / "link.png")
    places = ["../secret.png", "x/../../secret.png", str(tmp_path / "secret.png"), "link.png", "../../../etc/hostname"]
    places += [str(folder / "good.png")]
    path = table(folder / "t.csv", [{"path": place, "user": "a"} for place in places])
    users, report = read(path)
    assert users == {"a": [("", 1)]} and report.skipped == {"outside the folder": 5}


def test_nothing_usable(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", [{"path": "a.png", "user": "a"}, {"path": "b.png", "user": ""}])
    with pytest.raises(DataError, match=r"t\.csv has no image .* of 2 skipped: missing file 1, no user 1"):
        read_images(path)
    with pytest.raises(DataError, match=r"results\.csv has no image that can be used$"):
        read_images(write(tmp_path / "results.csv", "image_name| comment_number| comment\n"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty has no image"):
        read_images(tmp_path / "empty")


def test_arguments_are_checked(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", [{"path": "a.png", "user": "a"}])
    for arguments in ({"size": 0}, {"channels": 2}, {"max_pixels": 0}):
        with pytest.raises(ValueError, match="expected size >= 1, channels 1 or 3"):
            read_images(path, **arguments)
    with pytest.raises(DataError, match="source='zip': expected one of 'auto', 'folder', 'npz', 'table'"):
        read_images(path, source="zip")
    with pytest.raises(DataError, match=r"source='folder': .* is a file"):
        read_images(path, source="folder")
    with pytest.raises(DataError, match=r"source='table': .* is a folder"):
        read_images(tmp_path, source="table")
    with pytest.raises(DataError, match="there is no file or folder"):
        read_images(tmp_path / "none")
    with pytest.raises(ValueError, match=r"user_column='x': .* is read as source='folder'"):
        read_images(tmp_path, user_column="x")
    with pytest.raises(ValueError, match=r"min_aesthetic='0': .* is read as source='folder'"):
        read_images(tmp_path, min_aesthetic=0)
    with pytest.raises(DataError, match="has no aesthetic score: give aesthetic_column"):
        read_images(path, min_aesthetic=0)


# Downloads


class _Handler(BaseHTTPRequestHandler):
    """`/VALUE/SECONDS` is an image of this grey after so long."""

    def do_GET(self) -> None:
        value, _, delay = self.path.strip("/").partition("/")
        time.sleep(float(delay or 0))
        self.send_response(200 if value.isdigit() or value == "page" else 404)
        self.end_headers()
        self.wfile.write(png(int(value)) if value.isdigit() else b"<html>")

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_downloads_are_in_the_order_of_the_table(tmp_path: Path, url: str) -> None:
    write(tmp_path / "a.png", png(200))
    places = [*(f"{url}/{name}" for name in ("1/0.1", "2", "none", "page", "3", "3")), "a.png", "ftp://x/a.png"]
    path = table(tmp_path / "t.csv", [{"URL": place, "TEXT": "x", "user": "a"} for place in places])
    users, report = read(path, download=True, download_limits=DownloadLimits(workers=4))
    assert users == {"a": [("x", 1), ("x", 2), ("x", 3), ("x", 200)]}
    assert report.skipped == {
        "another caption of the same image": 1,
        "corrupt": 1,
        "download failed": 1,
        "not http or https": 1,
    }
    users, report = read(path)
    assert users == {"a": [("x", 200)]} and report.skipped["not downloaded"] == 6


def test_downloads_keep_to_the_limits(tmp_path: Path, url: str) -> None:
    path = table(tmp_path / "t.csv", [{"url": f"{url}/{place}", "user": "a"} for place in ("1/0.5", "2", "page")])
    limits = DownloadLimits(max_bytes=20, timeout=0.2, total_timeout=0.3)
    with pytest.raises(DataError, match="of 3 skipped: corrupt 1, download timed out 1, download too large 1"):
        read_images(path, download=True, download_limits=limits)
