"""LLaVA against Hugging Face's own (recorded in `tests/golden`), and against plain numpy."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from refollama.errors import BadOption, FormatError, UnsupportedModel
from refollama.models.llava import Gallery, Llava
from refollama.models.load import load_eyes, load_net
from refollama.models.memory import to_gpu
from refollama.weights import open_weights
from refollama.weights.blocks import TYPE_ID
from refollama.weights.gguf import write_gguf
from tests import tiny_llava
from tests.golden import small_llava
from tests.models.test_recorded import write as write_checkpoint
from tests.tiny_llava import png, write_eyes

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "llava.json").read_text())
LIMIT = 1e-4

NAMES = {  # of a checkpoint's tensors → of a GGUF file's
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding": "v.patch_embd",
    "embeddings.position_embedding": "v.position_embd",
    "pre_layrnorm": "v.pre_ln",
    "post_layernorm": "v.post_ln",
    "multi_modal_projector.linear_1": "mm.0",
    "multi_modal_projector.linear_2": "mm.2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
}
LAST = "encoder.layers.2."  # LLaVA takes what comes before it
ERAS = {
    2023: {"mlp.fc1": "ffn_down", "mlp.fc2": "ffn_up"},
    2024: {"mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"},
}


def carried(path, activation="quick_gelu", *, era=2023, whole=False):
    """The recorded tower as a projector's file of that time."""
    tensors = {}
    for name, values in small_llava.vision_weights().items():
        if whole or not (name.startswith(LAST) or "post_layernorm" in name):
            tensors[gguf_name(name, NAMES | ERAS[era])] = values
    vision = small_llava.VISION
    said = tiny_llava.metadata(
        feed_forward_length=vision["intermediate_size"],
        block_count=3 if whole else 2,
        feature_layer=[2] if whole else None,
    )
    said["clip.use_gelu"] = activation == "gelu"
    if era > 2023:
        said["clip.projector_type"] = "mlp"
    write_gguf(path, said, {n: (TYPE_ID["F32"], x.shape, x.tobytes()) for n, x in tensors.items()})
    return path


def gguf_name(name, names):
    if name in names:
        return names[name]
    head, kind = name.rsplit(".", 1)
    if not head.startswith("encoder.layers."):
        return f"{names[head]}.{kind}"
    _, _, layer, part = head.split(".", 3)
    return f"v.blk.{layer}.{names[part]}.{kind}"


# ── against the recorded ──────────────────────────────────────────────────────────────────────


@torch.no_grad()
@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize("activation", small_llava.TOWERS)
@pytest.mark.parametrize("whole", [False, True], ids=["without the last block", "whole"])
def test_the_tower_sees_what_the_recorded_one_saw(activation, era, whole, tmp_path):
    eyes = load_eyes(carried(tmp_path / "eyes.gguf", activation, era=era, whole=whole))
    found = eyes.v(torch.from_numpy(small_llava.some_pixels())[None])[0]
    expected = np.array(GOLDEN["towers"][activation])
    assert np.abs(found.numpy() - expected).max() < LIMIT
    (other,) = set(GOLDEN["towers"]) - {activation}
    assert np.abs(expected - np.array(GOLDEN["towers"][other])).max() > 10 * LIMIT


@torch.no_grad()
def test_so_many_blocks_are_run_as_are_asked_for(tmp_path):
    """The recorded one ran two of three; a caller's word counts for more than the file's."""
    path = carried(tmp_path / "eyes.gguf", whole=True)
    expected = np.array(GOLDEN["towers"]["quick_gelu"])
    for asked, same in {None: True, -1: True, 2: True, 3: False, 1: False, -2: False}.items():
        eyes = load_eyes(path, n_blocks=asked)
        found = eyes.v(torch.from_numpy(small_llava.some_pixels())[None])[0].numpy()
        assert (np.abs(found - expected).max() < LIMIT) == same, asked
    for asked in (0, 4, -3):
        with pytest.raises(BadOption, match=rf"eyes.gguf: vision_blocks is {asked}, .* 1 … 3"):
            load_eyes(path, n_blocks=asked)


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize("step", [64, 5])
def test_logits_equal_the_recorded(era, step, tmp_path, measured):
    """The picture stands twice in the prompt; read at once and in small parts."""
    net = llava(tmp_path, carried(tmp_path / "eyes.gguf", era=era))
    seen = net.gallery.find(b"it", small_llava.some_pixels)
    net.look(seen)
    ids, rows = [], iter([*seen.ids, *seen.ids])
    for id in small_llava.some_prompt():
        ids.append(next(rows) if id == small_llava.PICTURE else id)
    off = np.abs(logits_of(net, ids, step) - np.array(GOLDEN["logits"])).max()
    assert off < LIMIT
    measured("models", "transformers/llava", "transformers", off, len(ids))


