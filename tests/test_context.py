"""A compressed context: questions do not change it, copies and files are the same one, turns are the template's."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from conftest import CHAT_TEMPLATE, build_byte_tokenizer, build_tiny_model
from oracles import llm_of, random_heads, speak, tokens
from safetensors.torch import load_file, save_file

from locret import chat
from locret.config import CacheConfig
from locret.context import Context
from locret.engine import LLM
from locret.errors import ConfigError, ContextError

SMALL = dict(budget=48, chunk_size=16)
TOKENIZER = build_byte_tokenizer()
DOCUMENT = "It rained for nine days. The code is 4711. Nobody knew why. " * 3
METHODS = ["locret", "knorm", "snapkv", "recency", "random", "full"]


def talker(method="locret", family="llama", **options):
    """A model that writes letters only, so that its text is its tokens."""
    return llm_of(speak(build_tiny_model(family)), method, **(SMALL | options))


def state(context):
    units = [[t.clone() for t in layer.units()] for layer in context._reader.cache.layers]
    return units, context.ids, context.seen, context.held, list(context._pending), context._lead


def same(a, b):
    assert all(torch.equal(x, y) for la, lb in zip(a[0], b[0], strict=True) for x, y in zip(la, lb, strict=True))
    assert torch.equal(a[1], b[1])
    assert a[2:] == b[2:]


# ---------------------------------------------------------------------- ask, fork, save, load


@pytest.mark.parametrize("method", METHODS)
def test_asking_leaves_the_context_unchanged(method):
    context = talker(method).compress(DOCUMENT)
    before = state(context)
    first = context.ask("What is the code?", max_new_tokens=12)
    same(before, state(context))
    context.ask("x" * 60, max_new_tokens=20)
    list(context.stream("Who knew?", max_new_tokens=5))
    same(before, state(context))
    assert context.ask("What is the code?", max_new_tokens=12).tokens == first.tokens


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("talked", [False, True], ids=["fresh", "mid-conversation"])
def test_a_fork_and_a_file_answer_as_the_context_does(tmp_path, method, talked, positions):
    """Also after a turn that ended by length, whose last token is chosen but not read yet."""
    llm = talker(method, positions=positions)
    context = llm.compress(DOCUMENT)
    if talked:
        context.chat("hello", max_new_tokens=9)
        assert context._pending
    context.save(tmp_path / "c")
    loaded = Context.load(tmp_path / "c", llm)
    same(state(context), state(loaded))
    assert loaded.plan == context.plan
    for options in (dict(), dict(temperature=0.9, seed=3), dict(repetition_penalty=1.5)):
        want = context.ask("What is the code?", max_new_tokens=25, **options)
        for other in (context.fork(), loaded, Context.load(tmp_path / "c", llm)):
            assert other.ask("What is the code?", max_new_tokens=25, **options).tokens == want.tokens
    a, b, c = context.fork(), context.fork(), loaded
    for turn in ("first", "second one", "third " * 9):
        replies = [x.chat(turn, max_new_tokens=8).tokens for x in (a, b, c)]
        assert replies[0] == replies[1] == replies[2]
    same(state(a), state(c))


@pytest.mark.parametrize("family", ["gemma3", "smollm3", "phi3-longrope"])
def test_a_file_keeps_windows_and_layers_without_positions(tmp_path, family):
    llm = llm_of(family, "knorm", **SMALL)
    context = llm.compress(DOCUMENT)
    context.save(tmp_path / "c")
    want = context.ask("What?", max_new_tokens=20).tokens
    assert Context.load(tmp_path / "c", llm).ask("What?", max_new_tokens=20).tokens == want


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_a_file_keeps_the_frequencies_that_the_document_chose(tmp_path, positions):
    """LongRoPE's switch lies at 64 tokens: the document is shorter, what is read when it is saved is longer."""
    llm = llm_of("phi3-longrope", "knorm", budget=200, chunk_size=16, positions=positions)
    context = llm.compress(list(range(5, 45)))
    context.append(list(range(50, 90)))
    context.save(tmp_path / "c")
    twin = Context.load(tmp_path / "c", llm)
    assert twin._reader.rope.prompt_len == context._reader.rope.prompt_len
    (one, other) = (x._reader.rope.angles(0).cos[:100] for x in (context, twin))
    assert torch.equal(one, other)


