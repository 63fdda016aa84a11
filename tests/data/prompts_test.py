"""Prompt files: three formats, one result; every fault is named with its line."""

import pathlib

import pytest

from sage_grpo_jax.data.prompts import Prompt, read_prompts


def write(folder: pathlib.Path, name: str, content: str | bytes) -> pathlib.Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_text_file_takes_line_numbers_as_ids(tmp_path):
    path = write(tmp_path, "p.txt", "a cat\r\n  a dog, running \nein Bär\n\n")
    assert read_prompts(path) == [
        Prompt("000001", "a cat"),
        Prompt("000002", "a dog, running"),
        Prompt("000003", "ein Bär"),
    ]


def test_csv_file(tmp_path):
    content = '\ufeffid,style,prompt\nx,1,"a cat, asleep"\ny,2,"a ""big"" dog"\n'
    assert read_prompts(write(tmp_path, "p.csv", content)) == [
        Prompt("x", "a cat, asleep"),
        Prompt("y", 'a "big" dog'),
    ]


def test_csv_file_without_ids(tmp_path):
    assert read_prompts(write(tmp_path, "p.csv", "prompt\na cat\na dog\n")) == [
        Prompt("000002", "a cat"),
        Prompt("000003", "a dog"),
    ]


def test_jsonl_file(tmp_path):
    content = '{"id": "x", "prompt": "a cat"}\n{"id": 7, "prompt": "a d\\u00f6g", "n": 1}\n'
    path = write(tmp_path, "p.jsonl", content)
    assert read_prompts(path) == [Prompt("x", "a cat"), Prompt("7", "a dög")]


def test_images_are_relative_to_the_file(tmp_path):
    content = "id,prompt,image\nx,a cat,frames/1.png\ny,a dog,\nz,a cow, /data/cow.png\n"
    expected = [
        Prompt("x", "a cat", tmp_path / "frames/1.png"),
        Prompt("y", "a dog", None),
        Prompt("z", "a cow", pathlib.Path("/data/cow.png")),
    ]
    assert read_prompts(write(tmp_path, "p.csv", content)) == expected
    content = (
        '{"id": "x", "prompt": "a cat", "image": "frames/1.png"}\n'
        '{"id": "y", "prompt": "a dog"}\n'
        '{"id": "z", "prompt": "a cow", "image": "/data/cow.png"}\n'
    )
    assert read_prompts(write(tmp_path, "p.jsonl", content)) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "", "no prompts"),
        ("p.txt", "a cat\n\na dog\n", r"line 2: the prompt is empty"),
        ("p.txt", "a cat\na\x07dog\n", r"line 2: the prompt has the control character .* place 2"),
        ("p.txt", "a\u2028cat", r"line 1: .*control character"),
        ("p.txt", b"a cat\na \xff dog\n", r"line 2: byte 0xff is not UTF-8"),
        ("p.md", "a cat", r"file type '.md'; allowed: .txt, .csv, .jsonl"),
        ("p.csv", "id,text\nx,a cat\n", r"line 1: columns .*; one must be 'prompt'"),
        ("p.csv", "id,prompt\nx,a cat\nx,a dog\n", r"line 3: id 'x' was used in line 2"),
        ("p.csv", "id,prompt\nx,a cat, asleep\n", r"line 2: more fields"),
        ("p.csv", "id,prompt\nx\n", r"line 2: prompt is None"),
        ("p.csv", "id,prompt\n,a cat\n", r"line 2: the id is empty"),
        ("p.csv", 'prompt\n"a cat\na dog"\n', r"line 2: .*control character"),
        ("p.csv", 'prompt\n"a cat\n', r"line 2: bad CSV"),
        ("p.jsonl", '{"prompt": "a cat"}\n{"prompt"', r"line 2: bad JSON"),
        ("p.jsonl", '["a cat"]\n', r"line 1: list; each line must be a JSON object"),
        ("p.jsonl", '{"text": "a cat"}\n', r"line 1: fields \['text'\]; one must be 'prompt'"),
        ("p.jsonl", '{"prompt": ["a cat"]}\n', r"line 1: prompt is \['a cat'\]; .* a string"),
        ("p.jsonl", '{"prompt": "a cat", "id": true}\n', r"line 1: id is True; .* a string"),
        ("p.jsonl", '{"prompt": "a", "image": 3}\n', r"line 1: image is 3; it must be a string"),
        ("p.jsonl", '{"prompt": "a", "image": " "}\n', r"line 1: the image is empty"),
        ("p.csv", 'prompt,image\na,"x\ty"\n', r"line 2: the image has the control character"),
        ("p.jsonl", '{"prompt": "a \\ud800 cat"}\n', r"line 1: .*control character"),
        ("p.jsonl", '{"prompt": "a"}\n' + "[" * 100_000, r"line 2: bad JSON: .*recursion"),
        (
            "p.jsonl",
            f'{{"prompt": "a", "id": {"9" * 5000}}}\n',
            r"line 1: bad JSON: .*5000 digits$",
        ),
    ],
)
def test_faults_are_named(tmp_path, name, content, message):
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError, match=message):
        read_prompts(path)


def test_no_file_is_named():
    with pytest.raises(ValueError, match=r"^no file is named; allowed: a \.txt, "):
        read_prompts("")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_prompts(tmp_path / "none.txt")
