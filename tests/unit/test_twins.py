"""Two boxes of one name take turns; one that was installed anew does not."""

from coordinator.core.twins import REMEMBERED, seen


def told(*epochs: str) -> list[bool]:
    held: tuple[str, ...] = ()
    answers = []
    for epoch in epochs:
        held, is_twin = seen(held, epoch)
        assert len(held) <= REMEMBERED
        answers.append(is_twin)
    return answers


def test_a_box_that_says_what_it_is_again_and_one_installed_anew_are_no_twins():
    assert told("a", "a", "b", "b", "c") == [False] * 5


def test_the_return_of_an_outbox_that_was_replaced_is_a_twin_each_time():
    assert told("a", "b", "a", "b", "b") == [False, False, True, True, False]