def test_a_context_of_another_dtype_is_refused(saved):
    refused(saved[1], llm_of(build_tiny_model("llama").double(), "locret", **SMALL), "dtype")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_turn_that_is_interrupted_while_it_is_read_is_never_answered_from(monkeypatch, error):
    """Some layers may hold its units and others not; a fork from before does not care."""
    context = talker().compress(DOCUMENT)
    twin, asked = context.fork(), context.ask("What is the code?", max_new_tokens=6).tokens

    def broken(*args, **options):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(context._reader, "_forward", broken)
        with pytest.raises(error):
            context.chat("What is the code?", max_new_tokens=6)
    for use in (context.fork, lambda: context.ask("Who?"), lambda: context.append("more"), lambda: context.save("x")):
        with pytest.raises(ContextError, match="interrupted"):
            use()
    assert twin.ask("What is the code?", max_new_tokens=6).tokens == asked


def test_an_answer_that_is_interrupted_in_a_step_is_never_gone_on_from(monkeypatch):
    context = talker().compress(DOCUMENT)
    stream = context.reply("What is the code?", max_new_tokens=6)
    next(stream)

    def broken(tokens):
        raise KeyboardInterrupt

    monkeypatch.setattr(context._reader, "step", broken)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    with pytest.raises(ContextError, match="interrupted"):
        context.chat("And?")


@pytest.mark.parametrize("message", [[99_999_999], [-1], [5, "six"], [True], None, [{"role": "user"}], "\ud800"])
def test_what_cannot_be_read_is_refused_and_changes_nothing(message):
    context = talker().compress(DOCUMENT)
    before, asked = state(context), context.ask("What is the code?", max_new_tokens=6).tokens
    with pytest.raises(ConfigError):
        context.chat(message, max_new_tokens=6)
    same(before, state(context))
    assert context.ask("What is the code?", max_new_tokens=6).tokens == asked
    for use in (context.llm.compress, context.llm.generate):
        with pytest.raises(ConfigError):
            use(message)


def test_one_piece_to_protect_may_be_a_string():
    masks = [chat.protected_mask(TOKENIZER, DOCUMENT, pieces) for pieces in ("4711", ["4711"])]
    assert torch.equal(*masks)


@pytest.mark.parametrize("template", ["{{ messages[0].content + 1 }}", "{{ raise_exception('no') }}", "{% if %}"])
def test_messages_that_the_template_does_not_take_are_an_error_of_ours(template):
    tokenizer = build_byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match="template does not take"):
        chat.render(tokenizer, [{"role": "user", "content": "hello"}])


def test_forks_go_their_own_ways():
    context = talker().compress(DOCUMENT)
    twin = context.fork()
    before = state(context)
    twin.chat("something else", max_new_tokens=10)
    twin.append("more and more text " * 5)
    same(before, state(context))
    after = state(twin)
    context.chat("and now this", max_new_tokens=10)
    same(after, state(twin))


def test_a_file_read_by_a_model_loaded_again_answers_the_same(tmp_path):
    context = talker().compress(DOCUMENT)
    context.save(tmp_path / "c")
    want = context.ask("What?", max_new_tokens=12).tokens
    assert Context.load(tmp_path / "c", talker()).ask("What?", max_new_tokens=12).tokens == want


def test_the_file_is_as_small_as_what_it_holds(tmp_path):
    llm = talker()
    for repeats in (1, 20):
        llm.compress(DOCUMENT * repeats).save(tmp_path / str(repeats))
    grown = (tmp_path / "20").stat().st_size - (tmp_path / "1").stat().st_size
    assert grown <= 4 * 19 * len(DOCUMENT) + 64  # the ids of what was read, 4 bytes each, and no more


# ---------------------------------------------------------------------- files that are not ours


