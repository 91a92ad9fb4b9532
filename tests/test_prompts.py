"""Prompts as the web UIs read them: weights in brackets, more than 77 tokens, clip-skip.

Expected values are written by hand or computed with the encoders themselves, a chunk at a time.
AUTOMATIC1111's own functions gave the same pieces, chunks and hidden states for 4,000 random
prompts; they are not part of the tests.
"""

import logging

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs diffusers (extra: diffusers)")
transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("clip", reason="needs clip-anytorch, which has CLIP's vocabulary")

import tiny_pipelines as tiny  # noqa: E402
from kdpp.checkpoints import pipelines  # noqa: E402
from kdpp.checkpoints.configs import write_tokenizer  # noqa: E402
from kdpp.checkpoints.prompts import chunks, sections, weighted  # noqa: E402

BEGIN, END, COMMA = 49406, 49407, 267
TEXT = "encoder_hidden_states"
MASK = "encoder_attention_mask"


# Reading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("a red boat", [("a red boat", 1.0)]),
        ("", []),
        ("a (red) boat", [("a ", 1.0), ("red", 1.1), (" boat", 1.0)]),
        ("((red))", [("red", 1.21)]),
        ("(red:1.3)", [("red", 1.3)]),
        ("(red: 1.3 )", [("red", 1.3)]),
        ("(red:.5)(boat:2.)", [("red", 0.5), ("boat", 2.0)]),
        ("(red:-1)", [("red", -1.0)]),
        ("[red]", [("red", 1 / 1.1)]),
        ("[(red)] boat", [("red boat", 1.0)]),
        ("(a (red:1.5) boat)", [("a ", 1.1), ("red", 1.65), (" boat", 1.1)]),
        ("(a [red) boat]", [("a ", 1.1), ("red", 1.0), (" boat", 1 / 1.1)]),
        ("(red)(boat)", [("redboat", 1.1)]),
        ("(red boat", [("red boat", 1.1)]),
        ("red boat)]", [("red boat)]", 1.0)]),
        ("red:1.3) boat", [("red:1.3) boat", 1.0)]),
        ("(red:1.2.3)", [("red:1.2.3", 1.1)]),
        ("(red:big)", [("red:big", 1.1)]),
        ("ratio 16:9, 5:1", [("ratio 16:9, 5:1", 1.0)]),
        (r"boat \(red\) \[old\]", [("boat (red) [old]", 1.0)]),
        (r"(boat \(red\):1.2)", [("boat (red)", 1.2)]),
        (r"\o/ a\b", [(r"\o/ a\b", 1.0)]),
        (r"(a\\)", [("a\\)", 1.1)]),
        ("a\n(red)\nboat", [("a\n", 1.0), ("red", 1.1), ("\nboat", 1.0)]),
    ],
)
def test_weights_in_brackets(prompt, wanted):
    (pieces,) = sections(prompt)
    assert [text for text, _ in pieces] == [text for text, _ in wanted]
    assert [weight for _, weight in pieces] == pytest.approx([weight for _, weight in wanted])


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("a BREAK boat", [["a"], ["boat"]]),
        ("a\nBREAK\nboat", [["a"], ["boat"]]),
        ("BREAK a", [[], ["a"]]),
        ("a BREAK BREAK boat BREAK", [["a"], [], ["boat"], []]),
        ("(a BREAK boat) hill", [["a"], ["boat", " hill"]]),
        ("BREAKFAST break", [["BREAKFAST break"]]),
    ],
)
def test_break_starts_a_section(prompt, wanted):
    assert [[text for text, _ in pieces] for pieces in sections(prompt)] == wanted


