import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from grpo_harness.engines.draw import distribution, draw, likeliest
from grpo_harness.engines.engine import EngineError, Request, Sample, Sampling, sample_seed
from grpo_harness.engines.transformers import TransformersEngine
from grpo_harness.policy.policy import load
from grpo_harness.tasks import task_types

SHORT = Sampling(max_new_tokens=16)
BASELINES = Path(__file__).parent.parent / "baselines"


@pytest.fixture(scope="module")
def requests(tiny_policy):
    problems = [p for name in ("gcd", "sort", "py_eval") for p in task_types()[name].problems(8)]
    return [
        Request(tiny_policy.render(problem.prompt), sample_seed(5, problem.id, number))
        for problem in problems
        for number in range(2)
    ]


@pytest.fixture(scope="module")
def samples(tiny_policy, requests):
    return engine(tiny_policy, SHORT).sample(requests)


def engine(policy, sampling=SHORT, **how):
    return TransformersEngine(policy, sampling, device="cpu", **how)


def by_transformers(scores, sampling):
    """The distribution of transformers' own warpers, as an oracle."""
    warpers = [
        TemperatureLogitsWarper(sampling.temperature),
        *([TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []),
        TopPLogitsWarper(sampling.top_p),
        *([MinPLogitsWarper(sampling.min_p)] if sampling.min_p is not None else []),
    ]
    for warper in warpers:
        scores = warper(None, scores)
    return scores.softmax(-1)


def settings_of_a_draw():
    """Settings, and logits on a grid (so that many are equal) or off it, of two rows."""
    grid = st.integers(-24, 24).map(lambda step: step / 3)
    sampling = st.builds(
        Sampling,
        temperature=st.floats(0.3, 3),
        top_k=st.none() | st.integers(1, 20) | st.integers(1, 500),
        top_p=st.floats(0.05, 0.99) | st.just(1.0),
        min_p=st.none() | st.floats(0, 0.99) | st.just(1.0),
    )
    seeds = st.integers(0, 2**32)
    return st.tuples(
        sampling,
        st.lists(grid | st.floats(-8, 8), min_size=2, max_size=30)
        | st.tuples(seeds, st.integers(250, 700)).map(many_logits),
    )


def many_logits(seed_and_size):
    seed, size = seed_and_size
    of = random.Random(seed)
    spread = of.choice([0.1, 1, 3])
    return [round(of.gauss(0, spread), of.choice([1, 6])) for _ in range(size)]


def kept(scores, sampling, searched):
    """The tokens of one row that may be drawn, and their probabilities, by a search of so many."""
    spread = distribution(scores.clone(), sampling)
    tokens, cumulative, number, enough = likeliest(spread, searched, sampling)
    places = slice(0, int(number))
    return tokens[0, places], cumulative.diff(prepend=torch.zeros(1, 1))[0, places], bool(enough)


class TestDraw:
    @given(
        st.lists(st.floats(-8, 8), min_size=2, max_size=400),
        st.floats(0.05, 1),
        st.floats(0.1, 3),
        st.integers(0, 2**63),
    )
    @settings(max_examples=200, deadline=None)
    def test_the_token_is_in_the_nucleus(self, logits, top_p, temperature, seed):
        sampling = Sampling(temperature=temperature, top_p=top_p, max_new_tokens=1)
        scores = torch.tensor([logits])
        uniform = torch.tensor([random.Random(seed).random()])
        (drawn,) = draw(scores.clone(), uniform, sampling).tolist()
        # Stated without an order, so that it holds however ties (to a float) are broken.
        spread = (scores[0] / temperature).softmax(-1)
        assert spread[spread > spread[drawn] * (1 + 1e-5)].sum() < top_p + 1e-5

    @given(settings_of_a_draw())
    @settings(max_examples=400, deadline=None)
    def test_the_kept_tokens_are_those_of_transformers(self, drawn):
        sampling, logits = drawn
        scores = torch.tensor([logits])
        exact = scores[0].double() / sampling.temperature
        if sampling.top_k:
            exact[exact < exact.sort(descending=True).values[: sampling.top_k][-1]] = -torch.inf
        share, ratio = exact.softmax(-1), (exact - exact.max()).exp()
        # Where a bound is met to within a float's rounding, either is right.
        if sampling.top_p < 1:
            before = share.sort(descending=True).values
            assume(((before.cumsum(-1) - before - sampling.top_p).abs() > 1e-5).all())
        if sampling.min_p is not None:
            assume((((ratio - sampling.min_p).abs() > 1e-5) | (ratio == 1)).all())
        tokens, mass, enough = kept(scores, sampling, scores.shape[-1])
        assert enough or sampling.top_p == 1
        ours = torch.zeros_like(scores[0]).scatter(-1, tokens, mass / mass.sum())
        wanted = by_transformers(scores, sampling)[0]
        # Which of equally likely tokens top_p cuts off is not defined; how many is.
        assert ours.sort().values.numpy() == pytest.approx(wanted.sort().values.numpy(), abs=1e-5)
        # A sum of floats reaches 1 before the last of the tokens that are all but impossible.
        possible = share > 1e-6
        ours_kept = torch.zeros_like(possible).scatter(-1, tokens, True)[possible]
        theirs_kept = (wanted > 0)[possible]
        assert ours_kept.sum() == theirs_kept.sum()
        differ = share[possible][ours_kept != theirs_kept].tolist()
        assert not differ or min(differ) > max(differ) * (1 - 1e-5)

    @pytest.mark.parametrize("narrow", [{"top_k": 40}, {"min_p": 0.2}, {"top_p": 0.3}], ids=str)
    @pytest.mark.parametrize("size", [64, 100, 4096, 4099, 5000])
    def test_a_search_of_few_finds_what_a_search_of_all_finds(self, narrow, size):
        scores = torch.randn(1, size, generator=torch.Generator().manual_seed(size)) * 3
        sampling = Sampling(**{"top_p": 1.0, **narrow})
        few, many = kept(scores, sampling, 64), kept(scores, sampling, size)
        assert few[2]
        assert few[0].tolist() == many[0].tolist()
        assert few[1].numpy() == pytest.approx(many[1].numpy())

    def test_a_row_of_which_few_are_not_enough_is_searched_further(self, monkeypatch):
        flat, peaked = torch.zeros(5000), torch.zeros(5000)
        peaked[7] = 30.0
        rows = torch.stack([flat, peaked, flat])
        drawn = draw(rows, torch.tensor([0.999, 0.5, 0.0]), Sampling(temperature=1.0, top_p=0.5))
        assert drawn[1] == 7
        assert drawn[0] != drawn[2]

    @pytest.mark.parametrize(
        "sampling",
        [
            Sampling(max_new_tokens=1),
            Sampling(top_k=12, min_p=0.05, max_new_tokens=1),
            Sampling(temperature=2.0, top_p=1.0, top_k=400, max_new_tokens=1),
            Sampling(temperature=3.0, top_p=1.0, min_p=0.1, max_new_tokens=1),
            Sampling(temperature=1.5, top_p=1.0, max_new_tokens=1),
            Sampling(temperature=0.7, top_p=0.3, max_new_tokens=1),
        ],
        ids=str,
    )
    def test_frequencies_are_the_distributions(self, sampling):
        rows, size = 20_000, 2500  # more tokens than are looked at first, and then
        generator = torch.Generator().manual_seed(3)
        scores = torch.randn(1, size, generator=generator) * 2
        wanted = by_transformers(scores, sampling)[0]
        uniform = torch.tensor([random.Random(seed).random() for seed in range(rows)])
        drawn = draw(scores.repeat(rows, 1), uniform, sampling)
        seen = torch.bincount(drawn, minlength=size).double()
        assert (seen[wanted == 0] == 0).all()
        often = wanted * rows >= 5
        expected = torch.cat([wanted[often], wanted[~often].sum()[None]]).double() * rows
        observed = torch.cat([seen[often], seen[~often].sum()[None]])
        expected, observed = expected[expected > 0], observed[expected > 0]
        expected *= observed.sum() / expected.sum()
        assert chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-3

    def test_a_row_draws_what_its_seed_says_whatever_its_neighbours(self):
        scores = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0))
        uniform = torch.tensor([0.2, 0.7, 0.9])
        for sampling in (Sampling(), Sampling(top_p=1.0), Sampling(top_p=1.0, min_p=0.01)):
            together = draw(scores.clone(), uniform, sampling)
            alone = draw(scores[1:2].clone(), uniform[1:2], sampling)
            assert together[1] == alone[0]

    def test_a_token_without_a_probability_is_never_drawn(self):
        scores = torch.full((3, 40), -torch.inf)
        scores[:, 5] = scores[:, 9] = 0.0
        uniform = torch.tensor([0.0, 0.5, 1 - 2**-24])
        assert draw(scores, uniform, Sampling(temperature=1.0, top_p=1.0)).tolist() == [5, 9, 9]


