"""No folder of a stranger is read beyond itself, and no damage gets past `PaveError`."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import ABOUT, add_window, cached_repository
from helpers.archives import FORMATS, WEIGHT, make_masks, make_store, read_store
from helpers.damage import ANYTHING, changed, places
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergekit_pave.algebra.subspace import Tail
from mergekit_pave.errors import PaveError
from mergekit_pave.storage import decompositions
from mergekit_pave.storage.archive import MANIFEST, Archive, Entry, Kind, owned, write_tensors
from mergekit_pave.storage.covariances import KIND as STORE
from mergekit_pave.storage.covariances import CovarianceStore, StoreWriter, Weight
from mergekit_pave.storage.identity import checksum, fingerprint
from mergekit_pave.storage.masks import FOLDER, TaskMasks
from mergekit_pave.storage.masks import KIND as MASKS


@pytest.fixture(scope="module", params=FORMATS)
def archive(request, tmp_path_factory):
    """A good folder, how it is read, and a place outside it with something to read."""
    make, read = FORMATS[request.param]
    root = tmp_path_factory.mktemp(request.param)
    good = make(root / "good")
    read(good)
    shutil.copytree(good, root / "outside")
    return root, read


def manifest_of(folder: Path) -> Path:
    return folder / FOLDER / MANIFEST if (folder / FOLDER).is_dir() else folder / MANIFEST


def opened_outside(folder: Path, monkeypatch) -> list[Path]:
    """Where reading goes, of what does not lie in `folder`: filled while it is read."""
    found = []
    real = safe_open

    def watched(path, *args, **kwargs):
        if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
            found.append(path)
        return real(path, *args, **kwargs)

    monkeypatch.setattr("mergekit_pave.storage.archive.safe_open", watched)
    return found


# --- damage --------------------------------------------------------------------------------

def removed(value, path):
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = removed(value[path[0]], path[1:])
    return copy


def whole_or_refused(read, folder: Path) -> None:
    try:
        read(folder)
    except PaveError as error:
        assert "\n" not in str(error) and str(error)[0].isupper()


MANY = settings(max_examples=150, deadline=None, derandomize=True,
                suppress_health_check=[HealthCheck.function_scoped_fixture])


@MANY
@given(data=st.data())
def test_a_manifest_with_any_other_value(archive, monkeypatch, data):
    root, read = archive
    folder = root / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(root / "good", folder)
    path = manifest_of(folder)
    manifest = json.loads(path.read_text())
    place = data.draw(st.sampled_from(list(places(manifest))))
    if place and data.draw(st.integers(0, 4)) == 0:
        manifest = removed(manifest, place)
    else:
        manifest = changed(manifest, place, data.draw(ANYTHING))
    path.write_text(json.dumps(manifest), "utf-8")
    with monkeypatch.context() as patch:
        outside = opened_outside(folder, patch)
        whole_or_refused(read, folder)
        assert not outside


@MANY
@given(data=st.data())
def test_files_with_any_other_byte(archive, data):
    """Headers, tensors, and manifests that are no JSON or no text any more."""
    root, read = archive
    folder = root / "bytes"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(root / "good", folder)
    file = data.draw(st.sampled_from(sorted(p for p in folder.rglob("*") if p.is_file())))
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        how = data.draw(st.sampled_from(["flip", "cut", "double", "zero", "header"]))
        if how == "cut":
            content = content[: at + 1]
        elif how == "double":
            content[at:at] = content[: data.draw(st.integers(1, 40))]
        elif how == "header":
            content[: 8] = data.draw(st.binary(min_size=8, max_size=8))
        else:
            content[at] = 0 if how == "zero" else content[at] ^ data.draw(st.integers(1, 255))
    file.write_bytes(content)
    whole_or_refused(read, folder)


@MANY
@given(data=st.data())
def test_a_file_with_another_header(archive, data):
    """Whole safetensors files of other names, shapes or dtypes, in the place of ours."""
    root, read = archive
    folder = root / "headers"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(root / "good", folder)
    file = data.draw(st.sampled_from(sorted(folder.rglob("*.safetensors"))))
    tensors = load_file(file)
    name = data.draw(st.sampled_from(sorted(tensors)))
    how = data.draw(st.sampled_from(["gone", "renamed", "dtype", "shape", "values", "metadata"]))
    if how == "gone":
        del tensors[name]
    elif how == "renamed":
        tensors[data.draw(st.text(max_size=4))] = tensors.pop(name)
    elif how == "dtype":
        dtype = data.draw(st.sampled_from([torch.float64, torch.float16, torch.int8, torch.bool]))
        tensors[name] = tensors[name].to(dtype)
    elif how == "shape":
        shape = data.draw(st.lists(st.integers(0, 5), max_size=3))
        tensors[name] = torch.zeros(shape, dtype=tensors[name].dtype)
    elif how == "values":
        tensors[name] = torch.full_like(tensors[name], 1)
    text = data.draw(st.sampled_from(["{}", "[]", "x", '{"kind": 1}', '{"entries": {}}']))
    save_file(tensors, file, metadata={"mergekit-pave": text})
    whole_or_refused(read, folder)


@MANY
@given(data=st.data())
def test_an_interrupted_calibration_with_any_damage_is_resumed(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("resumed")
    add_window(StoreWriter(folder, "run"), {"a": (torch.eye(4), 7)})
    file = folder / "covariance-00000.safetensors"
    with safe_open(file, "pt") as opened:
        header, tensors = json.loads(opened.metadata()["mergekit-pave"]), {
            "a": opened.get_tensor("a")}
    place = data.draw(st.sampled_from(list(places(header))))
    header = changed(header, place, data.draw(ANYTHING))
    save_file(tensors, file, metadata={"mergekit-pave": json.dumps(header)})
    before = file.read_bytes()
    writer = StoreWriter(folder, "run")
    if "a" not in writer.sites:
        add_window(writer, {"a": (torch.eye(4), 7)})
    weight = Weight("a", (6, 4), False, "float32")
    store = writer.finish({"x.weight": (weight, fingerprint(WEIGHT))}, {}, ABOUT)
    assert torch.equal(store.covariance("a"), torch.eye(4))
    assert file.read_bytes() == before


@MANY
@given(data=st.data())
def test_a_decomposition_with_any_damage_is_computed_again(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("decompositions")
    tail = Tail(torch.eye(5, 3), torch.arange(3.0).double(), 7.5, "direct")
    decompositions.remembered(folder, "ab", 3, torch.float32, lambda: tail)
    (file,) = folder.glob("*/*.safetensors")
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["mergekit-pave"])
    header = changed(header, data.draw(st.sampled_from(list(places(header)))), data.draw(ANYTHING))
    save_file({"basis": tail.basis, "values": tail.values}, file,
              metadata={"mergekit-pave": json.dumps(header)})
    found = decompositions.remembered(folder, "ab", 3, torch.float32, lambda: tail)
    assert torch.equal(found.basis, tail.basis)


# --- what it can hold ----------------------------------------------------------------------

KIND = Kind("test", 1, "The test {} is", "try again")


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/b.safetensors",
                                  "..", ".x.safetensors", "a\\b.safetensors", "x.bin", "x"])
def test_names_that_could_leave_the_folder(tmp_path, name):
    with pytest.raises(PaveError, match="is damaged"):
        Archive(tmp_path, KIND, {"t": {"file": name, "shape": [1], "dtype": "int8",
                                       "sha256": "0"}})


def test_links_out_of_the_folder_are_not_read(tmp_path):
    (tmp_path / "a").mkdir()
    entries = write_tensors(tmp_path / "t.safetensors", KIND, {"t": torch.ones(3)})
    (tmp_path / "a" / "t.safetensors").symlink_to(tmp_path / "t.safetensors")
    with pytest.raises(PaveError, match="leads out of the folder"):
        Archive(tmp_path / "a", KIND, entries)
    assert Archive(tmp_path, KIND, entries).tensor("t").equal(torch.ones(3))
    manifest = make_store(tmp_path / "store") / MANIFEST
    manifest.rename(tmp_path / MANIFEST)
    manifest.symlink_to(tmp_path / MANIFEST)
    with pytest.raises(PaveError, match="leads out of the folder"):
        CovarianceStore(tmp_path / "store")


@pytest.mark.parametrize("name", FORMATS)
def test_pipes_are_not_waited_for(tmp_path, name):
    make, read = FORMATS[name]
    for file in sorted(f.relative_to(tmp_path / "0") for f in make(tmp_path / "0").rglob("*.*")):
        folder = shutil.copytree(tmp_path / "0", tmp_path / "1")
        (folder / file).unlink()
        os.mkfifo(folder / file)
        with pytest.raises(PaveError, match="is no file|no model/config.json"):
            read(folder)
        assert MANIFEST in file.name or file.name not in owned(folder, STORE)
        shutil.rmtree(folder)


def test_a_snapshot_of_the_hub_is_read_through_its_links(tmp_path):
    snapshot = cached_repository(tmp_path / "datasets--me--store")
    blobs = tmp_path / "datasets--me--store" / "blobs"
    blobs.mkdir(exist_ok=True)
    for i, file in enumerate(sorted(make_store(tmp_path / "store").iterdir())):
        shutil.move(file, blobs / str(i))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(i)))
    read_store(snapshot)


@pytest.mark.parametrize("dtype", [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
    torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64])
@pytest.mark.parametrize("shape", [(), (0,), (3, 2)])
def test_every_dtype_comes_back(tmp_path, dtype, shape):
    tensor = torch.ones(shape).to(dtype)
    entries = write_tensors(tmp_path / "t.safetensors", KIND, {"t": tensor})
    archive = Archive(tmp_path, KIND, entries)
    archive.check()
    found = archive.tensor("t")
    assert found.dtype == dtype and found.shape == tensor.shape
    assert checksum(found) == checksum(tensor)


def test_equal_content_is_equal_files(tmp_path):
    for i in range(8):
        (tmp_path / str(i)).mkdir()
        write_tensors(tmp_path / str(i) / "t.safetensors", KIND, {"t": torch.ones(3)}, about=1)
    assert len({file.read_bytes() for file in tmp_path.rglob("*.safetensors")}) == 1


def test_sizes_are_compared_before_anything_is_read(tmp_path, monkeypatch):
    write_tensors(tmp_path / "t.safetensors", KIND, {"t": torch.ones(3)})
    archive = Archive(tmp_path, KIND, {"t": Entry("t.safetensors", (4,), "float32", "0")})
    for read in (archive.check, lambda: archive.tensor("t")):
        with pytest.raises(PaveError, match=r"t is F32 \[3\] there, and float32 \[4\]"):
            read()


def test_an_older_store_says_how_to_renew_it(tmp_path):
    path = make_store(tmp_path / "s") / MANIFEST
    path.write_text(path.read_text().replace('"format": 2', '"format": 1'))
    with pytest.raises(PaveError, match="has format 1, .* reads format 2; .* recalibrate"):
        CovarianceStore(tmp_path / "s")


def test_ours_are_known_by_manifest_and_header_and_not_by_name(tmp_path):
    folder = make_masks(tmp_path) / FOLDER
    save_file({"t": torch.ones(1)}, folder / "masks-00007.safetensors")
    assert owned(folder, MASKS) == [MANIFEST, "masks-00000.safetensors"]
    (folder / MANIFEST).unlink()  # of a merge that was killed
    assert owned(folder, MASKS) == ["masks-00000.safetensors"]
    (folder / MANIFEST).write_text('{"kind": "mine"}')
    assert owned(folder, MASKS) == ["masks-00000.safetensors"] and not owned(folder, STORE)


def test_a_full_last_window_leaves_no_empty_file(tmp_path, monkeypatch):
    monkeypatch.setattr("mergekit_pave.storage.masks.WINDOW", 1)
    folder = make_masks(tmp_path) / FOLDER
    names = {file.name for file in folder.iterdir()}
    assert names == {*owned(folder, MASKS)} == {*TaskMasks(tmp_path).files}