def test_brackets_reach_over_a_break():
    """The weight stays; in the web UI the word itself would be drawn."""
    assert sections("(a BREAK boat:1.5) hill")[1] == [("boat", 1.5), (" hill", 1.0)]


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("a [red:green:0.5] boat", "'[red:green:0.5]', by which the web UIs change it"),
        ("[boat:3]", "write (text:0.8) for a weight"),
        ("[boat::.5]", "[boat::.5]"),
        ("[red|green] boat", "[red|green]"),
        ("[a (red:1.2) boat:0.5]", "[a (red:1.2) boat:0.5]"),
        ("a boat AND a hill", "holds AND, of which the web UIs make two prompts"),
        ("a boat <lora:speed:0.8>", "holds '<lora:speed:0.8>', and kdpp loads no files"),
        ("a (embedding:neg:1.2) boat", "holds 'embedding:neg:1.2', and kdpp reads no embeddings"),
    ],
)
def test_what_kdpp_does_not_do_is_said(prompt, sentence):
    with pytest.raises(ValueError) as error:
        sections(prompt)
    assert sentence in str(error.value)


@pytest.mark.parametrize("prompt", ["(a|b)", "[a:b]", "[a (b:1.2)]", r"\[a:b:0.5\]", "sand AND_1"])
def test_what_only_looks_like_it_is_read(prompt):
    assert sections(prompt)


# Chunks -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return transformers.CLIPTokenizer.from_pretrained(folder)


def words(tokenizer, count):
    """A text of so many tokens, and they."""
    text = " ".join(["cat", "dog", "boat", "hill"][i % 4] for i in range(count))
    return text, tokenizer(text, add_special_tokens=False).input_ids[:count]


@pytest.mark.parametrize(
    ("parts", "wanted"),
    [
        ([75], [75]),
        ([76], [75, 1]),
        ([151], [75, 75, 1]),
        # A comma in the last 20 of 75: what follows it goes to the next chunk.
        ([60, 20], [61, 20]),
        ([55, 30], [56, 30]),
        ([54, 30], [75, 10]),
        ([74, 1], [75, 1]),
        ([73, 1], [75]),
        # The 76th token is a comma: no phrase is cut.
        ([60, 14, 9], [75, 10]),
        ([60, 15, 8], [61, 24]),
        # Again in the chunk that the phrase went to.
        ([60, 70, 19], [61, 71, 19]),
    ],
)
def test_where_a_prompt_is_cut(clip_tokenizer, parts, wanted):
    """``parts``: how many tokens stand between commas, each of which is one more."""
    prompt = ", ".join(words(clip_tokenizer, count)[0] for count in parts)
    found = chunks(clip_tokenizer, prompt)
    assert [len(chunk) for chunk in found] == wanted
    whole = clip_tokenizer(prompt, add_special_tokens=False).input_ids
    assert [token for chunk in found for token, _ in chunk] == whole


def test_breaks_and_weights_in_chunks(clip_tokenizer):
    """A break closes a chunk, an empty one, too; nothing is left behind the last one."""
    text, ids = words(clip_tokenizer, 80)
    found = chunks(clip_tokenizer, f"BREAK ({text}:1.5) BREAK cat, BREAK")
    assert [len(chunk) for chunk in found] == [0, 75, 5, 2]
    assert found[1] + found[2] == [(token, 1.5) for token in ids]
    assert found[3] == [(ids[0], 1.0), (COMMA, 1.0)]
    assert chunks(clip_tokenizer, "") == chunks(clip_tokenizer, "BREAK") == [[]]


# Encoding -----------------------------------------------------------------------------------------


def sd(tokenizer, layers=3):
    """SD with CLIP's own tokenizer, and so with 77 tokens."""
    pipe = tiny.sd()
    pipe.register_modules(tokenizer=tokenizer, text_encoder=encoder("CLIPTextModel", layers))
    return pipe


def sdxl(tokenizer, layers=3):
    """SDXL with two encoders of different weights and paddings."""
    pipe, other = tiny.sdxl(), type(tokenizer).from_pretrained(tokenizer.name_or_path)
    other.pad_token = "!"
    two = tiny.tiny(encoder("CLIPTextModelWithProjection", layers), seed=1)
    pipe.register_modules(
        tokenizer=tokenizer, tokenizer_2=other, text_encoder=encoder("CLIPTextModel", layers),
        text_encoder_2=two,
    )  # fmt: skip
    return pipe


