"""What an audit looks for in payloads: private values, uniformity, sizes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audited import (
    VICTIM,
    WIDTH,
    failures,
    federate,
    read,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from rounds import make_encrypted_plan, make_plan

from secure_fedprompt.audit import fields, private, summary, uniformity
from secure_fedprompt.audit.findings import Level
from secure_fedprompt.audit.private import Private
from secure_fedprompt.protocol import errors, homomorphic
from secure_fedprompt.protocol import messages as m
from secure_fedprompt.protocol.codec import MAX_FRAME

# -- private values --------------------------------------------------------------------------------


def record_of(
    folder: Path, values: dict[str, Any], classes: tuple[str, ...] = ("lighthouse",)
) -> Private:
    path = folder / "private.jsonl"
    private.write_head(path, VICTIM, classes, {"training images": 1234})
    private.write_round(path, 1, values)
    assert path.stat().st_mode & 0o077 == 0
    return Private.read(path)


FLOATS = np.random.default_rng(5).normal(0, 1, 12)


def forms() -> dict[str, bytes]:
    single = FLOATS.astype("<f4")
    bits = int.from_bytes(FLOATS[:3].tobytes(), "big") << 3
    return {
        "float64": FLOATS[4:5].astype("<f8").tobytes(),
        "float64 big-endian": FLOATS[4:5].astype(">f8").tobytes(),
        "float32": single[3:5].tobytes(),
        "float32 big-endian": FLOATS[3:5].astype(">f4").tobytes(),
        "float16": FLOATS[2:8].astype("<f2").tobytes(),
        "bfloat16": (single[2:8].view(np.uint32) >> 16).astype(">u2").tobytes(),
        "float64 at a bit's offset": bits.to_bytes(25, "big"),
        "float64 at a bit's offset, least significant first": (
            int.from_bytes(FLOATS[:3].tobytes(), "little") << 3
        ).to_bytes(25, "little"),
        "class name": b"LightHouse",
        "class name in UTF-16": "lighthouse".encode("utf-16-le"),
    }


@pytest.mark.parametrize("form", list(forms()))
def test_private_values_are_found_in_every_form(tmp_path: Path, form: str) -> None:
    noise = np.random.default_rng(1).bytes(301)

    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Finish) and recipient == VICTIM and form:
            return dataclasses.replace(message, vector=noise + forms()[form] + noise)
        return message

    _, folders = federate(tmp_path, tap)
    known = record_of(tmp_path, {"ctx": FLOATS})
    (log,) = read(folders, "server")
    result = summary.audit(log, [], "", known)
    found = [text for check, text in failures(result) if check == "private values"]
    assert any(form.split(maxsplit=1)[0] in text for text in found), found
    assert len(found) <= 2


def test_values_across_two_pieces_of_a_frame_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needles = private._needles(record_of(tmp_path, {"ctx": FLOATS}))
    noise = np.random.default_rng(2).bytes(64)
    for chunk in (1, 7, 16):
        monkeypatch.setattr(private, "_CHUNK", chunk)
        for at in range(40):
            frame = noise[:at] + forms()["float64"] + noise[at:]
            assert private._found(frame, needles) == ["a private value as float64"]


def test_a_count_in_a_reason_shows(tmp_path: Path) -> None:
    def tap(sender: str, recipient: str, message: m.Message) -> m.Message:
        if isinstance(message, m.Consistent) and sender == VICTIM and message.round == 1:
            return m.Withdraw(message.run, message.round, "PolicyError", "1234 images, too few")
        return message

    _, folders = federate(tmp_path, tap)
    known = record_of(tmp_path, {"ctx": FLOATS}, tuple("abcdefg"))
    (log,) = read(folders, "server")
    found = failures(summary.audit(log, [], "", known))
    assert [text for check, text in found if check == "private values"] == [
        "reason says 1234, as many as this client has training images"
    ]


def test_a_good_run_shows_nothing_private_and_an_open_one_everything(tmp_path: Path) -> None:
    for protection, hits in (("masks", 0), ("none", 2)):
        world, folders = federate(tmp_path / protection, protection=protection)
        toy = world.toys[VICTIM]
        weighted = toy.run(type("Work", (), {"plan": make_plan(4), "base": np.full(WIDTH, 0.5)})())
        assert weighted
        uploads = [
            msg for e, msg in read(folders, VICTIM)[0].messages() if isinstance(msg, m.PlainUpload)
        ]
        values = {
            f"upload {i}": np.frombuffer(u.vector, "<f8")[:WIDTH] for i, u in enumerate(uploads[:2])
        }
        known = record_of(tmp_path / protection, values or {"ctx": FLOATS}, tuple("abcdefg"))
        (log,) = read(folders, "server")
        found = failures(summary.audit(log, [], "", known))
        assert len([1 for check, _ in found if check == "private values"]) == hits


def test_a_file_that_is_no_private_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for content in ("", "{}", '{"format": "other"}', "[1]"):
        path.write_text(content)
        with pytest.raises(errors.ConfigError, match="no private record"):
            Private.read(path)


# -- statistics and sizes --------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([1 << 8, 1 << 22, 1 << 32, 18014398504409161]), st.integers(80, 5000))
def test_uniform_words_pass(modulus: int, count: int) -> None:
    words = np.random.default_rng(count).integers(0, modulus, count, dtype=np.uint64)
    assert uniformity.p_value(words, modulus) > 1e-6


@pytest.mark.parametrize("modulus", [1 << 22, 1 << 32, 18014398504409161])
def test_small_or_clustered_words_fail(modulus: int) -> None:
    rng = np.random.default_rng(0)
    small = rng.integers(0, modulus >> 6, 200).astype(np.uint64)
    signed = np.where(rng.random(200) < 0.5, small, np.uint64(modulus) - 1 - small)
    for words in (small, signed, np.zeros(200, np.uint64)):
        assert uniformity.p_value(words.astype(np.uint64), modulus) < 1e-9


def test_p_values_are_uniform_under_the_null() -> None:
    rng = np.random.default_rng(1)
    found = np.array([
        uniformity.p_value(rng.integers(0, 1 << 32, 400, dtype=np.uint64), 1 << 32)
        for _ in range(2000)
    ])  # fmt: skip
    assert np.abs(np.quantile(found, [0.1, 0.5, 0.9]) - [0.1, 0.5, 0.9]).max() < 0.05


def test_residues_of_a_ciphertext_are_what_is_tested() -> None:
    plan = make_encrypted_plan(4, "bfv")
    scheme = homomorphic.scheme("bfv", plan.parameters)
    seal = homomorphic.sealapi()
    secret = seal.KeyGenerator(scheme.context).secret_key()
    encryptor = seal.Encryptor(scheme.context, secret)
    fresh = scheme.save(encryptor.encrypt_symmetric(seal.Plaintext("0")))
    message = m.CipherUpload(plan.run, 1, bytes(32), (fresh,), bytes(16), bytes(64))
    tag, *halves = uniformity.payloads(message, plan, VICTIM)
    assert (tag.part, tag.modulus) == ("tag", (1 << 61) - 1)
    assert [half.part for half in halves] == ["ciphertext 0.0", "ciphertext 0.1"]
    for half in halves:
        assert len(half.words) == plan.parameters.degree
        assert half.words.max() < half.modulus
        assert half.modulus.bit_length() == 54
        assert uniformity.p_value(half.words, half.modulus) > 1e-6
    assert not list(uniformity.payloads(message, make_plan(4), VICTIM))


def test_every_message_has_a_decision_about_its_fields() -> None:
    for cls, hidden in fields.PROTECTED.items():
        assert cls in m.CATALOGUE.types.values()
        assert set(hidden) <= {f.name for f in dataclasses.fields(cls)}
    opaque = {  # blobs that are in the clear on purpose
        "Initial.vector", "PlainUpload.vector", "Plan.base", "Finish.vector", "Reveal.shares",
        "Welcome.settings", "KeyGrant.context", "Terms.start",
        "Probed.settings", "OpenedSum.vector", "OpenedSum.members",
    }  # fmt: skip
    for cls in m.CATALOGUE.types.values():
        for field in dataclasses.fields(cls):
            blob = (
                "Blob" in str(field.type)
                or field.type in ("Vector",)
                or "Vector" in str(field.type)
            )
            decided = (
                field.name in fields.PROTECTED.get(cls, {})
                or f"{cls.__name__}.{field.name}" in opaque
            )
            assert not blob or decided, f"{cls.__name__}.{field.name}"


def test_sizes_by_the_plan_are_those_of_real_frames(good: dict[str, Path]) -> None:
    (log,) = read(good, "server")
    rows = {(row.kind, row.way): row for row in summary.traffic(log, log.runs[-1])}
    for kind in ("MaskedUpload", "Adverts", "Inbox", "Shares", "Reveal", "UnmaskRequest",
                 "SurvivorList", "Consistent", "Advert", "OpenedSum", "LogHead", "RoundEnd"):  # fmt: skip
        found = [row for (k, _), row in rows.items() if k == kind]
        assert found, kind
        for row in found:
            assert row.expected == row.bytes, kind
    assert fields.fixed_size(m.Hello) is None
    assert fields.fixed_size(m.Alive) == 0
    assert fields.expected_size(m.Finish, make_plan(4), VICTIM) is None
    upper = fields.expected_size(m.CipherUpload, make_encrypted_plan(4, "bfv"), VICTIM)
    assert upper is not None
    assert upper < MAX_FRAME


def test_differences_are_taken_modulo_q() -> None:
    q = 18014398504409161
    one, two = (
        uniformity.Payload("c", r, "x", np.array([w], np.uint64), q) for r, w in ((1, 5), (2, 3))
    )
    assert uniformity._difference(one, two).tolist() == [q - 2]


def test_many_tests_together_give_few_false_alarms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uniformity, "p_value", lambda words, modulus: 4e-7)
    one = uniformity.Payload("c", 1, "x", np.zeros(100, np.uint64), 1 << 32)
    two = uniformity.Payload("d", 1, "x", np.zeros(100, np.uint64), 1 << 32)
    assert [f.level for f in uniformity.check_uniformity([one])] == [Level.FAIL, Level.NOTE]
    assert [f.level for f in uniformity.check_uniformity([one, two])] == [Level.NOTE]  # three tests


def test_small_fields_are_tested_together() -> None:
    zeros = [
        uniformity.Payload(f"c{i}", 1, "weight", np.zeros(20, np.uint64), 1 << 32) for i in range(4)
    ]
    assert [f.level for f in uniformity.check_uniformity(zeros)] == [Level.FAIL, Level.NOTE]
    (note,) = uniformity.check_uniformity(zeros[:3])
    assert note.text == "60 words of small fields are too few to test"
