"""The scores of a data set's rows (`stage.score`): by the loss of `model=`, or by the reward of `reward=`. Models are
loaded here, and are gone when the rows are scored."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from align.config.data import LOSS, ScoreConfig
from align.config.root import Config, plain
from align.config.scorers import reward_spec
from align.core.errors import require
from align.data.chat.template import use_template
from align.data.read.content import FEEDBACK
from align.data.sets import score_cuts
from align.data.sets.spool import Rows
from align.report.figure_text import counted
from align.run import Run
from align.track import progress


def scorer_name(run: Run, config: Config) -> str:
    """What people call that which scores."""
    if config.stage.score.by == LOSS:
        return run.base.id
    from align.evals.judges import title

    return title(plain(config)["reward"], run.inputs)


def scores_of(run: Run, config: Config, rows: Rows) -> np.ndarray:
    """The score of each row, float64 (N); nan for none.

    Raises:
        InputError: the rows are answers with a label, none of them can be scored, or a score is no number.
    """
    from align.models.finite import diverged

    asked: ScoreConfig = config.stage.score
    problem = "scores what is to be imitated, and the rows are answers with a label, of which some are not wanted"
    require(rows.kind != FEEDBACK, "stage.score.by", asked.by, problem, "Drop it.")
    if asked.by == LOSS:
        score = loss_of(run, config)
    else:
        score = reward_of(run, config, score_cuts.read(rows, np.arange(min(score_cuts.PIECE, rows.count))))

    def numbers(records: Sequence[Any]) -> np.ndarray:
        given = score(records)
        if np.isinf(given).any():
            raise diverged(f"the {asked.by} of a row by {scorer_name(run, config)} is no number", None, config.dtype)
        return given

    print(f"scores {counted(rows.count, 'row')} by the {asked.by} of {scorer_name(run, config)}", flush=True)
    with progress("score", rows.count, score_cuts.scored_before(rows)) as bar:
        found = score_cuts.scored(rows, numbers, bar.advance)
    what = "no text and no answer that is trained on" if asked.by == LOSS else "no answer behind a question"
    problem = f"finds nothing to score: there is {what}, or none that the model's context holds"
    require(not np.isnan(found).all(), "stage.score.by", asked.by, problem, "Drop it, or score by the other.")
    return found


def loss_of(run: Run, config: Config) -> score_cuts.Score:
    """Scores by the loss of the base."""
    from align.evals.row_scores import losses
    from align.models.load import choose_device, choose_dtype, context_length, describe, load_base, load_tokenizer

    asked: ScoreConfig = config.stage.score
    base, device = run.base, choose_device(config.device)
    tokenizer = load_tokenizer(base)
    use_template(tokenizer, config.data.template, config.data.template_kwargs)
    model = load_base(base, "lora", device, choose_dtype(config.dtype, device))  # its weights as they are
    length = min(asked.max_length, context_length(describe(base)))
    return partial(losses, model, tokenizer, max_length=length, batch_size=asked.batch_size)


def reward_of(run: Run, config: Config, first: Sequence[Any]) -> score_cuts.Score:
    """Scores by a reward.

    Args:
        first: the records whose answers bring the learned members of an ensemble or a sum to one scale.
    """
    from align.evals.row_scores import on_one_scale, rewards
    from align.models.load import choose_device, choose_dtype
    from align.reward.build import build, on_its_own_base
    from align.reward.inputs import models_of

    device = choose_device(config.device)
    dtype, size, models = choose_dtype(config.dtype, device), config.stage.score.batch_size, models_of(run.inputs)
    made = [on_its_own_base(model, device, dtype, size) for model in models]
    hides = any(m.manifest and m.manifest.config["data"].get("reasoning") == "hide" for m in models)
    fits = partial(fits_all, made)
    scorer = on_one_scale(build(reward_spec(config.reward), iter(made)), first, fits, hides)
    return partial(rewards, scorer, fits=fits, hides_reasoning=hides)


def fits_all(models: Sequence[Any], conversation: Any) -> bool:
    return all(model.fits(conversation) for model in models)
