"""Small files that stand for gigabytes or for no end: each is refused in one line, in little memory and time."""

import json
import resource
import subprocess
import sys
import time

import pytest
import torch
from support.commands import run_script
from support.hostile import LIMITED, anonymous_growth_mb, repacked
from support.models import small_model
from support.paths import ROOT

from armt_dist import files
from armt_dist.checkpoint.deepspeed_files import read_tensors
from armt_dist.config import ConfigError, assign, one_line, read_object, read_yaml, validate
from armt_dist.data.sections import BabilongConfig, PublishedConfig
from armt_dist.data.text.files import read_text
from armt_dist.evaluation.exported import load_model, small_twin
from armt_dist.records import read_json, read_json_lines
from armt_dist.training.run_config import RunConfig

MB = 2**20
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 200))
TEXTS = f"long: &long {'x' * 500_000}\nall: [{', '.join(['*long'] * 1000)}]\n"
YAML = {
    "alias bomb": (BOMB, "more than 50000 values, aliases counted"),
    "alias bomb of merges": (BOMB.replace("[x, x, x, x, x, x, x, x, x, x]", "{x: 1}"), "more than 50000 values"),
    "long text repeated": (TEXTS, "more than 50000 values"),
    "chain of aliases": (CHAIN, "nested more than 50 deep"),
    "contains itself": ("a: &a [*a]\n", "contains itself"),
    "deep lists": ("a: " + "[" * 300 + "]" * 300, "nested more than 50 deep"),
    "deep lists without an end": ("[" * 900_000, "nested more than 50 deep"),
    "deep mappings": ("".join(" " * i + "a:\n" for i in range(300)), "nested more than 50 deep"),
    "many values": ("a: [" + "1," * 200_000 + "]", "more than 50000 values"),
    "large file": ("# " + "x" * MB, "more than 1048576 bytes"),
    "endless number": ("seed: 0x" + "f" * 100_000, "a number of 100002 characters"),
    "endless sexagesimal": ("seed: 1" + ":10" * 100_000, "a number of 300001 characters"),
    "key given twice by tag": ("a: 1\n!!str a: 2\n", "'a' is given twice"),
    "no integer": ('a: !!int ""', "not valid YAML"),
    "no time": ("a: !!timestamp x", "not valid YAML"),
    "code": ("a: !!python/object/apply:os.system [touch ran]", "not valid YAML"),
}


