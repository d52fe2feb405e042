"""Calls of tools: as templates write them, as texts are split, and through the official client."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from raylign.serve.registry import Registry
from raylign.serve.tools import CallReader, notation_of

from benchmarks.models import tiny_model

from .live import Live, live

TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools: {% for t in tools %}{{ t | tojson }}{% endfor %}"
    'Answer <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>\n{% endif %}'
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = 'tools: Respond in the format {"name": function name, "parameters": dictionary} "parameters"'
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Bern", "Rome"]}, "days": {"$ref": "#/$defs/days"}},
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
CLOCK: Any = {"type": "function", "function": {"name": "clock", "description": "The time"}}
ASK: Any = [{"role": "user", "content": "What is the weather?"}]


@pytest.mark.parametrize(
    ("template", "notation"),
    [
        (TEMPLATE, "tagged"),
        (LLAMA, "bare"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
        ("{% if tools %}<tool_call>\n<function=name>", None),
    ],
)
def test_how_a_template_has_tools_called(template: str, notation: str | None) -> None:
    assert notation_of(template) == notation


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "words", "calls"),
    [
        ("No call at all < here", "No call at all < here", []),
        (f"Let me see. \n{CALL}", "Let me see.", ["weather"]),
        (f"{CALL}\n{CALL}\n", "", ["weather", "weather"]),
        ("<tool_call>{broken</tool_call> so", "<tool_call>{broken</tool_call> so", []),
        (CALL.replace("weather", "format_disk"), CALL.replace("weather", "format_disk"), []),
        (CALL.replace('"weather"', '["weather"]'), CALL.replace('"weather"', '["weather"]'), []),
        ("cut <tool_call>{", "cut <tool_call>{", []),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_text_is_split_alike_however_it_comes(text: str, words: str, calls: list[str], size: int) -> None:
    reader = CallReader("tagged", {"weather", "clock"})
    parts = [reader.push(text[i : i + size]) for i in range(0, len(text), size)] + [reader.finish()]
    assert "".join(said for said, _ in parts) == words
    assert [call.name for _, made in parts for call in made] == calls
    assert reader.called == bool(calls)


@pytest.mark.parametrize("size", [1, 1000])
def test_an_answer_that_is_a_call_as_a_whole(size: int) -> None:
    for text, words, count in (
        ('{"name": "clock", "parameters": {}}', "", 1),
        ('{"name": "other", "parameters": {}}', '{"name": "other", "parameters": {}}', 0),
        ("It is late", "It is late", 0),
    ):
        reader = CallReader("bare", {"clock"})
        parts = [reader.push(text[i : i + size]) for i in range(0, len(text), size)] + [reader.finish()]
        assert ("".join(said for said, _ in parts), sum(len(made) for _, made in parts)) == (words, count)


@pytest.fixture(scope="module")
def tooled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    from transformers import AutoTokenizer

    root: Path = tmp_path_factory.mktemp("tools")
    folder = tiny_model(root / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    registry = Registry(root / "registry")
    registry.promote("base", registry.register_base(folder).digest)
    with live(registry, "base") as up:
        yield up


@pytest.fixture
def client(tooled: Live) -> Iterator[openai.OpenAI]:
    with tooled.client() as client:
        yield client


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_must_be_made_has_arguments_of_the_schema(client: Any, choice: Any) -> None:
    names = set()
    for seed in range(6):
        said = client.chat.completions.create(
            model="base", messages=ASK, tools=[WEATHER, CLOCK], tool_choice=choice, seed=seed, max_tokens=300
        ).choices[0]
        if said.finish_reason == "length":
            continue  # any object is an argument of the clock
        (call,) = said.message.tool_calls
        assert said.finish_reason == "tool_calls"
        assert said.message.content is None
        names.add(call.function.name)
        if call.function.name == "weather":
            jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)
    assert "weather" in names
    assert names == {"weather"} or choice == "required"


def test_a_stream_gives_the_same_call_as_the_whole_answer(client: Any) -> None:
    asked: dict[str, Any] = {"model": "base", "messages": ASK, "tools": [WEATHER], "seed": 3}
    asked["tool_choice"] = "required"
    (whole,) = client.chat.completions.create(**asked).choices[0].message.tool_calls
    choices = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
    parts = [part for choice in choices for part in choice.delta.tool_calls or []]
    assert [(part.index, part.function.name) for part in parts] == [(0, "weather")]
    assert parts[0].function.arguments == whole.function.arguments
    assert choices[-1].finish_reason == "tool_calls"
    assert not "".join(choice.delta.content or "" for choice in choices)


def test_tools_and_what_they_answered_are_in_the_prompt(tooled: Live, client: Any) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    turns: Any = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]

    def size(**options: Any) -> int:
        said = client.chat.completions.create(model="base", messages=turns, max_tokens=1, **options)
        return said.usage.prompt_tokens

    with_tools, without = size(tools=[WEATHER]), size()
    assert with_tools > without
    assert size(tools=[WEATHER], tool_choice="none") == without
    assert size(tools=[WEATHER], tool_choice="auto") == with_tools


@pytest.mark.parametrize(
    "options",
    [
        {"tools": [WEATHER, WEATHER]},
        {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "clock"}}},
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        {"tools": [WEATHER], "response_format": {"type": "json_object"}},
        {"messages": [*ASK, {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": {}}]}]},
        {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "nonsense"}}}],
            "tool_choice": "required",
        },
    ],
    ids=["same name", "unknown name", "bad name", "form too", "no call", "bad schema"],
)
def test_what_makes_no_sense_is_refused(client: Any, options: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**{"model": "base", "messages": ASK, "max_tokens": 2} | options)
