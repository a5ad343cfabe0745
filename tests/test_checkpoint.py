import json
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from grpo_harness.engines.engine import Request, Sampling
from grpo_harness.engines.transformers import TransformersEngine
from grpo_harness.policy.checkpoint import PolicyError, PolicyName, find
from grpo_harness.policy.policy import load

QWEN = "qwen/Qwen2-0.5B-Instruct"


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Empty caches of both hubs, and no network."""
    from huggingface_hub import constants

    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "huggingface"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


class TestHubs:
    def test_modelscopes_cache_is_read_as_the_tutorial_lays_it_out(self, caches, save_tiny):
        folder = caches / "modelscope" / "models" / "qwen" / "Qwen2-0___5B-Instruct"
        save_tiny(folder, seed=1)
        policy = load(QWEN)
        assert policy.checkpoint.path == folder
        assert policy.name == QWEN
        engine = TransformersEngine(policy, Sampling(max_new_tokens=4), device="cpu")
        (sample,) = engine.sample([Request(policy.render("1 + 1"), 0)])
        assert 1 <= sample.tokens <= 4

    @pytest.mark.parametrize(
        "where", ["models/Qwen/Qwen2-0___5B-Instruct", "hub/models/qwen/Qwen2-0.5B-Instruct"]
    )
    def test_other_layouts_and_spellings_of_it_too(self, caches, tiny, where):
        folder = shutil.copytree(tiny, caches / "modelscope" / where)
        assert find(PolicyName(QWEN)).path == folder

    def test_hugging_faces_cache_comes_next(self, caches, tiny):
        repository = caches / "huggingface" / "models--Qwen--Qwen2-0.5B-Instruct"
        folder = shutil.copytree(tiny, repository / "snapshots" / "0123abc")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0123abc")
        assert find(PolicyName(QWEN)).path.resolve() == folder.resolve()

    @pytest.mark.parametrize("revision", ["v1.5", "feature/x", "a" * 40])
    def test_a_revision_is_its_own_snapshot(self, caches, save_tiny, revision):
        repository = caches / "huggingface" / "models--Qwen--Qwen2-0.5B-Instruct"
        commits = {"main": "b" * 40, revision: "a" * 40}
        for seed, (ref, commit) in enumerate(commits.items()):
            save_tiny(repository / "snapshots" / commit, seed=seed)
            if ref != commit:
                (repository / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
                (repository / "refs" / ref).write_text(commit)
        main, pinned = load(QWEN), load(f"{QWEN}@{revision}")
        assert (main.checkpoint.path.name, pinned.checkpoint.path.name) == ("b" * 40, "a" * 40)
        assert main.fingerprint.weights != pinned.fingerprint.weights

    def test_a_revision_is_not_looked_for_where_there_are_none(self, caches, tiny):
        shutil.copytree(tiny, caches / "modelscope" / "models" / QWEN)
        assert find(PolicyName(QWEN))
        with pytest.raises(PolicyError) as error:
            find(PolicyName(f"{QWEN}@v2"))
        message = str(error.value)
        assert f"hf download {QWEN} --revision v2" in message
        assert "modelscope" not in message.lower()
        assert "\n" not in message

    def test_a_revision_is_asked_of_the_hub(self, caches, tiny, monkeypatch):
        import huggingface_hub

        asked = []

        def download(repository, *, revision, local_files_only=False, **_):
            asked.append((repository, revision))
            if local_files_only:
                raise FileNotFoundError(repository)
            return tiny

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        assert find(PolicyName(f"{QWEN}@v2")).path == tiny
        assert asked == [(QWEN, "v2")] * 2

    @pytest.mark.parametrize("name", ["a/b@", "a/b@../x", "a/b@x/../../y", "a/b@x y", "a/b/c@d"])
    def test_what_is_no_revision_is_nothing(self, caches, name):
        with pytest.raises(PolicyError, match="no policy '"):
            find(PolicyName(name, caches))

    def test_in_neither_cache_it_says_where_it_looked_and_what_to_do(self, caches):
        with pytest.raises(PolicyError) as error:
            find(PolicyName(QWEN))
        message = str(error.value)
        assert "\n" not in message
        for part in (QWEN, str(caches / "modelscope"), str(caches / "huggingface"), "hf download"):
            assert part in message


class TestPaths:
    """A path that does not exist is called one, and not the id of a model."""

    def message(self, name, home):
        with pytest.raises(PolicyError) as error:
            find(PolicyName(name, home))
        message = str(error.value)
        assert message.startswith(f"no policy '{name}': ")
        assert "\n" not in message
        return message

    @pytest.mark.parametrize(
        ("name", "last"),
        [
            ("./out/x", "out"),
            ("out/checkpoint-300/y", "out"),
            ("./gone/x", "."),
            ("gone/a/b", "."),
            ("../nowhere/x", ".."),
            ("checkpoints/latest", "checkpoints"),
        ],
    )
    def test_that_are_nothing(self, caches, name, last):
        home = caches / "home"
        for folder in ("out", "checkpoints"):
            (home / folder).mkdir(parents=True)
        message = self.message(name, home)
        assert f"this path does not exist; {home / last} does" in message
        assert "hf download" not in message

    def test_that_are_absolute(self, caches):
        assert "this path does not exist" in self.message(str(caches / "x" / "y"), caches)
        assert "this path does not exist" in self.message("~/no-such-folder-of-mine", caches)

    def test_that_are_files(self, copy):
        message = self.message(str(copy / "model.safetensors"), copy)
        assert "model.safetensors is a file: name the folder that it is in" in message

    def test_that_may_be_the_id_of_a_model(self, caches):
        message = self.message("checkpoints/latest", caches)
        assert f"as a path, it does not exist ({caches} has no checkpoints)" in message
        assert "as a model's id, it is not in ModelScope's cache" in message

    def test_a_model_is_found_beside_a_folder_of_its_owners_name(self, caches, tiny):
        (caches / "qwen").mkdir()
        folder = shutil.copytree(tiny, caches / "modelscope" / "models" / QWEN)
        assert find(PolicyName(QWEN, caches)).path == folder


class TestBroken:
    def message(self, name):
        with pytest.raises(PolicyError) as error:
            load(str(name))
        message = str(error.value)
        assert "\n" not in message
        return message

    def test_a_name_that_is_nothing(self, tmp_path):
        assert "nano-base" in self.message("nano")

    def test_an_empty_folder(self, tmp_path):
        assert "config.json" in self.message(tmp_path)

    @pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}', "\0", "[" * 100_000])
    def test_a_config_that_is_not_one(self, copy, text):
        (copy / "config.json").write_text(text)
        assert str(copy / "config.json") in self.message(copy)

    @pytest.mark.parametrize(
        "name",
        [
            "x" * 300,
            "x" * 3000,
            "a/" + "b" * 300,
            "~nosuchuser/x",
            "a\0b",
            "a\n::error::b",
            "…",
            "",
        ],
        ids=range(8),
    )
    def test_a_name_that_no_file_can_have(self, name):
        message = self.message(name)
        assert "no policy '" in message
        assert "\0" not in message
        assert "::error" not in message

    def test_an_unknown_architecture(self, copy):
        (copy / "config.json").write_text('{"model_type": "no_such_model"}')
        assert "cannot be loaded" in self.message(copy)

    def test_a_list_of_training_problems_that_cannot_be_read(self, copy):
        (copy / "problems.txt").write_bytes(b"\xff\xfe")
        with pytest.raises(PolicyError, match=r"problems\.txt cannot be read"):
            load(str(copy)).checkpoint.trained_on()

    def test_code_in_the_checkpoint_is_never_run(self, copy):
        config = json.loads((copy / "config.json").read_text())
        config |= {"model_type": "own", "auto_map": {"AutoConfig": "evil.Config"}}
        (copy / "config.json").write_text(json.dumps(config))
        (copy / "evil.py").write_text("raise SystemExit('ran')")
        assert "cannot be loaded" in self.message(copy)

    @pytest.mark.parametrize("size", [0, 4, 100, -1])
    def test_weights_that_are_cut_short(self, copy, size):
        path = copy / "model.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[:size])
        message = self.message(copy)
        assert str(path) in message
        assert "again" in message

    def test_a_missing_shard(self, copy):
        (copy / "model.safetensors").unlink()
        index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
        (copy / "model.safetensors.index.json").write_text(json.dumps(index))
        assert "model-00001-of-00002" in self.message(copy)

    def test_a_shard_outside_the_folder(self, copy):
        (copy / "model.safetensors").rename(copy.parent / "model.safetensors")
        index = {"weight_map": {"lm_head.weight": "../model.safetensors"}}
        (copy / "model.safetensors.index.json").write_text(json.dumps(index))
        assert "out of its folder" in self.message(copy)

    def test_pickled_weights(self, copy):
        (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
        message = self.message(copy)
        assert "pytorch_model.bin" in message
        assert "never loaded" in message

    def test_no_tokenizer(self, copy):
        (copy / "tokenizer.json").unlink()
        assert "no tokenizer" in self.message(copy)

    def test_no_end_token(self, copy):
        config = json.loads((copy / "tokenizer_config.json").read_text())
        config["eos_token"] = None
        (copy / "tokenizer_config.json").write_text(json.dumps(config))
        (copy / "generation_config.json").write_text("{}")
        assert "eos_token" in self.message(copy)

    def test_smollm2_without_its_package(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert "make smollm2" in self.message("smollm2")


def slug(name, home="."):
    return PolicyName(str(name), Path(home)).slug


class TestSlug:
    """What a policy's baselines are kept under."""

    def test_of_names_that_folders_can_have(self, tiny, monkeypatch):
        assert slug("nano-base") == "nano-base"
        assert slug(QWEN) == "qwen--Qwen2-0.5B-Instruct"
        assert slug(tiny) == "tiny"
        assert slug(f"{tiny}/") == "tiny"
        assert slug(tiny.name, tiny.parent) == "tiny"
        monkeypatch.chdir(tiny)
        assert slug(".") == "tiny"

    def test_of_a_checkpoint_of_a_run_has_the_runs_name(self, tmp_path):
        for place in ("runA", "runB", "run 1", "a--b", "a/b--c"):
            (tmp_path / place / "checkpoint-300").mkdir(parents=True)
        assert slug("runA/checkpoint-300", tmp_path) == "runA--checkpoint-300"
        assert slug(tmp_path / "runB" / "checkpoint-300") == "runB--checkpoint-300"
        assert slug("checkpoint-300", tmp_path / "runA") == "runA--checkpoint-300"
        odd = [slug(tmp_path / p / "checkpoint-300") for p in ("run 1", "a--b", "a/b--c")]
        assert len({*odd, "a--b--checkpoint-300"}) == 4
        for folder in odd:
            assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", folder)
        for plain in ("checkpoint-final", "checkpoint-3b", "my-checkpoint-3"):
            (tmp_path / "runA" / plain).mkdir()
            assert slug(tmp_path / "runA" / plain) == plain

    def test_of_a_revision_is_not_that_of_another(self):
        slugs = {slug(name) for name in (QWEN, f"{QWEN}@v1", f"{QWEN}@v2", f"{QWEN}@f/x")}
        assert len(slugs) == 4

    def test_a_link_is_known_by_its_own_name_wherever_it_points(self, tiny, tmp_path):
        link = tmp_path / "latest"
        link.symlink_to(tiny)
        assert slug(link) == "latest"
        assert find(PolicyName(str(link))).path == tiny

    @given(st.lists(st.text(st.characters(), max_size=12), min_size=2, max_size=2, unique=True))
    @example(["模型-é", "..."])
    @example(["a/b", "a--b"])
    @example(["../../evil", "evil"])
    @example(["a b", "a-b"])
    @example(["", "policy"])
    @example(["a/b@c", "a/b@d"])
    @example(["a/b@c/d", "a/b@c--d"])
    @example(["recipes", "training"])
    @example(names=["", "/"])
    def test_is_a_folder_of_its_own_for_every_name(self, names):
        one, two = map(slug, names)
        assert one != two
        for folder in (one, two):
            assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", folder)
            assert len(folder) < 100
            assert not folder.endswith(".")
            assert folder not in ("recipes", "training")
