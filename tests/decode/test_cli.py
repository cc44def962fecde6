"""The command line, run as a person would."""

from __future__ import annotations

import ast
import math
import re
import subprocess
import sys

import pytest

from engine import Decoder
from engine.cli import main
from engine.drafters.speculator import BUNDLED


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "engine", *arguments], capture_output=True, text=True, timeout=120)


def test_generate_streams_and_reports():
    result = run("generate", "def read_csv(path):", "--temperature", "0.8", "--top-k", "40", "--seed", "7", "--max-new-tokens", "20")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("def read_csv(path):") and len(result.stdout) > len("def read_csv(path):") + 10
    assert "tokens/s" in result.stderr and "of what this machine reads" in result.stderr and "seed 7" in result.stderr
    assert (
        run("generate", "def read_csv(path):", "--temperature", "0.8", "--top-k", "40", "--seed", "7", "--max-new-tokens", "20").stdout
        == result.stdout
    )


def test_several_sequences():
    result = run("generate", "import os", "class A", "--temperature", "1", "--num-return-sequences", "2", "--max-new-tokens", "5")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("--- prompt") == 4


def test_every_control_has_its_option(capsys):
    arguments = ["--min-new-tokens", "3", "--temperature", "1", "--top-k", "50", "--top-p", "0.9", "--min-p", "0.01"]
    arguments += ["--repetition-penalty", "1.1", "--presence-penalty", "-0.5", "--frequency-penalty", "0.5", "--logit-bias", "5=-inf"]
    arguments += ["--logit-bias", "6=2.5", "--suppress", "7", "--bad-word", "self", "--stop", "zzz", "--seed", "4", "--ignore-eos"]
    assert main(["generate", "import os\n", *arguments, "--max-new-tokens", "6", "--logprobs", "2"]) == 0
    stdout = capsys.readouterr().out
    expected = Decoder.bundled(cache_tokens=512).generate(
        "import os\n", min_new_tokens=3, temperature=1, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.1, presence_penalty=-0.5,
        frequency_penalty=0.5, logit_bias={5: -math.inf, 6: 2.5}, suppress_tokens=[7], bad_words=["self"], stop="zzz", seed=4,
        ignore_eos=True, max_new_tokens=6, logprobs=2,
    )[0]  # fmt: skip
    text, lines = stdout.split("--- logprobs of prompt 0, sequence 0: position, token, raw, processed; most likely, raw ---\n")
    assert text == f"import os\n{expected.text}\n"
    assert len(lines.splitlines()) == 6
    for i, line in enumerate(lines.splitlines()):
        first = f"{len(expected.prompt_token_ids) + i:>5}  {expected.token_ids[i]} "
        assert line.startswith(first) and f" {expected.logprobs[i]:.3f} " in line and f" {expected.processed_logprobs[i]:.3f} " in line
        assert all(f"{token} " in line and f" {logprob:.3f}" in line for token, logprob in expected.top_logprobs[i].items())


def test_beams(capsys):
    arguments = ["--num-beams", "4", "--length-penalty", "0.5", "--early-stopping", "never", "--no-repeat-ngram-size", "3"]
    assert main(["generate", "import os\n", *arguments, "--num-return-sequences", "2", "--max-new-tokens", "9"]) == 0
    outputs = Decoder.bundled(cache_tokens=1024).generate(
        "import os\n",
        num_beams=4,
        length_penalty=0.5,
        early_stopping="never",
        no_repeat_ngram_size=3,
        num_return_sequences=2,
        max_new_tokens=9,
    )
    expected = "".join(f"--- prompt 0, sequence {o.index} (score {o.score:.3f}) ---\nimport os\n{o.text}\n" for o in outputs)
    assert capsys.readouterr().out == expected + "\n"
    assert main(["generate", "import os\n", "--num-beams", "4", "--early-stopping", "sometimes"]) == 2
    assert "early_stopping is 'sometimes'; it must be True, False or 'never'" in capsys.readouterr().err


def test_structured_output_from_text_or_file(tmp_path, capsys):
    pytest.importorskip("llguidance")
    schema = '{"enum": ["left", "right"]}'
    file = tmp_path / "schema.json"
    file.write_text(schema)
    for prompt, *options, expected in (
        ("side = ", "--json-schema", schema, 'side = "(left|right)"\n'),
        ("side = ", "--json-schema", str(file), 'side = "(left|right)"\n'),
        ("n = ", "--regex", "[1-4]{3}", "n = [1-4]{3}\n"),
        ("n = ", "--grammar", 'start: "a" | "b"', "n = [ab]\n"),
    ):
        assert main(["generate", prompt, *options]) == 0
        assert re.fullmatch(expected, capsys.readouterr().out)


