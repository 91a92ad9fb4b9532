"""kdpp's own noise sources: known answers, laws, batches, and what a draw costs."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

import kdpp
import needs
import noise_cost
import problems
from kdpp.noise import BrownianNoise, SeededNoise, box_muller, philox
from problems import SIGMA_MAX, SIGMA_MIN, Problem, karras

WORD = 2**32 - 1
SDE = ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")
SOURCES = [BrownianNoise]
if needs.k_sampling is not None:
    SOURCES.append(needs.k_sampling.BrownianTreeNoiseSampler)
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)


class Kernels(TorchDispatchMode):
    """The names of the kernels that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(op.overloadpacket.__name__)
        return op(*args, **(kwargs or {}))


# ------------------------------------------------------------------------ numbers from seeds


def plain_philox(counter, key, rounds=10):
    """Philox4x32 in Python's whole numbers."""
    c, k = list(counter), list(key)
    for _ in range(rounds):
        one, other = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [other >> 32 ^ c[1] ^ k[0], other & WORD, one >> 32 ^ c[3] ^ k[1], one & WORD]
        k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
    return tuple(c)


def words_of(counter, key):
    found = philox([torch.tensor([word]) for word in counter], key)
    return tuple(int(word) for word in found)


@pytest.mark.parametrize(
    ("counter", "key", "known"),
    [
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD,) * 4, (WORD, WORD), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (*PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_published_answers(counter, key, known):
    """Random123's kat_vectors, philox4x32 of 10 rounds."""
    assert words_of(counter, key) == known
    assert plain_philox(counter, key) == known


@given(st.lists(st.integers(0, WORD), min_size=6, max_size=6))
def test_philox_anywhere(numbers):
    counter, key = numbers[:4], tuple(numbers[4:])
    assert words_of(counter, key) == plain_philox(counter, key)


def plain_normal(seed, stream, call, position):
    """One number of `SeededNoise`, by its definition."""
    counter = (position // 4, call, seed & WORD, seed >> 32)
    words = plain_philox(counter, (stream & WORD, stream >> 32))
    lane = position % 4
    one, other = words[lane // 2 * 2 : lane // 2 * 2 + 2]
    turn = (math.cos, math.sin)[lane % 2]
    return math.sqrt(-2 * math.log((one + 0.5) / 2**32)) * turn(2 * math.pi * other / 2**32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_number_is_a_function_of_seed_stream_call_and_position(dtype):
    seeds, stream = [0, 7, 2**32, 2**63 - 1], 5 + 3 * 2**32
    noise = SeededNoise(torch.zeros(4, 3, 7, dtype=dtype), seeds, stream)
    tolerance = 1e-13 if dtype == torch.float64 else 3e-6
    for call in (0, 1, 2**32 - 1):
        found = noise.draw(call).flatten(1).tolist()
        for seed, row in zip(seeds, found):
            expected = [plain_normal(seed, stream, call, p) for p in range(21)]
            assert row == pytest.approx(expected, abs=tolerance)


def test_the_ends_of_the_words_give_finite_numbers():
    ends = [
        torch.tensor(pair) for pair in zip(*itertools.product((0, 1, WORD - 1, WORD), repeat=2))
    ]
    for dtype in (torch.float32, torch.float64):
        found = box_muller([*ends, *ends], dtype)
        assert found.isfinite().all()
        assert found.abs().max() == pytest.approx(math.sqrt(66 * math.log(2)), rel=1e-6)


def test_the_numbers_are_standard_normal():
    found = SeededNoise(torch.zeros(64, 4, 32, 32, dtype=torch.float64), range(64)).draw(3)
    found = found.flatten()
    n = found.numel()
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert found.pow(power).mean().item() == pytest.approx(moment, abs=4 * (spread / n) ** 0.5)
    assert stats.kstest(found.numpy(), "norm").pvalue > 0.01
    assert found.abs().max() > 4.2  # the tails are there


def test_draws_seeds_streams_and_positions_are_independent():
    """Correlations of every two rows, seeds and calls neighbours or 32 bits apart."""
    x = torch.zeros(4, 4, 64, 64, dtype=torch.float64)
    seeds = [0, 1, 2**32, 2**32 + 1]
    rows = [
        SeededNoise(x, seeds, stream).draw(call).flatten(1)
        for stream in (0, 1, 2**32)
        for call in (0, 1, 2)
    ]
    table = torch.cat(rows)
    others = torch.cat([table, table.roll(1, 1), table.roll(4, 1), table.roll(64, 1)])
    found = torch.corrcoef(others) - torch.eye(len(others))
    assert found.abs().max() < 5 / math.sqrt(table.shape[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (), (1,)], ids=str)
def test_a_samples_noise_is_the_same_in_any_batch(shape, dtype):
    """Bit for bit, in another order and among others."""
    seeds = [11, 5, 2**63 - 1, 0, 8, 6, 17]
    x = torch.zeros(7, *shape, dtype=dtype)
    whole = SeededNoise(x, seeds).draw(2)
    assert (whole.shape, whole.dtype) == (x.shape, dtype)
    assert whole.is_contiguous()
    for chosen in ([3], [6, 0], [2, 2, 5], list(range(6, -1, -1))):
        part = SeededNoise(x[chosen], [seeds[j] for j in chosen]).draw(2)
        assert torch.equal(part, whole[chosen])


def test_the_dtypes_have_the_same_noise():
    x, seeds = torch.zeros(8, 4, 16, 16), range(8)
    single = SeededNoise(x, seeds).draw(0)
    double = SeededNoise(x.double(), seeds).draw(0)
    assert (single - double).abs().mean() < 1e-6
    # u is rounded to 24 bits, which a radius next to 0 shows most.
    torch.testing.assert_close(single.double(), double, rtol=0, atol=5e-4)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(SeededNoise(x.to(dtype), seeds).draw(0), single.to(dtype))


def test_calls_are_counted():
    x = torch.zeros(2, 4, dtype=torch.float64)
    noise, level = SeededNoise(x, [4, 9]), torch.tensor(1.0)
    called = [noise(level, level / 2) for _ in range(3)]
    assert all(torch.equal(one, noise.draw(k)) for k, one in enumerate(called))
    assert not torch.equal(called[0], called[1])
    assert torch.equal(SeededNoise(x, [4, 9])(), called[0])
    kept = called[1].clone()
    called[1].zero_()  # the caller's own
    assert torch.equal(noise.draw(1), kept)


def test_calls_in_any_order():
    """Noise is made for several calls at once, which a later or an earlier call must not mix up."""
    x, seeds = torch.zeros(2, 4, dtype=torch.float64), [4, 9]
    noise = SeededNoise(x, seeds)
    assert noise.ahead > 1
    calls = [0, 40, 3, 41, 2, noise.ahead, noise.ahead - 1, 0, 40]
    for call in calls:
        assert torch.equal(noise.draw(call), SeededNoise(x, seeds).draw(call)), call


def test_a_draw_leaves_torchs_stream_alone_and_reads_nothing():
    state = torch.get_rng_state()
    kernels = []
    for batch in (1, 50):
        noise = SeededNoise(torch.zeros(batch, 4, 8, 8), range(batch))
        with Kernels() as ran:
            noise(1.0, 0.5)
        kernels.append(ran.names)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(kernels[0]) == len(kernels[1]) < 150  # no loop over the samples
    assert not {"_local_scalar_dense", "randn", "normal_", "bernoulli_"} & set(kernels[0])


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ([1, 2], "seeds has shape .2,.; give one whole number"),
        (7, "seeds has shape"),
        ([1, 2, -3], "seeds holds -3"),
        ([1, 2, 2**63], "seeds is"),
        ([1, 2, 3.0], "seeds are torch.float32"),
        ([True, False, True], "seeds are torch.bool"),
        ("abc", "seeds is 'abc'"),
        (None, "seeds is None"),
    ],
    ids=str,
)
def test_seeds_are_checked(seeds, message):
    with pytest.raises((TypeError, ValueError), match=message):
        SeededNoise(torch.zeros(3, 2), seeds)
    if not (seeds is None or isinstance(seeds, int)):
        with pytest.raises((TypeError, ValueError), match=message):
            BrownianNoise(torch.zeros(3, 2), 0.1, 10.0, seeds)


def test_seeds_may_be_arrays():
    x, numbers = torch.zeros(3, 2), torch.tensor([3, 1, 2])
    known = SeededNoise(x, [3, 1, 2]).draw(0)
    for seeds in (numbers, numbers.to(torch.uint8), numbers.numpy(), (3, 1, 2)):
        assert torch.equal(SeededNoise(x, seeds).draw(0), known)


def test_streams_calls_and_latents_are_checked():
    x = torch.zeros(2, 3)
    for stream in (-1, 0.5, True, 2**63):
        with pytest.raises(ValueError, match="stream is"):
            SeededNoise(x, [1, 2], stream)
    for call in (-1, 1.0, 2**32):
        with pytest.raises(ValueError, match="call is"):
            SeededNoise(x, [1, 2]).draw(call)
    with pytest.raises(TypeError, match="floating point"):
        SeededNoise(x.int(), [1, 2])


# ------------------------------------------------------------------------------ Brownian paths


def covariance(queries, time=lambda sigma: sigma):
    """Cov of the normalised increments: the overlap over the root of the lengths, with its sign."""
    spans = [(time(a), time(b)) for a, b in queries]

    def pair(one, other):
        low, high = (max(min(one), min(other)), min(max(one), max(other)))
        sign = math.copysign(1, (one[1] - one[0]) * (other[1] - other[0]))
        scale = math.sqrt(abs((one[1] - one[0]) * (other[1] - other[0])))
        return sign * max(high - low, 0.0) / scale

    return torch.tensor([[pair(a, b) for b in spans] for a in spans], dtype=torch.float64)


def impulses(queries, **options):
    """The noise of each query as weights of the draws, which are independent: one row a query."""
    count = 2 * len(queries)
    noise = BrownianNoise(torch.zeros(1, count, dtype=torch.float64), 1e-3, 80.0, 0, **options)
    unit = iter(torch.eye(count, dtype=torch.float64)[:, None])
    noise.draw = lambda: next(unit).clone()
    return torch.cat([noise.between(*query) for query in queries])


LEVELS = st.one_of(st.floats(1e-3, 80.0), st.sampled_from([0.5, 1.0, 2.0, 3.0, 7.0]))
QUERIES = st.lists(
    st.tuples(LEVELS, LEVELS).filter(lambda q: abs(q[0] - q[1]) > 1e-6), min_size=1, max_size=12
)
TIMES = {"σ": None, "ln σ": torch.log, "-ln σ": lambda sigma: -sigma.log()}


@pytest.mark.parametrize("name", TIMES)
@given(queries=QUERIES)
def test_the_joint_law_is_one_paths(name, queries):
    """Exactly, whatever is asked in which order: the weights' products are the covariances."""
    weights = impulses(queries, transform=TIMES[name])
    time = {"σ": lambda s: s, "ln σ": math.log, "-ln σ": lambda s: -math.log(s)}[name]
    torch.testing.assert_close(weights @ weights.T, covariance(queries, time), rtol=0, atol=1e-9)


def asked(name, steps=6):
    """The levels that a solver asks noise for."""
    queries = noise_cost.queries(name, karras(steps))
    assert len(queries) >= steps - 1
    return queries


@pytest.mark.parametrize("name", SDE)
def test_the_joint_law_over_a_run(name):
    queries = asked(name)
    weights = impulses(queries)
    expected = covariance(queries)
    torch.testing.assert_close(weights @ weights.T, expected, rtol=0, atol=1e-12)
    if name == "dpmpp_sde":  # to the middle, then to the end: one path
        (start, middle), (_, end) = queries[:2]
        root = math.sqrt((start - middle) / (start - end))
        assert expected[0, 1].item() == pytest.approx(root) == pytest.approx(0.77, abs=0.1)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)], ids=str)
