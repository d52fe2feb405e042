"""Readers of data files: every format to its canonical rows, every mistake to one clear line."""

import json
from pathlib import Path
from typing import Any

import pytest
from raylign.cluster.errors import InputError
from raylign.trainers.data.rows import load_rows
from raylign.trainers.stages import DataConfig


def write(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text(json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(r) + "\n" for r in rows))
    return path


def read(path: Path, kind: Any = None, **config: Any) -> list[dict[str, Any]]:
    return load_rows(DataConfig(path=str(path), **config), path, kind)


USER, ASSISTANT = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
OTHER = {"role": "assistant", "content": "5"}

CONVERSATIONS = [
    {"messages": [USER, ASSISTANT]},
    {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
    {"instruction": "2+2?", "input": "", "output": "4"},
    {"prompt": "2+2?", "completion": "4"},
    {"prompt": [USER], "completion": [ASSISTANT]},
]
PAIRS = [
    {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
    {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [OTHER]},
    {"chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},
    {
        "conversations": [{"from": "human", "value": "2+2?"}],
        "chosen": {"from": "gpt", "value": "4"},
        "rejected": {"from": "gpt", "value": "5"},
    },
]


@pytest.mark.parametrize("row", CONVERSATIONS)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_conversations_of_every_form_are_the_same_messages(tmp_path: Path, row: dict[str, Any], name: str) -> None:
    assert read(write(tmp_path, [row], name), "messages") == [{"messages": [USER, ASSISTANT]}]


@pytest.mark.parametrize("row", CONVERSATIONS)
def test_conversations_are_demonstrations_with_their_other_columns(tmp_path: Path, row: dict[str, Any]) -> None:
    (got,) = read(write(tmp_path, [row | {"level": 3}]), "demonstration")
    assert (got["prompt"], got["completion"], got["level"]) == ([USER], [ASSISTANT], 3)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [([USER], "ends with a message of user: there is no answer"), ([ASSISTANT], "is one message: there is no prompt")],
)
def test_what_demonstrates_nothing_is_refused(tmp_path: Path, messages: list[Any], reason: str) -> None:
    with pytest.raises(InputError, match=f"row 1: the conversation {reason}"):
        read(write(tmp_path, [{"messages": messages}]), "demonstration")


@pytest.mark.parametrize("row", PAIRS)
def test_pairs_of_every_form_are_the_same_rows(tmp_path: Path, row: dict[str, Any]) -> None:
    expected = {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [OTHER]}
    assert read(write(tmp_path, [row]), "preference") == [expected]


def test_alpaca_input_follows_the_instruction(tmp_path: Path) -> None:
    rows = read(write(tmp_path, [{"instruction": "Add.", "input": "2 2", "output": "4"}]))
    assert rows[0]["messages"][0]["content"] == "Add.\n2 2"


def test_a_text_file_has_a_document_a_line(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one\n\ntwo words\n")
    assert read(path, "text") == [{"text": "one"}, {"text": "two words"}]


def test_parquet_reads_like_jsonl(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(CONVERSATIONS[:1]), path)
    assert read(path, "messages") == [{"messages": [USER, ASSISTANT]}]


def test_prompts_keep_the_other_columns_under_their_mapped_names(tmp_path: Path) -> None:
    path = write(tmp_path, [{"question": "2+2?", "gold": "4", "level": 1}])
    rows = read(path, "prompt", columns={"prompt": "question", "answer": "gold"})
    assert rows == [{"prompt": [USER], "answer": "4", "level": 1}]


def test_limit_and_system_message(tmp_path: Path) -> None:
    path = write(tmp_path, [{"prompt": "2+2?"}] * 3)
    rows = read(path, "prompt", limit=2, system="Be brief.")
    assert rows == [{"prompt": [{"role": "system", "content": "Be brief."}, USER]}] * 2


@pytest.mark.parametrize(
    ("rows", "config", "kind", "says"),
    [
        ([], {}, None, "has no rows"),
        ([{"question": "q", "answer": "a"}], {}, "prompt", "needs a `prompt` column; there are answer, question"),
        ([{"question": "q"}], {"columns": {"prompt": "qestion"}}, "prompt", "did you mean question"),
        ([{"text": "a"}], {}, "messages", "needs `messages`"),
        ([{"text": "a"}], {"format": "text"}, "messages", "holds rows of format text"),
        ([{"prompt": "a"}, {"prompt": 3}], {}, "prompt", "row 2: prompt must be a list of messages, not int"),
        ([{"messages": [{"role": "bot", "content": ""}]}], {}, None, "has the role 'bot'"),
        ([{"messages": []}], {}, None, "must be a list of messages, not empty"),
        (
            [{"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}],
            {},
            None,
            "the function's name, not '1'",
        ),
        ([{"instruction": "a", "output": "b"}, {"instruction": "a"}], {}, None, "row 2: no column 'output'"),
        ([{"chosen": [ASSISTANT], "rejected": [OTHER]}], {}, None, "no prompt"),
        ([["not an object"]], {}, None, "not list"),
    ],
)
def test_mistakes_name_the_row_and_the_mend(
    tmp_path: Path, rows: list[Any], config: dict[str, Any], kind: Any, says: str
) -> None:
    with pytest.raises(InputError, match=r"rows\.jsonl") as caught:
        read(write(tmp_path, rows), kind, **config)
    assert says in str(caught.value)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, [{}], "train.jsonl")
    with pytest.raises(InputError, match=r"did you mean train\.jsonl\?"):
        read(tmp_path / "trian.jsonl")


def test_broken_json_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(InputError, match=r"rows\.jsonl:2 is not JSON"):
        read(path)


def test_real_files_are_read_whole(shared_data: Path) -> None:
    assert len(read(shared_data / "sft/alpaca_en_demo.json", "messages")) == 999
    assert len(read(shared_data / "preference/dpo_en_demo.json", "preference")) == 300
    assert len(read(shared_data / "sft/wiki_demo.txt", "text")) == 30
    problems = read(shared_data / "gsm8k/test.jsonl", "prompt", columns={"prompt": "question"})
    assert len(problems) == 1319
    assert set(problems[0]) == {"prompt", "answer"}


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
RESULT = {"role": "tool", "content": "4"}


@pytest.mark.parametrize(
    "row",
    [
        {
            "conversations": [
                {"from": "human", "value": "2+2?"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2, "b": 2}}'},
                {"from": "observation", "value": "4"},
                {"from": "gpt", "value": "4"},
            ],
            "tools": '[{"name": "add", "parameters": {}}]',
        },
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}],
                },
                RESULT,
                ASSISTANT,
            ],
            "tools": TOOLS,
        },
    ],
)
def test_tool_calls_of_both_forms_are_the_same_messages(tmp_path: Path, row: dict[str, Any]) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert read(write(tmp_path, [row]), "messages") == [{"messages": [USER, call, RESULT, ASSISTANT], "tools": TOOLS}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER, ASSISTANT], "label": True}, True),
        ({"prompt": "2+2?", "completion": "4", "label": False}, False),
    ],
)
def test_answers_with_labels_are_unpaired(tmp_path: Path, row: dict[str, Any], expected: bool) -> None:
    (got,) = read(write(tmp_path, [row]), "unpaired")
    assert (got["prompt"], got["completion"], got["label"]) == ([USER], [ASSISTANT], expected)


