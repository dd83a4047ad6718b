"""What is due after a step: logging, evaluating, saving, stopping. A pure function of the step."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Every:
    """Steps between occasions; 0 is only after the last step."""

    log: int
    eval_loss: int
    eval_wer: int
    save: int
    has_validation: bool = True  # without it nothing is evaluated


@dataclass(frozen=True)
class Occasions:
    """What is due after a step."""

    log: bool
    eval_loss: bool
    eval_wer: bool
    save: bool
    last: bool
    stop: bool  # before the last step

    @property
    def evaluate(self) -> bool:
        return self.eval_loss or self.eval_wer

    @property
    def check(self) -> bool:
        """Whether gradient norms are to be looked at, before anything is kept."""
        return self.log or self.evaluate or self.save


def criterion(every: Every, total_steps: int) -> str:
    """What the best model is chosen by: raw WER where it is computed at least twice, else loss.

    >>> criterion(Every(10, 100, 100, 100), 200), criterion(Every(10, 100, 0, 100), 200)
    ('wer_raw', 'eval_loss')
    """
    twice = 0 < every.eval_wer < total_steps  # the last step has an evaluation of its own
    return "wer_raw" if twice else "eval_loss"


def occasions(
    done: int, total_steps: int, every: Every, *, stopping: bool = False, save_now: bool = False
) -> Occasions:
    """What is due when `done` of `total_steps` steps are done; after the last one, everything is.

    Args:
        stopping: whether the run is asked to stop before its end.
        save_now: whether a checkpoint is due by the clock.

    >>> every = Every(log=10, eval_loss=100, eval_wer=0, save=100)
    >>> occasions(20, 200, every)
    Occasions(log=True, eval_loss=False, eval_wer=False, save=False, last=False, stop=False)
    """
    last = done >= total_steps

    def due(interval: int) -> bool:
        return last or (interval > 0 and done % interval == 0)

    return Occasions(
        log=due(every.log),
        eval_loss=every.has_validation and due(every.eval_loss),
        eval_wer=every.has_validation and due(every.eval_wer),
        save=due(every.save) or save_now or stopping,
        last=last,
        stop=stopping and not last,
    )