@pytest.mark.parametrize("name", YAML)
def test_yaml(name, tmp_path):
    text, says = YAML[name]
    path = tmp_path / "config.yaml"
    path.write_text(text)
    began = time.monotonic()
    with anonymous_growth_mb() as growth, pytest.raises(ConfigError, match=f"config={path}: .*{says}") as caught:
        read_yaml(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert growth() < 300 and time.monotonic() - began < 30


JSON = {
    "deep lists": ("[" * 300 + "]" * 300, "nested more than 50 deep"),
    "deep lists without an end": ("[" * 900_000, "nested more than 50 deep"),
    "deep objects": ('{"a":' * 300 + "1" + "}" * 300, "nested more than 50 deep"),
    "many values": ("[" + "[]," * 2_000_000 + "[]]", "more than 1000000 values"),
    "key given twice": ('{"a": 1, "a": 2}', "the key 'a' is given twice"),
    "many keys, one twice": (json.dumps({str(i): 1 for i in range(300_000)})[:-1] + ', "7": 1}', "'7' is given twice"),
    "endless number": ("[" + "9" * 100_000 + "]", "not valid JSON"),
    "not UTF-8": (b'{"a": "\xff"}', "not valid JSON"),
}


@pytest.mark.parametrize("name", JSON)
def test_json(name, tmp_path):
    text, says = JSON[name]
    path = tmp_path / "ds.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    began = time.monotonic()
    with anonymous_growth_mb() as growth, pytest.raises(ConfigError, match=f"ds_config={path}: .*{says}") as caught:
        read_object(path, "ds_config")
    assert "\n" not in str(caught.value)
    assert growth() < 300 and time.monotonic() - began < 10
    assert read_json(path) == {}, "where a damaged record counts as none"


def test_json_that_is_large_without_a_hole(tmp_path):
    with (tmp_path / "ds.json").open("wb") as file:
        file.truncate(files.JSON_BYTES + 1)
    with anonymous_growth_mb() as growth, pytest.raises(ConfigError, match="more than 67108864 bytes"):
        read_object(tmp_path / "ds.json", "ds_config")
    assert growth() < 10


def test_lines_of_a_sparse_file(tmp_path):
    """metrics.jsonl of 500 MB without a line end, which began as a record."""
    with (tmp_path / "metrics.jsonl").open("wb") as file:
        file.write(b'{"kind": "train"}\n')
        file.truncate(500 * MB)
    with anonymous_growth_mb() as growth:
        assert list(read_json_lines(tmp_path / "metrics.jsonl")) == [{"kind": "train"}]
    assert growth() < 50


def test_what_is_within_the_limits_is_read(tmp_path):
    (tmp_path / "a.yaml").write_text("a: &a [1, 2]\nb: [*a, *a]\nc: {<<: {x: 1}, y: 2}\nd: " + "[" * 40 + "]" * 40)
    found = read_yaml(tmp_path / "a.yaml")
    assert found["b"] == [[1, 2], [1, 2]] and found["c"] == {"x": 1, "y": 2}
    (tmp_path / "a.json").write_text(json.dumps({str(i): [i] for i in range(100_000)}))
    assert len(read_object(tmp_path / "a.json", "x")) == 100_000


def test_overrides():
    with pytest.raises(ConfigError, match="expected key=value"):
        assign({}, ".".join("a" * 300) + "=1")
    with pytest.raises(ConfigError, match="nested more than 50 deep") as caught:
        assign({}, "a=" + "[" * 5000)
    assert len(str(caught.value)) < 500


def test_a_message_makes_no_more_text_than_it_shows():
    """The value of an alias bomb took 6 GB, and no end of time, in the text of an error."""
    value = ["x" * 1000] * 1000
    for _ in range(9):
        value = [value] * 1000
    began = time.monotonic()
    with anonymous_growth_mb() as growth:
        text = one_line(value)
    assert text.startswith("[[[") and len(text) == 120 and growth() < 5 and time.monotonic() - began < 1
    assert one_line({"a": [1, None, "b"]}) == "{'a': [1, None, 'b']}" == str({"a": [1, None, "b"]})
    assert one_line(10**5000) == "a number of 16610 bits" and one_line([]) == "[]" and one_line({}) == "{}"
    with pytest.raises(ConfigError, match="unknown key") as caught:
        validate(PublishedConfig, {"set": "facebook/babi_qa", "nope": value})
    assert len(str(caught.value)) < 600


def ends_in_one_line(result: subprocess.CompletedProcess) -> str:
    """The line on standard error of a command that ends with exit code 2."""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("[")]
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr[-2000:]
    return lines[-1]


def test_a_command_is_given_a_bomb(tmp_path):
    (tmp_path / "x.yaml").write_text(BOMB)
    began = time.monotonic()
    line = ends_in_one_line(run_script("train.py", "--config", tmp_path / "x.yaml", "--check", 1))
    assert "more than 50000 values" in line and time.monotonic() - began < 30
    (tmp_path / "x.json").write_text("[" * 300 + "]" * 300)
    line = ends_in_one_line(run_script("train.py", "--ds_config", tmp_path / "x.json", "--check", 1))
    assert "nested more than 50 deep" in line


# --- tensors ---------------------------------------------------------------------------------------------------------


class Bytes:
    """Is unpickled as a bytearray of 10 GB, by a class that torch's restricted unpickler knows."""

    def __reduce__(self):
        return bytearray, (10**10,)


class Empty:
    """Is unpickled as a tensor of 40 GB."""

    def __reduce__(self):
        return torch.Tensor, (10**10,)


def strided(path):
    torch.save({"a": torch.zeros(1).expand(1_900_000_000)}, path)


def overlapping(path):
    whole = torch.zeros(10_000)
    torch.save({"a": [whole[: 10_000 - i] for i in range(500)]}, path)


def claimed(path):
    """A storage of 7.6 GB, of which the file has 4 kB."""
    torch.save({"a": torch.zeros(1000)}, path)
    repacked(path, lambda name, content: content.replace(b"M\xe8\x03", b"J" + (1_900_000_000).to_bytes(4, "little")))


def compressed(path):
    torch.save({"a": torch.zeros(30 * MB)}, path)
    repacked(path, compress=True)


def byte_array(path):
    torch.save({"a": torch.zeros(10), "b": Bytes()}, path)


def allocated(path):
    torch.save({"a": torch.zeros(10), "b": Empty()}, path)


def deep(path):
    value = torch.zeros(1)
    for _ in range(300):
        value = [value]
    torch.save({"a": value, "b": torch.zeros(1).expand(10**9)}, path)


def sparse_tensor(path):
    with torch.sparse.check_sparse_tensor_invariants():
        value = torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.long), torch.ones(1), (2**20, 2**20))
        torch.save({"a": value}, path)