def test_increments_add_up(order):
    """As those of k-diffusion's tree do, which has the same rule for signs."""
    x = torch.zeros(2, 3, dtype=torch.float64)
    queries = [(9.0, 4.0), (4.0, 1.5), (9.0, 1.5)]
    levels = torch.tensor(queries, dtype=torch.float64)
    for transform in (lambda s: s, lambda s: -s.log()):
        roots = transform(levels).diff().abs().sqrt()
        for maker in SOURCES:
            noise = maker(x, 0.1, 10.0, seed=3, transform=transform)
            found = {i: noise(*levels[i]) * roots[i] for i in order}
            tolerance = 1e-12 if maker is BrownianNoise else 1e-3  # the tree's own
            torch.testing.assert_close(found[0] + found[1], found[2], rtol=0, atol=tolerance)
            back = noise(*levels[0].flip(0)) * roots[0]
            torch.testing.assert_close(back, -found[0], rtol=0, atol=tolerance)


QUESTIONS = [(14.0, 6.0), (14.0, 3.0), (3.0, 1.0), (8.0, 2.0), (0.5, 10.0), (6.0, 14.0)]


@pytest.mark.parametrize("source", [needs.case("tree"), "one seed", "seeds"])
def test_the_law_is_the_trees(source):
    """The measured covariances of k-diffusion's tree, and ours of both kinds of seed."""
    n = 40_000
    x = torch.zeros(4, n // 4, dtype=torch.float64)
    seed = [1, 2, 3, 4] if source == "seeds" else 5
    noise = SOURCES[source == "tree"](x, 0.1, 15.0, seed=seed)
    rows = torch.stack([noise(*map(torch.tensor, q)).flatten() for q in QUESTIONS])
    torch.testing.assert_close(rows @ rows.T / n, covariance(QUESTIONS), rtol=0, atol=5 / n**0.5)
    for row in rows:
        assert stats.kstest(row.numpy(), "norm").pvalue > 1e-3


def test_a_repeated_query_gives_the_same_noise():
    noise = BrownianNoise(torch.zeros(2, 3, dtype=torch.float64), 0.1, 10.0, 1)
    first = noise.between(8.0, 2.0)
    kept = first.clone()
    again, back = noise.between(8.0, 2.0), noise.between(2.0, 8.0)
    assert torch.equal(again, kept) and torch.equal(back, -kept)
    for found in (first, again, back):  # the caller's own: the path is not written over
        found.zero_()
    assert torch.equal(noise.between(8.0, 2.0), kept)
    noise.between(5.0, 4.0)
    torch.testing.assert_close(noise.between(8.0, 2.0), kept, rtol=0, atol=1e-14)
    assert torch.equal(noise.between(5.0, 5.0), torch.zeros(2, 3, dtype=torch.float64))


def test_tensors_numbers_and_the_end_of_the_range():
    """k-diffusion's tree clamps what is asked outside its range; here the path goes on."""
    x = torch.zeros(2, 50_000)
    one, other = BrownianNoise(x, 0.5, 4.0, 1), BrownianNoise(x, 0.5, torch.tensor(4.0), 1)
    for sigma, sigma_next in ((4.0, 0.5), (0.5, 0.0), (9, 4)):
        levels = torch.tensor(sigma), torch.tensor([sigma_next])
        assert torch.equal(one.between(sigma, sigma_next), other(*levels))
    outside = one.between(9.0, 0.0)
    assert outside.std().item() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_a_path_of_its_own_seed_is_the_same_in_any_batch(dtype):
    seeds, x = [3, 2**40, 8], torch.zeros(3, 2, 5, dtype=dtype)
    whole = BrownianNoise(x, 0.1, 15.0, seeds)
    part = BrownianNoise(x[:2], 0.1, 15.0, [8, 3])
    for query in QUESTIONS:
        found = whole.between(*query)
        assert found.dtype == dtype
        assert torch.equal(part.between(*query), found[[2, 0]])
    # The path's draws are not the noise that the same seeds start a run with.
    fresh = BrownianNoise(x, 0.1, 15.0, seeds).between(2.0, 1.0).abs()
    assert not torch.isclose(fresh, SeededNoise(x, seeds).draw(0).abs()).any()


def test_without_a_seed_one_integer_is_taken_from_torchs_stream():
    x = torch.zeros(2, 3)
    torch.manual_seed(12)
    number = torch.randint(0, 2**63 - 1, []).item()
    known = BrownianNoise(x, 0.1, 10.0, number).between(4.0, 2.0)
    states = [torch.get_rng_state()]
    for maker in SOURCES:
        torch.manual_seed(12)
        noise = maker(x, 0.1, 10.0)
        found = noise(4.0, 2.0)
        states.append(torch.get_rng_state())
        if maker is BrownianNoise:
            assert torch.equal(found, known)
    assert all(torch.equal(state, states[0]) for state in states)


@pytest.mark.parametrize("name", SDE)
def test_a_run_draws_once_a_query(name):
    """With one scaling beside it, and nothing read where levels are numbers."""
    queries = asked(name)
    noise = BrownianNoise(torch.zeros(1, 4, 8, 8), SIGMA_MIN, SIGMA_MAX, 0)
    for sigma, sigma_next in queries:
        with Kernels() as ran:
            noise.between(sigma, sigma_next)
        assert ran.names.count("randn") == 1
        assert len(ran.names) <= 4
        assert "_local_scalar_dense" not in ran.names


def test_any_query_draws_twice_at_most():
    noise = BrownianNoise(torch.zeros(1, 2), 0.0, 20.0, 0)
    counts = []
    for query in [(5.0, 3.0), (9.0, 1.0), (4.0, 2.0), (4.5, 9.0), (9.0, 4.0)]:
        with Kernels() as ran:
            noise.between(*query)
        counts.append(ran.names.count("randn"))
    assert counts == [1, 2, 2, 1, 0]


@needs.k_diffusion
@pytest.mark.parametrize("name", SDE)
def test_kdpp_and_k_diffusion_run_on_the_same_path(name):
    """One image from both libraries, each asking a path of the same seed."""
    problem, sigmas = Problem(), karras(6)
    x = problem.start(sigmas)
    solver = kdpp.SOLVERS[name]

    def path():
        return BrownianNoise(x, sigmas[-2], sigmas[0], [5] * len(x))

    plain = problem.guided(teacher_steps=0)
    ours = problems.run(
        solver, plain, x, sigmas, extra_args=problem.extra_args, noise_sampler=path()
    )
    theirs = getattr(needs.k_sampling, f"sample_{name}")(
        plain, x, sigmas, extra_args=problem.extra_args, noise_sampler=path(), disable=True
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert not torch.allclose(ours, problems.run(
        solver, plain, x, sigmas, extra_args=problem.extra_args,
        noise_sampler=BrownianNoise(x, sigmas[-2], sigmas[0], 6),
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((2.0, 1.0), "sigma_min is 2.0, above sigma_max, 1.0"),
        ((math.nan, 1.0), "sigma_min is nan"),
        ((0.1, math.inf), "sigma_max is inf"),
        ((-0.1, 1.0), "sigma_min is -0.1"),
        ((torch.tensor([0.1, 0.2]), 1.0), "sigma_min has shape .2,."),
        ((0.1, 1.0, -1), "seed is -1"),
        ((0.1, 1.0, 2**63), "seed is"),
        ((0.1, 1.0, True), "seed is True"),
        ((0.0, 1.0, 1, torch.log), "transform.0.0. is -inf"),
    ],
)
def test_a_paths_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        BrownianNoise(torch.zeros(2, 3), *options)


def test_what_is_asked_is_checked():
    noise = BrownianNoise(torch.zeros(2, 3), 0.1, 1.0, 1)
    for bad in (math.nan, math.inf, -1.0, "1", None, torch.tensor(math.nan), torch.ones(2)):
        with pytest.raises(ValueError, match="sigma"):
            noise(0.5, bad)
    assert not noise.times  # nothing was learnt from them
    assert noise(0.5, 0.2).isfinite().all()


# ----------------------------------------------------------------------------------- the figures


@needs.k_diffusion
def test_the_benchmark_counts():
    """One draw a query of kdpp's path, as many as plain noise; k-diffusion's tree takes more."""
    row = noise_cost.measure("dpmpp_sde", (1, 4, 2, 2), pairs=1)
    counts = row["counts"]
    assert counts["BrownianNoise"]["draws"] == counts["plain randn"]["draws"] == 1.0
    assert counts["k-diffusion's tree"]["draws"] > 3.0
    assert row["queries"] == 38
