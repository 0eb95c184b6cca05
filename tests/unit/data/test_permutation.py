import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from accel_train.data.permutation import GlobalBatchSampler, Permutation, fingerprint_terms, order_key

EDGES = [1, 2, 3, *(2**k + d for k in range(2, 13) for d in (-1, 0, 1))]
# Seen once; another value breaks every resume and every recorded fingerprint.
GOLDEN_10 = [5, 7, 1, 8, 3, 2, 0, 9, 6, 4]
GOLDEN_LARGE = [285418168, 2913950557, 3809109342]
GOLDEN_FINGERPRINT = 15653926223659968180
keys = st.integers(0, 2**64 - 1)


def batches(sampler):
    return [batch.tolist() for batch in sampler]


class TestPermutation:
    @pytest.mark.parametrize("n", EDGES)
    def test_is_a_bijection_at_the_edges_of_its_domain(self, n):
        for key in range(5):
            assert np.array_equal(np.sort(Permutation(n, key)(np.arange(n))), np.arange(n))

    @given(n=st.integers(1, 3000), key=keys)
    def test_is_a_bijection(self, n, key):
        assert np.array_equal(np.sort(Permutation(n, key)(np.arange(n))), np.arange(n))

    @given(n=st.integers(1, 2**62), key=keys, data=st.data())
    @example(n=2**62, key=0, data=None)
    def test_maps_large_positions_into_the_range_without_collision(self, n, key, data):
        positions = [0, n - 1] if data is None else data.draw(st.lists(st.integers(0, n - 1), unique=True, min_size=1))
        ids = Permutation(n, key)(sorted(set(positions)))
        assert ids.dtype == np.int64
        assert 0 <= ids.min() <= ids.max() < n
        assert len(set(ids.tolist())) == len(set(positions))

    @given(n=st.integers(1, 500), key=keys)
    def test_a_position_does_not_depend_on_those_asked_with_it(self, n, key):
        permutation = Permutation(n, key)
        assert permutation(np.arange(n)).tolist() == [int(permutation(i)) for i in range(n)]

    def test_keeps_the_shape(self):
        assert Permutation(100, 1)(np.arange(12).reshape(3, 4)).shape == (3, 4)
        assert Permutation(100, 1)([]).shape == (0,)

    def test_is_the_same_on_every_machine(self):
        assert Permutation(10, order_key(42, 0))(np.arange(10)).tolist() == GOLDEN_10
        assert Permutation(10**10, order_key(42, 3))([0, 1, 9_999_999_999]).tolist() == GOLDEN_LARGE

    def test_sends_every_position_everywhere(self):
        n, trials = 6, 6000
        counts = np.zeros((n, n))
        for key in range(trials):
            counts[np.arange(n), Permutation(n, key)(np.arange(n))] += 1
        chi_square = ((counts - trials / n) ** 2 / (trials / n)).sum()
        assert chi_square < 65  # 25 degrees of freedom: 1 in 50,000

    def test_leaves_no_trace_of_neighbourhood(self):
        n = 1_000_000
        ids = Permutation(n, order_key(0, 0))(np.arange(n))
        for lag in (1, 2, 1000):
            assert abs(np.corrcoef(ids[:-lag], ids[lag:])[0, 1]) < 0.005
        assert abs(np.corrcoef(ids, np.arange(n))[0, 1]) < 0.005

    def test_refuses_positions_outside(self):
        for position in (-1, 10):
            with pytest.raises(IndexError, match=r"\[0, 10\)"):
                Permutation(10, 0)([0, position])

    @pytest.mark.parametrize("n", [0, -1, 2**62 + 1])
    def test_refuses_impossible_sizes(self, n):
        with pytest.raises(ValueError, match="elements"):
            Permutation(n, 0)


class TestOrderKey:
    def test_differs_between_epochs_and_seeds(self):
        found = {order_key(seed, epoch) for seed in range(50) for epoch in range(50)}
        assert len(found) == 2500

    @given(seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10**6))
    def test_is_a_64_bit_word(self, seed, epoch):
        assert 0 <= order_key(seed, epoch) < 2**64


