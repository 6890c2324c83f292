"""`stage=annotate`: judgements of the sampled answers."""

from __future__ import annotations

from dataclasses import dataclass

from align.config.root import one_of, positive
from align.errors import require


@dataclass
class AnnotateConfig:
    """`annotator=simulated` is a documented stand-in for a person, for demos and tests: it ranks by a sentiment score,
    with noise such that it agrees with the noiseless order on the share `agreement` of untied pairs. `annotators` of
    them judge every item, each with noise of its own: their rankings of an item are read together by `stage=reward`."""

    name: str = "annotate"
    annotator: str = "simulated"
    annotators: int = 1
    agreement: float = 0.75

    def __post_init__(self) -> None:
        one_of("stage.annotator", self.annotator, ("simulated",))
        positive("stage.annotators", self.annotators)
        require(
            0.5 < self.agreement < 1,
            "stage.agreement",
            self.agreement,
            "is no agreement better than chance",
            "Give a share above 0.5 and below 1.",
        )
