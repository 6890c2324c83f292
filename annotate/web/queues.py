"""Which queue a request is for: of the person who asks, in a project of theirs."""

from __future__ import annotations

import threading
from hashlib import sha256

from align.annotate.accounts import Person
from align.annotate.assignment import AssignmentQueue
from align.annotate.store import Store
from align.core.chain import canonical


class AssignmentQueues:
    """The queues of a store's projects, each made when it is first asked for. Serve a store from one process."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._made: dict[str, AssignmentQueue] = {}
        self._lock = threading.Lock()

    def of(self, project: str) -> AssignmentQueue:
        """Raises: InputError: unknown project."""
        with self._lock:
            if project not in self._made:
                self._made[project] = AssignmentQueue(self.store, project)
            return self._made[project]

    def id(self, person: Person, project: str) -> str:
        """What a page calls a person's place in a project. What it keeps in the browser lies under this name, and what
        it sends says it: another's words, or another project's, are never taken for theirs."""
        return sha256(canonical([self.store.masked_url, project, person.name]).encode()).hexdigest()[:16]

    def named(self, person: Person, id: str) -> AssignmentQueue | None:
        """The queue that a page calls so; None where it is not theirs (any more)."""
        return next((self.of(project) for project in person.roles if self.id(person, project) == id), None)