def test_steps_keep_their_labels(tmp_path: Path) -> None:
    row = {"prompt": "2+2?", "completions": ["2 and 2", "make 5"], "labels": [True, False]}
    assert read(write(tmp_path, [row]), "stepwise") == [row | {"prompt": [USER]}]


def test_csv_reads_like_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion,label\n"2+2?",4,true\n"a ""b""\nc",d,false\n')
    first, second = read(path, "unpaired")
    assert (first["prompt"], first["label"], second["label"]) == ([USER], True, False)
    assert second["prompt"][0]["content"] == 'a "b"\nc'
    path.write_text("prompt,completion\na,b,c\n")
    with pytest.raises(InputError, match=r"rows\.csv:2 has another number of fields than the header's 2"):
        read(path)


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    write(tmp_path, [{"text": "second"}], "b.jsonl")
    write(tmp_path, [{"text": "first"}], "a.jsonl")
    assert read(tmp_path, "text") == [{"text": "first"}, {"text": "second"}]
    write(tmp_path, [{"text": 1}], "c.jsonl")
    with pytest.raises(InputError, match=r"c\.jsonl, row 1: text must be text"):
        read(tmp_path, "text")
    write(tmp_path, [], "d.json")
    with pytest.raises(InputError, match=r"mixes \.json and \.jsonl files"):
        read(tmp_path)


def test_a_file_of_two_formats_is_refused_at_the_row_that_differs(tmp_path: Path) -> None:
    path = write(tmp_path, [CONVERSATIONS[0], CONVERSATIONS[2]])
    with pytest.raises(InputError, match=r"row 2: has the columns of alpaca, but this file is messages"):
        read(path)


def test_real_tools_and_labels_are_read_whole(shared_data: Path) -> None:
    rows = read(shared_data / "sft/glaive_toolcall_en_demo.json", "messages")
    assert len(rows) == 300
    assert sum("tools" in row for row in rows) > 100
    assert len(read(shared_data / "preference/kto_en_demo.json", "unpaired")) == 300