class TestSampler:
    def test_answers_come_in_the_order_of_the_requests(self, tiny_policy, requests, samples):
        shuffled = list(range(len(requests)))
        random.Random(0).shuffle(shuffled)
        again = engine(tiny_policy, SHORT).sample([requests[i] for i in shuffled])
        assert again == [samples[i] for i in shuffled]

    @pytest.mark.parametrize("batch_size", [1, 5, 1000])
    def test_the_batch_size_changes_nothing(self, tiny_policy, requests, samples, batch_size):
        few = requests[:11]
        own = engine(tiny_policy, SHORT, batch_size=batch_size)
        assert own.sample(few) == samples[:11]

    def test_seeds_decide(self, tiny_policy, requests, samples):
        other = [Request(request.prompt, request.seed + 1) for request in requests]
        assert engine(tiny_policy, SHORT).sample(other) != samples
        assert len(Counter(sample.text for sample in samples)) > len(samples) / 2

    def test_lengths_and_truncation(self, tiny_policy, requests):
        own = engine(tiny_policy, Sampling(max_new_tokens=3))
        for sample in own.sample(requests):
            assert 1 <= sample.tokens <= 3
            assert sample.tokens == 3 or not sample.truncated

    def test_the_ids_are_those_of_the_text(self, tiny_policy, samples):
        tokenizer = tiny_policy.tokenizer
        for sample in samples:
            assert len(sample.ids) == sample.tokens
            assert tokenizer.decode(sample.ids, skip_special_tokens=True) == sample.text
            assert tokenizer.eos_token_id not in sample.ids[:-1]
            assert (sample.ids[-1] == tokenizer.eos_token_id) != sample.truncated

    def test_an_answer_ends_with_its_end_token(self, tiny_policy, requests, samples):
        ended = [s for s in samples if not s.truncated]
        assert ended, "the untrained policy ends some answers by chance"
        for sample in ended:
            assert tiny_policy.tokenizer.eos_token not in sample.text

    def test_greedy_is_the_models_argmax(self, tiny_policy, requests):
        own = engine(tiny_policy, Sampling(greedy=True, max_new_tokens=5))
        (sample,) = own.sample(requests[:1])
        ids = tiny_policy.tokenizer(
            requests[0].prompt, add_special_tokens=False, return_tensors="pt"
        )["input_ids"]
        text = []
        with torch.inference_mode():
            for _ in range(5):
                token = own.model(ids).logits[0, -1].argmax()
                if int(token) in tiny_policy.eos_token_ids:
                    break
                text.append(int(token))
                ids = torch.cat([ids, token[None, None]], dim=1)
        assert sample.text == tiny_policy.tokenizer.decode(text, skip_special_tokens=True)

    @pytest.mark.parametrize("how", [{"greedy": True}, {"top_k": 1}, {"min_p": 1.0}], ids=str)
    def test_the_repetition_penalty_is_that_of_generate(self, tiny_policy, requests, how):
        own = engine(tiny_policy, Sampling(**how, repetition_penalty=8.0, max_new_tokens=12))
        # Of different lengths, so that some rows are padded: padding must not count as repeated.
        some = requests[::7]
        drawn = own.sample(some)
        for request, sample in zip(some, drawn, strict=True):
            ids = torch.tensor(own.tokens([request.prompt]))
            wanted = own.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                repetition_penalty=8.0,
                max_new_tokens=12,
            )
            assert list(sample.ids) == wanted[0, ids.shape[1] :].tolist()
        plain = engine(tiny_policy, Sampling(**how, max_new_tokens=12)).sample(some)
        assert [s.ids for s in plain] != [s.ids for s in drawn]

    def test_nothing_leaks_in_from_the_models_generation_config(self, tiny_policy):
        # The checkpoint's own asks for temperature 0.01 and a heavy repetition penalty.
        own = engine(tiny_policy, SHORT)
        used, _ = own.model._prepare_generation_config(own.generation_config())
        assert used.repetition_penalty == 1.0
        assert used.do_sample is False
        assert used.num_beams == 1
        assert used.eos_token_id == [tiny_policy.tokenizer.eos_token_id]

    def test_no_requests_no_samples(self, tiny_policy):
        assert engine(tiny_policy, SHORT).sample([]) == []

    def test_progress_counts_every_sample(self, tiny_policy, requests):
        done = []
        own = engine(tiny_policy, Sampling(max_new_tokens=2), batch_size=7)
        own.sample(requests, done.append)
        assert sum(done) == len(requests)

    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError("the machine is small"),
            MemoryError(),
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
        ],
        ids=repr,
    )
    def test_out_of_memory_halves_the_batch_and_loses_nothing(
        self, tiny_policy, requests, samples, monkeypatch, error
    ):
        own = engine(tiny_policy, SHORT)
        forward, sizes = own.model.forward, []

        def small_machine(**arguments):
            sizes.append(len(arguments["input_ids"]))
            if sizes[-1] > 12:
                raise error
            return forward(**arguments)

        monkeypatch.setattr(own.model, "forward", small_machine)
        assert own.sample(requests) == samples
        assert [size for size in sizes if size > 12] == [48, 24]
        assert 12 in sizes

    def test_a_row_that_never_fits_is_an_error_and_not_an_answer(
        self, tiny_policy, requests, monkeypatch
    ):
        def no_memory(**arguments):
            raise torch.OutOfMemoryError("no room at all")

        own = engine(tiny_policy, SHORT)
        own.sample(requests[:1])
        monkeypatch.setattr(own.model, "forward", no_memory)
        for sample in own.sample(requests[:3]):
            assert sample.error.startswith("out of memory: ")
            assert "no room at all" in sample.error

    def test_another_error_of_the_model_is_not_taken_for_memory(
        self, tiny_policy, requests, monkeypatch
    ):
        def broken(**arguments):
            raise RuntimeError("shapes do not match")

        own = engine(tiny_policy, SHORT)
        own.sample(requests[:1])
        monkeypatch.setattr(own.model, "forward", broken)
        with pytest.raises(RuntimeError, match="shapes do not match"):
            own.sample(requests[:3])

    @pytest.mark.parametrize("greedy", [False, True])
    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_logits_that_are_no_numbers_are_named(self, tiny_policy, requests, greedy, value):
        own = engine(tiny_policy, Sampling(greedy=greedy, max_new_tokens=2))
        with torch.no_grad():
            own.model.model.layers[0].mlp.down_proj.weight[0, 0] = value
        with pytest.raises(EngineError) as error:
            own.sample(requests[:3])
        message = str(error.value)
        assert "policy 'tiny'" in message or str(tiny_policy.name) in message
        assert "model.layers.0.mlp.down_proj" in message
        assert "\n" not in message

    def test_it_loads_weights_when_it_draws_and_not_before(self, tiny_policy, requests):
        own = engine(tiny_policy, SHORT)
        own.settings(), own.identity(), own.tokens(["a"]), own.sample([])
        assert own._model is None
        with own:
            assert own._model is not None
        assert own._model is None
        own.sample(requests[:1])
        assert own._model is not None
        own.close()
        assert own._model is None

    def test_it_says_what_it_is(self, tiny_policy):
        assert engine(tiny_policy).identity() == {
            "engine": "transformers",
            "device": "cpu",
            "hardware": "cpu",
            "dtype": "float32",
        }


