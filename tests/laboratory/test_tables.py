from __future__ import annotations

import gzip
import json
import os
import pickle
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lswag_fast.errors import InputError
from lswag_fast.laboratory.tables import read

ARCH = {"hidden_dim": 192, "depth": 2, "num_heads": [3, 4], "mlp_ratio": [3.5, 4.0]}


def written(path: Path, text: str) -> Path:
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_csv(tmp_path: Path, name: str):
    text = '\ufeffarch,val_accuracy,zico,remark\n"(0, 1)",90.5,1e3,odd\n\n"(1, 1)",,nan,\n'
    (table,) = read(written(tmp_path / name, text))
    assert table.name == "t"
    assert table.archs == ("(0, 1)", "(1, 1)")
    assert table.columns["zico"].tolist()[0] == 1000
    assert np.isnan([table.columns["val_accuracy"][1], table.columns["zico"][1]]).all()
    assert table.texts == ("remark",)


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_jsonl(tmp_path: Path, name: str):
    rows = [
        {"arch": ARCH, "acc": 70, "proxies": {"zico": 1.5}, "counts": {"parameters": 9}},
        {"arch": ARCH, "acc": None, "tag": "b"},
        {"arch": "text", "acc": 71.25, "proxies": {"zico": 2.5}},
    ]
    (table,) = read(written(tmp_path / name, "\n".join(map(json.dumps, rows)) + "\n\n"))
    assert table.archs == (ARCH, ARCH, "text")
    np.testing.assert_array_equal(table.columns["acc"], [70, np.nan, 71.25])
    np.testing.assert_array_equal(table.columns["zico"], [1.5, np.nan, 2.5])
    np.testing.assert_array_equal(table.columns["parameters"], [9, np.nan, np.nan])
    assert table.texts == ("tag",)


SETS = {
    "cifar10": {
        "(0, 1)": {"synflow": {"score": 3.0, "time": 0.1}, "id": 7, "val_accuracy": 90.0},
        "(1, 1)": {"synflow": {"score": None, "time": 0.1}, "id": 8, "val_accuracy": 80.0},
    },
    "cifar100": {"(0, 1)": {"synflow": {"score": 4.0, "time": 0.1}, "id": 7, "val_accuracy": 60.0}},
}


def test_suite_zero_json(tmp_path: Path):
    first, second = read(written(tmp_path / "zc_nasbench201.json", json.dumps(SETS)))
    assert (first.name, second.name) == ("nasbench201-cifar10", "nasbench201-cifar100")
    assert first.archs == ("(0, 1)", "(1, 1)")
    assert set(first.columns) == {"synflow", "val_accuracy"}
    np.testing.assert_array_equal(first.columns["synflow"], [3, np.nan])
    np.testing.assert_array_equal(first.columns["val_accuracy"], [90, 80])
    assert second.columns["synflow"].tolist() == [4]


def test_suite_zero_json_of_several_spaces(tmp_path: Path):
    tables = read(written(tmp_path / "all.json.gz", json.dumps({"nb201": SETS})))
    assert [table.name for table in tables] == ["all-nb201-cifar10", "all-nb201-cifar100"]


def test_auto_prox_pth(tmp_path: Path):
    rows = [
        {"arch": ARCH, "c100_kd_acc": 76.06, "chaoyang_kd_acc": torch.tensor(84.5, dtype=torch.float64)},
        OrderedDict(arch=ARCH, c100_kd_acc=np.float64(78.3), chaoyang_kd_acc=np.float32(84.25)),
        {"arch": ARCH, "c100_kd_acc": np.int64(77), "chaoyang_kd_acc": None},
    ]
    torch.save(rows, tmp_path / "gt.pth")
    torch.save(rows, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("gt.pth", "old.pth"):
        (table,) = read(tmp_path / name)
        assert table.archs == (ARCH, ARCH, ARCH)
        np.testing.assert_array_equal(table.columns["c100_kd_acc"], [76.06, 78.3, 77])
        np.testing.assert_array_equal(table.columns["chaoyang_kd_acc"], [84.5, 84.25, np.nan])


class Malicious:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


class MaliciousNumber:
    def __reduce__(self) -> tuple[Any, ...]:
        return np.dtype, ("O8", False, True)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path, form: str):
    trace, path = tmp_path / "was-run", tmp_path / "gt.pth"
    rows = [{"arch": Malicious(f"touch {trace}"), "acc": 1.0}]
    if form == "pickle":
        path.write_bytes(pickle.dumps(rows))
    else:
        torch.save(rows, path, _use_new_zipfile_serialization=form == "zip")
    refused = pytest.raises(InputError, match=r"gt\.pth holds more than plain values and tensors, and is not read")
    with warnings.catch_warnings(action="error"), refused:
        read(path)
    assert not trace.exists()
    torch.load(path, weights_only=False) if form != "pickle" else pickle.loads(path.read_bytes())
    assert trace.exists()  # so the file would have run, had it been loaded