def encoder(kind, layers):
    config = transformers.CLIPTextConfig(
        vocab_size=49408, hidden_size=16, intermediate_size=16, num_hidden_layers=layers,
        num_attention_heads=2, projection_dim=16, bos_token_id=BEGIN, eos_token_id=END,
    )  # fmt: skip
    return tiny.tiny(getattr(transformers, kind)(config))


MAKE = {"sd": sd, "sdxl": sdxl}


def by_hand(model, ids, pad, back=1, normed=True):
    """The output of the encoder's layer, ``back`` from its end, for one chunk of tokens."""
    inner, kept = getattr(model, "text_model", model), []
    layer = inner.encoder.layers[-back]
    hook = layer.register_forward_hook(lambda *call: kept.append(call[-1]))
    row = [BEGIN, *ids, END] + [pad] * (75 - len(ids))
    out = model(torch.tensor([row]))
    hook.remove()
    states = kept[0] if isinstance(kept[0], torch.Tensor) else kept[0][0]
    return (inner.final_layer_norm(states) if normed else states)[0], out[0]


def emphasised(states, first, weights):
    """Tokens multiplied from ``first`` on; the mean is then what it was."""
    scaled = states.clone()
    for i, weight in enumerate(weights):
        scaled[first + i] *= weight
    return scaled * (states.mean() / scaled.mean())


def prompt_of(tokenizer, *counts):
    """Words, and their tokens in chunks."""
    texts, ids = zip(*(words(tokenizer, count) for count in counts))
    return " BREAK ".join(texts), list(ids)


@pytest.mark.parametrize("name", MAKE)
def test_a_short_plain_prompt_is_encoded_as_diffusers_does(name, clip_tokenizer):
    """Bit for bit: at most 75 tokens and no brackets, for each half."""
    pipe = MAKE[name](clip_tokenizer)
    for prompt, negative in (("a red boat", ""), (words(clip_tokenizer, 75)[0], "blurry: 16:9, !")):
        found = pipelines.encode(pipe, prompt, negative)
        settings = {"device": "cpu", "num_images_per_prompt": 1, "negative_prompt": negative}
        wanted = pipe.encode_prompt(prompt, do_classifier_free_guidance=True, **settings)
        assert found["cond"].keys() == found["uncond"].keys()
        assert MASK not in found["cond"]
        for half, texts in zip(("cond", "uncond"), wanted):
            assert torch.equal(found[half][TEXT], texts)
        if name == "sdxl":
            for half, pooled in zip(("cond", "uncond"), wanted[2:]):
                assert torch.equal(found[half]["added_cond_kwargs"]["text_embeds"], pooled)


def test_without_a_negative_prompt_sdxl_has_zeros(clip_tokenizer):
    """As diffusers does; a pipeline that does not say so encodes the empty text."""
    pipe, prompt = sdxl(clip_tokenizer), prompt_of(clip_tokenizer, 75, 5)[0]
    pipe.register_to_config(force_zeros_for_empty_prompt=True)
    uncond = pipelines.encode(pipe, prompt)["uncond"]
    assert uncond[TEXT].shape == (1, 154, 32) and not uncond[TEXT].any()
    assert not uncond["added_cond_kwargs"]["text_embeds"].any()
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    empty, none = pipelines.encode(pipe, prompt, ""), pipelines.encode(pipe, prompt)
    torch.testing.assert_close(empty, none, rtol=0, atol=0)
    assert none["uncond"][TEXT].any()


@torch.no_grad()
def test_a_long_prompt_of_sd_is_encoded_chunk_by_chunk(clip_tokenizer):
    pipe = sd(clip_tokenizer)
    prompt, ids = words(clip_tokenizer, 96)
    found = pipelines.encode(pipe, prompt, "blurry")
    wanted = torch.cat([by_hand(pipe.text_encoder, part, END)[0] for part in (ids[:75], ids[75:])])
    assert torch.equal(found["cond"][TEXT][0], wanted)


