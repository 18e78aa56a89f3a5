"""Write a data set with the schema of ImageNet 2012, as tensorflow-datasets prepares it."""

import io
import json
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

# What protoc writes has names at run time only.
# pyright: reportAttributeAccessIssue=false

NAME = "imagenet2012"
VERSION = "5.1.0"
FEATURES = "tensorflow_datasets.core.features"


def write(data_dir: Path, train: int, test: int) -> None:
    """Write `train` and `test` JPEG images of different sizes, some of them grey.

    Image i has label 37 * i % 1000 and a brightness that goes with it.
    """
    directory = data_dir / NAME / VERSION
    directory.mkdir(parents=True)
    splits = [_write_split(directory, "train", train), _write_split(directory, "validation", test)]
    info = {"name": NAME, "version": VERSION, "fileFormat": "array_record", "splits": splits}
    (directory / "dataset_info.json").write_text(json.dumps(info))
    (directory / "features.json").write_text(json.dumps(_features()))


def _write_split(directory: Path, split: str, count: int) -> dict:
    path = directory / f"{NAME}-{split}.array_record-00000-of-00001"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    rng = np.random.default_rng(len(split))
    total = 0
    for index in range(count):
        label = 37 * index % 1000
        size = (*rng.integers(40, 90, 2), 3)
        pixels = np.clip(rng.normal(40 + 20 * (index % 8), 15, size), 0, 255).astype(np.uint8)
        image = Image.fromarray(pixels)
        if index % 5 == 4:
            image = image.convert("L")
        encoded = io.BytesIO()
        image.save(encoded, "JPEG")
        name = f"{split}_{index}.JPEG".encode()
        record = _example(image=encoded.getvalue(), label=label, file_name=name)
        writer.write(record)
        total += len(record)
    writer.close()
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    lengths = {"shardLengths": [str(count)], "numBytes": str(total)}
    return {"name": split, "filepathTemplate": template, **lengths}


def _example(image: bytes, label: int, file_name: bytes) -> bytes:
    feature = tf_feature_pb2.Feature
    features = {
        "image": feature(bytes_list=tf_feature_pb2.BytesList(value=[image])),
        "label": feature(int64_list=tf_feature_pb2.Int64List(value=[label])),
        "file_name": feature(bytes_list=tf_feature_pb2.BytesList(value=[file_name])),
    }
    example = tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=features))
    return example.SerializeToString()


def _features() -> dict:
    def named(module: str, **content: object) -> dict:
        return {"pythonClassName": f"{FEATURES}.{module}", **content}

    shape = {"dimensions": ["-1", "-1", "3"]}
    image = {"dtype": "uint8", "shape": shape, "encodingFormat": "jpeg"}
    label = named("class_label_feature.ClassLabel", classLabel={"numClasses": "1000"})
    features = {
        "file_name": named("text_feature.Text", text={}),
        "image": named("image_feature.Image", image=image),
        "label": label,
    }
    return named("features_dict.FeaturesDict", featuresDict={"features": features})
