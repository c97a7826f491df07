"""Frames: one encoding per message, and a named error for everything else."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rounds import make_plan

from secure_fedprompt.protocol import codec, errors
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.client_noise import Noise
from secure_fedprompt.protocol.homomorphic import Parameters
from secure_fedprompt.protocol.messages import CATALOGUE
from secure_fedprompt.protocol.selection.task import Selection


def values(annotation: Any) -> st.SearchStrategy[Any]:
    """Any value that a field's annotation admits."""
    kind = None
    if typing.get_origin(annotation) is typing.Annotated:
        annotation, kind = typing.get_args(annotation)
    match kind:
        case codec.Number("<d"):
            return st.floats(allow_nan=False, allow_infinity=False)
        case codec.Number(form):
            bits = {"<B": 8, "<H": 16, "<I": 32, "<Q": 64}[form]
            return st.integers(0, 2**bits - 1)
        case codec.Exact(size):
            return st.binary(min_size=size, max_size=size)
        case codec.UpTo(_):
            return st.binary(max_size=40)
        case codec.Text(limit):
            alphabet = st.characters(categories=["L", "N", "P"])
            return st.text(alphabet, max_size=limit // 4)
        case codec.Roll(_):
            names = st.text(
                st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=64
            )
            return st.sets(names, max_size=5).map(lambda found: tuple(sorted(found)))
        case codec.Many(_):
            return st.lists(values(typing.get_args(annotation)[0]), max_size=3).map(tuple)
    return structs(annotation)


def structs(cls: type) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return st.builds(cls, **{f.name: values(hints[f.name]) for f in dataclasses.fields(cls)})


anything = st.one_of([structs(cls) for cls in CATALOGUE.types.values()])


@given(anything)
def test_round_trip(message: m.Message) -> None:
    frame = CATALOGUE.encode(message)
    again = CATALOGUE.decode(frame)
    assert again == message
    assert CATALOGUE.encode(again) == frame


@given(anything, st.data())
def test_truncated_and_trailing(message: m.Message, data: st.DataObject) -> None:
    frame = CATALOGUE.encode(message)
    with pytest.raises(errors.TrailingBytesError):
        CATALOGUE.decode(frame + b"\0")
    cut = data.draw(st.integers(0, len(frame) - 1))
    with pytest.raises(errors.CodecError):
        CATALOGUE.decode(frame[:cut])


@given(st.binary(max_size=200))
def test_any_bytes_decode_canonically_or_raise_a_codec_error(data: bytes) -> None:
    try:
        message = CATALOGUE.decode(data)
    except errors.CodecError:
        return
    assert CATALOGUE.encode(message) == data


@given(anything, st.data())
def test_flipped_bytes_never_yield_the_same_message(
    message: m.Message, data: st.DataObject
) -> None:
    frame = bytearray(CATALOGUE.encode(message))
    frame[data.draw(st.integers(0, len(frame) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        assert CATALOGUE.decode(bytes(frame)) != message
    except errors.CodecError:
        pass


def test_unknown_version_and_type() -> None:
    frame = CATALOGUE.encode(m.Alive())
    with pytest.raises(errors.UnknownVersionError, match=f"version {codec.VERSION + 1}"):
        CATALOGUE.decode(bytes((codec.VERSION + 1,)) + frame[1:])
    with pytest.raises(errors.UnknownTypeError, match="200"):
        CATALOGUE.decode(frame[:1] + b"\xc8")


def test_limits_are_checked_before_anything_is_read() -> None:
    head = CATALOGUE.encode(m.Reveal(bytes(16), 1, b""))[:-4]
    with pytest.raises(errors.TooLargeError):
        CATALOGUE.decode(head + (2**32 - 1).to_bytes(4, "little"))
    with pytest.raises(errors.TooLargeError):
        CATALOGUE.encode(m.Leave("x" * 49, ""))


@pytest.mark.parametrize("text", ["line\nbreak", "\x1b[31mred", "\x00"])
def test_control_characters_never_reach_a_log(text: str) -> None:
    with pytest.raises(errors.FieldError):
        CATALOGUE.encode(m.Leave("X", text))
    raw = CATALOGUE.encode(m.Leave("X", "?" * len(text))).replace(b"?" * len(text), text.encode())
    with pytest.raises(errors.FieldError):
        CATALOGUE.decode(raw)


def test_repr_shows_sizes_not_contents() -> None:
    secret = b"\xde\xad\xbe\xef" * 8
    shown = repr(m.Reveal(bytes(16), 3, secret))
    assert "32 bytes" in shown
    assert "dead" not in shown
    assert "\\xde" not in shown


def test_plan_digest_covers_every_field() -> None:
    plan = make_plan(4)
    seen = {plan.digest}
    for field in dataclasses.fields(plan):
        value = getattr(plan, field.name)
        match value:
            case bytes():
                other: Any = bytes([value[0] ^ 1]) + value[1:]
            case bool() | int() | float():
                other = value + 1
            case str():
                other = value + "x"
            case tuple():
                other = value[:-1] or ("c002",)
            case Parameters():
                other = dataclasses.replace(value, degree=1)
            case Selection():
                other = dataclasses.replace(value, keep=1)
            case Noise():
                other = dataclasses.replace(value, honest=1)
        seen.add(dataclasses.replace(plan, **{field.name: other}).digest)
    assert len(seen) == 1 + len(dataclasses.fields(plan))
