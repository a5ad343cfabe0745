"""A server of our own on loopback: real completions of a real policy, and faults on demand."""

import json
import threading
import time
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from grpo_harness.engines.engine import Request, Sampling
from grpo_harness.engines.transformers import TransformersEngine

EXTENSIONS = ("top_k", "min_p", "repetition_penalty", "stop_token_ids", "add_special_tokens")
EXTENSIONS += ("return_token_ids", "include_stop_str_in_output", "no_stop_trim")


class Server:
    """An OpenAI-compatible server of a policy, which draws by the engine of transformers.

    ``faults`` is called with the number of a completion's request, from 0, and its body; it may
    return the name of a fault, or a status with a body and headers to answer with. ``refuses`` are
    the fields that are a 400. ``asked`` has the body of every request for a completion that was
    answered with one, and ``headers`` those of all requests.
    """

    def __init__(
        self,
        policy,
        name="policy",
        *,
        faults=lambda number, body: None,
        refuses=(),
        delay=0.0,
        serial=False,
        dtype="float32",
        tells=("usage", "token_ids", "stop_reason"),
        about=None,
        llama=False,
        alter=None,
    ):
        self.engine = TransformersEngine(policy, Sampling(), device="cpu", dtype=dtype)
        self.name, self.faults, self.refuses = name, faults, refuses
        self.serial, self.delay, self.tells = serial, delay, tells
        self.llama = llama
        self.alter = alter or (lambda body: body)
        self.about = about or {"id": name, "owned_by": "tests", "created": time.time()}
        self.asked, self.headers, self.requests, self.at_once, self.most = [], [], 0, 0, 0
        self._lock = threading.Lock()
        self._stalled = threading.Event()

    def __enter__(self):
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        return self

    def __exit__(self, *_):
        self._stalled.set()
        self._http.shutdown()
        self._http.server_close()

    def _handler(server):  # noqa: N805 - the handler is the inner self
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                server.headers.append(dict(self.headers))
                if self.path == "/v1/models":
                    server._answer(self, 200, {"data": [server.about]})
                elif self.path == "/version":
                    server._answer(self, 200, {"version": "1.2.3"})
                else:
                    server._answer(self, 404, {})

            def do_POST(self):
                server.headers.append(dict(self.headers))
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server._lock:
                    number, server.requests = server.requests, server.requests + 1
                    server.at_once += 1
                    server.most = max(server.most, server.at_once)
                try:
                    server._post(self, number, body)
                except OSError:  # the other side has gone
                    self.close_connection = True
                finally:
                    with server._lock:
                        server.at_once -= 1

        return Handler

    def _post(self, handler, number, body):
        with self._lock if self.serial else nullcontext():
            time.sleep(self.delay)
        fault = self.faults(number, body)
        if fault == "drop":
            handler.close_connection = True
            handler.connection.close()
            return
        if fault == "stall":
            self._stalled.wait(30)
            handler.close_connection = True
            return
        if isinstance(fault, tuple):
            self._answer(handler, *fault)
            return
        if self.llama and body.get("top_k", 40) < 0:
            said = "1 validation error: 'loc': ('body', 'top_k'), 'type': 'greater_than_equal'"
            self._answer(handler, 500, {"error": {"message": said}})
            return
        if refused := [name for name in self.refuses if name in body]:
            said = f"Unexpected keys in the request: {refused}"
            self._answer(handler, 400, {"error": {"message": said}})
            return
        answer = json.dumps(self._completion(self.alter(body))).encode()
        if fault == "half":
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(answer)))
            handler.end_headers()
            handler.wfile.write(answer[: len(answer) // 2])
            handler.wfile.flush()
            handler.close_connection = True
            handler.connection.close()
            return
        with self._lock:
            self.asked.append(body)
        self._answer(handler, 200, answer)

    def _answer(self, handler, status, body, headers=()):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        for name, value in dict(headers).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    def _completion(self, body):
        greedy = body.get("temperature") == 0
        top_k = body.get("top_k", 40 if self.llama else -1)
        sampling = Sampling(
            temperature=body.get("temperature") or 1.0,
            top_p=body.get("top_p", 1.0),
            max_new_tokens=max(1, body["max_tokens"]),
            greedy=greedy,
            top_k=top_k if top_k > 0 else None,
            min_p=body.get("min_p", 0.05 if self.llama else None) or None,
            repetition_penalty=body.get("repeat_penalty", 1.1)
            if self.llama
            else body.get("repetition_penalty", 1.0),
            stop=tuple(body.get("stop", ())),
        )
        with self._lock:
            if {"logprobs", *([] if self.llama else ["prompt_logprobs"])} & body.keys():
                return self._scored(body)
            engine = self.engine.drawing(sampling)
            (sample,) = engine.sample([Request(body["prompt"], body.get("seed", 0))])
        text, stopped = sample.text, None
        for stop in sampling.stop:
            if text.endswith(stop):
                stopped = stop
                if not body.get("include_stop_str_in_output"):
                    text = text.removesuffix(stop)
        choice = {"text": text, "finish_reason": "length" if sample.truncated else "stop"}
        told = {"token_ids": list(sample.ids), "stop_reason": stopped}
        choice |= {name: value for name, value in told.items() if name in self.tells}
        usage = {"usage": {"completion_tokens": sample.tokens}} if "usage" in self.tells else {}
        return {"model": body["model"], "choices": [choice], **usage}

    def _scored(self, body):
        """Tell the log-probability of each token of a prompt, as OpenAI did or as vLLM does."""
        tokenizer = self.engine.policy.tokenizer
        ids = tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            logits = self.engine.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        scores = [None, *logits[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()]
        if self.llama and body.get("echo"):
            scores[1:] = logits[1:].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
            if self.llama == "without special tokens":
                special = set(tokenizer.all_special_ids)
                scores = [of for i, of in zip(ids, scores, strict=True) if i not in special]
        choice = {"text": body["prompt"], "finish_reason": "length"}
        if "prompt_logprobs" in body:
            told = [{str(i): {"logprob": of}} for i, of in zip(ids[1:], scores[1:], strict=True)]
            choice["prompt_logprobs"] = [None, *told]
        else:
            (drawn,) = self.engine.sample([Request(body["prompt"], body.get("seed", 0))])
            number = 200 if self.llama and not body["max_tokens"] else body["max_tokens"]
            own = [float(logits[-1, of]) for of in drawn.ids[:number]]
            own += [-0.5] * (number - len(own))
            choice["logprobs"] = {"token_logprobs": [*scores, *own] if body.get("echo") else own}
            if not body.get("echo"):
                choice["text"] = tokenizer.decode(drawn.ids[:number], skip_special_tokens=True)
        usage = {"usage": {"prompt_tokens": len(ids)}} if self.llama else {}
        return {"model": body["model"], "choices": [choice], **usage}