@torch.no_grad()
def test_a_long_prompt_of_sdxl(clip_tokenizer):
    """Both encoders, the layer before the last without a norm; the first chunk's pooled vector."""
    pipe = sdxl(clip_tokenizer)
    prompt, ids = prompt_of(clip_tokenizer, 70, 3)
    found = pipelines.encode(pipe, prompt)["cond"]
    encoders = ((pipe.text_encoder, END), (pipe.text_encoder_2, 0))
    columns = [torch.cat([by_hand(model, part, pad, 2, normed=False)[0] for part in ids])
               for model, pad in encoders]  # fmt: skip
    assert torch.equal(found[TEXT][0], torch.cat(columns, dim=-1))
    pooled = by_hand(pipe.text_encoder_2, ids[0], 0)[1]
    assert torch.equal(found["added_cond_kwargs"]["text_embeds"], pooled)


@torch.no_grad()
def test_weights_are_applied_to_hidden_states(clip_tokenizer):
    """Of their own chunk, for each encoder by itself; the pooled vector has none."""
    ids = clip_tokenizer("cat dog boat", add_special_tokens=False).input_ids
    found = pipelines.encode(sd(clip_tokenizer), "cat (dog:1.5) [boat] BREAK hill")["cond"]
    states = by_hand(sd(clip_tokenizer).text_encoder, ids, END)[0]
    wanted = emphasised(states, 2, [1.5, 1 / 1.1])
    torch.testing.assert_close(found[TEXT][0, :77], wanted)
    hill = clip_tokenizer("hill", add_special_tokens=False).input_ids
    plain = by_hand(sd(clip_tokenizer).text_encoder, hill, END)[0]
    assert torch.equal(found[TEXT][0, 77:], plain)
    pipe = sdxl(clip_tokenizer)
    found, plain = pipelines.encode(pipe, "cat (dog:1.5)"), pipelines.encode(pipe, "cat dog")
    for half in (slice(0, 16), slice(16, 32)):
        wanted = emphasised(plain["cond"][TEXT][0, :, half], 2, [1.5])
        torch.testing.assert_close(found["cond"][TEXT][0, :, half], wanted)
    pooled = [one["cond"]["added_cond_kwargs"]["text_embeds"] for one in (found, plain)]
    assert torch.equal(*pooled)


def test_states_without_weights_are_left_alone():
    """Whatever their mean, which would divide by 0 here."""
    states = torch.tensor([[1.0, -1.0], [0.0, 0.0]])
    assert weighted(states, [1.0, 1.0]) is states


def test_escaped_brackets_are_text(clip_tokenizer):
    pipe = sd(clip_tokenizer)
    found = pipelines.encode(pipe, r"boat \(red\)", r"\[x\]")
    wanted = pipe.encode_prompt("boat (red)", "cpu", 1, True, "[x]")
    assert torch.equal(found["cond"][TEXT], wanted[0])
    assert torch.equal(found["uncond"][TEXT], wanted[1])


@torch.no_grad()
@pytest.mark.parametrize("skip", [1, 2, 3])
def test_clip_skip_of_sd(skip, clip_tokenizer):
    """1 is the last layer, 3 of 3 the first; each with the last norm, both halves."""
    pipe, ids = sd(clip_tokenizer), clip_tokenizer("cat", add_special_tokens=False).input_ids
    found = pipelines.encode(pipe, "cat", "", clip_skip=skip)
    for half, tokens in (("cond", ids), ("uncond", [])):
        wanted = by_hand(pipe.text_encoder, tokens, END, skip)[0]
        assert torch.equal(found[half][TEXT][0], wanted)
    if skip == 1:
        torch.testing.assert_close(found, pipelines.encode(pipe, "cat", ""), rtol=0, atol=0)


