"""The engine of a served policy: any OpenAI-compatible server draws its completions.

Prompts are rendered here and sent as text, one completion a request. No weights are loaded.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from grpo_harness.engines.client import Answer, Client
from grpo_harness.engines.endpoint import Endpoint
from grpo_harness.engines.engine import EngineError, Progress, Request, Sample, Sampling, first_end
from grpo_harness.engines.remote import Remote
from grpo_harness.policy.policy import Policy
from grpo_harness.text import escape, together

_T = TypeVar("_T")


class _Choice(msgspec.Struct):
    text: str
    finish_reason: Literal["stop", "length"]
    token_ids: list[int] | None = None
    stop_reason: str | int | msgspec.UnsetType | None = msgspec.UNSET
    matched_stop: str | int | msgspec.UnsetType | None = msgspec.UNSET


class _Usage(msgspec.Struct):
    completion_tokens: Annotated[int, Meta(ge=0)] | None = None


class _Completion(msgspec.Struct):
    choices: Annotated[list[_Choice], Meta(min_length=1, max_length=1)]
    usage: _Usage | None = None


class _Model(msgspec.Struct):
    id: str
    owned_by: str | None = None
    root: str | None = None
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


class ServerEngine(Remote):
    """Samples a policy through the servers of an endpoint.

    The sample of a request depends on its seed only as far as the server honours seeds. Fields of
    the request that have no effect are left out if the server refuses them; `remarks` names those
    that might have had one there.
    """

    def __init__(self, policy: Policy, sampling: Sampling, endpoint: Endpoint) -> None:
        super().__init__(policy, sampling)
        self.endpoint = endpoint
        self.client = Client(endpoint)
        self._taken: set[str] = set()
        self._left_out: set[str] = set()
        self._off = {"top_k": -1}
        self._about: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"<ServerEngine {self.policy.name} at {together(self.endpoint.urls)}>"

    def identity(self) -> dict[str, Any]:
        """Return the model's name and what the servers say of it and of themselves.

        Raises ``EngineError`` if the servers do not have the model, or differ.
        """
        if not self._about:
            self._about.update(run(self._asked()))
        return {"engine": "server", **self._about}

    def remarks(self) -> dict[str, str]:
        """Say which fields of a request the server does not take."""
        if not self._left_out:
            return {}
        names = together(sorted(self._left_out))
        return {"requests": f"without {names}, which the server does not take"}

    def sample(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Sample]:
        """Draw one sample per request, in the order of the requests.

        Raises ``EngineError``, which has the samples that were drawn before.
        """
        samples: dict[int, Sample] = {}

        async def draw(number: int, request: Request) -> None:
            samples[number] = await self._draw(request)
            if progress is not None:
                progress(1)

        async def draw_all() -> None:
            async with self.client.open():
                # The first alone, until it is known which fields the server takes.
                alone = 0 if self._taken >= self.fields().keys() - self._left_out else 1
                for number in range(alone):
                    await draw(number, requests[number])
                others = list(enumerate(requests))[alone:]
                tasks = [asyncio.ensure_future(draw(*of)) for of in others]
                try:
                    await asyncio.gather(*tasks)
                finally:
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)

        if not requests:
            return []
        self.identity()
        try:
            run(draw_all())
        except EngineError as error:
            error.drawn = samples
            raise
        return [samples[number] for number in range(len(requests))]

    async def answered(self, body: Mapping[str, Any]) -> Answer:
        """Post a request for a completion, as it is, with the model's name."""
        return await self.client.post("completions", {"model": self._about["model"], **body})

    def fields(self) -> dict[str, Any]:
        """Return the fields that every request has, but for the seed."""
        s = self._sampling
        draws: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0}
        if not s.greedy:
            draws = {"temperature": s.temperature, "top_p": s.top_p}
        return {"max_tokens": s.max_new_tokens, **draws, **self._extensions()}

    def _extensions(self) -> dict[str, Any]:
        """Return the fields that not every server knows: vLLM and SGLang do.

        That of llama-cpp-python has another number for no ``top_k``, and another name for the
        penalty, which it sets to 1.1 if it is not told.
        """
        s = self._sampling
        fields: dict[str, Any] = {
            "top_k": self._off["top_k"] if s.greedy or s.top_k is None else s.top_k,
            "min_p": 0.0 if s.greedy or s.min_p is None else s.min_p,
            "repetition_penalty": s.repetition_penalty,
            "stop_token_ids": list(self.policy.eos_token_ids),
            "add_special_tokens": False,
            "return_token_ids": True,
        }
        if self._off["top_k"] == 0:
            fields["repeat_penalty"] = fields.pop("repetition_penalty")
        if s.stop:
            fields |= {"stop": list(s.stop)}
            fields |= {"include_stop_str_in_output": True, "no_stop_trim": True}
        return fields

    def _dispensable(self, prompt: str) -> set[str]:
        """Return the fields that may be left out, because they are to change nothing."""
        off = {**self._off, "min_p": 0.0, "repetition_penalty": 1.0, "repeat_penalty": 1.0}
        fields = self._extensions()
        names = {name for name, value in off.items() if fields.get(name) == value}
        if not _begins_with_more(self.policy, prompt):
            names.add("add_special_tokens")
        return {*names, "seed", "stop_token_ids", "return_token_ids", "no_stop_trim"}

    async def _draw(self, request: Request) -> Sample:
        while True:
            body = {"prompt": request.prompt, **self.fields()}
            if self.endpoint.seed and not self._sampling.greedy:
                body["seed"] = request.seed % 2**31  # what every server can read
            body = {name: body[name] for name in body if name not in self._left_out}
            answer = await self.answered(body)
            if answer.status not in (400, 422):
                self._taken |= body.keys()
                return self._sample(answer)
            self._refused(answer, body)

    def _refused(self, answer: Answer, body: Mapping[str, Any]) -> None:
        """Leave out what a server refuses, for all later requests. Raises ``EngineError``.

        If it does not say which fields it refuses, it is asked without any that can be spared.
        """
        named = {name for name in body if re.search(rf"\b{name}\b", answer.body)}
        named -= {"prompt"}
        if named == {"top_k"} and body["top_k"] == -1:
            self._off["top_k"] = 0
            return
        spare = (self._dispensable(body["prompt"]) & body.keys()) - self._taken
        wanted = named - spare
        if not wanted and spare:
            self._left_out |= named or spare
        else:
            fields = together([f"{name} = {json.dumps(body[name])}" for name in sorted(wanted)])
            what = f" does not take {fields}:" if wanted else ":"
            raise EngineError(f"{self.policy.checkpoint} as served{what} {answer}")

    def _sample(self, answer: Answer) -> Sample:
        if answer.status != 200:
            raise EngineError(f"{self.policy.checkpoint} as served: {answer}")
        try:
            read = msgspec.json.decode(answer.body, type=_Completion)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise EngineError(
                f"{answer}, which is no completion ({escape(str(error))}): is {answer.url} an "
                "OpenAI-compatible server's?"
            ) from None
        (choice,) = read.choices
        stopped = self._stopped(choice, answer)
        truncated = choice.finish_reason == "length" and stopped is None
        text = choice.text[:stopped]
        ids = choice.token_ids or ()
        if not ids:
            ids = self.policy.tokenizer(text, add_special_tokens=False)["input_ids"]
            if not truncated and stopped is None:
                ids = [*ids, self.policy.tokenizer.eos_token_id or self.policy.eos_token_ids[0]]
        told = read.usage.completion_tokens if read.usage else None
        tokens = len(ids) if told is None else told
        return Sample(text, tokens, truncated, ids=tuple(ids) if len(ids) == tokens else ())

    def _stopped(self, choice: _Choice, answer: Answer) -> int | None:
        """Return where the text of a choice ends with a stop string; put one back that was cut."""
        stop = self._sampling.stop
        if not stop:
            return None
        if end := first_end(choice.text, stop):
            return end
        reasons = (choice.stop_reason, choice.matched_stop)
        told = [reason for reason in reasons if reason is not msgspec.UNSET]
        if choice.finish_reason == "stop" and not told:
            raise EngineError(
                f"{answer.url} does not say whether a stop string or an end token ended a "
                "completion, so it cannot be used with stop: leave stop out of the sampling"
            )
        for reason in told:
            if isinstance(reason, str) and reason in stop:
                choice.text += reason
                return len(choice.text)
        return None

    async def _asked(self) -> dict[str, Any]:
        """Ask every address for its models and its version; those that answer must agree."""
        said: dict[str, dict[str, Any]] = {}
        async with self.client.open():
            for url in self.endpoint.urls:
                models = read_as(await self.client.get(f"{url}/models"), _Models)
                version = read_as(await self.client.get(f"{url.removesuffix('/v1')}/version"), dict)
                about = self._model(url, models.data if models else [])
                if version and isinstance(version.get("version"), str):
                    about["version"] = escape(version["version"])
                if about:
                    said[url] = about
        (first, about), *others = said.items() or [("", {})]
        for url, other in others:
            if other != about:
                raise EngineError(
                    f"{first} and {url} do not serve the same: {_words(about)} and {_words(other)}"
                )
        name = self.endpoint.model or about.get("model")
        if name is None:
            raise EngineError(
                f"{self.endpoint.urls[0]} does not list its models: see whether the server runs, "
                "or name the model in [tool.grpo-harness.serve]"
            )
        return {**about, "model": name}

    def _model(self, url: str, models: Sequence[_Model]) -> dict[str, Any]:
        """Return what a server says of the model, from those that it lists."""
        name = self.endpoint.model
        if not models:
            return {}
        found = [model for model in models if name in (None, model.id)]
        if len(found) != 1:
            listed = ", ".join(escape(model.id, 60) for model in models[:10])
            wanted = f"does not serve {escape(name)}" if name else "serves several models"
            raise EngineError(
                f"{url} {wanted}: it lists {listed}; name one of them as model in "
                "[tool.grpo-harness.serve]"
            )
        (model,) = found
        told = {
            "model": model.id,
            "owner": model.owned_by,
            "root": model.root,
            "context": model.max_model_len,
        }
        return {name: value for name, value in told.items() if value is not None}


def run(work: Coroutine[Any, Any, _T]) -> _T:
    """Wait for ``work``, also where an event loop is running."""

    def wait() -> _T:
        # asyncio.run would take the thread's own loop away.
        with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
            return runner.run(work)

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return wait()
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(wait).result()


def _begins_with_more(policy: Policy, prompt: str) -> bool:
    """Tell whether the tokenizer adds special tokens to a prompt unless it is told not to."""
    plain, usual = (policy.tokenizer(prompt, add_special_tokens=add) for add in (False, True))
    return bool(plain["input_ids"] != usual["input_ids"])


def read_as(answer: Answer | None, kind: type[_T]) -> _T | None:
    """Return what a server answers, or ``None`` if that is an error or of another kind."""
    if answer is None or answer.status != 200:
        return None
    try:
        return msgspec.json.decode(answer.body, type=kind)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None


def _words(about: Mapping[str, Any]) -> str:
    return escape(" ".join(f"{name}={value}" for name, value in about.items()))