def decoded(policy, ids):
    return policy.tokenizer.decode(ids, skip_special_tokens=True)


def cut(policy, sample, stop):
    """What a stop string makes of a sample that was drawn without one, token after token."""
    for n in range(1, sample.tokens + 1):
        text = decoded(policy, sample.ids[:n])
        if ends := [i for i in range(len(text) + 1) if text[:i].endswith(stop)]:
            return Sample(text[: ends[0]], n, truncated=False, ids=sample.ids[:n])
    return sample


@pytest.fixture(scope="module")
def stops(tiny_policy, requests, samples):
    """Lists of stop strings that occur in ``samples``, by what is special about them."""
    texts = [sample.text for sample in samples]
    pairs = Counter(text[i : i + 2] for text in texts for i in range(len(text) - 1))
    tokens = {decoded(tiny_policy, [token]) for sample in samples for token in sample.ids}
    word = next(token for token in sorted(tokens) if len(token) > 3 and token.isascii())
    return {
        "character": (Counter("".join(texts)).most_common(1)[0][0],),
        "pairs": tuple(pair for pair, _ in pairs.most_common(4)),
        "long": tuple(text[len(text) // 2 :][:9] for text in texts[:6]),
        "inside a token": (word[1:-1],),
        "across the prompt's end": (requests[1].prompt[-1] + texts[1][0],),
        "the first to end": (texts[1][4:9], texts[1][5:7]),
        "absent": ("no such text",),
    }


class TestStop:
    @pytest.mark.parametrize(
        "which",
        [
            "character",
            "pairs",
            "long",
            "inside a token",
            "across the prompt's end",
            "the first to end",
            "absent",
        ],
    )
    @pytest.mark.parametrize("batch_size", [1, 16])
    def test_a_completion_ends_right_after_it(
        self, tiny_policy, requests, samples, stops, which, batch_size
    ):
        stop = stops[which]
        wanted = [cut(tiny_policy, sample, stop) for sample in samples]
        assert (wanted != samples) == (which not in ("across the prompt's end", "absent"))
        own = engine(tiny_policy, Sampling(max_new_tokens=16, stop=stop), batch_size=batch_size)
        assert own.sample(requests) == wanted

    def test_a_token_beyond_it_is_kept_as_an_id_and_not_as_text(self, tiny_policy, requests, stops):
        stop = stops["inside a token"]
        drawn = engine(tiny_policy, Sampling(max_new_tokens=16, stop=stop)).sample(requests)
        beyond = [s for s in drawn if len(decoded(tiny_policy, s.ids)) > len(s.text)]
        assert beyond
        for sample in beyond:
            assert sample.text.endswith(stop)
            assert stop[0] not in decoded(tiny_policy, sample.ids[:-1])

    def test_where_padding_is_the_end_token_it_is_not_taken_for_one(
        self, tiny, requests, samples, stops
    ):
        policy = load(str(tiny))
        policy.tokenizer.pad_token = policy.tokenizer.eos_token
        own = engine(policy, Sampling(max_new_tokens=16, stop=stops["pairs"]))
        wanted = [cut(policy, sample, stops["pairs"]) for sample in samples]
        assert own.sample(requests) == wanted

    def test_the_batch_ends_with_its_last_row(self, tiny_policy, requests, stops):
        own = engine(tiny_policy, Sampling(max_new_tokens=16, stop=stops["character"]))
        steps = []
        few = requests[:3]
        own.sample(few)
        own.model.register_forward_hook(lambda *_: steps.append(1))
        drawn = [own.sample([request])[0] for request in few]
        assert len(steps) == sum(sample.tokens for sample in drawn) < 3 * 16
        steps.clear()
        own.sample(few)
        # One more step reads what the prompts begin with.
        assert len(steps) == max(sample.tokens for sample in drawn) + 1

    def test_greedy_decoding_stops_too(self, tiny_policy, requests):
        (whole,) = engine(tiny_policy, Sampling(greedy=True, max_new_tokens=8)).sample(requests[:1])
        stop = (whole.text[:2],)
        own = engine(tiny_policy, Sampling(greedy=True, max_new_tokens=8, stop=stop))
        assert own.sample(requests[:1]) == [cut(tiny_policy, whole, stop)]


class TestSettings:
    @pytest.mark.parametrize(
        "wrong",
        [
            {"temperature": 0},
            {"temperature": float("nan")},
            {"top_p": 0},
            {"top_p": 1.1},
            {"max_new_tokens": 0},
            {"top_k": 0},
            {"top_k": 2.5},
            {"min_p": -0.1},
            {"repetition_penalty": 0},
            {"stop": "text"},
            {"stop": ("a", "")},
        ],
        ids=str,
    )
    def test_impossible_settings_are_refused(self, wrong):
        ((name, value),) = wrong.items()
        with pytest.raises(ValueError, match=f"^{name} cannot be ") as error:
            Sampling(**wrong)
        assert repr(value) in str(error.value)

    def test_greedy_settings_leave_out_what_they_ignore(self):
        ignored = {"temperature": 0.1, "top_p": 0.2, "top_k": 3, "min_p": 0.4}
        rest = {"greedy": True, "max_new_tokens": 64, "repetition_penalty": 1.5}
        assert Sampling(**ignored, **rest, stop=("b", "a", "b")).asdict() == {
            **rest,
            "stop": ["a", "b"],
        }

    @pytest.mark.parametrize("off", [{}, {"top_k": None, "min_p": 0.0, "stop": []}], ids=str)
    def test_settings_that_are_off_are_not_in_a_baseline(self, tiny_policy, off):
        recorded = json.loads((BASELINES / "nano-base" / "gcd.json").read_text())["conditions"]
        now = {
            f"sampling.{name}": value
            for name, value in engine(tiny_policy, Sampling(**off)).settings().items()
        }
        assert now == {name: recorded[name] for name in recorded if name.startswith("sampling.")}

    def test_settings_are_what_json_keeps_of_them(self, tiny_policy):
        told = engine(tiny_policy, Sampling(top_k=9, min_p=0.5, stop=("x", "y"))).settings()
        assert json.loads(json.dumps(told)) == told
        assert {"top_k": 9, "min_p": 0.5, "stop": ["x", "y"]}.items() <= told.items()

    def test_a_samples_ids_fit_its_tokens(self):
        assert Sample("a", 3, truncated=False).ids == ()
        with pytest.raises(ValueError, match="2 ids of 3 tokens"):
            Sample("a", 3, truncated=False, ids=(1, 2))

    def test_seeds_differ_by_run_problem_and_sample(self):
        parts = [(run, problem, k) for run in (1, 11) for problem in ("a", "1a") for k in (0, 1)]
        assert len({sample_seed(*part) for part in parts}) == len(parts)
        assert sample_seed(1, "gcd-8c3d51f94472", 0) == 1015551666989771593
