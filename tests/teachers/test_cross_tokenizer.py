"""The teacher with another tokenizer: events of both vocabularies, shared boundaries, and runs with two tokenizers."""

import json
import logging
from dataclasses import replace
from io import StringIO

import pytest
import torch
from fakes import tiny
from folders import described, jsonl, llama, write
from loop import arguments
from projected import DIVERGENCES
from rich.console import Console
from rows_of_text import byte_level, sentencepiece, wordpiece

from understudy.batch import Batch, Example
from understudy.data.retokenize import Retokenizer
from understudy.data.token_bytes import TokenBytes
from understudy.data.tokenize import TextEncoder
from understudy.divergences import ForwardKL, JensenShannon, ReverseKL, TotalVariation
from understudy.generation.stop_tokens import stop_ids
from understudy.methods.kd import KD
from understudy.models.fingerprint import tokenizer_fingerprint
from understudy.models.forward import score, score_no_grad
from understudy.recipe import RecipeError, load
from understudy.run.arguments import training_arguments
from understudy.run.build import build
from understudy.run.distill import distill
from understudy.run.prepare import prepare
from understudy.scores import divergence_metrics
from understudy.teachers.cross_tokenizer import CrossTokenizerTeacher
from understudy.teachers.local import LocalTeacher
from understudy.training.trainer import StudentTrainer

MERGEABLE = [*(d for d in DIVERGENCES if d.temperature == 1.0), ReverseKL()]
BPE, SENTENCEPIECE = byte_level(), sentencepiece()
TEXTS = [("Who plays?", " the star learns 🎉 in 東京"), ("And", " two parts"), ("Question: ", "")]


def model_of(tokenizer, seed, **options):
    return tiny("llama", vocabulary=len(tokenizer), seed=seed, **options)


def batch_of(tokenizer, texts=TEXTS):
    encode = TextEncoder(tokenizer)
    responses = [[*ids, tokenizer.eos_token_id] for ids in encode.encode_responses([text for _, text in texts])]
    prompts = encode.encode([prompt for prompt, _ in texts])
    return Batch.from_examples([Example(*ids) for ids in zip(prompts, responses, strict=True)], 0)


def cross(tokenizer=SENTENCEPIECE, student=BPE, model=None, **options):
    model = model_of(tokenizer, seed=2, width=24) if model is None else model
    teacher = CrossTokenizerTeacher(model, tokenizer=tokenizer, **options)
    teacher.setup(student)
    return teacher


def loss_and_gradients(student, batch, teacher, divergence, **options):
    weights = torch.linspace(0.5, 2, len(batch.tokens), dtype=torch.float64)
    student.zero_grad()
    values = []

    def loss(q):
        values.append(teacher.divergence_to(q, divergence))
        return (weights * values[0]).sum()

    score(student, batch, loss, weights=weights, **options).backward()
    return values[0].detach(), [p.grad for p in student.parameters() if p.grad is not None]