@pytest.fixture
def saved(tmp_path):
    llm = talker()
    context = llm.compress(DOCUMENT)
    context.save(tmp_path / "c")
    return llm, tmp_path / "c"


def refused(path, llm, *words):
    with pytest.raises(ContextError) as error:
        Context.load(path, llm)
    assert str(path) in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("part", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(saved, part):
    llm, path = saved
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    refused(path, llm, "truncated")


def test_a_broken_file_is_refused(saved):
    llm, path = saved
    data = path.read_bytes()
    for broken in (b"hello", b"\xff" * 400, data[:8] + b"\x00" * (len(data) - 8), b"\xff" * 8 + data[8:], data + b"x"):
        path.write_bytes(broken)
        refused(path, llm, "broken")


def test_a_missing_file_is_refused_with_how_to_make_one(saved, tmp_path):
    refused(tmp_path / "nothing", saved[0], "locret compress")
    refused(tmp_path, saved[0])  # a folder


def test_another_safetensors_file_is_refused(saved):
    llm, path = saved
    save_file({"x": torch.zeros(3)}, path)
    refused(path, llm, "not a saved context")
    save_file({"x": torch.zeros(3)}, path, metadata={"locret": json.dumps({"format": "locret-context-99"})})
    refused(path, llm, "not a saved context of this version")


def metadata(path):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_a_file_without_one_of_its_tensors_is_refused(saved):
    llm, path = saved
    tensors, notes = load_file(path), metadata(path)
    for name in ("0.k", "1.score", "1.protected", "ids"):
        save_file({k: v for k, v in tensors.items() if k != name}, path, metadata=notes)
        refused(path, llm)


def test_a_file_with_tensors_of_other_shapes_is_refused(saved):
    llm, path = saved
    tensors, notes = load_file(path), metadata(path)
    changes = {"0.k": tensors["0.k"][:, :, :5].clone(), "1.v": tensors["1.v"][..., :3].clone(),
               "0.position": tensors["0.position"].repeat(1, 1, 9)}  # fmt: skip
    for name, other in changes.items():
        save_file(tensors | {name: other}, path, metadata=notes)
        refused(path, llm)


def test_another_model_heads_or_method_are_refused_by_name(saved):
    llm, path = saved
    model = llm.backbone.model
    refused(path, llm_of(speak(build_tiny_model("llama", seed=5)), "locret", **SMALL), "another model")
    refused(path, llm_of("qwen2", "locret", **SMALL), "another fingerprint", "Qwen2ForCausalLM")
    refused(path, llm_of(model, "knorm", **SMALL), "another method", "locret", "knorm")
    other = LLM.build(llm.backbone, heads=random_heads(llm.backbone, seed=9), config=CacheConfig(**SMALL))
    refused(path, other, "other heads")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_a_model_trained_a_little_further_is_another_model(saved, name):
    llm, path = saved
    model = llm.backbone.model
    with torch.no_grad():
        model.get_parameter(name).mul_(1.05)
    refused(path, llm_of(model, "locret", **SMALL), "another model")


# ---------------------------------------------------------------------- a full disk


@pytest.mark.parametrize("stage", ["write", "fsync", "rename"])
def test_a_full_disk_leaves_the_old_file_whole(saved, monkeypatch, stage):
    llm, path = saved
    before = path.read_bytes()

    def full(*args, **options):
        if stage == "write":
            Path(args[1]).write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    context = llm.compress("another document, about something else")
    where = {"write": "locret.context.save_file", "fsync": "os.fsync", "rename": "os.replace"}[stage]
    with monkeypatch.context() as patch:
        patch.setattr(where, full)
        with pytest.raises(ContextError, match="No space left"):
            context.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file stays behind
    Context.load(path, llm)
    context.save(path)  # and once there is room again, it is written
    assert Context.load(path, llm).seen == context.seen


# ---------------------------------------------------------------------- the template's ids


def template_ids(messages):
    return TOKENIZER(chat.render(TOKENIZER, messages), add_special_tokens=False).input_ids


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_a_document_and_a_question_give_the_ids_of_one_user_turn():
    context = talker().compress(DOCUMENT)
    turn = context.fork()
    out = turn.chat("What is the code?", max_new_tokens=5)
    want = template_ids([user(DOCUMENT + chat.JOIN + "What is the code?")])
    assert turn.ids.tolist() == want + out.tokens[:-1]
    assert out.stats.prompt_tokens == len(want)
    assert turn._pending == out.tokens[-1:]


@pytest.mark.parametrize("method", ["full", "locret"])
def test_with_room_for_all_asking_equals_generating_the_whole_turn(method):
    llm = talker(method, budget=900)
    context = llm.compress(DOCUMENT)
    for question in ("What is the code?", "Who knew why it rained?"):
        want = llm.generate(DOCUMENT + chat.JOIN + question, max_new_tokens=20)
        assert context.ask(question, max_new_tokens=20).tokens == want.tokens


def test_turns_of_a_conversation_give_the_ids_that_the_template_gives():
    context = talker().compress(DOCUMENT)
    messages = [user(DOCUMENT + chat.JOIN + "first?")]
    for i, question in enumerate(["first?", "second?", "third?"]):
        if i:
            messages.append(user(question))
        out = context.chat(question, max_new_tokens=6, stop="q" if i == 1 else ())
        answer = "".join(chr(t) for t in TOKENIZER.decode(out.tokens).encode())
        assert (context.ids.tolist() + context._pending) == template_ids(messages) + out.tokens
        messages.append(assistant(answer))


def test_a_turn_that_the_model_ended_gives_the_ids_that_the_template_gives(monkeypatch):
    import locret.decode

    script = [*TOKENIZER("an answer").input_ids, 2]

    class Scripted:
        def __init__(self, *args):
            self.at = -1

        def __call__(self, ids, logits):
            self.at += 1
            return torch.tensor([script[self.at]])

    monkeypatch.setattr(locret.decode, "Sampler", Scripted)
    context = talker().open()
    for count in (1, 2, 3):
        assert context.chat("hi", max_new_tokens=30).text == "an answer"
        assert context._pending == []
        turns = [user("hi"), assistant("an answer")] * count
        assert context.ids.tolist() == template_ids(turns[:-1]) + script[:-1]


def test_messages_are_compressed_up_to_the_next_user_turn():
    earlier = [{"role": "system", "content": "be brief"}, user("hello"), assistant("hi there")]
    turn = talker().compress(earlier)
    out = turn.chat("so?", max_new_tokens=4)
    assert turn.ids.tolist() == template_ids([*earlier, user("so?")]) + out.tokens[:-1]


def test_a_template_that_changes_the_text_is_refused_for_documents_only():
    tokenizer = build_byte_tokenizer(CHAT_TEMPLATE.replace("{{ message['content'] }}", "{{ message['content'][:2] }}"))
    llm = llm_of(build_tiny_model("llama"), "knorm", tokenizer=tokenizer, **SMALL)
    with pytest.raises(ConfigError, match="template changes or drops"):
        llm.compress(DOCUMENT)
    llm.generate([user("hello")], max_new_tokens=2)


def test_token_ids_are_read_as_they_are_and_need_no_tokenizer():
    llm = llm_of(build_tiny_model("llama"), "knorm", tokenizer=None, **SMALL)
    ids = tokens(100)[0].tolist()
    context = llm.compress(ids)
    assert context.ids.tolist() == ids
    assert len(context.ask([9, 10], max_new_tokens=3).tokens) <= 3
    with pytest.raises(ConfigError, match="without a tokenizer"):
        context.ask("text")


# ---------------------------------------------------------------------- appending


@pytest.mark.parametrize("method", ["locret", "snapkv", "recency"])
def test_text_without_end_stays_in_the_budget_and_in_the_same_bytes(method):
    context = talker(method).open()
    sizes = set()
    for i in range(60):
        context.append(f"event {i} happened. " * (1 + i % 5))
        assert context.held <= 48
        sizes.add((context.kv_bytes, context._reader.cache.workspace_bytes))
    assert context.held == 48
    assert len(sizes) == 1
    assert context.seen == len(context.ids) > 2000
    assert len(context.ask("What?", max_new_tokens=5).tokens) == 5


def test_appended_pieces_equal_one_document_when_the_budget_holds_all():
    llm = talker("knorm", budget=900)
    whole = llm.compress(DOCUMENT)
    pieces = llm.open()
    pieces.append(DOCUMENT[:50])
    context = llm.compress(DOCUMENT[:50])
    for at in range(50, len(DOCUMENT), 40):
        context.append(TOKENIZER(DOCUMENT[at : at + 40]).input_ids)
    assert context.ids.tolist() == whole.ids.tolist()
    assert context.ask("What?", max_new_tokens=10).tokens == whole.ask("What?", max_new_tokens=10).tokens


def test_after_an_append_the_newest_units_are_still_there():
    context = talker("knorm").open()
    for _ in range(5):
        context.append("some text that goes on and on. ")
        for layer in context.kept():
            newest = list(range(context.seen - context.plan.num_stabilizers, context.seen))
            if context.held == 48:
                assert all(head[-len(newest) :] == newest for head in layer.tolist())


@pytest.mark.parametrize("text", ["", "  \n"])
def test_nothing_to_read_is_an_error(text):
    llm = talker()
    with pytest.raises(ConfigError):
        llm.compress(text)
    context = llm.compress(DOCUMENT)
    for call in (context.append, context.ask, context.chat):
        with pytest.raises(ConfigError):
            call(text)


@pytest.mark.parametrize("empty", [[], ()])
def test_no_ids_to_read_is_an_error(empty):
    context = talker().compress(DOCUMENT)
    for call in (context.append, context.ask):
        with pytest.raises(ConfigError):
            call(list(empty))


# ---------------------------------------------------------------------- what is kept


def test_kept_positions_are_ascending_and_hold_sinks_and_protected_text():
    context = talker().compress(DOCUMENT, protect=["4711"])
    begin = 2  # after <bos> and <|user|>
    spans = [begin + i for i in range(len(DOCUMENT)) if any(i - j >= 0 and DOCUMENT[i - j :].startswith("4711")
             for j in range(4))]  # fmt: skip
    assert len(spans) == 12
    for _ in range(3):
        kept = context.kept()
        assert [tuple(layer.shape) for layer in kept] == [(2, context.held)] * 2
        for layer in kept:
            assert (layer.diff(dim=-1) > 0).all()
            for head in layer.tolist():
                assert set(spans) | {0, 1, 2, 3} <= set(head)
        context.chat("What is the code?", max_new_tokens=30)
        context.append("more text " * 20)


def test_a_document_of_which_most_is_protected_can_be_asked():
    """Compression accepted these options, so a question must not fail on them."""
    llm = talker("knorm", budget=40, num_stabilizers=0, local_window=0, decode_interval=1, num_sinks=0)
    context = llm.compress("y" * 60 + "P" * 36 + "z" * 30, protect=["P" * 36])
    out = context.ask("who?", max_new_tokens=5)
    assert len(out.tokens) == 5


def test_protecting_text_that_is_not_there_is_an_error():
    with pytest.raises(ConfigError, match="does not occur"):
        talker().compress(DOCUMENT, protect=["absent"])


def test_a_share_of_the_prompt_is_a_share_of_the_document():
    context = talker("knorm", budget="25%").compress("x" * 398)
    assert context.plan.budget == context.held == 100
    with pytest.raises(ConfigError, match="unknown length"):
        talker("knorm", budget="25%").open()


def test_leaving_a_reply_early_keeps_what_was_said():
    context = talker().compress(DOCUMENT)
    reply = context.reply("go on", max_new_tokens=30)
    for _ in range(4):
        next(reply)
    reply.close()
    said = reply.output.tokens
    assert 4 <= len(said) < 30
    assert context.ids.tolist()[-len(said) + 1 :] + context._pending == said
    assert context.seen == len(context.ids)
    context.chat("and?", max_new_tokens=3)


def test_unknown_options_are_refused_with_the_nearest_name():
    context = talker().compress(DOCUMENT)
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        context.ask("x", temprature=1)
