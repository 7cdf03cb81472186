"""The command line: what goes to standard output, what to standard error, and the exit status."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from glmjax.generate import main
from glmjax.glm import load

SPARSE = Path(__file__).parent / "golden" / "sparse"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Golden weights with a context of 64, a vocabulary of printable characters and a chat template."""
    directory = tmp_path_factory.mktemp("model")
    shutil.copytree(SPARSE, directory, dirs_exist_ok=True)
    config = json.loads((directory / "config.json").read_text()) | {"max_position_embeddings": 64}
    (directory / "config.json").write_text(json.dumps(config))
    tokens = ["<bos>", "<eos>", "Ġ", "Ċ", *map(chr, range(0x21, 0x7F)), *(f"{i:02}" for i in range(62))]
    raw = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(tokens[:2])
    raw.save(str(directory / "tokenizer.json"))
    template = "{% for m in messages %}<bos>{{ m.role[0] }}:{{ m.content }}{% endfor %}<bos>a:"
    (directory / "chat_template.jinja").write_text(template)
    return directory


@pytest.fixture
def run(model, capfd):
    """The command in this process: its exit status, standard output and standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(["--model-path", str(model), "--ignore-eos", "--max-new-tokens", "8", *arguments])
        return status, *capfd.readouterr()

    return run


def completion(model: Path, prompt, **fields) -> str:
    fields = {"max_new_tokens": 8, "ignore_eos": True, "temperature": 0} | fields
    return load(model).generate(prompt, **fields).finish().text


def test_prompt_and_completion_go_to_standard_output(run, model):
    status, out, _ = run("def f(", "--temperature", "0")
    assert status == 0
    assert out == f"def f({completion(model, 'def f(')}\n"


def test_one_line_of_statistics_goes_to_standard_error(run):
    _, _, err = run("abc", "--temperature", "0")
    assert re.fullmatch(
        r"\[3 prompt tokens, 8 new \(length\); first token after \d+\.\d\d s with compilation; "
        r"then \d+\.\d tokens/s\]\n",
        err,
    )


def test_sampling_reports_a_seed_with_which_the_output_can_be_had_again(run):
    _, out, err = run("abc")
    seed = re.search(r"; seed (\d+)\]", err)[1]
    assert run("abc", "--random-seed", seed)[1] == out


def test_a_single_token_has_no_speed(run):
    _, _, err = run("abc", "--temperature", "0", "--max-new-tokens", "1")
    assert err.startswith("[3 prompt tokens, 1 new (length); first token after")
    assert "tokens/s" not in err


def test_flags_reach_the_sampler(run, model):
    _, out, _ = run("abc", "--top-k", "1", "--frequency-penalty", "2", "--random-seed", "1")
    assert out == f"abc{completion(model, 'abc', frequency_penalty=2.0)}\n"


def test_stop_strings_may_be_several_and_the_prompt_come_after_them(run, model):
    text = completion(model, "abc")
    _, out, err = run("--stop", "☃", "--stop", text[2:4], "--temperature", "0", "abc")
    assert out == f"abc{text[: text.index(text[2:4])]}\n"
    assert "(stop)" in err


def test_chat_applies_the_template_and_shows_the_answer_only(run, model):
    _, out, err = run("ab", "--chat", "--system", "xy", "--temperature", "0")
    rendered = "<bos>s:xy<bos>u:ab<bos>a:"
    assert out == f"{completion(model, rendered)}\n"
    assert err.startswith("[13 prompt tokens")


def test_a_filled_blank_is_shown_within_its_text(capfd):
    """By the model in the box: the one here knows no blanks."""
    arguments = ["--temperature", "0", "--max-new-tokens", "4", "--random-seed", "1"]
    assert main(["--infill", "def f(x):\n", "    return y\n", *arguments]) == 0
    out = capfd.readouterr().out
    assert out.startswith("def f(x):\n")
    assert out.endswith("    return y\n\n")


def test_the_prompt_may_come_from_standard_input(run, monkeypatch, tmp_path):
    (tmp_path / "prompt").write_text("def f(\n")  # as echo and editors end it
    with open(tmp_path / "prompt", encoding="utf-8") as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert run("--temperature", "0")[1:2] == run("def f(", "--temperature", "0")[1:2]


def test_ctrl_c_ends_the_text_with_statistics(run, monkeypatch):
    import glmjax.decoding

    decode, left = glmjax.decoding.decode, iter(range(1))

    def interrupted(*args):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return decode(*args)

    monkeypatch.setattr(glmjax.decoding, "decode", interrupted)
    status, out, err = run("abc", "--temperature", "0")
    assert status == 130
    assert out.endswith("\n")
    assert "2 new (interrupted)" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["abc", "--model-path", "/nowhere"], "no config.json at /nowhere"),
        (["abc", "--temperature", "-1"], "temperature -1.0 is outside"),
        (["abc", "--infill", "a", "b"], "--infill takes the place of a prompt"),
        (["--infill", "a", "b"], "the vocabulary has no [MASK], [gMASK], <sop>, <eop>"),
        (["abc", "--max-new-tokens", "0"], "max_new_tokens 0 is outside"),
        (["abc", "--max-new-tokens", "62"], "3 prompt tokens and 62 new ones exceed the model's context of 64"),
        ([""], "the prompt has no tokens"),
        (["abc", "--system", "xy"], "--system is a message of a chat; give --chat too"),
        (["abc", "--tokenizer-path", "/nowhere"], "no tokenizer.json in /nowhere"),
        (["abc", "--stop", ""], "empty string"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_status_2(run, arguments, message):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("glmjax.generate: ")
    assert err.count("\n") == 1
    assert message in err


def test_bad_parameters_are_refused_before_weights_are_read(model, tmp_path, capfd):
    shutil.copy(model / "config.json", tmp_path)
    assert main(["abc", "--model-path", str(tmp_path), "--top-p", "2"]) == 2
    assert "top_p 2.0 is outside" in capfd.readouterr().err


def test_chat_needs_a_template(run, model, tmp_path):
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").unlink()
    status, _, err = run("abc", "--chat", "--model-path", str(tmp_path))
    assert (status, err) == (2, "glmjax.generate: this model has no chat template; give text or token ids\n")


def test_unknown_flags_exit_with_2(capfd):
    with pytest.raises(SystemExit, match="2"):
        main(["abc", "--temprature", "0"])
    assert "--temperature" in capfd.readouterr().err  # what was meant


def test_help_names_the_flags(capfd):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    out = capfd.readouterr().out
    for flag in ("--model-path", "--tokenizer-path", "--load-format", "--random-seed", "--max-new-tokens", "PROMPT"):
        assert flag in out


def test_as_a_command(model, tmp_path):
    """With pipes at both ends; programs are kept for the next start."""
    variables = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    variables |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    found = subprocess.run(
        [sys.executable, "-m", "glmjax.generate", "--model-path", model, "--max-new-tokens", "3", "--temperature=0"],
        input="abc\n",
        capture_output=True,
        text=True,
        env=variables,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout == f"abc{completion(model, 'abc', max_new_tokens=3, ignore_eos=False)}\n"
    assert found.stderr.startswith("[3 prompt tokens, 3 new (length)")
    assert found.stderr.count("\n") == 1
    assert list((tmp_path / "glmjax").glob("jit_decode-*"))
