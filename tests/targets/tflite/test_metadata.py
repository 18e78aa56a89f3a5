"""TFLITE_METADATA: what others write is read, and what is written others read."""

import base64
import io
import zipfile
import zlib
from typing import Any

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from single_operations import single

import simqat_jax as sq
from simqat_jax.targets.tflite.listing import list_tflite
from simqat_jax.targets.tflite.metadata import NAME, read_metadata

OF_ANOTHER_WRITER = (
    "c-l=-F;2rk5F9&Bas(F^a*-lMiWDi3<>Uhq=~93w_<$iNuw+oAbK#N)@C?cnJOGK7UzxeRjmSx(Iq&Yx&G=>jZp(6&"
    "V~!c7$dMt1VKw0%tN{yRNn8`h2>2qti6OsNMOl>Of!EnR2;b~0uuUaUD}`T%dZ{q*PWb**I#+t%X(g<LxqF=pI>Fhc>SS"
    "Sfkf}~g*f(HIerhV`tiy!+rh2rEE84CN9_zgm&0I9j6DK%n`8*x*L45km#BbmCMtlTMO!1?<iL`FipZWI}8PztL>FoSA7V"
    "fuR!_e)8&dDE(N8FDwQk_^e6FvW;%*Zlxs5|BiZ&JTj&sO_uy?58nowcrjzSW&=@dvpcDB%"
)
"""By the classes of the public schema (MediaPipe 1.2): with fields that are not written here."""
LABELS = ["a", "", "ç, d"]


def test_what_another_writer_wrote():
    archive = io.BytesIO(b"in front of it a model")
    with zipfile.ZipFile(archive, "a") as labels:
        labels.writestr("labels.txt", "\n".join(LABELS))
    buffer = zlib.decompress(base64.b85decode(OF_ANOTHER_WRITER))
    about, ((image, first), (ids, second)) = read_metadata(buffer, archive.getvalue())
    assert (about.name, about.version, about.author) == ("Net", "2", "Ada")
    assert (about.license, about.description) == ("MIT", "It sees.")
    assert (image, first.description, first.labels) == ("image", "pixels", ())
    assert (first.means, first.stds) == ((127.5, 1.0), (64.0,))
    assert (ids, second.description, second.labels) == ("ids", "", tuple(LABELS))


@pytest.fixture(scope="module")
def path(folder):
    """A file with labels of both ends."""
    model = single("tflite", "clip", ((0.1, 3), (0.1, 3)), {}, shape=(-1, 3))
    tensors = {
        "t0": sq.TensorMetadata(mean=0.25, std=[0.5, 1, 2], labels=LABELS),
        "output": sq.TensorMetadata(labels=LABELS),
    }
    metadata = sq.FileMetadata(name="Clip", tensors=tensors)
    sq.export_tflite(model, folder / "m.tflite", integer_io=True, metadata=metadata)
    return folder / "m.tflite"


def content(path):
    data = path.read_bytes()
    model: Any = schema.ModelT.InitFromPackedBuf(data, 0)
    (entry,) = model.metadata
    assert entry.name.decode() == NAME
    return bytes(model.buffers[entry.buffer].data), data


def test_what_is_written_is_read(path):
    buffer, data = content(path)
    assert buffer[4:8] == b"M001"
    about, ((first, image), (second, labelled)) = read_metadata(buffer, data)
    assert (about.name, first, second) == ("Clip", "t0", "output")
    assert (image.means, image.stds) == ((0.25,), (0.5, 1.0, 2.0))
    assert image.labels == labelled.labels == tuple(LABELS)
    assert image.description == "int8 codes: real = 0.100000001 * (code + 125)"


def test_labels_stand_behind_the_file_uncompressed(path):
    """As readers on devices want them."""
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["labels/t0.txt", "labels/output.txt"]
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.read("labels/t0.txt").decode() == "a\n\nç, d\n"


def test_the_same_model_gives_the_same_file(path, folder):
    model = single("tflite", "clip", ((0.1, 3), (0.1, 3)), {}, shape=(-1, 3))
    about = sq.FileMetadata(tensors={"output": sq.TensorMetadata(labels=LABELS)})
    files = [folder / "one.tflite", folder / "two.tflite"]
    for file in files:
        sq.export_tflite(model, file, metadata=about)
    assert files[0].read_bytes() == files[1].read_bytes() != path.read_bytes()
    with zipfile.ZipFile(files[0]) as archive:
        assert archive.namelist() == ["labels.txt"]


@pytest.mark.parametrize("damage", ["labels", "buffer"])
def test_a_file_with_damaged_metadata_is_still_listed(path, damage, tmp_path):
    buffer, data = content(path)
    broken = tmp_path / "m.tflite"
    if damage == "labels":
        broken.write_bytes(data[: data.index(b"PK\x03\x04")])
    else:
        broken.write_bytes(data.replace(buffer, bytes(np.full(len(buffer), 255, np.uint8))))
    listing = list_tflite(broken)
    assert [op.kind for op in listing.ops] == [op.kind for op in list_tflite(path).ops]
    (note,) = listing.notes()
    assert note.startswith("Its metadata cannot be read: ")
