import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from grpo_harness.engines.engine import EngineError, Request, Sampling, sample_seed
from grpo_harness.engines.transformers import TransformersEngine, _SeededDraw
from grpo_harness.tasks import task_types

SHORT = Sampling(max_new_tokens=16)


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
    warped = TemperatureLogitsWarper(sampling.temperature)(None, scores)
    return TopPLogitsWarper(sampling.top_p)(None, warped).softmax(-1)


class TestDraw:
    @given(
        st.lists(st.floats(-8, 8), min_size=2, max_size=400),
        st.floats(0.05, 1),
        st.floats(0.1, 3),
        st.integers(0, 2**63),
    )
    @settings(max_examples=200, deadline=None)
    def test_one_token_is_left_and_it_is_in_the_nucleus(self, logits, top_p, temperature, seed):
        sampling = Sampling(temperature=temperature, top_p=top_p, max_new_tokens=1)
        draw = _SeededDraw([seed], sampling, torch.device("cpu"))
        scores = torch.tensor([logits])
        left = draw(None, scores)
        assert torch.isfinite(left).sum() == 1
        drawn = left.argmax(-1).item()
        # Stated without an order, so that it holds however ties (to a float) are broken.
        spread = (scores[0] / temperature).softmax(-1)
        assert spread[spread > spread[drawn] * (1 + 1e-5)].sum() < top_p + 1e-5

    @pytest.mark.parametrize(
        "sampling",
        [
            Sampling(max_new_tokens=1),
            Sampling(temperature=1.5, top_p=1.0, max_new_tokens=1),
            Sampling(temperature=0.7, top_p=0.3, max_new_tokens=1),
        ],
        ids=str,
    )
    def test_frequencies_are_the_distributions(self, sampling):
        rows, size = 20_000, 600  # more tokens than are looked at first
        generator = torch.Generator().manual_seed(3)
        scores = torch.randn(1, size, generator=generator) * 2
        wanted = by_transformers(scores, sampling)[0]
        draw = _SeededDraw(list(range(rows)), sampling, torch.device("cpu"))
        drawn = draw(None, scores.expand(rows, size).contiguous()).argmax(-1)
        seen = torch.bincount(drawn, minlength=size).double()
        assert (seen[wanted == 0] == 0).all()
        often = wanted * rows >= 5
        expected = torch.cat([wanted[often], wanted[~often].sum()[None]]).double() * rows
        observed = torch.cat([seen[often], seen[~often].sum()[None]])
        expected, observed = expected[expected > 0], observed[expected > 0]
        expected *= observed.sum() / expected.sum()
        assert chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-3

    def test_a_row_draws_what_its_seed_says_whatever_its_neighbours(self):
        sampling = Sampling(max_new_tokens=4)
        scores = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
        together = _SeededDraw([7, 8, 9], sampling, torch.device("cpu"))
        alone = _SeededDraw([8], sampling, torch.device("cpu"))
        for _ in range(4):
            assert together(None, scores)[1].equal(alone(None, scores[1:2])[0])


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
        generate, sizes = own.model.generate, []

        def small_machine(**arguments):
            sizes.append(len(arguments["input_ids"]))
            if sizes[-1] > 12:
                raise error
            return generate(**arguments)

        monkeypatch.setattr(own.model, "generate", small_machine)
        assert own.sample(requests) == samples
        assert sizes == [48, 24, 12, 12, 12, 12]

    def test_a_row_that_never_fits_is_an_error_and_not_an_answer(
        self, tiny_policy, requests, monkeypatch
    ):
        def no_memory(**arguments):
            raise torch.OutOfMemoryError("no room at all")

        own = engine(tiny_policy, SHORT)
        monkeypatch.setattr(own.model, "generate", no_memory)
        for sample in own.sample(requests[:3]):
            assert sample.error.startswith("out of memory: ")
            assert "no room at all" in sample.error

    def test_another_error_of_the_model_is_not_taken_for_memory(
        self, tiny_policy, requests, monkeypatch
    ):
        def broken(**arguments):
            raise RuntimeError("shapes do not match")

        own = engine(tiny_policy, SHORT)
        monkeypatch.setattr(own.model, "generate", broken)
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


class TestSettings:
    @pytest.mark.parametrize(
        "wrong", [{"temperature": 0}, {"top_p": 0}, {"top_p": 1.1}, {"max_new_tokens": 0}]
    )
    def test_impossible_settings_are_refused(self, wrong):
        with pytest.raises(ValueError, match="must be above 0"):
            Sampling(**wrong)

    def test_greedy_settings_leave_out_what_they_ignore(self):
        assert Sampling(greedy=True).asdict() == {"greedy": True, "max_new_tokens": 64}

    def test_seeds_differ_by_run_problem_and_sample(self):
        parts = [(run, problem, k) for run in (1, 11) for problem in ("a", "1a") for k in (0, 1)]
        assert len({sample_seed(*part) for part in parts}) == len(parts)
        assert sample_seed(1, "gcd-8c3d51f94472", 0) == 1015551666989771593