class TestGlobalBatchSampler:
    def test_an_epoch_has_no_sample_twice_and_no_short_batch(self):
        sampler = GlobalBatchSampler(103, 10, seed=0)
        ids = np.concatenate(list(sampler))
        assert len(sampler) == len(list(sampler)) == 10
        assert ids.dtype == np.int64
        assert len(set(ids.tolist())) == 100
        assert set(ids.tolist()) <= set(range(103))

    def test_epochs_and_seeds_have_orders_of_their_own(self):
        orders = set()
        for seed in (0, 1):
            sampler = GlobalBatchSampler(64, 8, seed)
            for epoch in (0, 1):
                sampler.seek(epoch, 0)
                orders.add(str(batches(sampler)))
        assert len(orders) == 4

    @given(num_samples=st.integers(8, 20_000), batch_size=st.integers(1, 8), data=st.data())
    def test_seek_leads_into_the_middle_of_the_same_order(self, num_samples, batch_size, data):
        sampler = GlobalBatchSampler(num_samples, batch_size, seed=7)
        sampler.seek(3, 0)
        whole = batches(sampler)
        start = data.draw(st.integers(0, len(sampler)))
        sampler.seek(3, start)
        assert batches(sampler) == whole[start:]
        assert len(sampler) == len(whole)

    def test_iterating_moves_nothing(self):
        sampler = GlobalBatchSampler(40, 4, seed=0)
        sampler.seek(2, 3)
        assert batches(sampler) == batches(sampler)

    def test_the_order_does_not_depend_on_the_size_of_micro_steps(self):
        whole, halves = GlobalBatchSampler(100, 20, 5), GlobalBatchSampler(100, 10, 5)
        assert np.concatenate(list(whole)).tolist() == np.concatenate(list(halves)).tolist()

    def test_an_epoch_can_be_cut_to_whole_steps(self):
        sampler = GlobalBatchSampler(100, 32, seed=0, batches_per_epoch=2)
        assert len(sampler) == len(list(sampler)) == 2

    def test_seeking_in_ten_billion_samples_reads_one_block(self):
        sampler = GlobalBatchSampler(10**10, 64, seed=0)
        sampler.seek(2, 10**8)
        first = next(iter(sampler))
        expected = Permutation(10**10, order_key(0, 2))(np.arange(64 * 10**8, 64 * 10**8 + 64))
        assert np.array_equal(first, expected)

    @pytest.mark.parametrize("num_processes", [1, 2, 4])
    def test_the_ranks_together_see_the_batches_of_one_process(self, num_processes):
        sampler = GlobalBatchSampler(50, 8, seed=1)
        sampler.seek(1, 2)
        shards = [BatchSamplerShard(sampler, num_processes, rank, split_batches=True) for rank in range(num_processes)]
        joined = [np.concatenate(parts).tolist() for parts in zip(*shards, strict=True)]
        assert joined == batches(sampler)

    def test_accelerate_leaves_the_place_alone(self):
        class Ids(Dataset):
            def __len__(self):
                return 50

            def __getitems__(self, ids):
                return torch.as_tensor(ids)

        sampler = GlobalBatchSampler(50, 8, seed=1)
        loader = prepare_data_loader(
            DataLoader(Ids(), batch_sampler=sampler, collate_fn=lambda batch: batch),
            num_processes=2,
            process_index=1,
            split_batches=True,
        )
        for epoch in (4, 5):
            sampler.seek(epoch, 3)
            assert [batch.tolist() for batch in loader] == [batch[4:] for batch in batches(sampler)]
        assert not hasattr(sampler, "sampler")
        assert not hasattr(sampler, "set_epoch")
        assert sampler.drop_last

    def test_a_dataset_smaller_than_a_batch_is_refused(self):
        with pytest.raises(ValueError, match="7 samples holds 0 batches of 8"):
            GlobalBatchSampler(7, 8, seed=0)

    @pytest.mark.parametrize(("epoch", "batch"), [(-1, 0), (0, -1), (0, 6)])
    def test_a_place_that_does_not_exist_is_refused(self, epoch, batch):
        with pytest.raises(ValueError, match="an epoch has 5 batches"):
            GlobalBatchSampler(20, 4, seed=0).seek(epoch, batch)


pairs = st.lists(
    st.tuples(st.integers(0, 2**50), st.integers(0, 2**40)), min_size=2, max_size=40, unique_by=lambda p: p
)


def fingerprint(consumed):
    positions, ids = zip(*consumed, strict=True)
    return fingerprint_terms(np.array(positions), np.array(ids))


class TestFingerprint:
    @given(pairs, st.integers(0, 40))
    def test_parts_add_up_to_the_whole(self, consumed, cut):
        parts = [part for part in (consumed[:cut], consumed[cut:]) if part]
        assert sum(map(fingerprint, parts)) % 2**64 == fingerprint(consumed)

    @given(pairs)
    def test_the_order_of_bookkeeping_does_not_matter(self, consumed):
        assert fingerprint(consumed[::-1]) == fingerprint(consumed)

    @given(pairs, st.data())
    def test_an_omission_shows(self, consumed, data):
        left_out = data.draw(st.integers(0, len(consumed) - 1))
        assert fingerprint(consumed[:left_out] + consumed[left_out + 1 :]) != fingerprint(consumed)

    @given(pairs, st.data())
    def test_a_duplicate_shows(self, consumed, data):
        assert fingerprint([*consumed, data.draw(st.sampled_from(consumed))]) != fingerprint(consumed)

    @given(
        st.lists(st.integers(0, 2**50), min_size=2, max_size=20, unique=True),
        st.integers(0, 2**40),
        st.integers(1, 2**20),
        st.integers(1, 2**40),
    )
    def test_swaps_and_wrong_slices_show(self, positions, first_id, stride, shift):
        ids = first_id + stride * np.arange(len(positions))
        swapped = ids.copy()
        swapped[[0, 1]] = swapped[[1, 0]]
        planned = fingerprint_terms(positions, ids)
        assert fingerprint_terms(positions, swapped) != planned
        assert fingerprint_terms(positions, ids + shift) != planned
        assert fingerprint_terms(np.array(positions) + shift, ids) != planned

    def test_nothing_consumed_is_zero(self):
        assert fingerprint_terms([], []) == 0

    def test_is_the_same_on_every_machine(self):
        assert fingerprint_terms([0, 1, 10**12], [5, 3, 10**9]) == GOLDEN_FINGERPRINT

    def test_the_planned_order_is_the_same_for_every_number_of_ranks(self):
        sampler = GlobalBatchSampler(64, 16, seed=3)
        totals = []
        for ranks in (1, 2, 4):
            local, total = 16 // ranks, 0
            for step, batch in enumerate(sampler):
                for rank in range(ranks):
                    own = slice(rank * local, (rank + 1) * local)
                    total += fingerprint_terms(step * 16 + np.arange(16)[own], batch[own])
            totals.append(total % 2**64)
        assert len(set(totals)) == 1
