"""The built-in corpus: its parts share no conversation, and their records have the documented shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import pairwise

import pytest

from align.core.errors import InputError
from align.data import chitchat
from align.data.sources import DataSource, read_documents_of_split, read_source_prompts

pytestmark = pytest.mark.skipif(
    find_spec("chitchat_dataset") is None, reason="chitchat-dataset is not installed: pip install 'align-rlhf[demo]'"
)


@pytest.fixture(autouse=True, scope="module")
def corpus() -> Iterator[dict[str, dict]]:
    """Records of the corpus, read once because that takes half a second."""
    records = chitchat.load_records()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chitchat, "load_records", lambda: records)
        yield records


def extract_origin(conversation_id: str) -> str:
    """Return the corpus's id of the conversation that a window or a prompt was cut from."""
    return conversation_id.rpartition(":")[0]


def test_parts_are_disjoint_and_add_up(corpus: dict[str, dict]) -> None:
    parts = {part: [key for key, _ in chitchat.iter_part(part)] for part in chitchat.PARTS}
    assert sum(map(len, parts.values())) == len(corpus) == 7168
    assert set().union(*parts.values()) == set(corpus)
    for part, percent in chitchat.PARTS.items():
        assert len(parts[part]) / len(corpus) == pytest.approx(percent / 100, abs=0.015), part


def test_nothing_of_the_test_part_stands_in_another() -> None:
    origins_by_part = {
        part: {extract_origin(c.id) for c in (*chitchat.load_conversations(part), *chitchat.load_prompts(part))}
        for part in chitchat.PARTS
    }
    assert all(len(ids) > 100 for ids in origins_by_part.values())
    counts = Counter(key for ids in origins_by_part.values() for key in ids)
    assert counts.most_common(1)[0][1] == 1
    # Long lines identify a conversation: those of the test part are not trained on as plain text.
    test_lines = {line for text in chitchat.load_texts("test") for line in text.split("\n") if len(line) > 80}
    base_lines = {line for text in chitchat.load_texts("base") for line in text.split("\n")}
    assert len(test_lines) > 500
    assert len(test_lines & base_lines) <= 0.001 * len(test_lines)


def test_conversations_alternate_and_end_with_an_answer() -> None:
    for conversation in chitchat.load_conversations("sft"):
        roles = [m.role for m in conversation.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert 2 <= len(roles) <= chitchat.WINDOW_TURNS
        assert all(m.content.strip() for m in conversation.messages)


def test_only_the_well_rated_are_imitated(corpus: dict[str, dict]) -> None:
    imitated = {extract_origin(c.id) for c in chitchat.load_conversations("sft")}
    ratings = {key: chitchat.compute_rating(record) for key, record in chitchat.iter_part("sft")}
    assert all(ratings[key] is None or ratings[key] >= chitchat.MIN_RATING for key in imitated)  # pyright: ignore
    assert any(r is not None and r < chitchat.MIN_RATING for r in ratings.values())


def test_prompts_end_where_an_answer_is_due() -> None:
    prompts = chitchat.load_prompts("prompts")
    assert len({p.messages for p in prompts}) == len(prompts) > 2400
    assert {len(p.messages) for p in prompts} == {1, 3}
    for prompt in prompts:
        roles = [m.role for m in prompt.messages]
        assert roles[0] == roles[-1] == "user"
        assert all(a != b for a, b in pairwise(roles))
        assert sum(len(m.content) for m in prompt.messages) <= chitchat.MAX_PROMPT_CHARACTERS


def test_stages_read_their_own_parts_in_a_repeatable_order() -> None:
    data = DataSource("chitchat", limit=50)
    records_by_part = {
        "sft": read_documents_of_split(data, "train"),
        "test": read_documents_of_split(data, "test"),
        "prompts": read_source_prompts(data, "train"),
    }
    for part, records in records_by_part.items():
        assert {chitchat.assign_part(extract_origin(c.id)) for c in records if not isinstance(c, str)} == {part}
        assert len(records) == 50
    assert {chitchat.assign_part(extract_origin(c.id)) for c in read_source_prompts(data, "test")} == {"test"}
    assert (
        read_source_prompts(data, "train", 3)
        == read_source_prompts(data, "train", 3)
        != read_source_prompts(data, "train", 4)
    )
    assert all(
        isinstance(d, str) for d in read_documents_of_split(DataSource("chitchat", part="base", limit=5), "train")
    )


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(InputError, match=r"data\.part=train.*Choose one of: base, sft, prompts, test"):
        read_source_prompts(DataSource("chitchat", part="train"), "train")
