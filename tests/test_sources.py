import codecs
import gzip
import io
import json
import lzma
import sys
from pathlib import Path

import pytest

from jaxprompt.data.readers import CsvSource, JsonlSource, TextSource, TsvSource, read_stream
from jaxprompt.data.sources import SourceConfig, has_split, open_source
from jaxprompt.typing import UserError

ROWS = [{"text": "good book", "label": 1}, {"text": "naïve é", "label": 0}, {"text": "x", "n": 2.5}]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def all_rows(source) -> list[dict]:
    return [source[index] for index in range(len(source))]


@pytest.mark.parametrize(
    ("name", "pack"),
    [("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress), ("a.jsonl.xz", lzma.compress)],
)
def test_jsonl_rows_plain_and_compressed(tmp_path: Path, name: str, pack):
    path = write(tmp_path / name, pack(jsonl(ROWS).encode()))
    assert all_rows(JsonlSource(path)) == ROWS
    assert [row for row, _ in read_stream(path)] == ROWS


def test_jsonl_blank_lines_line_ends_and_byte_order_mark(tmp_path: Path):
    lines = [json.dumps(row) for row in ROWS]
    text = f"\n{lines[0]}\r\n  \r\n{lines[1]}\n\n{lines[2]}"
    path = write(tmp_path / "a.jsonl", codecs.BOM_UTF8 + text.encode())
    source = JsonlSource(path)
    assert all_rows(source) == ROWS
    assert [source.where(index) for index in range(3)] == [f"{path}:{n}" for n in (2, 4, 6)]
    assert list(read_stream(path)) == [
        (row, f"{path}:{n}") for row, n in zip(ROWS, (2, 4, 6), strict=True)
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "good"', "not a JSON object"),
        (b"[1]", "but list"),
        (b'{"a": "\xff"}', "not a JSON"),
    ],
)
def test_malformed_jsonl_names_file_and_line(tmp_path: Path, line: bytes, message: str):
    path = write(tmp_path / "a.jsonl", b'{"text": "one"}\n\n' + line + b"\n")
    source = JsonlSource(path)
    assert source[0] == {"text": "one"}
    with pytest.raises(UserError, match=message) as error:
        source[1]
    assert f"{path}:3" in str(error.value)
    stream = read_stream(path)
    next(stream)
    with pytest.raises(UserError, match=message) as error:
        next(stream)
    assert f"{path}:3" in str(error.value)


def test_tsv_keeps_quotes_and_takes_columns_for_a_missing_header(tmp_path: Path):
    path = write(tmp_path / "a.tsv", 'a\tb\n"x\t1\ny "z\t2\r\n')
    rows = [{"a": '"x', "b": "1"}, {"a": 'y "z', "b": "2"}]
    source = TsvSource(path)
    assert all_rows(source) == rows
    assert source.where(1) == f"{path}:3"
    assert [row for row, _ in read_stream(path)] == rows
    assert all_rows(TsvSource(path, ("c", "d")))[0] == {"c": "a", "d": "b"}


def test_csv_fields_hold_commas_quotes_and_line_ends(tmp_path: Path):
    text = 'mr,ref\n"name[A], area[B]","two\nlines"\n"say ""hi""",x\n'
    path = write(tmp_path / "a.csv", codecs.BOM_UTF8 + text.encode())
    rows = [{"mr": "name[A], area[B]", "ref": "two\nlines"}, {"mr": 'say "hi"', "ref": "x"}]
    source = CsvSource(path)
    assert all_rows(source) == rows
    assert source.where(1) == f"{path}:4"
    assert [row for row, _ in read_stream(path)] == rows


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_wrong_number_of_columns_names_the_line(tmp_path: Path, name: str):
    mark = "," if name == "a.csv" else "\t"
    path = write(tmp_path / name, f"a{mark}b\n1{mark}2\n3\n")
    config = SourceConfig(train=str(path))
    with pytest.raises(UserError, match=f"{path}:3 has 1 columns, the header has 2"):
        all_rows(open_source(config, "train"))


def test_unclosed_csv_quote_and_bad_bytes_are_user_errors(tmp_path: Path):
    with pytest.raises(UserError, match="is not CSV"):
        CsvSource(write(tmp_path / "a.csv", 'a,b\n"1,2\n'))
    with pytest.raises(UserError, match="is not CSV"):
        CsvSource(write(tmp_path / "b.csv", b"a,b\n\xff,2\n"))
    with pytest.raises(UserError, match=r"c.txt:2 is not UTF-8"):
        all_rows(TextSource(write(tmp_path / "c.txt", b"fine\n\xff\n")))


def test_text_lines(tmp_path: Path):
    path = write(tmp_path / "a.txt", "one\n\ntwo words\n")
    assert all_rows(TextSource(path)) == [{"text": "one"}, {"text": "two words"}]


def test_stream_of_standard_input_mixes_json_and_text(monkeypatch: pytest.MonkeyPatch):
    stdin = io.TextIOWrapper(io.BytesIO(b'good film\n\n{"sentence": "x", "id": 3}\nbad\n'))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert list(read_stream("-", text_field="sentence")) == [
        ({"sentence": "good film"}, "standard input:1"),
        ({"sentence": "x", "id": 3}, "standard input:3"),
        ({"sentence": "bad"}, "standard input:4"),
    ]


def test_stream_reads_only_what_is_asked_for(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", '{"a": 1}\n' + "not json\n" * 1000)
    stream = read_stream(path)
    assert next(stream)[0] == {"a": 1}
    stream.close()


def test_source_finds_files_by_directory_and_their_compressed_forms(tmp_path: Path):
    write(tmp_path / "train.jsonl.xz", lzma.compress(jsonl(ROWS).encode()))
    write(tmp_path / "dev.tsv", "text\tlabel\nx\t1\n")
    config = SourceConfig(
        name="glue/sst2", train="train.jsonl", validation="dev.tsv", data_dir=str(tmp_path)
    )
    assert len(open_source(config, "train")) == 3
    assert all_rows(open_source(config, "validation")) == [{"text": "x", "label": "1"}]
    with pytest.raises(UserError, match=r"no test data; set task\.source\.test"):
        open_source(config, "test")
    assert [has_split(config, split) for split in ("train", "test")] == [True, False]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SourceConfig(train="none.jsonl"), "there is no file none.jsonl"),
        (SourceConfig(train="package://demo/none.jsonl"), "there is no file .*none.jsonl"),
        (
            SourceConfig(train="a.jsonl", kind="parquet"),
            "source.kind is 'parquet'; there are jsonl",
        ),
        (SourceConfig(), "no train data"),
        (SourceConfig(name="no_such_set"), "tfds build no_such_set"),
    ],
)
def test_sources_that_are_not_there(config: SourceConfig, message: str):
    with pytest.raises(UserError, match=message):
        open_source(config, "train")


