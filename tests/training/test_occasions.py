"""What is due after a step, and the shape of a run: pure functions."""

from training.occasions import Every, occasions

EVERY = Every(log=2, eval_loss=4, eval_wer=0, save=3)


def due(done, **options):
    after = occasions(done, 10, EVERY, **options)
    names = ("log", "eval_loss", "eval_wer", "save", "last", "stop")
    return {name for name in names if getattr(after, name)}


def test_each_occasion_comes_at_its_own_interval():
    assert due(1) == set()
    assert due(2) == {"log"}
    assert due(3) == {"save"}
    assert due(4) == {"log", "eval_loss"}
    assert due(6) == {"log", "save"}


def test_after_the_last_step_everything_is_due_and_nothing_is_stopped():
    assert due(10) == {"log", "eval_loss", "eval_wer", "save", "last"}
    assert due(10, stopping=True) == {"log", "eval_loss", "eval_wer", "save", "last"}


def test_a_run_that_is_asked_to_stop_saves_and_stops():
    assert due(5, stopping=True) == {"save", "stop"}
    assert due(4, stopping=True) == {"log", "eval_loss", "save", "stop"}


def test_the_clock_asks_for_a_checkpoint_alone():
    assert due(5, save_now=True) == {"save"}


def test_without_validation_clips_nothing_is_evaluated():
    every = Every(log=1, eval_loss=1, eval_wer=1, save=1, has_validation=False)
    after = occasions(10, 10, every)
    assert not after.evaluate
    assert after.log and after.save and after.last


def test_gradient_norms_are_looked_at_before_anything_is_kept_or_said():
    for done in range(1, 11):
        after = occasions(done, 10, EVERY)
        assert after.check == (after.log or after.evaluate or after.save)