def test_the_demo_draws_twice_the_same_and_writes_json(capsys):
    pytest.importorskip("llguidance")
    assert main(["demo"]) == 0
    stdout = capsys.readouterr().out
    first, second = re.findall(r"--- (?:sampled: [^\n]*|the same once more[^\n]*) ---\n(.*?)\n(?=---|\nThe two)", stdout, re.DOTALL)
    assert first == second and len(first) > 60
    assert "The two samples are identical" in stdout
    value = ast.literal_eval(stdout.rsplit("json.loads gives ", 1)[1])
    assert list(value) == ["name", "kind", "arguments", "public"] and value["kind"] in ("function", "class", "constant")


def test_the_demo_shows_what_drafts_save(capsys):
    assert main(["demo"]) == 0
    shown = capsys.readouterr().out.split("| with drafts", 1)[1].split("--- JSON", 1)[0]
    text, report = shown.split("\nThe two are identical, tokens and log-probabilities; ")
    lines = text.splitlines()[1:]
    assert len(lines) > 8 and all(line[:56].rstrip() == line[59:] and line[56:58] == " |" for line in lines)
    plain, drafted = (re.search(rf"  {name} +\d+ tokens/s, (\d+) forwards for (\d+) tokens", report) for name in ("without", "with"))
    assert plain and drafted and plain[1] == plain[2] == drafted[2] == "60" and int(drafted[1]) <= 60


@pytest.mark.parametrize("draft", [["lookup"], ["suffix"], ["bundled"], ["lookup", "bundled"], [str(BUNDLED)], ["suffix", "lookup"]])
def test_drafts_write_the_same(draft: list[str], capsys):
    prompt, arguments = "x = [1, 2, 1, 2, 1, 2,", ["--temperature", "0.5", "--seed", "3", "--max-new-tokens", "24"]
    assert main(["generate", prompt, *arguments]) == 0
    plain = capsys.readouterr()
    assert "forwards" not in plain.err
    drafts = [word for name in draft for word in ("--draft", name)]
    assert main(["generate", prompt, *arguments, *drafts, "--num-assistant-tokens", "5"]) == 0
    drafted = capsys.readouterr()
    assert drafted.out == plain.out
    found = re.search(r"(\d+) forwards for (\d+) tokens \((\d+)% saved\); (\d+) of (\d+) drafted tokens accepted", drafted.err)
    assert found
    forwards, tokens, percent, accepted, count = map(int, found.groups())
    assert tokens == 24 and 0 < accepted <= count and forwards + accepted == tokens
    assert percent == round(100 * (tokens - forwards) / tokens)
    # With as many as pay, which is a matter of time.
    assert main(["generate", prompt, *arguments, *drafts]) == 0
    assert capsys.readouterr().out == plain.out


def test_info_names_every_backend():
    result = run("info", "--no-measure")
    assert result.returncode == 0, result.stderr
    assert "cpu: " in result.stdout and "reference: ready" in result.stdout and "cuda module: " in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "x", "--temperature", "-1"], "error: temperature is -1.0; it must be a finite number of at least 0"),
        (["generate", "x", "--model", "nowhere.pth"], "error: 'nowhere.pth' does not exist"),
        (["generate", ""], "error: prompt 0 is empty"),
    ],
)
def test_errors_are_one_line(arguments: list[str], words: str):
    result = run(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(words) and result.stderr.count("\n") == 1 and result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num-assistant-tokens", "64", "--draft", "lookup"], "error: num_assistant_tokens is 64; it must be an integer from 0 to 63"),
        (["--num-assistant-tokens", "3"], "error: num_assistant_tokens is 3, but this decoder has no drafter"),
        (["--draft", "nowhere"], "error: draft: 'nowhere' does not exist"),
        (["--draft", "lookup", "--num-beams", "2", "--num-assistant-tokens", "3"],
         "error: num_assistant_tokens is 3; it cannot be used with num_beams above 1"),
        (["--top-p", "0"], "error: top_p is 0.0; it must be a number above 0, at most 1"),
        (["--logit-bias", "5000=1"], "error: logit_bias holds 5000; the model's vocabulary has ids 0 to 4095"),
        (["--json-schema", "nowhere.json"], "error: json_schema is 'nowhere.json', which is not JSON"),
        (["--min-new-tokens", "9", "--max-new-tokens", "8"], "error: min_new_tokens is 9; it must be at most max_new_tokens, which is 8"),
    ],
)  # fmt: skip
def test_errors_of_the_controls(arguments: list[str], words: str, capsys):
    assert main(["generate", "x", *arguments]) == 2
    written = capsys.readouterr()
    assert written.err.startswith(words) and written.err.count("\n") == 1 and written.out == ""


def test_a_bias_that_is_none_is_a_usage_error(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "x", "--logit-bias", "5:1"])
    assert "argument --logit-bias: '5:1' is not of the form ID=BIAS, as in 198=-2.5" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} -m engine generate 'import os' --max-new-tokens 200 --ignore-eos | head -c 5"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert "error" not in result.stderr and "Traceback" not in result.stderr
