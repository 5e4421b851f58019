"""Token ids of many texts: the same as one at a time, kept by content, and never wrong for the cache's sake."""

from __future__ import annotations

import contextlib
import os

import numpy as np
import pyarrow as pa
import pytest

from latent_grpo.common.config import ConfigError, NewModelConfig, PromptConfig
from latent_grpo.common.encoding import BATCH, FOLDER_VARIABLE, TextEncoder, UnencodableText, cache_folder
from latent_grpo.common.models import make_tokenizer
from latent_grpo.common.prompts import PromptRenderer
from latent_grpo.common.tasks.arithmetic import make_arithmetic_tokenizer
from latent_grpo.common.types import Problem

TEXTS = [f"{i}+{i // 7}={i + i // 7}; and so on <eos>" for i in range(BATCH + 5)]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "cache"))
    return cache_folder()


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(NewModelConfig(tokenizer="bpe", vocab_size=400), TEXTS[:200])


class Watched:
    """An encoder with everything that it shows and says."""

    def __init__(self, tokenizer, large: int = 10) -> None:
        self.said: list[str] = []
        self.shown: list[tuple[str, int, list[int]]] = []
        self.encode = TextEncoder(tokenizer, self._show, self.said.append, large=large).encode

    @contextlib.contextmanager
    def _show(self, name, total, unit):
        self.shown.append((name, total, []))
        yield self.shown[-1][2].append


@pytest.mark.parametrize("special_tokens", [False, True])
def test_batches_give_the_ids_of_single_texts(tokenizer, special_tokens):
    found = Watched(tokenizer).encode("texts", TEXTS, special_tokens=special_tokens)
    assert (len(found), found.values.dtype) == (len(TEXTS), np.int32)
    for place in (0, 1, BATCH - 1, BATCH, len(TEXTS) - 1):
        assert found[place].tolist() == tokenizer.encode(TEXTS[place], add_special_tokens=special_tokens)


def test_progress_is_shown_and_the_second_time_comes_from_the_disk(tokenizer, folder):
    first, again = Watched(tokenizer), Watched(tokenizer)
    made = first.encode("the prompts of gsm", TEXTS, special_tokens=False)
    assert first.shown == [("tokenise the prompts of gsm", len(TEXTS), [BATCH, len(TEXTS)])]
    assert not first.said
    read = again.encode("the prompts of gsm", TEXTS, special_tokens=False)
    assert not again.shown
    assert again.said == ["the prompts of gsm: 4,101 texts, tokenised before"]
    assert np.array_equal(made.values, read.values)
    assert np.array_equal(made.offsets, read.offsets)
    assert len(list(folder.iterdir())) == 1


def test_another_text_order_or_tokenizer_is_another_entry(tokenizer, folder):
    texts = TEXTS[:20]
    for given in (texts, texts[::-1], [*texts[:-1], texts[-1] + "!"], ["".join(texts[:2]), *texts[2:], ""]):
        Watched(tokenizer).encode("texts", given, special_tokens=False)
    Watched(tokenizer).encode("texts", texts, special_tokens=True)
    assert len(list(folder.iterdir())) == 5
    Watched(make_arithmetic_tokenizer()).encode("texts", ["1+2"] * 20, special_tokens=False)
    Watched(tokenizer).encode("texts", ["1+2"] * 20, special_tokens=False)
    assert len(list(folder.iterdir())) == 7


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other"])
def test_a_damaged_entry_is_said_and_made_again(tokenizer, folder, damage):
    expected = Watched(tokenizer).encode("texts", TEXTS[:50], special_tokens=False)
    (entry,) = folder.iterdir()
    content = bytearray(entry.read_bytes())
    ids = np.frombuffer(expected.values, dtype=np.uint8).tobytes()
    place = bytes(content).index(ids[:64])
    content[place] ^= 1
    with pa.OSFile(str(entry), "wb") as file:
        file.write({"cut": bytes(content[:-300]), "flip": bytes(content), "empty": b"", "other": b"x" * 500}[damage])
    watched = Watched(tokenizer)
    found = watched.encode("texts", TEXTS[:50], special_tokens=False)
    assert "cannot be read" in watched.said[0]
    assert len(watched.shown) == 1
    assert np.array_equal(found.values, expected.values)
    assert not Watched(tokenizer).encode("texts", TEXTS[:50], special_tokens=False).values.flags.writeable


def test_a_cache_that_cannot_be_written_is_said(tokenizer, folder):
    folder.parent.parent.joinpath("cache").write_text("a file where the folder should be")
    watched = Watched(tokenizer)
    assert len(watched.encode("texts", TEXTS[:50], special_tokens=False)) == 50
    assert FOLDER_VARIABLE in watched.said[0]


def test_a_few_texts_touch_no_disk(tokenizer, folder):
    watched = Watched(tokenizer)
    assert len(watched.encode("texts", TEXTS[:9], special_tokens=False)) == 9
    assert not watched.encode("texts", [], special_tokens=False).values.size
    assert not folder.exists()
    assert [*watched.shown, *watched.said] == []


def test_a_text_outside_the_vocabulary_is_named():
    tokenizer = make_arithmetic_tokenizer()
    with pytest.raises(UnencodableText, match="text 3, '1%2'") as found:
        TextEncoder(tokenizer).encode("texts", ["1+2", "3", "4", "1%2", "5"], special_tokens=False)
    assert found.value.index == 3
    problems = [Problem(uid=f"t/{i}", task="t", messages=(("user", t),), answer="1") for i, t in enumerate(["1", "%"])]
    with pytest.raises(ConfigError, match=r"problem t/1 \('%'\): its prompt cannot be encoded"):
        PromptRenderer(tokenizer, PromptConfig()).encode_all(problems, TextEncoder(tokenizer))


def test_the_cache_keeps_its_bound(tokenizer, folder):
    folder.mkdir(parents=True)
    for age, name in enumerate("abc"):
        entry = folder / f"{name}.arrow"
        entry.write_bytes(b"x" * 5000)
        os.utime(entry, (age, age))
    TextEncoder(tokenizer, large=10, most_bytes=16_000).encode("texts", TEXTS[:50], special_tokens=False)
    left = {entry.name for entry in folder.iterdir()}
    assert left >= {"b.arrow", "c.arrow"}
    assert "a.arrow" not in left
    assert len(left) == 3, "what was made now stays"
