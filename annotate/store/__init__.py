"""The annotation store: prompts, the answers sampled for them, and what people (or their stand-in) said of them.

    store = Store.open("sqlite:///runs/annotations.db")
    item = store.add_item("quickstart", "sample-1/17", prompt, [Candidate("Hello!"), Candidate("What?")])
    store.record_ranking("quickstart", item, [[f"{item}-0"], [f"{item}-1"]], annotator="ann", key="tab-1/0")
    prefs = preferences(store, "quickstart")

ledger    the hash chain's arithmetic, pure         schema    the tables, and how a database is opened
records   the records and their rows                database  the store itself
queries   what it asks of its tables                verify    the walk over chain and contents
pairs     rankings → preference pairs
"""

from annotate.store.database import Store
from annotate.store.ledger import Head
from annotate.store.pairs import preferences
from annotate.store.records import Candidate, Item, Ranking

__all__ = ["Candidate", "Head", "Item", "Ranking", "Store", "preferences"]
