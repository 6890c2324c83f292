"""Assignment of items to annotators: exclusive leases, which votes end in one transaction with the ledger.

    queue = AssignmentQueue(store, "quickstart")
    task = queue.take("ann")
    seq, following = queue.vote("ann", task.token, key, Judgement(tiers), terms)

An item is *leased* to one annotator for each vote that it still wants. A lease ends with a vote, when it is returned,
or when it expires without a request from its holder. After that the item is leased to another annotator, but a late
vote is still accepted. Annotators are never assigned an item that they have judged or hold, except for deliberate
repeats.

queue   the requests of annotators, one transaction each
leases  selection and order of items, leases, and the terms under which an annotator judges
"""

from align.annotate.assignment.leases import REPEAT_AFTER
from align.annotate.assignment.queue import AssignmentQueue

__all__ = ["REPEAT_AFTER", "AssignmentQueue"]
