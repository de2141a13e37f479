"""Groups are found in names and pictures; counters and plain pictures do not make a group of a class."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sample_images import encode, noise

from mexit.data import digits, folder
from mexit.data.dataset import DataSet, FileImages
from mexit.data.groups import Grouping, find_groups
from mexit.data.near_duplicates import near_duplicates, thumbnails
from mexit.data.splits import split
from mexit.errors import BadInput, UsageError

TRACKS, FRAMES = 5, 4


def scene(seed: int) -> np.ndarray:
    """A random picture with large structures, (48, 48, 3)."""
    small = Image.fromarray(noise(5, 5, 3, seed=seed))
    return np.asarray(small.resize((48, 48), Image.Resampling.BICUBIC))


def frame(seed: int, number: int) -> np.ndarray:
    """A picture of scene `seed` that is like its other frames, but no near-duplicate of them."""
    moved = np.roll(scene(seed), 3 * number, axis=1).astype(int)
    return np.clip(moved + 12 * (number % 3) - 12, 0, 255).astype(np.uint8)


def make(root: Path, names: Callable[[int, int], str], *, film: bool = True, classes: str = "ab") -> DataSet:
    """Class folders with pictures of `TRACKS` tracks of `FRAMES` frames; without `film` all show different scenes."""
    seeds = itertools.count(1000)
    for label, name in enumerate(classes):
        for track, number in itertools.product(range(TRACKS), range(FRAMES)):
            path = root / name / names(track, number)
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = frame(10 * label + track, number) if film else scene(next(seeds))
            path.write_bytes(encode(picture, "JPEG" if path.suffix == ".jpg" else "PNG"))
    return folder.load(root)


def found(data: DataSet, how: str = "auto") -> Grouping:
    grouping = find_groups(data, how)
    assert grouping is not None
    return grouping


@pytest.mark.parametrize(
    ("names", "rule"),
    [
        (lambda track, number: f"{track:05}_{number:05}.png", "track_frame"),
        (lambda track, number: f"clip{track}-frame-{number:04}.jpg", "track_frame"),
        (lambda track, number: f"p{track:02}_s1 ({number}).png", "track_frame"),
        (lambda track, number: f"video{track}frame{number}.png", "track_frame"),
        (lambda track, number: f"clip{track}_mp4-{number}_jpg.rf.{number:08x}.jpg", "track_frame"),
        (lambda track, number: f"IMG_20240101_12{track:02}00_{number:03}.png", "time"),
        (lambda track, number: f"PXL_20240101_12{track:02}{2 * number:02}123.png", "time"),
        (lambda track, number: f"2024-01-{track + 1:02} 12.00.{3 * number:02}.png", "time"),
        (lambda track, number: f"{1704110400 + 600 * track + number}250.png", "time"),
        (lambda track, number: f"00{number}IMG_BURST2024010112{10 * track:02}00{number:03}.png", "time"),
        (lambda track, number: f"film{track}/{number:04}.png", "subfolder"),
    ],
)
def test_sequences_in_names_are_groups(tmp_path: Path, names: Callable[[int, int], str], rule: str) -> None:
    data = make(tmp_path, names)
    grouping = found(data)
    assert grouping.how == f"10 groups of pictures by {rule} in the names"
    own = {frozenset(np.flatnonzero(grouping.ids == i).tolist()) for i in range(10)}
    order = {name: i for i, name in enumerate(data.images.names)}
    tracks = itertools.product("ab", range(TRACKS))
    assert own == {frozenset(order[f"{c}/{names(track, i)}"] for i in range(FRAMES)) for c, track in tracks}


def test_a_track_number_counts_in_its_own_folder_only(tmp_path: Path) -> None:
    make(tmp_path / "train", lambda track, number: f"{track:05}_{number:05}.png")
    for label, name in enumerate("ab"):
        (tmp_path / "test" / name).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "test" / name / f"00001_{number:05}.png").write_bytes(encode(frame(50 + label, number)))
    grouping = found(folder.load(tmp_path))
    assert grouping.how == "12 groups of pictures (2 in the test part) by track_frame in the names"


def test_a_track_with_frames_in_train_and_test_is_one_group(tmp_path: Path) -> None:
    for part, numbers in (("train", range(6)), ("valid", (6, 7)), ("test", (8, 9))):
        for label, name in enumerate("ab"):
            (tmp_path / part / name).mkdir(parents=True)
            for track, number in itertools.product(range(TRACKS), numbers):
                picture = frame(10 * label + track, number)
                (tmp_path / part / name / f"{track:05}_{number:05}.png").write_bytes(encode(picture))
    data = folder.load(tmp_path)
    grouping = found(data)
    assert grouping.how == "10 groups of pictures (10 in the test part) by track_frame in the names"
    divided = split(data, grouping)
    assert sorted(divided.part("test").tolist()) == data.official_test.tolist()
    assert "warning: 80 training pictures belong to 10 groups that are in the test part too" in divided.grouping


def test_a_long_name_is_read_in_linear_time(tmp_path: Path) -> None:
    """Each of these took minutes with a regular expression that tries every division of the name."""
    stems = ["a" + "_" * 20_000 + "x", "1f" * 20_000, "a-" * 20_000 + "1(", "-t" * 20_000 + "7", "9" * 20_000]
    names = [f"{name}/{stem}.png" for name in "ab" for stem in stems]
    images = FileImages(tmp_path, names)
    data = DataSet("folder:x", ("a", "b"), images, np.repeat([0, 1], len(stems)), "5" * 64, None)
    assert found(data).count <= len(names)


@pytest.mark.parametrize(
    "name",
    [
        "{number:04}.png",
        "cat ({number}).png",
        "cat.{number:04}.jpg",
        "IMG_{number:04}.png",
        "img{number}.png",
        "n01440764_{number}.png",
        "{site}_{number:04}.png",
        "{site}7_{number:04}.png",
        "20240101_{number:04}.png",
        "20240101_12{number:04}.png",
    ],
)
@pytest.mark.parametrize("film", [False, True], ids=["other scenes", "a film"])
def test_counters_do_not_make_a_group_of_a_class(tmp_path: Path, name: str, film: bool) -> None:
    """Not even where a counter counts the frames of films: which film a picture is of cannot be seen in the name."""

    def names(track: int, number: int) -> str:
        count = FRAMES * track + number
        return name.format(number=count, site=("google", "bing", "flickr")[count % 3])

    grouping = found(make(tmp_path, names, film=film))
    assert not grouping.has_groups, grouping.how
    assert grouping.how.startswith("no groups: no sequences in the names, no near-duplicates")


def test_a_class_of_one_sequence_stays_ungrouped_and_is_named(tmp_path: Path) -> None:
    make(tmp_path, lambda track, number: f"{track:05}_{number:05}.png", classes="abcd")
    (tmp_path / "e").mkdir()
    for number in range(6):
        (tmp_path / "e" / f"00000_{number:05}.png").write_bytes(encode(frame(77, number)))
    grouping = found(folder.load(tmp_path))
    assert grouping.count == 4 * TRACKS + 6
    assert grouping.how.endswith("sequences do not count where all pictures of a class would be one group: e")


def test_copies_of_a_picture_are_one_group(tmp_path: Path) -> None:
    data = make(tmp_path, lambda track, number: f"{4 * track + number}.png", film=False)
    original = Image.fromarray(scene(1000))
    (tmp_path / "a" / "small.jpg").write_bytes(encode(original.resize((31, 31)), "JPEG", quality=60))
    (tmp_path / "b" / "wrong class.webp").write_bytes(encode(original, "WEBP", quality=70))
    grouping = found(folder.load(tmp_path))
    names = folder.load(tmp_path).images.names
    copies = {grouping.ids[names.index(name)] for name in ("a/0.png", "a/small.jpg", "b/wrong class.webp")}
    assert len(copies) == 1
    assert grouping.count == len(data)
    assert grouping.how == "40 groups of pictures: 2 near-duplicates"


def test_near_duplicates_join_sequences(tmp_path: Path) -> None:
    make(tmp_path, lambda track, number: f"{track:05}_{number:05}.png")
    (tmp_path / "a" / "00099_00000.png").write_bytes((tmp_path / "a" / "00002_00003.png").read_bytes())
    grouping = found(folder.load(tmp_path))
    assert grouping.how == "10 groups of pictures by track_frame in the names; 1 near-duplicate between them"
    assert np.bincount(grouping.ids).max() == FRAMES + 1


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_near_duplicates_of_deep_grey_pictures(bits: int, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    scale = (1 << bits) - 1
    for k in range(8):
        smooth = Image.fromarray(noise(5, 5, seed=k)).resize((50, 40), Image.Resampling.BICUBIC)
        values = (0.25 + np.asarray(smooth, np.float64) / 340) * scale
        for name, factor in (
            ((f"a/{k}.png", 1.0), ("b/copy.png", 0.98)) if k == 3 else ((f"{'ab'[k % 2]}/{k}.png", 1.0),)
        ):
            Image.fromarray((values * factor).astype(np.uint8 if bits == 8 else np.uint16)).save(tmp_path / name)
    data = folder.load(tmp_path)
    pairs = near_duplicates(thumbnails(data.images, len(data), data.sha256))
    names = data.images.names  # type: ignore[attr-defined]
    assert [(names[i], names[j]) for i, j in pairs.tolist()] == [("a/3.png", "b/copy.png")]


def test_plain_pictures_have_no_near_duplicates(tmp_path: Path) -> None:
    for name, level in (("a", 0), ("b", 255)):
        (tmp_path / name).mkdir()
        for i in range(8):
            picture = np.full((20, 20), level, np.uint8) ^ (noise(20, 20, seed=i) & 3)
            (tmp_path / name / f"{i}.png").write_bytes(encode(picture))
    assert not found(folder.load(tmp_path)).has_groups


def test_drawings_that_all_look_alike_stay_ungrouped(tmp_path: Path) -> None:
    for label, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        for i in range(8):
            picture = np.clip(scene(label).astype(int) + noise(48, 48, 3, seed=i) % 5, 0, 255).astype(np.uint8)
            (tmp_path / name / f"{i}.png").write_bytes(encode(picture))
    grouping = found(folder.load(tmp_path))
    assert not grouping.has_groups
    assert grouping.how.startswith("no groups: most pictures of a class look alike")
    assert grouping.how.endswith("of these only exact copies are one group: a, b")


def test_exact_copies_of_drawings_that_all_look_alike_are_one_group(tmp_path: Path) -> None:
    test_drawings_that_all_look_alike_stay_ungrouped(tmp_path)
    for copy in ("a/copy.png", "b/wrong class.png"):
        (tmp_path / copy).write_bytes((tmp_path / "a" / "3.png").read_bytes())
    data = folder.load(tmp_path)
    grouping = found(data)
    names = data.images.names
    assert len({grouping.ids[names.index(name)] for name in ("a/3.png", "a/copy.png", "b/wrong class.png")}) == 1
    assert grouping.count == len(data) - 2
    assert grouping.how.startswith("16 groups of pictures: 2 near-duplicates; most pictures of a class look alike")


def test_other_digits_are_no_near_duplicates() -> None:
    data = digits.load()
    assert len(near_duplicates(thumbnails(data.images, len(data), data.sha256))) == 0
    assert not found(data).has_groups


def test_unreadable_pictures_are_groups_of_their_own(tmp_path: Path) -> None:
    make(tmp_path, lambda track, number: f"{track:05}_{number:05}.png")
    for name in ("00001_00001.png", "00001_00002.png"):
        (tmp_path / "a" / name).write_bytes(b"no picture")
    grouping = found(folder.load(tmp_path))
    assert grouping.count == 10


def test_a_regular_expression_names_the_groups(tmp_path: Path) -> None:
    data = make(tmp_path, lambda track, number: f"x{number}_t{track}.png")
    by_group, by_match = found(data, r"([ab])/.*_(t\d+)"), found(data, r"_t\d+")
    assert by_group.how == r"10 groups of pictures by '([ab])/.*_(t\\d+)'"
    assert (np.bincount(by_group.ids) == FRAMES).all()
    assert by_match.count == TRACKS, "a match counts in the whole data set"
    partly = found(data, r"t[0-3]")
    assert partly.how == "12 groups of pictures by 't[0-3]'; 8 pictures that do not match are groups of their own"


def test_subfolders_of_classes_are_groups(tmp_path: Path) -> None:
    data = make(tmp_path / "train", lambda track, number: f"film{track}/{number}.png", film=False)
    assert found(folder.load(tmp_path / "train"), "folder").how == "10 groups of pictures by folder"
    make(tmp_path / "test", lambda track, number: f"{number}.png" if track else f"film/{number}.png", film=False)
    grouping = found(folder.load(tmp_path), "folder")
    assert (
        grouping.how == "20 groups of pictures by folder; 8 pictures directly in a class folder are groups of their own"
    )
    assert len(np.unique(grouping.ids[: len(data)])) == 10


def test_none_is_no_grouping(tmp_path: Path) -> None:
    assert find_groups(make(tmp_path, lambda track, number: f"{track}_{number}.png"), "none") is None


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("(", "--group '\\(' is neither auto, folder, none nor a regular expression"),
        ("track", "--group 'track' matches no path of .*, such as 'a/0_0.png'"),
        ("x*", r"--group 'x\*' matches an empty text in 'a/0_0.png'.*at least one character"),
        ("(z*)", r"--group '\(z\*\)' matches an empty text"),
        ("folder", "no class folder has subfolders that could be groups"),
    ],
)
def test_a_grouping_that_cannot_be_is_refused(tmp_path: Path, how: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        find_groups(make(tmp_path, lambda track, number: f"{track}_{number}.png"), how)


@pytest.mark.parametrize("how", ["folder", r"\d+"])
def test_data_without_files_has_no_names_to_group_by(how: str) -> None:
    with pytest.raises(UsageError, match="digits has no image files whose paths could name groups: use --group none"):
        find_groups(digits.load(), how)


@pytest.mark.parametrize("ids", [np.zeros(3), np.zeros((2, 2), np.int64)], ids=["floats", "two axes"])
def test_invalid_ids_are_refused(ids: np.ndarray) -> None:
    with pytest.raises(BadInput, match="group ids must be int64"):
        Grouping(ids, "x")