def test_a_directory_in_place_of_a_file(tmp_path: Path):
    with pytest.raises(UserError, match="cannot be read"):
        open_source(SourceConfig(train=str(tmp_path), kind="jsonl"), "train")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", ""), ("a.jsonl", " \n\n"), ("a.tsv", ""), ("a.tsv", "x\ty\n"), ("a.csv", "x,y\n")],
)
def test_empty_data_sets(tmp_path: Path, name: str, content: str):
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=f"{name} has no rows"):
        open_source(SourceConfig(train=str(path)), "train")


def test_damaged_compressed_file(tmp_path: Path):
    packed = lzma.compress(jsonl(ROWS * 50).encode())
    path = write(tmp_path / "a.jsonl.xz", packed[: len(packed) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        open_source(SourceConfig(train=str(path)), "train")


def test_rename_and_explode_make_flat_rows_of_nested_ones(tmp_path: Path):
    answers = [{"text": "no", "label": 0}, {"text": "yes", "label": 1}]
    nested = [
        {"passage": {"text": "P", "questions": [
            {"question": "Q1", "answers": answers}, {"question": "Q2", "answers": answers[:1]},
        ]}},
        {"passage": {"text": "R", "questions": []}},
        {"passage": {"text": "S", "questions": [{"question": "Q3", "answers": answers[1:]}]}},
    ]  # fmt: skip
    path = write(tmp_path / "a.jsonl", jsonl(nested))
    rename = {
        "passage.text": "paragraph",
        "passage.questions.question": "question",
        "passage.questions.answers.text": "answer",
        "passage.questions.answers.label": "label",
        "missing": "other",
    }
    config = SourceConfig(train=str(path), explode="passage.questions.answers", rename=rename)
    source = open_source(config, "train")
    names = ("paragraph", "question", "answer", "label")
    assert [tuple(row[name] for name in names) for row in all_rows(source)] == [
        ("P", "Q1", "no", 0), ("P", "Q1", "yes", 1), ("P", "Q2", "no", 0), ("S", "Q3", "yes", 1),
    ]  # fmt: skip
    assert source.where(3) == f"{path}:3"
    with pytest.raises(UserError, match="no field 'questionz'"):
        open_source(SourceConfig(train=str(path), explode="passage.questionz"), "train")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A TFDS data set prepared to array_record without TensorFlow; its class is not registered."""
    import tensorflow_datasets as tfds

    directory = str(tmp_path_factory.mktemp("tfds"))

    class TinySet(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "text": tfds.features.Text(),
                "label": tfds.features.ClassLabel(num_classes=2),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {
                "train": self._generate_examples(12),
                "validation": self._generate_examples(3),
            }

        def _generate_examples(self, count):
            for number in range(count):
                yield number, {"text": f"row é {number}", "label": number % 2}

    TinySet(data_dir=directory, file_format="array_record").download_and_prepare()
    return directory


def test_tfds_rows_are_plain_text_and_numbers(prepared: str):
    source = open_source(SourceConfig(name="tiny_set", data_dir=prepared), "train")
    rows = sorted(all_rows(source), key=lambda row: int(row["text"].split()[-1]))
    assert rows == [{"text": f"row é {number}", "label": number % 2} for number in range(12)]
    assert all(type(row["label"]) is int for row in rows)
    assert source.where(2) == "tiny_set train row 2"
    assert "tensorflow" not in sys.modules


def test_tfds_splits_by_name_slices_and_despite_file_names(prepared: str):
    config = SourceConfig(
        kind="tfds", name="tiny_set", data_dir=prepared, train="train[:25%]", validation="dev.tsv"
    )
    assert len(open_source(config, "train")) == 3
    assert len(open_source(config, "validation")) == 3
    with pytest.raises(UserError, match="tiny_set test cannot be read"):
        open_source(config, "test")


def test_hugging_face_sets_need_their_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install jaxprompt\[hf\]"):
        open_source(SourceConfig(kind="hf", name="owner/set"), "train")


def test_hugging_face_sets_from_disk(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(ROWS[:2])
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "set"))
    config = SourceConfig(kind="hf", data_dir=str(tmp_path / "set"))
    assert all_rows(open_source(config, "train")) == ROWS[:2]
    with pytest.raises(UserError, match="cannot be loaded"):
        open_source(config, "validation")