@torch.no_grad()
def test_clip_skip_of_sdxl(clip_tokenizer):
    """2 is what it takes by default; the pooled vector is the last layer's, whatever is read."""
    pipe, ids = sdxl(clip_tokenizer), clip_tokenizer("cat", add_special_tokens=False).input_ids
    two, three = (pipelines.encode(pipe, "cat", "", clip_skip=skip) for skip in (2, 3))
    torch.testing.assert_close(two, pipelines.encode(pipe, "cat", ""), rtol=0, atol=0)
    columns = [by_hand(model, ids, pad, 3, normed=False)[0]
               for model, pad in ((pipe.text_encoder, END), (pipe.text_encoder_2, 0))]  # fmt: skip
    assert torch.equal(three["cond"][TEXT][0], torch.cat(columns, dim=-1))
    pooled = [one["cond"]["added_cond_kwargs"]["text_embeds"] for one in (two, three)]
    assert torch.equal(*pooled)


@pytest.mark.parametrize(
    ("make", "skip", "sentence"),
    [
        (sd, 0, "clip_skip is 0; it must be a whole number ≥ 1"),
        (sd, 4, "clip_skip is 4; it must be in 1 … 3"),
        (sdxl, 1, "clip_skip is 1; it must be a whole number ≥ 2"),
        (lambda _: tiny.flux(), 1, "clip_skip is for the prompts of SD and SDXL; leave it out"),
    ],
)
def test_layers_that_are_not_there(make, skip, sentence, clip_tokenizer):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        pipelines.encode(make(clip_tokenizer), "cat", clip_skip=skip)


# Any batch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKE)
def test_a_batch_of_four_lengths_is_four_singles(name, clip_tokenizer):
    """Rows are the singles' bit for bit, the rest is masked; so are the answers, as if alone."""
    pipe = MAKE[name](clip_tokenizer)
    prompts = [prompt_of(clip_tokenizer, *counts)[0] for counts in ((3,), (75, 9), (4, 5, 6), (7,))]
    negatives = ["", "cat", prompts[1], prompts[2]]
    batch = pipelines.encode(pipe, prompts, negatives, height=16, width=16)
    denoiser = pipelines.denoiser_of(pipe)
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = torch.full((4,), 3.0)
    answers = {half: denoiser(x, sigma, cond=batch[half]) for half in batch}
    for i, lengths in enumerate(((1, 1), (2, 1), (3, 2), (1, 3))):
        single = pipelines.encode(pipe, prompts[i], negatives[i], height=16, width=16)
        assert (MASK in single["cond"]) == (lengths[0] != lengths[1])
        for half, length in zip(("cond", "uncond"), lengths):
            own = slice(0, 77 * length)
            assert torch.equal(batch[half][TEXT][i, own], single[half][TEXT][0, own])
            assert batch[half][MASK][i].tolist() == [j < 77 * length for j in range(231)]
            alone = {key: value[i : i + 1] for key, value in batch[half].items()
                     if key not in (TEXT, MASK, "added_cond_kwargs")}  # fmt: skip
            alone[TEXT] = single[half][TEXT][:, own]
            if name == "sdxl":
                alone["added_cond_kwargs"] = single[half]["added_cond_kwargs"]
            wanted = denoiser(x[i : i + 1], sigma[:1], cond=alone)
            torch.testing.assert_close(answers[half][i : i + 1], wanted, rtol=0, atol=1e-5)
            blurred = denoiser(x[i : i + 1], sigma[:1], cond=alone | {
                TEXT: batch[half][TEXT][i : i + 1]})  # fmt: skip
            assert length == 3 or (blurred - wanted).abs().max() > 1e-4  # the mask is felt


