"""The annotation store: prompts, the answers sampled for them, and the judgements of people or simulated annotators.

    store = Store.open("sqlite:///runs/annotations.db")
    item = store.add_item("quickstart", "sample-1/17", prompt, [Candidate("Hello!"), Candidate("What?")])
    best_first = Judgement(((f"{item}-0",), (f"{item}-1",)))
    store.record("quickstart", item, best_first, annotator="ann", key="tab-1/0")
    prefs = preference_pairs.load_preferences(store, "quickstart")

database          the store itself                   tables       the tables of the database
records           its records and their rows         connections  engine, transactions and reads
projects          settings, guidelines and state     ledger       rows in a chain of hashes
preference_pairs  rankings as preference pairs       erasure      what the store holds of one subject, and its erasure
integrity         checks of chain and contents
"""

from align.annotate.store.database import AlreadyJudged, Store
from align.annotate.store.projects import ProjectSettings, configure_project, publish_guidelines
from align.annotate.store.records import AnnotationItem, Candidate, Judgement, Vote, replace_unwritable
from align.core.chain import ChainHead

__all__ = [
    "AlreadyJudged",
    "AnnotationItem",
    "Candidate",
    "ChainHead",
    "Judgement",
    "ProjectSettings",
    "Store",
    "Vote",
    "configure_project",
    "publish_guidelines",
    "replace_unwritable",
]
