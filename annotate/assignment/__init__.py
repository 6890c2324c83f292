"""Who judges what next: exclusive leases, and votes that end them, in one transaction with the ledger.

    queue = AssignmentQueue(store, "quickstart")
    task = queue.take("ann")
    seq, following = queue.vote("ann", task.token, key, Judgement(tiers), terms)

An item is *leased* to one annotator for each vote that it still wants. A lease ends with a vote, with its return, or
when its holder has shown no sign of life for a while; then the item goes to somebody else, and a vote that comes late
is taken all the same. Nobody is given an item that they have judged or hold, but for deliberate repeats.

queue   what annotators ask, a transaction each
leases  which item is given next and in which order, and what an annotator holds, under which terms
"""

from align.annotate.assignment.leases import REPEAT_AFTER
from align.annotate.assignment.queue import AssignmentQueue

__all__ = ["REPEAT_AFTER", "AssignmentQueue"]