@pytest.mark.parametrize("events", ["first_piece", "shared"])
@pytest.mark.parametrize("divergence", MERGEABLE, ids=repr)
def test_with_the_student_s_own_tokenizer_it_is_the_local_teacher(divergence, events):
    """Exactly, with value and gradient, also where the model computes its own logits."""
    batch, model = batch_of(BPE), model_of(BPE, seed=2).double()
    student = model_of(BPE, seed=1).double()
    teacher = cross(byte_level(), model=model, events=events, spans=events == "first_piece").score(batch)
    assert teacher.distribution.known.all()
    values, gradients = loss_and_gradients(student, batch, LocalTeacher(model).score(batch), divergence)
    for fused in (True, False):
        same, same_gradients = loss_and_gradients(student, batch, teacher, divergence, fused=fused)
        torch.testing.assert_close(same, values, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(same_gradients, gradients, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("student_tokenizer", "tokenizer"),
    [(BPE, SENTENCEPIECE), (SENTENCEPIECE, BPE), (BPE, wordpiece())],
    ids=["bpe from sentencepiece", "sentencepiece from bpe", "bpe from wordpiece"],
)
def test_two_vocabularies_are_compared_over_the_tokens_that_both_have(student_tokenizer, tokenizer):
    """Found again by a loop over all tokens: events are strings, and rows are where the texts so far are equal."""
    texts = [("Who plays?", " the star learns two parts"), ("And", " two parts")]
    batch = batch_of(student_tokenizer, texts)
    student, model = model_of(student_tokenizer, seed=1).double(), model_of(tokenizer, seed=2, width=24).double()
    q = score_no_grad(student, batch)
    teacher = cross(tokenizer, student_tokenizer, model, events="shared").score(batch)
    own = batch_of(tokenizer, texts)
    prefix = TextEncoder(tokenizer).prefix
    own = Batch.from_examples([replace(e, prompt=[*prefix, *e.prompt]) for e in own.examples], 0)
    log_p = score_no_grad(model, own).log_probs
    mine, theirs = (TokenBytes.of(t) for t in (student_tokenizer, tokenizer))

    def positions(read, tokens):
        """The rows of a batch by sequence and bytes of the response so far."""
        responses = [example.response for example in read.examples]
        places = [(n, ids[:end]) for n, ids in enumerate(responses) for end in range(len(ids))]
        return {(n, b"".join(tokens.pieces.get(i, b"?") for i in ids)): row for row, (n, ids) in enumerate(places)}

    rows, other_rows = positions(batch, mine), positions(own, theirs)
    ends = (student_tokenizer.eos_token_id, tokenizer.eos_token_id)
    other_ids = {piece: i for i, piece in reversed(theirs.pieces.items()) if i not in theirs.ambiguous}
    pairs = [(i, other_ids[x]) for x, i in {x: i for i, x in reversed(mine.pieces.items())}.items() if x in other_ids]
    pairs = [pair for pair in pairs if not set(pair) & set(ends)] + [ends]
    known = torch.zeros(len(batch.tokens), dtype=torch.bool)
    for divergence in (JensenShannon(0.3), ForwardKL(), TotalVariation()):
        values = teacher.divergence_to(q, divergence)
        for key, row in rows.items():
            if key not in other_rows:
                assert values[row] == 0
                continue
            known[row] = True
            p_row, q_row = log_p[other_rows[key]].exp(), q.log_probs[row].exp()
            events = [[x[pair[side]] for pair in pairs] for side, x in ((1, p_row), (0, q_row))]
            p_events, q_events = (torch.stack([*e, 1 - sum(e)]).log()[None] for e in events)
            torch.testing.assert_close(values[row], divergence(p_events, q_events)[0], rtol=1e-6, atol=1e-9)
            if not isinstance(divergence, ForwardKL):
                every = [*pairs, *((i, None) for i in range(len(q_row)) if i not in {a for a, _ in pairs})]
                every += [(None, j) for j in range(len(p_row)) if j not in {b for _, b in pairs}]
                p_all = torch.stack([p_row.new_zeros(()) if j is None else p_row[j] for _, j in every])
                q_all = torch.stack([q_row.new_zeros(()) if i is None else q_row[i] for i, _ in every])
                assert values[row] <= divergence(p_all.log()[None], q_all.log()[None])[0] + 1e-9, "a lower bound"
    assert torch.equal(teacher.distribution.known, known)
    assert 0.2 < known.double().mean() < 1
    assert divergence_metrics(teacher, q)["shared_boundaries"].tolist() == known.double().tolist()


def probability(log_probs, rows, tokens):
    """The product of the probabilities of tokens at their rows."""
    return torch.stack([log_probs[row, token] for row, token in zip(rows, tokens, strict=True)]).sum().exp()


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), JensenShannon(0.3), TotalVariation()], ids=repr)
@pytest.mark.parametrize("events", ["first_piece", "shared"])
@pytest.mark.parametrize(
    ("mine", "theirs"),
    [(BPE, SENTENCEPIECE), (SENTENCEPIECE, BPE), (BPE, wordpiece())],
    ids=["bpe from sentencepiece", "sentencepiece from bpe", "bpe from wordpiece"],
)
def test_a_span_is_an_event_with_the_product_of_its_tokens_probabilities(mine, theirs, events, divergence):
    """Enumerated: the events at a row as a list of both models' probabilities, out of which the span's is taken."""
    batch = batch_of(mine, [*TEXTS, ("Who", " the parts of the stars in cafés")])
    student, model = model_of(mine, seed=1).double(), model_of(theirs, seed=2, width=24).double()
    teacher = cross(theirs, mine, model, events=events, spans=True)
    scores = teacher.score(batch)
    plain = cross(theirs, mine, model, events=events).score(batch)
    parts = Retokenizer(mine, theirs).retokenize(batch.examples)
    log_p = score_no_grad(model, Batch.from_examples([Example(x.prompt, x.response) for x in parts], 0)).log_probs
    weights = torch.linspace(0.5, 2, len(batch.tokens), dtype=torch.float64)
    expected_sum, count = [], 0

    def expected(q):
        nonlocal count
        values = list(plain.divergence_to(q, divergence))
        log_q, table = q.log_probs, scores.distribution.events
        first = other_first = count = 0
        for example, part in zip(batch.examples, parts, strict=True):
            for span in part.spans:
                rows, others = [first + i for i in span.tokens], [other_first + i for i in span.others]
                tokens, other_tokens = (
                    [r[i] for i in of] for r, of in ((example.response, span.tokens), (part.response, span.others))
                )
                assert len(tokens) > 1 or len(other_tokens) > 1
                p_span, q_span = probability(log_p, others, other_tokens), probability(log_q, rows, tokens)
                p, q_events = table.of_teacher(log_p[others[:1]]).exp()[0], table.of_student(log_q[rows[:1]]).exp()[0]
                a, b = (
                    torch.zeros(table.count).double().index_fill(0, i, 1)
                    for i in (table.teacher[other_tokens[0]], table.student[tokens[0]])
                )
                after = [
                    torch.cat([x - of * y, y[None]]).log()[None] for x, y, of in ((p, p_span, a), (q_events, q_span, b))
                ]
                values[rows[0]] = divergence(*after)[0]
                count += 1
            first, other_first = first + len(example.response), other_first + len(part.response)
        expected_sum.append(torch.stack(values))
        return (weights * expected_sum[-1]).sum()

    student.zero_grad()
    score(student, batch, expected, fused=False).backward()
    assert count > 3
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    for fused in (True, False):
        values, same = loss_and_gradients(student, batch, scores, divergence, fused=fused)
        torch.testing.assert_close(values, expected_sum[0].detach(), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(same, gradients, rtol=1e-5, atol=1e-7)
    assert (
        scores.divergence_to(score_no_grad(student, batch), divergence)
        != plain.divergence_to(score_no_grad(student, batch), divergence)
    ).sum() <= count


@pytest.mark.parametrize("divergence", MERGEABLE, ids=repr)
@pytest.mark.parametrize("fused", [True, False])
def test_positions_without_a_shared_boundary_have_no_value_and_no_gradient(divergence, fused):
    batch, student = batch_of(BPE), model_of(BPE, seed=1).double()
    scores = cross().score(batch)
    none = replace(scores.distribution, known=torch.zeros(len(batch.tokens), dtype=torch.bool))
    values, gradients = loss_and_gradients(student, batch, replace(scores, distribution=none), divergence, fused=fused)
    assert values.abs().max() == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients)


