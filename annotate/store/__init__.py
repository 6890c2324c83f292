"""The annotation store: prompts, the answers sampled for them, and what people (or their stand-in) said of them.

    store = Store.open("sqlite:///runs/annotations.db")
    item = store.add_item("quickstart", "sample-1/17", prompt, [Candidate("Hello!"), Candidate("What?")])
    best_first = Judgement(((f"{item}-0",), (f"{item}-1",)))
    store.record("quickstart", item, best_first, annotator="ann", key="tab-1/0")
    prefs = preference_pairs.preferences(store, "quickstart")

ledger    rows in a chain of hashes, pure           tables               what lies in the database
records   the records and their rows                schema               how a database is opened
queries   what is asked of the tables               connections          writers and readers
checks    what is refused before it is written      database             the store itself
items     added, read alone or in pages             projects             settings, guidelines and keys
votes     recorded, retracted, those that stand     configuring          their changes
erasure   what goes, and its tombstone; accounts    integrity            the walk over chain and contents
counting  the counters of work, counted anew      about                what there is of one thing to forget
preference_pairs  what rankings teach
"""

from align.annotate.store.checks import AlreadyJudged
from align.annotate.store.configuring import configure, publish_guidelines
from align.annotate.store.database import Store
from align.annotate.store.projects import Settings
from align.annotate.store.records import Candidate, Item, Judgement, Vote, storable
from align.core.chain import Head

__all__ = [
    "AlreadyJudged", "Candidate", "Head", "Item", "Judgement", "Settings", "Store", "Vote", "configure",
    "publish_guidelines", "storable",
]  # fmt: skip