def llava(folder, eyes):
    net = load_net(write_checkpoint(folder / "text.gguf", small_llava.TEXT), eyes=load_eyes(eyes))
    assert isinstance(net, Llava)
    return net


@torch.no_grad()
def logits_of(net, tokens, step):
    ids, cache, found = torch.tensor(tokens)[None], net.new_cache(), []
    for start in range(0, len(tokens), step):
        part = ids[:, start : start + step]
        end = start + part.shape[1]
        states = net.hidden(part, torch.arange(start, end)[None], cache.rows([0], end))
        found.append(net.output(states[0]))
    return torch.cat(found).numpy()


# ── projectors, written once more in numpy ────────────────────────────────────────────────────


class Plain:
    """The tensors of a file, and a few words of algebra."""

    def __init__(self, path):
        self.tensors = {n: t.unpack().double().numpy() for n, t in open_weights(path).items()}

    def linear(self, x, name):
        return x @ self.tensors[f"{name}.weight"].T + self.tensors.get(f"{name}.bias", 0)

    def norm(self, x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

    def slide(self, x, name, stride):
        """(n, n, C) → (⌈n / stride⌉, …, C): each channel by itself, zeros around."""
        weight = self.tensors[f"{name}.weight"].reshape(-1, 3, 3)
        n = len(x)
        around = np.zeros((n + 2, n + 2, x.shape[-1]))
        around[1:-1, 1:-1] = x
        rows = range(0, n, stride)
        found = [
            [sum(around[i + a, j + b] * weight[:, a, b] for a in range(3) for b in range(3))
             for j in rows] for i in rows
        ]  # fmt: skip
        return np.array(found) + self.tensors.get(f"{name}.bias", 0)

    def mlp(self, x):
        return self.linear(gelu(self.linear(x, "mm.0")), "mm.2")

    def mlp_norm(self, x):
        x = gelu(self.norm(self.linear(x, "mm.0"), "mm.1"))
        return self.norm(self.linear(x, "mm.3"), "mm.4")

    def plain(self, x):
        return self.linear(x, "mm.0")

    def ldp(self, x):
        x = self.linear(gelu(self.linear(x, "mm.model.mlp.1")), "mm.model.mlp.3")
        x = x.reshape(4, 4, -1)
        x = x + self.light(x, "mm.model.mb_block.1.block", 1)
        x = self.light(x, "mm.model.mb_block.2.block", 2)
        return x.reshape(4, -1)

    def light(self, x, name, stride):
        x = self.norm(self.slide(x, f"{name}.0.0", stride), f"{name}.0.1")
        x = x * np.clip(x + 3, 0, 6) / 6
        inner = np.maximum(self.linear(x.mean((0, 1)), f"{name}.1.fc1"), 0)
        x = x * np.clip(self.linear(inner, f"{name}.1.fc2") / 6 + 0.5, 0, 1)
        return self.norm(self.linear(x, f"{name}.2.0"), f"{name}.2.1")

    def ldpv2(self, x):
        x = self.linear(gelu(self.linear(x, "mm.model.mlp.0")), "mm.model.mlp.2")
        x = x.reshape(2, 2, 2, 2, -1).mean((1, 3))
        return (x + self.slide(x, "mm.model.peg.0", 1)).reshape(4, -1)


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


@torch.no_grad()
@pytest.mark.parametrize("kind", tiny_llava.PROJECTORS)
def test_a_projector_is_what_it_is_written_once_more(kind, tmp_path):
    path = write_eyes(tmp_path / "eyes.gguf", kind)
    eyes, judge = load_eyes(path), Plain(path)
    patches = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))
    found = eyes.mm(patches).numpy()
    assert found.shape == (2, eyes.mm.rows(4), eyes.mm.width) == (2, tiny_llava.ROWS[kind], 64)
    for one, rows in zip(patches.double().numpy(), found, strict=True):
        expected = getattr(judge, "plain" if kind == "linear" else kind)(one)
        np.testing.assert_allclose(rows, expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("type", ["F16", "Q8_0", "Q4_0"])
def test_packed_eyes_see_what_their_unpacked_values_would(type, tmp_path):
    packed = write_eyes(tmp_path / "packed.gguf", type=type)
    values = {n: t.unpack() for n, t in open_weights(packed).items()}
    plain = tmp_path / "plain.gguf"
    write_gguf(
        plain,
        tiny_llava.metadata(),
        {n: (TYPE_ID["F32"], tuple(x.shape), x.numpy().tobytes()) for n, x in values.items()},
    )
    pixels = torch.from_numpy(small_llava.some_pixels())[None]
    one, other = load_eyes(packed), load_eyes(plain)
    assert torch.equal(one.mm(one.v(pixels)), other.mm(other.v(pixels)))
    assert one.mm.get_submodule("2").weight.dtype == torch.uint8


# ── what does not fit ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"keys": {"general.architecture": "llama"}}, UnsupportedModel, "'llama'; expected 'clip'"),
        ({"keys": {"clip.has_vision_encoder": False}}, UnsupportedModel, "nothing to see with"),
        ({"keys": {"clip.projector_type": "resampler"}}, UnsupportedModel, "linear, mlp, mlp_norm"),
        ({"keys": {"clip.vision.mm_patch_merge_type": "spatial_unpad"}}, UnsupportedModel, "tiles"),
        ({"keys": {"clip.vision.feature_layer": [1, 2]}}, UnsupportedModel, "2 layers"),
        ({"keys": {"clip.vision.feature_layer": [3]}}, FormatError, "1 to 2"),
        ({"keys": {"clip.vision.image_mean": [1.0]}}, FormatError, "image_mean"),
        ({"keys": {"clip.vision.image_std": [1.0, 0.0, 1.0]}}, FormatError, "image_std"),
        ({"keys": {"clip.vision.attention.head_count": 5}}, FormatError, "multiple"),
        ({"keys": {"clip.vision.image_size": 3}}, FormatError, "patches"),
        ({"keys": {"clip.vision.image_size": 0}}, FormatError, "image_size is 0"),
        ({"keys": {"clip.vision.image_size": 390}}, FormatError, "1 to 4096 patches"),
        ({"keys": {"clip.vision.image_size": 30}}, FormatError, "position_embd"),
        ({"kind": "ldpv2", "image_size": 6}, FormatError, "no rows"),
        ({"drop": "v.class_embd"}, FormatError, "v.class_embd is missing"),
        ({"drop": "v.blk.1.ln2.bias"}, FormatError, "v.blk.1.ln2.bias is missing"),
        ({"drop": "v.blk.1.ffn_up.weight"}, FormatError, "v.blk.1.ffn_up.weight is missing"),
        ({"drop": "mm.0.weight"}, FormatError, "mm.0.weight is missing"),
        ({"extra": {"v.blk.0.ls1.weight": (32,)}}, UnsupportedModel, "v.blk.0.ls1.weight"),
        ({"extra": {"v.patch_embd.weight": (32, 3, 7, 7)}}, FormatError, "32 × 3 × 6 × 6"),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(changes, error, words, tmp_path):
    with pytest.raises(error, match=words) as told:
        load_eyes(write_eyes(tmp_path / "eyes.gguf", **changes))
    assert str(told.value).startswith("eyes.gguf: ")


def test_eyes_of_another_model_are_refused(tiny, tmp_path):
    eyes = load_eyes(write_eyes(tmp_path / "eyes.gguf", width=96))
    with pytest.raises(UnsupportedModel, match="96 numbers.* 64: they do not belong together"):
        load_net(tiny, eyes=eyes)


def test_sides_of_one_make_no_difference(tmp_path):
    """A window of one channel is (C, 3, 3), (C, 1, 3, 3) or (1, C, 3, 3), by its converter."""
    paths = []
    for at, shape in enumerate([(64, 3, 3), (64, 1, 3, 3), (1, 64, 3, 3)]):
        extra = {"mm.model.peg.0.weight": shape}
        paths.append(write_eyes(tmp_path / f"{at}.gguf", "ldpv2", extra=extra))
    windows = [load_eyes(path).mm.get_buffer("model.peg.0.weight") for path in paths]
    assert {window.shape for window in windows} == {(64, 3, 12)}


# ── pictures and their ids ────────────────────────────────────────────────────────────────────


@pytest.fixture
def sighted(tiny, tmp_path):
    return load_net(tiny, eyes=load_eyes(write_eyes(tmp_path / "eyes.gguf")))


def test_a_picture_is_known_by_its_content(sighted):
    red, blue = sighted.picture(png((200, 0, 0))), sighted.picture(png((0, 0, 200)))
    assert sighted.picture(png((200, 0, 0))) is red
    V = sighted.n_vocab
    assert (red.ids, blue.ids) == (range(V, V + 16), range(V + 16, V + 32))


def test_a_picture_is_encoded_once_and_when_it_is_needed(sighted):
    looks = []
    sighted.v.register_forward_hook(lambda *_: looks.append(1))
    seen = sighted.picture(png())
    assert looks == []
    for _ in range(3):
        sighted.look(sighted.picture(png()))
    assert looks == [1] and seen.rows.shape == (16, 64)
    assert seen.pixels is None  # nobody needs them any more


@torch.no_grad()
def test_the_embedding_reads_words_and_pictures(sighted):
    red, blue = sighted.picture(png((200, 0, 0))), sighted.picture(png((0, 0, 200)))
    for one in (red, blue):
        sighted.look(one)
    ids = torch.tensor([[5, blue.ids[3], 6], [red.ids[0], 7, red.ids[15]]])
    found = sighted.token_embd(ids)
    words = sighted.token_embd(torch.tensor([5, 6, 7]))
    expected = torch.stack([
        torch.stack([words[0], blue.rows[3], words[1]]),
        torch.stack([red.rows[0], words[2], red.rows[15]]),
    ])  # fmt: skip
    assert torch.equal(found, expected)


def test_the_one_seen_longest_ago_goes_unless_somebody_holds_it():
    gallery = Gallery(first=100, rows=4, most=2)

    def see(content):
        return gallery.find(content, lambda: np.zeros((3, 2, 2), np.float32))

    held, gone = see(b"a"), see(b"b").ids
    see(b"c"), see(b"d")
    assert see(b"a") is held  # not among the last two, but alive
    again = see(b"b").ids
    assert again != gone and again.start >= 116  # ids are never used again


def test_one_that_is_seen_again_stays_longer():
    gallery = Gallery(first=100, rows=4, most=2)

    def see(content):
        return gallery.find(content, lambda: np.zeros((3, 2, 2), np.float32)).ids

    red, blue, red_again, other = (see(content) for content in (b"red", b"blue", b"red", b"other"))
    assert red_again == red == see(b"red")
    assert blue != see(b"blue") != other


def test_what_is_forgotten_is_looked_at_anew(sighted):
    seen = sighted.picture(png())
    sighted.look(seen)
    sighted.gallery.forget()
    again = sighted.picture(png())
    assert again.ids != seen.ids and again.rows is None
    assert torch.equal(sighted.token_embd(torch.tensor([seen.ids[2]]))[0], seen.rows[2])


@pytest.mark.cuda
def test_eyes_on_a_gpu_see_the_same(sighted):
    seen = sighted.picture(png())
    sighted.look(seen)
    expected = seen.rows
    to_gpu(sighted, torch.device("cuda", 0), 1)
    assert sighted.v.class_embd.is_cuda and not sighted.token_embd.weight.is_cuda
    sighted.gallery.forget()
    again = sighted.picture(png())
    sighted.look(again)
    torch.testing.assert_close(again.rows, expected, atol=1e-3, rtol=1e-3)