def test_tokens_without_a_shared_boundary_count_in_the_mean(tmp_path):
    """The loss is the mean over all tokens, so it is the same however a step is split into micro-batches."""
    examples = list(batch_of(BPE).examples) * 2
    losses = []
    for size in (6, 2):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 6 // size, "max_steps": 1}
        run = trainer(tmp_path, KD(), model_of(BPE, seed=1), cross(), examples, **options)
        run.train()
        losses.append(run.state.log_history[0])
    batch = Batch.from_examples(examples, 0)
    values = cross().score(batch).divergence_to(score_no_grad(model_of(BPE, seed=1), batch), ForwardKL())
    assert [line["loss"] for line in losses] == pytest.approx([values.mean().item()] * 2, rel=1e-4)
    share = cross().score(batch).distribution.known.double().mean().item()
    assert losses[0]["shared_boundaries"] == pytest.approx(share)


def trainer(folder, method, student, teacher, examples, **options):
    return StudentTrainer(
        student, teacher, method, processing_class=BPE, args=arguments(folder, **options), train_dataset=examples
    )


def test_prompts_and_responses_beyond_the_teacher_s_context_window_are_cut(caplog):
    """The window of `tiny` is 64 tokens."""
    texts = [(" part" * 40, " the star" * 3), ("And", " two parts" * 40)]
    batch = batch_of(BPE, texts)
    with caplog.at_level(logging.WARNING):
        known = cross().score(batch).distribution.known
    first, second = known.split(batch.lengths.tolist())
    assert first[0], "the prompt lost its beginning"
    assert second[:10].any()
    assert not second[-20:].any()
    assert [record.getMessage() for record in caplog.records if "context window of 64" in record.getMessage()]


def test_it_says_what_it_cannot_score():
    batch = batch_of(BPE)
    with pytest.raises(ValueError, match="call the teacher's setup"):
        CrossTokenizerTeacher(model_of(SENTENCEPIECE, 2), tokenizer=SENTENCEPIECE).score(batch)
    with pytest.raises(ValueError, match="give a tokenizer"):
        CrossTokenizerTeacher(model_of(SENTENCEPIECE, 2))
    with pytest.raises(ValueError, match="embeddings for 53 only"):
        cross(model=tiny("llama"))
    with pytest.raises(ValueError, match="events are first_piece, shared, first_byte, ranks, and not tokens"):
        cross(events="tokens")
    with pytest.raises(ValueError, match="ranks have none: leave out spans"):
        cross(events="ranks", spans=True)
    images = Batch.from_examples([replace(e, inputs={"pixel_values": [1.0]}) for e in batch.examples], 0)
    with pytest.raises(ValueError, match="reads text alone"):
        cross().score(images)


