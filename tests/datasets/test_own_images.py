from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gnpractical.datasets.own_images import find_images, output_names, read_pixels


@pytest.fixture
def folder(tmp_path):
    for name in ("a.jpg", "b.PNG", "notes.txt", "sub/a.jpg", "out/a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def test_files_folders_and_patterns(folder):
    def found(*inputs):
        paths = find_images(inputs, folder / "out", ".lock")
        return [str(p.relative_to(folder)) for p in paths]

    assert found(str(folder)) == ["a.jpg", "b.PNG", "sub/a.jpg"]
    assert found(f"{folder}/*.jpg", f"{folder}/sub", f"{folder}/a.jpg") == ["a.jpg", "sub/a.jpg"]
    assert found(f"{folder}/notes.txt") == ["notes.txt"]  # named itself, it is tried


def test_pictures_of_runs_are_left_out(folder, caplog):
    (folder / "sub" / ".lock").write_text("")
    (folder / "dangling.png").symlink_to(folder / "gone.png")  # to be named by the reader
    (folder / "loop.png").symlink_to(folder / "loop.png")
    names = [p.name for p in find_images([str(folder)], folder / "out", ".lock")]
    assert names == ["a.jpg", "b.PNG", "dangling.png", "loop.png"]
    assert "1 pictures in folders of runs are left out" in caplog.text
    (folder / "runs").mkdir()
    (folder / "sub").rename(folder / "runs" / "sub")
    with pytest.raises(ValueError, match="those of runs are taken when their own folder is named"):
        find_images([str(folder / "runs")], folder / "out", ".lock")
    (folder / "runs" / "sub").rename(folder / "sub")
    assert find_images([str(folder / "sub")], folder / "out", ".lock") == [folder / "sub/a.jpg"]


def test_no_name_twice():
    paths = [Path("/in") / name for name in ("a.jpg", "a.png", "b.jpg", "sub/a.jpg", "c.d.jpg")]
    names = output_names(paths, ".jpg")
    assert names == ["a.jpg.jpg", "a.png.jpg", "b.jpg", "sub/a.jpg", "c.d.jpg"]
    assert output_names([Path("/in/sub/a.jpg")], ".png") == ["a.png"]
    paths = [Path("/in") / name for name in ("a.jpg", "a.png", "a.jpg.jpg", "b.png", "b.jpg/c.png")]
    names = output_names(paths, ".jpg")
    assert names == ["a.jpg.jpg", "a.png.jpg", "a.jpg.jpg.jpg", "b.png.jpg", "b.jpg/c.jpg"]


def test_links_to_the_output_folder(folder):
    (folder / "link").symlink_to(folder / "sub")
    for inputs, output in (("sub", "link"), ("link", "sub")):
        with pytest.raises(ValueError, match="holds all of --input: take another folder"):
            find_images([str(folder / inputs)], folder / output, ".lock")


def test_sixteen_bits_keep_their_higher_byte(tmp_path):
    values = np.array([[0, 255, 256], [40000, 65535, 511]], np.uint16)
    Image.fromarray(values).save(tmp_path / "16.png")
    np.testing.assert_array_equal(read_pixels(tmp_path / "16.png")[..., 1], values >> 8)
    Image.fromarray(np.full((2, 2), 70000, np.int32)).save(tmp_path / "32.tiff")
    with pytest.raises(ValueError, match="32.tiff: 32 bits a pixel"):
        read_pixels(tmp_path / "32.tiff")