def test_a_second_prompt_of_another_length(clip_tokenizer):
    """SDXL's second encoder has a text of its own; the shorter one gets empty chunks."""
    pipe = sdxl(clip_tokenizer)
    prompt, _ = prompt_of(clip_tokenizer, 5, 6)
    found = pipelines.encode(pipe, prompt, "", prompt_2="hill")["cond"]
    both, hill = (pipelines.encode(pipe, text, "")["cond"]
                  for text in (prompt, "hill BREAK BREAK cat"))  # fmt: skip
    assert torch.equal(found[TEXT][..., :16], both[TEXT][..., :16])
    assert torch.equal(found[TEXT][..., 16:], hill[TEXT][:, :154, 16:])
    with pytest.raises(ValueError, match=r"^2 second prompts for 1 prompts; give as many$"):
        pipelines.encode(pipe, prompt, prompt_2=["hill", "boat"])
    with pytest.raises(TypeError, match=r"^encode takes no lora_scale beside a prompt$"):
        pipelines.encode(pipe, prompt, lora_scale=0.5)


def test_loras_of_the_text_encoder_are_felt(clip_tokenizer):
    peft = pytest.importorskip("peft", reason="needs peft, for adapters")
    pipe = sd(clip_tokenizer)
    plain = pipelines.encode(pipe, "cat")["cond"][TEXT]
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    pipe.text_encoder.add_adapter(config)
    found = pipelines.encode(pipe, "cat")["cond"][TEXT]
    assert torch.equal(found, pipe.encode_prompt("cat", "cpu", 1, False)[0])
    assert not torch.equal(found, plain)


def test_textual_inversions_that_diffusers_loaded(clip_tokenizer, tmp_path):
    """A word of two vectors is two tokens, in brackets, too."""
    tokenizer = type(clip_tokenizer).from_pretrained(clip_tokenizer.name_or_path)
    pipe = sd(tokenizer)
    pipe.load_textual_inversion({"<mine>": torch.randn(2, 16)}, token="<mine>")
    found = pipelines.encode(pipe, "a <mine> boat", "")["cond"][TEXT]
    assert torch.equal(found, pipe.encode_prompt("a <mine> boat", "cpu", 1, False)[0])
    (chunk,) = chunks(tokenizer, pipe.maybe_convert_prompt("a (<mine>:1.2)", tokenizer))
    assert [weight for _, weight in chunk] == [1.0, 1.2, 1.2]


# Warnings -----------------------------------------------------------------------------------------


@pytest.fixture
def said(caplog, monkeypatch):
    """What diffusers and transformers log."""
    for name in ("diffusers", "transformers"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("family", ["sd", "sdxl", "lcm", "sd3", "flux"])
def test_nothing_warns_of_77_tokens(family, said):
    """SD's and SDXL's prompts are read to the end, and those of SD3 and FLUX by T5."""
    pipe = getattr(tiny, family)()
    long = "a red boat on the green hill " * 3
    with torch.no_grad():
        found = pipelines.encode(pipe, long, long)
    assert said() == []
    other = pipelines.encode(pipe, long + "dark", long)
    assert not torch.equal(found["cond"][TEXT], other["cond"][TEXT])


def test_the_end_that_nobody_reads_is_warned_of(said):
    """SD3 without T5."""
    pipe = tiny.sd3()
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipelines.encode(pipe, "a red boat on the green hill " * 3)
    assert any("CLIP can only handle" in message for message in said())


@pytest.mark.parametrize(
    "family", ["sd3", "flux", "flux2", "krea2", "z_image", "qwen_image", "wan"]
)
def test_brackets_are_text_for_other_encoders(family, monkeypatch):
    """Their tokenizers are asked for the prompt as it is."""
    pipe = getattr(tiny, family)()
    tokenizer = next(getattr(pipe, name) for name in ("tokenizer_3", "tokenizer_2", "tokenizer")
                     if getattr(pipe, name, None) is not None)  # fmt: skip
    asked, plain = [], type(tokenizer).__call__

    def ask(self, text, *args, **kwargs):
        asked.append(str(text))
        return plain(self, text, *args, **kwargs)

    monkeypatch.setattr(type(tokenizer), "__call__", ask)
    prompt = "a (red:1.3) boat AND [a|hill] BREAK <lora:x:1>"
    pipelines.encode(pipe, prompt, "[x:0.5]")
    assert all(any(text in one for one in asked) for text in (prompt, "[x:0.5]"))