# Runs


@pytest.fixture
def home(tmp_path):
    shape = {"max_position_embeddings": 128, "num_hidden_layers": 1}
    llama(tmp_path / "student", tokenizer=BPE, vocab_size=len(BPE), **shape)
    llama(tmp_path / "teacher", seed=1, tokenizer=SENTENCEPIECE, vocab_size=len(SENTENCEPIECE), **shape)
    jsonl(tmp_path / "sums.jsonl", [{"prompt": prompt, "completion": text or "a"} for prompt, text in TEXTS * 2])
    return tmp_path


def recipe(home, **changes):
    blocks = {
        "student": {"model": str(home / "student")},
        "teacher": {"cross_tokenizer": {"model": str(home / "teacher")}},
        "data": {"dataset": str(home / "sums.jsonl"), "max_length": 64},
    }
    return load(write(home / "mine.yaml", described(home, **{**blocks, **changes})))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("kd", {"spans": True}),
        ({"gkd": {"on_policy": 1.0}}, {"events": "shared"}),
        ({"kd": {"divergence": "total_variation", "sft_weight": 0.25}}, {"events": "ranks"}),
    ],
    ids=["kd, spans", "gkd", "uld"],
)
def test_a_run_distils_a_teacher_with_another_tokenizer(method, options, home):
    console = Console(file=StringIO(), width=200)
    changes = {"rollout": {"generate": {"max_new_tokens": 8}}}
    changes |= {"teacher": {"cross_tokenizer": {"model": str(home / "teacher"), **options}}}
    summary = distill(recipe(home, method=method, **changes), console=console)
    assert summary["steps"] == 2
    lines = [json.loads(line) for line in (home / "run" / "metrics.jsonl").read_text().splitlines()]
    shares = [line["shared_boundaries"] for line in lines if "loss" in line]
    assert len(shares) == 2
    assert all(0 < share <= 1 for share in shares)
    assert 0 < summary["student_samples"]["after"]["shared_boundaries"] <= 1
    assert summary["teacher_parameters"] > 0
    inputs = json.loads((home / "run" / "inputs.json").read_text())
    names = inputs["inputs"].keys()
    assert {"the weights of the teacher", "the tokenizer", "the tokenizer of the teacher"} <= names, "for a resumed run"
    assert inputs["inputs"]["the tokenizer of the teacher"] == tokenizer_fingerprint(SENTENCEPIECE)


def test_the_teacher_s_end_tokens_do_not_end_the_student_s_responses(home):
    """They are ids of another vocabulary."""
    other = 7
    (home / "teacher" / "generation_config.json").write_text(json.dumps({"eos_token_id": other}))
    loaded = recipe(home, method={"gkd": {"on_policy": 1.0}}, rollout={"generate": {"max_new_tokens": 8}})
    run = build(loaded, training_arguments(loaded))
    assert run.teacher is not None
    assert run.teacher.local_model.generation_config.eos_token_id == other
    assert run.trainer.writers.student.sampling.stop_ids == tuple(stop_ids(BPE, run.trainer.model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "promptkd"}, "requires a teacher that provides full and model"),
        ({"method": {"kd": {"divergence": {"forward_kl": {"temperature": 2.0}}}}}, "this teacher provides top_k"),
        ({"method": "seqkd"}, "provides model"),
        ({"method": "kd", "student": {"layers": [0]}}, "line 1"),
        ({"method": "kd", "student": {"fresh": {"model_type": "llama"}}}, "add student.tokenizer"),
    ],
    ids=["its model is not provided", "softened", "its responses", "its layers", "no tokenizer"],
)
def test_what_needs_the_student_s_tokens_is_refused_when_the_run_is_built(changes, message, home):
    with pytest.raises(RecipeError, match=message):
        prepare(recipe(home, **changes))


def test_a_tokenizer_that_changes_the_text_is_refused_with_the_line_of_the_recipe(home):
    wordpiece(lowercase=True).save_pretrained(home / "teacher")
    with pytest.raises(RecipeError, match=r"mine.yaml, line 3: the tokenizer makes capital letters small"):
        prepare(recipe(home, method="kd"))