def legacy(path):
    torch.save({"a": torch.zeros(10)}, path, _use_new_zipfile_serialization=False)


TENSORS = {
    "strides of 0": (strided, "claim 7600000000 bytes"),
    "many views of one storage": (overlapping, "its tensors claim"),
    "storage larger than its file": (claimed, "not resizable"),
    "compressed": (compressed, "compressed"),
    "bytearray": (byte_array, "it names __builtin__.bytearray"),
    "empty tensor": (allocated, "."),
    "behind deep lists": (deep, "its tensors claim"),
    "sparse": (sparse_tensor, "it names"),
    "pickle without an archive": (legacy, "not a zip file"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors(name, tmp_path):
    write, says = TENSORS[name]
    path = tmp_path / "x_optim_states.pt"
    write(path)
    assert path.stat().st_size < 200_000
    began = time.monotonic()
    with anonymous_growth_mb() as growth, pytest.raises(Exception, match=says) as caught:
        read_tensors(path)
    assert not isinstance(caught.value, (MemoryError, RecursionError, AssertionError))
    assert growth() < 50 and time.monotonic() - began < 5


# --- numbers and texts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [2**63, 2**64, 10**30])
@pytest.mark.parametrize("key", ["train", "data"])
def test_a_seed_that_no_generator_takes(key, seed):
    tree = {"model": {"base": "x"}, "curriculum": [{"pairs": 1, "steps": 2}], key: {"seed": seed}}
    with pytest.raises(ConfigError, match=rf"^{key}.seed={seed}: Input should be less than or equal to 1099511627776$"):
        validate(RunConfig, tree)


def test_a_vocabulary_that_no_embedding_has():
    with pytest.raises(ConfigError, match="vocabulary=1000000000000: Input should be less than or equal to 1000000"):
        validate(BabilongConfig, {"vocabulary": 10**12})


@pytest.mark.parametrize("name", ["{nope}", "{}", "{0}", "{task.__class__}", "{task!r}", "{task:>999999999}"])
def test_braces_in_a_file_name(name):
    with pytest.raises(ConfigError, match="stands for nothing; write {task} or {split}"):
        validate(PublishedConfig, {"set": "facebook/babi_qa", "files": f"babi/{name}.jsonl"})
    assert validate(PublishedConfig, {"set": "facebook/babi_qa", "files": "{task}_{split}.jsonl"})


def test_a_sparse_text_of_10_gb(tmp_path):
    with (tmp_path / "a.txt").open("wb") as file:
        file.write(b"a text\n" * 1000)
        file.truncate(10 * 2**30)
    began = time.monotonic()
    with anonymous_growth_mb() as growth, pytest.raises(ConfigError, match="a binary file"):
        read_text(tmp_path / "a.txt")
    assert growth() < 100 and time.monotonic() - began < 10


def test_little_memory_is_enough_to_refuse_them_all(tmp_path):
    """In a process that may have 1 GB of addresses: what is refused is refused before memory is asked for."""
    for i, (text, _) in enumerate(YAML.values()):
        (tmp_path / f"{i}.yaml").write_text(text)
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))  # noqa: E731
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *sorted(tmp_path.glob("*.yaml"))],
        cwd=ROOT,
        preexec_fn=limit,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.split() == ["refused"] * len(YAML), done.stderr[-2000:]


# --- models ----------------------------------------------------------------------------------------------------------

MODELS = {
    "layers without end": ({"n_layer": 10**9}, "num_hidden_layers=1000000000: more than 10000"),
    "a vocabulary without end": ({"vocab_size": 10**10}, "config.json claims [0-9]+ parameters, the weights have"),
    "a width without end": ({"n_embd": 2**20}, "config.json claims [0-9]+ parameters, the weights have"),
    "a width that is no number": ({"n_embd": "x"}, ""),
    "nested": ({"n_embd": json.loads("[" * 300 + "]" * 300)}, "nested more than 50 deep"),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_configuration_of_an_export(name, tmp_path):
    change, says = MODELS[name]
    small_model("gpt2", segment_tokens=4).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["base_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    began = time.monotonic()
    with anonymous_growth_mb() as growth, pytest.raises(ConfigError, match=rf"^model=.*cannot be loaded \(.*{says}"):
        load_model(tmp_path, "cpu")
    assert growth() < 100 and time.monotonic() - began < 10


def test_heads_without_end():
    config = small_model("gpt2", segment_tokens=4).config
    config.base.n_head = 10**7
    with pytest.raises(ConfigError, match="10000000 and 1 heads are not those of a model"):
        small_twin(config)
