import numpy as np
import pytest

from sd_jax.data.buckets import Assignment
from sd_jax.data.order import Mixture, Order

SIZES = ((128, 32), (64, 64), (32, 128))


@pytest.fixture
def assignment():
    """24 tall pictures, 16 squares and 3, 8 wide ones; and two that are left out."""
    of_record = np.repeat([0, 1, 2, -1], [24, 19, 8, 2])
    return Assignment(SIZES, np.random.default_rng(0).permutation(of_record))


def epoch(order, number):
    places = range(number * order.batches_per_epoch, (number + 1) * order.batches_per_epoch)
    return [order.batch(n) for n in places]


def test_every_record_once_an_epoch_but_for_less_than_a_batch(assignment):
    order = Order(assignment, 8, seed=0)
    assert order.batches_per_epoch == 6
    seen = []
    for number in range(12):
        batches = epoch(order, number)
        records = np.concatenate([records for _, records in batches])
        assert len(records) == len(set(records)) == 48
        for size, members in batches:
            assert members.shape == (8,) and members.dtype == np.int64
            assert (assignment.of_record[members] == size).all()  # one size a batch
        over = set(np.flatnonzero(assignment.of_record >= 0)) - set(records)
        assert len(over) == 3 and (assignment.of_record[list(over)] == 1).all()
        seen.append(frozenset(over))
    assert len(set(seen)) > 6  # by chance, so everyone comes round
    assert [records.tolist() for records in order.members] == [
        np.flatnonzero(assignment.of_record == size).tolist() for size in range(3)
    ]


def test_epochs_differ_in_their_batches_and_in_their_order(assignment):
    order = Order(assignment, 8, seed=0)
    first, second = epoch(order, 0), epoch(order, 1)
    assert len({tuple(size for size, _ in epoch(order, number)) for number in range(5)}) > 1
    groups = [{frozenset(records) for _, records in batches} for batches in (first, second)]
    assert len(groups[0] & groups[1]) == 1  # the wide ones are one batch alone
    other = epoch(Order(assignment, 8, seed=1), 0)
    assert [tuple(records) for _, records in other] != [tuple(records) for _, records in first]


def test_a_batch_hangs_on_its_number_alone(assignment):
    whole = [Order(assignment, 8, seed=3).batch(n) for n in range(20)]
    order = Order(assignment, 8, seed=3)
    for n in (19, 0, 7, 6, 5, 18, 7):
        assert order.batch(n)[0] == whole[n][0]
        np.testing.assert_array_equal(order.batch(n)[1], whole[n][1])


@pytest.mark.parametrize("count", [1, 3, 7])
def test_fewer_records_than_a_batch_are_read_several_times(count):
    order = Order(Assignment(((8, 8),), np.array([0] * count + [-1])), 8, seed=0)
    passes = np.concatenate([order.batch(n)[1] for n in range(count)]).reshape(8, count)
    assert (np.sort(passes, axis=1) == np.arange(count)).all()
    assert count == 1 or len({tuple(records) for records in passes.tolist()}) > 1


def test_an_assignment_without_a_batch_is_refused(assignment):
    with pytest.raises(ValueError, match="51 records to 3 sizes makes no batch"):
        Order(assignment, 32, seed=0)


# -- Records that are mixed in ---------------------------------------------------------------------------------------


@pytest.fixture
def with_others(assignment):
    """53 records, and after them 5, 1 and 2 others of the three sizes, and one without a size."""
    others = np.array([0, 2, 0, -1, 0, 1, 0, 2, 0])
    return Assignment(SIZES, np.concatenate([assignment.of_record, others]))


@pytest.mark.parametrize(("batch_size", "count"), [(12, 4), (11, 3), (9, 1), (40, 32)])
def test_every_batch_has_so_many_others_in_the_same_places(assignment, with_others, batch_size, count):
    order, plain = Order(with_others, batch_size, 3, Mixture(53, count)), Order(assignment, batch_size - count, 3)
    places = set()
    for n in (*range(12), 700, 5):
        size, records = order.batch(n)
        other = records >= 53
        assert records.dtype == np.int64 and records.shape == (batch_size,) and other.sum() == count
        assert (with_others.of_record[records] == size).all()
        assert plain.batch(n)[0] == size  # what is mixed in changes nothing of the order of the own
        np.testing.assert_array_equal(records[~other], plain.batch(n)[1])
        places.add(tuple(other))
    assert len(places) == 1
    steps = np.diff(np.flatnonzero(np.tile(places.pop(), 2)))
    assert steps.max() - steps.min() <= 1  # evenly spread


def test_others_of_a_size_are_read_alike(with_others):
    order = Order(with_others, 12, 0, Mixture(53, 4))
    seen = {
        size: np.concatenate([r[r >= 53] for s, r in map(order.batch, range(60)) if s == size]) for size in range(3)
    }
    for size, records in seen.items():
        counts = np.bincount(records - 53, minlength=9)[with_others.of_record[53:] == size]
        assert counts.max() - counts.min() <= 1 and counts.sum() == len(records)
    passes = seen[0][:100].reshape(20, 5)
    assert len({tuple(row) for row in passes.tolist()}) > 10


def test_few_records_and_fewer_others():
    order = Order(Assignment(((8, 8),), np.zeros(5, np.int64)), 8, 0, Mixture(3, 4))
    batches = np.concatenate([order.batch(n)[1] for n in range(9)])
    assert np.bincount(batches).tolist() == [12, 12, 12, 18, 18]
    np.testing.assert_array_equal(batches >= 3, [False, True] * 36)
    np.testing.assert_array_equal(order.batch(7)[1], batches[56:64])


def test_what_may_stand_for_a_record_is_of_its_kind(with_others):
    order = Order(with_others, 12, 0, Mixture(53, 4))
    assert order.like(1, 58).tolist() == [58] and order.like(2, 60).tolist() == [54, 60]
    assert order.like(1, 3).tolist() == order.members[1].tolist()


def test_a_size_without_others_is_refused(assignment):
    lacking = Assignment(SIZES, np.concatenate([assignment.of_record, [0, 2]]))
    with pytest.raises(ValueError, match="of the 3 sizes not each has a record to be mixed in"):
        Order(lacking, 12, 0, Mixture(53, 4))