def test_objects_inside_numpy_numbers_are_refused(tmp_path: Path):
    torch.save([{"arch": "a", "acc": MaliciousNumber()}], tmp_path / "gt.pth")
    with pytest.raises(InputError, match="is not read"):
        read(tmp_path / "gt.pth")


@pytest.mark.parametrize("name", ["t.pkl", "t.pickle", "t.npy", "t.txt", "t.pth.gz", "t.csv.zip", "t"])
def test_unknown_formats_are_refused(tmp_path: Path, name: str):
    with pytest.raises(InputError, match="has no known format; there are"):
        read(written(tmp_path / name, "arch,acc\na,1\n"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "arch,acc\na,1\nb\n", "line 3: 1 cells, and the header has 2"),
        ("t.csv", "arch,acc\na,1\nb,high\n", "line 3: acc must be a number, or empty, got 'high'"),
        ("t.csv", 'arch,acc\n"a\nb",1\nc,high\n', "line 4: acc must be"),
        ("t.csv", 'arch,acc\n"a"b,1\n', "line 2: "),
        ("t.csv", "net,acc\na,1\n", "needs a column arch .* its columns are net, acc"),
        ("t.csv", "arch,acc,acc\na,1,2\n", "several columns called acc"),
        ("t.csv", "arch,lswag,context,recorded\na,1,c,2\n", "pass the store itself"),
        ("t.csv", "arch,acc\n", "holds no architectures"),
        ("t.csv", "", "needs a column arch"),
        ("t.jsonl", '{"arch": "a"}\n{"arch": \n', "line 2: no JSON object"),
        ("t.jsonl", '{"arch": "a"}\n\n[1]\n', "line 3: expected an object with an arch"),
        ("t.jsonl", '{"arch": "a", "acc": 1}\n{"arch": "b", "acc": true}\n', "line 2: acc must be a number"),
        ("t.json", '{"cifar10": {"a": {"p": {"score": "x"}}, "b": {"p": {"score": 1}}}}', "architecture 1: p must be"),
        ("t.json", '[{"arch": "a"}]', "not of NAS-Bench-Suite-Zero's form"),
        ("t.json", '{"arch": ', "is no JSON"),
        ("t.csv.gz", None, "cannot be read as gzipped text"),
        ("t.pth", "arch,acc\n", r"t\.pth (is no file that torch\.save wrote|holds more than plain values)"),
    ],
)
def test_what_cannot_be_read_is_told(tmp_path: Path, name: str, text: str | None, message: str):
    path = tmp_path / name
    path.write_bytes(b"no gzip") if text is None else written(path, text)
    with pytest.raises(InputError, match=message):
        read(path)


@pytest.mark.parametrize("data", [{"arch": "a"}, [], 3, [{"acc": 1}], [3]])
def test_pth_of_something_else_is_told(tmp_path: Path, data: Any):
    torch.save(data, tmp_path / "t.pth")
    with pytest.raises(InputError, match=r"must hold a list of architectures|entry 1: expected an object"):
        read(tmp_path / "t.pth")


def test_absent_file_and_text_in_another_encoding(tmp_path: Path):
    with pytest.raises(InputError, match="there is no file"):
        read(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_bytes("arch,acc\né,1\n".encode("latin-1"))
    with pytest.raises(InputError, match="cannot be read as text"):
        read(tmp_path / "t.csv")
