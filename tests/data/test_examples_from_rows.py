"""Examples know their rows; those of real files and of the documentation are what they should be."""

import doctest
import json
import logging
import re
import time
from pathlib import Path

import pytest
from rows_of_text import LONG, PAIR, STORY, write
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from understudy.data.examples import examples_from_rows, load_examples

ROOT = Path(__file__).parents[2]
SHARED = ROOT / ".." / "shared"


def test_examples_have_their_rows_and_work_in_a_data_loader(gpt2):
    loaded = examples_from_rows([PAIR, LONG, PAIR], gpt2)
    assert [example.row for example in loaded] == [0, 1, 2]
    assert loaded.has_responses
    [first, second] = DataLoader(loaded, batch_size=2, collate_fn=list)
    assert first == [loaded[0], loaded[1]]
    assert second == [loaded[2]]


def test_a_limit_takes_examples_from_the_beginning_and_reads_no_further(tmp_path, gpt2):
    path = write(tmp_path / "a.jsonl", PAIR, LONG, "broken")
    assert [row.prompt for row in load_examples(path, gpt2, limit=2).rows] == [PAIR["prompt"], LONG["prompt"]]
    assert len(examples_from_rows([{"text": STORY}], gpt2, max_length=60, limit=3)) == 3


def test_the_fingerprint_tells_datasets_apart(gpt2):
    fingerprint = examples_from_rows([PAIR, LONG], gpt2).fingerprint
    assert re.fullmatch("[0-9a-f]{16}", fingerprint)
    assert fingerprint == examples_from_rows([PAIR, LONG], gpt2).fingerprint
    moved = {"prompt": PAIR["prompt"] + PAIR["completion"][:2], "completion": PAIR["completion"][2:]}
    different = ([LONG, PAIR], [PAIR], [moved, LONG])
    assert fingerprint not in {examples_from_rows(rows, gpt2).fingerprint for rows in different}


def test_many_rows_are_fast(gpt2):
    rows = [{"prompt": f"What is {number} plus two?", "completion": f" {number + 2}"} for number in range(10_000)]
    began = time.process_time()
    assert len(examples_from_rows(rows, gpt2)) == 10_000
    assert time.process_time() - began < 5  # about one second


def shared(path: str) -> Path:
    if not (SHARED / path).exists():
        pytest.skip(f"{path} does not lie beside the repository")
    return SHARED / path


def test_dolly_s_own_prompts_are_our_alpaca_prompts(gpt2):
    path = shared("data/instructions/dolly__dev.jsonl")
    loaded = load_examples(path, gpt2, limit=200)
    prompts = [json.loads(line)["prompt"] for line in path.read_text().splitlines()[:200]]
    assert [row.prompt for row in loaded.rows] == prompts


def test_gsm8k_with_a_template(gpt2):
    path = shared("data/gsm8k/train.jsonl")
    loaded = load_examples(path, gpt2, template="Question: {question}\nAnswer:", max_length=1024, limit=200)
    assert loaded.has_responses
    assert all(re.search(r"#### \S+$", row.references[0]) for row in loaded.rows)


def test_tatoeba_with_several_references():
    path = shared("data/tatoeba-en-de/dev.jsonl.gz")
    tokenizer = AutoTokenizer.from_pretrained(shared("models/translation-en-de"))
    loaded = load_examples(path, tokenizer, template="<bos>{en}<de>", columns={"completion": "de"})
    assert len(loaded) > 1000
    assert loaded.cut_prompts == loaded.cut_responses == loaded.skipped == 0
    assert max(len(row.references) for row in loaded.rows) > 1
    assert {(example.prompt[0], example.prompt[-1], example.response[-1]) for example in loaded} == {(1, 3, 2)}


def test_tiny_stories_as_running_text():
    path = shared("data/tinystories/tiny_stories_944k.txt")
    tokenizer = AutoTokenizer.from_pretrained(shared("data/tinystories/TinyStories-656K"))
    began = time.perf_counter()
    loaded = load_examples(path, tokenizer, max_length=256)
    assert time.perf_counter() - began < 10  # about 1.5 seconds
    assert len(loaded) > 1000
    assert all(example.prompt[0] == tokenizer.bos_token_id for example in loaded)
    assert loaded[-1].response[-1] == tokenizer.eos_token_id


def test_the_examples_of_the_data_page_do_what_it_says(tmp_path, gpt2, chatml, monkeypatch, caplog):
    caplog.set_level(logging.ERROR)
    page = (ROOT / "docs" / "data.md").read_text()
    for name, content in re.findall(r"^```\w+ name=(\S+)\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE):
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    plain = re.sub(r"^```.*$", "", page, flags=re.MULTILINE)  # a fence would count as expected output
    names = {"tokenizer": gpt2, "chat_tokenizer": chatml}
    test = doctest.DocTestParser().get_doctest(plain, names, "data.md", "docs/data.md", 0)
    output: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    results = runner.run(test, out=output.append)
    assert results.attempted > 10
    assert results.failed == 0, "".join(output)


def test_every_row_of_the_table_of_formats_is_read_as_it_says(gpt2, chatml, caplog):
    caplog.set_level(logging.ERROR)
    page = (ROOT / "docs" / "data.md").read_text()
    lines = page.partition("<!-- formats -->\n")[2].partition("<!-- end of formats -->")[0].splitlines()[2:]
    assert len(lines) == 10
    for line in lines:
        _, _, example, prompt, response, _ = (cell.strip() for cell in line.split("|"))
        columns = json.loads(example.strip("`"))
        [chat] = examples_from_rows([columns], chatml, text_prompt=1).rows
        content = chat.prompt.partition("user\n")[2].partition("<|im_end|>")[0]
        if prompt.startswith(("template:", "as `messages`")):
            assert content == ("Q\n\nX" if "X" in prompt else "Q")
            assert chat.response == "A<|im_end|>"
        if "messages" not in example and "conversations" not in example and "role" not in example:
            [plain] = examples_from_rows([columns], gpt2, text_prompt=1).rows
            assert prompt.strip("`") != "Q" or plain.prompt == chat.prompt == "Q"
            assert ("Instruction:\nQ\n\n### Input:\nX" in plain.prompt) == ("Alpaca" in prompt)
            assert plain.response == {"`A`": "A", "none: a model generates it": ""}.get(response, " A")
